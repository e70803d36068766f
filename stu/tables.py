"""Tables of what a user brings: one file of any common format, with the types that all of its rows have.

Needs pyarrow, for `save_to_disk` folders also datasets; they are imported when a table is read.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stu.errors import OptionError, brief, require

if TYPE_CHECKING:  # slow to import, and only who reads tables has it
    import pyarrow as pa

COMPRESSED = (".gz", ".bz2", ".zst")  # further endings of text files
MISSING = (
    "",
    "#N/A",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
)  # in a column of numbers of a text file
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a complete Arrow stream; without them it may end at any batch
LONGEST = 2**31 - 1  # characters of a cell
BLOCKS = (1 << 20, 1 << 30)  # bytes parsed at once; the second for files with a longer row


def read_table(source: str | Path, texts: Sequence[str] = ()) -> "pa.Table":
    """The rows of a file (`FORMATS`, text also compressed) or of a `save_to_disk` folder, with one name per column.

    The types of csv and tsv are those of all rows: integers, numbers, true and false, else text; so are integers that
    start with 0. In columns of numbers, empty cells and `MISSING` are null. An npy file is the column `values`; arrays
    of more than one dimension are nested lists. texts: names or patterns of columns of csv and tsv that are text as
    they stand. Raises `OptionError`, named source, for what cannot be read to its end, has no rows, or a column twice;
    it says in which line or row.
    """
    path = _existing(source)
    reader = _from_folder if path.is_dir() else FORMATS.get(kind_of(path) or "")
    require(reader is not None, "source", str(path), f"must end in {', '.join(FORMATS)}")
    assert reader is not None
    with _reading(path):
        table = _from_csv(path, texts) if reader is _from_csv else reader(path)
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    require(twice is None, "source", str(path), f"has the column {twice!r} twice")
    require(table.num_rows > 0, "source", str(path), "has no rows")
    return table


def kind_of(path: Path) -> str | None:
    """The ending of a file's name that says its format, without that of its compression; None for others."""
    text = path.suffix.lower() in COMPRESSED
    ending = Path(path.stem).suffix.lower() if text else path.suffix.lower()
    known = ending in FORMATS and (not text or ending in TEXT)
    return ending if known else None


def place_of(source: str | Path, row: int) -> str:
    """Where a row, counted from 0, is found: the line of a text file, or the row of others, counted from 1."""
    path = Path(source)
    kind = None if path.is_dir() else kind_of(path)
    lines = _lines_of_csv(path) if kind in (".csv", ".tsv") else _lines_of_json(path) if kind in TEXT else iter(())
    try:
        line = next((line for number, (line, _) in enumerate(lines) if number == row), None)
    except (OSError, ValueError, RecursionError, csv.Error):  # not one object a line
        line = None
    return f"row {row + 1}" if line is None else f"line {line}"


def _existing(source: str | Path) -> Path:
    try:
        path = Path(source).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError("source", str(source), f"must be a file that can be read: {reason}") from error
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the libraries raise into the one error."""
    try:
        yield
    except OptionError:
        raise
    except UnicodeDecodeError as error:
        raise OptionError("source", str(path), f"line {_undecodable(path)}: is no text in UTF-8") from error
    except Exception as error:  # of many kinds: those of zip, zlib, Arrow, NumPy and datasets
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OptionError("source", str(path), f"cannot be read, or not to its end: {reason}") from error


# Text: csv, tsv, json


@contextmanager
def _text(path: Path, errors: str = "strict") -> Iterator[TextIOWrapper]:
    """The characters of a file, uncompressed, without the mark that some programs begin with."""
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as file:
        yield TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="")


def _undecodable(path: Path) -> int:
    """The first line that is not in UTF-8."""
    with _text(path, "replace") as text:
        return next((line for line, content in enumerate(text, 1) if "\ufffd" in content), 1)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line in which each row begins, and its values; the first row is the header."""
    csv.field_size_limit(LONGEST)
    with _text(path) as text:
        reader, start = csv.reader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True), 1
        try:
            for row in reader:
                yield start, row
                start = reader.line_num + 1
        except csv.Error as error:
            raise OptionError("source", str(path), f"line {start}: {error}") from error


def _lines_of_csv(path: Path) -> Iterator[tuple[int, Any]]:
    rows = _csv_rows(path)
    single = len(next(rows)[1]) == 1
    return ((line, row) for line, row in rows if row or single)


