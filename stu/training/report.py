"""What a user sees: the summary at the start, progress, the table at the end, and how a run ended."""

import errno
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from stu.errors import OptionError
from stu.task import Task
from stu.training import states
from stu.training.callbacks import Diverged, MetricsLog, Stopped
from stu.training.cluster import ON_LOSS, Lost, Watch, disconnect, failed, in_short, loss_behind
from stu.training.data import SequenceData
from stu.training.module import SequenceModule
from stu.training.optim import ParameterGroup
from stu.training.plan import StepPlan
from stu.training.records import AT
from stu.training.run import Run, rank
from stu.training.signals import Handlers, leaving, signal_behind
from stu.training.trackers import close_trackers

SECONDS_BETWEEN_LINES = 10.0
FULL = (*states.FULL, errno.EROFS)  # how a disk says that it takes nothing more
SECONDS_OF_SPEED = 30.0  # over which the speed is smoothed
# Rich assumes 80 columns where output is not a terminal.
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)


def show_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns under a title."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def parameter_rows(model: nn.Module, groups: Sequence[ParameterGroup]) -> list[tuple[str, str]]:
    """Parameter counts by part of the model, and size, rate and decay of each optimiser group."""
    parts = {name: count(part) for name, part in model.named_children()}
    total = sum(parts.values())
    rows = [("parameters", f"{total:,} ({', '.join(f'{name} {size:,}' for name, size in parts.items())})")]
    return rows + [
        (f"group {group.name}", f"{group.size:,} parameters, lr {group.lr:g}, decay {group.weight_decay:g}")
        for group in groups
    ]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def facts(module: SequenceModule, plan: StepPlan) -> dict[str, Any]:
    """What the manifest says of a run besides its seed and device."""
    task = module.task
    return {
        "data": task.fingerprint(),
        "monitor": task.monitor,
        "mode": task.mode,
        "total_steps": plan.total_steps,
        "parameters": count(module.model),
    }


