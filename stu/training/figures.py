"""Figures of what a model has learned: predictions beside the truth, impulse responses and filters, as PNG files.

L length, C inputs, O outputs, K filters

They are drawn with matplotlib (the extra `plot`); a run without it says so and continues.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from stu.backbone import Backbone, SequenceModel
from stu.errors import require
from stu.rollout import batch_rollout
from stu.task import Batch, Examples, Rollout, Task
from stu.training import plots, report
from stu.training.callbacks import Checkpoints
from stu.training.data import SequenceData
from stu.training.module import SequenceModule
from stu.training.sharded import gathered
from stu.training.trackers import log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

When = Literal["never", "end", "validations"]
Sequences = list[np.ndarray]  # (L, O) each

MOST_SEQUENCES = 8
INPUTS = 3  # the first inputs, of which there may be many
LAGS = 2048  # of an impulse response


class Figures(Callback):
    """Writes `<name>-step<step>.png` into `directory` and shows it in Weights & Biases.

    when: "end", of the best weights, after the test; "validations", also of the weights at each validation; or "never".
    sequences: for how many of them predictions are drawn.

    predictions: of tasks with real targets at every step. rollout: of tasks that have one. impulse-response: of tasks
    that know the true one. filters: of mixers with fixed filters. lengths: of `task.test_lengths`. A figure that fails
    costs one line, never the run.
    """

    def __init__(self, directory: Path, *, when: When = "end", sequences: int = 3) -> None:
        require(when in get_args(When), "when", when, f"must be one of {', '.join(get_args(When))}")
        require(1 <= sequences <= MOST_SEQUENCES, "sequences", sequences, f"must be 1 to {MOST_SEQUENCES}")
        self.directory, self.when, self.sequences = directory, when, sequences

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without matplotlib, say which figures will be missing."""
        if self.when == "never" or find_spec("matplotlib") is not None:
            return
        if names := ", ".join(self._plots(trainer, pl_module, "test")):
            report.note(f"no figures of {names}: matplotlib is not installed; pip install matplotlib")
        self.when = "never"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the current weights, if asked to."""
        if self.when == "validations" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val", trainer.global_step)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the best weights."""
        assert isinstance(pl_module, SequenceModule)
        if self.when != "never" and not pl_module.resized:
            assert isinstance(trainer.checkpoint_callback, Checkpoints)
            self._draw(trainer, pl_module, "test", trainer.checkpoint_callback.best_step)

    def draw_lengths(self, trainer: L.Trainer, metric: str, values: Mapping[int, float], trained: int) -> None:
        """Draw a metric of the test against the length of the sequences, where there are several."""
        if self.when != "never" and len(values) > 1:
            assert isinstance(trainer.checkpoint_callback, Checkpoints)
            step = trainer.checkpoint_callback.best_step
            self._save(trainer, "lengths", lambda: plots.lengths(metric, values, trained), step)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, split: str, step: int) -> None:
        assert isinstance(module, SequenceModule)
        with failing_softly("any kind", step), gathered(module.model):
            for name, plot in self._plots(trainer, module, split).items():
                self._save(trainer, name, plot, step)

    def _save(self, trainer: L.Trainer, name: str, plot: "Callable[[], Figure]", step: int) -> None:
        with failing_softly(name, step):
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                figure = plot()
            if trainer.is_global_zero:
                figure.suptitle(f"{name}, step {step:,}", fontsize="medium")
                file = self.directory / f"{name}-step{step:07d}.png"
                save(figure, file)
                for logger in trainer.loggers:
                    log_figure(logger, f"figures/{name}", file, step)

    def _plots(self, trainer: L.Trainer, module: L.LightningModule, split: str) -> Mapping[str, "Callable[[], Figure]"]:
        """Name → how it is drawn, for everything that this task and this model have."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SequenceData)
        assert isinstance(module, SequenceModule)
        model, task, examples = module.model, module.task, getattr(data.splits, split)
        found: dict[str, Callable[[], Figure]] = {}
        if has_trajectories(examples):
            found[f"predictions-{split}"] = lambda: plots.trajectories(
                *predictions(model, task, examples, self.sequences)
            )
        if rollout := task.rollout:
            found[f"rollout-{split}"] = lambda: plots.trajectories(
                *rollouts(model, task, rollout, examples, self.sequences)
            )
        if task.impulse_response(1) is not None:
            found["impulse-response"] = lambda: plots.impulse_responses(*responses(model, task))
        if any(block.mixer.filters is not None for block in model.backbone.blocks):
            found["filters"] = lambda: plots.filters(filter_banks(model.backbone))
        return found


@contextmanager
def failing_softly(name: str, step: int) -> Iterator[None]:
    """Turn an error into a note: a figure must never end a run."""
    try:
        yield
    except Exception as error:
        report.note(" ".join(f"no figure of {name} at step {step}: {type(error).__name__}: {error}".split()))


def has_trajectories(examples: Examples) -> bool:
    """Whether the targets are reals at every step."""
    target = np.asarray(examples[0][1])
    return target.ndim == 2 and np.issubdtype(target.dtype, np.floating)


def predictions(model: SequenceModel, task: Task, examples: Examples, count: int) -> tuple[Sequences, Sequences]:
    """Targets and predictions of the first `count` examples, without padding."""
    batch = _batch(model, task, examples, count)
    predicted = task.restored(model(batch.inputs, batch.mask), batch.targets)
    if batch.mask is None:
        return _sequences(batch.targets), _sequences(predicted)
    return (
        _sequences(t[m] for t, m in zip(batch.targets, batch.mask, strict=True)),
        _sequences(p[m] for p, m in zip(predicted, batch.mask, strict=True)),
    )


def rollouts(
    model: SequenceModel, task: Task, rollout: Rollout, examples: Examples, count: int
) -> tuple[Sequences, Sequences]:
    """Targets and predictions of the first steps of rollouts, of the first `count` examples."""
    batch = _batch(model, task, examples, count)
    horizon = min(rollout.horizon, plots.STEPS)
    steps: dict[str, Any] = {"context": rollout.context, "horizon": horizon}
    predicted, targets = batch_rollout(model, batch, preconditioner=task.preconditioner, **steps)
    return _sequences(targets), _sequences(predicted)


def responses(model: nn.Module, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The true impulse response and the model's, (L, O, C) each, of the first inputs."""
    truth = task.impulse_response(min(task.seq_len, LAGS))
    assert truth is not None, "only tasks that know it"
    found = impulse_response(model, len(truth), truth.shape[2])
    return truth[..., :INPUTS], found if task.preconditioner is None else task.preconditioner.simulated(found)


