"""After training: evaluate the best weights on the validation and test sets, write the summary; restore checkpoints."""

import math
from pathlib import Path
from typing import Any

import lightning as L

from stu.errors import OptionError, require
from stu.training.callbacks import Checkpoints, Diverged
from stu.training.data import SequenceData
from stu.training.module import SequenceModule
from stu.training.report import count, note
from stu.training.run import Run, conditions_now


def finish(run: Run, trainer: L.Trainer, module: SequenceModule, data: SequenceData, checkpoints: Checkpoints) -> None:
    """Read the test set once, with the best weights, after they have reproduced their validation value.

    Raises `Diverged` if no validation gave a finite value, `RuntimeError` if the weights do not reproduce it.
    """
    task, plan = module.task, checkpoints.plan
    if checkpoints.best_value is None:
        raise Diverged(f"no validation gave a finite {task.monitor}")
    module.load_state_dict(run.weights(run.best))
    validation = _validated(run, trainer, module, data, checkpoints.best_value)
    trainer.test(module, data, verbose=False)
    best = {"metric": f"val/{task.monitor}", "value": checkpoints.best_value, "step": checkpoints.best_step}
    summary: dict[str, Any] = {
        "test": module.evaluated,
        "best": {**best, "epoch": plan.epoch(checkpoints.best_step), "val": validation},
        "baselines": task.baselines(),
        "steps": plan.total_steps,
        "seconds": round(checkpoints.seconds_trained, 1),
        "parameters": count(module.model),
    }
    last = {f"test/{name}": value for name, value in module.evaluated.items()}
    last[f"best/val/{task.monitor}"] = checkpoints.best_value
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": plan.epoch(plan.total_steps), **last}, step=plan.total_steps)
        logger.save()
    run.finish(summary)
    trainer.strategy.barrier()  # every process reads it


def _validated(
    run: Run, trainer: L.Trainer, module: SequenceModule, data: SequenceData, expected: float
) -> dict[str, float]:
    """The validation metrics of the best weights, after checking that the monitored one is that of the training."""
    monitor = module.task.monitor
    trainer.validate(module, data, verbose=False)
    found, tolerance = module.evaluated, 1e-6 if module.device.type == "cpu" else 1e-2
    if not math.isclose(found[monitor], expected, rel_tol=tolerance, abs_tol=tolerance):
        raise RuntimeError(f"{run.best} gave {found} after {expected} in training: it was not restored")
    return found


def run_of(checkpoint: Path) -> Run:
    """The directory of the run that wrote a checkpoint."""
    return Run(checkpoint.absolute().parent.parent)


def compare_conditions(checkpoint: Path, given: str | None, data: str, device: str) -> None:
    """Note under which other conditions a checkpoint was trained than it is tested.

    Raises `OptionError` where it was trained on other data than those of fingerprint `data`, unless it was `given`.
    """
    trained = run_of(checkpoint)
    if other := trained.other_data(data):
        require(bool(given), "checkpoint", checkpoint, f"{other}; name it to test it anyway")
        note(f"{checkpoint} {other}")
    if conditions := trained.other_conditions(conditions_now(device)):
        note(f"{checkpoint} was trained under other conditions: {', '.join(conditions)}")


def restore(module: SequenceModule, run: Run, given: str | None, settings: dict[str, Any]) -> Path:
    """Load the weights of the checkpoint `given`, or else of the run's best, and return its path.

    Raises `OptionError` where there is no such checkpoint, where its weights do not fit, or where the task or the model
    of the run had other settings. Other settings of a checkpoint named by the user are only noted.
    """
    checkpoint = Path(given) if given else run.best
    require(checkpoint.is_file(), "checkpoint", checkpoint, "no such file; train first, or name one")
    trained = run_of(checkpoint)
    changes = trained.changes(settings, within=("task", "model")) if trained.settings else []
    if trained.trained and not trained.settings:
        changes = ["unknown, as config.yaml and manifest.json are absent or damaged"]
    difference = f"was trained with other settings: {', '.join(changes)}"
    same = not changes or bool(given)
    require(same, "checkpoint", checkpoint, f"{difference}; name it to test it anyway")
    try:
        module.load_state_dict(run.weights(checkpoint))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise OptionError("checkpoint", checkpoint, f"belongs to another model or task: {first}") from error
    if changes:
        note(f"{checkpoint} {difference}")
    return checkpoint
