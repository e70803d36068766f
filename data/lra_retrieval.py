"""Retrieval: does one of two papers cite the other? The bytes of both are the sequences.

n pairs, B batch, L length

Sources: Radev et al., "The ACL anthology network corpus" (2013); Tay et al., "Long Range Arena" (2011.04006), section
2.2, whose files are read.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from data.cache import cached, fingerprint, tracked
from data.sources import sha256
from data.tokens import ROWS, SEQUENCE, TokenColumn, Tokens, arrow_file, list_array
from stu.encoders import TokenEncoder
from stu.errors import OptionError, require
from stu.heads import Pool, TwoTowerHead
from stu.task import Batch, Splits, Task

VERSION = 1  # raise it when the same options come to mean other examples, or the same examples other files

CLASSES = 2
BYTES = 257  # tokens: 0 is padding, b + 1 the byte b
FILES = {"train": "new_aan_pairs.train.tsv", "val": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
PUBLISHED = {"train": 147_086, "val": 18_090, "test": 17_437}  # pairs
RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"

NEXT_BYTE = bytes(range(1, 256)) + b"\0"  # b → b + 1; UTF-8 has no byte 255
LABEL_OF = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}
DOCUMENTS = pa.schema({"tokens": SEQUENCE})
PAIRS = pa.schema({"first": pa.int32(), "second": pa.int32(), "label": pa.uint8()})

Pair = tuple[bytes, bytes, int]  # two texts and the label


def official_files(source: str | None) -> dict[str, Path]:
    """Split → its tsv file, in the folder `source` or below it."""
    found = {split: search(source, name) for split, name in FILES.items()}
    missing = ", ".join(FILES[split] for split, path in found.items() if path is None)
    allowed = f"must be a folder with the official files, of {RELEASE} when unpacked; missing: {missing}"
    require(not missing, "source", source, allowed)
    return {split: path for split, path in found.items() if path is not None}


def search(source: str | None, name: str) -> Path | None:
    """The file of that name in the folder `source`, or in one at most three levels below."""
    if source is None:
        return None
    folder = Path(source).expanduser()
    return next((path for depth in range(4) for path in sorted(folder.glob("*/" * depth + name))), None)


def read_official(path: Path) -> Iterator[Pair]:
    """The pairs of an official file: lines of label, two names and two texts, with tabs between them.

    A text is what stands there, as in Long Range Arena: Python's way to write bytes, b'…'. Quotes mean nothing.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield parsed(line)
                except ValueError as error:
                    raise OptionError("source", str(path), f"line {number}: {error}") from error
    except OSError as error:
        raise OptionError("source", str(path), f"cannot be read: {error}") from error


def parsed(line: bytes) -> Pair:
    """The texts and the label of a line."""
    columns = line.rstrip(b"\r\n").split(b"\t")
    if len(columns) != 5:
        raise ValueError(f"{len(columns)} columns, must be 5")
    label, _, _, first, second = columns
    if label not in LABEL_OF:
        raise ValueError(f"label {label.decode(errors='replace')!r}, must be 0.0 or 1.0")
    if not (first and second):
        raise ValueError("a text is empty")
    if b"\xff" in first or b"\xff" in second:
        raise ValueError("a text is not in UTF-8")
    if not line.endswith(b"\n") and second[-1:] not in (b"'", b'"'):
        raise ValueError("the file ends within the text")
    return first, second, LABEL_OF[label]


class Shelf:
    """Distinct texts, numbered as they come and written to an Arrow file, `ROWS` at a time; most come often."""

    def __init__(self, file: pa.RecordBatchStreamWriter) -> None:
        self.file = file
        self.numbers: dict[bytes, int] = {}
        self.waiting: list[bytes] = []

    def number(self, text: bytes) -> int:
        """Of a text, new or not."""
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if digest not in self.numbers:
            self.numbers[digest] = len(self.numbers)
            self.waiting.append(text.translate(NEXT_BYTE))
            if len(self.waiting) == ROWS:
                self.flush()
        return self.numbers[digest]

    def flush(self) -> None:
        """Write what waits."""
        if self.waiting:
            flat = np.frombuffer(b"".join(self.waiting), np.uint8)
            column = list_array(flat, np.array([len(text) for text in self.waiting]))
            self.file.write_batch(pa.record_batch([column], schema=DOCUMENTS))
            self.waiting.clear()


