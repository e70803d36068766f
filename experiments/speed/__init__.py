"""How fast each mixer is, and how much memory it takes: `python -m experiments.speed`."""
