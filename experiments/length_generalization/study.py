"""Trained at length L, tested at 2L, 4L and 8L: systems of long memory, and induction heads."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.memory_horizon.study import error_on, trained
from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.learners import LEARNERS, SMALL, Learner, Problem, between, error, learn, stu
from experiments.shared.plots import markdown, plot_quartiles, provenance, short
from experiments.shared.statistics import at_best_rate, distinct, quartiles, select
from experiments.shared.study import Results
from stu.mixer import Mixer
from stu.mixers.mamba2 import Mamba2
from stu.mixers.stu_t import STUT
from stu.ops.bank import EXTENSIONS

MOST = 8  # the longest test, in lengths of training
AHEAD, WHOLE = f"STU, filters for {MOST}L", f"STU, trained at {MOST}L"
SYSTEMS: Mapping[str, Learner] = {
    "STU": LEARNERS["STU"],
    AHEAD: lambda seq_len, num_filters: stu(MOST * seq_len, num_filters),  # 2411.01035: only the inputs are cut
    WHOLE: LEARNERS["STU"],  # for comparison
    "STU-T": lambda seq_len, num_filters: between(8, STUT(8, seq_len=seq_len, num_filters=num_filters)),
    **{name: LEARNERS[name] for name in ("LRU", "S4D", "S5")},
    "Mamba-2": lambda *_: between(6, Mamba2(6, d_state=8, num_heads=4)),
    "Transformer": LEARNERS["Transformer"],
}
INDUCTION = {"STU": "stu", "LRU": "lru", "S4D": "s4d", "S5": "s5", "Mamba-2": "mamba2", "Transformer": "transformer"}
TASK = "induction_heads"

SETTINGS: Settings = {
    "models": list(SYSTEMS),
    "deltas": [1e-2, 1e-3],
    "lrs": [0.02, 0.3],
    "seeds": 2,
    "seq_len": 256,
    "num_filters": 24,
    "spectrum": "signs",
    "samples": 200,
    "evaluated": 8,
    "tested": 32,
    "induction": {"models": list(INDUCTION), "lrs": [0.006], "seeds": 2, "seq_len": 16, "steps": 500},
    "batch_size": 16,
}
QUICK: Settings = {
    **SMALL, "models": ["STU", "STU-T", "LRU"], "deltas": [1e-2, 1e-3], "num_filters": 4, "batch_size": 4,
    "tested": 4, "induction": {"models": ["STU", "LRU"], "lrs": [0.004], "seeds": 1, "seq_len": 16, "steps": 4},
}  # fmt: skip


def cells(settings: Settings) -> list[Cell]:
    """Every learner of every system at every rate, and every model of induction heads, with every seed."""
    kept = ("seq_len", "num_filters", "spectrum", "samples", "evaluated", "tested")
    systems = cross(settings, kept, model=settings["models"], delta=settings["deltas"], lr=settings["lrs"])
    induction = settings["induction"]
    options = {**induction, "batch_size": settings["batch_size"]}
    heads = cross(options, ("seq_len", "steps", "batch_size"), model=induction["models"], lr=induction["lrs"])
    return [{**cell, "task": "lds"} for cell in systems] + [{**cell, "task": TASK} for cell in heads]


def work(cell: Cell) -> Row:
    """By extension, the errors at L, 2L, 4L and 8L of a module trained at L; the last validation error."""
    return on_system(cell) if cell["task"] == "lds" else on_induction_heads(cell)


def lengths_of(cell: Cell) -> list[int]:
    """L, 2L, 4L and 8L."""
    return [cell["seq_len"] << double for double in range(MOST.bit_length())]


def on_system(cell: Cell) -> Row:
    """Squared errors relative to the power of the outputs at that length: 1 is that of zero."""
    factor = MOST if cell["model"] == WHOLE else 1
    module, problem, row = learn({**cell, "seq_len": factor * cell["seq_len"]}, SYSTEMS[cell["model"]])
    tests = {length: test_set(problem, length, cell["tested"]) for length in lengths_of(cell)}
    power = {length: float(targets.square().mean()) for length, (_, targets) in tests.items()}
    return {"val": row["val"], "errors": by_extension(module, cell, lambda n: error(module, tests[n]) / power[n])}


def test_set(problem: Problem, length: int, count: int) -> tuple[torch.Tensor, ...]:
    """Inputs and targets of another length, of the same system in the same unit."""
    data = replace(problem.data.at_length(length), test=count)
    return tuple(map(torch.from_numpy, data.examples("test").stacked(range(count))))


def on_induction_heads(cell: Cell) -> Row:
    """The shares of wrong answers."""
    name = {"task": TASK, "model": INDUCTION[cell["model"]]}
    task, model, curve = trained({**cell, **name}, cell["seq_len"], cell["lr"])
    errors = by_extension(model.eval(), cell, lambda n: error_on(task.at_length(n), "test", model))
    return {"val": curve.errors[-1], "errors": errors}


@torch.no_grad()
def by_extension(module: nn.Module, cell: Cell, measure: Callable[[int], float]) -> dict[str, list[float]]:
    """How filters are made longer, or "" where there are none of one length → `measure` of each length."""
    mixers = [part for part in module.modules() if isinstance(part, Mixer)]
    bounded = any(getattr(mixer, "seq_len", max(lengths_of(cell))) < max(lengths_of(cell)) for mixer in mixers)
    found: dict[str, list[float]] = {}
    for extension in EXTENSIONS if bounded else ("",):
        found[extension] = []
        for length in lengths_of(cell):
            with resized(mixers, length, extension):
                found[extension].append(measure(length))
    return found


@contextmanager
def resized(mixers: list[Mixer], length: int, extension: str) -> Iterator[None]:
    """Inside, all mixers take this length."""
    with ExitStack() as stack:
        for mixer in mixers:
            if extension:
                setattr(mixer, "extension", extension)  # noqa: B010  # which some mixers have
            stack.enter_context(mixer.resized(length))
        yield


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Task and gap → model, with how its filters are made longer → quartiles of the errors at L, 2L, 4L and 8L."""
    return {
        name: dict(_summary(select(rows, **wanted)))
        for name, wanted in {
            **{
                f"δ = {delta:g}": {"task": "lds", "delta": delta}
                for delta in distinct(select(rows, task="lds"), "delta")
            },
            TASK.replace("_", " "): {"task": TASK},
        }.items()
    }


