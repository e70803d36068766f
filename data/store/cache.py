"""Data built once: a directory named after what determines it, complete or absent, for any number of processes."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import starmap
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from stu.errors import OptionError

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


def fingerprint(spec: Mapping[str, object], *, digits: int = 20) -> str:
    """A hex digest of `spec`, plain JSON values that together determine some data."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:digits]


def cached(
    root: str | Path, name: str, spec: Mapping[str, object], build: Callable[[Path], None], *, resumable: bool = False
) -> Path:
    """The directory <root>/<name>/<fingerprint of spec>, filled by `build` unless it exists.

    Any number of processes may ask at once: one builds, the others wait. The directory gets its name only when it is
    complete, so what a killed build leaves behind is never taken for data; the next build removes it.
    resumable: the next build continues from what is left instead, which must be complete files.
    """
    target = Path(root).expanduser() / name / fingerprint(spec)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                _build(target, spec, build, resumable)
    except OSError as error:
        allowed = f"must be a folder with room for the data of {name}; building them failed: {error}"
        raise OptionError("dir", str(root), allowed) from error
    return target


def _build(target: Path, spec: Mapping[str, object], build: Callable[[Path], None], resumable: bool) -> None:
    """Build next to `target`, then rename. The caller holds the lock, so there is at most one partial directory."""
    partial = target.with_suffix(".partial")
    if not resumable:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(exist_ok=resumable)
        build(partial)
        (partial / "spec.json").write_text(json.dumps(spec, indent=2, sort_keys=True) + "\n")
        partial.rename(target)
    finally:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def tracked(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Iterator[Item]]:
    """Yield an iterator over `items` that shows its progress on stderr: a bar on a terminal, else occasional lines."""
    console = Console(stderr=True)
    if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
        with Progress(console=console, transient=True) as bar:
            yield iter(bar.track(items, total, description=title))
    else:
        yield _with_lines(items, title, total)


def _with_lines(items: Iterable[Item], title: str, total: int | None) -> Iterator[Item]:
    of_total = f" of {total:,}" if total else ""
    last = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title}: {count:,}{of_total}", file=sys.stderr, flush=True)
        yield item


def in_processes(function: Callable[..., Item], jobs: Sequence[tuple[Any, ...]], workers: int | None) -> Iterator[Item]:
    """The results of `function` for the arguments in `jobs`, in order. workers: processes; None: one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    if workers <= 1:
        yield from starmap(function, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=follow_parent) as pool:
        yield from pool.map(function, *zip(*jobs, strict=True))


def follow_parent() -> None:
    """Make this worker process exit when its parent does, and silently when it is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None, "called in a worker"

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