def _lines_of_json(path: Path) -> Iterator[tuple[int, Any]]:
    with _text(path) as text:
        for line, content in enumerate(text, 1):
            if content.strip():
                if not isinstance(row := json.loads(content), dict):
                    raise ValueError("one list of objects has no lines")
                yield line, row


def _from_csv(path: Path, texts: Sequence[str] = ()) -> "pa.Table":
    """All cells as text first, then each column as what all of its cells are: no slower than guessing."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    names = next(_csv_rows(path), (1, []))[1]
    require(bool(names), "source", str(path), "has no header: the first line must name the columns")
    other = next((mark for mark in (";", "\t", "|", ",") if mark in names[0]), None) if len(names) == 1 else None
    require(other is None, "source", str(path), f"line 1 has {other!r} between names, must have what its ending says")
    if _has_quotes(path):  # one that is not closed would take in what follows, unnoticed
        _require_no(_fault_of_csv(path), path)
    parse = arrow.ParseOptions(
        delimiter="\t" if kind_of(path) == ".tsv" else ",",
        newlines_in_values=True,
        ignore_empty_lines=len(names) > 1,  # of one column, they are empty cells
    )
    text = arrow.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
    table = _in_blocks(
        lambda size: arrow.read_csv(str(path), arrow.ReadOptions(block_size=size), parse, text), path, _fault_of_csv
    )
    if len(names) == 1:
        table = table.slice(0, len(table) - _empty_at_end(table.column(0)))
    kept = [any(name == one or fnmatchcase(name, one) for one in texts) for name in table.column_names]
    columns = [one if as_text else _typed(one) for one, as_text in zip(table.columns, kept, strict=True)]
    return pa.table(columns, names=table.column_names)


def _in_blocks(read: Callable[[int], "pa.Table"], path: Path, fault: Callable[[Path], str | None]) -> "pa.Table":
    """What `read` makes of a file; its `fault` in words where it is none."""
    import pyarrow as pa

    try:
        try:
            return read(BLOCKS[0])
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) and "block size" not in str(error):
                raise
            return read(BLOCKS[1])
    except pa.ArrowException:
        _require_no(fault(path), path)
        raise


def _require_no(problem: str | None, path: Path) -> None:
    require(problem is None, "source", str(path), problem or "")


def _fault_of_csv(path: Path) -> str | None:
    """The first line with another number of values than the header; raises for quotes that are not closed."""
    rows = _csv_rows(path)
    width = len(next(rows)[1])
    wrong = ((line, len(row)) for line, row in rows if row and len(row) != width)
    line, found = next(wrong, (0, 0))
    return f"line {line} has {found} values, must have {width} as the header" if line else None


def _has_quotes(path: Path) -> bool:
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as file:
        return any(b'"' in block for block in iter(lambda: file.read(BLOCKS[0]), b""))


def _empty_at_end(column: "pa.ChunkedArray") -> int:
    return next((number for number in count() if number == len(column) or str(column[-1 - number]) != ""), 0)


def _typed(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """A column of texts as integers, numbers, or true and false, where all of its cells are such."""
    import pyarrow as pa
    from pyarrow import compute as pc

    def cast(cells: "pa.ChunkedArray") -> "pa.ChunkedArray | None":
        for kind in (pa.int64(), pa.float64(), pa.bool_()):
            try:
                found = pc.cast(cells, kind)
            except pa.ArrowInvalid:
                continue
            coded = pa.types.is_int64(kind) and pc.any(pc.match_substring_regex(cells, r"^\s*[+-]?0\w")).as_py()
            return None if coded else found
        return None

    found = cast(column)
    if found is None and len(column) and _numeric_but_for_missing(column):
        stripped = pc.utf8_trim_whitespace(column)
        found = cast(pc.if_else(pc.is_in(stripped, pa.array(MISSING)), pa.scalar(None, pa.string()), stripped))
    return column if found is None else found


def _numeric_but_for_missing(column: "pa.ChunkedArray") -> bool:
    """Whether some cell is there: a column of nothing is no column of numbers."""
    import pyarrow as pa
    from pyarrow import compute as pc

    there = pc.invert(pc.is_in(pc.utf8_trim_whitespace(column), pa.array(MISSING)))
    return bool(pc.any(there).as_py())


def _from_json(path: Path) -> "pa.Table":
    """One object a line, or one list of objects."""
    import pyarrow as pa
    from pyarrow import json as arrow

    with _text(path) as text:
        start = text.read(4096).lstrip()
    require(bool(start), "source", str(path), "is empty")
    if start.startswith("["):
        return _from_list(path)
    fields = pa.schema([])
    for _ in range(2):  # what looks like a time is text, as it was written
        options = arrow.ParseOptions(explicit_schema=fields, unexpected_field_behavior="infer")

        def read(size: int, options: Any = options) -> "pa.Table":
            with pa.input_stream(str(path), compression="detect") as file:
                return arrow.read_json(file, arrow.ReadOptions(block_size=size), options)

        table = _in_blocks(read, path, _fault_of_json)
        fields = pa.schema([field for field in map(_as_text, table.schema) if field not in table.schema])
        if not len(fields):
            break
    return table


def _as_text(field: "pa.Field") -> "pa.Field":
    import pyarrow as pa

    def plain(kind: "pa.DataType") -> "pa.DataType":
        if pa.types.is_temporal(kind):
            return pa.string()
        return pa.list_(plain(kind.value_type)) if pa.types.is_list(kind) else kind

    return field.with_type(plain(field.type))


def _from_list(path: Path) -> "pa.Table":
    import pyarrow as pa

    with _text(path) as text:
        rows = json.load(text)
    wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    require(wrong is None, "source", str(path), f"row {wrong} is no object, as {{column: value, …}}")
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except pa.ArrowException as error:
            where = _other_kind(values)
            problem = f"row {where + 1}, column {name}: {brief(values[where])} is of another type than before"
            raise OptionError("source", str(path), problem) from error
    return pa.table(columns)


def _fault_of_json(path: Path) -> str | None:
    """The first line that is no object, or has a value of another type than the lines before."""
    kinds: dict[str, str] = {}
    with _text(path) as text:
        for line, content in enumerate(text, 1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except ValueError as error:
                return f"line {line} is no JSON: {error}"
            if not isinstance(row, dict):
                return f"line {line} is no object, as {{column: value, …}}"
            for name, value in row.items():
                if (kind := _kind(value)) and kinds.setdefault(name, kind) != kind:
                    return f"line {line}, column {name}: {brief(value)} is of another type than before"
    return None


def _kind(value: Any) -> str:
    """The type of a JSON value; of a list, that of its first item; nothing for null."""
    if isinstance(value, list):
        kinds = {kind for item in value if (kind := _kind(item))}
        return f"list of {min(kinds, default='')}" if len(kinds) < 2 else "list of several types"
    if isinstance(value, bool) or value is None:
        return "" if value is None else "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def _other_kind(values: list[Any]) -> int:
    """The first place of a value of another type than those before; of the first list of several types."""
    kinds = [_kind(value) for value in values]
    first = next(filter(None, kinds), "")
    return next((n for n, kind in enumerate(kinds) if kind and (kind != first or "several" in kind)), 0)


# Binary: parquet, arrow, npz, npy, save_to_disk


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


def _from_parquet(path: Path) -> "pa.Table":
    from pyarrow import parquet

    return _plain(parquet.read_table(path, partitioning=None))


def _from_arrow(path: Path) -> "pa.Table":
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


def _from_npz(path: Path) -> "pa.Table":
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


def _from_npy(path: Path) -> "pa.Table":
    import pyarrow as pa

    array = np.load(path, allow_pickle=False)
    require(array.ndim > 0, "source", str(path), "is a single number, must be an array (rows, …)")
    fields = array.dtype.names
    columns = {"values": array} if fields is None else {name: array[name] for name in fields}
    return pa.table({name: _nested(path, name, column) for name, column in columns.items()})


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


def _from_folder(path: Path) -> "pa.Table":
    import datasets

    single = (path / "state.json").is_file()
    allowed = "must be a file, or one split that save_to_disk wrote: a folder with state.json"
    require(single, "source", str(path), allowed)
    found = datasets.load_from_disk(str(path))
    return _plain(found.with_format("arrow")[:])


TEXT = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
FORMATS: dict[str, Callable[[Path], "pa.Table"]] = {
    ".parquet": _from_parquet,
    **dict.fromkeys(TEXT[:2], _from_csv),
    **dict.fromkeys(TEXT[2:], _from_json),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _from_arrow),
    ".npz": _from_npz,
    ".npy": _from_npy,
}
