"""How all figures look: sizes of a paper's columns, colours that the colour-blind and grey printers tell apart."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.compare.figures.data import baselines, spans_decades
from experiments.compare.groups import Group
from experiments.compare.runs import Measured, is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHED = (0, (4, 2))
MODELS = Path(__file__).resolve().parents[3] / "conf" / "model"
PAGE, COLUMN = 7.0, 3.4  # inches
GREY, FAINT = "#555555", "#bbbbbb"
# The "muted" scheme of Paul Tol (personal.sron.nl/~pault), its sand darker, and three more.
COLORS = (
    "#332288", "#cc6677", "#117733", "#88ccee", "#882255", "#ddaa33",
    "#44aa99", "#aa4499", "#000000", "#999933", "#ee7733", "#7f7f7f",
)  # fmt: skip
MARKERS = "osD^vPXp<>hd"
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
LONGEST = 20  # characters of the name of a model or a value
SUBS = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))  # ticks of a decade
RC: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 7.5,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 7.5,
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a $ in a name is a $
    "pdf.fonttype": 42,  # TrueType, which journals ask for
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",
}
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}


class Look(NamedTuple):
    """Of one model, in all figures."""

    color: str
    marker: str
    line: Any


def styled() -> AbstractContextManager[None]:
    """Within which figures are made and saved; settings of the user don't count."""
    settings: Any = {**matplotlib.rcParamsDefault, **RC, "backend": matplotlib.rcParams["backend"]}
    return matplotlib.rc_context(settings)


def looks(models: Iterable[str]) -> dict[str, Look]:
    """Model → its look: those of conf/model have the same one whatever they are compared with."""
    known = sorted(file.stem for file in MODELS.glob("[!_]*.yaml"))
    names = [*known, *sorted(set(models) - set(known))]
    return {
        name: Look(COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)], LINES[k % len(LINES)])
        for k, name in enumerate(names)
    }


def save(figure: Figure, file: Path) -> Path:
    """Write a figure without dates and versions."""
    form = file.suffix[1:]
    figure.savefig(file, dpi=200, metadata=METADATA[form])
    return file


def title_of(measured: Measured, split: str = "") -> str:
    """The name of the metric with the direction; shares are in percent."""
    percent = ", %" if is_share(measured.metric) else ""
    return f"{split}{measured.metric}{percent} ({'higher' if measured.mode == 'max' else 'lower'} is better)"


def value_of(group: Group) -> str:
    """The mean in three digits."""
    mean = math.nan if group.mean is None else group.mean
    return f"{100 * mean:.1f} %" if is_share(group.metric) else f"{mean:#.3g}"


def short(name: str) -> str:
    """The end of a long name, which tells it from others."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def caption(figure: Figure, title: str, text: str, size: float = 6.5) -> None:
    """What a figure is, above it, and how to read it, below it."""
    if title:
        fits = 85 * figure.get_figwidth() / max(len(title), 1)  # points at which it is as wide as the figure
        figure.suptitle(title, x=0.01, ha="left", fontsize=min(9.5, fits), fontweight="bold")
    text = fill(text, int(130 * figure.get_figwidth() / size))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=size, color=GREY)


def scale_metric(axes: "Axes", which: Literal["x", "y"], values: Sequence[float], measured: Measured) -> None:
    """The scale and the ticks of the x or y axis, on which the metric is; values: all that are drawn."""
    if spans_decades(values, measured.mode):
        scale_log(axes, which, values)
        return
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if is_share(measured.metric):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def scale_log(axes: "Axes", which: Literal["x", "y"], values: Sequence[float], most: float = 5) -> None:
    """A logarithmic scale with about `most` ticks that can be read, however few decades the values span."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    if high < 1.2 * low:
        axes.set(**{f"{which}lim": (low / 1.2, high * 1.2)})
    decades = math.log10(high / low)
    subs = next((subs for subs in SUBS if decades * len(subs) <= most), (1.0,))
    axis.set_major_locator(
        LogLocator(subs=subs) if decades > 0.6 else MaxNLocator(int(most) - 1, steps=[1, 2, 2.5, 5, 10])
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_locator(NullLocator())


def number(value: float) -> str:
    """Short: 0.003, 1e-05, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


def unit_of_time(seconds: Sequence[float]) -> tuple[float, str]:
    """The seconds of the unit in which these are best read, and its name."""
    typical = median(seconds) if seconds else 1.0
    return next(
        ((size, unit) for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")) if typical >= size), (1.0, "s")
    )


def mark_baselines(axes: "Axes", groups: Sequence[Group], *, vertical: bool = False) -> None:
    """Dashed lines at the best trivial baselines."""
    for value in baselines(groups):
        line = axes.axvline if vertical else axes.axhline
        line(value, color=GREY, linewidth=0.9, linestyle=DASHED, zorder=1.5)


def legend(figure: Figure, groups: Sequence[Group], models: Iterable[str]) -> None:
    """The markers of the models, right of the axes, in the order of the groups."""
    shown = {group.model: looks(models)[group.model] for group in groups}
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="none", label=short(model))
        for model, look in shown.items()
    ]
    if baselines(groups):
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, linestyle=DASHED, label="trivial baseline"))
    figure.legend(handles=handles, loc="outside right center", handlelength=1.8)
