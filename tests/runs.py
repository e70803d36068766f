"""Small runs: of train.py, as a user starts it, in processes and folders of their own; and of a Trainer in this one.

`train` forks from a server that has imported the libraries already, which saves six seconds per run;
`train_in_subprocess` is a new interpreter and a command line, with nothing prepared; `Training` is what train.py sets
up, piece by piece.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from itertools import count
from multiprocessing import get_context, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from stu.task import Task
from stu.training import Checkpoints, MetricsCSV, MetricsLog, Run, SequenceData, SequenceModule, StepPlan
from stu.training.loggers import read_metrics
from stu.training.optim import adamw
from tests.models import composed

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train.py"
# What a run finds in its environment besides PATH and HOME: nothing of the tests'.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT), "NETRC": "/dev/null"}

# What makes a run small, wherever a task or model has an option of that name.
SMALL_TASK = {
    **{"seq_len": 64, "min_length": 10, "max_length": 60, "train": 40, "val": 10, "test": 10},
    **{"windows": 1, "transient": 1.0, "tolerance": 1e-5},  # of trajectories
}
SMALL_MODEL = {"d_model": 8, "depth": 1, "num_filters": 4, "num_heads": 2, "d_state": 8, "num_blocks": 2}
SMALL_RUN = ("trainer=cpu", "trainer.max_epochs=2", "loader.batch_size=4", "logger=csv", "figures.when=never")

PRELOADED = ["lightning", "hydra", "torchmetrics.classification", "scipy.signal", "datasets", "filelock", "rich.table"]
PRELOADED += ["wandb"]
_server = get_context("forkserver")


def preload() -> None:
    """Say what the server imports. There is one, also for `experiments.speed`, whose own list this replaces."""
    _server.set_forkserver_preload([*PRELOADED, "rich.progress", "torch._dynamo", "tests.preloaded"])


@dataclass(frozen=True)
class Finished:
    """The outcome of a command."""

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
        return Finished(_as_a_shell(self.process.exitcode), self.out.read_text(), self.err.read_text())


def start(home: Path, *overrides: str, at: Callable[[], None] | None = None, **environment: str) -> Started:
    """Start `train.py` with these arguments; run directories, data and the working directory lie under `home`.

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


