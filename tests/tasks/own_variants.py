"""Tables that are wrong in one place, in all formats: python -m tests.tasks.own_variants 1000.

Every one must be refused in one line that names what is expected of it; none may be taken, and none may break anything.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet

from data.own.table import TableData
from data.own.tasks import own
from stu.errors import OptionError
from stu.task import Task

Columns = dict[str, list[Any]]
ROWS, STEPS = 24, 6
TEXT, NESTED = ("csv", "tsv", "jsonl"), ("jsonl", "json", "parquet", "arrow", "feather", "saved")
SCALAR = ("csv", "tsv", *NESTED)


class Variant(NamedTuple):
    """What is tried. said: all that the line must contain; {place} is that of `row` in the format."""

    name: str
    format: str
    columns: Columns
    options: dict[str, Any]
    said: tuple[str, ...]
    row: int = 0
    damage: Callable[[Path], None] = lambda path: None

    def where(self) -> str:
        """The line or row as it must be named."""
        lines = {"csv": self.row + 2, "tsv": self.row + 2, "jsonl": self.row + 1}
        return f"line {lines[self.format]}" if self.format in lines else f"row {self.row + 1}"


def make(folder: Path, variant: Variant) -> Path:
    """Its file."""
    return write(folder / f"t.{variant.format}", variant.columns)


def write(path: Path, columns: Columns) -> Path:
    """A table in the format that the name says."""
    kind, rows = path.suffix[1:], [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(map(cell, row.values())) for row in rows]
        path.write_text("\n".join([mark.join(columns), *lines, ""]))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        binary(path, kind, pa.table({name: pa.array(uniform(values)) for name, values in columns.items()}))
    return path


def binary(path: Path, kind: str, table: pa.Table) -> None:
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "saved":
        Dataset(table).save_to_disk(path)
    else:
        with (pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file)(str(path), table.schema) as file:
            file.write_table(table)


def uniform(values: list[Any]) -> list[Any]:
    """What a typed column can hold: texts where some are texts."""
    mixed = any(isinstance(value, str) for value in values)
    return [value if value is None or not mixed else str(value) for value in values]


def cell(value: Any) -> str:
    return "" if value is None else f'"{value}"' if isinstance(value, str) and set(" ,") & set(value) else str(value)


def attempt(folder: Path, source: str | Path, **options: Any) -> Task:
    """The task of a source, with these options instead of the defaults."""
    of_task = {"seq_len": 32, "causal": True, "pool": "mean", "context": None, "horizon": None, "season": None}
    of_task |= {name: options.pop(name) for name in (*of_task, "inputs", "target") if name in options}
    data = partial(TableData, dir=str(folder / "cache"), source=str(source), **options)
    return own(**of_task, data=data)  # type: ignore[arg-type]


def fault(folder: Path, variant: Variant) -> str:
    """What is wrong with the answer; nothing where it is one line with all that is expected."""
    path = make(folder, variant)
    variant.damage(path)
    try:
        attempt(folder, path, **variant.options)
    except OptionError as error:
        line = str(error)
        lacking = [word for word in (*variant.said,) if word.format(place=variant.where()) not in line]
        if "\n" in line or len(line) > 500:
            return f"not one line: {line}"
        return f"lacks {lacking}: {line}" if lacking else ""
    except Exception as error:  # what must not happen
        return f"{type(error).__name__}: {error}"
    return "taken as it is"


# Good tables, and what reads them


def wide(draw: random.Random) -> tuple[Columns, dict[str, Any]]:
    """One number a column, and a class."""
    numbers: Columns = {f"x{step}": [round(draw.gauss(0, 1), 4) for _ in range(ROWS)] for step in range(STEPS)}
    return {**numbers, "y": [draw.choice("ab") if row > 3 else "ab"[row % 2] for row in range(ROWS)]}, {
        "inputs": "x*",
        "target": "y",
    }


def lists(draw: random.Random) -> tuple[Columns, dict[str, Any]]:
    """A list of numbers, and a number."""
    series = [[draw.gauss(0, 1) for _ in range(draw.randint(2, 9))] for _ in range(ROWS)]
    return {"s": series, "y": [draw.gauss(0, 1) for _ in range(ROWS)]}, {"inputs": "s", "target": "y"}


def sentences(draw: random.Random) -> tuple[Columns, dict[str, Any]]:
    """Texts, and true or false."""
    texts = [" ".join(draw.choices(["good", "bad", "film"], k=draw.randint(2, 5))) for _ in range(ROWS)]
    read = draw.choice(["bytes", "characters", "words"])
    return {"text": texts, "y": [row % 2 == 0 for row in range(ROWS)]}, {"inputs": "text", "target": "y", "read": read}


def tokens(draw: random.Random) -> tuple[Columns, dict[str, Any]]:
    """Integers, the next of which is predicted."""
    return {"s": [[draw.randrange(5) for _ in range(8)] + [0, 4] for _ in range(ROWS)]}, {
        "inputs": "s",
        "target": "next",
    }


def long(draw: random.Random) -> tuple[Columns, dict[str, Any]]:
    """A row a step: 12 series of 6 steps, forecast, or a class of each."""
    n = 12 * STEPS
    columns: Columns = {"id": [row // STEPS for row in range(n)], "t": [row % STEPS for row in range(n)]}
    columns |= {name: [round(draw.gauss(0, 1), 4) for _ in range(n)] for name in "uv"}
    columns["y"] = ["ab"[row // STEPS % 2] for row in range(n)]
    target = draw.choice(["next", "y"])
    return columns, {"inputs": ["u", "v"], "target": target, "sequence": "id", "time": "t"}


GOOD: dict[Callable[[random.Random], tuple[Columns, dict[str, Any]]], tuple[str, ...]] = {
    wide: SCALAR,
    lists: NESTED,
    sentences: SCALAR,
    tokens: NESTED,
    long: SCALAR,
}


def variants(seed: int) -> Iterator[Variant]:
    """One of every kind, their places and formats drawn."""
    draw = random.Random(seed)
    for good, formats in GOOD.items():
        columns, options = good(draw)
        size = len(next(iter(columns.values())))
        of = partial(_variant, good.__name__, draw, formats, columns, options)
        row = draw.randrange(size)
        inputs = [name for name in columns if name[0] in "xs" or name in ("text", "u", "v")]
        name = draw.choice(inputs)
        yield of("no such input", options={"inputs": f"{name}_"}, said=("inputs=", "did you mean", name))
        yield of("no such target", options={"target": "z"}, said=("target=z", "no such column"))
        yield of("no inputs", options={"inputs": None}, said=("inputs=None", "must be a column"))
        yield of("input is target", options={"inputs": inputs, "target": name}, said=(f"target={name}", "is an input"))
        yield of("empty cell", set_cell=(name, row, None), said=("t.", "{place}", f"column {name}", "empty"))
        yield of("empty column", set_column=(name, [None] * size), said=("t.", f"column {name}"), formats=NESTED)
        yield of("too many", options={"val": 1000}, said=("val=1000",))
        yield of("no such format", rename=True, said=("must end in",))
        yield of(
            "damaged", damage=draw.choice([emptied, halved]), said=("t.",), formats=("parquet", "feather", "arrow")
        )
        yield of(
            "no text",
            damage=garbage,
            said=("t.",),
            formats=("csv", "tsv", "jsonl", "json") if good is not lists and good is not tokens else ("jsonl", "json"),
        )
        yield of("a key breaks", damage=broken_line, said=("line 4",), formats=("jsonl",))
        split = [("train", "val", "test")[row % 3] for row in range(size)]
        split[row] = "rest"
        if good is not long:
            yield of(
                "no split",
                extra={"part": split},
                options={"split": "part"},
                said=("{place}", "column part", "'rest'"),
                row=row,
            )
        if good in (wide, long):
            yield of("not a number", set_cell=(name, row, "abc"), said=("t.", f"column {name}"), row=row)
            yield of(
                "not finite",
                set_cell=(name, row, draw.choice([float("inf"), float("-inf")])),
                said=("t.", "{place}", f"column {name}", "finite"),
                formats=("csv", "tsv", "parquet", "arrow", "feather", "saved"),
            )
            yield of(
                "not a number at all",
                set_cell=(name, row, float("nan")),
                said=("t.", "{place}", f"column {name}"),
                formats=("csv", "tsv", "parquet", "arrow", "feather", "saved"),
            )
            yield of(
                "one field more",
                damage=partial(longer_line, row + 1),
                said=(f"line {row + 2}", "values"),
                formats=("csv", "tsv"),
            )
            yield of("an open quote", damage=partial(quoted_line, row + 1), said=("line ",), formats=("csv", "tsv"))
            yield of("twice a column", damage=twice_named, said=("twice",), formats=("csv", "tsv"))
        if good is long:
            yield of("constant", set_column=("u", [1.5] * size), said=("t.", "column u", "must vary"))
            last = size - 1
            yield of("a time again", set_cell=("t", last, STEPS - 2), said=("t.", "{place}", "column t"), row=last)
            if options["target"] == "y":
                yield of("two classes", set_cell=("y", 1, "b"), said=("t.", "{place}", "column y"), row=1)
            yield of("no id", set_cell=("id", row, None), said=("t.", "{place}", "column id"), row=row)
        if good is wide:
            yield of("one class", set_column=("y", ["a"] * size), said=("target=y", "single class"))
            yield of("target empty", set_cell=("y", row, None), said=("t.", "{place}", "column y"), row=row)
            yield of("constant inputs", set_columns={one: [2.0] * size for one in inputs}, said=("t.", "must vary"))
            parts = ["train"] * size
            parts[0], parts[1], parts[row if row > 1 else 2] = "val", "test", "val"
            other = draw.choice([0, 1])
            unseen = list(columns["y"])
            unseen[other] = "never"
            yield of(
                "a class of val",
                set_column=("y", unseen),
                extra={"part": parts},
                options={"split": "part"},
                said=("t.", "{place}", "column y", "'never'", "not in train"),
                row=other,
            )
            yield of(
                "a leak",
                extra={"z": columns[inputs[0]]},
                options={"target": "z"},
                said=("target=z", "equals the input"),
            )
            yield of("too long", options={"seq_len": STEPS - 1}, said=("seq_len=5", "6 steps", "t."))
        if good is lists:
            longest = list(columns["s"])
            longest[row] = [float(step) for step in range(40)]
            yield of("too long", set_column=("s", longest), said=("seq_len=32", "40 steps", "{place}"), row=row)
            yield of("no step", set_cell=("s", row, []), said=("t.", "{place}", "column s", "empty"), row=row)
            yield of(
                "an empty step", set_cell=("s", row, [0.5, None]), said=("t.", "{place}", "column s", "step 2"), row=row
            )
            yield of(
                "not finite",
                set_cell=("s", row, [0.5, float("inf")]),
                said=("t.", "{place}", "step 2"),
                row=row,
                formats=("parquet", "arrow", "feather", "saved"),
            )
            ragged = [[[value, 1.0] for value in one] for one in columns["s"]]
            ragged[row][1] = [0.5]
            yield of("ragged", set_column=("s", ragged), said=("t.", "{place}", "column s", "step 2"), row=row)
            yield of(
                "of another kind",
                set_cell=("s", row, "abc"),
                said=("t.", "column s"),
                row=row,
                formats=("jsonl", "json"),
            )
            yield of("constant target", set_column=("y", [0.25] * size), said=("t.", "column y", "must vary"))
        if good is sentences:
            yield of(
                "an empty text", set_cell=("text", row, " "), said=("t.", "{place}", "column text", "empty"), row=row
            )
            yield of("too long", options={"seq_len": 1}, said=("seq_len=1", "steps"))
            yield of(
                "not utf-8", damage=partial(bytes_in_line, row + 1), said=("t.", f"line {row + 2}"), formats=("csv",)
            )
        if good is tokens:
            yield of("below 0", set_cell=("s", row, [1, -3, 2]), said=("t.", "{place}", "column s", "-3"), row=row)
            yield of(
                "no integer",
                set_column=("s", [[0.5, 1.0]] * size),
                options={"read": "tokens"},
                said=("t.", "column s", "0.5"),
            )
            yield of("one step", set_cell=("s", row, [1]), said=("t.", "{place}", "column s"), row=row)
            yield of(
                "above",
                set_cell=("s", row, [1, 9]),
                options={"vocabulary": 5},
                said=("t.", "{place}", "9", "vocabulary"),
                row=row,
            )
            yield of("looks ahead", options={"causal": False}, said=("causal=False",))


def _variant(
    of: str, draw: random.Random, default: tuple[str, ...], columns: Columns, usual: dict[str, Any], name: str, *,
    said: tuple[str, ...], row: int = 0, formats: tuple[str, ...] | None = None, rename: bool = False,
    set_cell: tuple[str, int, Any] | None = None, set_column: tuple[str, list[Any]] | None = None,
    set_columns: Columns | None = None, extra: Columns | None = None, damage: Callable[[Path], None] | None = None,
    options: dict[str, Any] | None = None,
) -> Variant:  # fmt: skip
    changes = {**(extra or {}), **(set_columns or {}), **dict([set_column] if set_column else [])}
    if set_cell is not None:
        column, row, value = set_cell
        values = list(columns[column])
        values[row] = value
        changes[column] = values
    kind = draw.choice([one for one in formats or default if one in default or formats])
    if rename:
        damage, kind = None, "xlsx"
    return Variant(
        f"{of}, {name}", kind, {**columns, **changes}, {**usual, **(options or {})}, said, row,
        damage or (lambda path: None),
    )  # fmt: skip


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)) * 8)


def edited(path: Path, line: int, change: Callable[[bytes], bytes]) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[line] = change(lines[line])
    path.write_bytes(b"\n".join(lines))


def broken_line(path: Path) -> None:
    edited(path, 3, lambda line: line[:-3])


def longer_line(number: int, path: Path) -> None:
    mark = b"\t" if path.suffix == ".tsv" else b","
    edited(path, number, lambda line: line + mark + b"1")


def quoted_line(number: int, path: Path) -> None:
    edited(path, number, lambda line: b'"' + line)


def bytes_in_line(number: int, path: Path) -> None:
    edited(path, number, lambda line: b"\xff" + line)


def twice_named(path: Path) -> None:
    mark = b"\t" if path.suffix == ".tsv" else b","
    edited(path, 0, lambda line: mark.join([line.split(mark)[0], line.split(mark)[0], *line.split(mark)[2:]]))


def faults(count: int, folder: Path, seed: int = 0) -> list[str]:
    """What is wrong with the answers to so many variants; `seed` draws which."""
    found, done = [], 0
    while done < count:
        drawn = list(variants(seed))
        random.Random(seed).shuffle(drawn)
        for variant in drawn[: count - done]:
            place = folder / f"{seed}-{done}"
            place.mkdir(parents=True)
            if problem := fault(place, variant):
                found.append(f"{variant.name}, {variant.format}: {problem}")
            done += 1
        seed += 1
    return found


if __name__ == "__main__":
    number = int(sys.argv[1])
    with TemporaryDirectory() as home:
        wrong = faults(number, Path(home))
    print("\n".join([*wrong, f"{len(wrong)} of {number} are not refused in one line that says where"]))
    raise SystemExit(bool(wrong))
