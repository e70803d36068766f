"""Loggers beside metrics.csv, which is the truth: whatever happens to them, a run goes on."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from lightning.pytorch.loggers import Logger

from stu.training.records import SWEEP
from stu.training.run import Run, rank

log = logging.getLogger(__name__)
UNTOLD = ("logger", "paths", "sweep", "tuned")  # groups of options: where to write, and what only sets keys of others
OF_STARTS = ("id", "starts", "settings", "time", "resumed", "remarks")  # of the manifest, what is said elsewhere

RUNNING: list["Tracker"] = []  # those that have started


class Tracker(Logger):
    """What a run asks of a logger beside metrics.csv. Nothing starts before `start`; the first process alone logs."""

    title: ClassVar[str]  # in messages

    @property
    def name(self) -> str:
        """Lightning's name for this logger."""
        return self.title

    @property
    def version(self) -> str:
        """One run, one version."""
        return ""

    def start(self, run: Run, choices: Mapping[str, Any], baselines: Mapping[str, float]) -> None:
        """Begin, or continue after an earlier start of the same run directory.

        run: with its manifest, this start included. choices: the option of each group, of `task` and `model` at least.
        """
        raise NotImplementedError

    def log_image(self, name: str, file: Path, step: int) -> None:
        """A PNG file."""
        raise NotImplementedError

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """The summary of a finished run."""
        raise NotImplementedError

    def close(self, exit_code: int) -> None:
        """End, as failed unless the exit code is 0."""
        raise NotImplementedError


Self = TypeVar("Self", bound="Direct")
Arguments = ParamSpec("Arguments")
MEASURED = ("seconds", "tokens_per_second", "peak_memory", "parameters")  # in a summary, beside metrics


def softly(method: Callable[Concatenate[Self, Arguments], None]) -> Callable[Concatenate[Self, Arguments], None]:
    """Make a method of a `Direct` one do nothing after a failure, nor in other processes than the first."""

    @wraps(method)
    def attempt(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if self.failed or rank() != 0:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # of any kind: logging must never end a run
            self.failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            log.warning("%s failed: %s; metrics.csv has everything", self.title, reason)

    return attempt


class Direct(Tracker):
    """One that is written to at once: its first failure ends it, and is said in one line."""

    failed = False

    @softly
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `start` has written them, with what else is known of the run."""

    @softly
    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """What is in no other row."""
        row = {f"run/{name}": summary[name] for name in MEASURED if name in summary}
        self.log_metrics(row, summary["steps"])


def description(run: Run, choices: Mapping[str, Any], baselines: Mapping[str, float]) -> dict[str, Any]:
    """What runs can be grouped by: chosen options by their names, facts of the manifest, baselines, the directory."""
    manifest, sweep = run.read_manifest(), os.environ.get(SWEEP)
    options = {group: option for group, option in choices.items() if "/" not in group and group not in UNTOLD}
    facts = {key: fact for part in (manifest, *manifest["starts"][-1:]) for key, fact in part.items()}
    facts = {key: fact for key, fact in facts.items() if key not in OF_STARTS}
    facts |= {"baselines": dict(baselines), "run": os.path.abspath(run.path)} | ({"sweep": sweep} if sweep else {})
    return facts | options


def log_figure(logger: Logger, name: str, file: Path, step: int) -> None:
    """Log a PNG; to metrics.csv and other loggers than ours, it is a file of the run."""
    if isinstance(logger, Tracker):
        logger.log_image(name, file, step)


def log_summary(logger: Logger, summary: Mapping[str, Any]) -> None:
    """Log the summary of a finished run; likewise."""
    if isinstance(logger, Tracker):
        logger.log_summary(summary)


def close_trackers() -> None:
    """End those of this process, as failed where an exception is under way (`finally`): with its exit code."""
    match sys.exc_info()[1]:
        case None | SystemExit(code=None):
            code = 0
        case SystemExit(code=int(given)):
            code = given
        case _:
            code = 1
    while RUNNING:
        RUNNING.pop().close(code)
