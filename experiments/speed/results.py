"""What was measured, on what machine, and the file that keeps it."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.shared.files import write_atomically
from experiments.speed.bench import Settings
from experiments.speed.candidates import is_literal
from experiments.speed.roofline import Peak, Work

FILE = "results.json"


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
    peak: Peak
    rows: Sequence[Row] = ()

    @property
    def sizes(self) -> list[list[Row]]:
        """The rows of each size, in the order of measurement."""
        return [[row for row in self.rows if row.size == size] for size in dict.fromkeys(row.size for row in self.rows)]

    def derived(self, row: Row) -> dict[str, float | None]:
        """What follows from a row, the rows of the same size and the device's peak: ratios of medians.

        speedup: over the literal STU, forward and backward. floor_share: the lower bound on the time of forward and
        backward, over that time. step_share: a streamed step's share of a whole forward pass.
        """
        both, forward, facts = row.forward_backward, row.forward, row.facts
        literals = (other.forward_backward for other in self.rows if is_literal(other.model) and other.size == row.size)
        literal = next(literals, None)
        work = facts.forward_backward_floor if facts else None
        return {
            "tokens_per_second": row.batch * row.length / both.median if both else None,
            "speedup": literal.median / both.median if literal and both else None,
            "floor_share": self.peak.seconds(work) / both.median if work and both else None,
            "step_share": row.step.median / forward.median if row.step and forward else None,
        }

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
        settings, peak = Settings(**content["settings"]), Peak(**content["peak"])
        return cls(**content | {"settings": settings, "peak": peak, "rows": tuple(map(_row, content["rows"]))})


def _row(plain: Mapping[str, Any]) -> Row:
    def optional(kind: Any, value: Any) -> Any:
        return None if value is None else kind(**value)

    facts = plain["facts"]
    if facts is not None:
        facts = facts | {key: optional(Work, facts[key]) for key in ("forward_floor", "forward_backward_floor")}
    timings = {key: optional(Timing, plain[key]) for key in ("forward", "forward_backward", "step")}
    others = {key: value for key, value in plain.items() if key != "derived"}
    return Row(**others | timings | {"facts": optional(Facts, facts)})
