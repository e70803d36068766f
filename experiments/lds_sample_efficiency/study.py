"""Figure 3(a) of the STU paper (2312.06837): test errors against the sequences seen, for every learner and rate."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.identification import StateSpace, fit_arx, fit_fir, ho_kalman, impulse_response_error, mode_error, respond
from experiments import study
from experiments.learners import LEARNERS, Problem, impulse_response, learn
from experiments.study import (
    Cell,
    Results,
    Row,
    Study,
    best,
    distinct,
    final,
    median,
    quartiles,
    reached,
    select,
    short,
)

ERRORS = (0.1, 0.01, 0.001)  # to be reached
MODES_FROM = 64  # steps of an impulse response from which its modes are found

Response = np.ndarray  # (L, O, C), over all steps of a sequence


def fir(inputs: np.ndarray, targets: np.ndarray, order: int) -> Response:
    """Least squares on as many input lags as give the parameters of the STU."""
    return fit_fir(inputs, targets, lags=min(53, inputs.shape[1]))


def arx(inputs: np.ndarray, targets: np.ndarray, order: int) -> Response:
    """Least squares on two output lags and three input lags, run freely: it never sees the outputs it is tested on."""
    return fit_arx(inputs, targets, output_lags=2, input_lags=3).impulse_response(inputs.shape[1])


def subspace(inputs: np.ndarray, targets: np.ndarray, order: int) -> Response:
    """Ho–Kalman on an impulse response found from the first 16 steps of each sequence."""
    start = fit_fir(inputs[:, :16], targets[:, :16], lags=16)
    return ho_kalman(start, order).impulse_response(inputs.shape[1])


REFERENCES: Mapping[str, Callable[[np.ndarray, np.ndarray, int], Response]] = {
    "least squares, FIR": fir,
    "least squares, ARX": arx,
    "Ho–Kalman": subspace,
}


def cells(settings: Mapping[str, Any]) -> list[Cell]:
    """Every learner at every rate, and every reference, with every seed."""
    common = {key: settings[key] for key in ("seq_len", "num_filters", "delta", "spectrum", "samples", "evaluated")}
    learned = itertools.product(settings["models"], settings["lrs"])
    given = ((model, None) for model in REFERENCES)
    return [
        {"model": model, "lr": lr, "seed": seed, **common}
        for model, lr in (*learned, *given)
        for seed in range(settings["seeds"])
    ]


def work(cell: Cell) -> Row:
    """The curve of a cell, and how near it came to the system itself."""
    if cell["model"] in LEARNERS:
        module, problem, result = learn(cell)
        return {**result, **identified(impulse_response(module, cell["seq_len"]), problem)}
    problem = Problem.of(cell)
    counts = [2**n for n in range(10) if 2**n <= min(64, cell["samples"])]
    inputs, targets = problem.arrays("train", counts[-1])
    order = len(problem.data.system.A)
    responses = [REFERENCES[cell["model"]](inputs[:count], targets[:count], order) for count in counts]
    errors = [squared_error(response, problem.arrays("test")) for response in responses]
    return {"samples": counts, "errors": errors, **identified(responses[-1], problem)}


def squared_error(response: Response, sequences: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean squared error of what it predicts."""
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


def validated(row: Row) -> float | None:
    """What rates are chosen by."""
    value: float | None = row["val"]
    return value


def chosen(rows: list[Row], model: str) -> list[Row]:
    """The rows of a learner at its best rate, or of a reference."""
    own = select(rows, model=model)
    return own if own[0]["lr"] is None else select(own, lr=best(own, "lr", validated))


def largest_rise(rows: list[Row]) -> float:
    """The most by which the median curve ever stands above its own past, as a factor; 1: it falls monotonically."""
    curve = [median(values) for values in zip(*(row["errors"] for row in rows), strict=True)]
    return max(value / lowest for value, lowest in zip(curve, itertools.accumulate(curve, min), strict=True))


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By learner: its rate, quartiles of its last errors, samples to reach each error; STU's curves at all rates."""
    by_model = {}
    for model in distinct(rows, "model"):
        own = chosen(rows, model)
        by_model[model] = {
            "lr": own[0]["lr"],
            "error": quartiles(map(final, own)),
            **{key: quartiles(row[key] for row in own) for key in ("impulse_response_error", "mode_error")},
            "samples": {f"{error:g}": quartiles(reached(row, error) for row in own) for error in ERRORS},
        }
    rises = {
        model: {f"{lr:g}": largest_rise(select(own, lr=lr)) for lr in distinct(own, "lr")}
        for model in distinct(rows, "model")
        if (own := select(rows, model=model))[0]["lr"] is not None
    }
    return {"models": by_model, "largest_rise": rises}


