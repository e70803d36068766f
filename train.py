"""Train a model on a task, test it, let it write: python train.py model=stu task=lra_listops. See --help."""

# ruff: noqa: E402
from __future__ import annotations  # which name what is imported only when it trains

from stu.cli import output, threads, usage

output.guard()
usage.answer()  # --help, before the imports that take seconds
threads.wait_briefly()

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import stu
from stu import training
from stu.cli import errors
from stu.cli.check import check
from stu.cli.composition import build, command

sys.path.append(str(usage.CONF.parent / "experiments" / "sweep" / "plugin"))  # where Hydra looks for `hydra_plugins`


@command
@errors.reports_errors
def main(config: DictConfig) -> float | None:
    """One run; returns its best monitored *validation* value, so that no sweep can select on the test set."""
    check(config)
    loggers = {str(name): build(node) for name, node in config.logger.items()}
    training.report.quiet()
    training.check_trainer(config.trainer, build(config.trainer, _partial_=True), sweeping=errors.sweeping())
    choices: Any = OmegaConf.to_container(HydraConfig.get().runtime.choices)
    folder = Path(config.paths.runs, choices["task"], choices["model"])
    run = training.Run.named(folder, config.name, HydraConfig.get().overrides.task)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if config.mode != "train":
        with training.report.losses(run):
            (test if config.mode == "test" else generate)(config, run, settings)
        return None
    run.overwrites = config.overwrite
    with training.report.exit_codes(run):
        # In a distributed run, another process may still see the run that the first one is about to delete.
        built = task_and_model(config) if config.overwrite or not run.finished else None
        if not config.overwrite:
            run.check(settings)
        if built:
            train(config, run, settings, choices, loggers, *built)
        training.report.result(run)
        return float(run.read_summary()["best"]["value"])


def task_and_model(config: DictConfig) -> tuple[stu.Task, stu.SequenceModel]:
    """The task, its data not yet prepared, and the model, initialised from the seed."""
    task: stu.Task = build(config.task)
    training.seed_everything(config.seed)
    with training.within_memory():
        return task, training.model_for(task, build(config.model))


def load_data(config: DictConfig, task: stu.Task) -> training.SequenceData:
    """The task's data, generated or fetched unless they are in the cache, in the batches of the run's plan."""
    task.prepare()
    splits = task.datasets()
    examples, batch_size = len(splits.train), config.loader.batch_size
    plan = training.StepPlan.of_trainer(config.trainer, examples=examples, batch_size=batch_size)
    data: training.SequenceData = build(config.loader, _partial_=True)(task, splits, plan, config.seed)
    return data


def train(
    config: DictConfig,
    run: training.Run,
    settings: dict[str, Any],
    choices: dict[str, Any],
    loggers: dict[str, Any],
    task: stu.Task,
    model: stu.SequenceModel,
) -> None:
    """Fit, from the last checkpoint if there is one; test the best one; write the summary."""
    run.require_writable()  # before what takes long
    callbacks = {str(name): build(node) for name, node in config.callbacks.items()}
    training.check_callbacks(callbacks, config.trainer, task)
    data = load_data(config, task)
    plan = data.plan
    baselines = {name: float(value) for name, value in task.baselines().items()}  # not after hours
    recipe = build(config.optimizer)(model.named_parameters(), plan.total_steps)
    module = training.SequenceModule(model, task, recipe=recipe, seed=config.seed)
    log = training.MetricsLog(plan, batch_size=data.batch_size, every_n_steps=config.log_every)
    kept = run.checkpoints, plan, task.monitor, task.mode, log.every
    checkpoints = build(config.checkpoints, _partial_=True)(*kept)
    figures = build(config.figures, _partial_=True)(run.figures)
    metrics = training.MetricsCSV(run.metrics)
    trainer = training.make_trainer(
        build(config.trainer, _partial_=True),
        callbacks=[figures, log, training.report.progress(plan, log), *callbacks.values(), checkpoints],
        logger=[metrics, *loggers.values()],
        default_root_dir=run.checkpoints,
    )
    data.require_enough(trainer.world_size)
    data.require_batches(config.trainer, trainer.world_size, "val", "test")
    facts = training.report.facts(module, plan)
    run.open(settings, overwrite=config.overwrite, data=facts["data"])  # last: what is refused changes no directory
    run.mend()
    device = training.describe_device(trainer.strategy.root_device)
    run.remarks += metrics.rewind(run.last_step)
    run.record_start(device=device, world_size=trainer.world_size, seed=config.seed, **facts)
    for logger in trainer.loggers:
        if isinstance(logger, training.Tracker):
            logger.start(run, choices, baselines)
        logger.log_hyperparams(settings)
    training.report.start(run, data, module, recipe.groups, device=device, precision=config.trainer.precision)
    trainer.fit(module, data, ckpt_path=run.resumes_from, weights_only=True)
    training.evaluate.finish(run, trainer, module, data, checkpoints, baselines)


def test(config: DictConfig, run: training.Run, settings: dict[str, Any]) -> None:
    """Evaluate a checkpoint on the test set and show the result; nothing is written."""
    task, model = task_and_model(config)
    module = training.SequenceModule(model, task, seed=config.seed)
    checkpoint = training.evaluate.restore(module, run, config.checkpoint, settings)
    data = load_data(config, task)
    make, callbacks = build(config.trainer, _partial_=True), [training.report.evaluation_progress()]
    trainer = training.make_trainer(make, logger=False, callbacks=callbacks, default_root_dir=run.checkpoints)
    data.require_batches(config.trainer, trainer.world_size, "test")
    device = training.describe_device(trainer.strategy.root_device)
    training.evaluate.compare_conditions(module, checkpoint, config.checkpoint, device)
    trainer.test(module, data, verbose=False)
    training.part(trainer)
    training.report.tested(checkpoint, module.evaluated, task)


def generate(config: DictConfig, run: training.Run, settings: dict[str, Any]) -> None:
    """Continue a text by a checkpoint, on the standard output as it comes; how fast, on the standard error."""
    sampling, make = build(config.generate), build(config.trainer, _partial_=True)
    task, model = task_and_model(config)
    trainer = training.make_trainer(make, logger=False, default_root_dir=run.checkpoints)
    model = model.to(trainer.strategy.root_device).eval()
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    text = training.Continuation(task, model, prompt, sampling)
    training.evaluate.restore(training.SequenceModule(model, task), run, config.checkpoint, settings)
    if trainer.is_global_zero and output.stream(text):
        print(text.rate, file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
