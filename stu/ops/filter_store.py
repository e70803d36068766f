"""Spectral filters on disk: long ones are computed once per user, whatever the process."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np

from stu.files import put_in_place

STORED = 1 << 20  # numbers in a file: fewer are computed in a moment and not stored

Eigenpairs = tuple[np.ndarray, np.ndarray]  # (K,) and (L, K)


def stored(name: str, source: str, shape: tuple[int, int], compute: Callable[[], Eigenpairs]) -> Eigenpairs:
    """The eigenpairs `name` from the cache or, if they are not there, from `compute`, and then cached.

    source: the file of the code that computes them; its contents are part of the file name. shape: (L, K), below
    `STORED` numbers nothing is cached. The files are in the folder filters/ of $STU_CACHE (by default stu/ in
    $XDG_CACHE_HOME or ~/.cache), if it can be written.
    """
    file = _file(name, source) if shape[0] * shape[1] >= STORED else None
    pairs = _read(file, shape[0]) if file else None
    if pairs is None:
        pairs = compute()
        if file:
            _write(file, *pairs)
    return pairs


def _file(name: str, source: str) -> Path | None:
    """Where the eigenpairs are: the file name holds all that determines them, the code included."""
    root = os.environ.get("STU_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "stu")
    try:
        folder = Path(root).expanduser() / "filters"
        code = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
    except (OSError, RuntimeError):  # no home, no source
        return None
    return folder / f"{name}-float64-{code}.npz"


def _read(file: Path, seq_len: int) -> Eigenpairs | None:
    """The contents of the file, or None where there is none or it is damaged (an npz has checksums)."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            eigenvalues, filters = arrays["eigenvalues"], arrays["filters"]
    except Exception:  # damage raises errors of many kinds
        return None
    whole = eigenvalues.dtype == filters.dtype == np.float64 and filters.shape == (seq_len, len(eigenvalues))
    return (eigenvalues, filters) if whole else None


def _write(file: Path, eigenvalues: np.ndarray, filters: np.ndarray) -> None:
    """Write beside the file, then rename: other processes find it whole or not at all."""
    partial = file.with_suffix(f".{uuid4().hex}.partial")
    with suppress(OSError):  # no room or no right to write: then there is no cache
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                np.savez(stream, eigenvalues=eigenvalues, filters=filters)
            put_in_place(partial, file)
        finally:
            partial.unlink(missing_ok=True)
