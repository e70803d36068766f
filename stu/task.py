"""A task: data, encoder, head, loss and metrics, behind one small interface.

B batch, L length, C input channels, O outputs, H steps of a rollout
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from stu.errors import OptionError, require
from stu.heads import Pool, PooledHead, StepHead
from stu.ops.padding import real_first
from stu.preconditioning import TRIVIAL, Preconditioner, errors_with_past
from stu.preprocessing import Preprocessing
from stu.resources import require_memory

if TYPE_CHECKING:  # slow to import, and only training needs it
    from torchmetrics import Metric


class Batch(NamedTuple):
    """One batch, ready for a `SequenceModel`.

    inputs: (B, L) int64 tokens or (B, L, C) float reals.
    targets: (B,) int64 classes or float values, (B, O) float values, (B, L) int64 tokens, or (B, L, O) float values for
    every step.
    mask: (B, L) bool, True on real positions; None where no position is padding.
    num_real: how many positions are real, where there is a mask: known before the batch goes to a GPU, so that what is
    selected there (`scored_steps`) has a known size. None: not counted.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None
    num_real: int | None = None


class Examples(Protocol):
    """A map-style data set of (inputs, targets) pairs of arrays without the batch dimension.

    inputs: (L,) integers or (L, C) floats; targets: a class, a real or (O,), or at every step, (L,) tokens or (L, O).
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


class Data(ABC):
    """The examples of a task: prepared once, then read by every process.

    seq_len: the length of a sequence, or the most that is kept of it; None where the data do not fix one.
    """

    seq_len: int | None

    @abstractmethod
    def prepare(self) -> object:
        """Build the data in the cache unless they are there; called in one process before any `splits()`."""

    @abstractmethod
    def examples(self, split: str) -> Examples:
        """Those of train, val or test, memory-mapped or generated on demand: cheap, called in every process."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of everything that determines the data."""

    def at_length(self, seq_len: int) -> "Data":
        """The same data with sequences of another length, to test on; its units are those of these data.

        Raises `OptionError` where the sequences have a length of their own, or cannot have this one.
        """
        allowed = "the sequences of this task have a length of their own"
        require(self.seq_len is not None and is_dataclass(self), "seq_len", seq_len, allowed)
        return replace(self, seq_len=seq_len)  # type: ignore[type-var]  # is_dataclass has just said so

    def splits(self) -> Splits:
        """The three data sets."""
        return Splits(*map(self.examples, Splits._fields))

    def require_least(self, name: str, least: int, why: str = "") -> None:
        """Raise `OptionError` unless the option `name` is at least `least`. why: the end of the message."""
        require(getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}{why}")

    def require_at_least(self, **least: int) -> None:
        """Raise `OptionError` unless each of these options is at least so much."""
        for name, number in least.items():
            self.require_least(name, number)

    def require_memory(self, size: float, *names: str, why: str = "") -> None:
        """Raise `OptionError` for the largest of the options `names` where `size` bytes exceed the memory."""
        require_memory(size, {name: getattr(self, name) for name in names}, why)


class Rollout(NamedTuple):
    """How models are tested on their own predictions: they continue a sequence step by step.

    The target of a step is then the first O channels of the next input; other channels are known beforehand.
    context: steps given first. horizon: H, steps predicted; context + horizon is at most one more than the steps of a
    sequence. metrics: makes fresh metrics, updated with predictions and targets (B, H, O).
    """

    context: int
    horizon: int
    metrics: "Callable[[], dict[str, Metric]]"


class NextToken(NamedTuple):
    """Predictions are logits (B, L, V) of the next token at every step, so that a causal model continues a text.

    start: the token that stands before the first one; None: there is none, and only what has begun is continued.
    """

    start: int | None


