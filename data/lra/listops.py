"""ListOps: nested operations on digits, written as a sequence of tokens, are to be evaluated.

Sources: Nangia and Bowman, "ListOps" (1804.06028); Tay et al., "Long Range Arena" (2011.04006), whose files are read;
`data.lra.listops_trees` for what is generated.
"""

import gzip
import zlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import final

import numpy as np
import pyarrow as pa

from data.lra.listops_trees import DIGITS, VOCABULARY, Bounds, Tree, digest, distinct_trees, grown_bytes, value_of
from data.store.arrow import arrow_file
from data.store.cache import tracked
from data.store.sources import folder_of, noting_repeats, sha256
from data.store.tokens import ROWS, SCHEMA, TokenClassification, TokenData, TokenExamples
from stu.errors import OptionError, require
from stu.heads import Pool
from stu.preprocessing import Classes, Preprocessing, Text
from stu.resources import require_disk
from stu.task import Splits

VERSION = 1  # increment when the same options produce different examples, or the same examples different files

CLASSES = len(DIGITS)
TOKEN_OF = {symbol.encode(): token for token, symbol in enumerate(VOCABULARY) if token}
KNOWN = 100  # bytes by which a tree is known, so that none comes twice
LABEL_OF = {digit.encode(): label for label, digit in enumerate(DIGITS)}


def official_files(source: str) -> dict[str, Path]:
    """Split → basic_<split>.tsv, or basic_<split>.tsv.gz, in the folder `source`."""
    folder = folder_of(source, "basic_train.tsv, basic_val.tsv and basic_test.tsv, or .tsv.gz")
    plain = {split: folder / f"basic_{split}.tsv" for split in Splits._fields}
    files = {split: path if path.is_file() else path.with_suffix(".tsv.gz") for split, path in plain.items()}
    missing = ", ".join(plain[split].name for split, path in files.items() if not path.is_file())
    require(not missing, "source", source, f"must hold the official files; missing, plain and .gz: {missing}")
    return files


