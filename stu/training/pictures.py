"""Pictures of what a model has learned: predictions beside the truth, impulse responses and filters, as PNG.

n sequences, L length, C inputs, O outputs, K filters

They are drawn with matplotlib, the extra `plot`; a run without it says so and goes on. What a picture shows, and so
what it costs, does not grow with the task.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from stu.backbone import SequenceModel
from stu.errors import require
from stu.rollout import FreeRunning, free_run
from stu.task import Batch, Examples, KnowsImpulseResponse, Task
from stu.training import report
from stu.training.callbacks import Checkpoints
from stu.training.data import SequenceData
from stu.training.loggers import log_picture
from stu.training.module import SequenceModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

When = Literal["never", "end", "validations"]
Sequences = list[np.ndarray]  # (L, O) each

SEQUENCES = 8  # at most
INPUTS = OUTPUTS = 3  # the first, of which there may be many
STEPS = 200  # the last of a sequence, or the first of a free run
LAGS = 2048  # of an impulse response
BANKS, CURVES = 3, 8  # different banks of filters, and the filters of each that are drawn as curves
POINTS = 400  # lags at which filters are looked at


class Filters(Protocol):
    """Impulse responses that are no parameters."""

    @property
    def filters(self) -> Tensor:
        """(L, K), a filter a column."""


@runtime_checkable
class HasFilters(Protocol):
    """A module, such as a mixer, whose filters can be drawn."""

    @property
    def bank(self) -> Filters:
        """What it convolves with."""


class Pictures(Callback):
    """Writes `<name>-step<step>.png` into `directory` and shows it in Weights & Biases.

    when: "end", of the best weights, behind the test; "validations", also of the weights of each; or "never".
    sequences: how many of them predictions are drawn for.

    predictions: of tasks with real targets at every step. free-run: of tasks that have such. impulse-response: of
    tasks that know the true one. filters: of models whose modules have some. What cannot be drawn costs a line, never
    the run.
    """

    def __init__(self, directory: Path, *, when: When = "end", sequences: int = 3) -> None:
        require(when in get_args(When), "when", when, f"must be one of {', '.join(get_args(When))}")
        require(1 <= sequences <= SEQUENCES, "sequences", sequences, f"must be 1 to {SEQUENCES}")
        self.directory, self.when, self.sequences = directory, when, sequences

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what will be missing where matplotlib is."""
        if self.when == "never" or find_spec("matplotlib") is not None:
            return
        if names := ", ".join(self._drawings(trainer, pl_module, "test")):
            report.note(f"no pictures of {names}: matplotlib is not installed; pip install matplotlib")
        self.when = "never"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the weights as they are, if that was asked for."""
        if self.when == "validations" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val", trainer.global_step)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the best weights."""
        if self.when != "never":
            assert isinstance(trainer.checkpoint_callback, Checkpoints)
            self._draw(trainer, pl_module, "test", trainer.checkpoint_callback.best_step)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, split: str, step: int) -> None:
        for name, draw in self._drawings(trainer, module, split).items():
            try:
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    figure = draw()  # on all devices, for some strategies share the model out over them
                if trainer.is_global_zero:
                    figure.suptitle(f"{name}, step {step:,}", fontsize="medium")
                    file = self.directory / f"{name}-step{step:07d}.png"
                    save(figure, file)
                    for logger in trainer.loggers:
                        log_picture(logger, f"pictures/{name}", file, step)
            except Exception as error:  # a run must not die of its pictures
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                report.note(f"no picture of {name} at step {step}: {reason}")

    def _drawings(
        self, trainer: L.Trainer, module: L.LightningModule, split: str
    ) -> Mapping[str, "Callable[[], Figure]"]:
        """Name → how it is drawn, of all that there is to draw."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SequenceData)
        assert isinstance(module, SequenceModule)
        model, task, examples = module.model, module.task, getattr(data.splits, split)
        found: dict[str, Callable[[], Figure]] = {}
        if has_trajectories(examples):
            found[f"predictions-{split}"] = lambda: trajectories(*predictions(model, task, examples, self.sequences))
        if isinstance(task, FreeRunning):
            found[f"free-run-{split}"] = lambda: trajectories(*free_runs(model, task, examples, self.sequences))
        if isinstance(task, KnowsImpulseResponse):
            found["impulse-response"] = lambda: impulse_responses(*responses(model, task))
        if any(isinstance(part, HasFilters) for part in model.modules()):
            found["filters"] = lambda: filters(filter_banks(model))
        return found


def has_trajectories(examples: Examples) -> bool:
    """Whether the targets are reals at every step."""
    target = np.asarray(examples[0][1])
    return target.ndim == 2 and np.issubdtype(target.dtype, np.floating)


def predictions(model: SequenceModel, task: Task, examples: Examples, count: int) -> tuple[Sequences, Sequences]:
    """Targets and predictions of the first `count` examples, without padding."""
    batch = _batch(model, task, examples, count)
    predicted = model(batch.inputs, batch.mask)
    if batch.mask is None:
        return _sequences(batch.targets), _sequences(predicted)
    return (
        _sequences(t[m] for t, m in zip(batch.targets, batch.mask, strict=True)),
        _sequences(p[m] for p, m in zip(predicted, batch.mask, strict=True)),
    )


def free_runs(model: SequenceModel, task: Task, examples: Examples, count: int) -> tuple[Sequences, Sequences]:
    """Targets and predictions of the first steps of free runs, of the first `count` examples."""
    assert isinstance(task, FreeRunning)
    batch = _batch(model, task, examples, count)
    predicted, targets = free_run(model, batch, context=task.context, horizon=min(task.horizon, STEPS))
    return _sequences(targets), _sequences(predicted)


def responses(model: SequenceModel, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The true impulse response and the model's, (L, O, C) each, of the first inputs."""
    assert isinstance(task, KnowsImpulseResponse)
    truth = task.impulse_response(min(task.seq_len, LAGS))
    return truth[..., :INPUTS], impulse_response(model, len(truth), truth.shape[2])


