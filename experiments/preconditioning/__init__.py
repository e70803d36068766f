"""Whether preconditioned targets are easier to learn: `python -m experiments.preconditioning`."""
