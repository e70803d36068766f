"""Tables in binary files: parquet, Arrow, npz, npy, and the folders that `save_to_disk` of `datasets` writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stu.errors import require

if TYPE_CHECKING:  # slow to import, and only who reads tables has it
    import pyarrow as pa

END = b"\xff\xff\xff\xff\0\0\0\0"  # of a complete Arrow stream; without them it may end at any batch


def from_parquet(path: Path) -> "pa.Table":
    """A parquet file, whatever the folders are called that it is in."""
    from pyarrow import parquet

    return _plain(parquet.read_table(path, partitioning=None))


def from_arrow(path: Path) -> "pa.Table":
    """An Arrow file, also called Feather, or a stream."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            table = pa.ipc.open_file(file).read_all()
        else:
            file.seek(max(0, file.size() - len(END)))
            require(file.read() == END, "source", str(path), "is damaged: it has no end")
            file.seek(0)
            table = pa.ipc.open_stream(file).read_all()
    table.validate(full=True)
    return _plain(table)


def from_npz(path: Path) -> "pa.Table":
    """Arrays of one length, each a column."""
    import pyarrow as pa

    with np.load(path, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    require(bool(columns), "source", str(path), "has no arrays")
    for name, array in columns.items():
        require(array.ndim > 0, "source", str(path), f"{name} is a single number, must be an array (rows, …)")
    rows = {name: len(array) for name, array in columns.items()}
    allowed = f"has arrays of different lengths: {', '.join(f'{name} {size}' for name, size in rows.items())}"
    require(len(set(rows.values())) == 1, "source", str(path), allowed)
    return pa.table({name: _nested(path, name, array) for name, array in columns.items()})


def from_npy(path: Path) -> "pa.Table":
    """One array: the column `values`, or, of a structured array, a column for each field."""
    import pyarrow as pa

    array = np.load(path, allow_pickle=False)
    require(array.ndim > 0, "source", str(path), "is a single number, must be an array (rows, …)")
    fields = array.dtype.names
    columns = {"values": array} if fields is None else {name: array[name] for name in fields}
    return pa.table({name: _nested(path, name, column) for name, column in columns.items()})


def from_folder(path: Path) -> "pa.Table":
    """One split that `save_to_disk` wrote."""
    import datasets

    single = (path / "state.json").is_file()
    allowed = "must be a file, or one split that save_to_disk wrote: a folder with state.json"
    require(single, "source", str(path), allowed)
    return from_dataset(datasets.load_from_disk(str(path)))


def from_dataset(split: Any) -> "pa.Table":
    """A `Dataset` of `datasets`; columns of class labels have the names of the classes, null where there is none."""
    import datasets
    import pyarrow as pa
    from pyarrow import compute as pc

    table = split.with_format("arrow")[:]
    for number, name in enumerate(table.column_names):
        feature = split.features[name]
        if isinstance(feature, datasets.ClassLabel):
            codes = table[name]
            known = pc.if_else(pc.less(codes, 0), pa.scalar(None, codes.type), codes)  # -1 is no label
            table = table.set_column(number, name, pc.take(pa.array(feature.names, pa.string()), known))
    return _plain(table)


def _nested(path: Path, name: str, array: np.ndarray) -> "pa.Array":
    """An array (n, …) as a column; rows of more than one dimension are nested lists."""
    import pyarrow as pa

    fits = array.dtype.kind in "biufUSM"
    require(fits, "source", str(path), f"{name} has the type {array.dtype}, must be numbers, true and false or text")
    require(0 not in array.shape[1:], "source", str(path), f"{name} has the shape {array.shape}: its rows are empty")
    array = array.astype(np.float32) if array.dtype == np.float16 else array.astype(array.dtype.newbyteorder("="))
    values = pa.array(np.char.decode(array.reshape(-1), "utf-8") if array.dtype.kind == "S" else array.reshape(-1))
    for size in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def _plain(table: "pa.Table") -> "pa.Table":
    """Categories as their values, decimals and half precision as numbers, extensions as what they store."""
    import pyarrow as pa
    from pyarrow import compute as pc

    def plain(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
        if isinstance(column.type, pa.ExtensionType | pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        if pa.types.is_dictionary(column.type):
            return column.cast(column.type.value_type)
        if pa.types.is_decimal(column.type) or pa.types.is_float16(column.type):
            return pc.cast(column, pa.float64() if pa.types.is_decimal(column.type) else pa.float32())
        return column

    return pa.table([plain(column) for column in table.columns], names=table.column_names)
