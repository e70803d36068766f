"""The command line: python -m experiments.compare runs/. See --help."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.compare import markup, table
from experiments.compare.groups import chosen, grouped
from experiments.compare.leaderboard import Sheet, leaderboard, unfinished
from experiments.compare.runs import Row, best_first, find, read
from experiments.compare.select import require_key, where
from experiments.shared.arguments import positive
from experiments.shared.files import command, refuse, runs_folder
from stu.errors import OptionError, require

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

FORMATS = ("png", "pdf", "svg")
EXTRAS = {"figures": "plot", "html": "report"}  # option → the extra of pyproject.toml with what it imports
EXAMPLES = """\
examples:
  python -m experiments.compare                                         all runs below runs/
  python -m experiments.compare runs/lds old/runs --csv table.csv       these, and the rows as a file
  python -m experiments.compare --where task=lds model=stu,s5 'optimizer.lr<=1e-3' --columns optimizer.lr
  python -m experiments.compare --all --significance                    every setting; whether models differ
  python -m experiments.compare --html report.html --figures figures --watch 30   again and again while runs go on

KEY is a field of a run (task, model, name, seed, status, experiment, sweep, tags, …) or a key of its configuration.
"""


class Cannot(Exception):
    """A file that was asked for cannot be written, in words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the runs and write files if asked to; return the exit code."""
    options = _parser().parse_args(arguments)
    for folder in options.folders:
        if not os.path.isdir(folder):
            return refuse(f"{folder}: {'is not a folder' if os.path.exists(folder) else 'no such folder'}")
    try:
        _require_apart([options.csv, options.json, options.markdown, options.latex, options.html])
        if options.watch is not None:
            from experiments.compare.watch import watch

            return watch(options.watch, partial(_selected, options), partial(Comparison, options))
        rows = _selected(options, read)
        if not rows:
            folders = ", ".join(map(str, options.folders))
            print(f"no runs in {folders}: a run is a folder with manifest.json and config.yaml", file=sys.stderr)
            return 1
        comparison = Comparison(options, rows)
        table.show(table.console(), comparison.shown())
        comparison.write()
    except (OptionError, Cannot) as error:
        return refuse(error)
    return 0


class Comparison:
    """What is shown of some runs, and written."""

    def __init__(self, options: argparse.Namespace, rows: Sequence[Row]) -> None:
        self.options, self.rows, self.groups = options, rows, grouped(rows)

    @cached_property
    def board(self) -> list[Sheet]:
        """The leaderboard."""
        return leaderboard(self.groups, whole=self.options.all, keys=self.options.columns)

    @cached_property
    def tested(self) -> tuple[list[Sheet], list[Any]]:
        """The sheets of --significance, and all pairs of groups; nothing where it was not asked for."""
        if not self.options.significance:
            return [], []
        from experiments.compare import significance  # with scipy

        return significance.sheets(self.groups if self.options.all else chosen(self.groups))

    def shown(self) -> list["Table | Text"]:
        """What is printed."""
        parts: list[Any] = [table.runs_table(self.rows, self.options.columns)] * self.options.runs
        sheets = [*([] if self.options.runs else self.board), *self.tested[0]]
        parts += [part for sheet in sheets for part in table.sheet_parts(sheet)]
        return parts if self.options.runs else [*parts, *map(table.plain, unfinished(self.rows))]

    def write(self) -> None:
        """Write all files that were asked for. Raises `Cannot`."""
        options, rows, groups = self.options, self.rows, self.groups
        seen = {"refresh": options.watch, "columns": options.columns}
        writers: Sequence[tuple[Path | None, Callable[[Path], object]]] = (
            (options.csv, lambda file: table.save(file, table.csv_text(rows, groups))),
            (options.json, lambda file: table.save(file, table.json_text(rows, groups, **self._more()))),
            (options.markdown, lambda file: table.save(file, markup.markdown([*self.board, *self.tested[0]]))),
            (options.latex, lambda file: table.save(file, markup.latex([*self.board, *self.tested[0]]))),
            (options.figures, lambda folder: _module("figures", "figures").write(groups, rows, folder, options.format)),
            (options.html, lambda file: _module("report", "html").write(rows, groups, file, **seen)),
        )
        for target, write in writers:
            try:
                if target is not None:
                    write(target)
            except OSError as error:
                raise Cannot(f"{target}: {error.strerror or error}") from error

    def _more(self) -> dict[str, Any]:
        if not self.options.significance:
            return {}
        from experiments.compare.significance import facts

        return {"significance": list(map(facts, self.tested[1]))}


def _require_apart(files: Sequence[Path | None]) -> None:
    """Raise `Cannot` where two files are one, which would have the last content alone."""
    real = [os.path.realpath(file) for file in files if file and not file.is_relative_to("/dev")]
    if twice := next((file for file in real if real.count(file) > 1), None):
        raise Cannot(f"{twice}: is asked for twice, with different content")


def _selected(options: argparse.Namespace, reader: Callable[[Path], Row]) -> list[Row]:
    """The runs in the folders for which --where holds; none only where the folders have none, or may get some."""
    rows = best_first(reader(path) for path in find(options.folders))
    for word in options.where:
        hint = "; folders stand before the options" * os.path.isdir(word)
        require("=" in word or "<" in word or ">" in word, "--where", word, f"must be KEY=VALUE{hint}")
    kept = where(rows, options.where)
    of = f"none of {len(rows):,} runs is so" if len(rows) != 1 else "the only run is not so"
    require(bool(kept) or not rows or options.watch is not None, "--where", " ".join(options.where), of)
    for key in options.columns:
        require_key(rows, "--columns", key)
    return kept


def _module(name: str, option: str) -> Any:
    """The module of an option that needs an extra. Raises `Cannot` where that is not installed."""
    try:
        return importlib.import_module(f"experiments.compare.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "experiments":
            raise
        package = (error.name or "").split(".")[0]
        raise Cannot(f'--{option} needs {package}: pip install -e ".[{EXTRAS[option]}]"') from error


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    if not set(formats) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text}: must be of {', '.join(FORMATS)}, with commas between them")
    return formats


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description="Compare runs: for each task a leaderboard of the models, mean ± std over seeds, and what has not "
        "finished.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runs = runs_folder()
    help_folders = f"folders that contain runs, at any depth (default: {runs})"
    parser.add_argument("folders", nargs="*", type=Path, default=[runs], help=help_folders)
    words: Any = {"nargs": "+", "action": "extend", "default": []}
    help_where = "only runs of which all this holds: KEY=VALUE[,VALUE], or with !=, <, <=, >, >=; wildcards * and ?"
    parser.add_argument("--where", metavar="KEY=VALUE", help=help_where, **words)
    parser.add_argument("--columns", metavar="KEY", help="further columns", **words)
    parser.add_argument("--all", action="store_true", help="all settings of a model, not the best on validation")
    parser.add_argument("--runs", action="store_true", help="a line per run instead of the leaderboard")
    parser.add_argument("--significance", action="store_true", help="whether models differ by more than their seeds")
    files: Any = {"type": Path, "metavar": "FILE"}
    parser.add_argument("--csv", help="also write the runs as CSV", **files)
    parser.add_argument("--json", help="also write runs and groups as JSON", **files)
    parser.add_argument("--markdown", help="also write what is compared as Markdown", **files)
    parser.add_argument("--latex", help="also write what is compared as LaTeX (booktabs)", **files)
    parser.add_argument("--html", help="also write a report to browse, one self-contained file", **files)
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also draw learning curves and comparisons")
    help_format = f"of the figures: {', '.join(FORMATS)} (default: png)"
    parser.add_argument("--format", type=_formats, default=("png",), metavar="FORMAT[,FORMAT]", help=help_format)
    help_watch = "again every so many seconds (default: 5), files too, until Ctrl-C"
    parser.add_argument("--watch", nargs="?", type=positive, const=5.0, metavar="SECONDS", help=help_watch)
    return parser


if __name__ == "__main__":
    command(main)