@final
class PairExamples:
    """The ((tokens, tokens), label) examples of a file of `PAIRS`, beside the documents; pickled as its path.

    labels: (n,). lengths: (n,) of the longer document of each pair.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        table = Dataset.from_file(str(path)).data
        self.first, self.second, self.labels = (table.column(name).to_numpy() for name in PAIRS.names)
        self.documents = TokenColumn(Dataset.from_file(str(path.with_name("documents.arrow"))).data.column("tokens"))
        self.lengths = np.maximum(self.documents.lengths[self.first], self.documents.lengths[self.second])

    def __reduce__(self) -> tuple[type["PairExamples"], tuple[Path]]:
        return PairExamples, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[tuple[Tokens, Tokens], int]:
        pair = self.documents[self.first[index]], self.documents[self.second[index]]
        return pair, int(self.labels[index])


@dataclass(frozen=True, kw_only=True)
class RetrievalData:
    """Pairs of papers from the official files in the folder `source`, as Arrow files in the cache `dir`.

    conf/task/lra_retrieval.yaml explains the options.
    """

    dir: str
    seq_len: int
    source: str | None = None
    train: int = PUBLISHED["train"]
    val: int = PUBLISHED["val"]
    test: int = PUBLISHED["test"]

    def __post_init__(self) -> None:
        require(self.seq_len >= 1, "seq_len", self.seq_len, "must be at least 1")
        for name, most in PUBLISHED.items():
            require(1 <= getattr(self, name) <= most, name, getattr(self, name), f"must be in 1 … {most}")

    @cached_property
    def spec(self) -> dict[str, object]:
        """Everything that determines the examples."""
        digests = {split: self.digest(path) for split, path in official_files(self.source).items()}
        sizes = {split: getattr(self, split) for split in Splits._fields}
        return {"version": VERSION, "sha256": digests, "seq_len": self.seq_len, **sizes}

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, which may have gigabytes: remembered until its size or time changes."""
        facts = path.stat()
        key = fingerprint({"path": str(path.resolve()), "size": facts.st_size, "time": facts.st_mtime_ns})
        note = Path(self.dir).expanduser() / "lra_retrieval" / f"{key}.sha256"
        if note.is_file() and (digest := note.read_text()):
            return digest
        digest = sha256(path)
        with suppress(OSError):  # a folder that cannot be written to is the builder's to report
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(digest)
        return digest

    def prepare(self) -> Path:
        """The folder of documents.arrow, train.arrow, val.arrow and test.arrow, built if need be."""
        return cached(self.dir, "lra_retrieval", self.spec, self.build)

    def build(self, folder: Path) -> None:
        """Write the four files into `folder`."""
        with arrow_file(folder / "documents.arrow", DOCUMENTS) as documents:
            shelf = Shelf(documents)
            for split, path in official_files(self.source).items():
                self.write(folder / f"{split}.arrow", split, path, shelf)
            shelf.flush()

    def write(self, target: Path, split: str, path: Path, shelf: Shelf) -> None:
        """The first pairs of a file, as many as are asked for, as numbers of documents."""
        size, most = getattr(self, split), PUBLISHED[split]
        pairs = read_official(path)
        with tracked(islice(pairs, size), f"Retrieval {split}", size) as stream:
            rows = [(shelf.number(first[: self.seq_len]), shelf.number(second[: self.seq_len]), label)
                    for first, second, label in stream]  # fmt: skip
        require(len(rows) == size, split, size, f"{path} has only {len(rows):,} lines")
        more = size == most and next(pairs, None) is not None
        require(not more, "source", str(path), f"must have {most:,} lines, has more")
        with arrow_file(target, PAIRS) as file:
            file.write_batch(pa.record_batch(list(map(pa.array, zip(*rows, strict=True), PAIRS.types)), schema=PAIRS))

    def examples(self, split: str) -> PairExamples:
        """The prepared train, val or test examples."""
        return PairExamples(self.prepare() / f"{split}.arrow")


@final
class Retrieval(Task):
    """Whether one of two papers cites the other, from the tokens of both; cross-entropy, accuracy.

    One tower reads both: a batch of B pairs is 2B sequences, the first texts and then the second ones.
    """

    monitor = "accuracy"
    mode: Literal["min", "max"] = "max"

    def __init__(self, *, seq_len: int, causal: bool, vocab_size: int, pool: Pool, data: RetrievalData) -> None:
        require(seq_len == data.seq_len, "seq_len", seq_len, f"must be the data's, {data.seq_len}")
        require(vocab_size >= BYTES, "vocab_size", vocab_size, f"must be at least {BYTES}")
        self.seq_len, self.causal, self.vocab_size, self.data = seq_len, causal, vocab_size, data
        self.pool: Pool = pool

    def prepare(self) -> None:
        """Fill the cache, unless it holds the data."""
        self.data.prepare()

    def datasets(self) -> Splits:
        """Two (L,) uint8 sequences of tokens and a label, from the cache."""
        return Splits(*map(self.data.examples, Splits._fields))

    def fingerprint(self) -> str:
        """SHA-256, cut, of the options and of the official files."""
        return fingerprint(self.data.spec)

    def baselines(self) -> dict[str, float]:
        """Test accuracy of train's most frequent label."""
        train, test = self.data.examples("train"), self.data.examples("test")
        return {"majority": float((test.labels == np.bincount(train.labels).argmax()).mean())}

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """Inputs and mask (2B, L), targets (B,): row B + i is the second text of pair i."""
        batch = super().collate([(pair[side], label) for side in (0, 1) for pair, label in examples])
        return batch._replace(targets=batch.targets[: len(examples)])

    def encoder(self, d_model: int) -> nn.Module:
        """(2B, L) → (2B, L, d_model)."""
        return TokenEncoder(d_model, vocab_size=self.vocab_size)

    def head(self, d_model: int) -> nn.Module:
        """(2B, L, d_model) → (B, 2)."""
        return TwoTowerHead(d_model, d_output=CLASSES, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every pair: (B, 2) and (B,)."""
        return prediction, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The share of right answers."""
        return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
