"""Text files: one, those of a folder, or those that a pattern matches; hidden and binary ones are left out."""

import os
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

from data.store.sources import split_named
from stu.errors import OptionError, require

HEAD = 8192  # bytes, within which a binary file has a zero


class Files(NamedTuple):
    """Text files, sorted: those of each split where their names say so, else all. left_out: what is not read."""

    paths: dict[str, list[Path]]
    left_out: list[str]


def text_files(source: str) -> Files:
    """The files that `source` names. Raises `OptionError` where there are none, or some splits alone."""
    root, found = _found(source)
    single = found == [root]
    hidden, binary = [], []
    texts: list[Path] = []
    for path in found:
        parts = [path.name] if single else path.relative_to(root).parts
        if not single and any(part.startswith(".") for part in parts):
            hidden.append("/".join(parts))
        elif _is_binary(path):
            binary.append("/".join(parts))
        else:
            texts.append(path)
    require(bool(texts), "source", source, f"holds no text; {len(binary)} binary files are there")
    if single:
        return Files({"all": texts}, [])
    named = _by_split(source, root, texts)
    taken = {path for paths in (named or {}).values() for path in paths}
    unnamed = [str(path.relative_to(root)) for path in texts if named and path not in taken]
    return Files(named or {"all": texts}, [*hidden, *binary, *unnamed])


def read(path: Path) -> bytes:
    """The contents of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError("source", str(path), f"cannot be read: {error.strerror}") from error


def _found(source: str) -> tuple[Path, list[Path]]:
    """The folder that all files are in, or the only file, and the files."""
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path, sorted(_walk(path), key=lambda file: file.relative_to(path).parts)
        if path.is_file():
            return path, [path]
        matches = sorted(map(Path, glob(str(path), recursive=True)), key=lambda file: file.parts)
    except (OSError, RuntimeError, ValueError) as error:  # no such user; no path
        raise OptionError("source", source, f"must be a text file, a folder of them or a pattern: {error}") from error
    files = [match for match in matches if match.is_file()]
    require(bool(files), "source", source, "no such file or folder, and no pattern that matches a file")
    return (files[0] if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))), files


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder; of hidden folders none, but for their own name."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in names if (path := Path(place, name)).is_file())


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(HEAD)
    except OSError as error:
        raise OptionError("source", str(path), f"cannot be read: {error.strerror}") from error


def _by_split(source: str, root: Path, paths: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The files of train, val and test: my_train.txt, a.valid.tokens, test/a.txt; None where none is called train."""
    named: dict[str, list[Path]] = {split: [] for split in ("train", "val", "test")}
    for path in paths:
        split = split_named(path.relative_to(root).parts[0])
        if split is not None:
            named[split].append(path)
    if not named["train"]:
        return None
    lacking = [split for split, files in named.items() if not files]
    first = named["train"][0].relative_to(root).parts[0]
    allowed = f"has files called train ({first}), and must have some called {' and '.join(lacking)}; or none train"
    require(not lacking, "source", source, allowed)
    return named
