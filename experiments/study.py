"""What the studies share: a small trainer, a grid of cells that survives interruption, results, README and figure.

A study is a folder of `experiments`: `study.py` with one `STUDY`, a `__main__.py` that calls `STUDY.main()`, a
README.md with a pair of lines `MARKERS`, and results.json and NAME.png, which the command writes:

    STUDY = Study(
        folder=Path(__file__).parent,
        cells=cells,          # settings → the cells, dicts of plain values that determine all of the work
        work=work,            # cell → its result, a dict of plain numbers and lists; a function of a module
        summarize=summarize,  # rows (cell and result in one dict) → the numbers that are quoted
        report=report,        # results → Markdown between the markers of the README
        draw=draw,            # results, matplotlib Figure → None
        settings={…},         # plain values; quick: those that differ in a smoke test of seconds
        quick={…},
    )

Inside `work`: seed from the cell (`torch.manual_seed(cell["seed"])`), build a module, call `fit`. Inside the others:
`select`, `quartiles`, `best`, `reached`, `band`, `markdown`. They are given what results.json holds: numbers of six
digits, and null (None) for what is not finite, which `number` and all helpers here read as infinity.

    python -m experiments.NAME [--quick] [--out FOLDER] [--force] [--workers N] [--redraw]
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import OptionError, require

ROOT = Path(__file__).resolve().parents[1]
FILE = "results.json"
MARKERS = ("<!-- the command writes from here -->", "<!-- to here -->")

Cell = dict[str, Any]
Row = dict[str, Any]  # a cell, its result and its seconds
Results = dict[str, Any]  # what results.json holds


# --- training ---


class Curve(NamedTuple):
    """Errors after so many sequences, at log-spaced counts; inf from where training diverged."""

    samples: list[int]
    errors: list[float]


def checkpoints(steps: int, per_decade: int = 10) -> list[int]:
    """Log-spaced counts 1 … steps, without repetitions, the last included."""
    count = round(per_decade * math.log10(steps)) + 1
    return sorted({round(float(step)) for step in np.geomspace(1, steps, count)})


def fit(
    module: nn.Module,
    sample: Callable[[int], tuple[Tensor, Tensor]],
    error: Callable[[nn.Module], float],
    *,
    lr: float,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    decay: float = 0.0,
    weight_decay: float = 0.0,
    enough: float = -math.inf,
) -> Curve:
    """Train by AdamW; `sample(i)` is the batch of step i, inputs and targets, (B, …) each.

    lr: constant, but over the last `decay` (a share) of the steps it falls linearly to zero. error: of the module as it
    stands, in eval mode and without gradients, at `checkpoints(steps)`. At an error of `enough` or less training ends.
    A loss that is not finite ends it as well, and all later errors are inf.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    curve, done, finite = Curve([], []), 0, True
    for count in checkpoints(steps):
        module.train()
        while done < count and finite:
            inputs, targets = sample(done)
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - done) / (decay * steps)) if decay else lr
            value = loss(module(inputs), targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            done, finite = done + 1, math.isfinite(value.item())
        curve.samples.append(count * len(inputs))
        curve.errors.append(_measured(error, module) if finite else math.inf)
        finite = math.isfinite(curve.errors[-1])
        if curve.errors[-1] <= enough:
            break
    return curve


def _measured(error: Callable[[nn.Module], float], module: nn.Module) -> float:
    module.eval()
    with torch.no_grad():
        value = error(module)
    return value if math.isfinite(value) else math.inf


# --- the grid ---


def run_cells(work: Callable[[Cell], Row], cells: Sequence[Cell], journal: Path, workers: int = 2) -> list[Row]:
    """The rows of all cells, in their order, whatever the order in which they are finished.

    Each is appended to `journal` (JSON lines) when it is finished, and what the journal holds is not done again.
    workers: processes of one thread each; with 1, all is done in this process. Whatever `work` raises ends it.
    """
    keys = [_key(cell) for cell in cells]
    assert len(set(keys)) == len(keys), "two cells are the same"
    rows = _read(journal)
    waiting = [cell for key, cell in zip(keys, cells, strict=True) if key not in rows]
    journal.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with journal.open("a", encoding="utf-8") as file:
        if journal.stat().st_size and not journal.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")  # whoever wrote the last line was killed in the middle of it
        for count, (cell, result) in enumerate(_finished(work, waiting, workers), 1):
            rows[_key(cell)] = row = {**cell, **plain(result)}
            file.write(json.dumps({"cell": cell, "row": row}, allow_nan=False) + "\n")
            file.flush()
            _show_progress(count, len(waiting), time.monotonic() - started)
    return [rows[key] for key in keys]


def _finished(work: Callable[[Cell], Row], cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, Row]]:
    """Cells with their results, as they are finished."""
    if workers == 1:
        torch.set_num_threads(1)
        yield from ((cell, _timed(work, cell)) for cell in cells)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare_worker)
    try:
        futures = {pool.submit(_timed, work, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # at an error or an interruption what has not begun is left
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command is interrupted, and it ends its workers


def _timed(work: Callable[[Cell], Row], cell: Cell) -> Row:
    started = time.perf_counter()
    result = work(cell)
    return {**result, "seconds": time.perf_counter() - started}


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _read(journal: Path) -> dict[str, Row]:
    """The finished rows by the keys of their cells; a line that was cut off counts for nothing."""
    rows = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        rows[_key(entry["cell"])] = entry["row"]
    return rows


def _show_progress(done: int, total: int, seconds: float) -> None:
    """One line that is written over, or on no terminal ten lines in all."""
    live = sys.stderr.isatty()
    if live or done == total or 10 * done // total > 10 * (done - 1) // total:
        left = seconds / done * (total - done)
        text = f"{done} of {total} cells, {seconds:.0f} s, about {left:.0f} s left"
        print(f"\r{text}  " if live else text, end="" if live and done < total else "\n", file=sys.stderr, flush=True)


# --- numbers ---


def plain(value: Any) -> Any:
    """As results.json has it: numbers of six digits, None for what is not finite, lists and dicts."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.integer) else value


def number(value: float | None) -> float:
    """A number of results.json: None is infinite."""
    return math.inf if value is None else value


def quartiles(values: Iterable[float | None]) -> list[float]:
    """Lower quartile, median and upper quartile, each one of the values: nothing is interpolated to infinity."""
    ordered = [number(value) for value in values]
    return [float(x) for x in np.quantile(ordered, [0.25, 0.5, 0.75], method="inverted_cdf")]


def median(values: Iterable[float | None]) -> float:
    """The middle one of the values, or the lower of the two."""
    return quartiles(values)[1]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of `key`, each once, in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def best(rows: Sequence[Row], key: str, value: Callable[[Row], float | None]) -> Any:
    """The value of `key` (a learning rate) whose rows have the smallest median."""
    return min(distinct(rows, key), key=lambda option: median(map(value, select(rows, **{key: option}))))


def final(row: Row) -> float:
    """The last error of a row that holds a `Curve`."""
    return number(row["errors"][-1])


def reached(row: Row, error: float) -> int | None:
    """The samples at the first checkpoint whose error is `error` or less; None: there is none."""
    counts = (count for count, value in zip(row["samples"], row["errors"], strict=True) if number(value) <= error)
    return next(counts, None)


# --- the study ---


@dataclass(frozen=True, kw_only=True)
class Study:
    """One study; the module says what its functions are given."""

    folder: Path
    cells: Callable[[Mapping[str, Any]], list[Cell]]
    work: Callable[[Cell], Row]
    summarize: Callable[[list[Row]], Any]
    report: Callable[[Results], str]
    draw: Callable[[Results, Any], None]
    settings: Mapping[str, Any]
    quick: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """The command line; returns the exit code."""
        given = sys.argv[1:] if arguments is None else list(arguments)
        options = self._parser().parse_args(given)
        out = options.out or (_runs() / f"{self.name}-quick" if options.quick else self.folder)
        try:
            if not options.redraw:
                self._run(out, options, shlex.join(["python", "-m", f"experiments.{self.name}", *given]))
            self._show(out)
        except OptionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with it", file=sys.stderr)
            return 130
        return 0

    def _run(self, out: Path, options: argparse.Namespace, command: str) -> None:
        """Do all cells and write results.json."""
        settings = {**self.settings, **(self.quick if options.quick else {})}
        before = _read_results(out)
        same = before is None or before["settings"] == json.loads(json.dumps(settings))
        require(same or options.force, "--out", out, "has results of other settings; --force replaces them")
        for library in ("OPENBLAS", "OMP"):  # for the workers: they share the cores by themselves
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")
        journal = _runs() / f"{self.name}-{_code()}.jsonl"
        about = _about()
        started = time.monotonic()
        rows = run_cells(self.work, self.cells(settings), journal, options.workers)
        results = {
            "study": self.name,
            "command": command,
            **about,
            "seconds": round(time.monotonic() - started, 1),
            "cell_seconds": round(sum(row["seconds"] for row in rows), 1),
            "settings": settings,
            "summary": plain(self.summarize(rows)),
            "rows": rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        _write(out / FILE, _rendered(results))
        journal.unlink()  # all of it is in the results: the next run is a new one

    def _show(self, out: Path) -> None:
        """From results.json: the report on the screen and in the README, and the figure."""
        results = _read_results(out)
        require(results is not None, "--out", out, f"has no {FILE} that can be read")
        assert results is not None
        text = self.report(results)
        print(text)
        readme = out / "README.md"
        if readme.exists():
            _write(readme, replaced(readme.read_text(encoding="utf-8"), text))
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            print(f"no figure: {error.name} is not installed; pip install matplotlib, then --redraw", file=sys.stderr)
            return
        figure = Figure(layout="constrained")
        self.draw(results, figure)
        figure.savefig(out / f"{self.name}.png", dpi=150, metadata={"Software": None})

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"python -m experiments.{self.name}", description=_title(self.folder))
        parser.add_argument("--quick", action="store_true", help="a smoke test of seconds, not into the study's folder")
        parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"for {FILE} and the figure")
        parser.add_argument("--force", action="store_true", help="replace results of other settings")
        parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
        parser.add_argument("--redraw", action="store_true", help="run nothing; README and figure from the results")
        return parser


def replaced(readme: str, text: str) -> str:
    """The README with `text` between its `MARKERS`."""
    start, end = MARKERS
    before, _, rest = readme.partition(start)
    _, found, after = rest.partition(end)
    require(bool(found), "README.md", start, f"must be there once, and {end} after it")
    return f"{before}{start}\n{text.strip()}\n{end}{after}"


def _title(folder: Path) -> str | None:
    readme = folder / "README.md"
    return readme.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if readme.exists() else None


def _runs() -> Path:
    """What is unfinished or quick goes where runs go."""
    return Path(os.environ.get("STU_RUNS", "runs")) / "studies"


def _code() -> str:
    """A fingerprint of all of this repository's code that is loaded: rows that other code made are not reused."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    own = sorted(path for file in files if file and (path := Path(file)).is_relative_to(ROOT))
    ours = [path for path in own if path.relative_to(ROOT).parts[0] in ("stu", "data", "experiments")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in ours)).hexdigest()[:12]


def _about() -> dict[str, Any]:
    """Date, commit, machine and versions."""
    import scipy

    from experiments.speed.bench import Settings
    from experiments.speed.results import commit, describe_machine, now

    machine = describe_machine(Settings())
    versions = {name: machine.pop(name) for name in ("python", "torch")}
    versions |= {"numpy": np.__version__, "scipy": scipy.__version__}
    return {"date": now(), "commit": commit(), "machine": machine, "versions": versions}


def _read_results(out: Path) -> Results | None:
    try:
        content: Results = json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def _rendered(results: Results) -> str:
    """JSON that reads and compares well: a row is a line."""
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in results["rows"])
    whole = json.dumps({**results, "rows": []}, indent=2, ensure_ascii=False, allow_nan=False)
    return whole.replace('"rows": []', f'"rows": [\n{rows}\n  ]') + "\n"


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    fresh = file.with_name(f".{file.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


# --- tables and figures ---


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all but its first column to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def short(value: float | None, digits: int = 2) -> str:
    """A number for a table; ∞ for what diverged."""
    value = number(value)
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.{digits}g}"


def made_with(results: Results) -> str:
    """The line under a table: on what, with what and how long it was made."""
    machine, versions = results["machine"], results["versions"]
    return (
        f"`{results['command']}`: {results['cell_seconds'] / 60:.1f} core minutes on {machine['device']}, "
        f"torch {versions['torch']}, {results['date'][:10]}, commit {results['commit']}."
    )


def band(axis: Any, x: Sequence[float], runs: Sequence[Sequence[float | None]], **style: Any) -> None:
    """A line through the medians of all runs at each x, and a band between the quartiles; gaps where they diverged."""
    quarters(axis, x, [quartiles(values) for values in zip(*runs, strict=True)], **style)


def quarters(axis: Any, x: Sequence[float], values: Sequence[Sequence[float | None]], **style: Any) -> None:
    """The same from the quartiles at each x."""
    low, middle, high = np.array([[number(value) for value in three] for three in values]).T
    shown = np.isfinite(middle)
    [line] = axis.plot(x, np.where(shown, middle, np.nan), **style)
    top = np.where(np.isfinite(high), high, middle[shown].max(initial=0.0))
    axis.fill_between(x, low, top, where=shown, color=line.get_color(), alpha=0.15, linewidth=0)
