"""The last error of every learner against the spectral gap δ: A is diagonal with entries ±(1 − δ)."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import study
from experiments.learners import learn
from experiments.study import Cell, Results, Row, Study, best, distinct, final, quartiles, select, short


def cells(settings: Mapping[str, Any]) -> list[Cell]:
    """Every learner at every gap and rate, with every seed."""
    common = {key: settings[key] for key in ("seq_len", "num_filters", "spectrum", "samples", "evaluated")}
    varied = itertools.product(settings["models"], settings["deltas"], settings["lrs"], range(settings["seeds"]))
    return [{"model": model, "delta": delta, "lr": lr, "seed": seed, **common} for model, delta, lr, seed in varied]


def work(cell: Cell) -> Row:
    """The curve of a cell."""
    return learn(cell)[2]


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By learner and gap: the rate with the smallest validation error, and quartiles of the last test errors."""
    summary: dict[str, Any] = {}
    for model, delta in itertools.product(distinct(rows, "model"), distinct(rows, "delta")):
        own = select(rows, model=model, delta=delta)
        lr = best(own, "lr", lambda row: row["val"])
        error = quartiles(map(final, select(own, lr=lr)))
        summary.setdefault(model, []).append({"delta": delta, "lr": lr, "error": error})
    return summary


def report(results: Results) -> str:
    """Medians of the last errors."""
    header = ["δ", *(f"{delta:g}" for delta in results["settings"]["deltas"])]
    lines = [[model, *(short(of["error"][1]) for of in by_delta)] for model, by_delta in results["summary"].items()]
    return "\n\n".join([study.markdown(header, lines), study.made_with(results)])


def draw(results: Results, figure: Any) -> None:
    """Medians and quartiles against δ."""
    figure.set_size_inches(7, 4.5)
    axis = figure.subplots()
    for (model, by_delta), marker in zip(results["summary"].items(), itertools.cycle("os^vDP"), strict=False):
        deltas, errors = zip(*((of["delta"], of["error"]) for of in by_delta), strict=True)
        study.quarters(axis, deltas, errors, marker=marker, markersize=4, label=model)
    axis.set(xscale="log", yscale="log", xlabel="spectral gap δ", ylabel="mean squared error / variance")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


STUDY = Study(
    folder=Path(__file__).parent,
    cells=cells,
    work=work,
    summarize=summarize,
    report=report,
    draw=draw,
    settings={
        "models": ["STU", "LRU", "S4D", "S5", "Transformer"],
        "deltas": [1e-1, 1e-2, 1e-3, 1e-4, 1e-7],
        "lrs": [0.003, 0.01, 0.03, 0.1, 0.3],
        "seeds": 3,
        "seq_len": 1024,
        "num_filters": 25,
        "spectrum": "signs",
        "samples": 300,
        "evaluated": 32,
    },
    quick={
        "models": ["STU", "Transformer"],
        "deltas": [1e-1, 1e-4],
        "lrs": [0.01, 0.1],
        "seeds": 2,
        "seq_len": 32,
        "num_filters": 4,
        "samples": 20,
        "evaluated": 4,
    },
)
