"""What Hydra finds of sweeps: it imports this file at every start, so it imports nothing slow."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Fresh(Sweeper):
    """`python train.py -m …`: each job in a process of its own, see `experiments.sweep`. Arguments: its `Options`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the configuration of the words that are not swept."""
        self.composed = config

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs; raises `SystemExit` where not all have finished."""
        from experiments.sweep import run

        if code := run(self.composed, arguments, **self.options):
            raise SystemExit(code)
