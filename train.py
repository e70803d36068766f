"""Train a model on a task, or test what was trained: python train.py model=stu task=lra_listops. See --help."""

# ruff: noqa: E402
from conf import threads, usage

usage.answer()  # --help, before the imports that take seconds
threads.wait_briefly()

import math
import signal
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from conf import cli
from stu import SequenceModel, Task
from stu.errors import OptionError, require
from stu.training import (
    Checkpoints,
    Diverged,
    MetricsCSV,
    MetricsLog,
    Run,
    SequenceData,
    SequenceModule,
    StepPlan,
    Stopped,
    report,
)
from stu.training.data import require_divisible
from stu.training.loggers import close_wandb
from stu.training.run import describe_device, run_name


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
@cli.reports_errors
def main(config: DictConfig) -> float | None:
    """One run; returns its best monitored *validation* value, so that no sweep can select on the test set."""
    cli.check(config)
    report.quiet()
    job = HydraConfig.get()
    task, model = job.runtime.choices["task"], job.runtime.choices["model"]
    name = run_name(list(job.overrides.task)) if config.name is None else str(config.name)
    run = Run(Path(config.paths.runs) / task / model / name)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if config.mode == "test":
        test(config, run, settings)
        return None
    try:
        # a process beside the first may still see what the first is about to delete
        if config.overwrite or not run.finished:
            built = build(config)  # what cannot be built leaves no directory
            run.open(settings, overwrite=config.overwrite)
            train(config, run, settings, *built, tags=[task, model])
        else:
            run.open(settings, overwrite=False)
        report.result(run)
        return float(run.read_summary()["best"]["value"])
    except Stopped as stop:
        report.stopped(run, stop)
        raise SystemExit(128 + stop.signal_number) from None
    except (KeyboardInterrupt, SystemExit) as end:  # outside of training Lightning has its own way to end
        code = getattr(end, "code", 1)
        number = {None: signal.SIGTERM, 1: signal.SIGINT}.get(code) or code - 128
        report.stopped(run, Stopped(number, run.last_step))
        raise SystemExit(128 + number) from None
    except Diverged as error:
        report.diverged(run, error)
        run.record_failure(str(error))
        raise SystemExit(1) from None
    finally:
        close_wandb()
        run.close()


def build(config: DictConfig) -> tuple[Task, SequenceModel]:
    """The task, its data not yet prepared, and the model, drawn from the seed."""
    task: Task = instantiate(config.task)
    L.seed_everything(config.seed, verbose=False)
    backbone = instantiate(config.model)
    require(backbone.causal or not task.causal, "task.causal", True, "the model looks ahead; choose a causal one")
    return task, SequenceModel(task.encoder(backbone.d_model), backbone, task.head(backbone.d_model))


def load_data(config: DictConfig, task: Task) -> SequenceData:
    """The task's data, generated or fetched where they are not yet, and how long a run over them is."""
    task.prepare()
    data: SequenceData = instantiate(config.loader, _partial_=True)(task, seed=config.seed)
    limits = ("max_epochs", "max_steps", "val_check_interval", "accumulate_grad_batches")
    budget = {key: config.trainer[key] for key in limits}
    data.plan = StepPlan.make(examples=len(data.splits.train), batch_size=data.batch_size, **budget)
    return data


def make_trainer(config: DictConfig, **arguments: Any) -> L.Trainer:
    """Lightning's Trainer, what it refuses said in one line."""
    try:
        trainer: L.Trainer = instantiate(config.trainer, _partial_=True)(**StepPlan.trainer_arguments, **arguments)
    except (TypeError, ValueError, MisconfigurationException) as error:
        asked = {key: config.trainer[key] for key in ("accelerator", "devices", "strategy", "precision")}
        raise OptionError("trainer", asked, f"Lightning refuses this: {error}".partition("\n")[0]) from error
    return trainer