def train_in_subprocess(home: Path, *overrides: str, timeout: float = 240, **environment: str) -> Finished:
    """The same as a command line in a new interpreter."""
    home.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *overrides],
        cwd=home,
        env=_environment(home, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nothing that it started may stay
    return Finished(_as_a_shell(process.returncode), out, err)


def _as_a_shell(code: int) -> int:
    return code if code >= 0 else 128 - code


def small(*overrides: str) -> list[str]:
    """These overrides, and before them what makes the task and the model they choose small."""
    config = composed(*overrides)
    layers = len(config.model.mixer) if OmegaConf.is_list(config.model.mixer) else 1
    sizes = SMALL_MODEL | {"depth": layers}
    options = [*_options(config.task, "task", SMALL_TASK), *_options(config.model, "model", sizes)]
    given = {override.split("=", 1)[0] for override in overrides}
    return [*(o for o in (*options, *SMALL_RUN) if o.split("=", 1)[0] not in given), *overrides]


def _options(node: Any, key: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """Overrides for the keys of `sizes` in a configuration node; what refers to another key follows it."""
    if not isinstance(node, DictConfig):
        return
    for name in node:
        if OmegaConf.is_interpolation(node, name):
            continue
        if name in sizes:
            yield f"{key}.{name}={sizes[name]}"
        elif not OmegaConf.is_missing(node, name):
            yield from _options(node[name], f"{key}.{name}", sizes)


def signalled(number: int, where: str, call: int, times: int = 1, *, group: bool = False) -> Callable[[], None]:
    """An `at` of `start`: the process sends itself signal `number` before call 1, 2, … of a "module:Class.method".

    group: another process sends it, and to the processes that this one has started, too.
    """
    return partial(_signal_at, number, where, call, times, group)


def _signal_at(number: int, where: str, call: int, times: int, group: bool) -> None:
    if group:
        os.setsid()
    owner, name = where.rsplit(".", 1)
    cls = resolve_name(owner)
    method, calls = getattr(cls, name), count(1)

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            for _ in range(times):
                if group:
                    subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgrp()}"], start_new_session=True)
                    time.sleep(0.2)  # until those that end have ended
                else:
                    os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    setattr(cls, name, wrapped)


# What a summary says of this machine and this time, rather than of the model.
MEASURED = ("seconds", "tokens_per_second", "peak_memory")


def run_of(home: Path, task: str, model: str, name: str) -> Run:
    """The run directory that `name=…` made."""
    return Run(home / "runs" / task / model / name)


def results(run: Run) -> dict[str, Any]:
    """All that a run computed: rows and checkpoints without times and memory, and the summary."""
    computed = [row for row in read_metrics(run.metrics) if not row[2].startswith(("time/", "memory/"))]
    return {"rows": computed, **states(run)}


def states(run: Run) -> dict[str, Any]:
    """The same without rows."""
    last, best = (torch.load(path, weights_only=True) for path in (run.last, run.best))
    summary = {key: value for key, value in run.read_summary().items() if key not in MEASURED}
    weights = {name: state["state_dict"] for name, state in (("last", last), ("best", best))}
    return {**weights, "optimizer": last["optimizer_states"], "summary": summary}


def assert_identical(actual: Any, expected: Any, where: str = "") -> None:
    """Equal to the last bit, in nested containers."""
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_identical(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected), f"{where}: {actual} is not {expected}"
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{where}: {actual} is not {expected}"
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_identical(*pair, f"{where}[{index}]")
    else:
        assert actual == expected, f"{where}: {actual} is not {expected}"


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
    if sys.modules.pop("stu.cli.errors", None):  # which reads the environment
        del sys.modules["stu.cli"].errors  # type: ignore[attr-defined]
    os.chdir(home)
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(SCRIPT), *overrides]
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # how loader processes start; the server has left its own way here
    if at is not None:
        at()
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Training:
    """A model, a task and a recipe as train.py puts them together, without Hydra; everything lies in `folder`.

    trainer: further arguments of the Trainer.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        model: nn.Module,
        *,
        optimizer: Any = adamw,
        seed: int = 0,
        log_every: int = 1,
        batch_size: int = 4,
        bucket: int = 1,
        max_epochs: float = 2,
        max_steps: int = -1,
        val_check_interval: float = 1.0,
        accumulate_grad_batches: int = 1,
        checkpoints: Mapping[str, Any] | None = None,
        callbacks: Sequence[L.Callback] = (),
        device_resident: bool = False,
        **trainer: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        splits = task.datasets()
        self.plan = StepPlan.make(
            examples=len(splits.train),
            batch_size=batch_size,
            max_epochs=max_epochs,
            max_steps=max_steps,
            val_check_interval=val_check_interval,
            accumulate_grad_batches=accumulate_grad_batches,
        )
        loader: Any = {"batch_size": batch_size, "bucket": bucket, "device_resident": device_resident}
        self.data = SequenceData(task, splits, self.plan, seed=seed, **loader)
        recipe = optimizer(model.named_parameters(), self.plan.total_steps)
        self.module = SequenceModule(model, task, recipe=recipe, seed=seed)
        self.csv = MetricsCSV(folder / "metrics.csv")
        kept = {"check_every": log_every} | dict(checkpoints or {})
        self.checkpoints = Checkpoints(folder / "checkpoints", self.plan, task.monitor, task.mode, **kept)
        self.trainer = L.Trainer(
            **StepPlan.trainer_arguments,
            accelerator="cpu",
            devices=1,
            accumulate_grad_batches=accumulate_grad_batches,
            logger=[self.csv],
            callbacks=[
                MetricsLog(self.plan, batch_size=batch_size, every_n_steps=log_every), self.checkpoints, *callbacks,
            ],
            default_root_dir=folder,
            log_every_n_steps=1,
            **{"enable_progress_bar": False, "num_sanity_val_steps": 1} | trainer,
        )  # fmt: skip

    def fit(self, checkpoint: Path | None = None) -> "Training":
        self.trainer.fit(self.module, self.data, ckpt_path=checkpoint, weights_only=True)
        return self

    def rows(self, metric: str) -> dict[int, float]:
        """Step → value of one metric of metrics.csv."""
        return {step: value for step, _, name, value in read_metrics(self.csv.path) if name == metric}
