"""Train a model on a task, or test a trained one: python train.py model=stu task=lra_listops. See --help."""

# ruff: noqa: E402
from stu.cli import output, threads, usage

output.guard()
usage.answer()  # --help, before the imports that take seconds
threads.wait_briefly()

import math
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from stu import SequenceModel, Task
from stu.cli import errors
from stu.cli.check import check
from stu.errors import require, require_length
from stu.training import MetricsCSV, MetricsLog, Run, SequenceData, SequenceModule, StepPlan, WandbLog, evaluate, report
from stu.training.cluster import part
from stu.training.memory import within_memory
from stu.training.plan import check_trainer, make_trainer
from stu.training.run import describe_device, run_name
from stu.training.signals import leaving


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
@errors.reports_errors
def main(config: DictConfig) -> float | None:
    """One run; returns its best monitored *validation* value, so that no sweep can select on the test set."""
    check(config)
    wandb: WandbLog = instantiate(config.logger)
    report.quiet()
    check_trainer(config.trainer, instantiate(config.trainer, _partial_=True), sweeping=errors.sweeping())
    job = HydraConfig.get()
    names = job.runtime.choices["task"], job.runtime.choices["model"]
    name = run_name(list(job.overrides.task)) if config.name is None else str(config.name)
    run = Run.named(Path(config.paths.runs, *names), name)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if config.mode == "test":
        with leaving():
            test(config, run, settings)
        return None
    run.overwrites = config.overwrite
    with report.exit_codes(run):
        # In a distributed run, another process may still see the run that the first one is about to delete.
        built = build(config) if config.overwrite or not run.finished else None
        if not config.overwrite:
            run.check(settings)
        if built:
            train(config, run, settings, names, wandb, *built)
        report.result(run)
        return float(run.read_summary()["best"]["value"])


def build(config: DictConfig) -> tuple[Task, SequenceModel]:
    """The task, its data not yet prepared, and the model, initialised from the seed."""
    task: Task = instantiate(config.task)
    L.seed_everything(config.seed, verbose=False)
    with within_memory():
        backbone = instantiate(config.model)
        require(backbone.causal or not task.causal, "task.causal", True, "the model looks ahead; choose a causal one")
        model = SequenceModel(task.encoder(backbone.d_model), backbone, task.head(backbone.d_model))
    longest = (getattr(block.mixer, "seq_len", math.inf) for block in backbone.blocks)
    require_length(task.seq_len, min(backbone.longest, *longest))
    return task, model


def load_data(config: DictConfig, task: Task) -> SequenceData:
    """The task's data, generated or fetched unless they are in the cache, in the batches of the run's plan."""
    task.prepare()
    splits = task.datasets()
    plan = StepPlan.of_trainer(config.trainer, examples=len(splits.train), batch_size=config.loader.batch_size)
    return instantiate(config.loader, _partial_=True)(task, splits, plan, config.seed)


def train(
    config: DictConfig,
    run: Run,
    settings: dict[str, Any],
    names: tuple[str, str],
    wandb: WandbLog,
    task: Task,
    model: SequenceModel,
) -> None:
    """Fit, from the last checkpoint if there is one; test the best one; write the summary."""
    run.require_writable()  # before what takes long
    data = load_data(config, task)
    plan = data.plan
    baselines = {name: float(value) for name, value in task.baselines().items()}  # not after hours
    recipe = instantiate(config.optimizer)(model.named_parameters(), plan.total_steps)
    module = SequenceModule(model, task, recipe=recipe, seed=config.seed)
    log = MetricsLog(plan, batch_size=data.batch_size, every_n_steps=config.log_every)
    kept = run.checkpoints, plan, task.monitor, task.mode, log.every
    checkpoints = instantiate(config.checkpoints, _partial_=True)(*kept)
    figures = instantiate(config.figures, _partial_=True)(run.figures)
    metrics = MetricsCSV(run.metrics)
    trainer = make_trainer(
        instantiate(config.trainer, _partial_=True),
        callbacks=[figures, log, report.progress(plan, log), checkpoints],
        logger=[metrics, wandb],
        default_root_dir=run.checkpoints,
    )
    data.require_enough(trainer.world_size)
    data.require_batches(config.trainer, trainer.world_size, "val", "test")
    facts = report.facts(module, plan)
    run.open(settings, overwrite=config.overwrite, data=facts["data"])  # last: what is refused changes no directory
    run.mend()
    wandb.start(run, names)
    device = describe_device(trainer.strategy.root_device)
    run.remarks += metrics.rewind(run.last_step)
    run.record_start(device=device, seed=config.seed, **facts)
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)
    report.start(run, names, data, module, recipe.groups, device=device, precision=config.trainer.precision)
    trainer.fit(module, data, ckpt_path=run.resumes_from, weights_only=True)
    evaluate.finish(run, trainer, module, data, checkpoints, baselines)


def test(config: DictConfig, run: Run, settings: dict[str, Any]) -> None:
    """Evaluate a checkpoint on the test set and show the result; nothing is written."""
    task, model = build(config)
    module = SequenceModule(model, task, seed=config.seed)
    checkpoint = evaluate.restore(module, run, config.checkpoint, settings)
    data = load_data(config, task)
    make, callbacks = instantiate(config.trainer, _partial_=True), [report.evaluation_progress()]
    trainer = make_trainer(make, logger=False, callbacks=callbacks, default_root_dir=run.checkpoints)
    data.require_batches(config.trainer, trainer.world_size, "test")
    device = describe_device(trainer.strategy.root_device)
    evaluate.compare_conditions(checkpoint, config.checkpoint, task.fingerprint(), device)
    trainer.test(module, data, verbose=False)
    part(trainer)
    report.tested(checkpoint, module.evaluated, task)


if __name__ == "__main__":
    errors.run(main)
