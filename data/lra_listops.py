"""ListOps: nested operations on digits, written as a sequence of tokens, are to be evaluated.

n trees, N nodes on one level of many trees, T tokens of many trees

Sources: Nangia and Bowman, "ListOps" (1804.06028); Tay et al., "Long Range Arena" (2011.04006), whose generator
this one follows in distribution, and whose files it reads.
"""

import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Literal, NamedTuple, final

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from data.cache import cached, fingerprint, tracked
from stu.encoders import TokenEncoder
from stu.errors import OptionError, require
from stu.heads import Pool, PooledHead
from stu.task import Batch, Splits, Task

VERSION = 1  # raise it when the same options come to mean other examples, or the same examples other files

DIGITS = tuple("0123456789")
VOCABULARY = ("<pad>", *DIGITS, "[MIN", "[MAX", "[MED", "[SM", "]")  # a token is its place here
ZERO, MIN, MAX, MED, SM, CLOSE = (VOCABULARY.index(s) for s in ("0", "[MIN", "[MAX", "[MED", "[SM", "]"))
CLASSES = len(DIGITS)

ROOTS = 4096  # trees drawn in one go; the official bounds keep about 340 of them
ODDS = 4  # one node in four is an operator, down to the last level
PATIENCE = 64  # goes over which the share of new trees is judged
ROWS = 1000  # examples in one Arrow record batch
SCHEMA = pa.schema({"tokens": pa.list_(pa.uint8()), "label": pa.uint8()})

TOKEN_OF = {symbol.encode(): token for token, symbol in enumerate(VOCABULARY) if token}
LABEL_OF = {digit.encode(): label for label, digit in enumerate(DIGITS)}

Tokens = NDArray[np.uint8]
Integers = NDArray[np.int64]
Example = tuple[bytes, int]  # one byte a token, and the label


class Bounds(NamedTuple):
    """Which trees are drawn and kept; both lengths are exclusive."""

    min_length: int
    max_length: int
    max_depth: int
    max_args: int


class Level(NamedTuple):
    """One level of many trees; the children of its nodes are the next level, in the same order.

    arity: (N,) number of children, 0 for a digit. symbols: (N,) tokens of the operators and digits.
    """

    arity: Integers
    symbols: Tokens


