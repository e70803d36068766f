"""The rows of a comparison on the screen and in files."""

import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.compare.runs import Row

ABSENT = "-"
WIDTH = 110  # at least; in a narrower terminal lines wrap, which is easier to read than columns of single letters
# Title, alignment and content.
COLUMNS: Sequence[tuple[str, Literal["left", "right"], Callable[[Row], str]]] = (
    ("task", "left", lambda row: row.task),
    ("model", "left", lambda row: row.model),
    ("name", "left", lambda row: row.name),
    ("seed", "right", lambda row: _number(row.seed, ",")),
    ("metric", "left", lambda row: row.metric or ABSENT),
    ("test", "right", lambda row: _number(row.test)),
    ("best val", "right", lambda row: _number(row.best_val)),
    ("parameters", "right", lambda row: _number(row.parameters, ",")),
    ("seq/s", "right", lambda row: _number(row.sequences_per_second, ",.0f")),
    ("tokens/s", "right", lambda row: _number(row.tokens_per_second, ",.0f")),
    ("GiB", "right", lambda row: _number(row.peak_memory and row.peak_memory / 2**30, ".2f")),
    ("time", "right", lambda row: _duration(row.seconds)),
    ("status", "left", lambda row: row.state),
)


def show(rows: Sequence[Row]) -> None:
    """Print a table as wide as the terminal, or, if the output goes elsewhere, as wide as needed."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, WIDTH) if sys.stdout.isatty() else 10_000
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title, justify, _ in COLUMNS:
        folds = title in ("name", "status")
        table.add_column(title, justify=justify, overflow="fold", no_wrap=not folds, min_width=8 if folds else None)
    for row in rows:
        table.add_row(*(content(row) for _, _, content in COLUMNS))
    console.print(table)


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Write one line per run; unknown values are empty."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = asdict(row) | {"unreadable": "; ".join(row.unreadable)}
            writer.writerow({name: _no_formula(cell) for name, cell in cells.items()})


def write_json(file: Path, rows: Sequence[Row]) -> None:
    """Write a list of objects; unknown values are null, and so are those that are not finite, which JSON lacks."""
    content = [{key: _finite(value) for key, value in asdict(row).items()} for row in rows]
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _no_formula(cell: Any) -> Any:
    """A text that a spreadsheet would compute gets the sign of a text, '; numbers stay."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(tuple("=+-@＝＋－＠")) else cell


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, form: str = ".4g") -> str:
    return ABSENT if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
