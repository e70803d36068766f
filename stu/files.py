"""Files that appear whole or not at all, and are still there after a loss of power.

A rename alone survives a killed process, but not a loss of power: most file systems write names before contents, and
come back with empty files. Contents are therefore sent to the disk before the rename, and the folder after it.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".tmp"  # the end of the hidden names under which files are written
DELETED = ".deleted"  # the end of the hidden names of folders that are being deleted
DAMAGED = ".damaged"  # the end of the names under which damaged files are kept
CHECKSUM = "checksum"  # the last entry of a sealed mapping


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


def replace_folder(partial: Path, path: Path) -> None:
    """Rename a folder with all files in it, in place of a folder `path`, which is deleted once the other is there."""
    old = path.with_name(f".{path.name}{DELETED}")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        put_in_place(partial, path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


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


def kept_name(path: Path) -> Path:
    """A name beside `path` under which a damaged file is kept, after those that are kept already."""
    names = (f"{path.name}{DAMAGED}{number}" for number in ("", *(f"-{count}" for count in range(2, 10_000))))
    return next(kept for name in names if not (kept := path.with_name(name)).exists())


def there(name: str | Path) -> Path | None:
    """The path of this name, of which ~ is the user's home; None where there is nothing, whatever the name is."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, nobody's home, a zero in it
        return None


def is_written(path: Path) -> bool:
    """Whether a file is there and holds something: one of 0 bytes is what a loss of power left of it."""
    try:
        return path.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def sealed(content: Mapping[str, Any]) -> str:
    """A mapping as JSON whose last entry is a checksum of the others, by which `unsealed` finds damage."""
    return json.dumps({**content, CHECKSUM: _checksum(json.dumps(content).encode())}, indent=2)


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` wrote, or JSON of earlier versions, without a checksum.

    Raises `ValueError` for what is no JSON, no mapping, or does not agree with its checksum.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("holds no mapping")
    given = content.pop(CHECKSUM, None)
    # A checksum under another key is damage to the key.
    meant = given is not None or any(str(value).startswith("checksum ") for value in content.values())
    if meant and given != _checksum(json.dumps(content).encode()):
        raise ValueError("does not agree with its checksum")
    return content


def mapping_in(file: Path, parse: Callable[[str], Any] = unsealed) -> dict[str, Any] | None:
    """The mapping in a file; None where the file is absent, empty or damaged, which the caller says."""
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except Exception:  # parsers raise anything, given anything
        return None
    return content if isinstance(content, dict) and content else None


def _checksum(content: bytes) -> str:
    return f"checksum {len(content)} {zlib.crc32(content):08x}"


def note_checksum(path: Path) -> None:
    """Send a file that is appended to to the disk, and the checksum of what it holds, in a hidden file beside it."""
    sync(path)
    sync(path.parent)
    write_atomically(_checksum_of(path), _checksum(path.read_bytes()))


def agrees_with_checksum(path: Path) -> bool:
    """Whether a file still begins with what `note_checksum` has seen of it; True where it has seen nothing."""
    try:
        noted = _checksum_of(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        noted = ""
    if not noted:
        return True
    length = noted.split(" ")[1] if noted.count(" ") == 2 else ""
    return length.isdecimal() and path.exists() and _checksum(path.read_bytes()[: int(length)]) == noted


def _checksum_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.checksum")
