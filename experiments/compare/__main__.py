"""The command line: python -m experiments.compare runs/. See --help."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.compare import table
from experiments.compare.runs import Row, best_first, find, read

EXAMPLES = """\
examples:
  python -m experiments.compare                                     all runs below runs/
  python -m experiments.compare runs/lds old/runs --csv table.csv   these, and the rows as a file
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the runs and write them where asked; returns the exit code."""
    options = _parser().parse_args(arguments)
    for folder in options.folders:
        if not folder.is_dir():
            return _error(f"{folder}: {'is no folder' if folder.exists() else 'no such folder'}")
    rows = best_first([read(path) for path in find(options.folders)])
    if not rows:
        where = ", ".join(map(str, options.folders))
        print(f"no runs in {where}: a run is a folder with manifest.json and config.yaml", file=sys.stderr)
        return 1
    table.show(rows)
    writers: list[tuple[Path | None, Callable[[Path, Sequence[Row]], None]]] = [
        (options.csv, table.write_csv),
        (options.json, table.write_json),
    ]
    for file, write in writers:
        if file is None:
            continue
        try:
            write(file, rows)
        except OSError as error:
            return _error(f"{file}: {error.strerror}")
    return 0


def _parser() -> argparse.ArgumentParser:
    runs = os.environ.get("STU_RUNS", "runs")  # where train.py writes them, see conf/paths
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description="Compare runs: a table, sorted by task, then by the monitored metric on the test set, best first.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path(runs)], help=f"where runs lie, at any depth (default: {runs})"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON, too")
    return parser


def _error(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
