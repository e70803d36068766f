"""Associative recall: the value that belongs to a key is to be said when the key comes again.

L length, V vocabulary, P pairs, Q keys, n sequences

    inputs       a 2 c 4 b 3 a 2 > c
    asked for    . . . . . . . . . 4

Token 0 is the delimiter >, 1…Q are the keys, Q = ⌊(V−1)/2⌋, the others the values. Every sequence gives each key a
value, any, and keeps to it. A guess is right once in ⌈(V−1)/2⌉ times.

Sources: Ba et al., "Using fast weights to attend to the recent past" (1610.06258), for the idea; Fu et al., "Hungry
hungry hippos" (2212.14052), for the task. Their code, HazyResearch/safari, has 20 tokens from a vocabulary of 10, or 40
from 20, and trains on every next token; here only the answer counts.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from data.recall import IGNORE, RecallData
from data.synthetic import Integers, Reals, integers
from stu.errors import require

DELIMITER = 0


@final
@dataclass(frozen=True, kw_only=True)
class AssociativeRecallData(RecallData):
    """P = ⌊L/2⌋ − 1 pairs of any keys, the delimiter, twice where L is odd, and a key to be answered.

    That key is one of those that came before, each as likely as the other however often it came.
    """

    vocab_size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seq_len >= 4, "seq_len", self.seq_len, "must be at least 4: key, value, delimiter, key")
        allowed = "must be at least 5: delimiter, two keys and two values"
        require(self.vocab_size >= 5, "vocab_size", self.vocab_size, allowed)

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
    def numbers(self) -> int:
        """One for each pair's key, one for each key's value, one for each key's rank among those to be asked for."""
        return self.num_pairs + 2 * self.num_keys

    def make(self, uniform: Reals) -> tuple[Integers, Integers]:
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
