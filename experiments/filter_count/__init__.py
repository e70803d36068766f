"""How the error falls with the number of spectral filters: `python -m experiments.filter_count`."""
