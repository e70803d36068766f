"""What a task is: data, encoder, head, loss and metrics, behind one small interface.

B batch, L length, C channels of the input, O outputs
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # slow to import, and only tasks need it
    from torchmetrics import Metric


class Batch(NamedTuple):
    """One batch, ready for a `SequenceModel`.

    inputs: (B, L) int64 tokens or (B, L, C) float reals.
    targets: (B,) int64 classes, or (B, L, O) float values for every step.
    mask: (B, L) bool, True on real positions; None where no position is padding.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None


class Examples(Protocol):
    """A map-style data set of (inputs, targets) pairs of arrays without the batch dimension.

    inputs: (L,) integers or (L, C) floats; targets: a class, or (L, O) floats.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...

    @property
    def lengths(self) -> np.ndarray | None:
        """(len(self),) lengths of the sequences, by which batches may be bucketed; None if all are equal."""


class Splits(NamedTuple):
    """The three data sets of a task; `val` selects, `test` is read once."""

    train: Examples
    val: Examples
    test: Examples


class Task(ABC):
    """Data, encoder, head, loss and metrics of one problem. Names no model.

    Facts that models and the configuration may read are attributes: `seq_len`, the longest input a model
    must take, and `causal`, whether the prediction for step t may depend on inputs up to t alone.
    """

    seq_len: int
    causal: bool
    monitor: str  # the validation metric that selects checkpoints, one of `metrics()` or "loss"
    mode: Literal["min", "max"]

    @abstractmethod
    def prepare(self) -> None:
        """Build or check the data in the cache; called in one process before any `datasets()`."""

    @abstractmethod
    def datasets(self) -> Splits:
        """The prepared data; cheap, called in every process."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of everything that determines the data."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """What no model should be praised for: name → score of a trivial predictor in the monitored metric."""

    @abstractmethod
    def encoder(self, d_model: int) -> nn.Module:
        """Module (inputs) → (B, L, d_model)."""

    @abstractmethod
    def head(self, d_model: int) -> nn.Module:
        """Module (features (B, L, d_model), mask) → prediction."""

    @abstractmethod
    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The predictions and targets that count, flattened over padding: (n, ...) and (n, ...)."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean loss over what `scored` returned, a scalar."""

    @abstractmethod
    def metrics(self) -> "dict[str, Metric]":
        """Fresh metrics, updated with what `scored` returned."""

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """Examples padded on the right to the longest of the batch."""
        inputs, mask = pad([torch.as_tensor(np.asarray(x)) for x, _ in examples])
        targets = [torch.as_tensor(np.asarray(y)) for _, y in examples]
        stacked = torch.stack(targets) if targets[0].ndim == 0 else pad(targets)[0]
        as_batch = inputs if inputs.is_floating_point() else inputs.long()
        return Batch(as_batch, stacked if stacked.is_floating_point() else stacked.long(), mask)


@runtime_checkable
class KnowsImpulseResponse(Protocol):
    """A task of real inputs whose targets are those of a linear system that is known."""

    def impulse_response(self, length: int) -> np.ndarray:
        """The first responses of each target to a unit impulse at each input, (length, O, C)."""


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack (L_i, ...) tensors into (B, max L_i, ...), zeros on the right, and the mask of real positions.

    The mask is None where all lengths agree.
    """
    lengths = torch.tensor([len(x) for x in sequences])
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)  # (B, L, ...)
    if int(lengths.min()) == padded.shape[1]:
        return padded, None
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
