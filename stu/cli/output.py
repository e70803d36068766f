"""What a process prints can get lost, but never ends it; imports nothing slow, as it comes first."""

import codecs
import io
import os
import select
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

PLAIN = "stu.plain"  # the name of `plain` among the error handlers of encodings
SPELT = {"−": "-", "–": "-", "—": "-", "─": "-", "→": "->", "×": "x", "·": ".", "•": "*", "≤": "<=", "≥": ">="}


def guard() -> None:
    """Replace the standard streams by ones that never raise, whatever becomes of pipe, disk or terminal behind them.

    What cannot be written is dropped, characters that the encoding lacks are spelt by others. Streams that are closed
    already are opened on nothing, as the next file would get their number and what libraries print. Streams without a
    number, as those of notebooks, stay.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    codecs.register_error(PLAIN, plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # in memory
                guarded = _guarded(stream)
                setattr(sys, name, guarded)
                setattr(sys, f"__{name}__", guarded)


def stream(pieces: Iterable[str]) -> bool:
    """Print pieces of a text at once; ends early, and returns False, where nobody reads it any more."""
    for piece in pieces:
        if piece:
            print(piece, end="", flush=True)
        if getattr(getattr(sys.stdout, "buffer", None), "lost", False):
            return False
    if sys.stdout.isatty():
        print(flush=True)
    return True


def _guarded(stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    if stream is None:  # closed when Python started
        return io.TextIOWrapper(_Lossy(os.devnull, "w"), "utf-8", PLAIN)
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    raw.name, raw.replaced = stream.name, stream
    return io.TextIOWrapper(raw, stream.encoding, PLAIN, None, stream.line_buffering, stream.write_through)


class _Lossy(io.FileIO):
    """Writes all of what it is given, or drops the rest of it."""

    lost = False  # whether something was dropped
    replaced: object = None  # the stream before, which may close the file when nobody holds it any more

    def write(self, data: Any, /) -> int:
        """Write all, also where the reader is slow and the file does not wait for it."""
        rest = whole = memoryview(data).cast("B")
        try:
            while rest:
                written = super().write(rest)
                if written is None:
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError:
            self.lost = True
        return len(whole)


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """The error handler of an encoding: the same in ASCII, or "?". Bytes of a file's name stay as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    with suppress(UnicodeEncodeError):
        return character.encode("ascii", "surrogateescape"), error.start + 1
    letters = SPELT.get(character) or unicodedata.normalize("NFKD", character)
    return "".join(filter(str.isascii, letters)) or "?", error.start + 1
