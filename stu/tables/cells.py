"""What the cells of a table's rows say: a text, numbers, a step; and which rows are the steps of one sequence."""

import datetime
import json
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from stu.errors import OptionError, brief, require

Place = Callable[[int], str]  # where a row is, from its number


def value_of(cells: Sequence[Any], *, text: bool) -> Any:
    """An input: a text, or numbers, of which several columns are channels, or the steps of one.

    Raises `OptionError` for an empty cell, and for what is neither.
    """
    _require_whole(cells)
    if text:
        require(len(cells) == 1, "--column", len(cells), "must be one for texts")
        whole = isinstance(cells[0], int) and not isinstance(cells[0], bool)  # a column of digits is one of integers
        require(whole or isinstance(cells[0], str), "input", brief(cells[0]), "must be a text")
        return str(cells[0])
    values = [_numbers(cell) for cell in cells]
    if len(values) == 1:
        return values[0]
    several = all(isinstance(value, list) for value in values)
    return [list(step) for step in zip(*values, strict=True)] if several and _equal(values) else values


def step_of(cells: Sequence[Any]) -> list[Any]:
    """The numbers of a row that is a step. Raises `OptionError` for an empty cell, and for what is no finite number."""
    _require_whole(cells)
    parts = [_numbers(cell) for cell in cells]
    numbers = [number for part in parts for number in (part if isinstance(part, list) else [part])]
    for number in numbers:
        try:
            finite = math.isfinite(number)
        except (TypeError, ValueError, OverflowError) as error:
            raise OptionError("input", brief(number), "must be a number") from error
        require(finite, "input", number, "must be finite")
    return numbers


def sequences(
    rows: Sequence[Mapping[str, Any]], sequence: str | None, time: str | None, place: Place
) -> list[list[int]]:
    """The numbers of the rows of each sequence; of all rows, where no column says which they belong to.

    Raises `OptionError` for a column that is not there, an empty cell, and a time that is there twice.
    """
    for option, column in (("--sequence", sequence), ("--time", time)):
        known = column is None or column in rows[0]
        require(known, option, column, f"no such column; there are {brief(', '.join(rows[0]))}")
    found: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        key = None if sequence is None else _cell(row, sequence, number, place)
        found.setdefault(key, []).append(number)
    if time is None:
        return list(found.values())
    times = _comparable([_cell(row, time, number, place) for number, row in enumerate(rows)], time, place)
    ordered = [sorted(numbers, key=times.__getitem__) for numbers in found.values()]
    for numbers in ordered:
        for before, after in pairwise(numbers):
            if times[before] == times[after]:
                allowed = "a time of the same sequence a second time, must be there once"
                raise OptionError(f"{place(after)}, column {time}", brief(rows[after][time]), allowed)
    return ordered


def _require_whole(cells: Sequence[Any]) -> None:
    require(all(cell is not None for cell in cells), "input", "empty", "must have a value")


def _equal(values: Sequence[Any]) -> bool:
    same = len({len(value) for value in values}) == 1
    require(same, "input", [len(value) for value in values], "must have equally many steps in all columns")
    return True


def _numbers(cell: Any) -> Any:
    """A cell of a text file as the numbers that are written in it, as a JSON list or apart."""
    if not isinstance(cell, str):
        return cell
    try:
        if cell.lstrip().startswith("["):
            return json.loads(cell)
        numbers = [float(part) for part in re.split(r"[\s,;]+", cell.strip())]
    except (ValueError, RecursionError) as error:
        raise OptionError("input", brief(cell), "must be numbers") from error
    return [int(number) if number.is_integer() else number for number in numbers]


def _cell(row: Mapping[str, Any], column: str, number: int, place: Place) -> Hashable:
    value = row.get(column)
    if value is None or value == "" or value != value or not isinstance(value, Hashable):
        raise OptionError(f"{place(number)}, column {column}", brief(value), "must have a value")
    return value


def _comparable(values: Sequence[Any], column: str, place: Place) -> list[Any]:
    """Numbers, also where they are written as texts; else values of one type."""
    try:
        return [_time(value) for value in values]
    except (TypeError, ValueError):
        for number, value in enumerate(values):
            if type(value) is not type(values[0]):
                problem = f"must be of the same type as in {place(0)}"
                raise OptionError(f"{place(number)}, column {column}", brief(value), problem) from None
        return list(values)


def _time(value: Any) -> Any:
    """A date as it is, else a number: an integer exactly, however large."""
    if isinstance(value, datetime.date | int):
        return value
    try:
        return int(value) if isinstance(value, str) else float(value)
    except ValueError:
        return float(value)
