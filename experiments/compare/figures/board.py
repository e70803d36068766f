"""All tasks and models in one figure, as small multiples."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from experiments.compare.figures import style
from experiments.compare.figures.data import LARGEST, baselines, by_task, ranking
from experiments.compare.groups import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
WIDTH = 9.0  # inches: at 100 pixels an inch the width of a README, in which its texts are 11 to 13 pixels high
ROW = 0.2  # inches


def board(groups: Sequence[Group], models: Sequence[str]) -> Figure | None:
    """A panel for each task, a line for each model, best on average first; right is better in all panels."""
    without = sum(group.missing.total() for group in groups)
    groups = [group for group in groups if group.mean is not None and group.metric]
    if not groups:
        return None
    ranked, parts = ranking(groups), by_task(groups)
    columns = min(COLUMNS, len(parts))
    rows = math.ceil(len(parts) / columns)
    width = WIDTH if columns == COLUMNS else 1.2 + 2.6 * columns
    figure = Figure(figsize=(width, rows * (ROW * len(ranked) + 0.85) + 0.5))
    figure.set_layout_engine("constrained", w_pad=0.07, h_pad=0.06)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for own, axes in zip(parts, panels.flat, strict=False):
        _draw_task(axes, own, ranked, style.looks(models))
    for axes in panels.flat[len(parts) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(ranked)), map(style.short, ranked), fontsize=8.5)
    style.caption(figure, "", _text(groups, without), size=8)
    return figure


def _text(groups: Sequence[Group], without: int) -> str:
    """How to read it; without: runs that have no result."""
    most = max(group.seeds for group in groups)
    seeds = f"{'' if all(group.seeds == most for group in groups) else 'at most '}{most} seed{'s' * (most > 1)}"
    means = f"Means and standard deviations of {seeds}." if most > 1 else "One seed each."
    infinite = "" if all(abs(test) < LARGEST for group in groups for test in group.tests) else " Crosses: infinite."
    missing = f" Without {without} run{'s' * (without > 1)} that {'have' if without > 1 else 'has'} no result."
    return f"{means} Dashed: the best trivial baseline. Right is better, everywhere.{infinite}{missing * bool(without)}"


def _draw_task(axes: "Axes", groups: Sequence[Group], ranked: Sequence[str], looks: Mapping[str, style.Look]) -> None:
    best = groups[0]
    values = [test for group in groups for test in (*group.tests, *baselines(groups)) if abs(test) < LARGEST]
    style.scale_metric(axes, "x", values, best)
    for group in groups:
        _draw_group(axes, group, ranked.index(group.model), looks[group.model])
    style.mark_baselines(axes, groups, vertical=True)
    winner = f"{style.short(best.model)} {style.value_of(best)}"
    room = 170 - 4.6 * len(winner)  # points
    axes.set_title(best.title, fontsize=min(9.5, max(room, 40) / (0.66 * len(best.title))))
    axes.set_title(winner, loc="right", fontsize=8, fontweight="normal", color=style.GREY)
    axes.set_xlabel(style.title_of(best, "test "), fontsize=8)
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    axes.xaxis.set_inverted(best.mode == "min")


def _draw_group(axes: "Axes", group: Group, place: int, look: style.Look) -> None:
    """The mean with its error bar, over the runs; a cross at the bad end where the mean is infinite."""
    mean, shown = group.mean or 0.0, [test for test in group.tests if abs(test) < LARGEST]
    axes.plot(shown, [place] * len(shown), ".", color=look.color, alpha=0.35, markersize=4, zorder=2)
    if not abs(mean) < LARGEST:  # or NaN
        axes.plot(0.02, place, "x", color=look.color, markersize=5, transform=axes.get_yaxis_transform())
        return
    axes.errorbar(
        mean, place, xerr=group.std, color=look.color, marker=look.marker, linestyle="none", elinewidth=1.2,
        markersize=6.5, markeredgecolor="white", markeredgewidth=0.6, zorder=3,
    )  # fmt: skip
