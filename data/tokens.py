"""Sequences of tokens in Arrow files: one byte a token, written in batches of `ROWS`, read in memory-mapped form."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

ROWS = 1000  # sequences in one Arrow record batch
SEQUENCE = pa.list_(pa.uint8())
SCHEMA = pa.schema({"tokens": SEQUENCE, "label": pa.uint8()})

Tokens = NDArray[np.uint8]


@contextmanager
def arrow_file(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchStreamWriter]:
    """A writer of record batches of `schema` to a new file."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        yield writer


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

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each sequence has each token, (n, vocab_size)."""
        return np.concatenate([_counts(np.diff(offsets), tokens, vocab_size) for offsets, tokens in self.runs])


@final
class TokenExamples:
    """The (tokens, label) pairs of a file of `SCHEMA`; pickled as its path.

    labels, lengths: (n,).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        table = Dataset.from_file(str(path)).data
        self.tokens = TokenColumn(table.column("tokens"))
        self.labels: Tokens = table.column("label").to_numpy()
        self.lengths = self.tokens.lengths

    def __reduce__(self) -> tuple[type["TokenExamples"], tuple[Path]]:
        return TokenExamples, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tokens, int]:
        return self.tokens[index], int(self.labels[index])


def _counts(lengths: NDArray[np.integer], tokens: Tokens, vocab_size: int) -> NDArray[np.int64]:
    cells = np.repeat(np.arange(len(lengths)) * vocab_size, lengths) + tokens
    return np.bincount(cells, minlength=len(lengths) * vocab_size).reshape(-1, vocab_size)