class Task(ABC):
    """Data, encoder, head, loss and metrics of one problem. Names no model.

    seq_len: the longest input a model must take. causal: whether the prediction for step t may depend on inputs up to
    t alone. monitor: the validation metric that selects checkpoints, one of `metrics()` or "loss"; mode: whether
    smaller or larger is better.

    Seven optional members serve tests, figures, comparisons and predictions. trivial: the names of those baselines that
    a model has to beat; None: of all of them. rollout: models continue test sequences on their own predictions.
    image_shape: rows and columns of the image that an input sequence is. preprocessing: from what a user has to inputs,
    and from predictions back; known once the data are prepared. preconditioner: whose combination of outputs models
    predict, as `precondition` was told. next_token: models generate, token by token. forecasts: the target of a step is
    the first O channels of the next input, in the same units.

    Whoever makes a task may give it `test_lengths`: further lengths at which models are tested, see `at_length`.
    """

    monitor: str
    mode: Literal["min", "max"]
    trivial: tuple[str, ...] | None = None
    rollout: Rollout | None = None
    image_shape: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None
    preconditioner: Preconditioner | None = None
    next_token: NextToken | None = None
    forecasts: bool = False
    test_lengths: tuple[int, ...] = ()
    arguments: dict[str, Any]  # keywords of the constructor, to build the task again

    def __new__(cls, *inputs: Any, **options: Any) -> Self:
        """Keep the keywords of the constructor."""
        task = super().__new__(cls)
        task.arguments = options
        return task

    def __init__(self, *, seq_len: int, causal: bool, data: Data) -> None:
        same = data.seq_len is None or seq_len == data.seq_len
        require(same, "seq_len", seq_len, f"must be the data's, {data.seq_len}")
        require_memory(8 * seq_len, {"seq_len": seq_len})  # of one channel, in one batch of one sequence
        self.seq_len, self.causal, self.data = seq_len, causal, data

    def at_length(self, seq_len: int) -> "Task":
        """The same task with sequences of another length: built again with its other keywords, and no `test_lengths`.

        Raises `OptionError` where there is no such task.
        """
        other = type(self)(**self.arguments | {"seq_len": seq_len, "data": self.data.at_length(seq_len)})
        if self.preconditioner is not None:
            other.precondition(self.preconditioner)
        return other

    def facts(self) -> dict[str, Any]:
        """What there is to know of the task where its model is used without it, as plain data."""
        facts: dict[str, Any] = {"name": type(self).__name__, "seq_len": self.seq_len, "causal": self.causal}
        if self.next_token is not None:
            facts["next_token"] = self.next_token._asdict()
        if self.preconditioner is not None:
            facts["precondition"] = {**asdict(self.preconditioner), "inputs": self.forecasts}
        return facts

    def prepare(self) -> None:
        """Build or check the data in the cache; called in one process before any `datasets()`."""
        self.data.prepare()

    def datasets(self) -> Splits:
        """The prepared data; cheap, called in every process."""
        return self.data.splits()

    def fingerprint(self) -> str:
        """A hex digest of everything that determines the data."""
        return self.data.fingerprint()

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Name → score of a predictor that is not a model, in the monitored metric."""

    def references(self) -> dict[str, float]:
        """`baselines`, and where there is a preconditioner those that know the outputs before, as it does."""
        found = self.baselines()
        if self.preconditioner is not None:
            train, _, test = self.datasets()
            found = found | errors_with_past(self.preconditioner, train, test)
        return found

    def precondition(self, preconditioner: Preconditioner) -> None:
        """Let models predict a combination of outputs; degree 0 changes nothing.

        Raises `OptionError` unless targets are reals at every step.
        """
        if preconditioner.degree:
            self._precondition(preconditioner)

    def _precondition(self, preconditioner: Preconditioner) -> None:
        allowed = "needs real targets at every step, known before the next one is predicted; this task has others"
        raise OptionError("precondition", preconditioner.polynomial, allowed)

    def restored(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """What a model's prediction says of the targets themselves: the same, unless there is a preconditioner."""
        return prediction if self.preconditioner is None else prediction - self.preconditioner.past(targets)

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
        """Examples as a batch, padded on the right to the longest of them."""
        return collate(examples)

    def drawn(self, batch: Batch) -> Batch:
        """A batch, on its device, with what is random in it drawn anew, by PyTorch's generator that the step seeds."""
        return batch

    def impulse_response(self, length: int) -> np.ndarray | None:
        """The first `length` steps of the true impulse response, (length, O, C); None where there is none."""
        return None


