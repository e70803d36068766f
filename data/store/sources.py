"""Published data: read from a folder or from the Hugging Face hub, identified, and checked before use."""

import hashlib
import os
import re
import ssl
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.store.arrow import table_of
from stu.errors import OptionError, require

Example = TypeVar("Example")

TIMEOUT = 5.0  # seconds within which the hub must answer
LAYOUTS = {"{}*.parquet": 4, "{}/data*.arrow": 0}  # as on the hub, folders below included; as `save_to_disk` writes
SHARD = re.compile(r"-(\d+)-of-(\d+)")  # in the name of a file
SPLITS = {  # of the names of files, folders and splits, in lower case
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev", "eval"},
    "test": {"test", "testing"},
}


def split_named(name: str) -> str | None:
    """The split that a name says, as one of its words; None if it says none or several."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    found = [split for split, known in SPLITS.items() if known & words]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class HubData:
    """A data set on the Hugging Face hub whose rows are examples; the label is the last of the `columns`.

    files: their names on the hub, with {} for the split. columns: name → type; "a.b" is field b of struct a.
    rows: split → number of published rows. classes: the labels are 0 … classes − 1.
    """

    name: str
    revision: str
    files: str
    columns: Mapping[str, pa.DataType]
    rows: Mapping[str, int]
    classes: int

    def identity(self, source: str | None) -> dict[str, object]:
        """What determines the rows: the revision on the hub, or the contents of the files in the folder `source`."""
        if source is None:
            return {"hub": self.name, "revision": self.revision}
        return {"sha256": {split: [sha256(path) for path in self.local(source, split)] for split in self.rows}}

    def tables(self, source: str | None) -> dict[str, pa.Table]:
        """The checked `columns` of all splits, the first of which is for training; a note says what others repeat."""
        tables = {split: self.table(split, source) for split in self.rows}
        first, *others = tables
        content = next(iter(self.columns))
        for split in others:
            repeated = pc.sum(pc.is_in(tables[split][content], tables[first][content])).as_py() or 0
            note_repeats(split, repeated, tables[split].num_rows)
        return tables

    def table(self, split: str, source: str | None) -> pa.Table:
        """The checked `columns` of a split, from the folder `source`, or from the hub if it is None."""
        if source is None:
            return self.checked(self.fetched(split), split, self.name)
        return self.checked(pa.concat_tables([self.read(path) for path in self.local(source, split)]), split, source)

    def local(self, source: str, split: str) -> list[Path]:
        """The files of a split in the folder `source`: as many as their names promise."""
        wanted = f"{split}*.parquet, or {split}/data*.arrow as save_to_disk writes it"
        folder = folder_of(source, self.published)
        found = (files(folder, layout.format(split), below) for layout, below in LAYOUTS.items())
        paths = next(filter(None, found), [])
        shards = [SHARD.search(path.name) for path in paths]
        of = max((int(shard[2]) for shard in shards if shard), default=1)
        # each once: not the copy of one in place of another
        whole = sorted(int(shard[1]) if shard else 0 for shard in shards) == list(range(of))
        names = f" ({', '.join(str(path.relative_to(folder)) for path in paths)})" if paths else ""
        allowed = f"must hold {wanted}; {len(paths)} of {of} files are there{names}. Published: {self.published}"
        require(whole, "source", source, allowed)
        return paths

    @property
    def published(self) -> str:
        """Which files are published, and where."""
        names = " and ".join(map(self.files.format, self.rows))
        return f"{names} of https://huggingface.co/datasets/{self.name}"

    def read(self, path: Path) -> pa.Table:
        """The `columns` of one file."""
        try:
            table = pq.read_table(path, partitioning=None) if path.suffix == ".parquet" else table_of(path).table
            table.validate(full=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise OptionError("source", str(path), f"cannot be read, or not to its end: {reason}") from error
        return self.selected(table, str(path))

    def fetched(self, split: str) -> pa.Table:
        """The `columns` of a split from the hub, or from the Hugging Face cache."""
        if not (datasets.config.HF_HUB_OFFLINE or answers(datasets.config.HF_ENDPOINT)):
            raise self.unavailable(f"{datasets.config.HF_ENDPOINT} does not answer")
        try:
            table = datasets.load_dataset(self.name, revision=self.revision, split=split).with_format("arrow")[:]
        except Exception as error:  # several libraries raise here, each its own kind
            raise self.unavailable(" ".join(str(error).split())) from error
        return self.selected(table, self.name)

    def unavailable(self, reason: str) -> OptionError:
        """The error that says what to do when the hub cannot be reached."""
        allowed = (
            f"{self.name} cannot be fetched: {reason}. Give the same command once where there is a connection; or put "
            f"{self.published} into a folder (or what save_to_disk wrote of it), and set this to the folder"
        )
        return OptionError("source", None, allowed)

    def selected(self, table: pa.Table, source: str) -> pa.Table:
        """The `columns` of a table, which must have them."""
        flat = table.flatten()
        has = dict(zip(flat.column_names, flat.schema.types, strict=True))
        once = all(flat.column_names.count(name) == 1 for name in self.columns)
        fits = once and all(compatible(has[name], kind) for name, kind in self.columns.items())
        allowed = f"must have the columns {described(self.columns)}, each once; has {described(has)}"
        require(fits, "source", source, allowed)
        try:
            return flat.select(list(self.columns)).cast(pa.schema(self.columns))
        except pa.ArrowException as error:  # a value too large for the type
            allowed = f"must have the columns {described(self.columns)}: {error}"
            raise OptionError("source", source, allowed) from error

    def checked(self, table: pa.Table, split: str, source: str) -> pa.Table:
        """A split, which must have no missing value, no surplus row, and no label that is not a class."""
        *_, label = self.columns
        rows, most, last = table.num_rows, self.rows[split], self.classes - 1
        require(rows <= most, "source", source, f"{split} has {rows:,} rows, must have at most {most:,}")
        for name in self.columns:
            row = pc.index(table[name].is_null(), True).as_py()
            require(row < 0, "source", source, f"{split} has no {name} in row {row}")
        row = pc.index(pc.invert(pc.is_in(table[label], pa.array(range(self.classes)))), True).as_py()
        require(row < 0, "source", source, f"{split} has a label in row {row} that is not 0 … {last}")
        return table


def folder_of(source: str, content: str) -> Path:
    """The folder that `source` names, ~ being the user's home. content: what it must hold, for the message."""
    require(bool(source), "source", source, f"must be a folder with {content}, or null")
    try:
        folder = Path(source).expanduser()
        os.scandir(folder).close()
    except (OSError, RuntimeError, ValueError) as error:  # not there, not a folder, not allowed; no such user; no path
        raise OptionError("source", source, f"must be a folder with {content}: {error}") from error
    return folder


