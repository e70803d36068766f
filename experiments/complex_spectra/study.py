"""An STU with Slepian filters against other filters and learned eigenvalues, on systems with complex eigenvalues."""

import itertools
from typing import Any

import torch
from torch import Tensor

from experiments.shared.banks import best_error, responses, with_filters
from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.learners import LEARNERS, SMALL, Problem, learn, stu
from experiments.shared.plots import markdown, plot_quartiles, provenance, short
from experiments.shared.statistics import at_best_rate, final_error, quartiles, select
from experiments.shared.study import Results
from stu.ops.bank import filter_bank
from stu.ops.filters import Hankel, spectral_filters
from stu.ops.slepian import default_bandwidth

FILTERS = ["Slepian", "Hankel", "Hankel-L", "cosines", "random"]
TRAINED = ["Slepian", "Hankel", "Hankel-L", "random", "LRU", "S4D"]

SETTINGS: Settings = {
    "seeds": 3,
    "seq_len": 256,
    "delta": 1e-4,
    "spectrum": "complex",
    "sectors": [1 / 32, 1 / 8, 1 / 4, 1],
    "d_states": [4, 64],
    "counts": [2, 4, 8, 12, 16, 20, 24, 32, 40, 50, 58],
    "num_filters": 50,
    "lrs": [0.01, 0.1],
    "samples": 200,
    "evaluated": 32,
}
QUICK: Settings = {**SMALL, "sectors": [1 / 8, 1], "d_states": [4], "counts": [2, 4], "num_filters": 4}


def cells(settings: Settings) -> list[Cell]:
    """The least errors of every kind of filters, and everything trained."""
    kept: tuple[str, ...] = ("seq_len", "delta", "spectrum")
    varied = {"sector": settings["sectors"], "d_state": settings["d_states"], "filters": FILTERS}
    found = cross(settings, (*kept, "counts"), trained=[False], **varied)
    kept = (*kept, "num_filters", "samples", "evaluated")
    varied = {"sector": settings["sectors"], "d_state": settings["d_states"][:1], "filters": TRAINED}
    return found + cross(settings, kept, trained=[True], **varied, lr=settings["lrs"])


def bank(kind: str, *, seq_len: int, num_filters: int, seed: int, sector: float) -> Tensor:
    """Every impulse response of an STU with so many filters in all, delayed by two, and three lags: (L, K + 3).

    Slepian filters have the sector's bandwidth, or that which so many filters cover if it is smaller; more filters than
    float64 can tell apart in a sector have a wider one.
    """
    if kind in ("Slepian", "Hankel-L"):
        hankel: Hankel = "slepian" if kind == "Slepian" else "L"
        covered = default_bandwidth(seq_len, num_filters)
        width = min(covered, max(0.85 * covered, sector / 2)) if kind == "Slepian" else None
        values, filters = spectral_filters(seq_len, num_filters, hankel, width)
        return filter_bank(values**0.25 * filters, delay=2, k_u=3)
    return responses(kind, seq_len=seq_len, num_filters=num_filters // 2, seed=seed)


def work(cell: Cell) -> Row:
    """The least errors for all numbers of filters, or the curve of what is trained."""
    if not cell["trained"]:
        truth = Problem({**cell, "samples": 1, "evaluated": 1}).data.system.impulse_response(cell["seq_len"])
        return {"errors": [best_error(_bank_of(cell, count), truth) for count in cell["counts"]]}
    if cell["filters"] in LEARNERS:
        return learn(cell, LEARNERS[cell["filters"]])[2]
    return learn(cell, lambda *_: _filtering(cell))[2]


def _bank_of(cell: Cell, count: int) -> Tensor:
    """That of a cell."""
    options = {key: cell[key] for key in ("seq_len", "seed", "sector")}
    return bank(cell["filters"], num_filters=count, **options)


def _filtering(cell: Cell) -> torch.nn.Module:
    made = _bank_of(cell, cell["num_filters"])
    return with_filters(stu(cell["seq_len"], cell["num_filters"] // 2, k_y=0), made)


def best(rows: list[Row], kind: str, sector: float) -> list[Row]:
    """The trained rows of a kind at its best rate."""
    return at_best_rate(select(rows, trained=True, filters=kind, sector=sector))


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Quartiles of the least errors, by sector, size of the state and filters, and of the last errors of training."""
    summary: dict[str, Any] = {"least": {}, "trained": {}}
    exact = select(rows, trained=False)
    keys = dict.fromkeys((row["sector"], row["d_state"], row["filters"]) for row in exact)
    for sector, d_state, kind in keys:
        errors = (row["errors"] for row in select(exact, sector=sector, d_state=d_state, filters=kind))
        of_sector = summary["least"].setdefault(f"{sector:g}", {}).setdefault(str(d_state), {})
        of_sector[kind] = [quartiles(values) for values in zip(*errors, strict=True)]
    for sector, kind in dict.fromkeys((row["sector"], row["filters"]) for row in select(rows, trained=True)):
        own = best(rows, kind, sector)
        found = {"lr": own[0]["lr"], "error": quartiles(map(final_error, own))}
        summary["trained"].setdefault(kind, {})[f"{sector:g}"] = found
    return summary


def report(results: Results) -> str:
    """Errors of everything trained, and the least errors of as many filters, by sector."""
    settings, summary = results["settings"], results["summary"]
    sectors = [f"{sector:g}" for sector in settings["sectors"]]
    names = [f"π/{1 / float(sector):g}" if sector != "1" else "π" for sector in sectors]
    lines = [[f"{kind}, trained", *(short(of[sector]["error"][1]) for sector in sectors)] for kind, of in
             summary["trained"].items()]  # fmt: skip
    at = settings["counts"].index(settings["num_filters"])
    for kind, d_state in itertools.product(FILTERS, settings["d_states"]):
        least = [summary["least"][sector][str(d_state)][kind][at][1] for sector in sectors]
        lines.append([f"{kind}, least, {d_state} states", *map(short, least)])
    waves = [str(round(settings["seq_len"] * sector)) for sector in settings["sectors"]]
    table = markdown(["largest angle", *names], [["2WL, filters that the sector holds", *waves], *lines])
    return f"{table}\n\n{provenance(results)}"


def draw(results: Results, figure: Any) -> None:
    """Least errors against the number of filters, by sector; of Slepian filters for both sizes of the state."""
    settings, summary = results["settings"], results["summary"]
    figure.set_size_inches(4 * len(settings["sectors"]), 4.2)
    axes = figure.subplots(1, len(settings["sectors"]), sharey=True, squeeze=False)[0]
    first, *others = map(str, settings["d_states"])
    for axis, sector in zip(axes, settings["sectors"], strict=True):
        of_sector = summary["least"][f"{sector:g}"]
        for number, kind in enumerate(FILTERS):
            plot_quartiles(axis, settings["counts"], of_sector[first][kind], label=kind, color=f"C{number}")
        for d_state in others:
            medians = [of[1] for of in of_sector[d_state]["Slepian"]]
            axis.plot(settings["counts"], medians, "C0:", label=f"Slepian, {d_state} states")
        axis.axvline(settings["seq_len"] * sector, color="0.6", linewidth=1)
        axis.set(xlim=(0, max(settings["counts"])), yscale="log", xlabel="filters", title=f"angles up to {sector:g} π")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("least error / variance")
    axes[-1].legend(fontsize="small")
