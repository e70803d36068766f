"""Rollouts: a causal model continues a sequence on its own predictions, one step at a time.

B batch, C inputs, O outputs, T steps of context, H steps of the rollout
"""

import torch
from torch import Tensor

from stu.backbone import SequenceModel
from stu.preconditioning import Preconditioner
from stu.task import Batch


def rollout(
    model: SequenceModel,
    context: Tensor,
    horizon: int,
    known: Tensor | None = None,
    preconditioner: Preconditioner | None = None,
) -> Tensor:
    """Predict H steps from inputs (B, T, C), each from the predictions before it → (B, H, O).

    The model is causal, in eval mode, and predicts every step, as with `StepHead`. known: (B, H − 1 or more, C − O)
    further channels of the inputs after the context; None: there are none. preconditioner: whose combination of outputs
    the model predicts; the outputs are those of the context, its first O channels from the second step on, and then
    the predictions.
    """
    features, state = model.backbone.prefill(model.encoder(context))
    predictions: list[Tensor] = []

    def add(prediction: Tensor) -> None:
        if preconditioner is not None:
            outputs = torch.cat((context[:, 1:, : prediction.shape[2]], *predictions), dim=1)
            prediction = prediction - preconditioner.next_past(outputs).unsqueeze(1)
        predictions.append(prediction)

    add(model.head(features[:, -1:], None))  # (B, 1, O)
    for step in range(horizon - 1):
        inputs = predictions[-1].to(context.dtype)
        if known is not None:
            inputs = torch.cat((inputs, known[:, step : step + 1]), dim=2)  # (B, 1, C)
        features, state = model.backbone.step(model.encoder(inputs).squeeze(1), state)  # (B, D)
        add(model.head(features.unsqueeze(1), None))
    return torch.cat(predictions, dim=1)


def batch_rollout(
    model: SequenceModel, batch: Batch, *, context: int, horizon: int, preconditioner: Preconditioner | None = None
) -> tuple[Tensor, Tensor]:
    """Predictions and targets of the H steps after the first T, (B, H, O) each, for sequences without padding."""
    assert batch.mask is None, "all sequences of a rollout are equally long"
    stop = context + horizon - 1
    targets = batch.targets[:, context - 1 : stop]
    known = batch.inputs[:, context:stop, targets.shape[2] :]
    return rollout(model, batch.inputs[:, :context], horizon, known, preconditioner), targets
