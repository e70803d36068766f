"""The longest copying, adding and induction-heads problems that each model solves at equal size."""
