"""Data built once: a directory named after what determines it, complete or absent, for any number of processes.

Its spec.json holds what determines the data and, under "files", the size, the checksum and the rows of every file. They
are compared when a process first asks for the data, and again whenever a file has changed since.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import count, starmap
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import pyarrow as pa
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from data.store.arrow import rows_of
from stu.errors import OptionError, require
from stu.files import put_in_place, sync, write_atomically
from stu.locks import WITHOUT_FLOCK, Holder, holder_lines

Item = TypeVar("Item")
Spec = Mapping[str, object]
Facts = dict[str, Any]  # of a file: bytes, crc32 and, of an Arrow file, rows

SECONDS_BETWEEN_LINES = 10.0
QUIET_SECONDS = 5.0  # for which a process waits for another without a word
SPEC, FILES = "spec.json", "files"  # the file that describes a directory, and its entry with the facts of the others
ALL = ""  # in place of a file's name, where it cannot be told which one is damaged
PIECE = 1 << 20  # bytes that are read at once for a checksum
LOST = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # of a file: no right to read it is no damage
DAMAGED = (ValueError, LookupError, TypeError, AttributeError)  # raised where spec.json is not what was written

_whole: dict[Path, object] = {}  # directories that this process found whole → their state then


def fingerprint(spec: Spec, *, digits: int = 20) -> str:
    """A hex digest of `spec`, plain JSON values that together determine some data."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:digits]


