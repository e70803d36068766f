"""The one LightningModule: any backbone on any task."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric

from stu.backbone import Backbone, SequenceModel
from stu.errors import OptionError, require, require_length
from stu.rollout import batch_rollout
from stu.task import Batch, Task
from stu.training.optim import NamedParameters
from stu.training.sharded import gathered


class Recipe(Protocol):
    """An optimiser with its schedule, checked against the parameters and the step budget, and yet to be built."""

    def build(self, named_parameters: NamedParameters, /) -> tuple[Optimizer, LRScheduler]:
        """The optimiser of these parameters, and its schedule, stepped once per optimiser step."""


class SequenceModule(L.LightningModule):
    """Trains and evaluates a `SequenceModel` on a `Task`; metrics are exact over padding, devices and batch sizes.

    recipe: how it is optimised; None for evaluation alone. seed: of whatever is random in a training step.
    """

    def __init__(self, model: SequenceModel, task: Task, *, recipe: Recipe | None = None, seed: int = 0) -> None:
        super().__init__()
        self.model, self.task, self.recipe, self.seed = model, task, recipe, seed
        self.train_metrics = _metrics(task)
        self.train_metrics.apply(_persist)  # a resumed run continues with half-filled metrics
        self.eval_metrics = _metrics(task)
        self.rollout_metrics = nn.ModuleDict(task.rollout.metrics() if task.rollout else {})
        require(
            task.monitor in self.eval_metrics, "monitor", task.monitor, f"must be one of {', '.join(self.eval_metrics)}"
        )
        self.evaluated: dict[str, float] = {}  # results of the last evaluation
        self.resized = False  # whether it is tested at another length now
        self.first_bad_batch: Tensor | None = None  # the batch whose loss was not finite; stays on the device
        self._evaluation = ExitStack()

    @contextmanager
    def at(self, task: Task) -> Iterator[None]:
        """Inside, evaluate on a task of another length, which the model may have to be resized for."""
        before, self.task, self.resized = self.task, task, True
        try:
            with self.model.backbone.resized(task.seq_len):
                yield
        finally:
            self.task, self.resized = before, False

    def configure_model(self) -> None:
        """Under `FullyShard`, divide each block over the devices, and what is around the blocks."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        allowed = "must be false where weights are divided: PyTorch does not compile blocks that gather theirs"
        require(not self.model.backbone.compiled, "compile", True, allowed)
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.backbone.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prediction of the model."""
        return self.model(inputs, mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self._scored_step(batch, batch_idx, self.train_metrics)
        if self.first_bad_batch is None:
            self.first_bad_batch = torch.full((), -1, device=loss.device)
        bad = ~loss.detach().isfinite() & (self.first_bad_batch < 0)
        self.first_bad_batch = torch.where(bad, batch_idx, self.first_bad_batch)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of an evaluation; before training, try all that the test will do."""
        if self._trainer is not None and self.trainer.sanity_checking:
            self.test_step(batch, batch_idx)
        else:
            self._scored_step(batch, batch_idx, self.eval_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of an evaluation, and those of rollouts where the task has them."""
        self._scored_step(batch, batch_idx, self.eval_metrics)
        if rollout := self.task.rollout:
            steps: dict[str, Any] = {"context": rollout.context, "horizon": rollout.horizon}
            prediction, target = batch_rollout(self.model, batch, preconditioner=self.task.preconditioner, **steps)
            for metric in self.rollout_metrics.values():
                cast(Metric, metric).update(prediction.float(), target)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: an interrupted evaluation leaves nothing in them."""
        self._evaluation.enter_context(gathered(self.model))
        _reset(self.eval_metrics)

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self._evaluation.enter_context(gathered(self.model))
        _reset(self.eval_metrics)
        _reset(self.rollout_metrics)

    def on_validation_epoch_end(self) -> None:
        """Keep the results."""
        self._evaluation.close()
        self.evaluated = compute(self.eval_metrics)

    def on_test_epoch_end(self) -> None:
        """Keep the results."""
        self._evaluation.close()
        self.evaluated = compute(self.eval_metrics) | compute(self.rollout_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what it takes to use the weights, and the half-filled metrics of every device.

        In the place of the first device's metrics are those of all together.
        """
        checkpoint["trained"] = self._trained()
        if self.trainer.world_size == 1:
            return
        every: list[Any] = [None] * self.trainer.world_size
        distributed.all_gather_object(every, dict(self.train_metrics.state_dict()))
        checkpoint["train_metrics"] = every
        with ExitStack() as together:
            for metric in self.train_metrics.values():
                together.enter_context(cast(Metric, metric).sync_context())
            checkpoint["state_dict"] |= self.train_metrics.state_dict(prefix="train_metrics.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with this device's metrics; on another number of devices, the first one goes on with those of all.

        Raises `OptionError` where the run was trained on inputs that were read in another way.
        """
        if other := self.other_preprocessing(checkpoint):
            raise OptionError("name", self.trainer.default_root_dir, f"{other}; choose another name")
        every, rank = checkpoint.get("train_metrics", ()), self.trainer.global_rank
        if len(every) == self.trainer.world_size:
            mine = every[rank]
        else:
            mine = self.train_metrics.state_dict() if rank > 0 else {}
        checkpoint["state_dict"] |= {f"train_metrics.{name}": value for name, value in mine.items()}

    def other_preprocessing(self, checkpoint: Mapping[str, Any]) -> str:
        """In words, that a checkpoint has another preprocessing than the task; empty where not, or not known."""
        before = checkpoint.get("trained", {}).get("preprocessing")
        differ = before is not None and before != self._trained()["preprocessing"]
        return "was trained on other data: their inputs or targets were read in another way" if differ else ""

    def _trained(self) -> dict[str, Any]:
        """How to build the model, how to read inputs, and facts of the task: plain data, see `stu.saved.loading`."""
        return {
            "model": self.model.description,
            "preprocessing": self.task.preprocessing and self.task.preprocessing.as_dict(),
            "task": self.task.facts(),
        }

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule, the schedule stepped with the optimiser."""
        assert self.recipe is not None, "a module without a recipe is for evaluation alone"
        optimizer, schedule = self.recipe.build(self.model.named_parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _scored_step(self, batch: Batch, batch_idx: int, metrics: nn.ModuleDict) -> Tensor:
        # Whatever is random in this step (dropout, hidden inputs) depends on the seed and the step alone.
        torch.manual_seed(_mix(self.seed, batch_idx, self.global_rank))
        batch = self.task.drawn(batch)
        prediction, target = self.task.scored(self.model(batch.inputs, batch.mask), batch)
        prediction = prediction.float() if prediction.dtype in (torch.bfloat16, torch.float16) else prediction
        loss = self.task.loss(prediction, target)
        for name, module in metrics.items() if len(target) else ():
            metric = cast(Metric, module)
            if name == "loss":
                # once per element: torchmetrics 1.9 ignores `weight` where the nan strategy is "disable"
                metric.update(loss.detach().expand(len(target)))
            else:
                metric.update(prediction.detach(), target)
        return loss


def model_for(task: Task, backbone: Backbone) -> SequenceModel:
    """A backbone between the encoder and the head of a task. Raises `OptionError` where they do not fit."""
    require(backbone.causal or not task.causal, "task.causal", True, "the model looks ahead; choose a causal one")
    require_length(task.seq_len, backbone.limit)
    return SequenceModel(task.encoder(backbone.d_model), backbone, task.head(backbone.d_model))


def seed_everything(seed: int) -> None:
    """Fix what Python, NumPy and PyTorch draw from now on."""
    L.seed_everything(seed, verbose=False)


def compute(metrics: nn.ModuleDict) -> dict[str, float]:
    """The value of every metric over all devices; the metrics are reset."""
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
    """One 63-bit seed from several numbers, different for different numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
