"""Callbacks that a run may have besides its own, `conf/callbacks`: what one long epoch of Lightning's can bear."""

from collections.abc import Mapping
from importlib.util import find_spec
from pydoc import locate
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stu.errors import require
from stu.norm import BatchNorm
from stu.task import Task
from stu.training.callbacks import Checkpoints
from stu.training.module import SequenceModule
from stu.training.plan import has

ONE_EPOCH = "counts Lightning's epochs, of which a run is one"
# Lightning's own that a run is not given, and why.
REFUSED: Mapping[type, str] = {
    WeightAveraging: "would average counters, and test the last average in place of the best; use callbacks=ema",
    theirs.EarlyStopping: "reads metrics that are not logged through Lightning; use callbacks=early_stopping",
    theirs.DeviceStatsMonitor: "logs rows that a resumed run would write twice; use callbacks=device_stats",
    theirs.StochasticWeightAveraging: f"{ONE_EPOCH}, and replaces the schedule; use callbacks=ema",
    theirs.GradientAccumulationScheduler: f"{ONE_EPOCH}; use trainer.accumulate_grad_batches",
    theirs.BaseFinetuning: f"{ONE_EPOCH}, and changes optimizer.groups, which a resumed run could not restore",
    theirs.LearningRateMonitor: "metrics.csv has the rates of all groups, as lr/…",
    theirs.ThroughputMonitor: "metrics.csv has time/sequences_per_second and time/tokens_per_second",
    theirs.Checkpoint: "a run keeps its best and its last checkpoint itself; see checkpoints.every_minutes",
    theirs.Timer: "would end a run by the clock, wherever it is; set trainer.max_steps; metrics.csv has times",
    theirs.ModelPruning: "renames parameters, so that a checkpoint could be neither resumed nor tested",
    theirs.LearningRateFinder: "trains before the run does, and moves what it draws; sweep over optimizer.lr",
    theirs.BatchSizeFinder: "trains before the run does; loader.batch_size is a setting of the run",
    SpikeDetection: "leaves out batches, of which a resumed run counts all",
    theirs.ProgressBar: "a run shows its progress itself",
    theirs.BasePredictionWriter: "nothing here predicts",
}
BORNE = (theirs.ModelSummary, theirs.LambdaCallback)  # of Lightning's


def check_callbacks(callbacks: Mapping[str, Callback], trainer: Mapping[str, Any], task: Task) -> None:
    """Raise `OptionError` for callbacks, by their names, that a run of this task cannot bear.

    trainer: the arguments of the Trainer.
    """
    ours = (EMA, EarlyStopping, DeviceStats)
    present = [(type(callback), name) for name, callback in callbacks.items() if isinstance(callback, ours)]
    named: dict[type, str] = dict(reversed(present))
    for name, callback in callbacks.items():
        key, shown = f"callbacks.{name}", type(callback).__name__
        first = named.get(type(callback), name)
        require(first == name, key, shown, f"there is one already, callbacks.{first}; a run has one of a kind")
        if isinstance(callback, EarlyStopping):
            callback.metric_of(task)
        if isinstance(callback, EMA):
            strategy = trainer["strategy"]
            made = DDPStrategy if isinstance(strategy, str) else locate(strategy["_target_"])
            whole = isinstance(made, type) and issubclass(made, DDPStrategy)
            require(whole, key, shown, "needs whole weights on every device: trainer.strategy must be auto or ddp")
            allowed = "would not move, since bfloat16 rounds small steps away: trainer.precision must not be bf16-true"
            require(trainer.get("precision") != "bf16-true", key, shown, allowed)
        if isinstance(callback, DeviceStats):
            cpu = trainer["accelerator"] == "cpu" or not has(CUDAAccelerator, MPSAccelerator)
            there = not cpu or find_spec("psutil") is not None
            require(there, key, shown, "asks psutil about a CPU, which is not installed: pip install psutil")
        if isinstance(callback, ours):
            continue
        for kind, reason in REFUSED.items():
            require(not isinstance(callback, kind), key, shown, f"not supported: {reason}")
        known = not type(callback).__module__.startswith("lightning.") or isinstance(callback, BORNE)
        require(known, key, shown, "not supported: not known to work with runs that stop and resume at any step")


