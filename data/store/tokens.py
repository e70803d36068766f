"""Sequences of tokens in Arrow files: one byte per token, written in batches of `ROWS`, read in memory-mapped form.

n sequences, B batch, L length, V vocabulary
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import nn

from data.store.arrow import table_of
from data.store.stored import E_co, LabelledData, LabelledExamples, StoredClassification
from stu.encoders import TokenEncoder
from stu.errors import require
from stu.heads import Pool

BYTES = 257  # tokens of text: 0 is padding, b + 1 the byte b
ROWS = 1000  # sequences per Arrow record batch
SEQUENCE = pa.list_(pa.uint8())
SCHEMA = pa.schema({"tokens": SEQUENCE, "label": pa.uint8()})

Tokens = NDArray[np.uint8]


def list_array(flat: Tokens, lengths: NDArray[np.integer]) -> pa.ListArray:
    """The sequences that lie one after the other in `flat`, as a column."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, flat)


@final
class TokenColumn:
    """The sequences of a column that was written in batches of `ROWS`.

    runs: offsets and tokens of every batch. lengths: (n,).
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.runs = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks]
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self.runs])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Tokens:
        batch, row = divmod(range(len(self))[index], ROWS)
        offsets, tokens = self.runs[batch]
        return tokens[offsets[row] : offsets[row + 1]].copy()  # torch wants it writable

    @property
    def first_tokens(self) -> Tokens:
        """(n,) what each sequence starts with."""
        return np.concatenate([tokens[offsets[:-1]] for offsets, tokens in self.runs])

    def counts(self, num_tokens: int) -> NDArray[np.int64]:
        """How often each token occurs in each sequence, (n, num_tokens)."""
        return np.concatenate([_counts(np.diff(offsets), tokens, num_tokens) for offsets, tokens in self.runs])


def _counts(lengths: NDArray[np.integer], tokens: Tokens, num_tokens: int) -> NDArray[np.int64]:
    cells = np.repeat(np.arange(len(lengths)) * num_tokens, lengths) + tokens
    return np.bincount(cells, minlength=len(lengths) * num_tokens).reshape(-1, num_tokens)


@final
class TokenExamples(LabelledExamples):
    """The (tokens, label) pairs of a file of `SCHEMA`."""

    def __init__(self, path: Path) -> None:
        table = table_of(path)
        super().__init__(table.column("label").to_numpy(), path)
        self.tokens = TokenColumn(table.column("tokens"))
        self.lengths = self.tokens.lengths

    def __getitem__(self, index: int, /) -> tuple[Tokens, int]:
        return self.tokens[index], int(self.labels[index])


@dataclass(frozen=True, kw_only=True)
class TokenData(LabelledData[E_co]):
    """Stored sequences of the tokens 0 … num_tokens − 1, in one of `num_classes` classes."""

    num_tokens: ClassVar[int]


class TokenClassification(StoredClassification):
    """One label per sequence of tokens. vocab_size: V, rows of the embedding, as many as there are tokens or more."""

    data: TokenData[LabelledExamples]

    def __init__(
        self, *, seq_len: int, causal: bool, vocab_size: int, pool: Pool, data: TokenData[LabelledExamples]
    ) -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data, num_classes=data.num_classes, pool=pool)
        require(vocab_size >= data.num_tokens, "vocab_size", vocab_size, f"must be at least {data.num_tokens}")
        self.vocab_size = vocab_size

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L) → (B, L, d_model)."""
        return TokenEncoder(d_model, vocab_size=self.vocab_size)
