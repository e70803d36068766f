"""What run directories, of this version and earlier ones, say about themselves.

Files are read with little more than the standard library: `stu.training` has readers of them, but importing it imports
PyTorch and Lightning, which takes seconds. Whatever a file contains, the result is a row, which says what is
unreadable.
"""

import fcntl
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.compare.history import History, read_history
from stu.files import DELETED, mapping_in, unsealed
from stu.locks import Holder
from stu.training.records import PRUNED

Mode = Literal["min", "max"]
Status = Literal["finished", "running", "pruned", "stopped", "failed", "never trained"]
MEASURED = ("time/sequences_per_second", "time/tokens_per_second", "memory/peak_bytes")
# Baselines that know more of the data than a model may: earlier versions did not tell them from trivial ones.
REFERENCES = re.compile(r"truth|arx|ho-kalman|(rollout|free run): .*")
DEPTH = 1000  # of nested yaml, which its C parser survives


@dataclass(frozen=True)
class Row:
    """One run; None is what its files do not say."""

    task: str
    model: str
    name: str
    seed: int | None
    metric: str | None  # the monitored one
    mode: Mode  # whether less or more of it is better
    test: float | None
    best_val: float | None
    parameters: int | None
    sequences_per_second: float | None  # in training, the median
    tokens_per_second: float | None  # likewise; of real positions
    peak_memory: float | None  # bytes that training took at most, of a GPU or of the process
    seconds: float | None  # of training, all starts together
    status: Status
    step: int | None  # the last one logged
    total_steps: int | None
    unreadable: tuple[str, ...]
    path: str
    experiment: str | None = None  # the preset of the command
    sweep: str | None = None  # of which the latest start was a job
    tags: tuple[str, ...] = ()
    device: str | None = None
    started: str | None = None  # the first time, in ISO format
    command: str | None = None  # of the latest start
    reason: str = ""  # why it failed
    best_step: int | None = None
    best_epoch: float | None = None
    tests: Mapping[str, float] = field(default_factory=dict)  # all metrics of the test; at other lengths NAME@LENGTH
    baselines: Mapping[str, float] = field(default_factory=dict)  # the metric of predictors without learning, on test
    trivial_names: tuple[str, ...] | None = None  # those of the baselines that a model has to beat; None: all
    config: Mapping[str, Any] = field(default_factory=dict)  # all options, nested

    @property
    def trivial(self) -> float | None:
        """The best of the trivial baselines."""
        names = self.baselines if self.trivial_names is None else self.trivial_names
        values = [value for name in names if not math.isnan(value := self.baselines.get(name, math.nan))]
        return (max if self.mode == "max" else min)(values, default=None)

    @property
    def words(self) -> list[str]:
        """Those of the command."""
        return _words(self.command)

    @property
    def state(self) -> str:
        """The status in words, and what could not be read."""
        words: str = self.status
        if self.status in ("running", "pruned", "stopped", "failed") and self.step is not None:
            of = "" if self.total_steps is None else f" of {self.total_steps:,}"
            words += f" at step {self.step:,}{of}"
        elif self.status in ("failed", "stopped"):
            words += " before a step was logged"
        return "; ".join((words, *self.unreadable))


class Measured:
    """Several runs, at least one, of which one metric is compared."""

    rows: tuple[Row, ...]

    @property
    def metric(self) -> str | None:
        """The monitored metric, by whose best validation value a search chooses."""
        return next((row.metric for row in self.rows if row.metric), None)

    @property
    def mode(self) -> Mode:
        """Whether less or more of it is better."""
        return next((row.mode for row in self.rows if row.metric), self.rows[0].mode)


def find(folders: Iterable[Path]) -> Iterator[Path]:
    """Run directories below these folders, through links too, each once; a folder that cannot be read is named."""
    seen = set()
    for folder in folders:
        for directory, below, files in os.walk(folder, onerror=_skipped, followlinks=True):
            real = os.path.realpath(directory)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = [name for name in below if not (name.startswith(".") and name.endswith(DELETED))]
            found = {"manifest.json", "config.yaml"} & set(files)
            if len(found) == 2 or (found and "checkpoints" in below):
                below.clear()
                yield Path(directory)


