"""A study: one command that runs a grid of cells and rewrites its results, its figure and the table in its README.

A study is a folder of `experiments`: `study.py`, a `_Definition`; a `__main__.py` that calls `Study.main`; a README.md
with a pair of lines `MARKERS`; and results.json and NAME.png, which the command writes.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy
import torch

from experiments.shared.files import refuse, runs_folder
from experiments.shared.grid import Cell, Row, Settings, run_cells, to_json
from experiments.shared.machine import ROOT, origin
from stu.errors import OptionError, require
from stu.files import write_atomically

FILE = "results.json"
MARKERS = ("<!-- the command writes from here -->", "<!-- to here -->")

Results = dict[str, Any]  # what results.json holds


class _Definition(Protocol):
    """What a module `study.py` has, besides a `__file__` in the study's folder.

    SETTINGS: plain values; QUICK: those that differ in a smoke test of seconds. cells: the grid, dicts of plain values
    that determine all of the work. work: the result of a cell, plain numbers and lists, seeded by the cell; it runs in
    another process. summarize: the numbers that are quoted. report: the Markdown between the markers of the README.
    draw: on a matplotlib Figure. The last three read what results.json holds, see `statistics`.
    """

    __file__: str | None
    SETTINGS: Settings
    QUICK: Settings

    def cells(self, settings: Settings, /) -> list[Cell]: ...

    def work(self, cell: Cell, /) -> Row: ...

    def summarize(self, rows: list[Row], /) -> Any: ...

    def report(self, results: Results, /) -> str: ...

    def draw(self, results: Results, figure: Any, /) -> None: ...


@dataclass(frozen=True)
class Study:
    """A study, by its definition; its name is that of its folder."""

    definition: _Definition

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return Path(str(self.definition.__file__)).parent

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; return the exit code."""
        given = sys.argv[1:] if arguments is None else list(arguments)
        options = self._parser().parse_args(given)
        name = self.folder.name
        out = options.out or (runs_folder() / "studies" / f"{name}-quick" if options.quick else self.folder)
        try:
            if not options.redraw:
                self._run(out, options, shlex.join(["python", "-m", f"experiments.{name}", *given]))
            self._show(out)
        except OptionError as error:
            return refuse(error)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command continues it", file=sys.stderr)
            return 130
        return 0

    def _run(self, out: Path, options: argparse.Namespace, command: str) -> None:
        """Run all cells and write results.json."""
        settings = {**self.definition.SETTINGS, **(self.definition.QUICK if options.quick else {})}
        before = _read_results(out)
        same = before is None or before["settings"] == json.loads(json.dumps(settings))
        require(same or options.force, "--out", out, "has results of other settings; --force replaces them")
        for library in ("OPENBLAS", "OMP"):  # for the workers, which divide the cores among them
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")
        journal = runs_folder() / "studies" / f"{self.folder.name}-{_code()}.jsonl"
        about = origin(torch.device("cpu"))
        versions = {name: about["machine"].pop(name) for name in ("python", "torch")}
        started = time.monotonic()
        rows = run_cells(self.definition.work, self.definition.cells(settings), journal, options.workers)
        results = {
            "study": self.folder.name,
            "command": command,
            **about,
            "versions": {**versions, "numpy": np.__version__, "scipy": scipy.__version__},
            "seconds": round(time.monotonic() - started, 1),
            "cell_seconds": round(sum(row["seconds"] for row in rows), 1),
            "settings": settings,
            "summary": to_json(self.definition.summarize(rows)),
            "rows": rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / FILE, _rendered(results))
        journal.unlink()  # the results have all of it: the next run starts over

    def _show(self, out: Path) -> None:
        """Print the report, and write it and the figure, all from results.json."""
        results = _read_results(out)
        require(results is not None, "--out", out, f"has no {FILE} that can be read")
        assert results is not None
        text = self.definition.report(results)
        print(text)
        readme = out / "README.md"
        if readme.exists():
            write_atomically(readme, with_report(readme.read_text(encoding="utf-8"), text))
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            print(f"no figure: {error.name} is not installed; pip install matplotlib, then --redraw", file=sys.stderr)
            return
        figure = Figure(layout="constrained")
        self.definition.draw(results, figure)
        figure.savefig(out / f"{self.folder.name}.png", dpi=150, metadata={"Software": None})

    def _parser(self) -> argparse.ArgumentParser:
        readme = self.folder / "README.md"
        title = readme.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if readme.exists() else None
        parser = argparse.ArgumentParser(prog=f"python -m experiments.{self.folder.name}", description=title)
        parser.add_argument("--quick", action="store_true", help="a smoke test of seconds, not into the study's folder")
        parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"for {FILE} and the figure")
        parser.add_argument("--force", action="store_true", help="replace results of other settings")
        parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
        parser.add_argument("--redraw", action="store_true", help="run nothing; README and figure from the results")
        return parser


def with_report(readme: str, text: str) -> str:
    """The README with `text` between its `MARKERS`."""
    start, end = MARKERS
    before, _, rest = readme.partition(start)
    _, found, after = rest.partition(end)
    require(bool(found), "README.md", start, f"must be there once, and {end} after it")
    return f"{before}{start}\n{text.strip()}\n{end}{after}"


def _code() -> str:
    """A fingerprint of all of this repository's code that is loaded: rows made by other code are not reused."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    own = sorted(path for file in files if file and (path := Path(file)).is_relative_to(ROOT))
    ours = [path for path in own if path.relative_to(ROOT).parts[0] in ("stu", "data", "experiments")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in ours)).hexdigest()[:12]


def _read_results(out: Path) -> Results | None:
    try:
        return json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _rendered(results: Results) -> str:
    """JSON that is easy to read and to compare: one row per line."""
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in results["rows"])
    whole = json.dumps({**results, "rows": []}, indent=2, ensure_ascii=False, allow_nan=False)
    return whole.replace('"rows": []', f'"rows": [\n{rows}\n  ]') + "\n"
