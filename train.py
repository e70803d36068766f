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
    overrides = HydraConfig.get().overrides.task
    run = training.Run.named(folder, config.name, overrides, testing=config.mode != "train")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if config.mode != "train":
        with training.report.losses(run):
            if config.mode == "test":
                training.test(run, parts_of(config), *task_and_model(config), settings)
            else:
                generate(config, run, settings)
        return None
    run.overwrites = config.overwrite
    with training.report.exit_codes(run):
        # In a distributed run, another process may still see the run that the first one is about to delete.
        built = task_and_model(config) if config.overwrite or not run.finished else None
        if not config.overwrite:
            run.check(settings)
        if built:
            train(config, run, settings, choices, loggers, *built)
        training.report.result(run, config.task.test_lengths)
        return float(run.read_summary()["best"]["value"])


def task_and_model(config: DictConfig) -> tuple[stu.Task, stu.SequenceModel]:
    """The task, its data not yet prepared, and the model, initialised from the seed."""
    task: stu.Task = build(config.task)
    task.precondition(build(config.precondition))
    training.seed_everything(config.seed)
    with training.within_memory():
        return task, training.model_for(task, build(config.model))


def parts_of(config: DictConfig) -> training.Parts:
    """What a run is made of, as it is configured."""
    names = ("trainer", "loader", "checkpoints")
    made = {name: build(config[name], _partial_=True) for name in names}
    made |= {"optimizer": build(config.optimizer), "batch_size": config.loader.batch_size}
    return training.Parts(**made, seed=config.seed, log_every=config.log_every)


def train(
    config: DictConfig,
    run: training.Run,
    settings: dict[str, Any],
    choices: dict[str, Any],
    loggers: dict[str, Any],
    task: stu.Task,
    model: stu.SequenceModel,
) -> None:
    """Put together what is trained; then train it."""
    run.require_writable()  # before what takes long
    callbacks = {str(name): build(node) for name, node in config.callbacks.items()}
    training.check_callbacks(callbacks, config.trainer, task)
    task.prepare()
    parts, metrics = parts_of(config), training.MetricsCSV(run.metrics)
    figures = build(config.figures, _partial_=True)(run.figures)
    every = [metrics, *loggers.values()]
    fitting = parts.fitting(task, model, run.checkpoints, every, first=[figures], callbacks=[*callbacks.values()])
    pretrains = config.pretrain.objective != "none" and not run.resumes_from
    phase = training.Phase(build(config.pretrain), parts, run, task, model) if pretrains else None
    training.train(run, fitting, phase, metrics, settings, choices)


def generate(config: DictConfig, run: training.Run, settings: dict[str, Any]) -> None:
    """Continue a text by a checkpoint, on the standard output as it comes; how fast, on the standard error."""
    if training.rank() > 0:  # one process is enough
        return
    given = {"prompt": output.read() if config.prompt == "-" else config.prompt, "sampling": build(config.generate)}
    text = training.continued(run, parts_of(config), *task_and_model(config), **given, settings=settings)
    if output.stream(text):
        print(text.rate, file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
