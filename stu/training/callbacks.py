"""Callbacks: metrics are logged, checkpoints written, signals and losses that are not finite handled."""

import errno
import math
import os
import shutil
import signal
import time
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from stu.errors import DIVERGED, require
from stu.files import PARTIAL, put_in_place
from stu.task import Batch
from stu.training import states
from stu.training.cluster import Agreed
from stu.training.memory import peak, reset_peak
from stu.training.module import SequenceModule, compute
from stu.training.plan import StepPlan
from stu.training.sharded import local, whole
from stu.training.signals import PERSONAL, Handlers, hurries

AGREE_EVERY = 10  # steps after which several devices agree whether to stop or save


class Stopped(Agreed):
    """The run was stopped by a signal; everything is in the last checkpoint."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number, self.step = signal_number, step


class Diverged(Agreed):
    """The loss is not finite."""

    exit_code = DIVERGED


class MetricsLog(Callback):
    """Logs training metrics, learning rates, gradient norm, throughput, the share of time spent waiting for data, and
    peak memory, every `every_n_steps` optimiser steps.

    All but the last are over the steps since the last row; a resumed run writes the same rows as an uninterrupted one,
    except for times and memory. A token is a real position of the inputs, of all devices; memory is that of the device
    with the highest peak, see `memory.peak`.
    """

    def __init__(self, plan: StepPlan, *, batch_size: int, every_n_steps: int) -> None:
        require(every_n_steps >= 1, "log_every", every_n_steps, "must be at least 1")
        self.plan, self.batch_size, self.every = plan, batch_size, every_n_steps
        self.since = self.validation_started = time.perf_counter()
        self.steps_since, self.tokens = 0, Tokens()
        self.rates: dict[str, float] = {}
        self.gradient_norm = torch.tensor(math.nan)
        self.latest: dict[str, float] = {}  # for the progress display

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and measure the peak of memory from here on, where that can be."""
        reset_peak(trainer.strategy.root_device)
        self._restart()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the wait for the batch."""
        self.waited += time.perf_counter() - self.batch_ended

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """If this step is logged, keep its rates, and the norm of its gradient before clipping."""
        if (trainer.global_step + 1) % self.every == 0:
            self.rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            # read with the metrics, after the step
            self.gradient_norm = whole(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a row of the training log when it is due."""
        self.batch_ended = time.perf_counter()
        self.tokens.add(batch)
        if (batch_idx + 1) % self.plan.accumulate:
            return
        self.steps_since += 1
        if trainer.global_step % self.every:
            return
        assert isinstance(pl_module, SequenceModule)
        row = {f"train/{name}": value for name, value in compute(pl_module.train_metrics).items()}
        row |= {**self.rates, "gradient_norm": float(self.gradient_norm)}
        seconds = time.perf_counter() - self.since  # by now a GPU has done its part of these steps
        row["time/sequences_per_second"] = self._rate(seconds)
        row["time/tokens_per_second"] = self.tokens.total(trainer) / max(seconds, 1e-9)
        row["time/data_share"] = self.waited / max(seconds, 1e-9)
        row["memory/peak_bytes"] = highest_peak(trainer)
        self._write(trainer, row)
        self._restart()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the validation, which does not count as training."""
        self.validation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a row of the validation log."""
        self.batch_ended = time.perf_counter()
        self.since += self.batch_ended - self.validation_started
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, SequenceModule)
        self._write(trainer, {f"val/{name}": value for name, value in pl_module.evaluated.items()})

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rows up to a checkpoint are on the disk before it: a run that resumes from it does not write them again."""
        for logger in trainer.loggers:
            logger.save()

    def _restart(self) -> None:
        self.since, self.steps_since, self.tokens = time.perf_counter(), 0, Tokens()
        self.batch_ended, self.waited = self.since, 0.0

    def _rate(self, seconds: float) -> float:
        return self.steps_since * self.batch_size / max(seconds, 1e-9)

    def _write(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        self.latest |= row
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": self.plan.epoch(trainer.global_step), **row}, step=trainer.global_step)


class Tokens:
    """Counts the real positions of batches, waiting for no device."""

    def __init__(self) -> None:
        self.known = 0
        self.counted: int | Tensor = 0  # on the device

    def add(self, batch: Batch) -> None:
        """Those of one batch."""
        if batch.mask is None:
            self.known += batch.inputs.shape[0] * batch.inputs.shape[1]
        elif batch.num_real is not None:
            self.known += batch.num_real
        else:
            self.counted = self.counted + batch.mask.sum()

    def total(self, trainer: L.Trainer) -> int:
        """Those of all devices."""
        total = self.known + int(self.counted)
        return total if trainer.world_size == 1 else _reduced(trainer, total, "sum")


def highest_peak(trainer: L.Trainer) -> int:
    """`memory.peak` of the device where it is highest."""
    here = peak(trainer.strategy.root_device)
    return here if trainer.world_size == 1 else _reduced(trainer, here, "max")


class Checkpoints(Checkpoint):
    """Keeps `best.ckpt`, by the monitored validation metric, and `last.ckpt`, from which a run resumes.

    The last one is written after every validation, every `every_minutes` and, if given, `every_n_steps`; on SIGINT,
    SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 it is written at once and `Stopped` raised (a second signal does not wait, if
    it `hurries`). A loss that is not finite raises `Diverged` before it can reach a checkpoint; it is looked for every
    `check_every` steps, in which a GPU is waited for. Checkpoints appear whole or not at all; one that cannot be
    written raises `OptionError`.

    It also tells Lightning when to validate, by the `StepPlan`.
    """

    def __init__(
        self,
        directory: Path,
        plan: StepPlan,
        monitor: str,
        mode: Literal["min", "max"],
        check_every: int = 10,
        *,
        every_minutes: float = 5.0,
        every_n_steps: int | None = None,
    ) -> None:
        require(every_minutes > 0, "every_minutes", every_minutes, "must be above 0")
        require(every_n_steps is None or every_n_steps >= 1, "every_n_steps", every_n_steps, "must be at least 1")
        require(check_every >= 1, "check_every", check_every, "must be at least 1")
        self.directory, self.plan = directory, plan
        self.monitor, self.mode = monitor, mode
        self.every_minutes, self.every_n_steps, self.check_every = every_minutes, every_n_steps, check_every
        self.best_value: float | None = None
        self.best_step = 0
        self.seconds = 0.0  # of training so far, but for what the clock is measuring
        self.last_step = 0  # of last.ckpt
        self.signal_number: int | None = None
        self._writer = states.Writer()
        self._handlers: Handlers | None = None
        self._saved_at = time.monotonic()
        self._clock: float | None = None  # runs during training

    @property
    def seconds_trained(self) -> float:
        """Seconds of all starts of the run together, each from its first step to the end of its last one.

        Validations and checkpoints in between count. What comes before and after does not: imports, data, a logger that
        starts, the trial of a validation, the test.
        """
        return self.seconds + (0.0 if self._clock is None else time.monotonic() - self._clock)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {"best_value": self.best_value, "best_step": self.best_step, "seconds": self.seconds_trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]
        self.seconds = state_dict["seconds"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have checkpoints written straight to their place."""
        trainer.strategy.checkpoint_io = self._writer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, install the signal handlers and schedule the next validation.

        Raises `OptionError` where a checkpoint could not be written, on all devices.
        """
        if trainer.is_global_zero:
            self._require_room(pl_module)
        self._require_written(trainer, self.directory)
        self.last_step = trainer.global_step
        # Lightning's own way to stop several devices at once, for which all of them would wait in every step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._handlers = Handlers(self._on_signal)
        self._saved_at = self._clock = time.monotonic()
        self._schedule_validation(trainer, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: stop, save or continue."""
        if (batch_idx + 1) % self.plan.accumulate:
            return
        step = trainer.global_step
        if step % self.check_every == 0:
            self._check_finite(trainer)
        self._schedule_validation(trainer, step)
        if self.plan.validates_after(step):
            return  # the checkpoint is written after the validation
        if self._should_stop(trainer):
            self._save(trainer, states.LAST)
            raise self._stopped(trainer)
        if self._is_due(trainer, step):
            self._save(trainer, states.LAST)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset Lightning's count of an interrupted validation, or it would never consider this one finished."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A stop during validation: save the state before it, so that a resumed run repeats it.

        Several devices stop after it instead: they may have different numbers of batches, so they cannot agree here.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.world_size > 1:
            return
        if not self._should_stop(trainer):
            return
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        # the progress of a validation that has started its first batch
        progress.reset()
        progress.increment_ready()
        progress.increment_started()
        self._save(trainer, states.LAST)
        raise self._stopped(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best, then the last, whose state includes the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        assert isinstance(pl_module, SequenceModule)
        value = pl_module.evaluated[self.monitor]
        if not (math.isfinite(value) and math.isfinite(pl_module.evaluated["loss"])):
            raise Diverged(f"the validation loss is not finite after step {trainer.global_step}")
        if self._improves(value):
            self.best_value, self.best_step = value, trainer.global_step
            self._save(trainer, states.BEST)
        self._save(trainer, states.LAST)
        if self._should_stop(trainer):
            raise self._stopped(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock, and restore the signal handlers."""
        self._stop_clock()
        self._restore_signals()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._stop_clock()
        self._restore_signals()

    def _stop_clock(self) -> None:
        self.seconds, self._clock = self.seconds_trained, None

    def _improves(self, value: float) -> bool:
        if self.best_value is None:
            return True
        return value > self.best_value if self.mode == "max" else value < self.best_value

    def _is_due(self, trainer: L.Trainer, step: int) -> bool:
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        return _agree_at_times(trainer, time.monotonic() - self._saved_at > 60 * self.every_minutes)

    def _should_stop(self, trainer: L.Trainer) -> bool:
        return _agree_at_times(trainer, self.signal_number is not None)

    def _schedule_validation(self, trainer: L.Trainer, step: int) -> None:
        """Lightning validates when batches · accumulate % `val_check_batch` is 0; at infinity, after the last batch."""
        due = self.plan.validates_after(step) and step > 0
        trainer.val_check_batch = step * self.plan.accumulate if due else float("inf")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        self._check_finite(trainer)
        path = self.directory / name
        partial = self.directory / f".{name}{PARTIAL}"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero and self._writer.failure is None:
            self._put_in_place(partial, path)
        if self._writer.failure is not None:
            partial.unlink(missing_ok=True)
        self._require_written(trainer, path)
        if name == states.LAST:
            self.last_step = trainer.global_step
        self._saved_at = time.monotonic()

    def _put_in_place(self, partial: Path, path: Path) -> None:
        """Keep what is replaced: of the best state there are two files from then on, and one before the last."""
        try:
            if path.name == states.LAST:
                kept_as = states.COPY if self.last_step == self.best_step else states.PREVIOUS
                states.replace_last(partial, self.directory, kept_as=kept_as)
            else:
                put_in_place(partial, path)
        except OSError as error:
            self._writer.failure, self._writer.needed = error, partial.stat().st_size

    def _require_room(self, module: L.LightningModule) -> None:
        """Whether there is room for the weights, at least."""
        self._writer.needed = states.size(module.state_dict())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.directory) as file:
                file.write(b"1")
            if shutil.disk_usage(self.directory).free < self._writer.needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._writer.failure = error

    def _require_written(self, trainer: L.Trainer, path: Path) -> None:
        """Raise what the first device failed to write; the others end, too, and leave it to the first to say why."""
        failure = trainer.strategy.broadcast(self._writer.failure)
        if failure is None:
            return
        if not trainer.is_global_zero:
            raise SystemExit(128 + signal.SIGTERM)
        raise states.unwritable(path, failure, self._writer.needed) from failure

    def _check_finite(self, trainer: L.Trainer) -> None:
        """Raise `Diverged` on all devices if the loss or the weights of any are not finite."""
        module = trainer.lightning_module
        assert isinstance(module, SequenceModule)
        bad = -1 if module.first_bad_batch is None else int(module.first_bad_batch)
        if _agree(trainer, bad >= 0):
            where = f"at step {bad // self.plan.accumulate + 1}" if bad >= 0 else "on another device"
            raise Diverged(f"the loss is not finite {where}")
        # one answer: one wait for a GPU
        finite = torch.stack([local(p).isfinite().all() for p in module.parameters()]).all()
        if _agree(trainer, not bool(finite)):
            raise Diverged(f"the weights are not finite after step {trainer.global_step}")

    def _stopped(self, trainer: L.Trainer) -> Stopped:
        """The same on all devices, whichever of them the signal has reached."""
        number = self.signal_number or 0
        if trainer.world_size > 1:
            number = _reduced(trainer, number, "max")
        return Stopped(number, trainer.global_step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
        elif hurries(number, self.signal_number):
            self._restore_signals()
            raise SystemExit(128 + number)
        elif number in PERSONAL:
            self.signal_number = number

    def _restore_signals(self) -> None:
        if self._handlers is not None:
            self._handlers.restore()


def _reduced(trainer: L.Trainer, number: int, how: Literal["max", "sum"]) -> int:
    """A number of each device, reduced over all of them."""
    return int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op=how))


def _agree_at_times(trainer: L.Trainer, decision: bool) -> bool:
    """`_agree`, but on several devices only every `AGREE_EVERY` steps, since agreeing costs time."""
    return trainer.global_step % (AGREE_EVERY if trainer.world_size > 1 else 1) == 0 and _agree(trainer, decision)


def _agree(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any device has decided so; all devices get the same answer."""
    if trainer.world_size == 1:
        return decision
    return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))
