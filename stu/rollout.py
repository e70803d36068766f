"""Free runs: a causal model continues a sequence from its own predictions, one step at a time.

B batch, C inputs, O outputs, T steps given, H steps of the free run
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from stu.backbone import SequenceModel
from stu.task import Batch

if TYPE_CHECKING:  # slow to import, and only tasks need it
    from torchmetrics import Metric


@runtime_checkable
class FreeRunning(Protocol):
    """What a `Task` has besides, if its models are also to be tested in a free run.

    The target of a step is then the first O channels of the next input; other channels are known beforehand.
    context: T. horizon: H, with T + H at most one more than the steps of a sequence.
    """

    context: int
    horizon: int

    def rollout_metrics(self) -> "dict[str, Metric]":
        """Fresh metrics, updated with predictions and targets (B, H, O)."""


def rollout(model: SequenceModel, context: Tensor, horizon: int, known: Tensor | None = None) -> Tensor:
    """Predict H steps from inputs (B, T, C), each from the predictions before it → (B, H, O).

    The model is causal, in eval mode, and answers every step, as `StepHead` does. known: (B, H − 1 or more, C − O)
    further channels of the inputs behind the context; None: there are none.
    """
    features, state = model.backbone.prefill(model.encoder(context))
    predictions = [model.head(features[:, -1:], None)]  # (B, 1, O)
    for step in range(horizon - 1):
        inputs = predictions[-1].to(context.dtype)
        if known is not None:
            inputs = torch.cat((inputs, known[:, step : step + 1]), dim=2)  # (B, 1, C)
        features, state = model.backbone.step(model.encoder(inputs).squeeze(1), state)  # (B, D)
        predictions.append(model.head(features.unsqueeze(1), None))
    return torch.cat(predictions, dim=1)


def free_run(model: SequenceModel, batch: Batch, *, context: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Predictions and targets of the steps that follow the context, (B, H, O) each; sequences without padding."""
    assert batch.mask is None, "all sequences of a free run are equally long"
    stop = context + horizon - 1
    targets = batch.targets[:, context - 1 : stop]
    known = batch.inputs[:, context:stop, targets.shape[2] :]
    return rollout(model, batch.inputs[:, :context], horizon, known), targets
