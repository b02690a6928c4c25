"""Random programs on random residual nets, against the same program with everything kept."""
