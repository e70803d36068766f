"""After training: evaluate the best weights on the validation and test sets, write the summary; restore checkpoints."""

import math
import os
import statistics
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L

from stu.errors import OptionError, require
from stu.training import lengths, states
from stu.training.callbacks import Checkpoints, Diverged, highest_peak
from stu.training.cluster import part
from stu.training.data import SequenceData
from stu.training.module import SequenceModule
from stu.training.records import parse_row
from stu.training.report import count, note
from stu.training.run import Run, conditions_now
from stu.training.sharded import load_weights
from stu.training.trackers import log_summary


def finish(
    run: Run,
    trainer: L.Trainer,
    module: SequenceModule,
    data: SequenceData,
    checkpoints: Checkpoints,
    baselines: Mapping[str, float],
    others: Mapping[int, SequenceData],
) -> None:
    """Read the test set once, with the best weights: those of the file that says so, and those of `others` by length.

    Raises `Diverged` if no validation gave a finite value, `OptionError` if no file has the best weights any more.
    """
    task, plan = module.task, checkpoints.plan
    if checkpoints.best_value is None:
        raise Diverged(f"no validation gave a finite {task.monitor}")
    for remark in run.mend():
        note(remark)
    steps = trainer.global_step
    measured = _measured(run, trainer)
    trainer.strategy.barrier()
    kept, wanted = states.checked(run.best).best, states.Best(checkpoints.best_value, checkpoints.best_step)
    lost = f"the best weights are lost: {run.best.name} has those of step {kept.step:,}, not {wanted.step:,}"
    require(kept == wanted, "name", run.path, lost)
    load_weights(module, run.weights(run.best))
    trainer.validate(module, data, verbose=False)
    validation = module.evaluated
    tested = lengths.test(trainer, module, data, others)
    best = {"metric": f"val/{task.monitor}", "value": checkpoints.best_value, "step": checkpoints.best_step}
    summary: dict[str, Any] = {
        "test": tested,
        "best": {**best, "epoch": plan.epoch(checkpoints.best_step), "val": validation},
        "baselines": dict(baselines),
        **({} if task.trivial is None else {"trivial": [name for name in task.trivial if name in baselines]}),
        "steps": steps,
        "seconds": round(checkpoints.seconds_trained, 3),
        **measured,
        "parameters": count(module.model),
        **({} if run.pretrained is None else {"pretrain": run.pretrained}),
    }
    if steps < plan.total_steps:
        summary["stopped_early"] = getattr(trainer.early_stopping_callback, "why", "") or "a callback has asked for it"
    last = {f"test/{name}": value for name, value in tested.items()}
    last[f"best/val/{task.monitor}"] = checkpoints.best_value
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": plan.epoch(steps), **last}, step=steps)
        logger.save()
    if remark := _difference(trainer, validation[task.monitor], checkpoints.best_value):
        summary["note"] = f"val/{task.monitor} {remark}"
        note(summary["note"])
    if trainer.is_global_zero:
        states.tidy(run.checkpoints)
    run.finish(summary)
    for logger in trainer.loggers:
        log_summary(logger, summary)
    part(trainer)  # every process reads it


def _measured(run: Run, trainer: L.Trainer) -> dict[str, int]:
    """Median of the tokens per second, and peak memory in bytes, of all starts of a run, as `metrics.csv` has them."""
    highest = highest_peak(trainer)
    if not trainer.is_global_zero:
        return {}
    values: dict[str, list[float]] = {"time/tokens_per_second": [], "memory/peak_bytes": []}
    with suppress(OSError), run.metrics.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name = line.split(",", 3)[2:3]
            if name and name[0] in values and (row := parse_row(line)):  # damaged rows do not count
                values[name[0]].append(row[3])
    measured = {"peak_memory": int(max([highest, *values["memory/peak_bytes"]]))}
    if rates := values["time/tokens_per_second"]:
        measured["tokens_per_second"] = round(statistics.median(rates))
    return measured


def _difference(trainer: L.Trainer, found: float, expected: float) -> str:
    """What to say of a validation value that is another one than in training by more than rounding explains.

    The weights are the same to the last bit; but another machine, another number of devices or other kernels of a GPU
    may round in another way.
    """
    exact = trainer.strategy.root_device.type == "cpu" and trainer.precision in ("32-true", "64-true")
    tolerance = 1e-6 if exact else 1e-2
    if math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance):
        return ""
    return f"of the best weights is {found!r} now and was {expected!r} in training: another device or other versions?"


def run_of(checkpoint: Path) -> Run | None:
    """The directory of the run that wrote a checkpoint; None where there can be none, above it."""
    folder = checkpoint.absolute().parent.parent
    return Run(folder) if folder.name else None


def compare_conditions(module: SequenceModule, checkpoint: Path, given: str | None, device: str) -> None:
    """Note under which other conditions a checkpoint was trained than it is tested.

    Raises `OptionError` where it was trained on other data than the task's, unless it was `given`.
    """
    trained = run_of(checkpoint)
    if trained is None:
        return
    other = trained.other_data(module.task.fingerprint())
    if other := other or module.other_preprocessing(states.read(checkpoint, tensors=False)):
        require(bool(given), "checkpoint", checkpoint, f"{other}; name it to test it anyway")
        note(f"{checkpoint} {other}")
    if conditions := trained.other_conditions(conditions_now(device)):
        note(f"{checkpoint} was trained under other conditions: {', '.join(conditions)}")


def restore(module: SequenceModule, run: Run, given: str | None, settings: Mapping[str, Any]) -> Path:
    """Load the weights of the checkpoint `given`, or else of the run's best, and return its path.

    Raises `OptionError` where there is no such checkpoint, or none whole, where its weights do not fit, or where the
    task, the preconditioner or the model of the run had other settings. Those of a checkpoint that the user names are
    only noted, as are those that concern the test alone, such as the rate of the inputs.
    """
    checkpoint = Path(given) if given else _best(run)
    require(os.path.isfile(checkpoint), "checkpoint", checkpoint, "no such file; train first, or name one")
    trained = run_of(checkpoint)
    within = ("task", "model", "precondition")
    changes = trained.changes(settings, within) if trained and trained.settings else []
    if trained and trained.trained and not trained.settings:
        changes = ["unknown, as config.yaml and manifest.json are absent or damaged"]
    difference = f"was trained with other settings: {', '.join(changes)}"
    same = not any(map(Run.concerns_training, changes)) or bool(given)
    require(same, "checkpoint", checkpoint, f"{difference}; name it to test it anyway")
    try:
        module.load_state_dict(run.weights(checkpoint))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise OptionError("checkpoint", checkpoint, f"belongs to another model or task: {first}") from error
    if changes:
        note(f"{checkpoint} {difference}")
    return checkpoint


def _best(run: Run) -> Path:
    """The run's best checkpoint, or another file of the same weights where that one is damaged or missing."""
    if states.is_whole(run.best) or run.resumes_from is None:
        return run.best
    survey = states.Survey(run.checkpoints)
    damages = survey.damages or f"{run.best.name} is missing"
    if survey.best is None:
        others = "".join(f"; name another one, checkpoint={state.path}" for state in survey.whole[:1])
        raise OptionError("checkpoint", run.best, f"{damages}; no other file has the best weights{others}")
    note(f"{run.checkpoints}: {damages}; {survey.best.path.name} has the best weights, too, and is read")
    return survey.best.path
