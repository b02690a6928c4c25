"""The residual additions of a traced model: which sums they are, and why some cannot become steps."""
