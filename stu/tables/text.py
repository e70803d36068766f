"""Text files of tables: what csv and json share. Characters are in UTF-8, and files may be compressed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from stu.errors import require

if TYPE_CHECKING:  # slow to import, and only who reads tables has it
    import pyarrow as pa

COMPRESSED = (".gz", ".bz2", ".zst")  # further endings
BLOCKS = (1 << 20, 1 << 30)  # bytes parsed at once; the second for files with a longer row


def ending_of(path: Path) -> str:
    """The ending of a file's name, without that of its compression."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether the name has the ending of a compression."""
    return path.suffix.lower() in COMPRESSED


@contextmanager
def opened(path: Path, errors: str = "strict") -> Iterator[TextIOWrapper]:
    """The characters of a file, uncompressed, without the mark that some programs begin with."""
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as file:
        yield TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="")


def undecodable(path: Path) -> int:
    """The first line that is not in UTF-8."""
    with opened(path, "replace") as text:
        return next((line for line, content in enumerate(text, 1) if "\ufffd" in content), 1)


def in_blocks(read: Callable[[int], "pa.Table"], path: Path, fault: Callable[[Path], str | None]) -> "pa.Table":
    """What `read` makes of a file; its `fault` in words where it is none."""
    import pyarrow as pa

    try:
        try:
            return read(BLOCKS[0])
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) and "block size" not in str(error):
                raise
            return read(BLOCKS[1])
    except pa.ArrowException:
        require_no(fault(path), path)
        raise


def require_no(problem: str | None, path: Path) -> None:
    """Raise `OptionError` for this problem of a file, if there is one."""
    require(problem is None, "source", str(path), problem or "")
