"""What run directories, of this version and earlier ones, say about themselves.

Files are read with little more than the standard library: `stu.training` has readers of them, but importing it imports
PyTorch and Lightning, which takes seconds. Whatever a file contains, the result is a row, which says what is
unreadable. (Hence not with yaml's C parser, which is faster, but which deeply nested garbage crashes, and Python with
it.)
"""

import fcntl
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from stu.files import DELETED, agrees_with_checksum, unsealed
from stu.locks import Holder
from stu.training.records import PRUNED, mapping_in, parse_row

Mode = Literal["min", "max"]
Status = Literal["finished", "running", "pruned", "stopped", "failed", "never trained"]
Metrics = list[tuple[int, float, str, float]]


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


def find(folders: Iterable[Path]) -> Iterator[Path]:
    """Run directories below these folders, through links too, each once."""
    seen = set()
    for folder in folders:
        for directory, below, files in os.walk(folder, followlinks=True):
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


def read(path: Path) -> Row:
    """The row of one run directory <task>/<model>/<name>."""
    path = Path(os.path.abspath(path))
    finished = os.path.exists(path / "summary.json")
    unreadable: list[str] = []
    config = _read_mapping(path / "config.yaml", yaml.safe_load, unreadable)
    manifest = _read_mapping(path / "manifest.json", unsealed, unreadable)
    summary = _read_mapping(path / "summary.json", unsealed, unreadable) if finished else {}
    metrics = _read_metrics(path / "metrics.csv", unreadable)

    monitored = (_at(manifest, "monitor"), _at(summary, "best", "metric"))  # the manifest may be unreadable
    metric = next((_printable(name).removeprefix("val/") for name in monitored if isinstance(name, str)), None)
    mode: Mode = "max" if _at(manifest, "mode") == "max" else "min"
    values = [value for _, _, name, value in metrics if name == f"val/{metric}" and math.isfinite(value)]
    best = _number(_at(summary, "best", "value"))
    if best is None:
        best = (max if mode == "max" else min)(values, default=None)
    test = _number(_at(summary, "test", metric))
    if finished and test is None and "summary.json is unreadable" not in unreadable:
        unreadable.append(f"summary.json has no test {metric}")
    measured: dict[str, list[float]] = {"time/sequences_per_second": [], "time/tokens_per_second": []}
    measured["memory/peak_bytes"] = []
    for _, _, name, value in metrics:
        if name in measured and math.isfinite(value):
            measured[name].append(value)
    sequences, tokens, peaks = measured.values()
    last = _number(_at(summary, "peak_memory"))
    return Row(
        task=_printable(path.parent.parent.name),
        model=_printable(path.parent.name),
        name=_printable(path.name),
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
        status="finished" if finished else _unfinished(path, manifest, metrics),
        step=metrics[-1][0] if metrics else None,
        total_steps=_whole(_at(manifest, "total_steps")),
        unreadable=tuple(unreadable),
        path=_printable(str(path)),
    )


def best_first(rows: Iterable[Row]) -> list[Row]:
    """Sorted by task, then by the test metric, then by the validation metric, also where there is no test metric."""

    def rank(value: float | None, mode: Mode) -> tuple[bool, float]:
        if value is None or math.isnan(value):
            return True, 0.0
        return False, -value if mode == "max" else value

    return sorted(rows, key=lambda r: (r.task, rank(r.test, r.mode), rank(r.best_val, r.mode), r.model, r.name))


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


def _unfinished(path: Path, manifest: Any, metrics: Metrics) -> Status:
    place = Path(os.path.realpath(path))  # beside which the lock is
    if is_locked(place.parent / f".{place.name}.lock"):
        return "running"
    if os.path.exists(path / PRUNED):
        return "pruned"
    starts = _at(manifest, "starts")
    latest = starts[-1] if isinstance(starts, list) and starts else {}
    if _at(latest, "failed"):
        return "failed"
    if metrics or os.path.exists(path / "checkpoints" / "last.ckpt"):
        return "stopped"
    return "failed" if latest else "never trained"


def _read_mapping(file: Path, parse: Callable[[str], Any], unreadable: list[str]) -> dict[str, Any]:
    content = mapping_in(file, parse)
    if content is None:
        unreadable.append(f"{file.name} is unreadable")
    return content or {}


def _read_metrics(file: Path, unreadable: list[str]) -> Metrics:
    """Rows (step, epoch, metric, value), without the broken ones."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if not agrees_with_checksum(file):
            unreadable.append(f"{file.name} is missing")
        return []
    except OSError:
        unreadable.append(f"{file.name} is unreadable")
        return []
    whole, _, rest = text.rpartition("\n")
    lines = whole.split("\n")[1:]
    rows = [row for line in lines if (row := parse_row(line))]
    if bad := len(lines) - len(rows):
        unreadable.append(f"{file.name} has {bad:,} unreadable row{'s' * (bad > 1)}")
    if rest:
        unreadable.append(f"{file.name} ends in half a row")
    if not agrees_with_checksum(file):
        unreadable.append(f"{file.name} does not agree with its checksum")
    return rows


def _at(content: Any, *keys: str | None) -> Any:
    """content[key][key]…, None where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _whole(*values: Any) -> int | None:
    """The first of these that is a finite number."""
    numbers = map(_number, values)
    return next((int(number) for number in numbers if number is not None and math.isfinite(number)), None)


def _printable(name: str) -> str:
    """Names of files, and texts in them, may have characters that a terminal obeys, or that cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
