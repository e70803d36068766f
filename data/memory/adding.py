"""The adding problem: two numbers of a sequence are marked, and their sum is to be predicted at its end.

B batch, L length, n sequences

    numbers   .31 .77 .05 .92 .64 .18
    marks      0   1   0   0   1   0       target .77 + .64

Numbers are uniform in [0, 1]. One mark lies in the first ⌊L/2⌋ steps and one in the others, each step equally likely.
The best constant, 1, has a mean squared error of 1/6; a model that remembers one of the two numbers has 1/12.

Sources: Hochreiter and Schmidhuber, "Long short-term memory" (Neural Computation 9, 1997), for the idea; Le et al., "A
simple way to initialize recurrent networks of rectified linear units" (1504.00941), section 4.1, for the numbers;
Arjovsky et al., "Unitary evolution recurrent neural networks" (1511.06464), section 4.2, for the places.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from data.store.synthetic import Reals, SyntheticData, integers
from stu.encoders import LinearEncoder
from stu.heads import Pool
from stu.preprocessing import Numbers, Preprocessing
from stu.task import Regression


@final
@dataclass(frozen=True, kw_only=True)
class AddingData(SyntheticData):
    """Numbers and marks as two channels, and sums."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least("seq_len", 2, ": two numbers to add")

    @property
    def num_uniforms(self) -> int:
        """One per step and one per mark."""
        return self.seq_len + 2

    def generate(self, uniform: Reals) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
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
class Adding(Regression):
    """The sum of the two marked numbers, from the whole sequence; mean squared error."""

    def __init__(self, *, seq_len: int, causal: bool, pool: Pool, data: AddingData) -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data, d_output=1, pool=pool)
        self.preprocessing = Preprocessing(Numbers((0, 0), (1, 1)))

    def baselines(self) -> dict[str, float]:
        """Expected errors of the best constant, and of one of the two numbers plus the mean of the other."""
        return {"constant": 1 / 6, "one number": 1 / 12}

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, 2) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=2)
