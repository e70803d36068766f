"""What a sweep asks of the place where its jobs run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stu.errors import CommandError, require

# Where launchers say how many processes they have started for one command.
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")


@dataclass(frozen=True)
class Work:
    """A command to start, whose output is appended to the file `log`.

    environment: variables beside those of the place. devices, nodes: the processes that train in it, per node, and its
    nodes. slot: 0 … workers-1, of no other job that runs. name: what the job is called on a cluster.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    devices: int = 1
    nodes: int = 1
    slot: int = 0
    name: str = "job"


class Handle(Protocol):
    """A job that has been submitted."""

    def poll(self) -> int | None:
        """Its exit code as a shell shows it, 128 + signal for a killed one; None while it is queued or runs."""
        ...

    def stop(self) -> None:
        """Have it save and end; the second time, nothing. `poll` says when it has ended."""
        ...

    def kill(self) -> None:
        """End it at once with all its processes, without saving."""
        ...

    @property
    def queued(self) -> bool:
        """Whether it waits for its turn on a cluster."""
        ...


class Executor(Protocol):
    """Where jobs run, `workers` of them at a time."""

    workers: int

    def submit(self, work: Work) -> Handle:
        """Start it, or queue it; from the main thread, with whose end the job saves and ends."""
        ...

    def close(self) -> None:
        """Leave; jobs that still run are not waited for."""
        ...


def require_workers(workers: int) -> None:
    """Raise `CommandError` for a number of workers that is none, and in a sweep that is one of several processes."""
    works = isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1
    require(works, "hydra.launcher.workers", workers, "must be a whole number, 1 or more", CommandError)
    for variable in COUNTS:
        count = os.environ.get(variable, "1")
        allowed = "a sweep is one process, which starts those of its jobs: start it without torchrun, srun or mpirun"
        require(count in ("0", "1"), variable, count, allowed, CommandError)