class Classification(Task):
    """One label per sequence: a pooled linear head, cross-entropy, accuracy."""

    monitor = "accuracy"
    mode = "max"

    def __init__(self, *, seq_len: int, causal: bool, data: Data, num_classes: int, pool: Pool = "mean") -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data)
        self.num_classes, self.pool = num_classes, pool

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, num_classes)."""
        return PooledHead(d_model, d_output=self.num_classes, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every sequence: (B, num_classes) and (B,)."""
        return prediction, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> "dict[str, Metric]":
        """The share of correct labels, each sequence with the same weight."""
        return accuracy(self.num_classes)


class Regression(Task):
    """Real targets for every step or, with `pool`, for the sequence: a linear head, mean squared error.

    d_output: O. Targets are (B, L, O) floats; with `pool` (B, O), or (B,) where O = 1.
    """

    monitor = "mse"
    mode = "min"

    def __init__(self, *, seq_len: int, causal: bool, data: Data, d_output: int, pool: Pool | None = None) -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data)
        self.d_output, self.pool = d_output, pool

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, L, O), or (B, O) with `pool`."""
        if self.pool is None:
            return StepHead(d_model, d_output=self.d_output)
        return PooledHead(d_model, d_output=self.d_output, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every real step, (n, O) and (n, O), or every sequence in the shape of the targets."""
        if self.pool is not None:
            return prediction.view(batch.targets.shape), batch.targets
        return scored_steps(self.restored(prediction, batch.targets), batch), scored_steps(batch.targets, batch)

    def _precondition(self, preconditioner: Preconditioner) -> None:
        if self.pool is not None:
            super()._precondition(preconditioner)
        self.preconditioner = preconditioner
        if self.trivial is not None:
            self.trivial = (*self.trivial, *TRIVIAL)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over steps and outputs."""
        return nn.functional.mse_loss(prediction, target)

    def metrics(self) -> "dict[str, Metric]":
        """The mean squared error."""
        return squared_error()


def accuracy(num_classes: int) -> "dict[str, Metric]":
    """A fresh metric of predictions (n, num_classes): the share of correct ones."""
    from torchmetrics.classification import MulticlassAccuracy

    # checking the labels of every batch would make a GPU wait
    return {"accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False)}


def squared_error() -> "dict[str, Metric]":
    """A fresh metric of real predictions: their mean squared error."""
    from torchmetrics import MeanSquaredError

    return {"mse": MeanSquaredError()}


def scored_steps(x: Tensor, batch: Batch) -> Tensor:
    """The real steps of (B, L, …) one after the other, (n, …): x[batch.mask], which would wait for a GPU to count."""
    if batch.mask is None:
        return x.flatten(0, 1)
    return x.flatten(0, 1)[real_first(batch.mask.flatten().unsqueeze(0)).squeeze(0)[: num_real(batch)]]


def num_real(batch: Batch) -> int:
    """The real steps of a batch, for which a GPU is waited where the batch does not say it."""
    if batch.mask is None:
        return batch.inputs.shape[0] * batch.inputs.shape[1]
    return int(batch.mask.sum()) if batch.num_real is None else batch.num_real


def collate(examples: Sequence[tuple[Any, Any]]) -> Batch:
    """(inputs, targets) pairs as a batch, padded on the right to the longest sequence."""
    inputs, targets = zip(*examples, strict=True)
    stacked, mask = pad(inputs)
    return Batch(stacked, pad(targets)[0], mask, None if mask is None else sum(map(len, inputs)))


def pad(sequences: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Stack arrays (L_i, ...) into (B, max L_i, ...), zeros on the right, and the mask of real positions (B, L).

    Integers become int64. The mask is None where all lengths agree; arrays without a length are stacked only.
    """
    arrays = [np.asarray(x) for x in sequences]
    if len({x.shape for x in arrays}) == 1:  # several times as fast as padding
        stacked, mask = torch.from_numpy(np.stack(arrays)), None
    else:
        stacked = nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in arrays], batch_first=True)
        mask = torch.arange(stacked.shape[1]) < torch.tensor([len(x) for x in arrays])[:, None]
    return stacked if stacked.is_floating_point() else stacked.long(), mask
