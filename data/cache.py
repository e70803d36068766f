"""Data built once: a directory named by what determines it, whole or absent, whoever asks and however often."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from stu.errors import OptionError

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


def fingerprint(spec: Mapping[str, object]) -> str:
    """A hex digest of `spec`, plain JSON values that together determine some data."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]


def cached(root: str | Path, name: str, spec: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """The directory <root>/<name>/<fingerprint of spec>; unless it is there, `build` fills it first.

    Any number of processes may ask at once: one builds, the others wait. The directory gets its name when it
    is complete, so what a killed build leaves behind is never taken for data; the next build removes it.
    """
    target = Path(root).expanduser() / name / fingerprint(spec)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                _build(target, spec, build)
    except OSError as error:
        allowed = f"must be a folder with room for the data of {name}; building them failed: {error}"
        raise OptionError("dir", str(root), allowed) from error
    return target


def _build(target: Path, spec: Mapping[str, object], build: Callable[[Path], None]) -> None:
    """Build beside `target`, then rename: the lock is held, so there is one such sibling at most."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        build(partial)
        (partial / "spec.json").write_text(json.dumps(spec, indent=2, sort_keys=True) + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def tracked(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Iterator[Item]]:
    """Yield `items` again, showing on stderr how many have passed: a bar on a terminal, else rare lines."""
    console = Console(stderr=True)
    if console.is_terminal:
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
