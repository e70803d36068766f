"""Pretraining: the first phase of a run, on the task's own inputs; its weights are those that training begins with."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

from stu.backbone import SequenceModel
from stu.errors import require
from stu.files import sealed, write_atomically
from stu.pretraining import MaskedInputs, NextInputs, PredictedInputs, RealLoss
from stu.task import Task
from stu.training import report, states
from stu.training.fitting import Parts
from stu.training.loggers import MetricsCSV
from stu.training.run import Run, rank


@final
@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a run is pretrained, and how long: in optimiser steps and epochs, or, with neither, as long as it trains.

    objective: masked, hidden inputs are predicted from the others, a share `ratio` of them in spans; next, the
    next input at every step, by a causal model; or none. loss: of real inputs, l1 or mse; that of tokens is the
    cross-entropy. lr: the peak rate, None: the optimiser's.
    """

    objective: Literal["none", "masked", "next"] = "none"
    ratio: float = 0.5
    span: int = 1
    loss: RealLoss = "l1"
    max_steps: int = -1
    max_epochs: float | None = None
    lr: float | None = None

    def task(self, task: Task, model: SequenceModel) -> PredictedInputs:
        """What is learned from the inputs of a prepared task."""
        if self.objective == "masked":
            return MaskedInputs(task, model.encoder, ratio=self.ratio, span=self.span, loss=self.loss)
        return NextInputs(task, model.encoder, loss=self.loss)


class Phase:
    """The pretraining of a run, in `checkpoints/pretrain` and `pretrain.csv`, with what it takes to go on with it.

    It trains a copy of the model, which takes over the encoder and the backbone from the file of the best weights: so
    what follows depends on that file alone, wherever a run was stopped. A run that trains already needs no such phase.
    """

    def __init__(self, pretraining: Pretraining, parts: Parts, run: Run, task: Task, model: SequenceModel) -> None:
        self.run, self.model = run, model
        self.done = run.pretrained is not None and not run.overwrites
        self.task = pretraining.task(task, model)
        parts.seed_everything()  # its head is drawn, too
        self.metrics = MetricsCSV(run.pretrain_metrics)
        given = pretraining.max_steps != -1 or pretraining.max_epochs is not None
        limits = {"max_steps": pretraining.max_steps, "max_epochs": pretraining.max_epochs} if given else {}
        rates = {} if pretraining.lr is None else {"lr": pretraining.lr}
        network = self.task.model(copy.deepcopy(model))
        self.fitting = parts.fitting(self.task, network, run.pretraining, [self.metrics], limits=limits, rates=rates)
        self.baselines = {name: float(value) for name, value in self.task.baselines().items()}
        self.resumes_from = run.pretraining / states.LAST if run.pretrains and not run.overwrites else None

    def fit(self) -> None:
        """Pretrain, from the last checkpoint if there is one, and take over the best weights."""
        folder = self.run.pretraining
        for remark in states.mend(folder) if rank() == 0 else ():
            report.note(remark)
        if not self.done:
            step = states.latest_step(folder) if self.resumes_from else 0
            for remark in self.metrics.rewind(step):
                report.note(remark)
            report.phase(self.fitting.data.plan, self.task, self.baselines, step)
            self.fitting.fit(self.resumes_from)
            self._finish()
        weights = self.run.weights(folder / states.BEST)
        own = {name.removeprefix("model."): x for name, x in weights.items() if name.startswith("model.")}
        self.task.model(self.model).load_state_dict(own)
        del self.fitting  # a model, an optimiser, and examples on the device

    def _finish(self) -> None:
        checkpoints, trainer = self.fitting.checkpoints, self.fitting.trainer
        require(checkpoints.best_value is not None, "pretrain", self.run.path, "no validation gave a finite loss")
        summary: Mapping[str, Any] = {
            "loss": checkpoints.best_value,
            "step": checkpoints.best_step,
            "steps": trainer.global_step,
            "seconds": round(checkpoints.seconds_trained, 3),
            "baselines": self.baselines,
        }
        if trainer.is_global_zero:
            write_atomically(self.run.pretrain_summary, sealed(summary))
            states.tidy(self.run.pretraining)
        trainer.strategy.barrier()
