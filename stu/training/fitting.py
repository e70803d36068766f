"""What a phase of a run is made of: data, module, callbacks and a Trainer, from the parts that were configured."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from stu.backbone import SequenceModel
from stu.task import Task
from stu.training import report
from stu.training.callbacks import Checkpoints, MetricsLog
from stu.training.data import SequenceData
from stu.training.module import SequenceModule, seed_everything
from stu.training.plan import StepPlan, make_trainer


@dataclass(frozen=True)
class Fitting:
    """A module, ready to be trained on its data."""

    data: SequenceData
    module: SequenceModule
    recipe: Any
    checkpoints: Checkpoints
    trainer: L.Trainer

    def fit(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint on if there is one."""
        self.trainer.fit(self.module, self.data, ckpt_path=checkpoint, weights_only=True)


@dataclass(frozen=True)
class Parts:
    """Constructors with what was configured of their arguments."""

    trainer: partial[L.Trainer]
    loader: partial[SequenceData]
    checkpoints: partial[Checkpoints]
    optimizer: partial[Any]
    batch_size: int
    seed: int
    log_every: int

    def seed_everything(self) -> None:
        """Fix what is drawn from now on."""
        seed_everything(self.seed)

    def data(self, task: Task, limits: Mapping[str, Any] | None = None) -> SequenceData:
        """The batches of a prepared task. limits: arguments of the Trainer that differ, about how long it trains."""
        splits = task.datasets()
        arguments = self.trainer.keywords | dict(limits or {})
        plan = StepPlan.of_trainer(arguments, examples=len(splits.train), batch_size=self.batch_size)
        return self.loader(task, splits, plan, self.seed)

    def fitting(
        self,
        task: Task,
        model: SequenceModel,
        folder: Path,
        loggers: Sequence[Logger],
        *,
        first: Sequence[Callback] = (),
        callbacks: Sequence[Callback] = (),
        limits: Mapping[str, Any] | None = None,
        rates: Mapping[str, Any] | None = None,
    ) -> Fitting:
        """All that trains a model on a prepared task, with checkpoints in a folder.

        first: callbacks before those of the log. rates: options of the optimiser that differ.
        """
        data = self.data(task, limits)
        plan = data.plan
        recipe = self.optimizer(model.named_parameters(), plan.total_steps, **dict(rates or {}))
        module = SequenceModule(model, task, recipe=recipe, seed=self.seed)
        log = MetricsLog(plan, batch_size=data.batch_size, every_n_steps=self.log_every)
        checkpoints = self.checkpoints(folder, plan, task.monitor, task.mode, log.every)
        trainer = make_trainer(
            copy.deepcopy(self.trainer),  # a strategy serves one Trainer
            callbacks=[*first, log, report.progress(plan, log), *callbacks, checkpoints],
            logger=list(loggers),
            default_root_dir=folder,
        )
        data.require_enough(trainer.world_size)
        data.require_batches(self.trainer.keywords, trainer.world_size, "val", "test")
        return Fitting(data, module, recipe, checkpoints, trainer)
