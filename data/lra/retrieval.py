"""Retrieval: does one of two papers cite the other? The bytes of both are the sequences.

n pairs, B batch, L length

Sources: Radev et al., "The ACL anthology network corpus" (2013); Tay et al., "Long Range Arena" (2011.04006), section
2.2, whose files are read.
"""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
from torch import nn

from data.store.arrow import arrow_file, table_of
from data.store.cache import fingerprint, tracked
from data.store.sources import files, folder_of, noting_repeats, sha256
from data.store.stored import LabelledExamples
from data.store.tokens import BYTES, ROWS, SEQUENCE, TokenClassification, TokenColumn, TokenData, Tokens
from stu.errors import OptionError, require
from stu.files import write_atomically
from stu.heads import TwoTowerHead
from stu.task import Batch, Splits

VERSION = 1  # increment when the same options produce different examples, or the same examples different files

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
    wanted = f"the official files, {', '.join(FILES.values())}, of {RELEASE} when unpacked"
    require(source is not None, "source", source, f"must be a folder with {wanted}")
    folder = folder_of(str(source), wanted)
    found = {split: files(folder, name, below=3) for split, name in FILES.items()}
    missing = ", ".join(FILES[split] for split, paths in found.items() if not paths)
    require(not missing, "source", source, f"must be a folder with {wanted}; missing: {missing}")
    twice = next((paths for paths in found.values() if len(paths) > 1), [])
    require(not twice, "source", source, f"must have each file once; has {' and '.join(map(str, twice))}")
    return {split: path for split, [path] in found.items()}


def read_official(path: Path) -> Iterator[Pair]:
    """The pairs of an official file, whose lines are label, two names and two texts, separated by tabs.

    As in Long Range Arena, a text is taken literally, including the b'…' of Python's bytes. Quotes are not special.
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


class DocumentWriter:
    """Numbers distinct texts as they come and writes them to an Arrow file, `ROWS` at a time; most texts recur."""

    def __init__(self, file: pa.RecordBatchStreamWriter) -> None:
        self.file = file
        self.numbers: dict[bytes, int] = {}
        self.pending: list[bytes] = []

    def number(self, text: bytes) -> int:
        """The number of a text, new or not."""
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if digest not in self.numbers:
            self.numbers[digest] = len(self.numbers)
            self.pending.append(text.translate(NEXT_BYTE))
            if len(self.pending) == ROWS:
                self.flush()
        return self.numbers[digest]

    def flush(self) -> None:
        """Write the pending texts."""
        if self.pending:
            column = [np.frombuffer(text, np.uint8) for text in self.pending]
            self.file.write_batch(pa.record_batch([column], schema=DOCUMENTS))
            self.pending.clear()


@final
class PairExamples(LabelledExamples):
    """The ((tokens, tokens), label) examples of a file of `PAIRS`, next to documents.arrow.

    lengths: (n,) of the longer document of each pair.
    """

    def __init__(self, path: Path) -> None:
        table = table_of(path)
        self.first, self.second, labels = (table.column(name).to_numpy() for name in PAIRS.names)
        super().__init__(labels, path)
        self.documents = TokenColumn(table_of(path.with_name("documents.arrow")).column("tokens"))
        self.lengths = np.maximum(self.documents.lengths[self.first], self.documents.lengths[self.second])

    def __getitem__(self, index: int, /) -> tuple[tuple[Tokens, Tokens], int]:
        pair = self.documents[self.first[index]], self.documents[self.second[index]]
        return pair, int(self.labels[index])


@final
@dataclass(frozen=True, kw_only=True)
class RetrievalData(TokenData[PairExamples]):
    """Pairs of papers from the official files in the folder `source`.

    conf/task/lra_retrieval.yaml explains the options.
    """

    name, reader, num_tokens, num_classes = "lra_retrieval", PairExamples, BYTES, 2

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
        """The options and the contents of the official files."""
        digests = {split: self.digest(path) for split, path in official_files(self.source).items()}
        sizes = {split: getattr(self, split) for split in Splits._fields}
        return {"version": VERSION, "sha256": digests, "seq_len": self.seq_len, **sizes}

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, which may be gigabytes long: remembered until its size or modification time changes."""
        facts = path.stat()
        key = fingerprint({"path": str(path.resolve()), "size": facts.st_size, "time": facts.st_mtime_ns})
        note = Path(self.dir).expanduser() / self.name / f"{key}.sha256"
        with suppress(OSError, ValueError):  # no note, or a damaged one, or one that earlier versions did not sign
            digest, signature = note.read_text().rsplit(maxsplit=1)
            if signature == fingerprint({"key": key, "sha256": digest}):
                return digest
        digest = sha256(path)
        with suppress(OSError):  # a folder that cannot be written to is reported when the data are built
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(note, f"{digest} {fingerprint({'key': key, 'sha256': digest})}\n")
        return digest

    def build(self, folder: Path) -> None:
        """Write documents.arrow, train.arrow, val.arrow and test.arrow."""
        known: set[Hashable] = set()
        with arrow_file(folder / "documents.arrow", DOCUMENTS) as file:
            documents = DocumentWriter(file)
            for split, path in official_files(self.source).items():
                self.write(folder / f"{split}.arrow", split, path, documents, known)
            documents.flush()

    def write(self, target: Path, split: str, path: Path, documents: DocumentWriter, known: set[Hashable]) -> None:
        """Write the first pairs of a file, as many as the split has, as numbers of documents; known: those of train."""
        size, most = getattr(self, split), PUBLISHED[split]
        pairs = read_official(path)
        with tracked(islice(pairs, size), f"Retrieval {split}", size) as stream:
            numbered = ((documents.number(first[: self.seq_len]), documents.number(second[: self.seq_len]), label)
                        for first, second, label in stream)  # fmt: skip
            rows = list(noting_repeats(numbered, itemgetter(0, 1), split, known))
        require(len(rows) == size, split, size, f"{path} has only {len(rows):,} lines")
        more = size == most and next(pairs, None) is not None
        require(not more, "source", str(path), f"must have {most:,} lines, has more")
        with arrow_file(target, PAIRS) as file:
            file.write_batch(pa.record_batch(list(zip(*rows, strict=True)), schema=PAIRS))


@final
class Retrieval(TokenClassification):
    """Does one of two papers cite the other? From the tokens of both; cross-entropy, accuracy.

    One tower reads both: a batch of B pairs is 2B sequences, the first texts and then the second ones.
    """

    data: RetrievalData

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """Inputs and mask (2B, L), targets (B,): row B + i is the second text of pair i."""
        batch = super().collate([(pair[side], label) for side in (0, 1) for pair, label in examples])
        return batch._replace(targets=batch.targets[: len(examples)])

    def head(self, d_model: int) -> nn.Module:
        """(2B, L, d_model) → (B, 2)."""
        return TwoTowerHead(d_model, d_output=self.num_classes, pool=self.pool)
