"""Collect the board: python -m experiments.mini [FOLDER …] [--add] [--out FOLDER].

Reads the runs of sweep=mini below the folders (default: runs/, or $STU_RUNS), writes results.json, the table in
README.md and board.png, and says what the board lacks: then exit code 1, and nothing is written without --out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.compare.groups import Group
from experiments.compare.runs import find, read
from experiments.mini.board import Result, added, groups, is_of_board, is_of_preset, problems, results_of, table
from experiments.shared.files import command, refuse, runs_folder
from experiments.shared.study import FILE, with_report
from stu.errors import OptionError, require
from stu.files import write_atomically

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the runs and write the files; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mini", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="where the runs are")
    parser.add_argument("--add", action="store_true", help="keep what results.json has of other models and tasks")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of these files, default: where the board is")
    options = parser.parse_args(arguments)
    folders = options.folders or [runs_folder()]
    try:
        for folder in folders:
            require(folder.is_dir(), "FOLDER", folder, "must be a folder")
        rows = [row for row in map(read, find(folders)) if is_of_preset(row)]
        results = results_of(rows)
        require(bool(results), "FOLDER", folders[0], "has no run of a preset experiment=mini/… as it is")
        out = options.out or HERE
        earlier = json.loads((out / FILE).read_text(encoding="utf-8")) if (out / FILE).exists() else []
        results = added(results, earlier) if options.add else results
        lacking = problems(results, earlier)
        if options.out or not lacking:
            out.mkdir(parents=True, exist_ok=True)
            write(results, out)
    except (OptionError, OSError) as error:
        return refuse(error)
    print(table(results))
    if others := [row.path for row in rows if not is_of_board(row)]:
        print(f"not of the board: {len(others)} runs with settings of their own, as {others[0]}", file=sys.stderr)
    if lacking and not options.out:
        lacking.append(f"{HERE} stays as it is; --out FOLDER writes elsewhere")
    for problem in lacking:
        print(problem, file=sys.stderr)
    return 1 if lacking else 0


def write(results: Sequence[Result], folder: Path) -> None:
    """results.json, a run a line; the table between the markers of README.md, if there is one; board.png."""
    text = table(results)
    lines = ",\n".join(json.dumps(result, allow_nan=False) for result in results)
    write_atomically(folder / FILE, f"[\n{lines}\n]\n")
    readme = folder / "README.md"
    if readme.exists():
        write_atomically(readme, with_report(readme.read_text(encoding="utf-8"), text))
    draw(groups(results), folder / "board.png")


def draw(some: Sequence[Group], file: Path) -> None:
    """All models on all tasks in one figure. Raises `OptionError` without matplotlib."""
    try:
        from experiments.compare.figures import board, style
    except ModuleNotFoundError as error:
        raise OptionError("board.png", file, f'needs {error.name}: pip install ".[plot]"') from None
    with style.styled():
        if figure := board.board(some, sorted({group.model for group in some})):
            style.save(figure, file)


if __name__ == "__main__":
    command(main)