def report(results: Results) -> str:
    """The verdict and two tables."""
    models, rises = results["summary"]["models"], results["summary"]["largest_rise"]
    lines = [
        [
            f"`{model}`" if of["lr"] is None else model,
            "" if of["lr"] is None else f"{of['lr']:g}",
            *(samples(of["samples"][f"{error:g}"][1], results) for error in ERRORS),
            spread(of["error"]),
            short(of["impulse_response_error"][1]),
            short(of["mode_error"][1]),
        ]
        for model, of in models.items()
    ]
    header = ["", "rate", *(f"to {error:g}" for error in ERRORS), "final error", "impulse response", "modes"]
    steady = [
        [model, *(f"{short(final_at(results, model, lr))} ({short(rise)})" for lr, rise in of.items())]
        for model, of in rises.items()
    ]
    parts = [verdict(results), study.markdown(header, lines)]
    parts.append(study.markdown(["rate", *next(iter(rises.values()))], steady))
    return "\n\n".join([*parts, study.made_with(results)])


def verdict(results: Results) -> str:
    """The claim of the paper against these numbers."""
    models, most = results["summary"]["models"], results["settings"]["samples"]
    sentences = []
    for error in ERRORS:
        by_stu, by_lru = (models[model]["samples"][f"{error:g}"][1] for model in ("STU", "LRU"))
        if by_stu is None:
            sentences.append(f"The STU does not reach an error of {error:g} within {most:,} sequences.")
        elif by_lru is None:
            sentences.append(
                f"To {error:g} the STU takes {by_stu:,.0f} sequences; the LRU is not there after {most:,}, "
                f"{most / by_stu:.3g} times as many."
            )
        else:
            sentences.append(
                f"To {error:g} the STU takes {by_stu:,.0f} sequences and the LRU {by_lru:,.0f}, "
                f"{by_lru / by_stu:.3g} times as many."
            )
    return " ".join(sentences)


def final_at(results: Results, model: str, lr: str) -> float:
    """The median of the last errors at one rate."""
    return median(final(row) for row in select(results["rows"], model=model, lr=float(lr)))


def samples(count: float | None, results: Results) -> str:
    """A number of sequences; more than there were, where it was not reached."""
    return f"{count:,.0f}" if count is not None else f"> {results['settings']['samples']:,}"


def spread(values: list[float | None]) -> str:
    """A median with its quartiles."""
    low, middle, high = values
    return f"{short(middle)} ({short(low)} … {short(high)})"


def draw(results: Results, figure: Any) -> None:
    """All at their best rates; STU and LRU at all rates."""
    from matplotlib import colormaps

    figure.set_size_inches(17, 5)
    together, *alone = figure.subplots(1, 3, sharey=True)
    together.set_prop_cycle(color=[colormaps["tab20"](index) for index in range(20)])
    for model in distinct(results["rows"], "model"):
        rows = chosen(results["rows"], model)
        style = "--" if rows[0]["lr"] is None else "-"
        study.band(
            together, rows[0]["samples"], [row["errors"] for row in rows], label=model, linestyle=style, linewidth=1.2
        )
    together.set_title("each at its best rate")
    for axis, model in zip(alone, ("STU", "LRU"), strict=True):
        own = select(results["rows"], model=model)
        for lr in distinct(own, "lr"):
            rows = select(own, lr=lr)
            study.band(axis, rows[0]["samples"], [row["errors"] for row in rows], label=f"{lr:g}")
        axis.set_title(f"{model} at every rate")
    for axis in (together, *alone):
        axis.set(xscale="log", yscale="log", xlabel="sequences", ylim=(1e-6, 10))
        axis.grid(alpha=0.3)
    for axis in alone:
        axis.legend(fontsize="small", title="rate")
    figure.legend(*together.get_legend_handles_labels(), fontsize="small", loc="outside right center")
    together.set_ylabel("mean squared error / variance")


STUDY = Study(
    folder=Path(__file__).parent,
    cells=cells,
    work=work,
    summarize=summarize,
    report=report,
    draw=draw,
    settings={
        "models": [model for model in LEARNERS if model != "Transformer"],
        "lrs": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        "seeds": 5,
        "seq_len": 256,
        "num_filters": 25,
        "delta": 1e-4,
        "spectrum": "signs",
        "samples": 1000,
        "evaluated": 32,
    },
    quick={
        "models": ["STU", "LRU"],
        "lrs": [1e-2, 1e-1],
        "seeds": 2,
        "seq_len": 32,
        "num_filters": 4,
        "samples": 30,
        "evaluated": 4,
    },
)
