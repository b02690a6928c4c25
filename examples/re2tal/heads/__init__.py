"""Detection heads: from features over time to scored segments."""
