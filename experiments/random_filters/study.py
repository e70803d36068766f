"""The control: an STU with the filters of the Hankel matrix against as many others, at their best and trained."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments import study
from experiments.banks import BANKS, best_error, leading, put, responses
from experiments.learners import Problem, stu, train
from experiments.study import Cell, Results, Row, Study, best, final, quartiles, select, short

KINDS = [kind for kind in BANKS if kind != "Hankel, dense eigh"]
SPECTRA = {"signs": "A = ±(1 − δ)", "uniform": "A uniform in ±(1 − δ)"}


def cells(settings: Mapping[str, Any]) -> list[Cell]:
    """The best that every kind of filters can do, and the STU trained with it."""
    seeds, delta = range(settings["seeds"]), settings["delta"]
    exact = [
        {"trained": False, "filters": kind, "spectrum": spectrum, "seed": seed, "seq_len": settings["seq_len"],
         "delta": delta, "counts": settings["counts"]}
        for kind, spectrum, seed in itertools.product(KINDS, SPECTRA, seeds)
    ]  # fmt: skip
    common = {key: settings[key] for key in ("num_filters", "seq_len", "delta", "samples", "evaluated")}
    trained = [
        {"trained": True, "filters": kind, "spectrum": spectrum, "lr": lr, "seed": seed, **common}
        for kind, spectrum, lr, seed in itertools.product(KINDS, SPECTRA, settings["lrs"], seeds)
    ]
    return exact + trained


def work(cell: Cell) -> Row:
    """The least errors for all counts of filters, or the curve of a trained STU."""
    if not cell["trained"]:
        problem = Problem.of({**cell, "samples": 1, "evaluated": 1})
        truth = problem.data.system.impulse_response(cell["seq_len"])
        bank = bank_of(cell, cell["counts"][-1])
        return {"errors": [best_error(leading(bank, count), truth) for count in cell["counts"]]}
    problem = Problem.of(cell)
    torch.manual_seed(cell["seed"])
    layer = stu(cell["seq_len"], cell["num_filters"], k_y=0)
    return train(put(layer, bank_of(cell, cell["num_filters"])), problem, lr=cell["lr"])


def bank_of(cell: Cell, count: int) -> torch.Tensor:
    """The responses of `count` filters a branch."""
    return responses(cell["filters"], seq_len=cell["seq_len"], num_filters=count, seed=cell["seed"])


def chosen(rows: list[Row], kind: str, spectrum: str) -> list[Row]:
    """The trained rows of a kind of filters at its best rate."""
    own = select(rows, trained=True, filters=kind, spectrum=spectrum)
    return select(own, lr=best(own, "lr", lambda row: row["val"]))


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By spectrum and kind: quartiles of the least errors by count, and of the last errors of training."""
    summary: dict[str, Any] = {}
    for spectrum, kind in itertools.product(SPECTRA, KINDS):
        errors = (row["errors"] for row in select(rows, trained=False, filters=kind, spectrum=spectrum))
        own = chosen(rows, kind, spectrum)
        summary.setdefault(spectrum, {})[kind] = {
            "least": [quartiles(values) for values in zip(*errors, strict=True)],
            "lr": own[0]["lr"],
            "trained": quartiles(map(final, own)),
        }
    return summary


def report(results: Results) -> str:
    """Trained and least errors of every kind."""
    settings, summary = results["settings"], results["summary"]
    at = settings["counts"].index(settings["num_filters"])
    header = ["filters", *(f"{name}: {what}" for name in SPECTRA.values() for what in ("trained", "rate", "least"))]
    lines = []
    for kind in KINDS:
        of_kind = [summary[spectrum][kind] for spectrum in SPECTRA]
        columns = ((short(of["trained"][1]), f"{of['lr']:g}", short(of["least"][at][1])) for of in of_kind)
        lines.append([kind, *itertools.chain.from_iterable(columns)])
    return "\n\n".join([study.markdown(header, lines), study.made_with(results)])


def draw(results: Results, figure: Any) -> None:
    """For each spectrum, least errors against the number of filters and curves of training at the best rates."""
    figure.set_size_inches(12, 9)
    settings, axes = results["settings"], figure.subplots(2, 2)
    for (spectrum, name), (least, trained) in zip(SPECTRA.items(), axes, strict=True):
        for kind, of in results["summary"][spectrum].items():
            study.quarters(least, settings["counts"], of["least"], label=kind)
            rows = chosen(results["rows"], kind, spectrum)
            errors = [row["errors"] for row in rows]
            study.band(trained, rows[0]["samples"], errors, label=f"{kind}, rate {of['lr']:g}")
        least.set(xlabel="filters of a branch, K", ylabel="least error / variance", title=name)
        trained.set(xscale="log", xlabel="sequences", ylabel="mean squared error / variance")
        trained.set_title(f"{name}, trained, K = {settings['num_filters']}")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


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
        "delta": 1e-4,
        "counts": [1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30],
        "num_filters": 25,
        "lrs": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
        "samples": 1000,
        "evaluated": 32,
    },
    quick={"seeds": 2, "seq_len": 32, "counts": [1, 4], "num_filters": 4, "lrs": [0.1], "samples": 20, "evaluated": 4},
)
