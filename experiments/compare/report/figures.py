"""The figures of the runs: the newest ones, small, inside of the page; links to the others."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from experiments.compare.groups import Group, chosen
from experiments.compare.runs import Row

LARGEST, BUDGET = 40_000, 1_000_000  # bytes of a figure and of all, before base64
WIDTH = 1000  # pixels
PER_RUN = 4


def embedded(rows: Sequence[Row], groups: Sequence[Group], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Path of a run → its figures: name, link, and source, None where the figure would be too large.

    The best settings of each model have the first claim on the room that there is.
    """
    first = {row.path for group in chosen(groups) for row in group.rows}
    left, found = BUDGET, {}
    for row in sorted(rows, key=lambda row: row.path not in first):
        shown: list[dict[str, Any]] = []
        for file in _files(Path(row.path)):
            image = _small(file) if left >= LARGEST and len(shown) < PER_RUN else None
            left -= len(image or b"")
            link = quote(os.path.relpath(file, folder.absolute()), errors="surrogateescape")
            shown.append({"name": file.stem, "link": link, "source": image and _address(image)})
        if shown:
            found[row.path] = shown
    return found


def _files(path: Path) -> list[Path]:
    """The newest first."""
    files = [*path.glob("figures/*.png"), *path.glob("pictures/*.png")]  # as earlier runs called it
    return sorted(files, key=lambda file: (-_changed(file), file.name))


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _small(file: Path) -> bytes | None:
    """The figure as WebP, None where it is unreadable or too large."""
    from PIL import Image, UnidentifiedImageError

    stream = io.BytesIO()
    try:
        with Image.open(file) as image:
            image.thumbnail((WIDTH, 4 * WIDTH))
            image.convert("RGB").save(stream, "WEBP", quality=70)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return stream.getvalue() if stream.tell() <= LARGEST else None


def _address(image: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(image).decode('ascii')}"
