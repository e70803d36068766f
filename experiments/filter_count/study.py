"""Figure 3(b) of the STU paper (2312.06837): the error against the number of filters, exact or by a dense `eigh`."""

import itertools
from typing import Any

from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.learners import SMALL, learn_with_filters, least_errors
from experiments.shared.plots import markdown, provenance, short
from experiments.shared.statistics import at_best_rate, distinct, final_error, quartiles, select
from experiments.shared.study import Results

ACCURATE, DENSE = "Hankel", "Hankel, dense eigh"
RECURRENCES = {0: "without y", 2: "with y_{t−2}"}

SETTINGS: Settings = {
    "seeds": 5,
    "seq_len": 256,
    "lengths": [128, 256, 1024],
    "most": 30,
    "spectrum": "signs",
    "delta": 1e-4,
    "trained": [1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30],
    "trained_dense": [15, 20, 25, 30],
    "lrs": [0.03, 0.1, 0.3],
    "samples": 1000,
    "evaluated": 32,
}
QUICK: Settings = {**SMALL, "seq_len": 64, "lengths": [64], "most": 4, "trained": [1, 4], "trained_dense": [4]}


def cells(settings: Settings) -> list[Cell]:
    """The least errors of any K filters, and the STU trained with some."""
    counts = {ACCURATE: settings["trained"], DENSE: settings["trained_dense"]}
    varied = {"trained": [False], "filters": counts, "k_y": RECURRENCES, "seq_len": settings["lengths"]}
    found = cross(settings, ("spectrum", "delta", "most"), **varied)
    kept = ("seq_len", "spectrum", "delta", "samples", "evaluated")
    for kind, of_kind in counts.items():
        varied = {"trained": [True], "filters": [kind], "k_y": [0], "num_filters": of_kind, "lr": settings["lrs"]}
        found += cross(settings, kept, **varied)
    return found


def work(cell: Cell) -> Row:
    """The least errors for K = 1 … most, or the curve of a trained STU."""
    if cell["trained"]:
        return learn_with_filters(cell)
    return {"errors": least_errors(cell, range(1, cell["most"] + 1), recurrence=cell["k_y"])}


def learned(rows: list[Row], kind: str) -> dict[int, dict[str, Any]]:
    """By K: the rate with the smallest validation error, and quartiles of the last test errors."""
    own = select(rows, trained=True, filters=kind)
    best = {count: at_best_rate(select(own, num_filters=count)) for count in distinct(own, "num_filters")}
    return {count: {"lr": of[0]["lr"], "error": quartiles(map(final_error, of))} for count, of in best.items()}


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Quartiles of the least errors by length, recurrence and filters, and of the trained ones."""
    exact = select(rows, trained=False)
    least = {}
    for seq_len, k_y, kind in itertools.product(distinct(exact, "seq_len"), RECURRENCES, (ACCURATE, DENSE)):
        errors = (row["errors"] for row in select(exact, seq_len=seq_len, k_y=k_y, filters=kind))
        name = f"L = {seq_len}, {RECURRENCES[k_y]}, {kind}"
        least[name] = [quartiles(values) for values in zip(*errors, strict=True)]  # K = 1 … most
    return {"least": least, "trained": {kind: learned(rows, kind) for kind in (ACCURATE, DENSE)}}


def report(results: Results) -> str:
    """The errors of the trained STU, next to the least possible ones, for some K."""
    settings, summary = results["settings"], results["summary"]
    trained, seq_len = summary["trained"], settings["seq_len"]
    cases = list(itertools.product(RECURRENCES.values(), (ACCURATE, DENSE)))
    least = [summary["least"][f"L = {seq_len}, {recurrence}, {kind}"] for recurrence, kind in cases]
    names = [f"least {recurrence}{', dense' * (kind == DENSE)}" for recurrence, kind in cases]
    lines = []
    for count in sorted({*settings["trained"], *settings["trained_dense"]}):
        by_training = [trained[kind].get(str(count)) for kind in (ACCURATE, DENSE)]
        medians = [short(of["error"][1]) if of else "" for of in by_training]
        lines.append([str(count), *medians, *(short(of[count - 1][1]) for of in least)])
    table = markdown(["K", "trained", "trained, dense", *names], lines)
    return f"{table}\n\n{provenance(results)}"


def draw(results: Results, figure: Any) -> None:
    """Least errors of both kinds of filters at every length, with the trained ones where there are any."""
    figure.set_size_inches(15, 4.5)
    settings, summary = results["settings"], results["summary"]
    axes = figure.subplots(1, len(settings["lengths"]), sharey=True, squeeze=False)[0]
    for axis, seq_len in zip(axes, settings["lengths"], strict=True):
        for name, color in zip(RECURRENCES.values(), ("C0", "C1"), strict=True):
            for kind, line in ((ACCURATE, "-"), (DENSE, ":")):
                medians = [middle for _, middle, _ in summary["least"][f"L = {seq_len}, {name}, {kind}"]]
                axis.plot(range(1, len(medians) + 1), medians, line, color=color, label=f"least, {name}, {kind}")
        if seq_len == settings["seq_len"]:
            for (kind, of), marker, color in zip(summary["trained"].items(), "ox", ("C2", "C3"), strict=True):
                middle = [values["error"][1] for values in of.values()]
                axis.plot(list(map(int, of)), middle, marker, color=color, label=f"trained, without y, {kind}")
        axis.set(yscale="log", xlabel="filters of a branch, K", title=f"L = {seq_len}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean squared error / variance")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda both: len(both[1]))
    figure.legend(handles, labels, fontsize="small", loc="outside right center")
