"""What is done with many runs: compare them."""