def quiet() -> None:
    """Silence messages of libraries that the tables state better, or that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what trainer.profiler was asked for
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*is smaller than the logging interval.*",
        ".*treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.13
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*functional.all_reduce is deprecated.*",  # torch 2.13; its replacement is not in 2.7
        ".*`srun` command is available.*",  # on any machine of a cluster
        ".*FSDP2-wrapped module.*returned a view.*",  # which nothing here changes in place
        ".*Grad strides do not match bucket view strides.*",  # of one head or one channel: the order is the same
    ):
        warnings.filterwarnings("ignore", message)


@rank_zero_only
def start(
    run: Run,
    data: SequenceData,
    module: SequenceModule,
    groups: Sequence[ParameterGroup],
    *,
    device: str,
    precision: str,
) -> None:
    """The summary at the start of a run, and what it has found."""
    for remark in run.remarks:
        note(remark)
    plan, (task, model) = data.plan, run.path.parts[-3:-1]
    sizes = [len(split) for split in data.splits]
    epochs = plan.total_steps / plan.steps_per_epoch
    where = " on the training batches" if plan.overfits else ""
    rows = [
        ("task", f"{task}: {sizes[0]:,} / {sizes[1]:,} / {sizes[2]:,} train / val / test{_lengths(data)}"),
        ("data", data.task.fingerprint()[:16]),
        ("model", f"{model}: {_shape(module)}"),
        *parameter_rows(module.model, groups),
        ("budget", f"{plan.total_steps:,} steps of {data.batch_size} sequences, {epochs:.3g} epochs"),
        ("validation", f"every {plan.val_every:,} steps{where}, by {data.task.monitor} ({data.task.mode})"),
        ("device", f"{device}, {precision}"),
        ("run", str(run.path) + (f", resumed after step {run.last_step:,}" if run.resumes_from else "")),
    ]
    show_table("Run", rows)


@rank_zero_only
def phase(plan: StepPlan, task: Task, baselines: Mapping[str, float], resumed: int) -> None:
    """What begins before training."""
    epochs = plan.total_steps / plan.steps_per_epoch
    rows = [
        ("objective", f"{type(task).__name__}, {task.monitor} ({task.mode})"),
        (
            "budget",
            f"{plan.total_steps:,} steps, {epochs:.3g} epochs" + f", resumed after step {resumed:,}" * (resumed > 0),
        ),
        *((f"  {name}", f"{value:.4g} {task.monitor}") for name, value in baselines.items()),
    ]
    show_table("Pretraining", rows)


@rank_zero_only
def result(run: Run, lengths: Sequence[int] = ()) -> None:
    """The table at the end of a run, or of a run that had already finished.

    lengths: those that the command asks for, which a run that had finished may not have.
    """
    summary = run.read_summary()
    best = summary["best"]
    metric = best["metric"].removeprefix("val/")
    rows = [*_tests(summary["test"])]
    rows += [(f"  {name}", f"{value:.4g} {metric}") for name, value in summary["baselines"].items()]
    if before := summary.get("pretrain"):
        rows.append(("pretraining", f"val/loss {before['loss']:.4g} at step {before['step']:,} of {before['steps']:,}"))
    if why := summary.get("stopped_early"):
        rows.append(("stopped early", f"after step {summary['steps']:,}: {why}"))
    rows += [
        ("best", f"{best['metric']} {best['value']:.4g} at epoch {best['epoch']:.2f} (step {best['step']:,})"),
        ("time", ", ".join([duration(summary["seconds"]), *_measured(summary)])),
        ("files", f"{run.path}: metrics.csv, summary.json, manifest.json, checkpoints/best.ckpt"),
    ]
    folder = run.figures if run.figures.exists() else run.path / "pictures"  # as earlier runs called it
    if figures := sorted(path.stem for path in folder.glob("*.png")):
        rows.append(("figures", f"{folder}: {', '.join(figures)}"))
    if (run.path / "wandb").exists():
        rows.append(("view", f"wandb leet {run.path / 'wandb'}"))
    rows.append(("next", "the same command shows this table again; mode=test tests again; seed=1 is another run"))
    show_table("Result", rows)
    if missing := [length for length in lengths if f"{metric}{AT}{length}" not in summary["test"]]:
        shown = ",".join(map(str, missing))
        note(f"{run.path} was not tested at task.test_lengths=[{shown}]; the same command with mode=test does so")


def _tests(values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Rows of the metrics of a test, and a row for each other length."""
    at_lengths: dict[int, list[str]] = {}
    for name, value in sorted(values.items()):
        metric, _, length = name.rpartition(AT)
        if metric in values and length.isdecimal():  # else the metric itself is called so: recall@10
            at_lengths.setdefault(int(length), []).append(f"{metric} {value:.4g}")
        else:
            yield f"test {name}", f"{value:.4g}"
    for number, metrics in sorted(at_lengths.items()):
        yield f"  at {number:,} steps", ", ".join(metrics)


def _measured(summary: Mapping[str, Any]) -> Iterator[str]:
    """Speed and memory, which summaries of earlier versions do not have."""
    if isinstance(rate := summary.get("tokens_per_second"), int | float):
        yield f"{rate:,.0f} tokens/s"
    if isinstance(peak := summary.get("peak_memory"), int | float):
        yield f"{peak / 2**30:.2f} GiB of memory at most"


@rank_zero_only
def tested(checkpoint: Path, values: Mapping[str, float], task: Task) -> None:
    """The result of mode=test."""
    rows = [("checkpoint", str(checkpoint))]
    rows += _tests(values)
    rows += [(f"  {name}", f"{value:.4g} {task.monitor}") for name, value in task.references().items()]
    show_table("Test", rows)


