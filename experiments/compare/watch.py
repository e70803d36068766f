"""The same comparison again and again while runs go on, until Ctrl-C."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from experiments.compare import table
from experiments.compare.runs import Row, read

FILES = ("summary.json", "manifest.json", "config.yaml", "metrics.csv")


class Reader:
    """Reads runs, those that have finished once only."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Any, Row]] = {}

    def __call__(self, path: Path) -> Row:
        """The row of a run directory."""
        state = _state(path)
        if path not in self._seen or self._seen[path][0] != state or self._seen[path][1].status != "finished":
            self._seen[path] = state, read(path)
        return self._seen[path][1]


def watch(
    seconds: float,
    select: Callable[[Callable[[Path], Row]], list[Row]],
    compare: Callable[[Sequence[Row]], Any],
) -> int:
    """Show the runs every so many seconds, and write the files where runs have changed; 0 after Ctrl-C.

    compare: makes of runs what has `shown()`, the parts to print, and `write()`, for the files.
    On a terminal the last table is replaced, also one that is longer than the screen, as `rich.live` could not do.
    """
    console, reader, last = table.console(), Reader(), None
    try:
        while True:
            rows = select(reader)
            if rows != last:
                comparison = compare(rows)
                parts = comparison.shown() if rows else [table.plain("no runs yet")]
                if console.is_terminal:
                    console.clear()
                table.show(console, [*parts, Text(time.strftime("%H:%M:%S"), style="dim")])
                if rows:
                    comparison.write()
                last = rows
            time.sleep(min(seconds, 1e9))  # it takes no more
    except KeyboardInterrupt:
        return 0


def _state(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """Times and sizes of the files of a run."""
    return tuple(_stat(path / name) for name in FILES)


def _stat(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
