"""Figure 3(a) of the STU paper (2312.06837): test errors against the sequences seen, for every learner and rate."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data.systems.identification import fit_arx, fit_fir, ho_kalman, impulse_response_error, mode_error
from data.systems.system import StateSpace, respond
from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.learners import LEARNERS, SMALL, Problem, impulse_response, learn
from experiments.shared.plots import markdown, plot_band, provenance, short
from experiments.shared.statistics import at_best_rate, distinct, final_error, median, quartiles, reached, select
from experiments.shared.study import Results

ERRORS = (0.1, 0.01, 0.001)  # to be reached
MODES_FROM = 64  # steps of an impulse response, from which its modes are identified

Response = np.ndarray  # (L, O, C), over all steps of a sequence

SETTINGS: Settings = {
    "models": [model for model in LEARNERS if model != "Transformer"],
    "lrs": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
    "seeds": 5,
    "seq_len": 256,
    "num_filters": 25,
    "delta": 1e-4,
    "spectrum": "signs",
    "samples": 1000,
    "evaluated": 32,
}
QUICK: Settings = {**SMALL, "models": ["STU", "LRU"], "lrs": [1e-2, 1e-1], "num_filters": 4, "samples": 30}


def fir(inputs: np.ndarray, targets: np.ndarray, order: int) -> Response:
    """Least squares on as many input lags as give the number of parameters of the STU."""
    return fit_fir(inputs, targets, lags=min(53, inputs.shape[1]))


def arx(inputs: np.ndarray, targets: np.ndarray, order: int) -> Response:
    """Least squares on two output lags and three input lags; as a rollout, which never sees the test outputs."""
    return fit_arx(inputs, targets, output_lags=2, input_lags=3).impulse_response(inputs.shape[1])


def subspace(inputs: np.ndarray, targets: np.ndarray, order: int) -> Response:
    """Ho–Kalman on an impulse response estimated from the first 16 steps of each sequence."""
    start = fit_fir(inputs[:, :16], targets[:, :16], lags=16)
    return ho_kalman(start, order).impulse_response(inputs.shape[1])


REFERENCES: Mapping[str, Callable[[np.ndarray, np.ndarray, int], Response]] = {
    "least squares, FIR": fir,
    "least squares, ARX": arx,
    "Ho–Kalman": subspace,
}


def cells(settings: Settings) -> list[Cell]:
    """Every learner at every rate, and every reference, with every seed."""
    kept = ("seq_len", "num_filters", "delta", "spectrum", "samples", "evaluated")
    learned = cross(settings, kept, model=settings["models"], lr=settings["lrs"])
    return learned + cross(settings, kept, model=REFERENCES, lr=[None])


def work(cell: Cell) -> Row:
    """The curve of a cell, and how close it came to the system itself."""
    if cell["model"] in LEARNERS:
        module, problem, result = learn(cell, LEARNERS[cell["model"]])
        return {**result, **identified(impulse_response(module, cell["seq_len"]), problem)}
    problem = Problem(cell)
    counts = [2**n for n in range(10) if 2**n <= min(64, cell["samples"])]
    inputs, targets = problem.arrays("train", counts[-1])
    order = len(problem.data.system.A)
    responses = [REFERENCES[cell["model"]](inputs[:count], targets[:count], order) for count in counts]
    errors = [squared_error(response, problem.arrays("test")) for response in responses]
    return {"samples": counts, "errors": errors, **identified(responses[-1], problem)}


def squared_error(response: Response, sequences: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean squared error of the predictions of an impulse response."""
    inputs, targets = sequences
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.square(respond(response, inputs) - targets).mean())


def identified(response: Response, problem: Problem) -> dict[str, float]:
    """Relative error of the impulse response and mean distance of the dominant modes."""
    space = StateSpace.of(problem.data.system)
    truth = space.impulse_response(len(response)) / problem.data.scale
    error = impulse_response_error(response, truth)
    if not np.isfinite(error):
        return {"impulse_response_error": error, "mode_error": error}
    found, true = (ho_kalman(h[:MODES_FROM], len(space.A)).modes for h in (response, truth))
    return {"impulse_response_error": error, "mode_error": mode_error(found, true)}


def best(rows: list[Row], model: str) -> list[Row]:
    """The rows of a learner at its best rate, or of a reference."""
    own = select(rows, model=model)
    return own if own[0]["lr"] is None else at_best_rate(own)


