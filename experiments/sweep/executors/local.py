"""Jobs as processes of this machine, which divide its cores and GPUs among them."""

import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from experiments.sweep.executors import process
from experiments.sweep.executors.contract import Work, require_workers
from stu.errors import CommandError, require
from stu.resources import cores

THREADS = "OMP_NUM_THREADS"
GPUS = "CUDA_VISIBLE_DEVICES"


class Local:
    """`workers` jobs at a time.

    Each of their processes computes with cores // (workers · devices) threads, at least one, unless OMP_NUM_THREADS is
    set; each job sees as many GPUs as it has devices, those that the fewest other jobs use.

    gpus: numbers or UUIDs of those that may be used; None: all that this process sees. grace: seconds after which a job
    that was asked to stop is killed, None: never.
    """

    def __init__(self, workers: int = 1, gpus: Sequence[int | str] | None = None, grace: float | None = 600.0) -> None:
        require_workers(workers)
        listed = isinstance(gpus, Sequence) and not isinstance(gpus, str) and len(set(gpus)) == len(gpus)
        allowed = "must be a list of numbers or UUIDs, each once, or null: all"
        require(gpus is None or listed, "hydra.launcher.gpus", gpus, allowed, CommandError)
        allowed = "must be a number of seconds, or null: never"
        require(grace is None or grace >= 0, "hydra.launcher.grace", grace, allowed, CommandError)
        self.workers, self.grace = workers, grace
        self.gpus = visible_gpus() if gpus is None else [str(gpu) for gpu in gpus]
        self._divides = gpus is not None or bool(self.gpus)
        self._used: Counter[str] = Counter()  # jobs per GPU
        self._shares = False

    def submit(self, work: Work) -> "Process":
        """Start it (`Executor.submit`); several nodes the command itself refuses."""
        gpus = self._take(work.devices, work.slot)
        own = {THREADS: str(max(1, cores() // (self.workers * work.devices)))} | process.unlaunched(os.environ)
        if self._divides:
            own[GPUS] = ",".join(gpus)
        given = own | dict(work.environment)
        if THREADS in work.environment:  # of a run that goes on, perhaps from a larger machine
            given[THREADS] = str(min(int(work.environment[THREADS]), cores()))
        started = process.start(work.command, log=work.log, environment=given)
        return Process(started, self.grace, lambda: self._used.subtract(gpus))

    def close(self) -> None:
        """Nothing is left open."""

    def _take(self, devices: int, slot: int) -> list[str]:
        """The GPUs of a job: those that the fewest others use, from the slot's own on."""
        if not self.gpus:
            return []
        first = slot * devices % len(self.gpus)
        turned = [*self.gpus[first:], *self.gpus[:first]]
        taken = sorted(turned, key=lambda gpu: self._used[gpu])[:devices]
        if not self._shares and any(self._used[gpu] for gpu in taken):
            self._shares = True
            print(f"{self.workers} jobs at a time share {len(self.gpus)} GPUs: {', '.join(self.gpus)}", file=sys.stderr)
        self._used.update(taken)
        return sorted(taken, key=self.gpus.index)


class Process:
    """A job that runs here."""

    queued = False

    def __init__(self, started: subprocess.Popen[bytes], grace: float | None, free: Callable[[], None]) -> None:
        self.pid = started.pid
        self._process, self._grace, self._free = started, grace, free
        self._code: int | None = None
        self._kill_at: float | None = None  # set when it is asked to stop

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self._code is None:
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self.kill()
            self._code = process.ended(self._process)
            if self._code is not None:
                self._free()
        return self._code

    def stop(self) -> None:
        """SIGTERM, once."""
        if self._kill_at is None and self.poll() is None:
            self._kill_at = time.monotonic() + (math.inf if self._grace is None else self._grace)
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, to its loader processes and those of other devices, too."""
        process.kill(self._process)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lists, or all GPUs of this machine, with the parts of those that are divided (MIG)."""
    if (listed := os.environ.get(GPUS)) is not None:
        gpus = [gpu.strip() for gpu in listed.split(",")]
        known = [i for i, gpu in enumerate(gpus) if not re.fullmatch(r"\d+|(GPU|MIG)-.+", gpu)]
        return gpus[: known[0]] if known else gpus  # CUDA ignores what follows an unknown one, such as -1
    with suppress(OSError, subprocess.SubprocessError):  # no driver
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
        return listed_gpus(found)
    return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def listed_gpus(text: str) -> list[str]:
    """The names of the GPUs in the output of `nvidia-smi -L`, and of parts in place of those that are divided."""
    gpus: list[list[str]] = []
    for line in text.splitlines():
        if whole := re.match(r"GPU (\d+):", line):
            gpus.append([whole[1]])
        elif gpus and (part := re.match(r"\s+MIG .*UUID: (MIG-[^)]+)\)", line)):
            gpus[-1].append(part[1])
    return [name for gpu in gpus for name in gpu[len(gpu) > 1 :]]
