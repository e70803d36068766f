"""Files that appear whole or not at all, and are still there after a loss of power.

A rename alone survives a killed process, but not a loss of power: most file systems write names before contents, and
come back with empty files. Contents are therefore sent to the disk before the rename, and the folder after it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".tmp"  # the end of the hidden names under which files are written
DELETED = ".deleted"  # the end of the hidden names of folders that are being deleted


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a hidden file beside `path`, to be written; it then takes the name and the place of `path`.

    The hidden file is removed where the block raises; it is overwritten where a killed process left it.
    Raises `OSError` where there is no room.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a file or a folder with all files in it, in place of a file `path`, if there is one, durably."""
    for file in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
        sync(file)
    partial.replace(path)
    sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all, durably. Raises `OSError` where there is no room."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_folder(path: Path) -> None:
    """Delete a folder under another name, so that what a killed process leaves of it is never taken for the folder."""
    doomed = path.with_name(f".{path.name}{DELETED}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    sync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Send a file or the names in a folder to the disk; some file systems refuse this for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def is_written(path: Path) -> bool:
    """Whether a file is there and holds something: one of 0 bytes is what a loss of power left of it."""
    try:
        return path.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
