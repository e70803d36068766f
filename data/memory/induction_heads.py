"""Induction heads: the symbol that followed the first trigger is to be repeated after the second.

L length, V vocabulary, n sequences

    inputs       d b a > c b d a b >
    asked for    . . . . . . . . . c

Token 0 is the trigger >, 1…V−1 are the symbols, all equally likely. The trigger stands at the end and at one
earlier place, any that leaves room for the answer. The chance of a guess is 1/(V−1).

Sources: Olsson et al., "In-context learning and induction heads" (2209.11895), for the idea; Fu et al., "Hungry hungry
hippos" (2212.14052), for the task; Gu and Dao, "Mamba" (2312.00752), for the sizes.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from data.memory.recall import IGNORE, RecallData
from data.store.synthetic import Integers, Reals, integers

TRIGGER = 0


@final
@dataclass(frozen=True, kw_only=True)
class InductionHeadsData(RecallData):
    """L−1 symbols, one of them replaced by the trigger, and the trigger again.

    Mamba is trained on L = 256 and tested on up to 2²⁰.
    """

    num_answers = 1

    vocab_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least("seq_len", 3, ": trigger, answer, trigger")
        self.require_least("vocab_size", 3, ": trigger and two symbols")

    @property
    def answers(self) -> range:
        """The symbols."""
        return range(1, self.vocab_size)

    @property
    def num_uniforms(self) -> int:
        """One per symbol and one for the place of the trigger."""
        return self.seq_len

    def generate(self, uniform: Reals) -> tuple[Integers, Integers]:
        """(n, L) → inputs and targets, (n, L) each."""
        rows = np.arange(len(uniform))
        place = integers(uniform[:, -1], self.seq_len - 2)  # (n,)
        inputs = 1 + integers(uniform, len(self.answers))
        inputs[rows, place] = inputs[:, -1] = TRIGGER
        targets = np.full_like(inputs, IGNORE)
        targets[:, -1] = inputs[rows, place + 1]
        return inputs, targets
