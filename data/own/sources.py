"""Where a table comes from: a file, a folder, what `save_to_disk` wrote, or the Hugging Face hub; and its splits."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, final

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.store.cache import say
from data.store.sources import SHARD, answers, files, sha256, split_named
from stu.errors import OptionError, require
from stu.tables.binary import from_dataset
from stu.tables.reading import FORMATS, kind_of, place_of, read_table
from stu.task import Splits

UNDECIDED = -1  # the split of a row that is yet to be divided off
DEPTH = 3  # folders below the source that are searched
HUB = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
ALLOWED = "must be a file, a folder, or owner/name, owner/name:config or owner/name@revision of https://huggingface.co"


@final
@dataclass(frozen=True)
class Part:
    """Rows that are read together. name: of the file, for messages. split: None where the name does not say.

    read: the table, in which columns of csv and tsv with the given names are texts as they stand.
    """

    name: str
    split: str | None
    read: Callable[[Sequence[str]], pa.Table]
    digest: Callable[[], str]


@final
@dataclass(frozen=True)
class Rows:
    """Rows of one or several files, each of which can still be found.

    starts: (files + 1,) the first row of every file, and the number of rows. split: (rows,) the place in `Splits` of
    what a row belongs to, or `UNDECIDED`.
    """

    table: pa.Table
    files: tuple[str, ...]
    starts: NDArray[np.int64]
    split: NDArray[np.int8]

    def refuse(self, row: int, column: str, problem: str) -> NoReturn:
        """Raise the error that names file, line and column."""
        file, place = self.place(row)
        raise OptionError("source", file, f"{place}, column {column}: {problem}")

    def place(self, row: int) -> tuple[str, str]:
        """The file of a row, and the line or row in it."""
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        return self.files[number], place_of(self.files[number], int(row - self.starts[number]))

    @property
    def name(self) -> str:
        """Of the files, for messages about all of them."""
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"


def parts_of(source: str | None) -> list[Part]:
    """The files that a source consists of. Raises `OptionError`."""
    if source is None or not source.strip():
        raise OptionError("source", source, ALLOWED)
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise OptionError("source", source, f"{ALLOWED}: {error}") from error
    if there:
        return _parts_of_folder(path) if path.is_dir() else [_part(path, None)]
    hub = HUB.fullmatch(source)
    if hub is None or kind_of(path) is not None:
        raise OptionError("source", source, f"is not there; {ALLOWED}")
    return _parts_of_hub(source, **hub.groupdict())


def identity(parts: Sequence[Part]) -> list[list[str | None]]:
    """What determines the rows: the checksums of the contents, by split."""
    return [[part.split, part.digest()] for part in parts]


def loaded(parts: Sequence[Part], choose: Callable[[list[str]], tuple[list[str], list[str]]]) -> Rows:
    """The rows of all parts. choose: all columns → those that are needed, and those of them that are texts."""
    tables = [part.read(()) for part in parts]
    names, texts = choose(tables[0].column_names)
    for part, table in zip(parts, tables, strict=True):
        lacking = next((name for name in names if name not in table.column_names), None)
        require(lacking is None, "source", part.name, f"has no column {lacking}, which {parts[0].name} has")
        require(table.num_rows > 0, "source", part.name, "has no rows")
    for number, part in enumerate(parts):
        if any(pa.types.is_primitive(tables[number].schema.field(name).type) for name in texts):  # as all could be read
            tables[number] = part.read(texts)
    sizes = [table.num_rows for table in tables]
    split = [UNDECIDED if part.split is None else Splits._fields.index(part.split) for part in parts]
    return Rows(
        _joined([table.select(names) for table in tables], parts),
        tuple(part.name for part in parts),
        np.cumsum([0, *sizes]),
        np.repeat(np.array(split, np.int8), sizes),
    )


def _joined(tables: list[pa.Table], parts: Sequence[Part]) -> pa.Table:
    if len(tables) == 1:
        return tables[0]
    whole = tables[0]
    for part, table in zip(parts[1:], tables[1:], strict=True):
        try:
            whole = pa.concat_tables([whole, table], promote_options="permissive")
        except pa.ArrowException as error:
            pairs = zip(table.schema, whole.schema, strict=True)
            new, old = next((pair for pair in pairs if not _unify(*pair)), (table.schema[0], whole.schema[0]))
            problem = f"column {new.name} is {new.type}, in {parts[0].name} {old.type}"
            raise OptionError("source", part.name, problem) from error
    return whole


def _unify(new: pa.Field, old: pa.Field) -> bool:
    try:
        pa.unify_schemas([pa.schema([old]), pa.schema([new])], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _part(path: Path, split: str | None) -> Part:
    return Part(str(path), split, partial(read_table, path), partial(_digest, path))


def _digest(path: Path) -> str:
    """Of a file, or of what `save_to_disk` wrote."""
    found = files(path, "*.arrow") if path.is_dir() else [path]
    return hashlib.sha256("".join(map(sha256, found)).encode()).hexdigest()


def _parts_of_folder(folder: Path) -> list[Part]:
    """All tables in a folder, and folders below it; what `save_to_disk` wrote is one table, or one for every split."""
    if (folder / "state.json").is_file():
        return [_part(folder, None)]
    saved = [path.parent for path in files(folder, "state.json", below=1)]
    found = saved or [path for path in files(folder, "*", DEPTH) if path.is_file() and kind_of(path) is not None]
    require(bool(found), "source", str(folder), f"has no table: none of its files ends in {', '.join(FORMATS)}")
    parts = [_part(path, _split_of(path.relative_to(folder))) for path in found]
    if any(part.split for part in parts):
        other = next((part.name for part in parts if part.split is None), None)
        allowed = f"{other} is of no split: name it train, val or test, or take it away; or take these words from all"
        require(other is None, "source", str(folder), allowed)
    for split in {part.split for part in parts}:
        _check_together(folder, [path for path, part in zip(found, parts, strict=True) if part.split == split])
    return parts


def _split_of(path: Path) -> str | None:
    """What the name of a file says or, where it says nothing, those of its folders, the nearest first."""
    return next(filter(None, map(split_named, reversed(path.parts))), None)


def _check_together(folder: Path, paths: list[Path]) -> None:
    """Refuse the same data in two formats, and shards of which some are missing."""
    kinds = sorted({path.suffix.lower() for path in paths})
    names = ", ".join(str(path.relative_to(folder)) for path in paths[:4])
    require(len(kinds) == 1, "source", str(folder), f"has one split in several formats: {names}")
    shards = [match for path in paths if (match := SHARD.search(path.name))]
    for of in {int(shard[2]) for shard in shards}:
        there = sorted(int(shard[1]) for shard in shards if int(shard[2]) == of)
        allowed = f"{len(there)} of {of} files are there: {names}"
        require(len(there) % of == 0 and set(there) == set(range(of)), "source", str(folder), allowed)


def _parts_of_hub(source: str, name: str, config: str | None, revision: str | None) -> list[Part]:
    """The splits of a data set on the hub, from the network or the Hugging Face cache."""
    if not (datasets.config.HF_HUB_OFFLINE or answers(datasets.config.HF_ENDPOINT)):
        reason = f"{datasets.config.HF_ENDPOINT} does not answer"
        raise OptionError("source", source, f"is no file or folder here, and cannot be fetched: {reason}")
    try:
        found: Any = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # several libraries raise here, each its own kind
        reason = " ".join(str(error).split())[:300]
        raise OptionError("source", source, f"is no file or folder here, and cannot be fetched: {reason}") from error
    splits = {key: split_named(key) for key in found}
    known = {key: split for key, split in splits.items() if split} or dict.fromkeys(found)
    if unused := sorted(splits.keys() - known.keys()):
        say(f"{source}: the splits {', '.join(unused)} are not used")
    return [
        Part(f"{source} {key}", split, partial(_rows_of, found[key]), partial(_digest_of, found[key]))
        for key, split in known.items()
    ]


def _rows_of(split: Any, texts: Sequence[str] = ()) -> pa.Table:
    return from_dataset(split)


def _digest_of(split: Any) -> str:
    paths: Iterable[str] = [file["filename"] for file in split.cache_files]
    return hashlib.sha256("".join(sha256(Path(path)) for path in paths).encode()).hexdigest()