def train(
    config: DictConfig, run: Run, settings: dict[str, Any], task: Task, model: SequenceModel, *, tags: list[str]
) -> None:
    """Fit, from the last checkpoint on if there is one; test the best; write the summary."""
    data = load_data(config, task)
    plan = data.plan
    assert plan is not None
    optimizer = instantiate(config.optimizer)
    optimizer(model.named_parameters(), plan.total_steps)  # what is wrong with its groups shows before anything starts
    module = SequenceModule(model, task, optimizer=optimizer, total_steps=plan.total_steps, seed=config.seed)
    log = MetricsLog(plan, batch_size=data.batch_size, every_n_steps=config.log_every)
    checkpoints = instantiate(config.checkpoints, _partial_=True)(
        run.checkpoints, plan, monitor=task.monitor, mode=task.mode
    )
    pictures = instantiate(config.pictures, _partial_=True)(run.path / "pictures")
    rows = MetricsCSV(run.metrics)
    wandb = instantiate(config.logger)(
        directory=run.path, run_id=run.id, name=f"{tags[1]}/{run.path.name}", group=tags[0], default_tags=tags
    )
    trainer = make_trainer(
        config,
        callbacks=[pictures, log, report.progress(plan, log), checkpoints],
        logger=[rows, *([wandb] if wandb else [])],
        default_root_dir=run.path,
    )
    require_divisible(data.batch_size, plan, trainer.world_size)
    smallest = min(map(len, data.splits))
    require(smallest >= trainer.world_size, "devices", trainer.world_size, f"must be at most {smallest} (examples)")
    device = describe_device(trainer.strategy.root_device)
    run.record_start(
        device=device,
        seed=config.seed,
        data=task.fingerprint(),
        monitor=task.monitor,
        mode=task.mode,
        total_steps=plan.total_steps,
        parameters=report.count(model),
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)
    rows.rewind(run.last_step)
    report.start(run, tags, data, module, device=device, precision=config.trainer.precision)
    trainer.fit(module, data, ckpt_path=run.last if run.last.exists() else None, weights_only=True)
    finish(run, trainer, module, data, checkpoints)


def finish(run: Run, trainer: L.Trainer, module: SequenceModule, data: SequenceData, checkpoints: Checkpoints) -> None:
    """Read the test set once, with the best weights, after their validation value has come out again."""
    task, plan = module.task, checkpoints.plan
    if checkpoints.best_value is None:
        raise Diverged(f"no validation gave a finite {task.monitor}")
    module.load_state_dict(run.weights(run.best))
    trainer.validate(module, data, verbose=False)
    again, tolerance = module.evaluated, 1e-6 if module.device.type == "cpu" else 1e-2
    if not math.isclose(again[task.monitor], checkpoints.best_value, rel_tol=tolerance, abs_tol=tolerance):
        raise RuntimeError(f"{run.best} gave {again} after {checkpoints.best_value} in training: it was not restored")
    trainer.test(module, data, verbose=False)
    best: dict[str, Any] = {
        "metric": f"val/{task.monitor}",
        "value": checkpoints.best_value,
        "step": checkpoints.best_step,
    }
    summary = {
        "test": module.evaluated,
        "best": {**best, "epoch": plan.epoch(checkpoints.best_step), "val": again},
        "baselines": task.baselines(),
        "steps": plan.total_steps,
        "seconds": round(checkpoints.seconds_trained, 1),
        "parameters": report.count(module.model),
    }
    last = {f"test/{name}": value for name, value in module.evaluated.items()} | {
        f"best/val/{task.monitor}": best["value"]
    }
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": plan.epoch(plan.total_steps), **last}, step=plan.total_steps)
    run.finish(summary)
    trainer.strategy.barrier()  # every process reads it


def test(config: DictConfig, run: Run, settings: dict[str, Any]) -> None:
    """Evaluate a checkpoint on the test set and show the result; nothing is written."""
    checkpoint = Path(config.checkpoint) if config.checkpoint else run.best
    require(checkpoint.is_file(), "checkpoint", checkpoint, "no such file; train first, or name one")
    trained = Run(checkpoint.absolute().parent.parent)
    if trained.config.exists() and (changes := trained.changes(settings, within=("task", "model"))):
        others = f"was trained with other settings: {', '.join(changes)}"
        require(config.checkpoint is not None, "checkpoint", checkpoint, others + "; name it to test it all the same")
    else:
        others = ""
    task, model = build(config)
    data = load_data(config, task)
    module = SequenceModule(model, task, optimizer=instantiate(config.optimizer), total_steps=1, seed=config.seed)
    try:
        module.load_state_dict(run.weights(checkpoint))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise OptionError("checkpoint", checkpoint, f"belongs to another model or task: {first}") from error
    if others:
        report.note(f"{checkpoint} {others}")
    trainer = make_trainer(config, logger=False, enable_progress_bar=False)
    trainer.test(module, data, verbose=False)
    report.tested(checkpoint, module.evaluated, task)


if __name__ == "__main__":
    cli.run(main)
