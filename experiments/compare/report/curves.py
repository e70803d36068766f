"""Curves in few bytes: thinned, as base64 of float32, with shared vectors of steps."""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.compare.history import POINTS, Curve

BUDGET = 520_000  # points in all, about 4.2 MB
LEAST = 20  # points that a curve keeps, however many there are


def coded(runs: Iterable[Mapping[str, Curve]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Of each run, metric → [index of its steps, values], and the vectors of steps that these mean.

    Where curves are so many that they would make the page too large, all have fewer points.
    """
    thinned = [{name: curve.thinned(POINTS) for name, curve in run.items()} for run in runs]
    total = sum(len(curve.values) for run in thinned for curve in run.values())
    points = max(LEAST, POINTS * BUDGET // max(BUDGET, total))
    vectors: dict[Any, int] = {}
    coded = []
    for run in thinned:
        coded.append(
            {
                name: [vectors.setdefault(_steps(kept.steps), len(vectors)), _base64(kept.values.astype("<f4"))]
                for name, curve in run.items()
                if (kept := curve.thinned(points))
            }
        )
    return coded, list(vectors)


def _steps(steps: np.ndarray) -> tuple[int, int, str]:
    """Unit, bytes of a number, and the differences of successive steps in units."""
    differences = np.diff(steps, prepend=0)
    unit = max(int(np.gcd.reduce(differences)), 1)
    scaled = differences // unit
    small = scaled.min() >= 0 and scaled.max() < 2**16
    return unit, 2 if small else 8, _base64(scaled.astype("<u2" if small else "<f8"))


def _base64(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")
