"""Which clusters of keys each cluster of queries attends to: size-weighted top-p with a floor (SVG2)."""