def _skipped(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # which has just been deleted
        print(f"warning: left out: {error.filename}: {error.strerror}", file=sys.stderr)


def read(path: Path) -> Row:
    """The row of one run directory <task>/<model>/<name>."""
    path = Path(os.path.abspath(path))
    finished = os.path.exists(path / "summary.json")
    unreadable: list[str] = []
    config = _read_mapping(path / "config.yaml", _yaml, unreadable)
    manifest = _read_mapping(path / "manifest.json", unsealed, unreadable)
    summary = _read_mapping(path / "summary.json", unsealed, unreadable) if finished else {}
    history = read_history(path / "metrics.csv")
    unreadable += history.unreadable

    monitored = (_at(manifest, "monitor"), _at(summary, "best", "metric"))  # the manifest may be unreadable
    metric = next((printable(name).removeprefix("val/") for name in monitored if isinstance(name, str)), None)
    mode: Mode = "max" if (told := _at(manifest, "mode")) == "max" or (told != "min" and is_share(metric)) else "min"
    best = _number(_at(summary, "best", "value"))
    if best is None:
        best = (max if mode == "max" else min)(history.finite(f"val/{metric}"), default=None)
    test = _number(_at(summary, "test", metric))
    if finished and test is None and "summary.json is unreadable" not in unreadable:
        unreadable.append(f"summary.json has no test {metric}")
    sequences, tokens, peaks = map(history.finite, MEASURED)
    last = _number(_at(summary, "peak_memory"))
    starts = [start for start in _list(_at(manifest, "starts")) if isinstance(start, dict)] or [{}]
    command = _text(starts[-1].get("command"))
    baselines, tests = (_numbers(_at(summary, name)) for name in ("baselines", "test"))
    return Row(
        task=printable(path.parent.parent.name) or "-",  # of one that was moved to the root of a disk
        model=printable(path.parent.name) or "-",
        name=printable(path.name),
        seed=_whole(_at(manifest, "seed"), _at(config, "seed")),  # the manifest has a checksum
        metric=metric,
        mode=mode,
        test=test,
        best_val=best,
        parameters=_whole(_at(summary, "parameters"), _at(manifest, "parameters")),
        sequences_per_second=statistics.median(sequences) if sequences else None,
        tokens_per_second=statistics.median(tokens) if tokens else None,
        peak_memory=max([*peaks, *([] if last is None else [last])], default=None),
        seconds=_number(_at(summary, "seconds")),
        status="finished" if finished else _unfinished(path, manifest, history),
        step=history.last_step,
        total_steps=_whole(_at(manifest, "total_steps")),
        unreadable=tuple(unreadable),
        path=printable(str(path)),
        experiment=_preset(command),
        sweep=_text(starts[-1].get("sweep")),
        tags=tuple(printable(str(tag)) for logger in _loggers(config) for tag in _list(_at(logger, "tags"))),
        device=_text(starts[-1].get("device")),
        started=_text(starts[0].get("time")),
        command=command,
        reason="" if finished else _text(starts[-1].get("failed")) or "",
        best_step=_whole(_at(summary, "best", "step")),
        best_epoch=_number(_at(summary, "best", "epoch")),
        tests=_known(tests),
        baselines=_known(baselines),
        trivial_names=_trivial(summary, baselines),
        config=_mapping(_at(manifest, "settings")) or config,  # the manifest has a checksum
    )


def best_first(rows: Iterable[Row]) -> list[Row]:
    """Sorted by task, then by the test metric, then by the validation metric, also where there is no test metric."""
    return sorted(rows, key=lambda r: (r.task, rank(r.test, r.mode), rank(r.best_val, r.mode), r.model, r.name))


def rank(value: float | None, mode: Mode) -> tuple[bool, float]:
    """Sorts values of a metric, best first and what is not known last."""
    if value is None or math.isnan(value):
        return True, 0.0
    return False, -value if mode == "max" else value


def is_share(metric: str | None) -> bool:
    """Whether a metric is a share, shown in percent as in publications; more of it is better."""
    return (metric or "").rpartition("/")[2].endswith("accuracy")


def is_locked(lock: Path) -> bool:
    """Whether a process holds this file lock.

    This takes a shared lock on a file opened for reading, for a moment: unlike a `FileLock` it never creates, writes or
    deletes the file, and processes that check at the same time do not interfere. On a file system without locks the
    file itself is the lock, unless the process that it names is gone.
    """
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        try:
            return not Holder.of(lock).is_gone
        except OSError:
            return False
    return False


def _unfinished(path: Path, manifest: Any, history: History) -> Status:
    place = Path(os.path.realpath(path))  # beside which the lock is
    if is_locked(place.parent / f".{place.name}.lock"):
        return "running"
    if os.path.exists(path / PRUNED):
        return "pruned"
    starts = _at(manifest, "starts")
    latest = starts[-1] if isinstance(starts, list) and starts else {}
    if _at(latest, "failed"):
        return "failed"
    saved = (path / "checkpoints" / phase / "last.ckpt" for phase in ("", "pretrain"))
    if history.last_step is not None or any(map(os.path.exists, saved)):
        return "stopped"
    return "failed" if latest else "never trained"


def _trivial(summary: Mapping[str, Any], baselines: Iterable[str]) -> tuple[str, ...] | None:
    """The baselines that a model has to beat; None where that is all of them."""
    if "trivial" in summary:
        return tuple(printable(str(name)) for name in _list(summary["trivial"]))
    names = tuple(name for name in baselines if not REFERENCES.fullmatch(name))
    return None if len(names) == len(tuple(baselines)) else names


def _read_mapping(file: Path, parse: Callable[[str], Any], unreadable: list[str]) -> dict[str, Any]:
    content = mapping_in(file, parse)
    if content is None:
        unreadable.append(f"{file.name} is unreadable")
    return content or {}


def _yaml(text: str) -> Any:
    """The content of a yaml file, by the C parser, unless it might be nested so deeply that this crashes Python."""
    shallow = sum(map(text.count, ("[", "{", "- ", "? ", ": "))) < DEPTH
    content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader) if shallow else yaml.SafeLoader)
    if "&" in text:
        json.dumps(content, default=str, skipkeys=True)  # raises where something contains itself
    return content