def impulse_response(model: nn.Module, length: int, d_input: int) -> np.ndarray:
    """What a unit impulse at each of the first inputs adds to the outputs for zero inputs, (length, O, C).

    It describes a linear model completely; of a nonlinear one it is the response to this one input.
    """
    drawn = min(d_input, INPUTS)
    inputs = torch.zeros(drawn + 1, length, d_input)
    inputs[range(drawn), 0, range(drawn)] = 1
    outputs = _array(model(_like(model, inputs), None))  # (C + 1, L, O)
    return (outputs[:-1] - outputs[-1]).transpose(1, 2, 0)


def filter_banks(backbone: Backbone) -> list[Tensor]:
    """The distinct banks of fixed filters of a backbone's mixers, (L, K) each; blocks often have the same."""
    banks: list[Tensor] = []
    for block in backbone.blocks:
        bank = block.mixer.filters
        if bank is not None and not any(torch.equal(bank, other) for other in banks):
            banks.append(bank)
    return banks


def save(figure: "Figure", file: Path) -> None:
    """Write a PNG whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp")
    figure.savefig(partial, format="png", dpi=100)
    partial.replace(file)


def _batch(model: nn.Module, task: Task, examples: Examples, count: int) -> Batch:
    """The first `count` examples, or all if there are fewer."""
    batch = task.collate([examples[index] for index in range(min(count, len(examples)))])
    mask = None if batch.mask is None else _like(model, batch.mask)
    return Batch(_like(model, batch.inputs), _like(model, batch.targets), mask, batch.num_real)


def _like(model: nn.Module, x: Tensor) -> Tensor:
    """On the device of the model's parameters and, if real, of their dtype."""
    parameter = next(model.parameters(), x)
    return x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)


def _sequences(batch: Iterable[Tensor]) -> Sequences:
    return [_array(x) for x in batch]


def _array(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
