"""Figure 3(b) of the STU paper (2312.06837): the error against the number of filters, exact or by a dense `eigh`."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments import study
from experiments.banks import best_error, leading, put, responses
from experiments.learners import Problem, stu, train
from experiments.study import Cell, Results, Row, Study, best, distinct, final, quartiles, select, short

ACCURATE, DENSE = "Hankel", "Hankel, dense eigh"
RECURRENCES = {0: "without y", 2: "with y_{t−2}"}


def cells(settings: Mapping[str, Any]) -> list[Cell]:
    """The best that any K filters can do, and the STU trained with some."""
    seeds, spectrum, delta = range(settings["seeds"]), settings["spectrum"], settings["delta"]
    exact = [
        {"trained": False, "filters": kind, "k_y": k_y, "seq_len": seq_len, "seed": seed, "spectrum": spectrum,
         "delta": delta, "most": settings["most"]}
        for kind, k_y, seq_len, seed in itertools.product((ACCURATE, DENSE), RECURRENCES, settings["lengths"], seeds)
    ]  # fmt: skip
    common = {key: settings[key] for key in ("seq_len", "spectrum", "delta", "samples", "evaluated")}
    counts = {ACCURATE: settings["trained"], DENSE: settings["trained_dense"]}
    trained = [
        {"trained": True, "filters": kind, "k_y": 0, "num_filters": count, "lr": lr, "seed": seed, **common}
        for kind, of_kind in counts.items()
        for count, lr, seed in itertools.product(of_kind, settings["lrs"], seeds)
    ]
    return exact + trained


def work(cell: Cell) -> Row:
    """Errors of the best STU for K = 1 … most, or the curve of a trained one."""
    if not cell["trained"]:
        problem = Problem.of({**cell, "samples": 1, "evaluated": 1})
        truth = problem.data.system.impulse_response(cell["seq_len"])
        bank = bank_of(cell, cell["most"])
        return {"errors": [best_error(leading(bank, count), truth) for count in range(1, cell["most"] + 1)]}
    problem = Problem.of(cell)
    torch.manual_seed(cell["seed"])
    layer = stu(cell["seq_len"], cell["num_filters"], k_y=0)
    return train(put(layer, bank_of(cell, cell["num_filters"])), problem, lr=cell["lr"])


def bank_of(cell: Cell, count: int) -> torch.Tensor:
    """The responses of `count` filters a branch."""
    return responses(
        cell["filters"], seq_len=cell["seq_len"], num_filters=count, seed=cell["seed"], recurrence=cell["k_y"]
    )


def exact(rows: list[Row], **wanted: Any) -> list[list[float]]:
    """Quartiles of the least errors, for K = 1 … most."""
    errors = (row["errors"] for row in select(rows, trained=False, **wanted))
    return [quartiles(values) for values in zip(*errors, strict=True)]


def learned(rows: list[Row], kind: str) -> dict[int, dict[str, Any]]:
    """By K: the rate with the smallest validation error, and quartiles of the last test errors."""
    by_count = {}
    own = select(rows, trained=True, filters=kind)
    for count in distinct(own, "num_filters"):
        same = select(own, num_filters=count)
        lr = best(same, "lr", lambda row: row["val"])
        by_count[count] = {"lr": lr, "error": quartiles(map(final, select(same, lr=lr)))}
    return by_count


def summarize(rows: list[Row]) -> dict[str, Any]:
    """The least errors by length, recurrence and filters, and the trained ones."""
    least = {
        f"L = {seq_len}, {name}, {kind}": exact(rows, seq_len=seq_len, k_y=k_y, filters=kind)
        for seq_len in distinct(select(rows, trained=False), "seq_len")
        for k_y, name in RECURRENCES.items()
        for kind in (ACCURATE, DENSE)
    }
    return {"least": least, "trained": {kind: learned(rows, kind) for kind in (ACCURATE, DENSE)}}


def report(results: Results) -> str:
    """What the trained STU reaches, beside the least error that is possible, for some K."""
    settings, summary = results["settings"], results["summary"]
    counts = sorted({*settings["trained"], *settings["trained_dense"]})
    trained, seq_len = summary["trained"], settings["seq_len"]
    least = {
        (k_y, kind): summary["least"][f"L = {seq_len}, {RECURRENCES[k_y]}, {kind}"]
        for k_y in RECURRENCES
        for kind in (ACCURATE, DENSE)
    }
    names = [f"least {RECURRENCES[k_y]}{', dense' * (kind == DENSE)}" for k_y, kind in least]
    header = ["K", "trained", "trained, dense", *names]
    lines = []
    for count in counts:
        by_training = [trained[kind].get(str(count)) for kind in (ACCURATE, DENSE)]
        lines.append(
            [
                str(count),
                *(short(of["error"][1]) if of else "" for of in by_training),
                *(short(of[count - 1][1]) for of in least.values()),
            ]
        )
    return "\n\n".join([study.markdown(header, lines), study.made_with(results)])


def draw(results: Results, figure: Any) -> None:
    """Least errors of both kinds of filters at every length, with the trained ones where there are any."""
    figure.set_size_inches(15, 4.5)
    settings, summary = results["settings"], results["summary"]
    axes = figure.subplots(1, len(settings["lengths"]), sharey=True, squeeze=False)[0]
    for axis, seq_len in zip(axes, settings["lengths"], strict=True):
        for name, color in zip(RECURRENCES.values(), ("C0", "C1"), strict=True):
            for kind, line in ((ACCURATE, "-"), (DENSE, ":")):
                quarters = summary["least"][f"L = {seq_len}, {name}, {kind}"]
                medians = [middle for _, middle, _ in quarters]
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


STUDY = Study(
    folder=Path(__file__).parent,
    cells=cells,
    work=work,
    summarize=summarize,
    report=report,
    draw=draw,
    settings={
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
    },
    quick={
        "seeds": 2,
        "seq_len": 64,
        "lengths": [64],
        "most": 4,
        "trained": [1, 4],
        "trained_dense": [4],
        "lrs": [0.1],
        "samples": 20,
        "evaluated": 4,
    },
)
