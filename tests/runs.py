"""Runs of train.py as a user starts them, in processes and folders of their own, small enough to last a second.

`train` forks from a server that has imported the libraries already, which saves six seconds a run; `train_afresh` is
a new interpreter and a command line, with nothing prepared.
"""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml

from stu.training.loggers import read_metrics
from stu.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train.py"
# What a run finds in its environment besides PATH and HOME: nothing of the tests'.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT), "NETRC": "/dev/null"}

# What makes a run small. One list per task, for it has to agree with itself.
TASKS: dict[str, tuple[str, ...]] = {
    "lds": ("task=lds", "task.seq_len=16", "task.data.num_train=40", "task.data.num_val=10", "task.data.num_test=10"),
    "lra_listops": (
        "task=lra_listops",
        "task.seq_len=64",
        "task.data.min_length=10",
        "task.data.max_length=60",
        "task.data.train=40",
        "task.data.val=10",
        "task.data.test=10",
    ),
}
SMALL_MODEL = ("model.d_model=8", "model.depth=1")
SMALL_MIXER: dict[str, tuple[str, ...]] = {"num_filters": ("model.mixer.num_filters=4",)}
SMALL_RUN = ("trainer=cpu", "trainer.max_epochs=2", "loader.batch_size=4", "logger=csv", "name=run")

PRELOADED = ["lightning", "hydra", "torchmetrics.classification", "scipy.signal", "datasets", "filelock", "rich.table"]
_server = get_context("forkserver")
_server.set_forkserver_preload([*PRELOADED, "rich.progress"])


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int  # as a shell shows it: 128 + the signal for a killed one
    out: str
    err: str


@dataclass(frozen=True)
class Started:
    """A run under way."""

    process: BaseProcess
    out: Path
    err: Path

    def wait(self, timeout: float = 120) -> Finished:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.out.read_text()} {self.err.read_text()}")
        code = self.process.exitcode
        return Finished(code if code >= 0 else 128 - code, self.out.read_text(), self.err.read_text())


def start(home: Path, *overrides: str, at: Callable[[], None] | None = None, **environment: str) -> Started:
    """Begin `train.py` with these arguments; run directories, data and the working directory lie under `home`.

    at: called in the process before anything else (a partial of a module's function, as it crosses over).
    """
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    number = len(list(logs.iterdir()))
    out, err = logs / f"{number}.out", logs / f"{number}.err"
    out.touch(), err.touch()
    process = _server.Process(target=_run, args=(overrides, home, _environment(home, environment), out, err, at))
    process.start()
    return Started(process, out, err)


def train(home: Path, *overrides: str, at: Callable[[], None] | None = None, **environment: str) -> Finished:
    """Run `train.py` to its end."""
    return start(home, *overrides, at=at, **environment).wait()


def train_afresh(home: Path, *overrides: str, timeout: float = 240, **environment: str) -> Finished:
    """The same as a command line in a new interpreter."""
    home.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *overrides],
        cwd=home,
        env=_environment(home, environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode if done.returncode >= 0 else 128 - done.returncode, done.stdout, done.stderr)


def _environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    own = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "STU_RUNS": str(home / "runs"),
        "STU_DATA": str(home / "data"),
    }
    return own | ENVIRONMENT | extra


def _run(
    overrides: tuple[str, ...],
    home: Path,
    environment: dict[str, str],
    out: Path,
    err: Path,
    at: Callable[[], None] | None,
) -> None:
    """What the forked process does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(home)
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(SCRIPT), *overrides]
    torch.set_num_threads(1)
    if at is not None:
        at()
    runpy.run_path(str(SCRIPT), run_name="__main__")