def read_official(path: Path, max_length: int) -> Iterator[Tree]:
    """The trees of an official file: a header, then lines of Source, a tab and Target."""
    number = 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                columns = line.rstrip(b"\r\n").split(b"\t")
                if number > 1:
                    yield parsed(columns, max_length)
                elif columns != [b"Source", b"Target"]:
                    raise ValueError("the columns must be Source and Target, with a tab between them")
        if number < 2:
            raise ValueError("no example follows")
    except ValueError as error:
        raise OptionError("source", str(path), f"line {number}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise OptionError("source", str(path), f"cannot be read beyond line {number}: {error}") from error


def parsed(columns: list[bytes], max_length: int) -> Tree:
    """One line, tokenised as in Long Range Arena: without parentheses, split at spaces."""
    if len(columns) != 2:
        raise ValueError(f"{len(columns)} columns, must be 2")
    text, label = columns
    symbols = text.translate(None, b"()").split()
    if not 0 < len(symbols) < max_length:
        raise ValueError(f"{len(symbols)} tokens, must be 1…{max_length - 1}")
    if label not in LABEL_OF:
        raise ValueError(f"label {label.decode(errors='replace')!r}, must be 0…9")
    try:
        tokens = bytes(map(TOKEN_OF.__getitem__, symbols))
    except KeyError as error:
        raise ValueError(f"unknown symbol {error.args[0].decode(errors='replace')!r}") from None
    if text.count(b"(") != text.count(b")"):
        raise ValueError("its parentheses do not match")
    if (value := value_of(tokens)) != LABEL_OF[label]:
        raise ValueError(f"label {LABEL_OF[label]}, must be {value}, the value of the tree")
    return tokens, value


def write(path: Path, trees: Iterable[Tree], total: int | None = None) -> int:
    """Stream trees, `total` of them if that is known, to an Arrow file; returns how many there were."""
    size = 0
    with tracked(trees, f"ListOps {path.stem}", total) as stream, arrow_file(path, SCHEMA) as file:
        while rows := list(islice(stream, ROWS)):
            tokens, labels = zip(*rows, strict=True)
            file.write_batch(pa.record_batch([[np.frombuffer(one, np.uint8) for one in tokens], labels], schema=SCHEMA))
            size += len(rows)
    return size


@final
@dataclass(frozen=True, kw_only=True)
class ListOpsData(TokenData[TokenExamples]):
    """Random trees, or the official files in the folder `source`.

    The defaults are those of the official generator; conf/task/lra_listops.yaml explains the options.
    """

    name, seq_len, reader, num_tokens, num_classes = "lra_listops", None, TokenExamples, len(VOCABULARY), CLASSES

    source: str | None = None
    seed: int = 0
    train: int = 96_000
    val: int = 2_000
    test: int = 2_000
    min_length: int = 500
    max_length: int = 2_000
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        self.require_at_least(train=1, val=1, test=1, seed=0, min_length=0, max_depth=1)
        above = self.min_length + 1
        require(self.max_length > above, "max_length", self.max_length, f"must be above min_length + 1 = {above}")
        require(2 <= self.max_args <= 1000, "max_args", self.max_args, "must be 2…1000")
        self.require_memory(KNOWN * sum(self.sizes.values()), *Splits._fields)
        self.require_memory(grown_bytes(self.bounds), "max_length", "max_depth")
        self.require_disk(free=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Trees of each split that are drawn."""
        return {split: getattr(self, split) for split in Splits._fields}

    def require_disk(self, *, free: bool) -> None:
        """Raise `OptionError` where the trees that are to be drawn take more than there is, or is free."""
        if self.source is None:
            size, options = self.min_length * sum(self.sizes.values()), {**self.sizes, "min_length": self.min_length}
            require_disk(size, options, self.dir, free=free)

    def at_length(self, seq_len: int) -> "ListOpsData":
        """Trees of fewer than seq_len tokens, and more than the same share of it as before; none to train on.

        Raises `OptionError` for the official files, whose trees have lengths of their own.
        """
        require(self.source is None, "source", self.source, "the trees of files have lengths of their own")
        shortest = round(seq_len * self.min_length / self.max_length)
        return replace(self, min_length=shortest, max_length=seq_len, train=1, val=1)

    @property
    def bounds(self) -> Bounds:
        """Which trees are drawn."""
        return Bounds(self.min_length, self.max_length, self.max_depth, self.max_args)

    @cached_property
    def spec(self) -> dict[str, object]:
        """The options of the generator, or the contents of the official files."""
        if self.source is None:
            return {"version": VERSION, "seed": self.seed, **self.sizes, **self.bounds._asdict()}
        digests = {split: sha256(path) for split, path in official_files(self.source).items()}
        return {"version": VERSION, "max_length": self.max_length, "sha256": digests}

    def build(self, folder: Path) -> None:
        """Write train.arrow, val.arrow and test.arrow."""
        if self.source is not None:
            known: set[Hashable] = set()
            for split, path in official_files(self.source).items():
                trees = noting_repeats(read_official(path, self.max_length), digest, split, known)
                write(folder / f"{split}.arrow", trees)
            return
        self.require_disk(free=True)
        drawn = distinct_trees(self.seed, self.bounds)
        for split, size in self.sizes.items():
            found = write(folder / f"{split}.arrow", islice(drawn, size), size)
            require(found == size, split, size, f"only {found} trees are left; ask for fewer or widen the bounds")


@final
class ListOps(TokenClassification):
    """The value of a tree, one of ten digits, from its tokens; cross-entropy, accuracy.

    The classes are not balanced, and accuracy does not correct for that.
    """

    data: ListOpsData

    def __init__(self, *, seq_len: int, causal: bool, vocab_size: int, pool: Pool, data: ListOpsData) -> None:
        longest = data.max_length - 1
        require(seq_len >= longest, "seq_len", seq_len, f"must be at least {longest}, data.max_length - 1")
        super().__init__(seq_len=seq_len, causal=causal, vocab_size=vocab_size, pool=pool, data=data)
        self.preprocessing = Preprocessing(Text("words", VOCABULARY[1:], other=False), Classes(tuple(range(CLASSES))))

    def baselines(self) -> dict[str, float]:
        """Test accuracies of the most frequent label, overall and after the same first token."""
        train, test = self.data.examples("train"), self.data.examples("test")
        cells = train.tokens.first_tokens.astype(np.int64) * CLASSES + train.labels
        table = np.bincount(cells, minlength=len(VOCABULARY) * CLASSES).reshape(-1, CLASSES)
        best = np.where(table.any(1), table.argmax(1), table.sum(0).argmax())  # (vocabulary,)
        right = test.labels == best[test.tokens.first_tokens]
        return {**super().baselines(), "first token": float(right.mean())}