def distinct_trees(seed: int, bounds: Bounds) -> Iterator[Example]:
    """Random trees, no two alike; ends when there are hardly any more.

    Go k is drawn from (seed, k) alone, so that it can be repeated without those before it.
    """
    seen: set[bytes] = set()
    fresh: deque[int] = deque(maxlen=PATIENCE)
    for go in count():
        known = len(seen)
        for tokens, label in draw_trees(np.random.default_rng([seed, go]), bounds):
            digest = hashlib.blake2b(tokens, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield tokens, label
        fresh.append(len(seen) - known)
        if len(fresh) == PATIENCE and 1000 * sum(fresh) <= len(seen):
            return


def draw_trees(random: np.random.Generator, bounds: Bounds) -> Iterator[Example]:
    """Those of `ROOTS` random trees whose length is within bounds."""
    arities, lengths = grow(random, bounds)
    kept = (bounds.min_length < lengths) & (lengths < bounds.max_length)
    levels = with_symbols(random, arities, kept)
    tokens, labels = serialized(levels).tobytes(), values(levels)
    stop = 0
    for length, label in zip(lengths[kept].tolist(), labels.tolist(), strict=True):
        start, stop = stop, stop + length
        yield tokens[start:stop], label


def grow(random: np.random.Generator, bounds: Bounds) -> tuple[list[Integers], Integers]:
    """The shapes of `ROOTS` trees: arities (N,) level by level, and lengths (n,) in tokens.

    A tree that is too long anyway stops growing, which bounds the memory.
    """
    tree = np.arange(ROOTS)  # (N,), the tree of every node
    lengths = np.ones(ROOTS, np.int64)
    arities = []
    for _ in range(bounds.max_depth - 1):
        draw = random.integers(ODDS * (bounds.max_args - 1), size=len(tree))
        arity = np.where(draw < bounds.max_args - 1, draw + 2, 0)
        operator = np.flatnonzero(arity)
        added = np.bincount(tree[operator], arity[operator] + 1, ROOTS)  # children and closing brackets
        lengths += added.astype(np.int64)
        arity[lengths[tree] >= bounds.max_length] = 0
        arities.append(arity)
        tree = np.repeat(tree, arity)
    return [*arities, np.zeros(len(tree), np.int64)], lengths


def with_symbols(random: np.random.Generator, arities: list[Integers], kept: NDArray[np.bool_]) -> list[Level]:
    """The trees whose root is `kept` (n,), with operators and digits drawn for their nodes."""
    levels = []
    for arity in arities:
        arity, kept = arity[kept], np.repeat(kept, arity)
        draw = random.integers(20, size=len(arity), dtype=np.uint8)  # 20: a multiple of 4 operators and 10 digits
        levels.append(Level(arity, np.where(arity > 0, MIN + draw % 4, ZERO + draw % 10).astype(np.uint8)))
    return levels


def run_sums(x: np.ndarray, counts: Integers) -> Integers:
    """Sums over consecutive runs of `x`, as long as `counts` says."""
    total = np.zeros(len(x) + 1, np.int64)
    np.cumsum(x, out=total[1:])
    stop = counts.cumsum()
    return total[stop] - total[stop - counts]


def values(levels: list[Level]) -> Tokens:
    """The values of the trees, (n,), from the leaves up."""
    value = levels[-1].symbols - ZERO
    for level in reversed(levels[:-1]):
        value = applied(level, value)
    return value


def applied(level: Level, children: Tokens) -> Tokens:
    """The values (N,) of one level's nodes, given those of all their children.

    MED is the median rounded down, SM the sum modulo 10.
    """
    nodes = np.flatnonzero(level.arity)
    arity, operator = level.arity[nodes], level.symbols[nodes]
    parent = np.repeat(np.arange(len(nodes)), arity)
    ordered = np.sort(parent * 16 + children) % 16  # the children of each node, ascending
    low = np.select([operator == MIN, operator == MAX], [0, arity - 1], (arity - 1) // 2)
    high = np.where(operator == MED, arity // 2, low)
    first = arity.cumsum() - arity
    middle = (ordered[first + low] + ordered[first + high]) // 2
    value = level.symbols - ZERO
    value[nodes] = np.where(operator == SM, run_sums(children, arity) % 10, middle)
    return value


def serialized(levels: list[Level]) -> Tokens:
    """The tokens of the trees, (T,), one tree after the other."""
    sizes = [np.ones(len(levels[-1].arity), np.int64)]  # tokens of every node's subtree
    for arity, _ in reversed(levels[:-1]):
        sizes.insert(0, 1 + (arity > 0) + run_sums(sizes[0], arity))
    tokens = np.empty(sizes[0].sum(), np.uint8)
    start = sizes[0].cumsum() - sizes[0]
    for level, size, child in zip(levels[:-1], sizes[:-1], sizes[1:], strict=True):
        nodes = np.flatnonzero(level.arity)
        tokens[start] = level.symbols
        tokens[(start + size)[nodes] - 1] = CLOSE
        arity = level.arity[nodes]
        before = child.cumsum() - child  # tokens of the earlier subtrees on the children's level
        first = arity.cumsum() - arity
        start = before + np.repeat(start[nodes] + 1 - before[first], arity)
    tokens[start] = levels[-1].symbols
    return tokens


def official_files(source: str) -> dict[str, Path]:
    """Split → basic_<split>.tsv, or basic_<split>.tsv.gz, in the folder `source`."""
    folder = Path(source).expanduser()
    plain = {split: folder / f"basic_{split}.tsv" for split in Splits._fields}
    files = {split: path if path.is_file() else path.with_suffix(".tsv.gz") for split, path in plain.items()}
    missing = ", ".join(plain[split].name for split, path in files.items() if not path.is_file())
    require(not missing, "source", source, f"must hold the official files; missing, plain and .gz: {missing}")
    return files


def read_official(path: Path, max_length: int) -> Iterator[Example]:
    """The examples of an official file: a header, then lines of Source, a tab and Target."""
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


def parsed(columns: list[bytes], max_length: int) -> Example:
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
        return bytes(map(TOKEN_OF.__getitem__, symbols)), LABEL_OF[label]
    except KeyError as error:
        raise ValueError(f"unknown symbol {error.args[0].decode(errors='replace')!r}") from None


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, examples: Iterable[Example], total: int | None = None) -> int:
    """Stream examples, `total` of them if that is known, to an Arrow file; returns how many came."""
    size = 0
    with (
        tracked(examples, f"ListOps {path.stem}", total) as stream,
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
    ):
        while rows := list(islice(stream, ROWS)):
            writer.write_batch(record_batch(rows))
            size += len(rows)
    return size


def record_batch(rows: list[Example]) -> pa.RecordBatch:
    """The rows in the columns of `SCHEMA`."""
    tokens, labels = zip(*rows, strict=True)
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
    flat = np.frombuffer(b"".join(tokens), np.uint8)
    return pa.record_batch([pa.ListArray.from_arrays(offsets, flat), pa.array(labels, pa.uint8())], schema=SCHEMA)


@final
class TokenExamples:
    """The (tokens, label) pairs of an Arrow file in memory-mapped form; pickled as its path.

    labels, lengths, first_tokens: (n,).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        table = Dataset.from_file(str(path)).data
        batches = table.column("tokens").chunks  # `ROWS` examples each, but for the last
        self.runs = [(batch.offsets.to_numpy(), batch.values.to_numpy()) for batch in batches]
        self.labels: Tokens = table.column("label").to_numpy()
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self.runs])

    def __reduce__(self) -> tuple[type["TokenExamples"], tuple[Path]]:
        return TokenExamples, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tokens, int]:
        batch, row = divmod(range(len(self))[index], ROWS)
        offsets, tokens = self.runs[batch]
        return tokens[offsets[row] : offsets[row + 1]].copy(), int(self.labels[index])  # torch wants it writable

    @property
    def first_tokens(self) -> Tokens:
        """What each sequence starts with."""
        return np.concatenate([tokens[offsets[:-1]] for offsets, tokens in self.runs])


@dataclass(frozen=True, kw_only=True)
class ListOpsData:
    """Random trees, or the official files in the folder `source`, as Arrow files in the cache `dir`.

    The defaults are the official generator's; conf/task/lra_listops.yaml explains the options.
    """

    dir: str
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
        for name, least in (("train", 1), ("val", 1), ("test", 1), ("seed", 0), ("min_length", 0), ("max_depth", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}")
        above = self.min_length + 1
        require(self.max_length > above, "max_length", self.max_length, f"must be above min_length + 1 = {above}")
        require(2 <= self.max_args <= 1000, "max_args", self.max_args, "must be 2…1000")

    @property
    def bounds(self) -> Bounds:
        """Which trees are drawn."""
        return Bounds(self.min_length, self.max_length, self.max_depth, self.max_args)

    @cached_property
    def spec(self) -> dict[str, object]:
        """Everything that determines the examples."""
        if self.source is None:
            sizes = {split: getattr(self, split) for split in Splits._fields}
            return {"version": VERSION, "seed": self.seed, **sizes, **self.bounds._asdict()}
        digests = {split: sha256(path) for split, path in official_files(self.source).items()}
        return {"version": VERSION, "max_length": self.max_length, "sha256": digests}

    def prepare(self) -> Path:
        """The folder of train.arrow, val.arrow and test.arrow, built if need be."""
        return cached(self.dir, "lra_listops", self.spec, self.build)

    def build(self, folder: Path) -> None:
        """Write the three files into `folder`."""
        if self.source is not None:
            for split, path in official_files(self.source).items():
                write(folder / f"{split}.arrow", read_official(path, self.max_length))
            return
        trees = distinct_trees(self.seed, self.bounds)
        for split in Splits._fields:
            size = getattr(self, split)
            found = write(folder / f"{split}.arrow", islice(trees, size), size)
            require(found == size, split, size, f"only {found} trees are left; ask for fewer or widen the bounds")

    def examples(self, split: str) -> TokenExamples:
        """The prepared train, val or test examples."""
        return TokenExamples(self.prepare() / f"{split}.arrow")


@final
class ListOps(Task):
    """The value of a tree, one of ten digits, from its tokens; cross-entropy, accuracy."""

    monitor = "accuracy"
    mode: Literal["min", "max"] = "max"

    def __init__(self, *, seq_len: int, causal: bool, vocab_size: int, pool: Pool, data: ListOpsData) -> None:
        longest = data.max_length - 1
        require(seq_len >= longest, "seq_len", seq_len, f"must be at least {longest}, data.max_length - 1")
        known = len(VOCABULARY)
        require(vocab_size >= known, "vocab_size", vocab_size, f"must be at least {known}")
        self.seq_len, self.causal, self.vocab_size, self.data = seq_len, causal, vocab_size, data
        self.pool: Pool = pool

    def prepare(self) -> None:
        """Fill the cache, unless it holds the data."""
        self.data.prepare()

    def datasets(self) -> Splits:
        """(L,) uint8 tokens and a label, from the cache."""
        return Splits(*map(self.data.examples, Splits._fields))

    def fingerprint(self) -> str:
        """SHA-256, cut, of the generator's options or of the official files."""
        return fingerprint(self.data.spec)

    def baselines(self) -> dict[str, float]:
        """Test accuracies of train's most frequent label, over all and after each first token."""
        train, test = self.data.examples("train"), self.data.examples("test")
        cells = train.first_tokens.astype(np.int64) * CLASSES + train.labels
        table = np.bincount(cells, minlength=len(VOCABULARY) * CLASSES).reshape(-1, CLASSES)
        majority = table.sum(0).argmax()
        best = np.where(table.any(1), table.argmax(1), majority)  # (vocabulary,)
        return {
            "majority": float((test.labels == majority).mean()),
            "first token": float((test.labels == best[test.first_tokens]).mean()),
        }

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L) → (B, L, d_model)."""
        return TokenEncoder(d_model, vocab_size=self.vocab_size)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, 10)."""
        return PooledHead(d_model, d_output=CLASSES, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every sequence: (B, 10) and (B,)."""
        return prediction, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The share of right answers; the classes are not balanced, and are not made so."""
        return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
