"""What a run has logged: its `metrics.csv`, read fast where it is whole and row by row where it is damaged."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stu.files import agrees_with_checksum
from stu.training.records import parse_row

if TYPE_CHECKING:
    import numpy as np

NUMBER = r"-?(?:\d++(?:\.\d++)?+(?:e[-+]?\d++)?+|inf|nan)"
ROWS = re.compile(rf'(?:\d++,[-+.\w]*+,[^",\n\ufffd]++,{NUMBER}\n)*+')  # step, epoch, metric, value
POINTS = 250  # of a curve that is drawn


@dataclass(frozen=True)
class History:
    """The rows of a `metrics.csv` in the order of the file: metrics and, as they are written, steps and values.

    unreadable: what is wrong with the file, in words.
    """

    steps: Sequence[str] = ()
    metrics: Sequence[str] = ()
    values: Sequence[str] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def last_step(self) -> int | None:
        """The optimiser step of the last row."""
        return int(self.steps[-1]) if self.steps else None

    def finite(self, metric: str) -> list[float]:
        """All values of a metric that are finite."""
        values = map(float, compress(self.values, map(metric.__eq__, self.metrics)))
        return list(filter(math.isfinite, values))

    def curves(self) -> dict[str, "Curve"]:
        """Metric → its curve."""
        import numpy as np

        found: dict[str, tuple[list[str], list[str]]] = {}
        for step, name, value in zip(self.steps, self.metrics, self.values, strict=True):
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
        return {
            name: Curve(np.array(x, dtype=np.int64), np.array(y, dtype=np.float64)) for name, (x, y) in found.items()
        }


class Curve(NamedTuple):
    """Values (n,) float64 at optimiser steps (n,) int64."""

    steps: "np.ndarray"
    values: "np.ndarray"

    def thinned(self, points: int = POINTS) -> "Curve":
        """At most `points` of them: the first, the last, and between them the least and the largest of equal bins."""
        import numpy as np

        n = len(self.values)
        if n <= points:
            return self
        edges = np.linspace(1, n - 1, (points - 2) // 2 + 1).astype(int)
        kept = [0, n - 1]
        for low, high in pairwise(edges):
            piece = self.values[low:high]
            if not np.isfinite(piece).any():
                kept.append(int(low))  # a gap stays a gap
            else:
                kept += [int(low + np.nanargmin(piece)), int(low + np.nanargmax(piece))]
        chosen = np.unique(kept)
        return Curve(self.steps[chosen], self.values[chosen])


def read_history(file: Path) -> History:
    """What a `metrics.csv` holds, without its damaged rows."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return History(unreadable=() if agrees_with_checksum(file) else (f"{file.name} is missing",))
    except OSError:
        return History(unreadable=(f"{file.name} is unreadable",))
    whole, _, rest = text.rpartition("\n")
    _, newline, rows = whole.partition("\n")  # after the header
    lines, unreadable = rows.count("\n") + len(newline), []
    if ROWS.fullmatch(rows + newline):
        cells = rows.replace("\n", ",").split(",") if rows else []
        steps, metrics, values = cells[::4], cells[2::4], cells[3::4]
    else:
        parsed = [row for line in rows.split("\n") if (row := parse_row(line))]
        steps, metrics, values = ([str(row[k]) for row in parsed] for k in (0, 2, 3))
    if bad := lines - len(steps):
        unreadable.append(f"{file.name} has {bad:,} unreadable row{'s' * (bad > 1)}")
    if rest:
        unreadable.append(f"{file.name} ends in half a row")
    if not agrees_with_checksum(file):
        unreadable.append(f"{file.name} does not agree with its checksum")
    return History(steps, metrics, values, tuple(unreadable))
