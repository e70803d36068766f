"""Tables in csv and tsv, whose columns have the types that all of their cells have."""

import csv
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stu.errors import OptionError, require
from stu.tables.text import BLOCKS, ending_of, in_blocks, opened, require_no

if TYPE_CHECKING:  # slow to import, and only who reads tables has it
    import pyarrow as pa

MISSING = ("", "#N/A", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")  # in a column of numbers
LONGEST = 2**31 - 1  # characters of a cell


def read(path: Path, texts: Sequence[str] = ()) -> "pa.Table":
    """All cells as text first, then each column as what all of its cells are: no slower than guessing."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    names = next(_rows(path), (1, []))[1]
    require(bool(names), "source", str(path), "has no header: the first line must name the columns")
    other = next((mark for mark in (";", "\t", "|", ",") if mark in names[0]), None) if len(names) == 1 else None
    require(other is None, "source", str(path), f"line 1 has {other!r} between names, must have what its ending says")
    if _has_quotes(path):  # one that is not closed would take in what follows, unnoticed
        require_no(_fault(path), path)
    parse = arrow.ParseOptions(
        delimiter=_separator(path),
        newlines_in_values=True,
        ignore_empty_lines=len(names) > 1,  # of one column, they are empty cells
    )
    text = arrow.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
    table = in_blocks(
        lambda size: arrow.read_csv(str(path), arrow.ReadOptions(block_size=size), parse, text), path, _fault
    )
    if len(names) == 1:
        table = table.slice(0, len(table) - _empty_at_end(table.column(0)))
    kept = [any(name == one or fnmatchcase(name, one) for one in texts) for name in table.column_names]
    columns = [one if as_text else _typed(one) for one, as_text in zip(table.columns, kept, strict=True)]
    return pa.table(columns, names=table.column_names)


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The line in which each row below the header begins, and its cells."""
    rows = _rows(path)
    single = len(next(rows)[1]) == 1
    return ((line, row) for line, row in rows if row or single)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line in which each row begins, and its values; the first row is the header."""
    csv.field_size_limit(LONGEST)
    with opened(path) as text:
        reader, start = csv.reader(text, delimiter=_separator(path), strict=True), 1
        try:
            for row in reader:
                yield start, row
                start = reader.line_num + 1
        except csv.Error as error:
            raise OptionError("source", str(path), f"line {start}: {error}") from error


def _fault(path: Path) -> str | None:
    """The first line with another number of values than the header; raises for quotes that are not closed."""
    rows = _rows(path)
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
                if pa.types.is_int64(kind) and _are_integers(cells):
                    return None  # as reals, different ones of many digits would be the same
                continue
            coded = pa.types.is_int64(kind) and pc.any(pc.match_substring_regex(cells, r"^\s*[+-]?0\w")).as_py()
            return None if coded else found
        return None

    found = cast(column)
    if found is None and len(column) and _numeric_but_for_missing(column):
        stripped = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"^\+(\d)", r"\1")  # Arrow has no +1
        found = cast(pc.if_else(pc.is_in(stripped, pa.array(MISSING)), pa.scalar(None, pa.string()), stripped))
    return column if found is None else found


def _are_integers(column: "pa.ChunkedArray") -> bool:
    """Whether all cells that are there are written as integers, however large."""
    import pyarrow as pa
    from pyarrow import compute as pc

    missing = pc.is_in(pc.utf8_trim_whitespace(column), pa.array(MISSING))
    return bool(pc.all(pc.or_(missing, pc.match_substring_regex(column, r"^\s*[+-]?\d+\s*$"))).as_py())


def _numeric_but_for_missing(column: "pa.ChunkedArray") -> bool:
    """Whether some cell is there: a column of nothing is no column of numbers."""
    import pyarrow as pa
    from pyarrow import compute as pc

    there = pc.invert(pc.is_in(pc.utf8_trim_whitespace(column), pa.array(MISSING)))
    return bool(pc.any(there).as_py())


def _separator(path: Path) -> str:
    return "\t" if ending_of(path) == ".tsv" else ","
