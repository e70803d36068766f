"""Figures of one task: learning curves with bands over the seeds, and what the results cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.compare.figures import style
from experiments.compare.figures.data import LARGEST, Band, bands, baselines, fraction, front, spread
from experiments.compare.groups import Group
from experiments.compare.runs import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPLITS = {"train": "training", "val": "validation"}
LABEL, HEADS = 0.115, 0.8  # inches of the height: of a line of names, and of titles and captions


def curves(groups: Sequence[Group], models: Sequence[str]) -> Figure | None:
    """The monitored metric over the steps, in training where it is logged and in validation."""
    names = {f"{split}/{groups[0].metric}": title for split, title in SPLITS.items()}
    found = {group.model: bands(group.finished or group.rows, list(names)) for group in groups}
    by_metric = {name: {model: of[name] for model, of in found.items() if name in of} for name in names}
    shown = [name for name in names if by_metric[name]]
    if not shown:
        return None
    figure, panels = _panels(len(shown), len(groups))
    drawn = [band for of in by_metric.values() for band in of.values()]
    values = [value for band in drawn for value in (*band.low.tolist(), *band.high.tolist())]
    style.scale_metric(panels[0], "y", [*values, *baselines(groups)], groups[0])
    for name, axes in zip(shown, panels, strict=True):
        _draw_bands(axes, by_metric[name], style.looks(models), last=max(band.steps[-1] for band in drawn))
        style.mark_baselines(axes, groups)
        axes.set_title(names[name])
    panels[0].set_ylabel(style.title_of(groups[0]))
    ends = {model: float(band.mean[-1]) for model, band in by_metric[shown[-1]].items()}
    ends |= dict.fromkeys(["trivial baseline"][: len(baselines(groups))], max(baselines(groups), default=0.0))
    colors = {model: look.color for model, look in style.looks(models).items()}
    _name_ends(panels[-1], ends, colors, gap=LABEL / (figure.get_figheight() - HEADS))
    style.caption(figure, groups[0].title, "Lines: means over the seeds. Bands: from the least to the largest.")
    return figure


def costs(groups: Sequence[Group], models: Sequence[str]) -> Figure | None:
    """The metric on the test set against the parameters and the training time."""
    groups = [group for group in groups if group.mean is not None and abs(group.mean) < LARGEST]
    size, unit = style.unit_of_time([row.seconds for group in groups for row in group.finished if row.seconds])
    costs_of: dict[str, Callable[[Row], float | None]] = {
        "parameters": lambda row: row.parameters,
        f"training time ({unit})": lambda row: row.seconds and row.seconds / size,
    }
    known = {name: of for name, of in costs_of.items() if any(group.median(of) for group in groups)}
    if not known:
        return None
    figure, panels = _panels(len(known), len(groups))
    values = [*(test for group in groups for test in group.tests), *baselines(groups)]
    style.scale_metric(panels[0], "y", values, groups[0])
    for (name, of), axes in zip(known.items(), panels, strict=True):
        _draw_costs(axes, [group for group in groups if group.median(of)], of, style.looks(models))
        style.mark_baselines(axes, groups)
        axes.set_xlabel(name)
    panels[0].set_ylabel(style.title_of(groups[0], "test "))
    style.legend(figure, groups, models)
    text = "Means and standard deviations over the seeds; range of the times. Line: no other is cheaper and better."
    style.caption(figure, groups[0].title, text)
    return figure


def _panels(count: int, names: int) -> tuple[Figure, Sequence["Axes"]]:
    """Axes side by side with one axis of the metric, as high as so many names need."""
    figure = Figure(figsize=(style.PAGE if count > 1 else 4.4, max(3.0, HEADS + LABEL * (names + 1))))
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _draw_bands(axes: "Axes", bands_of: Mapping[str, Band], looks: Mapping[str, style.Look], last: int) -> None:
    """Up to the last step of all; the best, which are first, over the others."""
    for place, (model, band) in enumerate(bands_of.items()):
        look, every = looks[model], max(1, len(band.steps) // 8)
        on_top: dict[str, Any] = {"color": look.color, "zorder": 3 - place / len(bands_of)}
        axes.fill_between(band.steps, band.low, band.high, alpha=0.15, linewidth=0, **on_top)
        axes.plot(
            band.steps, band.mean, linestyle=look.line, marker=look.marker, markersize=3.8, markeredgecolor="white",
            markeredgewidth=0.4, markevery=(place % every, every), clip_on=False, **on_top,
        )  # fmt: skip
    for model, band in bands_of.items():  # to where its name is
        axes.plot([band.steps[-1], last], band.mean[[-1, -1]], ":", color=looks[model].color, linewidth=0.6)
    axes.set(xlabel="optimizer step", xlim=(0, last))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.number(value)))


def _name_ends(axes: "Axes", ends: Mapping[str, float], colors: Mapping[str, str], gap: float) -> None:
    """Names at the right of the axes, beside the values at which lines end, as far as they do not overlap."""
    low, high = axes.get_ylim()
    places = [fraction(min(max(end, low), high), low, high, axes.get_yscale() == "log") for end in ends.values()]
    for name, place, beside in zip(ends, places, spread(places, gap), strict=True):
        color = colors.get(name, style.GREY)
        axes.plot([1, 1.035], [place, beside], color=color, linewidth=0.6, transform=axes.transAxes, clip_on=False)
        axes.text(1.05, beside, style.short(name), color=color, va="center", fontsize=7, transform=axes.transAxes)


def _draw_costs(
    axes: "Axes", groups: Sequence[Group], of: Callable[[Row], float | None], looks: Mapping[str, style.Look]
) -> None:
    """Points with error bars, and the line that none of them is beyond."""
    points = []
    for group in groups:
        each = sorted(value for row in group.finished if (value := of(row)))
        cost, metric, look = group.median(of) or 0.0, group.mean or 0.0, looks[group.model]
        reach = [[max(0.0, cost - min(each, default=cost))], [max(0.0, max(each, default=cost) - cost)]]
        points.append((cost, metric))
        axes.errorbar(
            cost, metric, yerr=group.std, xerr=reach, color=look.color, marker=look.marker, linestyle="none",
            elinewidth=0.8, markeredgecolor="white", markeredgewidth=0.5, markersize=6, zorder=3,
        )  # fmt: skip
    style.scale_log(axes, "x", [cost for cost, _ in points])
    axes.margins(x=0.1)
    line = front(points, groups[0].mode)
    line.append((max(cost for cost, _ in points), line[-1][1]))
    axes.step(*zip(*line, strict=True), where="post", color=style.FAINT, linewidth=1.0, zorder=1.2)