@rank_zero_only
def note(text: str) -> None:
    """A remark on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)


@rank_zero_only
def stopped(run: Run, stop: Stopped) -> None:
    """What to do after a signal."""
    saved = f"saved in {run.latest}" if run.trained else "nothing was trained yet"
    way_on = "The same command resumes the run."
    if run.deleted:
        way_on = "The same command without overwrite=true resumes the run; with it, it starts again."
    elif run.overwrites:
        saved, way_on = "nothing was deleted yet", "The same command starts again."
    print(f"{stop}; {saved}. {way_on}", flush=True)


@rank_zero_only
def diverged(run: Run, error: Diverged) -> None:
    """What to do after a loss that is not finite."""
    last = "no checkpoint was saved yet"
    if run.trained:
        last = f"the last good checkpoint is {run.latest} (step {states.latest_step(run.latest.parent)})"
    advice = "Try a smaller optimizer.lr, a longer optimizer.warmup or trainer.gradient_clip_val=1.0"
    print(f"error: {error}; {last}. {advice}", file=sys.stderr)


@contextmanager
def exit_codes(run: Run) -> Iterator[None]:
    """Report how a run ends that does not finish, exit with its code, and release the run in any case.

    128 + the signal after one that stops a run; 3 after a loss that is not finite; 1 where another process of the run
    is gone. The manifest records these and every other error. A start that was refused leaves no directory that was not
    there before, unless it has trained.
    """
    refused = False
    try:
        with losses(run):
            yield
    except Stopped as stop:
        disconnect()
        stopped(run, stop)
        record(run.record_stop, stop)
        raise SystemExit(128 + stop.signal_number) from None
    except Diverged as error:
        disconnect()
        diverged(run, error)
        if rank() == 0:
            record(run.record_failure, error)
        raise SystemExit(error.exit_code) from None
    except Lost:
        raise
    except BaseException as error:
        if number := signal_behind(error):  # before and after training
            signalled = Stopped(number, run.last_step)
            stopped(run, signalled)
            record(run.record_stop, signalled)
            raise SystemExit(128 + number) from None
        refused = isinstance(error, OptionError | MisconfigurationException)
        record(run.record_failure, error)
        if isinstance(error, OSError) and error.errno in FULL:
            way_on = f"{error.strerror}; when there is room again, the run goes on from step {run.last_step}"
            raise OptionError("paths.runs", run.path, f"cannot be written to: {way_on}") from error
        raise
    finally:
        close_trackers()
        run.discard() if refused else run.close()


@contextmanager
def losses(run: Run) -> Iterator[None]:
    """Exit with 1, after one line, where another process is gone; with 128 + the signal that `leaving` sees."""
    on_loss = partial(lost, run)
    ON_LOSS.append(on_loss)
    try:
        with leaving():
            yield
    except BaseException as error:
        if loss := loss_behind(error):
            lost(run, loss)
            raise Lost(1) from None
        raise
    finally:
        ON_LOSS.remove(on_loss)
        Watch.over.set()  # however long it takes to report, and to close W&B


def lost(run: Run, error: RuntimeError | None = None) -> None:
    """Say that another process of the run is gone, and which; record it. One of those that are left does.

    Signals wait meanwhile: torchrun ends with SIGTERM those that are left.
    """
    Watch.over.set()
    shield = Handlers(lambda number, frame: None)
    reason = failed(seconds=1.0) or (in_short(error) if error else "it does not answer")
    with suppress(OSError):
        if reason := run.record_loss(f"another process of this run has ended or cannot be reached: {reason}"):
            way_on = "resumes the run" if run.recorded else "starts again"
            print(f"error: {reason}. The same command {way_on}", file=sys.stderr, flush=True)
    shield.restore()


def record(in_manifest: Callable[[str], None], error: BaseException) -> None:
    """Record how a run ended, in one line, unless the disk refuses that, too: what ended it is reported in any case."""
    kind = "" if isinstance(error, Diverged | Stopped) else f"{type(error).__name__}: "
    with suppress(OSError):
        in_manifest(kind + " ".join(str(error).split())[:500])


def _lengths(data: SequenceData) -> str:
    lengths = data.splits.train.lengths
    if lengths is None:
        return f", length {data.task.seq_len:,}"
    return f", lengths {lengths.min():,} … {lengths.max():,} (mean {lengths.mean():,.0f})"


def _shape(module: SequenceModule) -> str:
    backbone = module.model.backbone
    mixers = dict.fromkeys(type(block.mixer).__name__ for block in backbone.blocks)
    return f"{len(backbone.blocks)} blocks of {' + '.join(mixers)}, width {backbone.d_model}"


def progress(plan: StepPlan, log: MetricsLog) -> AnyProgressBar:
    """A bar on a terminal, a line every few seconds elsewhere."""
    return ProgressBar(plan, log) if _overwrites_lines() else ProgressLines(plan, log)


def evaluation_progress() -> AnyProgressBar:
    """The same where nothing is trained."""
    return RichProgressBar(refresh_rate=1, leave=False) if _overwrites_lines() else EvaluationLines()


def _overwrites_lines() -> bool:
    """Whether a bar moves: not in a pipe, whatever colours are asked for, nor on a terminal that is dumb."""
    return sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal


class Speed:
    """Sequences per second of training, of which those of half a minute count most."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.sequences, self.seconds = batch_size, 0.0, 0.0

    def start(self, step: int) -> None:
        """Start the clock, or start it again after something that does not count."""
        self.step, self.clock = step, time.monotonic()

    def update(self, step: int) -> None:
        """Count the steps since the last call."""
        now = time.monotonic()
        kept = math.exp((self.clock - now) / SECONDS_OF_SPEED)
        self.sequences = kept * self.sequences + (step - self.step) * self.batch_size
        self.seconds = kept * self.seconds + now - self.clock
        self.step, self.clock = step, now

    def shown(self, latest: Mapping[str, float]) -> dict[str, float]:
        """The latest metrics of each kind that a progress display has room for, and the speed."""
        metrics = {name: value for name, value in latest.items() if name.startswith(("train/", "val/"))}
        return metrics | ({"seq/s": self.sequences / self.seconds} if self.seconds else {})


