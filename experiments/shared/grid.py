"""A grid of cells, each a piece of work, done by a few processes; an interrupted grid is resumed from its journal."""

import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

Settings = Mapping[str, Any]  # of a study, plain values
Cell = dict[str, Any]  # plain values, which determine one piece of work
Row = dict[str, Any]  # a cell, its result and its seconds


def cross(settings: Settings, kept: Iterable[str], **varied: Iterable[Any]) -> list[Cell]:
    """A cell for every combination of the varied values with every seed; all have the settings `kept` as well."""
    varied["seed"] = range(settings["seeds"])
    same = {key: settings[key] for key in kept}
    return [{**dict(zip(varied, values, strict=True)), **same} for values in itertools.product(*varied.values())]


def run_cells(work: Callable[[Cell], Row], cells: Sequence[Cell], journal: Path, workers: int = 2) -> list[Row]:
    """The rows of all cells, in the order of the cells, whatever the order in which they are finished.

    Each is appended to `journal` (JSON lines) when it is finished, and cells in the journal are not run again.
    workers: processes of one thread each; with 1, everything runs in this process. Whatever `work` raises ends the run.
    """
    keys = [_key(cell) for cell in cells]
    assert len(set(keys)) == len(keys), "two cells are the same"
    rows = _read(journal)
    waiting = [cell for key, cell in zip(keys, cells, strict=True) if key not in rows]
    journal.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with journal.open("a", encoding="utf-8") as file:
        if journal.stat().st_size and not journal.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")  # the process that wrote the last line was killed in the middle of it
        for count, (cell, result) in enumerate(_finished(work, waiting, workers), 1):
            rows[_key(cell)] = row = {**cell, **to_json(result)}
            file.write(json.dumps({"cell": cell, "row": row}, allow_nan=False) + "\n")
            file.flush()
            _show_progress(count, len(waiting), time.monotonic() - started)
    return [rows[key] for key in keys]


def to_json(value: Any) -> Any:
    """The form in results.json: numbers of six digits, None for what is not finite, lists and dicts."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [to_json(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.integer) else value


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
    finally:  # after an error or an interruption, cells that have not started are dropped
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption ends the main process, which ends its workers


def _timed(work: Callable[[Cell], Row], cell: Cell) -> Row:
    started = time.perf_counter()
    result = work(cell)
    return {**result, "seconds": time.perf_counter() - started}


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _read(journal: Path) -> dict[str, Row]:
    """The finished rows by the keys of their cells; an incomplete line is ignored."""
    rows = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        rows[_key(entry["cell"])] = entry["row"]
    return rows


def _show_progress(done: int, total: int, seconds: float) -> None:
    """One line that is overwritten in a terminal; elsewhere ten lines in all."""
    live = sys.stderr.isatty()
    if live or done == total or 10 * done // total > 10 * (done - 1) // total:
        left = seconds / done * (total - done)
        text = f"{done} of {total} cells, {seconds:.0f} s, about {left:.0f} s left"
        print(f"\r{text}  " if live else text, end="" if live and done < total else "\n", file=sys.stderr, flush=True)
