"""How many sequences it takes to learn a system of long memory: `python -m experiments.lds_sample_efficiency`."""