class ProgressBar(RichProgressBar):
    """One bar over the whole run, with time left, latest metrics and sequences per second."""

    def __init__(self, plan: StepPlan, log: MetricsLog) -> None:
        super().__init__(refresh_rate=1, leave=False)
        self.plan, self.log_of_metrics, self.speed = plan, log, Speed(log.batch_size)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Training {self.plan.total_steps / self.plan.steps_per_epoch:.3g} epochs"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.speed.start(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure."""
        self.speed.update(trainer.global_step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the validation."""
        super().on_validation_end(trainer, pl_module)
        self.speed.start(trainer.global_step)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The latest of each kind."""
        return {name: f"{value:.4g}" for name, value in self.speed.shown(self.log_of_metrics.latest).items()}


class EvaluationLines(AnyProgressBar):
    """Progress of validation and test for logs and pipes."""

    def __init__(self) -> None:
        super().__init__()
        self.last_line = time.monotonic()

    def disable(self) -> None:
        """Lightning disables the bars of all processes but the first; here each line checks its process itself."""

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *which: int
    ) -> None:
        """A line, if the last one is some seconds old."""
        if trainer.sanity_checking:
            self._evaluated(trainer, "trying the validation", batch_idx, sum(trainer.num_sanity_val_batches))
        else:
            best = "" if trainer.state.fn == "fit" else " the best weights"
            self._evaluated(trainer, f"validating{best}", batch_idx, sum(trainer.num_val_batches))

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *which: int
    ) -> None:
        """A line, if the last one is some seconds old."""
        self._evaluated(trainer, "testing", batch_idx, sum(trainer.num_test_batches))

    def _evaluated(self, trainer: L.Trainer, doing: str, batch: int, batches: float) -> None:
        if self._is_due(trainer):
            print(f"{doing}: batch {batch + 1:,} of {batches:,}", flush=True)

    def _is_due(self, trainer: L.Trainer) -> bool:
        now = time.monotonic()
        due = trainer.is_global_zero and now - self.last_line > SECONDS_BETWEEN_LINES
        if due:
            self.last_line = now
        return due


class ProgressLines(EvaluationLines):
    """Progress of a whole run for logs and pipes."""

    def __init__(self, plan: StepPlan, log: MetricsLog) -> None:
        super().__init__()
        self.plan, self.log_of_metrics, self.speed = plan, log, Speed(log.batch_size)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started = self.last_line = time.monotonic()
        self.first_step = trainer.global_step
        self.speed.start(self.first_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A line, if the last one is some seconds old."""
        step = trainer.global_step
        self.speed.update(step)
        if step > self.first_step and self._is_due(trainer):
            left = (self.last_line - self.started) / (step - self.first_step) * (self.plan.total_steps - step)
            self._line(trainer, f"time left {duration(left)}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A line after every validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.speed.start(trainer.global_step)  # without the validation
        if trainer.is_global_zero:
            self.last_line = time.monotonic()
            self._line(trainer, "validated")

    def _line(self, trainer: L.Trainer, remark: str) -> None:
        step, latest = trainer.global_step, self.speed.shown(self.log_of_metrics.latest)
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in latest.items())
        print(
            f"step {step}/{self.plan.total_steps} ({step / self.plan.total_steps:.0%})  "
            f"epoch {self.plan.epoch(step):.2f}  {metrics}  {remark}",
            flush=True,
        )
