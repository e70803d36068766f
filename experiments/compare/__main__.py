"""The command line: python -m experiments.compare runs/. See --help."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.compare import markup, table
from experiments.compare.groups import Group, chosen, grouped
from experiments.compare.leaderboard import leaderboard, unfinished
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
        if not folder.is_dir():
            return refuse(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    try:
        if options.watch is not None:
            from experiments.compare.watch import watch

            return watch(options.watch, partial(_selected, options), partial(_shown, options), partial(_write, options))
        rows = _selected(options, read)
        if not rows:
            print(f"{_no_runs(options)}: a run is a folder with manifest.json and config.yaml", file=sys.stderr)
            return 1
        groups = grouped(rows)
        table.show(table.console(), _shown(options, rows, groups))
        _write(options, rows, groups)
    except (OptionError, Cannot) as error:
        return refuse(error)
    return 0


def _selected(options: argparse.Namespace, reader: Callable[[Path], Row]) -> list[Row]:
    """The runs in the folders for which --where holds; none only where the folders have none."""
    rows = best_first(reader(path) for path in find(options.folders))
    for word in options.where:
        hint = "; folders stand before the options" * Path(word).is_dir()
        require("=" in word or "<" in word or ">" in word, "--where", word, f"must be KEY=VALUE{hint}")
    kept = where(rows, options.where)
    of = f"none of {len(rows):,} runs is so" if len(rows) != 1 else "the only run is not so"
    require(bool(kept) or not rows, "--where", " ".join(options.where), of)
    for key in options.columns:
        require_key(rows, "--columns", key)
    return kept


def _no_runs(options: argparse.Namespace) -> str:
    return f"no runs in {', '.join(map(str, options.folders))}"


def _shown(options: argparse.Namespace, rows: Sequence[Row], groups: Sequence[Group]) -> list["Table | Text"]:
    """What is printed."""
    if options.runs:
        return [table.runs_table(rows, options.columns)]
    parts: list[Any] = []
    for sheet in leaderboard(groups, whole=options.all, keys=options.columns):
        parts += table.sheet_parts(sheet)
    if options.significance:
        parts += [part for sheet in _tested(options, groups)[0] for part in table.sheet_parts(sheet)]
    return [*parts, *map(table.plain, unfinished(rows))]


def _tested(options: argparse.Namespace, groups: Sequence[Group]) -> Any:
    from experiments.compare import significance  # with scipy

    return significance.sheets(groups if options.all else chosen(groups))


def _write(options: argparse.Namespace, rows: Sequence[Row], groups: Sequence[Group]) -> None:
    """Write all files that were asked for. Raises `Cannot`."""
    board = partial(leaderboard, groups, whole=options.all, keys=options.columns)
    seen = {"refresh": options.watch, "columns": options.columns}
    writers: Sequence[tuple[Path | None, Callable[[Path], object]]] = (
        (options.csv, lambda file: table.save(file, table.csv_text(rows, groups))),
        (options.json, lambda file: table.save(file, table.json_text(rows, groups, **_more(options, groups)))),
        (options.markdown, lambda file: table.save(file, markup.markdown(board()))),
        (options.latex, lambda file: table.save(file, markup.latex(board()))),
        (options.figures, lambda folder: _module("figures", "figures").write(groups, rows, folder, options.format)),
        (options.html, lambda file: _module("report", "html").write(rows, groups, file, **seen)),
    )
    for target, write in writers:
        try:
            if target is not None:
                write(target)
        except OSError as error:
            raise Cannot(f"{target}: {error.strerror or error}") from error


def _more(options: argparse.Namespace, groups: Sequence[Group]) -> dict[str, Any]:
    if not options.significance:
        return {}
    from experiments.compare.significance import facts

    return {"significance": [facts(one) for one in _tested(options, groups)[1]]}


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
    parser.add_argument("--markdown", help="also write the leaderboard as Markdown", **files)
    parser.add_argument("--latex", help="also write the leaderboard as LaTeX (booktabs)", **files)
    parser.add_argument("--html", help="also write a report to browse, one self-contained file", **files)
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also draw learning curves and comparisons")
    help_format = f"of the figures: {', '.join(FORMATS)} (default: png)"
    parser.add_argument("--format", type=_formats, default=("png",), metavar="FORMAT[,FORMAT]", help=help_format)
    help_watch = "again every so many seconds (default: 5), files too, until Ctrl-C"
    parser.add_argument("--watch", nargs="?", type=positive, const=5.0, metavar="SECONDS", help=help_watch)
    return parser


if __name__ == "__main__":
    command(main)
