"""The adding problem: two numbers of a sequence are marked, and their sum is to be said at its end.

B batch, L length, n sequences

    numbers   .31 .77 .05 .92 .64 .18
    marks      0   1   0   0   1   0       target .77 + .64

Numbers are uniform in [0, 1]. One mark lies in the first ⌊L/2⌋ steps and one in the others, each step equally likely.
The best constant, 1, has a mean squared error of 1/6; who remembers one of the two numbers gets 1/12.

Sources: Hochreiter and Schmidhuber, "Long short-term memory" (Neural Computation 9, 1997), for the idea; Le et al., "A
simple way to initialize recurrent networks of rectified linear units" (1504.00941), section 4.1, for the numbers;
Arjovsky et al., "Unitary evolution recurrent neural networks" (1511.06464), section 4.2, for the places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric

from data.synthetic import Example, Reals, SyntheticData, collate, integers
from stu.encoders import LinearEncoder
from stu.errors import require
from stu.heads import Pool, PooledHead
from stu.task import Batch, Splits, Task


@final
@dataclass(frozen=True, kw_only=True)
class AddingData(SyntheticData):
    """Numbers and marks as two channels, and sums."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seq_len >= 2, "seq_len", self.seq_len, "must be at least 2: two numbers to add")

    @property
    def numbers(self) -> int:
        """One for each step and one for each mark."""
        return self.seq_len + 2

    def make(self, uniform: Reals) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(n, L + 2) → inputs (n, L, 2) and targets (n,)."""
        half = self.seq_len // 2
        first = integers(uniform[:, -2], half)  # (n,)
        second = half + integers(uniform[:, -1], self.seq_len - half)
        rows = np.arange(len(uniform))
        inputs = np.zeros((len(uniform), self.seq_len, 2), np.float32)
        inputs[:, :, 0] = uniform[:, :-2]
        inputs[rows, first, 1] = inputs[rows, second, 1] = 1
        return inputs, inputs[rows, first, 0] + inputs[rows, second, 0]


@final
class Adding(Task):
    """The sum of the two marked numbers, from the whole sequence; mean squared error."""

    monitor = "mse"
    mode: Literal["min", "max"] = "min"

    def __init__(self, *, seq_len: int, causal: bool, pool: Pool, data: AddingData) -> None:
        require(seq_len == data.seq_len, "seq_len", seq_len, f"must be the data's, {data.seq_len}")
        self.seq_len, self.causal, self.data = seq_len, causal, data
        self.pool: Pool = pool

    def prepare(self) -> None:
        """Nothing is stored, and `AddingData` has checked its options."""

    def datasets(self) -> Splits:
        """(L, 2) float32 numbers and marks, and a float32 sum, computed on demand."""
        return self.data.splits()

    def fingerprint(self) -> str:
        """SHA-256, cut, of the options and the version of the data."""
        return self.data.fingerprint()

    def baselines(self) -> dict[str, float]:
        """Expected errors of the best constant, and of one of the two numbers plus the mean of the other."""
        return {"constant": 1 / 6, "one number": 1 / 12}

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, 2) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=2)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, 1)."""
        return PooledHead(d_model, d_output=1, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every sequence: (B,) and (B,)."""
        return prediction.squeeze(1), batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The error."""
        return {"mse": MeanSquaredError()}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """No padding: all sequences are equally long."""
        return collate(examples)
