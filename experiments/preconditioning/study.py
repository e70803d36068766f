"""Universal sequence preconditioning (2502.06545): by polynomial, degree and spectrum, beside learned coefficients."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.systems.identification import lagged, least_squares
from experiments.shared.fit import fit
from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.learners import LEARNERS, SMALL, WIDTH, Problem, between, error
from experiments.shared.plots import markdown, plot_quartiles, provenance, short
from experiments.shared.statistics import at_best_rate, final_error, quartiles, select
from experiments.shared.study import Results
from stu.mixers.rnn import RNN
from stu.preconditioning import Preconditioner

SPECTRA: Mapping[str, dict[str, Any]] = {  # the angles of the complex ones up to π/32, and any
    "real": {"spectrum": "uniform"},
    "near real": {"spectrum": "complex", "sector": 1 / 32},
    "complex": {"spectrum": "complex"},
}
LEAST = "least squares"  # on the latest inputs
LAGS = 24  # of least squares
VARIANTS = {
    "none": 0,
    **{f"chebyshev {n}": n for n in (2, 5, 10, 20)},
    **{f"legendre {n}": n for n in (2, 5, 10)},
    "learned 5": 5,
    "given 5": 5,
}

SETTINGS: Settings = {
    "models": [LEAST, "STU", "LRU", "LSTM"],
    "spectra": list(SPECTRA),
    "variants": list(VARIANTS),
    "trained": ["none", "chebyshev 2", "chebyshev 5", "chebyshev 10", "legendre 5", "learned 5", "given 5"],
    "seeds": 3,
    "seq_len": 128,
    "num_filters": 12,
    "d_state": 64,
    "delta": 1e-3,
    "noise": 0.01,
    "lrs": [0.01, 0.03],
    "samples": 150,
    "evaluated": 16,
}
QUICK: Settings = {
    **SMALL, "models": [LEAST, "STU"], "spectra": ["real"], "variants": ["none", "chebyshev 2", "learned 5", "given 5"],
    "trained": ["none", "learned 5", "given 5"], "num_filters": 4, "d_state": 4,
}  # fmt: skip


def cells(settings: Settings) -> list[Cell]:
    """Every model on every kind of target, at every rate; least squares have none."""
    kept = ("seq_len", "num_filters", "d_state", "delta", "noise", "samples", "evaluated")
    kinds, trained = settings["spectra"], settings["trained"]
    exact = cross(settings, kept, model=[LEAST], kind=kinds, variant=settings["variants"], lr=[0])
    models = settings["models"][1:]
    return exact + cross(settings, kept, model=models, kind=kinds, variant=trained, lr=settings["lrs"])


class Past(nn.Module):
    """Σ_i c_i y_{t−i} of outputs (B, L, O): c_i fixed, learned or none, or learned matrices ("given")."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        name, _, degree = variant.partition(" ")
        fixed = name in ("chebyshev", "legendre")
        self.fixed = Preconditioner(name, int(degree)) if fixed else None  # type: ignore[arg-type]
        shape = {"learned": (VARIANTS[variant],), "given": (VARIANTS[variant], WIDTH, WIDTH)}.get(name)
        self.learned = nn.Parameter(torch.zeros(shape)) if shape else None

    def forward(self, outputs: Tensor) -> Tensor:
        """(B, L, O) → (B, L, O), of the outputs before alone."""
        if self.learned is None:
            return torch.zeros_like(outputs) if self.fixed is None else self.fixed.past(outputs)
        count = len(self.learned)
        before = F.pad(outputs, (0, 0, count, 0)).unfold(1, count, 1)[:, :-1].flip(-1)  # (B, L, O, n), the latest first
        return torch.einsum("blon,n->blo" if self.learned.ndim == 1 else "blin,nio->blo", before, self.learned)


class WithPast(nn.Module):
    """A model of inputs, and the outputs before: (B, L, C + O) → (B, L, O)."""

    def __init__(self, model: nn.Module, past: Past) -> None:
        super().__init__()
        self.model, self.past = model, past

    def forward(self, x: Tensor) -> Tensor:
        """Inputs with the outputs of the same steps, which only later steps use."""
        inputs, outputs = x.split(WIDTH, 2)
        return self.model(inputs) - self.past(outputs)