class EMA(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, for runs that stop and resume at any step.

    Validations, and so early stopping, the best checkpoint and the test, are of the averages; training goes on without
    them. A checkpoint has them as its `state_dict`, and what training goes on with as `current_model_state`. Means and
    variances of normalisation are averaged as they are used; what is no real number is copied. Until the first update
    the weights themselves are evaluated.

    Lightning's own averages the counters of batches, too, evaluates initial weights until it starts, exchanges the
    weights in later evaluations and in checkpoints that are written during a validation, and waits for a GPU at each
    step.

    decay: the share of the average that an update keeps. The other two count optimiser steps.
    """

    def __init__(
        self, *, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        require(0 <= decay < 1, "decay", decay, "must be in [0, 1)")
        every, start = update_every_n_steps, update_starting_at_step
        require(every >= 1, "update_every_n_steps", every, "must be at least 1")
        require(start is None or start >= 0, "update_starting_at_step", start, "must be at least 0, or null")
        super().__init__(decay=decay, update_every_n_steps=every, update_starting_at_step=start)
        self.decay = decay
        self.exchanged = False  # whether the averages are in the module, and its weights here

    @property
    def average(self) -> "Average":
        """What is averaged."""
        assert isinstance(self._average_model, Average)
        return self._average_model

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the model to the device."""
        if stage == "fit":
            assert isinstance(pl_module, SequenceModule)
            self._average_model = Average(pl_module.model, self.decay, trainer.strategy.root_device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the best averages are read from their file."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the averages, in training alone: later evaluations are of weights from a checkpoint."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.average.n_averaged > 0:
            self._exchange(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing yet: figures are still to be drawn."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the weights."""
        if self.exchanged:
            self._exchange(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep both; the averages in the place of the weights."""
        here = self.average.module.state_dict()
        module = {name: checkpoint["state_dict"][name] for name in here}
        averages, weights = (module, here) if self.exchanged else (here, module)
        checkpoint["current_model_state"] = weights
        checkpoint["averaging_state"] = {"n_averaged": self.average.n_averaged}
        checkpoint["state_dict"] |= averages if self.average.n_averaged > 0 else weights

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with both."""
        weights = checkpoint["current_model_state"]
        self.average.module.load_state_dict({name: checkpoint["state_dict"][name] for name in weights})
        self.average.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        pl_module.load_state_dict(checkpoint["state_dict"] | weights)

    def _exchange(self, pl_module: L.LightningModule) -> None:
        self._swap_models(pl_module)
        self.exchanged = not self.exchanged


class Average(AveragedModel):
    """The moving average of a model, whose `n_averaged` stays on the host, so that no step waits for a device."""

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        # by the names of the whole module, of which only this has weights: a copy of its task would copy the data
        holder = nn.ModuleDict({"model": model})
        super().__init__(holder, device, use_buffers=True)
        self.n_averaged, self.lerp = torch.tensor(0), get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of a `SequenceModule`."""
        average, source = self.module.get_submodule("model"), model.get_submodule("model")
        for counted, norm in zip(average.modules(), source.modules(), strict=True):
            if isinstance(counted, BatchNorm):
                assert isinstance(norm, BatchNorm)
                counted.recount_(norm.num_batches)
        real: tuple[list[Tensor], list[Tensor]] = [], []
        for kept, taken in zip(_tensors(average), _tensors(source), strict=True):
            if self.n_averaged > 0 and kept.is_floating_point():
                real[0].append(kept)
                real[1].append(taken)
            else:
                kept.copy_(taken)
        if real[0]:
            self.lerp(*real, self.n_averaged)
        self.n_averaged += 1


class EarlyStopping(theirs.EarlyStopping):
    """Lightning's early stopping, by the validations of a run: it ends there, finished, where they no longer improve.

    Lightning's own reads metrics that were logged through it, and at the end of an epoch.

    patience: validations without an improvement of more than min_delta. monitor: a validation metric, None: the task's.
    mode: of it, "min" or "max"; None: the task's for its own, "min" for the loss. stopping_threshold: a value that is
    good enough. divergence_threshold: one that is hopeless.
    """

    def __init__(
        self,
        *,
        patience: int = 10,
        min_delta: float = 0.0,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        require(patience >= 1, "patience", patience, "must be at least 1 validation")
        require(0 <= min_delta < float("inf"), "min_delta", min_delta, "must be at least 0 and finite")
        self.asked = monitor, mode
        self.options: dict[str, Any] = {
            "patience": patience,
            "min_delta": min_delta,
            "stopping_threshold": stopping_threshold,
            "divergence_threshold": divergence_threshold,
            "check_on_train_epoch_end": False,
        }
        super().__init__(monitor or "", mode=mode or "min", **self.options)

    def metric_of(self, task: Task) -> tuple[str, Literal["min", "max"]]:
        """What is monitored, and its direction. Raises `OptionError` where a task has no such metric."""
        monitor, mode = self.asked
        name = (task.monitor if monitor is None else monitor).removeprefix("val/")
        known = ["loss", *task.metrics()]
        require(name in known, "monitor", monitor, f"must be one of {', '.join(known)}, or null for {task.monitor}")
        directions: dict[str, Literal["min", "max"]] = {"loss": "min", task.monitor: task.mode}
        direction = directions.get(name, mode)
        require(direction is not None, "mode", mode, f"must be min or max: which of them of {name} is better?")
        assert direction is not None
        require(mode in (None, direction), "mode", mode, f"must be {direction} or null: so is {name} better")
        return name, direction

    @property
    def why(self) -> str:
        """Why the run has ended, in words; empty where it has not."""
        match self.stopping_reason:
            case EarlyStoppingReason.NOT_STOPPED:
                return ""
            case EarlyStoppingReason.PATIENCE_EXHAUSTED:
                return f"val/{self.monitor} has not improved in {self.wait_count} validations"
            case EarlyStoppingReason.STOPPING_THRESHOLD:
                return f"val/{self.monitor} is better than {self.stopping_threshold:g}"
            case EarlyStoppingReason.DIVERGENCE_THRESHOLD:
                return f"val/{self.monitor} is worse than {self.divergence_threshold:g}"
        return f"val/{self.monitor} is not finite"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Learn what is monitored."""
        if stage == "fit":
            assert isinstance(pl_module, SequenceModule)
            name, direction = self.metric_of(pl_module.task)
            super().__init__(name, mode=direction, **self.options)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that had ended, and not yet been tested, does not go on."""
        trainer.should_stop = trainer.should_stop or bool(self.why)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide, the same on all devices."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        assert isinstance(pl_module, SequenceModule)
        value = torch.tensor(pl_module.evaluated[self.monitor], dtype=torch.float64)
        stop, _ = self._evaluate_stopping_criteria(value)
        trainer.should_stop = trainer.should_stop or trainer.strategy.reduce_boolean_decision(stop, all=False)


class DeviceStats(DeviceStatsMonitor):
    """What the device says of itself after every `every_n_steps` optimiser steps, as device/… in the log.

    Lightning's own logs before and after each batch, of the test, too: rows that a resumed run would write twice.
    """

    def __init__(self, *, every_n_steps: int = 10) -> None:
        require(every_n_steps >= 1, "every_n_steps", every_n_steps, "must be at least 1")
        super().__init__()
        self.every, self.logged = every_n_steps, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was logged up to here, an earlier start has logged."""
        self.logged = trainer.global_step

    def _get_and_log_device_stats(self, trainer: L.Trainer, key: str) -> None:
        step = trainer.global_step
        if key != "on_train_batch_end" or step == self.logged or step % self.every:
            return
        self.logged = step
        assert isinstance(trainer.checkpoint_callback, Checkpoints)
        stats = trainer.accelerator.get_device_stats(trainer.strategy.root_device)
        row = {"epoch": trainer.checkpoint_callback.plan.epoch(step)}
        for logger in trainer.loggers:
            logger.log_metrics(row | {f"device/{name}": value for name, value in stats.items()}, step=step)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
