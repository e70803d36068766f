"""Columns of a table: found by name or pattern, and read as numbers, texts or labels; what is wrong is named.

n rows, T steps of all rows, C channels
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.own.sources import Rows
from stu.errors import OptionError, brief, require
from stu.preprocessing import Label

PATTERN = set("*?[")
Reals = NDArray[np.float64]
Integers = NDArray[np.int64]
Names = str | Sequence[str]


class Nested(NamedTuple):
    """The lists of a column, one after the other: values (T,) or (T, C), lengths (n,)."""

    values: Reals
    lengths: Integers


def found(names: Sequence[str], key: str, given: Names | None, without: Sequence[str] = ()) -> list[str]:
    """The columns that a name, a pattern or a list of both means, in their order; a pattern finds none of `without`."""
    listed = f"has {brief(', '.join(names))}"
    if not given:
        raise OptionError(key, given, f"must be a column; the table {listed}")
    chosen: list[str] = []
    for one in [given] if isinstance(given, str) else given:
        matching = [one] if one in names else []
        if not matching and PATTERN & set(one):
            matching = [name for name in names if fnmatchcase(name, one) and name not in without]
        near = difflib.get_close_matches(one, names, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        require(
            bool(matching),
            key,
            one,
            f"no such column{meant} The table {listed}" if meant else f"no such column; the table {listed}",
        )
        chosen += matching
    twice = next((name for name in chosen if chosen.count(name) > 1), None) if len(set(chosen)) < len(chosen) else None
    require(twice is None, key, brief(given), f"has the column {twice} twice")
    return chosen


def is_number(kind: pa.DataType) -> bool:
    """Of integers, reals, or true and false."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    """Of strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    """Of lists of any kind."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def kind(rows: Rows, column: str) -> pa.DataType:
    """The type of a column."""
    return rows.table.schema.field(column).type


def require_whole(rows: Rows, column: str) -> pa.ChunkedArray:
    """The column, in which no cell is empty."""
    cells = rows.table[column]
    if cells.null_count:
        row = pc.index(cells.is_null(), True).as_py()
        empty = cells.null_count == len(cells)
        rows.refuse(row, column, "is empty, as all of the column is" if empty else "is empty, must have a value")
    return cells


def numbers(rows: Rows, column: str) -> Reals:
    """A column of numbers as (n,), all finite; texts that are numbers, too."""
    cells = require_whole(rows, column)
    if is_text(cells.type):
        cells = _as_numbers(rows, column, cells)
    if not is_number(cells.type):
        rows.refuse(0, column, f"{brief(cells[0].as_py())} is no number, but {cells.type}")
    values = pc.cast(cells, pa.float64(), safe=False).to_numpy()
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        rows.refuse(int(bad[0]), column, f"is {values[bad[0]]}, must be finite")
    return values


def _as_numbers(rows: Rows, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    for row, cell in enumerate(cells.to_pylist()):
        if not _is_numeric(cell):
            rows.refuse(
                row, column, f"{brief(repr(cell))} is no number" if cell.strip() else "is empty, must be a number"
            )
    return pa.chunked_array([[float(cell) for cell in cells.to_pylist()]], pa.float64())  # Arrow knows no +1


def _is_numeric(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def require_unmixed(rows: Rows, column: str, option: str) -> None:
    """Refuse a column of texts most of which are numbers: the others are mistakes, unless `option` says otherwise."""
    cells = rows.table[column]
    if not is_text(cells.type):
        return
    numeric = [_is_numeric(cell) for cell in cells.drop_null().unique().to_pylist()]
    if numeric and not all(numeric) and sum(numeric) * 2 > len(numeric):
        row = next(n for n, cell in enumerate(cells.to_pylist()) if cell is None or not _is_numeric(cell))
        cell = cells[row].as_py()
        rows.refuse(row, column, f"{brief(repr(cell))} is no number, as most of the column are; or set {option}")


def require_no_lists(rows: Rows, column: str) -> None:
    """Refuse a column of texts all of which are lists, as some programs write them: they are no text."""
    written = pc.match_substring_regex(rows.table[column], r"^\s*\[[-+0-9.,eE\s\[\]]*\]\s*$")
    problem = "is a list written as text: keep lists in jsonl, parquet or arrow, or set read=bytes"
    if pc.all(written).as_py():
        rows.refuse(0, column, problem)


def nested(rows: Rows, column: str) -> Nested:
    """A column of lists of numbers, or of lists of equally long lists, all finite."""
    cells = require_whole(rows, column)
    lengths = pc.list_value_length(cells).to_numpy().astype(np.int64)
    if (bad := np.flatnonzero(lengths == 0)).size:
        rows.refuse(int(bad[0]), column, "is empty, must have a step")
    flat, width = pc.list_flatten(cells), 0
    if is_list(flat.type):
        _refuse_at(rows, column, lengths, flat.is_null(), "has an empty step")
        widths = pc.list_value_length(flat).to_numpy()
        width = int(widths[0])
        _refuse_at(rows, column, lengths, pa.array(widths != width), f"has a step of other than {width} numbers")
        require(width > 0, "source", rows.name, f"column {column}: has steps without numbers")
        flat = pc.list_flatten(flat)
    if not is_number(flat.type):
        rows.refuse(0, column, f"must be lists of numbers, is {cells.type}")
    per_row = lengths * max(1, width)
    _refuse_at(rows, column, per_row, flat.is_null(), "has an empty step")
    values = pc.cast(flat, pa.float64(), safe=False).to_numpy()
    _refuse_at(rows, column, per_row, pa.array(~np.isfinite(values)), "has a number that is not finite")
    return Nested(values.reshape(-1, width) if width else values, lengths)


def _refuse_at(rows: Rows, column: str, lengths: Integers, bad: Any, problem: str) -> None:
    """Refuse the row whose list has the first of these values. lengths: values per row."""
    place = pc.index(bad, True).as_py()
    if place >= 0:
        row = int(np.searchsorted(np.cumsum(lengths), place, "right"))
        rows.refuse(row, column, f"step {place - int(lengths[:row].sum()) + 1}: {problem}")


def texts(rows: Rows, column: str) -> list[str]:
    """A column of texts, none of them empty; integers as they are written."""
    cells = require_whole(rows, column)
    if pa.types.is_integer(cells.type):
        cells = pc.cast(cells, pa.string())
    if not is_text(cells.type):
        rows.refuse(0, column, f"must be text, is {cells.type}")
    values: list[str] = cells.to_pylist()
    if (row := next((n for n, value in enumerate(values) if not value.strip()), None)) is not None:
        rows.refuse(row, column, "is empty, must have a character")
    return values


def labels(rows: Rows, column: str) -> tuple[Integers, list[Label]]:
    """A column of labels of any type as numbers (n,) of the different ones, which are sorted."""
    cells = require_whole(rows, column)
    if is_list(cells.type) or pa.types.is_struct(cells.type):
        rows.refuse(0, column, f"must be a label, is {cells.type}")
    if pa.types.is_temporal(cells.type) or pa.types.is_binary(cells.type):
        cells = pc.cast(cells, pa.string())
    if pa.types.is_floating(cells.type):
        numbers(rows, column)
    coded = cells.combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    values = coded.dictionary.to_pylist()
    if is_text(cells.type) and any(not value.strip() for value in values):
        rows.refuse(
            next(n for n, cell in enumerate(cells.to_pylist()) if not cell.strip()), column, "is empty, must be a label"
        )
    if is_text(cells.type) and len(shown := Counter(value.strip() for value in values)) < len(values):
        twice = next(value for value in values if value != value.strip() and shown[value.strip()] > 1)
        rows.refuse(cells.index(twice).as_py(), column, f"{twice!r} differs from another label by white space alone")
    order = sorted(range(len(values)), key=values.__getitem__)
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    return place[coded.indices.to_numpy()], [values[number] for number in order]
