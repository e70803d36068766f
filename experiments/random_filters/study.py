"""The control: an STU with the filters of the Hankel matrix against as many others, at their best and trained."""

import itertools
from typing import Any

from experiments.shared.banks import BANKS
from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.learners import SMALL, learn_with_filters, least_errors
from experiments.shared.plots import markdown, plot_band, plot_quartiles, provenance, short
from experiments.shared.statistics import at_best_rate, final_error, quartiles, select
from experiments.shared.study import Results

KINDS = [kind for kind in BANKS if kind != "Hankel, dense eigh"]
SPECTRA = {"signs": "A = ±(1 − δ)", "uniform": "A uniform in ±(1 − δ)"}

SETTINGS: Settings = {
    "seeds": 5,
    "seq_len": 256,
    "delta": 1e-4,
    "counts": [1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30],
    "num_filters": 25,
    "lrs": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    "samples": 1000,
    "evaluated": 32,
}
QUICK: Settings = {**SMALL, "counts": [1, 4], "num_filters": 4}


def cells(settings: Settings) -> list[Cell]:
    """The least errors of every kind of filters, and the STU trained with it."""
    kinds = {"filters": KINDS, "spectrum": SPECTRA}
    exact = cross(settings, ("seq_len", "delta", "counts"), trained=[False], **kinds)
    kept = ("num_filters", "seq_len", "delta", "samples", "evaluated")
    return exact + cross(settings, kept, trained=[True], **kinds, lr=settings["lrs"])


def work(cell: Cell) -> Row:
    """The least errors for all numbers of filters, or the curve of a trained STU."""
    if cell["trained"]:
        return learn_with_filters(cell)
    return {"errors": least_errors(cell, cell["counts"])}


def best(rows: list[Row], kind: str, spectrum: str) -> list[Row]:
    """The trained rows of a kind of filters at its best rate."""
    return at_best_rate(select(rows, trained=True, filters=kind, spectrum=spectrum))


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By spectrum and kind: quartiles of the least errors by number of filters, and of the last errors of training."""
    summary: dict[str, Any] = {}
    for spectrum, kind in itertools.product(SPECTRA, KINDS):
        errors = (row["errors"] for row in select(rows, trained=False, filters=kind, spectrum=spectrum))
        own = best(rows, kind, spectrum)
        summary.setdefault(spectrum, {})[kind] = {
            "least": [quartiles(values) for values in zip(*errors, strict=True)],
            "lr": own[0]["lr"],
            "trained": quartiles(map(final_error, own)),
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
    return f"{markdown(header, lines)}\n\n{provenance(results)}"


def draw(results: Results, figure: Any) -> None:
    """For each spectrum, least errors against the number of filters, and curves of training at the best rates."""
    figure.set_size_inches(12, 9)
    settings, axes = results["settings"], figure.subplots(2, 2)
    for (spectrum, name), (least, trained) in zip(SPECTRA.items(), axes, strict=True):
        for kind, of in results["summary"][spectrum].items():
            plot_quartiles(least, settings["counts"], of["least"], label=kind)
            rows = best(results["rows"], kind, spectrum)
            curves = [row["errors"] for row in rows]
            plot_band(trained, rows[0]["samples"], curves, label=f"{kind}, rate {of['lr']:g}")
        least.set(xlabel="filters of a branch, K", ylabel="least error / variance", title=name)
        title = f"{name}, trained, K = {settings['num_filters']}"
        trained.set(xscale="log", xlabel="sequences", ylabel="mean squared error / variance", title=title)
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
