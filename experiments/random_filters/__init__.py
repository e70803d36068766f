"""Whether the filters of the Hankel matrix matter, or any others would do: `python -m experiments.random_filters`."""