def largest_rise(rows: list[Row]) -> float:
    """The largest ratio of the median curve to its own earlier minimum; 1: it falls monotonically."""
    curve = [median(values) for values in zip(*(row["errors"] for row in rows), strict=True)]
    return max(value / lowest for value, lowest in zip(curve, itertools.accumulate(curve, min), strict=True))


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By learner: its rate, quartiles of its last errors, samples to reach each error; rises at all rates."""
    models: dict[str, Any] = {}
    rises: dict[str, Any] = {}
    for model in distinct(rows, "model"):
        own = best(rows, model)
        models[model] = {
            "lr": own[0]["lr"],
            "error": quartiles(map(final_error, own)),
            **{key: quartiles(row[key] for row in own) for key in ("impulse_response_error", "mode_error")},
            "samples": {f"{error:g}": quartiles(reached(row, error) for row in own) for error in ERRORS},
        }
        if model not in REFERENCES:
            every = select(rows, model=model)
            rises[model] = {f"{lr:g}": largest_rise(select(every, lr=lr)) for lr in distinct(every, "lr")}
    return {"models": models, "largest_rise": rises}


def report(results: Results) -> str:
    """The verdict and two tables."""
    models, rises = results["summary"]["models"], results["summary"]["largest_rise"]
    most, lines = results["settings"]["samples"], []
    for model, of in models.items():
        name = [f"`{model}`", ""] if of["lr"] is None else [model, f"{of['lr']:g}"]
        medians = (of["samples"][f"{error:g}"][1] for error in ERRORS)  # None: not reached
        counts = (f"> {most:,}" if count is None else f"{count:,.0f}" for count in medians)
        low, middle, high = map(short, of["error"])
        found = (short(of[key][1]) for key in ("impulse_response_error", "mode_error"))
        lines.append([*name, *counts, f"{middle} ({low} … {high})", *found])
    header = ["", "rate", *(f"to {error:g}" for error in ERRORS), "final error", "impulse response", "modes"]
    steady = [
        [model, *(f"{short(final_at(results, model, lr))} ({short(rise)})" for lr, rise in of.items())]
        for model, of in rises.items()
    ]
    tables = markdown(header, lines), markdown(["rate", *next(iter(rises.values()))], steady)
    return "\n\n".join([verdict(results), *tables, provenance(results)])


def verdict(results: Results) -> str:
    """The claim of the paper against these numbers."""
    models, most = results["summary"]["models"], results["settings"]["samples"]
    sentences = []
    for error in ERRORS:
        by_stu, by_lru = (models[model]["samples"][f"{error:g}"][1] for model in ("STU", "LRU"))
        if by_stu is None:
            sentences.append(f"The STU does not reach an error of {error:g} within {most:,} sequences.")
            continue
        lru = f"; the LRU is not there after {most:,}" if by_lru is None else f" and the LRU {by_lru:,.0f}"
        factor = (most if by_lru is None else by_lru) / by_stu
        sentences.append(f"To {error:g} the STU takes {by_stu:,.0f} sequences{lru}, {factor:.3g} times as many.")
    return " ".join(sentences)


def final_at(results: Results, model: str, lr: str) -> float:
    """The median of the last errors at one rate."""
    return median(map(final_error, select(results["rows"], model=model, lr=float(lr))))


def draw(results: Results, figure: Any) -> None:
    """All learners at their best rates; STU and LRU at all rates."""
    from matplotlib import colormaps

    figure.set_size_inches(17, 5)
    together, *alone = figure.subplots(1, 3, sharey=True)
    together.set_prop_cycle(color=[colormaps["tab20"](index) for index in range(20)])
    for model in distinct(results["rows"], "model"):
        rows = best(results["rows"], model)
        style = {"label": model, "linestyle": "--" if rows[0]["lr"] is None else "-", "linewidth": 1.2}
        plot_band(together, rows[0]["samples"], [row["errors"] for row in rows], **style)
    for axis, model in zip(alone, ("STU", "LRU"), strict=True):
        own = select(results["rows"], model=model)
        for lr in distinct(own, "lr"):
            rows = select(own, lr=lr)
            plot_band(axis, rows[0]["samples"], [row["errors"] for row in rows], label=f"{lr:g}")
        axis.set_title(f"{model} at every rate")
    for axis in (together, *alone):
        axis.set(xscale="log", yscale="log", xlabel="sequences", ylim=(1e-6, 10))
        axis.grid(alpha=0.3)
    for axis in alone:
        axis.legend(fontsize="small", title="rate")
    figure.legend(*together.get_legend_handles_labels(), fontsize="small", loc="outside right center")
    together.set(title="each at its best rate", ylabel="mean squared error / variance")
