"""Comparisons on the screen, and their rows in files."""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.compare.groups import Group, chosen
from experiments.compare.leaderboard import Sheet, gibibytes, group_facts, written
from experiments.compare.rounding import UNKNOWN, duration, number
from experiments.compare.runs import Row
from experiments.compare.select import value
from stu.files import write_atomically
from stu.training.records import flatten

WIDTH = 110  # at least; in a narrower terminal lines wrap, which is easier to read than columns of single letters
FOLDED = ("name", "status", "settings")
GAP = 2  # between columns
FOLD = 16  # columns that these have at least
# Title, alignment and content.
COLUMNS: Sequence[tuple[str, Literal["left", "right"], Callable[[Row], str]]] = (
    ("task", "left", lambda row: row.task),
    ("model", "left", lambda row: row.model),
    ("name", "left", lambda row: row.name),
    ("seed", "right", lambda row: number(row.seed, ",")),
    ("metric", "left", lambda row: row.metric or UNKNOWN),
    ("test", "right", lambda row: number(row.test)),
    ("best val", "right", lambda row: number(row.best_val)),
    ("parameters", "right", lambda row: number(row.parameters, ",")),
    ("seq/s", "right", lambda row: number(row.sequences_per_second, ",.0f")),
    ("tokens/s", "right", lambda row: number(row.tokens_per_second, ",.0f")),
    ("GiB", "right", lambda row: number(gibibytes(row), ".2f")),
    ("time", "right", lambda row: duration(row.seconds)),
    ("status", "left", lambda row: row.state),
)


def console() -> Console:
    """As wide as the terminal, or, if the output goes elsewhere, as wide as needed; texts are printed as they are."""
    made = Console(highlight=False, markup=False, emoji=False)
    made.width = max(made.width, WIDTH) if sys.stdout.isatty() else 10_000
    return made


def show(console: Console, parts: Sequence[Table | Text]) -> None:
    """Print tables and lines; a table that is wider than the terminal wraps, so that no number is cut."""
    terminal = console.width
    for part in parts:
        console.width = max(terminal, _fit(part, terminal)) if isinstance(part, Table) else terminal
        console.print(part)
    console.width = terminal


def _fit(table: Table, width: int) -> int:
    """Fix the widths of the columns, those that fold as wide as there is room; return the width of the table."""
    spare = width - sum((column.min_width or 0) + GAP for column in table.columns)
    for column in table.columns:
        least, most = column.min_width or 0, column.max_width or 0
        column.width = least + min(most - least, max(spare, 0))
        spare -= column.width - least
    return sum((column.width or 0) + GAP for column in table.columns)


def runs_table(rows: Sequence[Row], keys: Sequence[str] = ()) -> Table:
    """A line per run. keys: further columns."""
    titles = [*(title for title, *_ in COLUMNS[:-1]), *keys, "status"]
    lines = []
    for row in rows:
        *cells, status = (content(row) for _, _, content in COLUMNS)
        lines.append([*cells, *(written(value(row, key)) for key in keys), status])
    return _table(titles, [*keys, *(title for title, side, _ in COLUMNS if side == "left")], lines)


def sheet_parts(sheet: Sheet) -> list[Table | Text]:
    """A sheet: its title, the table, and what is said below it."""
    notes = [Text(note, style="dim") for note in sheet.notes]
    return [Text(sheet.title, style="bold"), _table(sheet.columns, sheet.texts, sheet.lines), *notes, Text()]


def plain(line: str) -> Text:
    """A line as it is."""
    return Text(line)


def _table(titles: Sequence[str], texts: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table in which long settings, names and remarks fold, and nothing else does."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, title in enumerate(titles):
        folds = title in FOLDED
        width = max(map(cell_len, (title, *(line[index] for line in lines))))
        justify: Literal["left", "right"] = "left" if title in texts else "right"
        least = min(width, FOLD) if folds else width
        table.add_column(title, justify=justify, overflow="fold", min_width=least, max_width=width)
    for line in lines:
        table.add_row(*line)
    return table


def csv_text(rows: Sequence[Row], groups: Sequence[Group]) -> str:
    """A line per run; unknown values are empty, what is nested is JSON."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, [*(field.name for field in fields(Row)), "group"], lineterminator="\n")
    writer.writeheader()
    for facts in _facts(rows, groups):
        writer.writerow({name: _cell(content) for name, content in facts.items()})
    return stream.getvalue()


def json_text(rows: Sequence[Row], groups: Sequence[Group], **more: Any) -> str:
    """An object with all `runs` and `groups`; unknown values are null, and so are those that are not finite."""
    best = set(map(id, chosen(groups)))
    shown = [group_facts(group, is_chosen=id(group) in best) for group in groups]
    content = _finite({"runs": list(_facts(rows, groups)), "groups": shown, **more})
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def save(file: Path, content: str) -> None:
    """Write a file whole or not at all, through links; pipes and terminals as they are. Raises `OSError`."""
    target, encoded = Path(os.path.realpath(file)), content.encode("utf-8", "backslashreplace")
    if file.absolute().is_relative_to("/dev") or (target.exists() and not target.is_file()):
        sys.stdout.flush()  # /dev/stdout may be a file, in which this is to stand after the table
        with file.open("ab") as stream:
            stream.write(encoded)
    else:
        write_atomically(target, encoded)


def _facts(rows: Sequence[Row], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What is written of each run: its fields, with the options flat, and the label of its group."""
    labels = {row.path: group.label for group in groups for row in group.rows}
    return [
        {name: getattr(row, name) for name in (field.name for field in fields(Row))}
        | {"config": flatten(row.config), "group": labels.get(row.path, "")}
        for row in rows
    ]


def _cell(content: Any) -> Any:
    if isinstance(content, tuple):
        content = "; ".join(map(str, content))
    elif isinstance(content, Mapping):
        content = json.dumps(_finite(content), ensure_ascii=False, default=str)
    return _no_formula(content)


def _no_formula(cell: Any) -> Any:
    """A text that a spreadsheet would compute gets the sign of a text, '; numbers stay."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(tuple("=+-@＝＋－＠")) else cell


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _finite(inner) for key, inner in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(inner) for inner in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