def cached(
    root: str | Path,
    name: str,
    spec: Spec,
    build: Callable[[Path], None],
    *,
    resumable: bool = False,
    probe: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """The directory <root>/<name>/<fingerprint of spec>, filled by `build` unless it is there, as it was written.

    Any number of processes may ask at once: one builds, the others wait. The directory gets its name only when it is
    complete, so what a killed build leaves behind is never taken for data; the next build removes it. Where files are
    damaged, the data are built again, and take the place of the damaged ones when they are complete.
    resumable: the next build continues from the files that are left instead; `build` calls `seal` after each.
    probe: opens all files of a directory, and raises where it cannot: a check of what earlier versions wrote, who
    recorded no checksums.
    """
    require(bool(str(root).strip()), "dir", repr(str(root)), "must be a folder")
    try:
        target = Path(root).expanduser() / name / fingerprint(spec)
    except RuntimeError as error:  # an unknown ~user
        raise OptionError("dir", str(root), f"must be a folder: {error}") from error
    damage = ""
    try:
        if (faults := _faults(target, spec, probe)) == {}:
            return target
        damage = _line(target, faults)
        new = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in new:
            sync(folder.parent)
        with _locked(target.with_suffix(".lock"), name):
            if (faults := _faults(target, spec, probe)) != {}:  # nobody else has built them in the meantime
                if damage := _line(target, faults):
                    say(f"{damage}; the data are built again")
                _build(target, spec, build, resumable, faults or {})
    except OptionError as error:
        if not damage:
            raise
        raise OptionError("dir", str(root), f"{damage}, and cannot be built again: {error}") from error
    except OSError as error:
        allowed = f"must be a folder with room for the data of {name}; building or reading them failed: {error}"
        line = f"{damage}, and cannot be built again: {allowed}" if damage else allowed
        raise OptionError("dir", str(root), line) from error
    return target


def seal(folder: Path, spec: Spec) -> None:
    """Write spec.json: `spec`, and the facts of all files in `folder`, computed unless they are recorded there.

    The facts include a checksum of spec.json, as JSON and without this checksum.
    """
    known = (_recorded(folder, spec) if (folder / SPEC).exists() else None) or {}
    facts = {path.name: known.get(path.name) or _facts(path) for path in _files(folder)}
    facts[SPEC] = {"crc32": _signature(spec, facts)}
    write_atomically(folder / SPEC, json.dumps({**spec, FILES: facts}, indent=2, sort_keys=True) + "\n")


def say(text: str) -> None:
    """A line on stderr, where anybody reads it."""
    with suppress(OSError):
        print(f"note: {text}", file=sys.stderr, flush=True)


def _build(target: Path, spec: Spec, build: Callable[[Path], None], resumable: bool, faults: Mapping[str, str]) -> None:
    """Build next to `target`, then rename. The caller holds the lock, so there is at most one partial directory."""
    partial, deleted = target.with_suffix(".partial"), target.with_suffix(".deleted")
    # The last step of a build that is not resumable is spec.json: with it, only the renaming is left.
    complete = not resumable and (partial / SPEC).exists() and _faults(partial, spec) == {}
    if not complete:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(exist_ok=resumable)
            if resumable:
                _tidy(partial, spec)
                _keep(target, partial, spec, faults)
            build(partial)
            seal(partial, spec)
        except BaseException:
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(deleted, ignore_errors=True)
    if faults and (others := _others(target, partial, spec)):
        kept = next(path for n in count() if not (path := target.with_suffix(f".damaged{n or ''}")).exists())
        target.rename(kept)
        say(
            f"{', '.join(others)} of {target} differ from what was there before, as on another machine or with other "
            f"libraries: results from before cannot be compared; what is left of them is in {kept}"
        )
    elif faults:
        target.rename(deleted)
    put_in_place(partial, target)
    shutil.rmtree(deleted, ignore_errors=True)
    _whole[target] = _state(target)


def _tidy(partial: Path, spec: Spec) -> None:
    """Remove what is not whole from a build that was interrupted. Earlier versions recorded nothing before the end."""
    try:
        known = _recorded(partial, spec) if (partial / SPEC).exists() else None
    except DAMAGED:
        known = {}
    for path in partial.iterdir():
        if known is None:
            whole = path.suffix != ".partial" and not _unreadable(path)
        else:
            whole = path.name == SPEC or (path.name in known and not _fault(path, known[path.name]))
        if not whole:
            path.unlink()
    if known is not None:
        (partial / SPEC).unlink()
        seal(partial, spec)


def _keep(target: Path, partial: Path, spec: Spec, faults: Mapping[str, str]) -> None:
    """Take over, into the build that replaces a damaged directory, its whole files."""
    if not faults or faults.keys() & {ALL, SPEC}:
        return
    known = _recorded(target, spec)
    for path in _files(target):
        if path.name not in faults and (known is None or path.name in known) and not (partial / path.name).exists():
            try:
                os.link(path, partial / path.name)
            except OSError:  # a file system without links
                shutil.copy2(path, partial / path.name)


def _others(before: Path, after: Path, spec: Spec) -> list[str]:
    """The files that are not what they were recorded as before: chaotic systems differ from machine to machine."""
    try:
        old, new = _recorded(before, spec) or {}, _recorded(after, spec) or {}
    except (OSError, *DAMAGED):
        return []
    return sorted(name for name, facts in old.items() if new.get(name) != facts)


# What is recorded of a directory, and whether it still holds


def _faults(folder: Path, spec: Spec, probe: Callable[[Path], object] = lambda folder: None) -> dict[str, str] | None:
    """What is wrong with the files of a directory, by name; {} where they are as they were written, None without it."""
    try:
        state = _state(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if _whole.get(folder) == state:
        return {}
    try:
        known = _recorded(folder, spec)
    except DAMAGED:
        return {SPEC: "does not describe these data"}
    except OSError as error:
        return {SPEC: _lost(error)}
    if known is None:
        faults = {path.name: fault for path in _files(folder) if (fault := _unreadable(path))}
        faults = faults or _probed(folder, probe)
    else:
        each = _with_lines(known.items(), f"checking {folder}", len(known))
        faults = {name: fault for name, facts in each if (fault := _fault(folder / name, facts))}
    if faults:
        return faults
    if known is None:
        with suppress(OSError), FileLock(folder.with_suffix(".lock"), timeout=0, fallback_to_soft=False):
            seal(folder, spec)
            state = _state(folder)
    _whole[folder] = state
    return {}


def _recorded(folder: Path, spec: Spec) -> dict[str, Facts] | None:
    """The facts of the files by name; None where an earlier version wrote none. Raises `DAMAGED` otherwise."""
    found = json.loads((folder / SPEC).read_bytes())
    if found == json.loads(json.dumps(spec)):
        return None
    files: dict[str, Facts] = found[FILES]
    if files.pop(SPEC) != {"crc32": _signature(spec, files)} or found != json.loads(json.dumps({**spec, FILES: files})):
        raise ValueError(f"{folder / SPEC} does not describe these data")
    return files


def _signature(spec: Spec, files: Mapping[str, Facts]) -> str:
    return f"{zlib.crc32(json.dumps([spec, files], sort_keys=True).encode()):08x}"


def _facts(path: Path) -> Facts:
    """Size, checksum and, of an Arrow file, rows."""
    facts: Facts = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    return {**facts, "rows": rows_of(path)} if path.suffix == ".arrow" else facts


def _fault(path: Path, facts: Facts) -> str:
    """What is wrong with a file of which these facts were recorded, or nothing."""
    try:
        size = path.stat().st_size
        if facts.get("bytes") != size:
            return f"has {size} bytes, not {facts.get('bytes')} as {SPEC} says"
        if facts.get("crc32") != _crc32(path):
            return f"has another checksum than {SPEC} says"
        same = path.suffix != ".arrow" or facts.get("rows") == rows_of(path)
        return "" if same else f"has other rows than {SPEC} says"
    except OSError as error:
        return _lost(error)


def _unreadable(path: Path) -> str:
    """What is wrong with a file of which nothing was recorded, as far as can be told, or nothing."""
    try:
        if path.suffix == ".arrow":
            rows_of(path, validate=True)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (ValueError, pa.ArrowException) as error:
        return _reason(error)
    except OSError as error:
        return _lost(error)
    return ""


def _probed(folder: Path, probe: Callable[[Path], object]) -> dict[str, str]:
    """Whether all files are there and can be opened."""
    try:
        probe(folder)
    except FileNotFoundError as error:
        return {Path(error.filename or "a file").name: "is missing"}
    except Exception as error:  # damage raises errors of many kinds
        return {ALL: _reason(error)}
    return {}


def _lost(error: OSError) -> str:
    """The description of a file that cannot be read; raises the error where this says nothing of its contents."""
    if error.errno not in LOST:
        raise error
    return "is missing" if error.errno == errno.ENOENT else _reason(error)


def _reason(error: Exception) -> str:
    return f"cannot be read: {' '.join(str(error).split())}"


def _line(folder: Path, faults: Mapping[str, str] | None) -> str:
    if not faults:
        return ""
    name, fault = next(iter(faults.items()))
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"damaged: {folder / name} {fault}{more}"


def _files(folder: Path) -> list[Path]:
    """All files but spec.json and hidden ones, which are those of a write that was interrupted."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.name != SPEC and not path.name.startswith(".")
    )


def _state(folder: Path) -> object:
    """What changes when a file does, cheaply: names, places on the disk, sizes and times of change."""
    with os.scandir(folder) as entries:
        facts = ((entry.name, entry.stat()) for entry in entries)
        return sorted((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in facts)


def _crc32(path: Path) -> str:
    """CRC-32 of a file, at about 2 GB/s: no change within 32 bits goes unnoticed, of others one in 4 billion."""
    checksum, piece = 0, bytearray(PIECE)
    view = memoryview(piece)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            checksum = zlib.crc32(view[:size], checksum)
    return f"{checksum:08x}"


# Locks


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock file at `path`, or one beside it where there are no locks. A long wait is said, once."""
    try:
        lock = _acquired(FileLock(path, fallback_to_soft=False), name)
    except OSError as error:
        if error.errno not in WITHOUT_FLOCK:
            raise
        lock = _acquired(SoftFileLock(path.with_suffix(".softlock")), name, "; delete it if that process is gone")
    else:
        with suppress(OSError):  # no room: then others are not told who holds it
            path.write_text(holder_lines())
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: BaseFileLock, name: str, advice: str = "") -> BaseFileLock:
    try:
        lock.acquire(timeout=QUIET_SECONDS)
    except Timeout:
        say(f"waiting for the data of {name}, which are being built: {_holder(Path(lock.lock_file))}{advice}")
        lock.acquire()
    return lock


def _holder(file: Path) -> str:
    """Who has a lock, since when and by which file, as the file says: soft locks write the same two lines."""
    with suppress(OSError):  # just released
        return str(Holder.of(file))
    return "another process"


# Progress, and processes


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
    for number, item in enumerate(items):
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            with suppress(OSError):  # nobody reads it
                print(f"{title}: {number:,}{of_total}", file=sys.stderr, flush=True)
        yield item


def in_processes(function: Callable[..., Item], jobs: Sequence[tuple[Any, ...]], workers: int | None) -> Iterator[Item]:
    """The results of `function` for the arguments in `jobs`, in order. workers: processes; None: one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    if workers <= 1:
        yield from starmap(function, jobs)
        return
    try:
        with ProcessPoolExecutor(workers, initializer=follow_parent) as pool:
            yield from pool.map(function, *zip(*jobs, strict=True))
    except BrokenProcessPool as error:
        raise OptionError("workers", workers, "one of them was killed; with less memory, use fewer") from error


def follow_parent() -> None:
    """Make this worker process exit when its parent does, and silently when it is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None, "called in a worker"

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
