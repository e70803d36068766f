"""How the models compare on tasks that two CPU cores can train: `python -m experiments.mini`."""
