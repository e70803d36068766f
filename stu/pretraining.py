"""Pretraining on a task's own inputs: some are hidden, or the next one is asked for; labels play no part.

B batch, L length, D model width, C channels, V vocabulary, n scored steps

Source: Amos, Berant and Gupta, "Never train from scratch: fair comparison of long-sequence models requires data-driven
priors" (2310.02980), section 3.1.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from stu.backbone import SequenceModel
from stu.errors import require
from stu.heads import StepHead
from stu.ops.padding import real_first
from stu.task import Batch, Examples, Splits, Task, accuracy, num_real, squared_error

if TYPE_CHECKING:  # slow to import, and only training needs it
    from torchmetrics import Metric

IGNORE = -100  # the target of a step that is not scored, of tokens; of reals it is NaN
HIDDEN = -1  # the token of a hidden step; of reals it is NaN
BASELINE_STEPS = 2**15  # that the baselines are fitted to, and tested on

RealLoss = Literal["l1", "mse"]


class PredictedInputs(Task):
    """A task with the inputs of another one, which are predicted: tokens by cross-entropy, reals by `loss`.

    What is scored are real steps alone, each with the same weight. encoder: of the task's inputs. Raises `OptionError`
    for inputs that cannot be predicted: of other shapes, or tokens whose encoder has no embedding.
    """

    monitor, mode = "loss", "min"

    def __init__(self, task: Task, encoder: nn.Module, *, loss: RealLoss = "l1") -> None:
        super().__init__(seq_len=task.seq_len, causal=task.causal, data=task.data)
        require(loss in get_args(RealLoss), "loss", loss, "must be l1 or mse")
        require(task.seq_len > 1, "seq_len", task.seq_len, "must be above 1: one input has no others to be told by")
        self.task, self.real_loss = task, loss
        inputs = task.collate([task.datasets().train[0]]).inputs
        self.tokens = not inputs.is_floating_point()
        tables = [module for module in encoder.modules() if isinstance(module, nn.Embedding)]
        fits = inputs.ndim == 2 and len(tables) > 0 if self.tokens else inputs.ndim == 3
        allowed = "needs inputs that are tokens (B, L) with an embedding, or reals (B, L, C)"
        require(fits, "pretrain", f"{inputs.dtype} {tuple(inputs.shape)}", allowed)
        self.outputs = tables[0].num_embeddings if self.tokens else inputs.shape[2]  # V or C

    def datasets(self) -> Splits:
        """Those of the task."""
        return self.task.datasets()

    def prepare(self) -> None:
        """Prepare those of the task."""
        self.task.prepare()

    def fingerprint(self) -> str:
        """That of the task."""
        return self.task.fingerprint()

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """As the task does it."""
        return self.task.collate(examples)

    def encoder(self, d_model: int) -> nn.Module:
        """A new one of the task's."""
        return self.task.encoder(d_model)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, D) → (B, L, V) or (B, L, C)."""
        return StepHead(d_model, d_output=self.outputs)

    def model(self, model: SequenceModel) -> SequenceModel:
        """The encoder and the backbone of a model, the same modules, before a head of its own."""
        return SequenceModel(model.encoder, model.backbone, self.head(model.backbone.d_model))

    @abstractmethod
    def drawn(self, batch: Batch) -> Batch:
        """The batch with what is to be predicted as its targets, and with `IGNORE` or NaN where nothing is."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """n, as far as it is known without waiting for a device."""

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The steps that are to be predicted: (n, V) and (n,), or (n, C) and (n, C)."""
        targets = batch.targets.flatten(0, 1)
        asked = targets != IGNORE if self.tokens else ~targets[:, 0].isnan()
        steps = real_first(asked.unsqueeze(0)).squeeze(0)[: self.count(batch)]  # indexing with `asked` waits for a GPU
        return prediction.flatten(0, 1)[steps], targets[steps]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean over what is scored; 0 where nothing is, as of sequences of one step."""
        losses: dict[str, Callable[..., Tensor]] = {"l1": nn.functional.l1_loss, "mse": nn.functional.mse_loss}
        loss = nn.functional.cross_entropy if self.tokens else losses[self.real_loss]
        return loss(prediction, target, reduction="sum") / max(1, target.numel())

    def metrics(self) -> "dict[str, Metric]":
        """The share of correct tokens, or the mean squared error."""
        return accuracy(self.outputs) if self.tokens else squared_error()

    def baselines(self) -> dict[str, float]:
        """The loss of the frequencies of tokens, or of each channel's median or mean, in the training data."""
        splits = self.datasets()
        known, asked = (torch.cat(self.first(split)) for split in (splits.train, splits.val))
        if self.tokens:
            counts = torch.bincount(known, minlength=self.outputs) + 1.0
            return {"frequencies": float(-(counts / counts.sum()).log()[asked].mean())}
        center = known.median(0).values if self.real_loss == "l1" else known.mean(0)
        return {"constant": float(self.loss(center.expand_as(asked), asked))}

    def first(self, examples: Examples) -> list[Tensor]:
        """The inputs of the first examples, each sequence without its padding."""
        count = min(len(examples), max(1, BASELINE_STEPS // self.seq_len))
        batch = self.collate([examples[index] for index in range(count)])
        if batch.mask is None:
            return list(batch.inputs)
        return [inputs[mask] for inputs, mask in zip(batch.inputs, batch.mask, strict=True)]


@final
class MaskedInputs(PredictedInputs):
    """A share of the real steps of a batch is hidden, and predicted from the others.

    ratio: of them. span: steps that are hidden together, where the end of a sequence does not cut them. They are drawn
    anew whenever a batch is: by PyTorch's generator, which the step seeds. An encoder sees a learned vector there.
    """

    def __init__(
        self, task: Task, encoder: nn.Module, *, ratio: float = 0.5, span: int = 1, loss: RealLoss = "l1"
    ) -> None:
        super().__init__(task, encoder, loss=loss)
        require(0 < ratio < 1, "ratio", ratio, "must be above 0 and below 1")
        require(1 <= span <= task.seq_len, "span", span, f"must be in 1 … {task.seq_len}")
        self.ratio, self.span = ratio, span

    def model(self, model: SequenceModel) -> SequenceModel:
        """With an encoder that knows what is hidden."""
        return super().model(
            SequenceModel(HidingEncoder(model.encoder, model.backbone.d_model), model.backbone, model.head)
        )

    def drawn(self, batch: Batch) -> Batch:
        """Hide steps of the inputs, and ask for them."""
        rows, length = batch.inputs.shape[:2]
        shift = int(torch.randint(self.span, ()))
        blocks = torch.rand(rows, -(-(length + shift) // self.span), device=batch.inputs.device)
        keys = blocks.repeat_interleave(self.span, 1)[:, shift : shift + length]  # those of a span are equal
        if batch.mask is not None:
            keys = keys.masked_fill(~batch.mask, 2.0)
        chosen = keys.flatten().argsort(stable=True)[: self.count(batch)]
        hidden = torch.zeros(rows * length, dtype=torch.bool, device=keys.device)
        hidden = hidden.scatter(0, chosen, torch.ones_like(chosen, dtype=torch.bool)).view(rows, length)
        if self.tokens:
            inputs, targets = batch.inputs.masked_fill(hidden, HIDDEN), batch.inputs.masked_fill(~hidden, IGNORE)
        else:
            inputs, targets = (batch.inputs.masked_fill(x.unsqueeze(2), math.nan) for x in (hidden, ~hidden))
        return batch._replace(inputs=inputs, targets=targets)

    def count(self, batch: Batch) -> int:
        """The share of the real steps."""
        return max(1, round(self.ratio * num_real(batch)))


@final
class NextInputs(PredictedInputs):
    """The next input is predicted at every step but the last of a sequence, by a causal model."""

    def model(self, model: SequenceModel) -> SequenceModel:
        """Raises `OptionError` where the model looks ahead."""
        allowed = "needs a causal model, and this one looks ahead; choose task.causal=true, or pretrain=masked"
        require(model.backbone.causal, "pretrain", "next", allowed)
        return super().model(model)

    def drawn(self, batch: Batch) -> Batch:
        """Ask for the next input of every step."""
        nothing = IGNORE if self.tokens else math.nan
        targets = torch.full_like(batch.inputs, nothing)
        targets[:, :-1] = batch.inputs[:, 1:]
        if batch.mask is not None:
            after = nn.functional.pad(batch.mask[:, 1:], (0, 1))  # whether the next step is real
            targets = targets.masked_fill(~(after if self.tokens else after.unsqueeze(2)), nothing)
        return batch._replace(targets=targets)

    def count(self, batch: Batch) -> int:
        """The real steps but one of every sequence."""
        return num_real(batch) - len(batch.inputs)

    def baselines(self) -> dict[str, float]:
        """And, of reals, the loss of the input itself."""
        if self.tokens:
            return super().baselines()
        pairs = [(x[:-1], x[1:]) for x in self.first(self.datasets().val)]
        before, after = (torch.cat(side) for side in zip(*pairs, strict=True))
        return super().baselines() | {"repetition": float(self.loss(before, after))}


class HidingEncoder(nn.Module):
    """An encoder of inputs of which some are hidden: there it gives a learned vector."""

    def __init__(self, encoder: nn.Module, d_model: int) -> None:
        super().__init__()
        self.encoder, self.hidden = encoder, nn.Parameter(torch.empty(d_model))
        nn.init.normal_(self.hidden, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L) with `HIDDEN`, or (B, L, C) with NaN, → (B, L, D)."""
        if inputs.is_floating_point():
            hidden, inputs = inputs.isnan().any(2), inputs.nan_to_num()
        else:
            hidden, inputs = inputs == HIDDEN, inputs.clamp_min(0)
        x = self.encoder(inputs)
        return torch.where(hidden.unsqueeze(2), self.hidden.to(x.dtype), x)
