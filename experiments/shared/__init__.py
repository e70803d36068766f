"""What the experiments share: studies with their grids, trainer, statistics and plots, and what they train."""
