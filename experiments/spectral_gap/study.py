"""The last error of every learner against the spectral gap δ: A is diagonal with entries ±(1 − δ)."""

import itertools
from typing import Any

from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.learners import LEARNERS, SMALL, learn
from experiments.shared.plots import markdown, plot_quartiles, provenance, short
from experiments.shared.statistics import at_best_rate, distinct, final_error, quartiles, select
from experiments.shared.study import Results

SETTINGS: Settings = {
    "models": ["STU", "LRU", "S4D", "S5", "Transformer"],
    "deltas": [1e-1, 1e-2, 1e-3, 1e-4, 1e-7],
    "lrs": [0.003, 0.01, 0.03, 0.1, 0.3],
    "seeds": 3,
    "seq_len": 1024,
    "num_filters": 25,
    "spectrum": "signs",
    "samples": 300,
    "evaluated": 32,
}
QUICK: Settings = {
    **SMALL, "models": ["STU", "Transformer"], "deltas": [1e-1, 1e-4], "lrs": [0.01, 0.1], "num_filters": 4
}  # fmt: skip


def cells(settings: Settings) -> list[Cell]:
    """Every learner at every gap and rate, with every seed."""
    kept = ("seq_len", "num_filters", "spectrum", "samples", "evaluated")
    return cross(settings, kept, model=settings["models"], delta=settings["deltas"], lr=settings["lrs"])


def work(cell: Cell) -> Row:
    """The curve of a cell."""
    return learn(cell, LEARNERS[cell["model"]])[2]


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By learner and gap: the rate with the smallest validation error, and quartiles of the last test errors."""
    summary: dict[str, Any] = {}
    for model, delta in itertools.product(distinct(rows, "model"), distinct(rows, "delta")):
        best = at_best_rate(select(rows, model=model, delta=delta))
        error = quartiles(map(final_error, best))
        summary.setdefault(model, []).append({"delta": delta, "lr": best[0]["lr"], "error": error})
    return summary


def report(results: Results) -> str:
    """Medians of the last errors."""
    header = ["δ", *(f"{delta:g}" for delta in results["settings"]["deltas"])]
    lines = [[model, *(short(of["error"][1]) for of in by_delta)] for model, by_delta in results["summary"].items()]
    return f"{markdown(header, lines)}\n\n{provenance(results)}"


def draw(results: Results, figure: Any) -> None:
    """Medians and quartiles against δ."""
    figure.set_size_inches(7, 4.5)
    axis = figure.subplots()
    for (model, by_delta), marker in zip(results["summary"].items(), itertools.cycle("os^vDP"), strict=False):
        deltas, errors = zip(*((of["delta"], of["error"]) for of in by_delta), strict=True)
        plot_quartiles(axis, deltas, errors, marker=marker, markersize=4, label=model)
    axis.set(xscale="log", yscale="log", xlabel="spectral gap δ", ylabel="mean squared error / variance")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
