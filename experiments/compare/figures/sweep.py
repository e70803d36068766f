"""Figures of one sweep on one task: all runs as lines over what was varied, and the metric against each key."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from matplotlib.ticker import LogLocator, MaxNLocator

from experiments.compare.figures import style
from experiments.compare.figures.data import fraction, on_axis, short_names, spans_decades
from experiments.compare.runs import rank
from experiments.compare.sweeps import LEAST, Axis, Sweep, importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST, PLAIN, LINE = "#cc3311", "#332288", "#888888"
NONE = -0.13  # the place on an axis of runs that do not have the key, or no result
TICKS = 6  # values of an axis that are all written
COLUMNS = 4
WRITTEN = 14  # categories of an axis


def parallel(sweep: Sweep) -> Figure | None:
    """A line for each run through its values of all keys and its best validation value."""
    results = _results(sweep)
    known = [value for value in results if value is not None]
    if len(known) < 2 or len(sweep.axes) < 2:
        return None
    metric = Axis(f"val {sweep.metric}", results, log=spans_decades(known, sweep.mode))
    names = {**short_names([axis.key for axis in sweep.axes]), metric.key: metric.key}
    flipped = [axis is metric and sweep.mode == "min" for axis in (*sweep.axes, metric)]
    places = [_places(axis, flip) for axis, flip in zip((*sweep.axes, metric), flipped, strict=True)]
    figure = Figure(figsize=(max(style.PAGE, 0.85 * len(places)), 3.2))
    axes = figure.subplots()
    _draw_runs(axes, list(zip(*places, strict=True)))
    for x, (axis, flip) in enumerate(zip((*sweep.axes, metric), flipped, strict=True)):
        _draw_axis(axes, x, names[axis.key], _ticks(axis, flip), right=axis is metric)
    axes.set(xlim=(-0.25, len(places) - 0.75), ylim=(NONE - 0.04, 1.04))
    axes.set_axis_off()
    text = f"A line for each of {len(results)} runs, the darker the better; red: the best, which is at the top."
    style.caption(figure, f"{sweep.task}, sweep {sweep.name}", text)
    return figure


def _results(sweep: Sweep) -> tuple[float | None, ...]:
    """The best validation value of each run, None where there is none."""
    values = [row.best_val for row in sweep.rows]
    return tuple(value if value is not None and math.isfinite(value) else None for value in values)


def _places(axis: Axis, flipped: bool) -> list[float]:
    return [NONE if place is None else 1 - place if flipped else place for place in on_axis(axis)]


def _draw_runs(axes: "Axes", lines: Sequence[Sequence[float]]) -> None:
    """The better the later and the darker."""
    shades = colormaps["viridis_r"]
    for line in sorted(lines, key=lambda line: line[-1])[:-1]:
        failed = line[-1] == NONE
        _draw_line(axes, line, style.FAINT if failed else shades(0.08 + 0.92 * line[-1]), 0.9, 0.75)
    _draw_line(axes, max(lines, key=lambda line: line[-1]), BEST, 2.2, 1.0)


def _draw_line(axes: "Axes", places: Sequence[float], color: Any, width: float, alpha: float) -> None:
    """Level where it crosses an axis, so that lines through one point can be followed."""
    points = [(0.0, places[0])]
    for x, (here, there) in enumerate(pairwise(places)):
        points += [(x + 0.4, here), (x + 0.6, there), (x + 1.0, there)]
    codes = [Curve.MOVETO, *[Curve.CURVE4] * (len(points) - 1)]
    axes.add_patch(PathPatch(Curve(points, codes), facecolor="none", edgecolor=color, linewidth=width, alpha=alpha))


def _draw_axis(axes: "Axes", x: float, name: str, ticks: Sequence[tuple[float, str]], *, right: bool) -> None:
    """A vertical line with the name above it and values beside it."""
    side = 1 if right else -1
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    axes.plot([x, x], [0, 1], color=LINE, linewidth=0.8, zorder=3)
    axes.text(x, 1.07, name, ha="center", va="bottom", fontsize=7.5, fontweight="bold")
    for place, label in ticks:
        axes.plot([x + 0.015 * side, x], [place, place], color=LINE, linewidth=0.8, zorder=3)
        align = "left" if right else "right"
        axes.text(x + 0.03 * side, place, label, ha=align, va="center", fontsize=6.5, zorder=4, bbox=white)


def _ticks(axis: Axis, flipped: bool) -> list[tuple[float, str]]:
    """Place and text: of all values where these are few or categories, else of round numbers."""
    known = sorted({value for value in axis.values if value is not None})
    low, high = known[0], known[-1]
    values: Sequence[float] = known
    if axis.labels:
        values = known[:: math.ceil(len(known) / (2 * WRITTEN))]
    elif len(known) > TICKS:
        subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0)
        locator = LogLocator(subs=subs) if axis.log else MaxNLocator(TICKS - 1, steps=[1, 2, 5, 10])
        values = [value for value in locator.tick_values(low, high) if low <= value <= high]
    places = [fraction(value, low, high, axis.log) for value in values]
    texts = [style.short(axis.labels[int(value)]) if axis.labels else style.number(value) for value in values]
    none = [(NONE, "no result" if axis.key.startswith("val ") else "none")] * (None in axis.values)
    return [*((1 - place if flipped else place, text) for place, text in zip(places, texts, strict=True)), *none]


def keys(sweep: Sweep) -> Figure | None:
    """A panel for each key, and the importance of all where there are enough runs."""
    known = [value for value in _results(sweep) if value is not None]
    if len(known) < 2 or not sweep.axes:
        return None
    shares, missing = _importance(sweep)
    ordered = sorted(sweep.axes, key=lambda axis: -shares.get(axis.key, 0.0))
    names = short_names([axis.key for axis in ordered])
    count = len(ordered) + bool(shares)
    rows, columns = math.ceil(count / COLUMNS), min(COLUMNS, count)
    figure = Figure(figsize=(max(style.PAGE * columns / COLUMNS, style.COLUMN), 1.7 * rows + 0.6))
    grid = figure.add_gridspec(rows, columns)
    panels: list[Axes] = []
    for place, axis in enumerate(ordered):
        axes = figure.add_subplot(grid[place // columns, place % columns], sharey=panels[0] if panels else None)
        panels.append(axes)
        style.scale_metric(axes, "y", known, sweep)
        _draw_key(axes, sweep, axis)
        axes.set_title(names[axis.key], fontsize=7.5)
        axes.tick_params(axis="y", labelleft=place % columns == 0)
    if shares:
        _draw_importance(figure.add_subplot(grid[-1, (count - 1) % columns]), shares, names)
    figure.supylabel(style.title_of(sweep, "val "), fontsize=7.5)
    text = f"Ringed: the best run. Hollow: pruned. Crosses: no result. Lines: medians. {missing}"
    style.caption(figure, f"{sweep.task}, sweep {sweep.name}", text.strip())
    return figure


def _importance(sweep: Sweep) -> tuple[Mapping[str, float], str]:
    """The shares, or why there are none."""
    try:
        shares = importance(sweep)
    except ImportError as error:
        return {}, f'Importance needs {error.name}: pip install ".[search]".'
    return shares, "" if shares else f"Importance needs {LEAST} finished runs."


def _draw_key(axes: "Axes", sweep: Sweep, axis: Axis) -> None:
    """The result of each run over its value of a key, in the colours of the models where these are varied."""
    if axis.labels:
        _draw_categories(axes, axis, _results(sweep))
    elif axis.log:
        style.scale_log(axes, "x", [value for value in axis.values if value is not None], most=3.5)
    else:
        whole = all(value is None or value.is_integer() for value in axis.values)
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10], integer=whole))
    points = _points(sweep, axis)
    known = [point for point in points if math.isfinite(point.y)]
    shape: dict[str, Any] = {"s": 13, "linewidths": 0.8, "alpha": 0.7, "zorder": 3}
    for pruned in (False, True):
        own = [point for point in known if point.pruned == pruned]
        colors = [point.color for point in own]
        face = "none" if pruned else colors
        axes.scatter(
            [point.x for point in own], [point.y for point in own], facecolors=face, edgecolors=colors, **shape
        )
    failed = [point.x for point in points if math.isnan(point.y)]
    axes.plot(failed, [0.02] * len(failed), "x", color=style.GREY, markersize=3.5, transform=axes.get_xaxis_transform())
    if known:
        best = min(known, key=lambda point: rank(point.y, sweep.mode))
        axes.scatter([best.x], [best.y], s=40, facecolors="none", edgecolors=BEST, linewidths=1.3, zorder=4)


class _Point(NamedTuple):
    x: float
    y: float  # nan without a result
    color: str
    pruned: bool


def _points(sweep: Sweep, axis: Axis) -> list[_Point]:
    """The runs that have the key; those of one category side by side."""
    looks = style.looks(row.model for row in sweep.rows) if "model" in sweep.keys else {}
    beside = [0.36 * ((k * 0.618) % 1 - 0.5) if axis.labels else 0.0 for k in range(len(sweep.rows))]
    return [
        _Point(
            value + shift,
            math.nan if result is None else result,
            looks[row.model].color if looks else PLAIN,
            row.status == "pruned",
        )
        for row, value, shift, result in zip(sweep.rows, axis.values, beside, _results(sweep), strict=True)
        if value is not None
    ]


def _draw_categories(axes: "Axes", axis: Axis, results: Sequence[float | None]) -> None:
    """Names below, as many as there is room for, and medians."""
    shown = range(0, len(axis.labels), math.ceil(len(axis.labels) / WRITTEN))
    names = [style.short(axis.labels[place]) for place in shown]
    fits = len("".join(names)) < 16
    axes.set_xticks(shown, names, rotation=0 if fits else 90, fontsize=7 if fits else 6)
    axes.set_xlim(-0.5, len(axis.labels) - 0.5)
    axes.grid(visible=False, axis="x")
    for place in range(len(axis.labels)):
        own = [
            result for value, result in zip(axis.values, results, strict=True) if value == place and result is not None
        ]
        if own:
            axes.plot([place - 0.3, place + 0.3], [median(own)] * 2, color="black", linewidth=1, zorder=2)


def _draw_importance(axes: "Axes", shares: Mapping[str, float], names: Mapping[str, str]) -> None:
    """A bar for each key, below its name."""
    for place, (key, share) in enumerate(shares.items()):
        axes.barh(place, share, color=PLAIN, height=0.22)
        axes.text(0, place - 0.18, f"{names[key]}  {100 * share:.0f} %", fontsize=6.5, va="bottom")
    axes.set(xlim=(0, 1), ylim=(len(shares) - 0.6, -0.9))
    axes.set_title("importance", fontsize=7.5)
    axes.set_axis_off()
