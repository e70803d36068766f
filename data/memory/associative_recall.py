"""Associative recall: the value that belongs to a key is to be predicted when the key appears again.

L length, V vocabulary, P pairs, Q keys, n sequences

    inputs       a 2 c 4 b 3 a 2 > c
    asked for    . . . . . . . . . 4

Token 0 is the delimiter >, 1…Q are the keys, Q = ⌊(V−1)/2⌋, the others the values. Every sequence gives each key one
value, drawn at random. The chance of a guess is 1/⌈(V−1)/2⌉.

Sources: Ba et al., "Using fast weights to attend to the recent past" (1610.06258), for the idea; Fu et al., "Hungry
hungry hippos" (2212.14052), for the task. Their code, HazyResearch/safari, has 20 tokens from a vocabulary of 10, or 40
from 20, and trains on every next token; here only the answer is scored.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from data.memory.recall import IGNORE, RecallData
from data.store.synthetic import Integers, Reals, integers

DELIMITER = 0


@final
@dataclass(frozen=True, kw_only=True)
class AssociativeRecallData(RecallData):
    """P = ⌊L/2⌋ − 1 pairs with random keys, the delimiter, twice where L is odd, and the key that is asked for.

    That key is one of those that appeared before, all equally likely however often they appeared.
    """

    num_answers = 1

    vocab_size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least("seq_len", 4, ": key, value, delimiter, key")
        self.require_least("vocab_size", 5, ": delimiter, two keys and two values")

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.seq_len // 2 - 1

    @property
    def num_keys(self) -> int:
        """Q."""
        return (self.vocab_size - 1) // 2

    @property
    def answers(self) -> range:
        """The values."""
        return range(1 + self.num_keys, self.vocab_size)

    @property
    def num_uniforms(self) -> int:
        """One per pair for its key, and two per key: for its value, and for its rank among those to be asked for."""
        return self.num_pairs + 2 * self.num_keys

    def generate(self, uniform: Reals) -> tuple[Integers, Integers]:
        """(n, P + 2Q) → inputs and targets, (n, L) each."""
        which, value, rank = np.split(uniform, [self.num_pairs, self.num_pairs + self.num_keys], axis=1)
        keys = integers(which, self.num_keys)  # (n, P), from 0
        values = self.answers.start + integers(value, len(self.answers))  # (n, Q)
        came = np.zeros(values.shape, bool)
        np.put_along_axis(came, keys, True, 1)
        query = np.where(came, rank, -1.0).argmax(1)[:, None]  # (n, 1)

        inputs = np.full((len(uniform), self.seq_len), DELIMITER)
        targets = np.full_like(inputs, IGNORE)
        pairs = inputs[:, : 2 * self.num_pairs]
        pairs[:, 0::2], pairs[:, 1::2] = 1 + keys, np.take_along_axis(values, keys, 1)
        inputs[:, -1:], targets[:, -1:] = 1 + query, np.take_along_axis(values, query, 1)
        return inputs, targets