def _summary(rows: list[Row]) -> Iterator[tuple[str, dict[str, Any]]]:
    for model in distinct(rows, "model"):
        best = at_best_rate(select(rows, model=model))
        for extension in best[0]["errors"]:
            columns = zip(*(row["errors"][extension] for row in best), strict=True)
            name = f"{model}, {extension}" if extension else model
            yield name, {"lr": best[0]["lr"], "error": [quartiles(column) for column in columns]}


def report(results: Results) -> str:
    """Medians at L, 2L and 8L."""
    summary, places = results["summary"], (0, 1, MOST.bit_length() - 1)
    header = [""]
    for name in summary:
        header += [f"{name}: L", *(f"{1 << place}L" for place in places[1:])]
    names = dict.fromkeys(name for of_task in summary.values() for name in of_task)
    lines = []
    for name in names:
        found = [of_task.get(name) for of_task in summary.values()]
        lines.append([name, *(short(one["error"][at][1]) if one else "" for one in found for at in places)])
    return f"{markdown(header, lines)}\n\n{provenance(results)}"


def draw(results: Results, figure: Any) -> None:
    """Medians and quartiles against the length, for each gap, and for induction heads."""
    summary = results["summary"]
    names = list(dict.fromkeys(name for of_task in summary.values() for name in of_task))
    figure.set_size_inches(3.4 * len(summary), 5.5)
    axes = figure.subplots(1, len(summary), squeeze=False)[0]
    styles = dict(zip(names, itertools.product(("-", "--"), "os^vDP<>"), strict=False))
    for axis, (title, found) in zip(axes, summary.items(), strict=True):
        for name, of in found.items():
            line, marker = styles[name]
            color = f"C{names.index(name) % 10}"
            multiples = [1 << place for place in range(len(of["error"]))]
            style = {"color": color, "linestyle": line, "marker": marker, "markersize": 4, "label": name}
            plot_quartiles(axis, multiples, of["error"], **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(multiples, [f"{multiple}L" if multiple > 1 else "L" for multiple in multiples])
        shares = title == TASK.replace("_", " ")
        axis.set(title=title, xlabel="length of the test", ylabel="wrong answers" if shares else "error / power")
        if not shares:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=5)