def together(sequences: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Inputs (B, L, C) and outputs as what `WithPast` reads, and the outputs."""
    inputs, outputs = sequences
    return torch.cat((inputs, outputs), 2), outputs


def work(cell: Cell) -> Row:
    """The curve of a trained model, or the error of least squares."""
    problem = Problem({**cell, **SPECTRA[cell["kind"]]})
    torch.manual_seed(cell["seed"])
    past = Past(cell["variant"])
    if cell["model"] == LEAST:
        return regression(problem, past, cell["variant"])
    make = {**LEARNERS, "LSTM": lambda *_: between(8, RNN(8, cell="lstm", d_state=8))}[cell["model"]]
    module = WithPast(make(cell["seq_len"], cell["num_filters"]), past)
    val, test = together(problem.val), together(problem.test)
    steps = len(problem.splits.train)
    curve = fit(
        module, lambda i: together(problem.sample(i)), lambda m: error(m, test), lr=cell["lr"], steps=steps, decay=0.5
    )
    with torch.no_grad():
        return {**curve._asdict(), "val": error(module, val)}


def regression(problem: Problem, past: Past, variant: str) -> Row:
    """Least squares of ỹ on the latest inputs; where coefficients would be learned, of y on the outputs before, too."""
    inputs, outputs = problem.arrays("train")
    tested, truth = (x.double().numpy() for x in problem.test)
    known = VARIANTS[variant] if past.learned is not None else 0

    def regressors(u: np.ndarray, y: np.ndarray) -> np.ndarray:
        parts = [lagged(u, LAGS).reshape(*u.shape[:2], -1)]
        if known:
            parts.append(lagged(np.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :-1], known).reshape(*y.shape[:2], -1))
        return np.concatenate(parts, 2)

    def before(y: np.ndarray) -> np.ndarray:
        return np.zeros_like(y) if past.fixed is None else past.fixed.past(torch.from_numpy(y)).numpy()

    solution = least_squares(regressors(inputs, outputs), outputs + before(outputs.astype(np.float64)))
    prediction = regressors(tested, truth) @ solution - before(truth)
    return {"samples": [len(outputs)], "errors": [float(np.square(prediction - truth).mean())], "val": 0.0}


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By spectrum, model and kind of target: the best rate by validation, quartiles of the last test errors."""
    summary: dict[str, Any] = {}
    for kind, model, variant in dict.fromkeys((row["kind"], row["model"], row["variant"]) for row in rows):
        best = at_best_rate(select(rows, kind=kind, model=model, variant=variant))
        found = {"lr": best[0]["lr"], "error": quartiles(map(final_error, best))}
        summary.setdefault(kind, {}).setdefault(model, {})[variant] = found
    return summary


def report(results: Results) -> str:
    """Medians of the last errors."""
    settings, summary = results["settings"], results["summary"]
    columns = list(itertools.product(settings["spectra"], settings["models"]))
    header = ["targets", *(f"{kind}: {model}" for kind, model in columns)]
    lines = [
        [
            variant,
            *(short(of["error"][1]) if (of := summary[kind][model].get(variant)) else "" for kind, model in columns),
        ]
        for variant in settings["variants"]
    ]
    return f"{markdown(header, lines)}\n\n{provenance(results)}"


def draw(results: Results, figure: Any) -> None:
    """Errors against the degree, by spectrum, and beside them those of the learned coefficients and matrices."""
    settings, summary = results["settings"], results["summary"]
    figure.set_size_inches(4.5 * len(settings["spectra"]), 4.2)
    axes = figure.subplots(1, len(settings["spectra"]), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, settings["spectra"], strict=True):
        for number, model in enumerate(settings["models"]):
            of, style = summary[kind][model], {"color": f"C{number}"}
            fixed = [name for name in of if name == "none" or name.startswith("chebyshev")]
            degrees = [VARIANTS[name] for name in fixed]
            plot_quartiles(axis, degrees, [of[name]["error"] for name in fixed], marker="o", label=model, **style)
            for name, marker in (("learned 5", "x"), ("given 5", "^")):
                axis.plot([VARIANTS[name]], [of[name]["error"][1]], marker, label=f"{model}, {name}", **style)
        axis.axhline(settings["noise"] ** 2, color="0.6", linewidth=1)
        axis.set(yscale="log", xlabel="degree of the Chebyshev polynomial", title=f"{kind} eigenvalues")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean squared error / variance")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside right center")