def impulse_response(model: nn.Module, length: int, d_input: int) -> np.ndarray:
    """What a unit impulse at each of the first inputs adds to the outputs for zero inputs, (length, O, C).

    The whole of a linear model; of another one, how it answers to this one input.
    """
    drawn = min(d_input, INPUTS)
    inputs = torch.zeros(drawn + 1, length, d_input)
    inputs[range(drawn), 0, range(drawn)] = 1
    outputs = _array(model(_like(model, inputs), None))  # (C + 1, L, O)
    return (outputs[:-1] - outputs[-1]).transpose(1, 2, 0)


def _batch(model: nn.Module, task: Task, examples: Examples, count: int) -> Batch:
    """The first `count` examples, or all of fewer."""
    inputs, targets, mask = task.collate([examples[index] for index in range(min(count, len(examples)))])
    return Batch(_like(model, inputs), _like(model, targets), None if mask is None else _like(model, mask))


def _like(model: nn.Module, x: Tensor) -> Tensor:
    """On the device of the model's parameters and, if real, of their dtype."""
    parameter = next(model.parameters(), x)
    return x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)


def _sequences(batch: Iterable[Tensor]) -> Sequences:
    return [_array(x) for x in batch]


def _array(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()


def filter_banks(model: nn.Module) -> list[Tensor]:
    """The different banks of filters of a model's modules, (L, K) each; blocks often have the same."""
    banks: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, HasFilters) and not any(torch.equal(module.bank.filters, bank) for bank in banks):
            banks.append(module.bank.filters)
    return banks


