"""What the figures show, in numbers."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.compare.groups import Group
from experiments.compare.history import Curve, History, read_history
from experiments.compare.runs import Mode, Row
from experiments.compare.sweeps import Axis

POINTS = 60  # of a line
LARGEST = 1e300  # what is not below is drawn as if it were infinite: axes end where float64 does


class Band(NamedTuple):
    """Least, mean and largest value (n,) of some runs at common steps (n,)."""

    steps: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


def bands(rows: Iterable[Row], metrics: Sequence[str]) -> dict[str, Band]:
    """Metric → its band over these runs; a metric that none of them has is left out."""
    histories = [read_history(Path(row.path) / "metrics.csv") for row in rows]
    found = {}
    for metric in metrics:
        curves = [own for history in histories if len((own := curve(history, metric)).steps)]
        if curves and len((common := band(curves)).steps):
            found[metric] = common
    return found


def curve(history: History, metric: str) -> Curve:
    """The finite values of a metric by step; of a step that was logged again, the later one."""
    own = list(map(metric.__eq__, history.metrics))
    steps, values = (np.array(list(compress(of, own)), dtype=np.float64) for of in (history.steps, history.values))
    steps, kept = steps.clip(max=2**53).astype(np.int64), np.abs(values) < LARGEST
    steps, first = np.unique(steps[kept][::-1], return_index=True)
    return Curve(steps, values[kept][::-1][first])


def band(curves: Sequence[Curve], points: int = POINTS) -> Band:
    """Over the steps that all curves cover: at all steps of any of them, by lines between its own; or, where these are
    more than `points`, of the means over as many pieces of equal length. Empty where they have no step in common.
    """
    low, high = max(one.steps[0] for one in curves), min(one.steps[-1] for one in curves)
    steps = np.unique(np.concatenate([one.steps for one in curves])).astype(np.float64)
    steps = steps[(steps >= low) & (steps <= high)]
    if len(steps) > points:
        edges = np.linspace(low, high, points + 1)
        curves, steps = [_means(one, edges) for one in curves], (edges[1:] + edges[:-1]) / 2
    values = np.array([np.interp(steps, one.steps, one.values) for one in curves])
    return Band(steps, values.min(axis=0), values.mean(axis=0), values.max(axis=0))


def _means(one: Curve, edges: np.ndarray) -> Curve:
    """The means of steps and values over the pieces between edges that have any."""
    inside = (one.steps >= edges[0]) & (one.steps <= edges[-1])
    steps, values = one.steps[inside], one.values[inside]
    piece = np.minimum(np.searchsorted(edges, steps, side="right") - 1, len(edges) - 2)
    count = np.bincount(piece)
    sums = (np.bincount(piece, of) for of in (steps, values))
    return Curve(*(total[count > 0] / count[count > 0] for total in sums))


def front(points: Sequence[tuple[float, float]], mode: Mode) -> list[tuple[float, float]]:
    """The points (cost, metric) for which none costs at most as much and is better, by rising cost."""
    sign = 1 if mode == "max" else -1
    kept: list[tuple[float, float]] = []
    for cost, metric in sorted(set(points), key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * metric > sign * kept[-1][1]:
            kept.append((cost, metric))
    return kept


def baselines(groups: Sequence[Group]) -> list[float]:
    """The best trivial baseline of one task, once for each kind of data."""
    return sorted({float(f"{trivial:.4g}") for group in groups if (trivial := group.trivial) is not None})


def by_task(groups: Iterable[Group]) -> list[list[Group]]:
    """The groups whose results can be compared, those of one task, variant and metric, best first."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if group.metric is not None:
            found.setdefault((group.title, group.metric), []).append(group)
    return [sorted(found[key], key=lambda group: group.order) for key in sorted(found)]


def ranking(groups: Iterable[Group]) -> list[str]:
    """All models, best first: by their mean place, from 0 to 1, in the tasks where they have a result."""
    places: dict[str, list[float]] = {}
    for some in by_task(groups):
        known = [group for group in some if group.mean is not None]
        for place, group in enumerate(known):
            places.setdefault(group.model, []).append(place / max(len(known) - 1, 1))
    return sorted(places, key=lambda model: (statistics.fmean(places[model]), model))


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart in the same order, moved as little as possible (least squares)."""
    blocks: list[list[int]] = []  # of neighbours that touch
    start: list[float] = []
    order = sorted(range(len(places)), key=lambda k: places[k])
    for k in order:
        blocks.append([k])
        start.append(places[k])
        while len(blocks) > 1 and start[-2] + gap * len(blocks[-2]) > start[-1]:
            last = blocks.pop()
            start.pop()
            blocks[-1] += last
            start[-1] = float(np.mean([places[one] - gap * n for n, one in enumerate(blocks[-1])]))
    found = dict.fromkeys(range(len(places)), 0.0)
    for block, low in zip(blocks, start, strict=True):
        found |= {one: low + gap * n for n, one in enumerate(block)}
    return list(found.values())


def on_axis(axis: Axis) -> list[float | None]:
    """The places of the runs from 0 to 1, evenly by number, order of magnitude, or category."""
    known = [value for value in axis.values if value is not None]
    low, high = (0.0, len(axis.labels) - 1.0) if axis.labels else (min(known), max(known))
    return [None if value is None else fraction(value, low, high, axis.log) for value in axis.values]


def fraction(value: float, low: float, high: float, log: bool = False) -> float:
    """Where a value is between two others, 0 to 1; log: on a logarithmic scale."""
    if low == high:
        return 0.5
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def spans_decades(values: Iterable[float], mode: Mode) -> bool:
    """Whether values of a metric need a logarithmic scale: errors, all above 0, that differ by more than a decade."""
    finite = [value for value in values if math.isfinite(value)]
    return mode == "min" and bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)


def short_names(keys: Sequence[str]) -> Mapping[str, str]:
    """Key → its last part, with those before it that tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1))
        names[key] = next(
            end for end in ends if end == key or not any(o != key and f".{o}".endswith(f".{end}") for o in keys)
        )
    return names
