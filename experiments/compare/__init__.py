"""A table of runs: `python -m experiments.compare runs/`."""
