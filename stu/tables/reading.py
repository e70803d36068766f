"""Tables of what a user brings: one file of any common format, with the types that all of its rows have.

Needs pyarrow, for `save_to_disk` folders also datasets; they are imported when a table is read.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stu.errors import OptionError, require
from stu.tables import binary, delimited, objects
from stu.tables.text import ending_of, is_compressed, undecodable

if TYPE_CHECKING:  # slow to import, and only who reads tables has it
    import pyarrow as pa

LINES: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    **dict.fromkeys((".csv", ".tsv"), delimited.lines),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), objects.lines),
}  # of text files, the line in which each row begins
FORMATS: dict[str, Callable[[Path], "pa.Table"]] = {
    ".parquet": binary.from_parquet,
    **dict.fromkeys((".csv", ".tsv"), delimited.read),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), objects.read),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), binary.from_arrow),
    ".npz": binary.from_npz,
    ".npy": binary.from_npy,
}


def read_table(source: str | Path, texts: Sequence[str] = ()) -> "pa.Table":
    """The rows of a file (`FORMATS`, text also compressed) or of a `save_to_disk` folder, with one name per column.

    The types of csv and tsv are those of all rows: integers, numbers, true and false, else text; so are integers that
    start with 0 or need more than 64 bits. In columns of numbers, empty cells and `MISSING` are null. An npy file is
    the column `values`; arrays of more than one dimension are nested lists. texts: names or patterns of columns of
    csv and tsv that are text as they stand. Raises `OptionError`, named source, for what cannot be read to its end,
    has no rows, or a column twice; it says in which line or row.
    """
    path = _existing(source)
    reader = binary.from_folder if path.is_dir() else FORMATS.get(kind_of(path) or "")
    require(reader is not None, "source", str(path), f"must end in {', '.join(FORMATS)}")
    assert reader is not None
    with _reading(path):
        table = delimited.read(path, texts) if reader is delimited.read else reader(path)
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    require(twice is None, "source", str(path), f"has the column {twice!r} twice")
    require(table.num_rows > 0, "source", str(path), "has no rows")
    return table


def kind_of(path: Path) -> str | None:
    """The ending of a file's name that says its format, without that of its compression; None for others."""
    ending = ending_of(path)
    return ending if ending in (LINES if is_compressed(path) else FORMATS) else None


def place_of(source: str | Path, row: int) -> str:
    """Where a row, counted from 0, is found: the line of a text file, or the row of others, counted from 1."""
    path = Path(source)
    lines = None if path.is_dir() else LINES.get(kind_of(path) or "")
    try:
        found = enumerate(lines(path) if lines else ())
        line = next((line for number, (line, _) in found if number == row), None)
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
        raise OptionError("source", str(path), f"line {undecodable(path)}: is no text in UTF-8") from error
    except Exception as error:  # of many kinds: those of zip, zlib, Arrow, NumPy and datasets
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OptionError("source", str(path), f"cannot be read, or not to its end: {reason}") from error
