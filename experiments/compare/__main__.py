"""The command line: python -m experiments.compare runs/. See --help."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.compare import table
from experiments.compare.runs import best_first, find, read
from experiments.shared.files import command, refuse, runs_folder

EXAMPLES = """\
examples:
  python -m experiments.compare                                     all runs below runs/
  python -m experiments.compare runs/lds old/runs --csv table.csv   these, and the rows as a file
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the runs and write them to files if asked to; return the exit code."""
    options = _parser().parse_args(arguments)
    for folder in options.folders:
        if not folder.is_dir():
            return refuse(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    rows = best_first([read(path) for path in find(options.folders)])
    if not rows:
        where = ", ".join(map(str, options.folders))
        print(f"no runs in {where}: a run is a folder with manifest.json and config.yaml", file=sys.stderr)
        return 1
    table.show(rows)
    for file, write in ((options.csv, table.write_csv), (options.json, table.write_json)):
        try:
            if file is not None:
                write(file, rows)
        except OSError as error:
            return refuse(f"{file}: {error.strerror}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description="Compare runs: a table, sorted by task, then by the monitored metric on the test set, best first.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runs = runs_folder()
    help_folders = f"folders that contain runs, at any depth (default: {runs})"
    parser.add_argument("folders", nargs="*", type=Path, default=[runs], help=help_folders)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    return parser


if __name__ == "__main__":
    command(main)
