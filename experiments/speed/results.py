"""What was measured, on what machine, and the file that keeps it."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.speed.bench import Settings
from experiments.speed.candidates import is_literal
from experiments.speed.launches import Launches
from experiments.speed.roofline import Peak, Work
from stu.files import write_atomically

FILE = "results.json"
ATTENTION = "transformer"


@dataclass(frozen=True)
class Timing:
    """The times of one call, in seconds."""

    median: float
    min: float
    mean: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The summary of these calls."""
        return cls(statistics.median(seconds), min(seconds), statistics.fmean(seconds), len(seconds))


@dataclass(frozen=True)
class Facts:
    """What is known of a mixer besides its times."""

    parameters: int
    causal: bool
    streams: bool
    forward_floor: Work | None  # the roofline: the least work it can be done with, where that is known
    forward_backward_floor: Work | None


@dataclass(frozen=True)
class Row:
    """One mixer at one size; None is what was not measured, and `failures` says why, by stage."""

    model: str
    length: int
    batch: int
    width: int
    filters: int | None  # as given; None: as the model's file says
    facts: Facts | None
    forward: Timing | None
    forward_backward: Timing | None
    step: Timing | None  # of the whole batch
    forward_bytes: int | None  # peak memory, beyond parameters and input
    forward_backward_bytes: int | None
    failures: Mapping[str, str] = field(default_factory=dict)
    launches: Launches | None = None  # earlier files have none

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, D, K, L: sizes are measured and shown in this order; K = 0 is each model's own."""
        return self.batch, self.width, self.filters or 0, self.length


@dataclass(frozen=True)
class Results:
    """A run of the benchmark. Fields are the keys of the file, here and above."""

    command: str
    date: str
    commit: str | None
    machine: Mapping[str, Any]
    settings: Settings
    peak: Peak | None  # None: the device had no memory to measure it
    rows: Sequence[Row] = ()

    @property
    def sizes(self) -> list[list[Row]]:
        """The rows of each size, in the order of measurement."""
        return [[row for row in self.rows if row.size == size] for size in dict.fromkeys(row.size for row in self.rows)]

    def derived(self, row: Row) -> dict[str, float | None]:
        """What follows from a row, the rows of the same size and the device's peak: ratios of medians.

        speedup: over the literal STU, forward and backward; attention_speedup: over attention. floor_share: the lower
        bound on the time of forward and backward, over that time; forward_floor_share: the same of forward alone.
        step_share: a streamed step's share of a whole forward pass.
        """
        both, forward = row.forward_backward, row.forward
        literal, attention = self._time_of(is_literal, row), self._time_of(_is_attention, row)
        first, second = self._floors(row.facts)
        return {
            "tokens_per_second": row.batch * row.length / both.median if both else None,
            "speedup": literal / both.median if literal and both else None,
            "attention_speedup": attention / both.median if attention and both else None,
            "forward_floor_share": first / forward.median if first and forward else None,
            "floor_share": (first + second) / both.median if first and second and both else None,
            "step_share": row.step.median / forward.median if row.step and forward else None,
        }

    def _time_of(self, wanted: Callable[[str], bool], row: Row) -> float | None:
        """The median of forward and backward of the first such model of this size."""
        found = (other.forward_backward for other in self.rows if wanted(other.model) and other.size == row.size)
        timing = next(found, None)
        return timing.median if timing else None

    def _floors(self, facts: Facts | None) -> tuple[float | None, float | None]:
        """Lower bounds on the seconds of forward and of backward."""
        if self.peak is None or facts is None or facts.forward_floor is None or facts.forward_backward_floor is None:
            return None, None
        backward = facts.forward_backward_floor - facts.forward_floor
        return self.peak.seconds(facts.forward_floor), self.peak.seconds(backward)

    def write(self, folder: Path) -> None:
        """Write `folder`/results.json, whole or not at all."""
        content = asdict(self)
        for row, plain in zip(self.rows, content["rows"], strict=True):
            plain["derived"] = self.derived(row)
        write_atomically(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Read what `write` wrote."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        settings, peak = Settings(**content["settings"]), _optional(Peak, content["peak"])
        return cls(**content | {"settings": settings, "peak": peak, "rows": tuple(map(_row, content["rows"]))})


def _row(plain: Mapping[str, Any]) -> Row:
    facts = plain["facts"]
    if facts is not None:
        facts = facts | {key: _optional(Work, facts[key]) for key in ("forward_floor", "forward_backward_floor")}
    timings = {key: _optional(Timing, plain[key]) for key in ("forward", "forward_backward", "step")}
    launches = _optional(Launches, plain.get("launches"))
    others = {key: value for key, value in plain.items() if key != "derived"}
    return Row(**others | timings | {"facts": _optional(Facts, facts), "launches": launches})


def _optional(kind: Any, value: Any) -> Any:
    return None if value is None else kind(**value)


def _is_attention(model: str) -> bool:
    return model.partition(":")[0] == ATTENTION
