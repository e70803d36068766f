"""How the error depends on the distance of the modes from the unit circle: `python -m experiments.spectral_gap`."""
