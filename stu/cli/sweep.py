"""What a sweep of Hydra's own sweepers, hydra/sweeper=basic, says of itself: which of its jobs begins."""

from contextlib import suppress
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


class Jobs(Callback):
    """Prints "job 2 of 6: model=stu seed=1" before each job; without the number of all where the sweeper decides it
    as it goes.
    """

    total: int | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Count the jobs as Hydra's own sweeper does."""
        sweeper = config.hydra.sweeper
        # by name: Hydra imports its plugins again
        if sweeper._target_ == f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}":
            chosen = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            with suppress(HydraException):  # the sweeper raises it again
                overrides = parser.parse_overrides([*chosen, *config.hydra.overrides.task])
                [jobs] = BasicSweeper.split_arguments(overrides, None)
                self.total = len(jobs)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Say which job it is."""
        hydra = config.hydra
        if hydra.mode == RunMode.MULTIRUN:
            of_total = "" if self.total is None else f" of {self.total}"
            print(f"job {hydra.job.num + 1}{of_total}: {' '.join(hydra.overrides.task)}", flush=True)
