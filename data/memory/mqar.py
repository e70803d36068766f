"""Multi-query associative recall (MQAR): each of many keys appears again, and its value is to be predicted then.

L length, V vocabulary, P pairs, G gaps, n sequences

    inputs       2 8 4 7 0 0 4 0 0 0 0 0 2 0
    asked for    . . . . . . 7 . . . . . 8 .

Token 0 is the filler, 1…⌊V/2⌋−1 are the keys, the others the values. First come the pairs, of P different keys and P
different values, all choices equally likely. Then key i appears again at place 2P + 2g_i, its gap g_i one of 0…G−1,
G = ⌈L/2⌉ − P. The gaps are drawn in the order of the pairs, without replacement, g with weight (g+1)^(a−1): a power
law, like that of the distance between repeated bigrams in real text; a = 1 is uniform. The rest are fillers.

The chance of a guess among all values is 1/⌈V/2⌉, that of a guess among the values of the sequence 1/P. The first keys
tend to have the shortest gaps, so that the place of a query is a hint as well.

Source: Arora et al., "Zoology: measuring and improving recall in efficient language models" (2312.04927), and its
code, HazyResearch/zoology.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from data.memory.recall import IGNORE, RecallData
from data.store.synthetic import Integers, Reals, integers, shuffled, subsets
from stu.errors import require

FILLER = 0


def power_law(uniform: Reals, a: float, size: int) -> Integers:
    """The first `size` of 0…G−1, drawn without replacement with weights (g+1)^(a−1), from (n, G) → (n, size).

    Every item of weight w gets an exponential time of rate w; the order of these times is that of the draws.
    """
    weights = np.arange(1.0, uniform.shape[1] + 1) ** (a - 1)
    return (-np.log1p(-uniform) / weights).argsort(1)[:, :size]


@final
@dataclass(frozen=True, kw_only=True)
class MQARData(RecallData):
    """P pairs, and then one query per pair, among fillers.

    random_fillers: random tokens, keys and values included, instead of the filler; the paper's figures are without.
    """

    vocab_size: int = 8192
    num_kv_pairs: int = 16
    power_a: float = 0.01
    random_fillers: bool = False
    val: int = 3_000
    test: int = 3_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least("num_kv_pairs", 1)
        self.require_least("seq_len", 4 * self.num_kv_pairs - 1, ", 4 num_kv_pairs - 1")
        self.require_least("vocab_size", 2 * self.num_kv_pairs + 2, ", 2 num_kv_pairs + 2")
        require(0 < self.power_a <= 1, "power_a", self.power_a, "must be above 0 and at most 1")

    @property
    def num_gaps(self) -> int:
        """G."""
        return (self.seq_len + 1) // 2 - self.num_kv_pairs

    @property
    def answers(self) -> range:
        """The values."""
        return range(self.vocab_size // 2, self.vocab_size)

    @property
    def num_answers(self) -> int:
        """P."""
        return self.num_kv_pairs

    @property
    def num_uniforms(self) -> int:
        """Two per key and two per value, one per gap, and one per place if fillers are random."""
        return 4 * self.num_kv_pairs + self.num_gaps + self.random_fillers * self.seq_len

    def generate(self, uniform: Reals) -> tuple[Integers, Integers]:
        """(n, R) → inputs and targets, (n, L) each."""
        size = self.num_kv_pairs
        ends = np.cumsum([size, size, size, size, self.num_gaps])
        key, key_order, value, value_order, gap, filler = np.split(uniform, ends, axis=1)
        keys = 1 + shuffled(subsets(key, self.answers.start - 1), key_order)  # (n, P)
        values = self.answers.start + shuffled(subsets(value, len(self.answers)), value_order)
        places = 2 * size + 2 * power_law(gap, self.power_a, size)

        targets = np.full((len(uniform), self.seq_len), IGNORE)
        inputs = integers(filler, self.vocab_size) if self.random_fillers else np.full_like(targets, FILLER)
        pairs = inputs[:, : 2 * size]
        pairs[:, 0::2], pairs[:, 1::2] = keys, values
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(targets, places, values, 1)
        return inputs, targets
