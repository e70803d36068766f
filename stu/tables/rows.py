"""Rows of tables, some at a time, in and out: files however large, standard input and output.

Needs pyarrow, imported where a file is read or parquet is written.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from stu.errors import OptionError, brief, require
from stu.files import replacing

TEXT = "text"  # the column of plain texts
Row = dict[str, Any]
Write = Callable[[Sequence[Row], Any], None]  # rows, and the schema of their source, if it has one


class Source(NamedTuple):
    """Rows, `size` of them at a time. place: where a row is, from its number. schema: of Arrow, where it is known."""

    batches: Iterable[Sequence[Row]]
    place: Callable[[int], str]
    schema: Any = None


# Rows in


def of_texts(texts: Sequence[str], size: int) -> Source:
    """Texts, each a row."""
    return Source(_batched([{TEXT: text} for text in texts], size), lambda row: f"text {row + 1}")


def of_standard_input(form: str, size: int) -> Source:
    """What comes in line by line, in one of `FORMS`; bytes that are no UTF-8 are kept as they are, and printed so."""
    lines = sys.stdin
    if isinstance(lines, TextIOWrapper):
        lines.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")
    return Source(_batched(FORMS[form](lines), size), lambda row: f"-: row {row + 1}")


def of_file(name: str, size: int, texts: Sequence[str] = ()) -> Source:
    """A file or folder that `stu.tables.reading` reads: parquet piece by piece, however large it is, others as a whole.

    texts: columns that are read as texts, whatever is in them.
    """
    from stu.tables.reading import kind_of, place_of, read_table

    path = Path(name).expanduser()
    if path.is_file() and kind_of(path) == ".parquet":
        from pyarrow import ArrowException, parquet

        def pieces() -> Iterator[list[Row]]:
            try:
                for batch in file.iter_batches(batch_size=size):
                    yield batch.to_pylist()
            except (OSError, ArrowException) as error:
                raise OptionError("INPUT", name, f"cannot be read to its end: {brief(error)}") from error

        try:
            file = parquet.ParquetFile(path)
        except (OSError, ArrowException) as error:
            raise OptionError("INPUT", name, f"cannot be read: {brief(error)}") from error
        batches, schema = pieces(), file.schema_arrow
        _require_single(schema.names, name)
    else:
        table = read_table(path, texts)
        batches, schema = (batch.to_pylist() for batch in table.to_batches(max_chunksize=size)), table.schema
    return Source(batches, lambda row: f"{name}: {place_of(path, row)}", schema)


def _require_single(names: Sequence[str], source: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    require(twice is None, "INPUT", source, f"has the column {twice!r} twice")


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _csv_lines(lines: IO[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    empty = 0  # cells of the only column: as in files, they are rows where others follow
    try:
        names = next(reader, [])
        _require_single(names, "-")
        for row in reader:
            if len(names) == 1 and row in ([], [""]):
                empty += 1
            elif row:
                allowed = "has not as many values as the header"
                require(len(row) == len(names), "INPUT", f"-: line {reader.line_num}", allowed)
                yield from ({names[0]: ""} for _ in range(empty))
                empty = 0
                yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise OptionError("INPUT", f"-: line {reader.line_num}", str(error)) from error


def _json_lines(lines: IO[str]) -> Iterator[Row]:
    names: dict[str, None] | None = None  # of the first row, in their order
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise OptionError("INPUT", f"-: line {number}", f"is no JSON: {error}") from error
            require(isinstance(row, dict), "INPUT", f"-: line {number}", "must be an object, {column: value, …}")
            names = dict.fromkeys(row) if names is None else names
            more = next((name for name in row if name not in names), None)
            require(more is None, "INPUT", f"-: line {number}", f"has a column {more}, which the first row has not")
            yield names | row


def _text_lines(lines: IO[str]) -> Iterator[Row]:
    return ({TEXT: line.rstrip("\r\n")} for line in lines)


FORMS: dict[str, Callable[[IO[str]], Iterator[Row]]] = {"csv": _csv_lines, "jsonl": _json_lines, "text": _text_lines}


# Rows out


@contextmanager
def writing(output: Path | None) -> Iterator[Write]:
    """What writes rows: csv to standard output, or a file of one of `WRITERS` that appears whole or not at all."""
    try:
        place = nullcontext() if output is None else replacing(output)
        with place as partial, WRITERS[".csv" if output is None else output.suffix](partial, output) as write:
            yield write
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OptionError("--output", output, f"cannot be written: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        sys.stdout.flush()
        return
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file


@contextmanager
def _csv(path: Path | None, output: Path | None) -> Iterator[Write]:
    with _opened(path) as file:
        writer: Any = csv.writer(file, lineterminator="\n")
        header: list[str] = []

        def write(rows: Sequence[Row], schema: Any) -> None:
            if not header:
                header.extend(rows[0])
                writer.writerow(header)
            writer.writerows([_cell(value) for value in row.values()] for row in rows)
            file.flush()

        yield write


def _cell(value: Any) -> Any:
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, list | dict) else value


@contextmanager
def _jsonl(path: Path | None, output: Path | None) -> Iterator[Write]:
    with _opened(path) as file:

        def write(rows: Sequence[Row], schema: Any) -> None:
            file.writelines(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)

        yield write


@contextmanager
def _parquet(path: Path | None, output: Path | None) -> Iterator[Write]:
    import pyarrow as pa
    from pyarrow import parquet

    writer: Any = None
    types: Any = None  # of all columns so far, or of the file
    held: list[Any] = []  # tables that wait for a value in each of their columns, which decides its type

    def refuse(why: str, error: Exception) -> NoReturn:
        raise OptionError("--output", output, f"{why}, try .jsonl: {brief(error)}") from error

    def table_of(rows: Sequence[Row], known: dict[str, Any]) -> Any:
        columns = {}
        for name in rows[0]:
            kind, before = known.get(name), None if types is None else types.field(name).type
            if kind is not None and before is not None and _values(kind) == _values(before):
                kind = before  # categories and texts are the same to who reads them
            try:
                columns[name] = pa.array([row[name] for row in rows], kind)
            except (pa.ArrowException, UnicodeError, OverflowError) as error:
                refuse(f"column {name} has values that parquet cannot hold", error)
        return pa.table(columns)

    def write_held() -> None:
        nonlocal writer
        try:
            writer = parquet.ParquetWriter(path, types) if writer is None else writer
        except pa.ArrowException as error:  # of objects without any value
            refuse("a column has a type that parquet has not", error)
        for table in held:
            columns = []
            for name, column in zip(table.column_names, table.columns, strict=True):
                try:
                    columns.append(column.cast(types.field(name).type))
                except pa.ArrowException as error:
                    refuse(f"column {name} has other numbers than the rows before", error)
            writer.write_table(pa.table(columns, schema=types))
        held.clear()

    def write(rows: Sequence[Row], schema: Any) -> None:
        nonlocal types
        table = table_of(rows, {} if schema is None else dict(zip(schema.names, schema.types, strict=True)))
        plain = pa.schema([pa.field(field.name, field.type) for field in table.schema])
        try:
            both = plain if types is None else pa.unify_schemas([types, plain], promote_options="permissive")
        except pa.ArrowException as error:
            refuse("rows have different types", error)
        types = both if writer is None else types
        held.append(table)
        if writer is not None or not any(_is_open(field.type) for field in types):
            write_held()

    yield write
    if types is None:
        parquet.write_table(pa.table({}), path)
    else:
        write_held()
        writer.close()


def _values(kind: Any) -> Any:
    """The type of the values of categories; others as they are."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_open(kind: Any) -> bool:
    """Whether a type of Arrow is, or has in it, that of no value at all."""
    import pyarrow as pa

    empty = pa.types.is_null(kind) or (pa.types.is_struct(kind) and kind.num_fields == 0)
    return empty or any(_is_open(kind.field(number).type) for number in range(kind.num_fields))


WRITERS: dict[str, Callable[[Path | None, Path | None], Any]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
