"""Where the jobs of a sweep run: on this machine, on a SLURM cluster, on a Ray cluster."""

from experiments.sweep.executors.contract import Executor, Handle, Work
from experiments.sweep.executors.local import Local
from experiments.sweep.executors.ray import Ray
from experiments.sweep.executors.slurm import Slurm

__all__ = ["Executor", "Handle", "Local", "Ray", "Slurm", "Work"]
