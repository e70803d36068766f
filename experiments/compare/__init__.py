"""What runs have reached, side by side: `python -m experiments.compare runs/`."""
