"""What is a sequence in a table: a row, or the rows of one series; its inputs, and its targets.

n sequences, T steps of all, C channels, O outputs
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.own import columns
from data.own.columns import Integers, Reals
from data.own.sources import Rows
from stu.errors import brief, require
from stu.preprocessing import Label

Read = Literal["auto", "bytes", "characters", "words", "tokens", "numbers"]
Kind = Literal["auto", "class", "number"]
RowsAre = Literal["auto", "sequences", "steps"]
Target = Literal["class", "number", "steps", "forecast", "token"]
NEXT = "next"
TEXT = ("bytes", "characters", "words")
MOST_CLASSES = 100  # integers of more values are numbers, unless the option says otherwise
PER_CLASS = 3  # rows at least, on the average


@final
@dataclass(frozen=True)
class Sequences:
    """The sequences of a table, one after the other.

    read: what they are of. values: (T, C) reals, (T,) tokens, or the texts. lengths: (n,), of texts in characters.
    first: (n,) the row with which each begins. order: (T,) the row of every step, where a row is a step.
    """

    read: Read
    columns: tuple[str, ...]
    values: Any
    lengths: Integers
    first: Integers
    order: Integers | None

    def __len__(self) -> int:
        return len(self.lengths)

    def row_of(self, step: int) -> int:
        """The row that a step of all comes from."""
        if self.order is not None:
            return int(self.order[step])
        return int(self.first[np.searchsorted(np.cumsum(self.lengths), step, "right")])

    def repeated(self, per_sequence: np.ndarray) -> np.ndarray:
        """(n, …) → (T, …): for every step what its sequence has."""
        return np.repeat(per_sequence, self.lengths, axis=0)

    def cut(self, pieces: Integers) -> "Sequences":
        """Every sequence as several, of the lengths `pieces` (n, parts); those of length 0 are left out."""
        sizes = pieces.reshape(-1)
        there, ends = sizes > 0, np.cumsum(sizes)
        first, values = np.repeat(self.first, pieces.shape[1])[there], self.values
        if isinstance(values, list):
            whole = "".join(values)
            values = [whole[end - size : end] for size, end in zip(sizes[there], ends[there], strict=True)]
        elif self.order is not None:
            first = self.order[(ends - sizes)[there]]
        return replace(self, values=values, lengths=sizes[there], first=first)


@final
@dataclass(frozen=True)
class Targets:
    """What is predicted. values: classes (n,) of `labels`, reals (n, O) or, per step, (T, O); None: the inputs."""

    kind: Target
    columns: tuple[str, ...] = ()
    values: Any = None
    labels: tuple[Label, ...] = ()


def series(rows: Rows, sequence: str | None, time: str | None) -> tuple[Integers, Integers]:
    """Where a row is a step: the rows in order (T,), sequence by sequence, and the lengths of the sequences (n,).

    Without a column `sequence`, every file is one. No sequence is in two splits: there they are two.
    """
    if sequence is None:
        code = np.repeat(np.arange(len(rows.files)), np.diff(rows.starts))
    else:
        code = columns.labels(rows, sequence)[0]
    code = code + (rows.split.astype(np.int64) + 1) * (code.max() + 1)
    keys = times(rows, time) if time is not None else np.zeros(len(code))
    order = np.lexsort((keys, code))  # stable: rows of the same time as they are in the file
    same = (np.diff(code[order]) == 0) & (np.diff(keys[order]) == 0) if time is not None else np.zeros(0, bool)
    if time is not None and same.any():
        rows.refuse(int(order[1:][same][0]), time, "a time of the same sequence a second time, must be there once")
    return order, np.unique(code, return_counts=True)[1]


def times(rows: Rows, column: str) -> NDArray[Any]:
    """A column of numbers, dates or times as numbers, (rows,)."""
    cells = columns.require_whole(rows, column)
    if columns.is_text(cells.type):
        try:
            cells = pc.cast(cells, pa.timestamp("us"))
        except pa.ArrowException:
            rows.refuse(_first_no_time(cells), column, "must be a number, or a time as 2024-01-31 12:00")
    if pa.types.is_temporal(cells.type):  # as it is stored, in whatever unit
        return pc.cast(cells.cast(pa.int32()) if cells.type.bit_width == 32 else cells, pa.int64()).to_numpy()
    if pa.types.is_integer(cells.type):  # as reals, large ones would be the same
        return cells.to_numpy()
    return columns.numbers(rows, column)


def _first_no_time(cells: pa.ChunkedArray) -> int:
    for row, cell in enumerate(cells):
        try:
            pc.cast(cell, pa.timestamp("us"))
        except pa.ArrowException:
            return row
    return 0


def one_value(rows: Rows, column: str, values: np.ndarray, order: Integers, lengths: Integers) -> np.ndarray:
    """(rows,) → (n,): what all steps of a sequence have in a column; refuses a row with another one."""
    ordered = values[order]
    firsts = ordered[np.cumsum(lengths) - lengths]
    if (bad := np.flatnonzero(ordered != np.repeat(firsts, lengths))).size:
        rows.refuse(int(order[bad[0]]), column, "another value than in the first row of its sequence, must be the same")
    return firsts


def rows_are(
    rows: Rows, inputs: Sequence[str], target: object, sequence: str | None, time: str | None, read: Read
) -> RowsAre:
    """Whether a row is a sequence or a step, where no option says so."""
    scalar = read not in TEXT and columns.is_number(columns.kind(rows, inputs[0]))
    if sequence is not None or (scalar and target == NEXT and (time is not None or len(inputs) == 1)):
        return "steps"
    unclear = scalar and target == NEXT
    allowed = (
        "must be steps (a row is a step, columns are channels) or sequences (a row is a sequence of these numbers)"
    )
    require(not unclear, "rows", "auto", allowed)
    allowed = (
        "has one number a row, which is no sequence: name several columns or a pattern, or set rows=steps or sequence"
    )
    require(not scalar or len(inputs) > 1, "inputs", inputs[0], allowed)
    return "sequences"


def read_as(rows: Rows, inputs: Sequence[str], given: Read, are: RowsAre) -> Read:
    """What the inputs are read as, where the options leave it open."""
    kind = columns.kind(rows, inputs[0])
    if given != "auto":
        return given
    if columns.is_text(kind) and len(inputs) == 1:
        columns.require_unmixed(rows, inputs[0], "read=bytes")
        columns.require_no_lists(rows, inputs[0])
        return "bytes"
    whole = columns.is_list(kind) and pa.types.is_integer(kind.value_type)
    return "tokens" if whole and len(inputs) == 1 and are == "sequences" else "numbers"


def read_inputs(
    rows: Rows, inputs: Sequence[str], read: Read, series_of: tuple[Integers, Integers] | None
) -> Sequences:
    """The sequences of these columns. series_of: order and lengths, where a row is a step."""
    first = np.arange(rows.table.num_rows)
    several = brief(", ".join(inputs))
    if read in TEXT:
        require(series_of is None, "read", read, "a text is a row: rows must be sequences, without a column `sequence`")
        require(len(inputs) == 1, "inputs", several, f"must be one column of text where read={read}")
        texts = columns.texts(rows, inputs[0])
        return Sequences(read, tuple(inputs), texts, np.array([len(text) for text in texts]), first, None)
    order, lists = None, columns.is_list(columns.kind(rows, inputs[0]))
    if lists and series_of is None:
        values, lengths = _stacked(rows, inputs)
    else:
        matrix = _channels(rows, inputs[0]) if lists else _columns(rows, inputs)  # (rows, numbers)
        if series_of is None:
            values, lengths = matrix.reshape(-1, 1), np.full(len(matrix), matrix.shape[1])
        else:
            order, lengths = series_of
            values, first = matrix[order], order[np.cumsum(lengths) - lengths]
    found = Sequences(read, tuple(inputs), values, lengths, first, order)
    return replace(found, values=_tokens(rows, found)) if read == "tokens" else found


def _columns(rows: Rows, names: Sequence[str]) -> Reals:
    return np.stack([columns.numbers(rows, name) for name in names], 1)


def _channels(rows: Rows, column: str) -> Reals:
    """A column of equally long lists as (rows, C), where a row is a step."""
    values, lengths = columns.nested(rows, column)
    if (bad := np.flatnonzero(lengths != lengths[0])).size or values.ndim > 1:
        row = int(bad[0]) if bad.size else 0
        rows.refuse(row, column, f"must be {lengths[0]} numbers, one per channel, where a row is a step")
    return values.reshape(len(lengths), -1)


def _stacked(rows: Rows, inputs: Sequence[str]) -> tuple[Reals, Integers]:
    """Columns of lists as channels, (T, C)."""
    parts = [columns.nested(rows, name) for name in inputs]
    lengths = parts[0].lengths
    for name, part in zip(inputs[1:], parts[1:], strict=True):
        if (bad := np.flatnonzero(part.lengths != lengths)).size:
            problem = f"has {part.lengths[bad[0]]} steps, {inputs[0]} has {lengths[bad[0]]}"
            rows.refuse(int(bad[0]), name, problem)
    return np.concatenate([part.values.reshape(len(part.values), -1) for part in parts], 1), lengths


def _tokens(rows: Rows, of: Sequences) -> Integers:
    """Values (T, 1) as integers (T,), none below 0."""
    require(
        of.values.shape[1] == 1, "inputs", brief(", ".join(of.columns)), "must be one integer a step where read=tokens"
    )
    flat = of.values[:, 0]
    if (bad := np.flatnonzero((flat < 0) | (flat != np.floor(flat)) | (flat >= 2**53))).size:
        problem = f"{flat[bad[0]]:g} is no token, must be an integer from 0 on; quantities are read by read=numbers"
        rows.refuse(of.row_of(int(bad[0])), of.columns[0], problem)
    return flat.astype(np.int64)


def read_targets(rows: Rows, target: Sequence[str] | None, kind: Kind, of: Sequences) -> Targets:
    """The targets in these columns; None: the next step of the inputs."""
    if target is None:
        require(kind == "auto", "kind", kind, "is of a target column, not of the next step")
        return Targets("token" if of.read != "numbers" else "forecast")
    _refuse_leaks(rows, target, of.columns)
    if any(columns.is_list(columns.kind(rows, name)) for name in target):
        require(kind != "class", "kind", kind, f"must be number: {target[0]} has lists")
        return _from_lists(rows, target, of)
    if kind == "class" or (kind == "auto" and len(target) == 1 and _is_class(rows, target[0], len(of))):
        require(len(target) == 1, "target", brief(", ".join(target)), "must be one column where kind=class")
        codes, labels = columns.labels(rows, target[0])
        require(
            len(labels) > 1, "target", target[0], f"has the single class {labels[0]!r} in {rows.name}, must have two"
        )
        if of.order is not None:
            codes = one_value(rows, target[0], codes, of.order, of.lengths)
        return Targets("class", tuple(target), codes, tuple(labels))
    values = _columns(rows, target)  # (rows, O)
    if of.order is None:
        return Targets("number", tuple(target), values)
    steps = values[of.order]
    firsts = steps[np.cumsum(of.lengths) - of.lengths]
    constant = len(of) > 1 and bool((steps == of.repeated(firsts)).all())
    return Targets("number", tuple(target), firsts) if constant else Targets("steps", tuple(target), steps)


def _refuse_leaks(rows: Rows, target: Sequence[str], inputs: Sequence[str]) -> None:
    for name in target:
        require(name not in inputs, "target", name, "is an input, too, must be another column")
        same = next((one for one in inputs if rows.table[one].equals(rows.table[name])), None)
        require(same is None, "target", name, f"equals the input {same} in every row of {rows.name}")


def _is_class(rows: Rows, column: str, n: int) -> bool:
    kind = columns.kind(rows, column)
    columns.require_unmixed(rows, column, "kind=class")
    if pa.types.is_integer(kind):
        return pc.count_distinct(rows.table[column]).as_py() <= max(2, min(MOST_CLASSES, n // PER_CLASS))
    return not pa.types.is_floating(kind)


def _from_lists(rows: Rows, target: Sequence[str], of: Sequences) -> Targets:
    """One number or several for every step or, where a list has another length than the inputs, for the sequence."""
    values, lengths = _stacked(rows, target)
    if of.read not in TEXT and np.array_equal(lengths, of.lengths):
        return Targets("steps", tuple(target), values)
    other = np.flatnonzero(lengths != lengths[0])
    if other.size or values.shape[1] > 1:
        row = int(other[0]) if other.size else 0
        rows.refuse(
            row, target[0], f"has {lengths[row]} numbers, must have one for each of the {of.lengths[row]} steps"
        )
    return Targets("number", tuple(target), values.reshape(len(lengths), -1))
