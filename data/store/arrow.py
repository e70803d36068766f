"""Arrow files: written under another name until they are complete, read in memory-mapped form."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from stu.files import replacing

END = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of a complete stream; without them it may end at any batch


@contextmanager
def arrow_file(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchStreamWriter]:
    """A writer of record batches to a new file, which is called `path` once it is complete and on the disk."""
    with (
        replacing(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        yield writer


def write_arrays(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Arrays (n, …) as the columns of one record batch; a row of more than one dimension becomes a flat list."""
    batch = pa.record_batch([_column(array) for array in columns.values()], names=list(columns))
    with arrow_file(path, batch.schema) as file:
        file.write_batch(batch)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The columns that `write_arrays` wrote: (n,) where rows are numbers, (n, size of a row) where they are lists."""
    table = table_of(path)
    return {name: _array(table.column(name)) for name in table.column_names}


def table_of(path: Path) -> pa.Table:
    """The memory-mapped table of an Arrow file."""
    return Dataset.from_file(str(path)).data


def rows_of(path: Path, *, validate: bool = False) -> int:
    """The number of rows of an Arrow file. validate: read all of it; raises `ValueError` unless it is whole."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        rows = 0
        for batch in batches:
            rows += batch.num_rows
            if validate:
                batch.validate(full=True)
        if validate:
            file.seek(max(0, file.size() - len(END)))
            if file.read() != END:
                raise ValueError("it has no end")
    return rows


def _column(array: np.ndarray) -> pa.Array:
    values = pa.array(array.reshape(-1))
    return values if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, array[0].size)


def _array(column: pa.ChunkedArray) -> np.ndarray:
    [chunk] = column.chunks
    nested = pa.types.is_fixed_size_list(chunk.type)
    return chunk.flatten().to_numpy().reshape(len(chunk), -1) if nested else chunk.to_numpy()
