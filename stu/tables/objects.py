"""Tables in json: an object a line, or one list of objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stu.errors import OptionError, brief, require
from stu.tables.text import in_blocks, opened

if TYPE_CHECKING:  # slow to import, and only who reads tables has it
    import pyarrow as pa


def read(path: Path) -> "pa.Table":
    """One object a line, or one list of objects."""
    import pyarrow as pa
    from pyarrow import json as arrow

    with opened(path) as text:
        start = text.read(4096).lstrip()
    require(bool(start), "source", str(path), "is empty")
    if start.startswith("["):
        return _from_list(path)
    fields = pa.schema([])
    for _ in range(2):  # what looks like a time is text, as it was written
        options = arrow.ParseOptions(explicit_schema=fields, unexpected_field_behavior="infer")

        def parse(size: int, options: Any = options) -> "pa.Table":
            with pa.input_stream(str(path), compression="detect") as file:
                return arrow.read_json(file, arrow.ReadOptions(block_size=size), options)

        table = in_blocks(parse, path, _fault)
        fields = pa.schema([field for field in map(_as_text, table.schema) if field not in table.schema])
        if not len(fields):
            break
    return table


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The line of each object, and the object. Raises `ValueError` where a line is none."""
    with opened(path) as text:
        for line, content in enumerate(text, 1):
            if content.strip():
                if not isinstance(row := json.loads(content), dict):
                    raise ValueError("one list of objects has no lines")
                yield line, row


def _from_list(path: Path) -> "pa.Table":
    import pyarrow as pa

    with opened(path) as text:
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


def _as_text(field: "pa.Field") -> "pa.Field":
    import pyarrow as pa

    def plain(kind: "pa.DataType") -> "pa.DataType":
        if pa.types.is_temporal(kind):
            return pa.string()
        return pa.list_(plain(kind.value_type)) if pa.types.is_list(kind) else kind

    return field.with_type(plain(field.type))


def _fault(path: Path) -> str | None:
    """The first line that is no object, or has a value of another type than the lines before."""
    kinds: dict[str, str] = {}
    with opened(path) as text:
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