def _words(command: str | None) -> list[str]:
    """Those of a command; none where it cannot be read."""
    try:
        return shlex.split(command or "")
    except ValueError:
        return []


def _preset(command: str | None) -> str | None:
    """The choice experiment=… of a command."""
    words = _words(command)
    named = (word.partition("=")[2] for word in reversed(words) if word.lstrip("+").startswith("experiment="))
    return None if (name := next(named, "none")) == "none" else name


def _loggers(config: Mapping[str, Any]) -> list[Any]:
    """The nodes of a configuration that name tags: one for each logger, in earlier versions a single one."""
    logger = _mapping(_at(config, "logger"))
    return [logger, *logger.values()]


def _at(content: Any, *keys: str | None) -> Any:
    """content[key][key]…, None where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return printable(value) if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _numbers(content: Any) -> dict[str, float | None]:
    """A mapping of names to numbers; None for what is none."""
    return {printable(str(name)): _number(value) for name, value in _mapping(content).items()}


def _known(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if value is not None}


def _whole(*values: Any) -> int | None:
    """The first of these that is a finite number."""
    numbers = map(_number, values)
    return next((int(number) for number in numbers if number is not None and math.isfinite(number)), None)


def printable(name: str) -> str:
    """Names of files, and texts in them, may have characters that a terminal obeys, or that cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