def files(folder: Path, pattern: str, below: int = 0) -> list[Path]:
    """The files in `folder`, or in folders at most `below` levels below it, that match `pattern`, sorted.

    Hidden ones are left out: systems and programs leave them in every folder.
    """
    try:
        found = [path for depth in range(below + 1) for path in folder.glob("*/" * depth + pattern)]
    except OSError as error:  # a folder that disappears, or cannot be read
        raise OptionError("source", str(folder), f"cannot be searched: {error}") from error
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def noting_repeats(
    examples: Iterable[Example], key: Callable[[Example], Hashable], split: str, known: set[Hashable]
) -> Iterator[Example]:
    """The examples of a split, noting how many of val and test are in train, whose keys are collected in `known`."""
    repeated = total = 0
    for example in examples:
        total += 1
        if split == "train":
            known.add(key(example))
        else:
            repeated += key(example) in known
        yield example
    note_repeats(split, repeated, total)


def note_repeats(split: str, repeated: int, total: int) -> None:
    """Say that examples of a split, where there are some, tell nothing of new ones."""
    if repeated:
        print(f"note: {repeated:,} of {total:,} examples of {split} are in train, too", file=sys.stderr, flush=True)


def compatible(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether two types are the same but for the size of their values."""
    integers = pa.types.is_integer(found) and pa.types.is_integer(wanted)
    return found == wanted or integers or str(found) == f"large_{wanted}"


def described(columns: Mapping[str, pa.DataType]) -> str:
    """Names and types, for a message."""
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def divided(table: pa.Table, *, sizes: Mapping[str, int], seed: int) -> dict[str, pa.Table]:
    """Disjoint random parts of a table, stratified by the column `label`.

    The first part does not depend on the sizes of the others.
    """
    order = stratified(table["label"].to_numpy(), seed)
    parts, start = {}, 0
    for name, size in sizes.items():
        left = len(order) - start
        require(size <= left, name, size, f"there are only {left:,} rows for it")
        parts[name] = table.take(np.sort(order[start : start + size]))
        start += size
    return parts


def stratified(labels: NDArray[np.integer], seed: int) -> NDArray[np.int64]:
    """A random order in which every prefix has each label in about its overall proportion."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # rank among the rows of the same label, as a fraction of them
    for label in np.unique(labels):
        same = labels[order] == label
        place[same] = (np.arange(same.sum()) + 0.5) / same.sum()
    return order[np.argsort(place, kind="stable")]


def answers(url: str) -> bool:
    """Whether a server answers, with whatever status."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=TIMEOUT).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # other libraries may trust the certificate
    except (OSError, HTTPException):
        return False
    return True


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OptionError("source", str(path), f"cannot be read: {error}") from error