def save(figure: "Figure", file: Path) -> None:
    """Write a PNG whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.tmp")
    figure.savefig(fresh, format="png", dpi=100)
    fresh.replace(file)


def trajectories(targets: Sequence[np.ndarray], predicted: Sequence[np.ndarray]) -> "Figure":
    """Targets and predictions (L, O) of some sequences over their last steps, a row of axes for each output."""
    rows = min(targets[0].shape[1], OUTPUTS)
    figure, axes = _axes(rows, len(targets), sharex="col", sharey="row")
    for column, (target, prediction) in enumerate(zip(targets, predicted, strict=True)):
        steps = np.arange(max(0, len(target) - STEPS), len(target))
        for output, axis in enumerate(axes[:, column]):
            axis.plot(steps, target[steps, output], linewidth=3, alpha=0.4, label="true")
            axis.plot(steps, prediction[steps, output], linewidth=0.7, color="black", label="predicted")
        error = np.square(target - prediction, dtype=np.float64).mean()
        axes[0, column].set_title(f"sequence {column}: mean squared error {error:.3g}", fontsize="small")
        axes[-1, column].set_xlabel("step")
    _label_rows(axes, [f"output {output}" for output in range(rows)])
    return figure


def impulse_responses(truth: np.ndarray, model: np.ndarray) -> "Figure":
    """Two impulse responses (L, O, C) over the lag, counted from 1 for its logarithm."""
    rows, columns = min(truth.shape[1], OUTPUTS), truth.shape[2]
    figure, axes = _axes(rows, columns, sharex=True, sharey="row")
    lags = np.arange(1, len(truth) + 1)
    for (row, column), axis in np.ndenumerate(axes):
        axis.plot(lags, truth[:, row, column], linewidth=3, alpha=0.4, label="true")
        axis.plot(lags, model[:, row, column], linewidth=0.7, color="black", label="model")
        _over_lags(axis)
    size = np.maximum(np.linalg.norm(truth, axis=(0, 1)), np.finfo(float).tiny)  # (C,)
    errors = np.linalg.norm(model - truth, axis=(0, 1)) / size
    for column, error in enumerate(errors):
        axes[0, column].set_title(f"input {column}: relative error {error:.3g}", fontsize="small")
        axes[-1, column].set_xlabel("lag + 1")
    _label_rows(axes, [f"output {output}" for output in range(rows)])
    return figure


def filters(banks: Sequence[Tensor]) -> "Figure":
    """Banks of filters (L, K), a row of axes for each: the first as curves, and the size of all, over the lag."""
    drawn = banks[:BANKS]
    figure, axes = _axes(len(drawn), 2, width=5.5, gap=0.4)
    for bank, (left, right) in zip(drawn, axes, strict=True):
        length, count = bank.shape
        lags = np.unique(np.geomspace(1, length, min(length, POINTS)).round().astype(int))
        values = bank.double().cpu().numpy()[lags - 1]  # (points, K)
        size = np.abs(values) / np.maximum(np.abs(values).max(0), np.finfo(float).tiny)
        left.plot(lags, values[:, :CURVES], linewidth=0.9)
        left.set_ylabel(f"the first {min(count, CURVES)} of {count} filters")
        image = right.pcolormesh(lags, np.arange(count), size.T, vmin=0, vmax=1, shading="nearest")
        right.set_ylabel("filter")
        figure.colorbar(image, ax=right, label="size, of the largest")
        for axis in (left, right):
            _over_lags(axis)
            axis.set_xlabel("lag + 1")
    return figure


def _axes(rows: int, columns: int, *, width: float = 3.7, gap: float = 0.15, **sharing: Any) -> "tuple[Figure, Any]":
    """A figure and its axes, (rows, columns), `width` inches each with the gap to the next."""
    from matplotlib.figure import Figure  # slow to import, and not everybody has it

    # Fixed margins: to have matplotlib lay it out would take three times as long.
    left, right, bottom, top, height = 0.9, 0.2, 0.5, 0.6, 1.8
    size = width * columns + left + right, height * rows + bottom + top
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False, **sharing)
    figure.subplots_adjust(left / size[0], bottom / size[1], 1 - right / size[0], 1 - top / size[1])
    figure.subplots_adjust(wspace=gap, hspace=gap)
    return figure, axes


def _over_lags(axis: Any) -> None:
    """A logarithmic axis, its numbers at the powers of ten alone: each costs time."""
    axis.set_xscale("log")
    axis.minorticks_off()


def _label_rows(axes: Any, names: Iterable[str]) -> None:
    """Name each row at its left, and what the curves are in the first axes."""
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    axes[0, 0].legend(fontsize="small", loc="upper right")
