"""What became of training runs: their curves in one figure and their results in one table."""
