"""Copying: symbols are shown once, and are to be repeated, in the same order, at the end of the sequence.

L length, V vocabulary, S symbols to be copied, T steps between symbol and answer, n sequences

    copying      a b c _ _ _ _ _ _ > _ _ _      selective copying   _ a _ _ b _ _ c _ _ > > >
    asked for    . . . . . . . . . . a b c      asked for           . . . . . . . . . . a b c

Token 0 is the blank _, 1…V−2 are the symbols, all equally likely, V−1 is the marker >. The chance of a guess is
1/(V−2).

Sources: Hochreiter and Schmidhuber, "Long short-term memory" (Neural Computation 9, 1997), for the idea; Arjovsky et
al., "Unitary evolution recurrent neural networks" (1511.06464), for copying; Jing et al., "Gated orthogonal recurrent
units" (1706.02761), and Gu and Dao, "Mamba" (2312.00752), for selective copying, with one marker per answer as in the
code of S4 (state-spaces/s4).
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from data.memory.recall import IGNORE, RecallData
from data.store.synthetic import Integers, Reals, integers, subsets

BLANK = 0


@dataclass(frozen=True, kw_only=True)
class SymbolData(RecallData):
    """Blanks, S symbols and the marker."""

    num_symbols: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least("num_symbols", 1)
        self.require_least("vocab_size", 4, ": blank, marker and two symbols")

    @property
    def answers(self) -> range:
        """The symbols."""
        return range(1, self.vocab_size - 1)

    @property
    def num_answers(self) -> int:
        """S."""
        return self.num_symbols


@final
@dataclass(frozen=True, kw_only=True)
class CopyingData(SymbolData):
    """S symbols, T−1 blanks, the marker, and S blanks at which the symbols are asked for: L = T + 2S.

    V and S default to the source's. The source scores the blanks as well, so that its loss is ours times S/L once those
    are right, and that of a guess S ln(V−2) / L.
    """

    vocab_size: int = 10
    num_symbols: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least("seq_len", 2 * self.num_symbols + 1, ", 2 num_symbols + 1")

    @property
    def num_uniforms(self) -> int:
        """One per symbol, and so per answer."""
        return self.num_answers

    def generate(self, uniform: Reals) -> tuple[Integers, Integers]:
        """(n, S) → inputs and targets, (n, L) each."""
        symbols = 1 + integers(uniform, len(self.answers))
        inputs = np.full((len(uniform), self.seq_len), BLANK)
        targets = np.full_like(inputs, IGNORE)
        inputs[:, : self.num_symbols] = targets[:, -self.num_symbols :] = symbols
        inputs[:, -self.num_symbols - 1] = self.vocab_size - 1
        return inputs, targets


@final
@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingData(SymbolData):
    """S symbols at any S of the first L − S places, and blanks at the others; then S markers, which ask for them.

    Mamba has L = 4096 and V = S = 16, and does not say whether these L and V include the markers.
    """

    vocab_size: int = 16
    num_symbols: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least("seq_len", 2 * self.num_symbols, ", 2 num_symbols")

    @property
    def num_uniforms(self) -> int:
        """One per symbol and one per place."""
        return 2 * self.num_symbols

    def generate(self, uniform: Reals) -> tuple[Integers, Integers]:
        """(n, 2S) → inputs and targets, (n, L) each."""
        what, where = np.split(uniform, 2, axis=1)
        symbols = 1 + integers(what, len(self.answers))
        places = np.sort(subsets(where, self.seq_len - self.num_symbols))
        inputs = np.full((len(uniform), self.seq_len), BLANK)
        targets = np.full_like(inputs, IGNORE)
        np.put_along_axis(inputs, places, symbols, 1)
        inputs[:, -self.num_symbols :] = self.vocab_size - 1
        targets[:, -self.num_symbols :] = symbols
        return inputs, targets
