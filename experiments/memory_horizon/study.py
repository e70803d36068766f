"""How long a sequence may be: lengths double until a model, newly trained at each, no longer solves the task."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.shared.fit import Curve, fit
from experiments.shared.grid import Cell, Row, Settings, cross
from experiments.shared.plots import markdown, provenance
from experiments.shared.statistics import distinct, from_json, median, select
from experiments.shared.study import Results
from stu.backbone import SequenceModel
from stu.cli import composition
from stu.task import Batch, Task

SOLVED = 0.01  # largest error rate of a solved task, or mean squared error of adding
ENOUGH = 0.005  # validation error at which training ends, some distance below SOLVED
DECAY = 0.3  # share of the steps over which the learning rate falls to zero
HELD_OUT = {"val": 200, "test": 500}  # sequences
AT_ONCE = 100  # of them in one batch
TASKS: dict[str, dict[str, Any]] = {"copying": {"num_symbols": 5}, "adding": {}, "induction_heads": {"vocab_size": 8}}
COMMON = {"depth": 2, "norm": "layer"}
MODELS: dict[str, dict[str, Any]] = {  # about 15,000 parameters each
    "stu": {"d_model": 16, "mixer.num_filters": 12},
    "lru": {"d_model": 24, "mixer.d_state": 60},
    "s4d": {"d_model": 44, "mixer.d_state": 64},
    "s5": {"d_model": 25, "mixer.d_state": 128},
    "mamba2": {"d_model": 28, "mixer.d_state": 32, "mixer.num_heads": 2},
    "lstm": {"d_model": 26},
    "transformer": {"d_model": 24, "mixer.num_heads": 2},
}

SETTINGS: Settings = {
    "tasks": list(TASKS),
    "models": list(MODELS),
    "lengths": [16, 32, 64, 128, 256],
    "lrs": [0.004, 0.012],
    "seeds": 3,
    "steps": 500,
    "batch_size": 16,
}
QUICK: Settings = {
    "models": ["stu", "lstm"], "lengths": [16, 32], "lrs": [0.004], "seeds": 1, "steps": 4, "batch_size": 4
}  # fmt: skip


def cells(settings: Settings) -> list[Cell]:
    """One climb through the lengths per task, model and seed."""
    kept = ("lengths", "lrs", "steps", "batch_size")
    return cross(settings, kept, task=settings["tasks"], model=settings["models"])


class Attempt(NamedTuple):
    """The outcome of one training; the smallest is the one with the smallest validation error."""

    validation_error: float
    test_error: float
    lr: float
    sequences: int
    parameters: int


def work(cell: Cell) -> Row:
    """The best attempt at every length up to the first that is not solved."""
    climb: list[Attempt] = []
    for length in cell["lengths"]:
        climb.append(best_attempt(cell, length))
        if not climb[-1].test_error <= SOLVED:
            break
    return {field: [getattr(attempt, field) for attempt in climb] for field in Attempt._fields}


def best_attempt(cell: Cell, length: int) -> Attempt:
    """The attempt with the smallest validation error; once one is small enough, no other learning rate is tried."""
    attempts: list[Attempt] = []
    for lr in cell["lrs"]:
        attempts.append(attempt(cell, length, lr))
        if attempts[-1].validation_error <= SOLVED:
            break
    return min(attempts)


def attempt(cell: Cell, length: int, lr: float) -> Attempt:
    """Train a new model, and test it."""
    task, model, curve = trained(cell, length, lr)
    with torch.no_grad():
        test_error = error_on(task, "test", model.eval())
    return Attempt(curve.errors[-1], test_error, lr, curve.samples[-1], sum(p.numel() for p in model.parameters()))


def trained(cell: Cell, length: int, lr: float) -> tuple[Task, SequenceModel, Curve]:
    """A new model, trained on sequences of this length, none of which is used twice."""
    size = cell["batch_size"]
    task, model = build(cell["task"], cell["model"], length, train=cell["steps"] * size, seed=cell["seed"])
    curve = fit(
        model,
        lambda step: batch_of(task, "train", range(step * size, (step + 1) * size)),
        lambda module: error_on(task, "val", module),
        loss=lambda prediction, targets: task.loss(*scored(task, prediction, targets)),
        lr=lr,
        steps=cell["steps"],
        decay=DECAY,
        enough=ENOUGH,
    )
    return task, model, curve


def build(task: str, model: str, length: int, *, train: int, seed: int) -> tuple[Task, SequenceModel]:
    """A task and a new model, both drawn from the seed."""
    config = composed(task, model).copy()
    config.task.seq_len = length
    config.task.data.update(TASKS[task], train=train, seed=seed, **HELD_OUT)
    torch.manual_seed(seed)
    built: Task = composition.build(config.task)
    backbone = composition.build(config.model)
    return built, SequenceModel(built.encoder(backbone.d_model), backbone, built.head(backbone.d_model))


@cache
def composed(task: str, model: str) -> DictConfig:
    """What `train.py` would compose with the options of this study; must not be modified."""
    options = [f"model.{key}={value}" for key, value in (COMMON | MODELS[model]).items()]
    return composition.composed([f"task={task}", f"model={model}", *options])


def error_on(task: Task, split: str, model: nn.Module) -> float:
    """The error rate, or the mean squared error of adding."""
    metric = task.metrics()[task.monitor]
    for first in range(0, HELD_OUT[split], AT_ONCE):
        inputs, targets = batch_of(task, split, range(first, first + AT_ONCE))
        metric.update(*scored(task, model(inputs), targets))
    value = float(metric.compute())
    return 1 - value if task.mode == "max" else value


def batch_of(task: Task, split: str, indices: range) -> tuple[Tensor, Tensor]:
    """Inputs and targets of these sequences."""
    examples: Any = getattr(task.datasets(), split)
    inputs, targets = examples.stacked(indices)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def scored(task: Task, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions and targets that are scored; none of these tasks needs the inputs for that."""
    return task.scored(prediction, Batch(prediction, targets, None))


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Task → model → the horizons of all seeds, their median, and parameters."""
    tasks, models = distinct(rows, "task"), distinct(rows, "model")
    return {task: {model: _summary(select(rows, task=task, model=model)) for model in models} for task in tasks}


def _summary(rows: list[Row]) -> dict[str, Any]:
    horizons = sorted(map(horizon, rows))
    return {"median": median(horizons), "horizons": horizons, "parameters": rows[0]["parameters"][0]}


def horizon(row: Row) -> int:
    """The longest length solved, 0 if there is none."""
    solved = sum(from_json(error) <= SOLVED for error in row["test_error"])
    return row["lengths"][solved - 1] if solved else 0


def report(results: Results) -> str:
    """A table of horizons, and its provenance."""
    summary, settings = results["summary"], results["settings"]
    lines = []
    for model in settings["models"]:
        horizons = (_shown(found[model], settings["lengths"]) for found in summary.values())
        sizes = [found[model]["parameters"] for found in summary.values()]
        lines.append([f"`{model}`", *horizons, f"{min(sizes):,} to {max(sizes):,}"])
    header = ["", *(task.replace("_", " ") for task in summary), "parameters"]
    return f"{markdown(header, lines)}\n\n{provenance(results)}"


def _shown(found: Mapping[str, Any], lengths: list[int]) -> str:
    """The median, and all seeds where they differ."""

    def text(length: float) -> str:
        return f"< {lengths[0]}" if not length else f"≥ {length:g}" if length == lengths[-1] else f"{length:g}"

    spread = f" ({', '.join(map(text, found['horizons']))})" if len(set(found["horizons"])) > 1 else ""
    return f"{text(found['median'])}{spread}"


def draw(results: Results, figure: Any) -> None:
    """The horizons of each task: a bar to the median and one dot per seed."""
    summary, settings = results["summary"], results["settings"]
    models, lengths = settings["models"], settings["lengths"]
    nothing = lengths[0] / 2  # the position of a model that solves no length
    figure.set_size_inches(3.8 * len(summary), 0.35 * len(models) + 1.3)
    axes = figure.subplots(1, len(summary), sharey=True, squeeze=False)[0]
    for axis, (task, found) in zip(axes, summary.items(), strict=True):
        for place, model in enumerate(models):
            seeds = [max(length, nothing) for length in found[model]["horizons"]]
            length = max(found[model]["median"], nothing) - 0.8 * nothing
            axis.barh(place, length, left=0.8 * nothing, height=0.7, alpha=0.5)
            axis.plot(seeds, [place + 0.2 * (i - (len(seeds) - 1) / 2) for i in range(len(seeds))], "k.", markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks([nothing, *lengths], ["none", *map(str, lengths)])
        axis.set(title=task.replace("_", " "), xlabel="longest length solved", xlim=(0.8 * nothing, 1.25 * lengths[-1]))
    axes[0].set_yticks(range(len(models)), models)
    axes[0].invert_yaxis()
