"""Top-p selection: the fewest key blocks of a query block whose scores reach a share of the row."""
