"""One start of a run, from what it is made of: all that can be refused, then training, the test and the summary."""

from collections.abc import Mapping
from typing import Any

from stu.backbone import SequenceModel
from stu.task import Task
from stu.training import evaluate, lengths, report
from stu.training.cluster import part
from stu.training.fitting import Fitting, Parts
from stu.training.loggers import MetricsCSV
from stu.training.module import SequenceModule
from stu.training.plan import make_trainer
from stu.training.pretrain import Phase
from stu.training.run import Run, describe_device
from stu.training.trackers import Tracker


def train(
    run: Run,
    fitting: Fitting,
    phase: Phase | None,
    metrics: MetricsCSV,
    settings: Mapping[str, Any],
    choices: Mapping[str, Any],
) -> None:
    """Pretrain where there is such a phase; fit, from the last checkpoint if there is one; test the best one.

    metrics: that of the Trainer's loggers which is `metrics.csv`. settings: the whole configuration. choices: the
    option of each group.
    """
    data, module, trainer = fitting.data, fitting.module, fitting.trainer
    others = lengths.at_lengths(data, module.model, settings["trainer"], trainer.world_size)
    baselines = {name: float(value) for name, value in module.task.references().items()}  # not after hours
    facts = report.facts(module, data.plan)
    # last: what is refused changes no directory
    run.open(settings, overwrite=settings["overwrite"], data=facts["data"])
    run.mend()
    device = describe_device(trainer.strategy.root_device)
    run.remarks += metrics.rewind(run.last_step)
    run.record_start(device=device, world_size=trainer.world_size, seed=module.seed, **facts)
    for logger in trainer.loggers:
        if isinstance(logger, Tracker):
            logger.start(run, choices, baselines)
        logger.log_hyperparams(settings)  # type: ignore[arg-type]  # a plain dictionary
    precision = settings["trainer"]["precision"]
    report.start(run, data, module, fitting.recipe.groups, device=device, precision=precision)
    if phase:
        phase.fit()
    fitting.fit(run.resumes_from)
    evaluate.finish(run, trainer, module, data, fitting.checkpoints, baselines, others)


def test(run: Run, parts: Parts, task: Task, model: SequenceModel, settings: Mapping[str, Any]) -> None:
    """Evaluate a checkpoint on the test set, at all lengths, and show the result; nothing is written."""
    given, arguments = settings["checkpoint"], settings["trainer"]
    module = SequenceModule(model, task, seed=parts.seed)
    checkpoint = evaluate.restore(module, run, given, settings)
    task.prepare()
    data, callbacks = parts.data(task), [report.evaluation_progress()]
    trainer = make_trainer(parts.trainer, logger=False, callbacks=callbacks, default_root_dir=run.checkpoints)
    data.require_tests(arguments, trainer.world_size)
    others = lengths.at_lengths(data, model, arguments, trainer.world_size)
    device = describe_device(trainer.strategy.root_device)
    evaluate.compare_conditions(module, checkpoint, given, device)
    tested = lengths.test(trainer, module, data, others)
    part(trainer)
    report.tested(checkpoint, tested, task)
