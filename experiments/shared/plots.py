"""Tables in Markdown, and lines with bands between quartiles, from what results.json holds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.shared.statistics import from_json, quartiles


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def short(value: float | None, digits: int = 2) -> str:
    """A number for a table; ∞ for what diverged."""
    value = from_json(value)
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.{digits}g}"


def provenance(results: Mapping[str, Any]) -> str:
    """The line under a table: the command, how long it took, the machine, versions, date and commit."""
    machine, versions = results["machine"], results["versions"]
    return (
        f"`{results['command']}`: {results['cell_seconds'] / 60:.1f} core minutes on {machine['device']}, "
        f"torch {versions['torch']}, {results['date'][:10]}, commit {results['commit']}."
    )


def plot_band(axis: Any, x: Sequence[float], runs: Sequence[Sequence[float | None]], **style: Any) -> None:
    """A line through the medians of all runs at each x, and a band between the quartiles; gaps where they diverged."""
    plot_quartiles(axis, x, [quartiles(values) for values in zip(*runs, strict=True)], **style)


def plot_quartiles(axis: Any, x: Sequence[float], values: Sequence[Sequence[float | None]], **style: Any) -> None:
    """The same from the quartiles at each x."""
    low, middle, high = np.array([[from_json(value) for value in three] for three in values]).T
    shown = np.isfinite(middle)
    [line] = axis.plot(x, np.where(shown, middle, np.nan), **style)
    top = np.where(np.isfinite(high), high, middle[shown].max(initial=0.0))
    axis.fill_between(x, low, top, where=shown, color=line.get_color(), alpha=0.15, linewidth=0)
