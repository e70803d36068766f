"""Whether it is the filters of the Hankel matrix that matter, or any: `python -m experiments.random_filters`."""
