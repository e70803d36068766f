"""The one LightningModule: any backbone on any task."""

from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric

from stu.backbone import SequenceModel
from stu.rollout import FreeRunning, free_run
from stu.task import Batch, Task


class MakeOptimizer(Protocol):
    """An optimiser and its schedule for a step budget, from the named parameters."""

    def __call__(self, named_parameters: Any, total_steps: int, /) -> tuple[Optimizer, LRScheduler]:
        """(name, parameter) pairs and the number of optimiser steps → optimiser and schedule."""


class SequenceModule(L.LightningModule):
    """Trains and evaluates a `SequenceModel` on a `Task`; metrics are exact over padding, devices and batch sizes."""

    def __init__(
        self, model: SequenceModel, task: Task, *, optimizer: MakeOptimizer, total_steps: int, seed: int
    ) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.make_optimizer, self.total_steps, self.seed = optimizer, total_steps, seed
        self.train_metrics = _metrics(task)
        self.train_metrics.apply(_persist)  # a resumed run goes on with half-filled metrics
        self.eval_metrics = _metrics(task)
        self.rollout_metrics = nn.ModuleDict(task.rollout_metrics() if isinstance(task, FreeRunning) else {})
        self.evaluated: dict[str, float] = {}  # what the last evaluation gave
        self.first_bad_batch: Tensor | None = None  # the batch whose loss was not finite; stays on the device

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prediction of the model."""
        return self.model(inputs, mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        # Whatever draws random numbers in this step (dropout) depends on the seed and the step alone.
        torch.manual_seed(_mix(self.seed, batch_idx, self.global_rank))
        loss = self._scored_step(batch, self.train_metrics)
        if self.first_bad_batch is None:
            self.first_bad_batch = torch.full((), -1, device=loss.device)
        bad = ~loss.detach().isfinite() & (self.first_bad_batch < 0)
        self.first_bad_batch = torch.where(bad, batch_idx, self.first_bad_batch)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of an evaluation."""
        self._scored_step(batch, self.eval_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of an evaluation, and those of free runs where the task has them."""
        self._scored_step(batch, self.eval_metrics)
        if isinstance(self.task, FreeRunning):
            prediction, target = free_run(self.model, batch, context=self.task.context, horizon=self.task.horizon)
            for metric in self.rollout_metrics.values():
                cast(Metric, metric).update(prediction.float(), target)

    def on_validation_epoch_start(self) -> None:
        """Begin afresh: an evaluation that was broken off leaves nothing behind."""
        _reset(self.eval_metrics)

    def on_test_epoch_start(self) -> None:
        """Begin afresh."""
        _reset(self.eval_metrics)
        _reset(self.rollout_metrics)

    def on_validation_epoch_end(self) -> None:
        """Keep the results."""
        self.evaluated = compute(self.eval_metrics)

    def on_test_epoch_end(self) -> None:
        """Keep the results."""
        self.evaluated = compute(self.eval_metrics) | compute(self.rollout_metrics)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule from the configured partial, the schedule stepped with the optimiser."""
        optimizer, schedule = self.make_optimizer(self.model.named_parameters(), self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _scored_step(self, batch: Batch, metrics: nn.ModuleDict) -> Tensor:
        prediction, target = self.task.scored(self.model(batch.inputs, batch.mask), batch)
        prediction = prediction.float() if prediction.dtype in (torch.bfloat16, torch.float16) else prediction
        loss = self.task.loss(prediction, target)
        for name, module in metrics.items():
            metric = cast(Metric, module)
            if name == "loss":
                # once per element: torchmetrics 1.9 overlooks `weight` where the nan strategy is "disable"
                metric.update(loss.detach().expand(len(target)))
            else:
                metric.update(prediction.detach(), target)
        return loss


def compute(metrics: nn.ModuleDict) -> dict[str, float]:
    """The value of every metric, over all devices; the metrics begin anew."""
    values = {name: float(cast(Metric, metric).compute()) for name, metric in metrics.items()}
    _reset(metrics)
    return values


def _reset(metrics: nn.ModuleDict) -> None:
    metrics.apply(lambda m: m.reset() if isinstance(m, Metric) else None)


def _metrics(task: Task) -> nn.ModuleDict:
    return nn.ModuleDict({"loss": MeanMetric(nan_strategy="disable"), **task.metrics()})


def _persist(module: nn.Module) -> None:
    if isinstance(module, Metric):
        module.persistent(True)


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, unlike for unlike numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
