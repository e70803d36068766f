"""Text: is a film review positive or negative? Its bytes are the sequence.

n reviews, T tokens of many reviews, V vocabulary

Sources: Maas et al., "Learning word vectors for sentiment analysis" (ACL 2011); Tay et al., "Long Range Arena"
(2011.04006), section 2.2.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.special import expit

from data.store.arrow import arrow_file
from data.store.cache import tracked
from data.store.sources import HubData, divided
from data.store.tokens import BYTES, ROWS, SCHEMA, TokenClassification, TokenData, TokenExamples, Tokens, list_array
from stu import preprocessing
from stu.errors import require
from stu.files import write_atomically
from stu.preprocessing import Classes, Preprocessing
from stu.task import Splits

VERSION = 1  # increment when the same options produce different examples, or the same examples different files

CLASSES = 2  # negative, positive
IMDB = HubData(
    name="stanfordnlp/imdb",
    revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
    files="plain_text/{}-00000-of-00001.parquet",
    columns={"text": pa.string(), "label": pa.int64()},
    rows={"train": 25_000, "test": 25_000},
    classes=CLASSES,
)

UNKNOWN = 1  # the token of a character that is not in the vocabulary
MOST = 2**8 - 1 - UNKNOWN  # characters that have a token of their own: a token is one byte
RARE = 15  # characters seen less often in the training texts are not in the vocabulary, as in S4's code
CODE_POINTS = 0x110000

Alphabet = Literal["bytes", "characters"]
Encode = Callable[[pa.StringArray], pa.ListArray]  # texts → their tokens, truncated


def byte_tokens(texts: pa.StringArray, longest: int) -> pa.ListArray:
    """The first `longest` bytes of each text in UTF-8, each plus 1; the byte 255 does not occur there."""
    cut = pc.binary_slice(texts.cast(pa.binary()), 0, longest)
    return list_array(joined(cut) + 1, pc.binary_length(cut).to_numpy())


def character_tokens(texts: pa.StringArray, longest: int, token_of: Tokens) -> pa.ListArray:
    """The first `longest` characters of each text; `token_of` maps code points to tokens."""
    cut = pc.utf8_slice_codeunits(texts, 0, longest)
    return list_array(token_of[code_points(cut)], pc.utf8_length(cut).to_numpy())


def vocabulary(texts: pa.ChunkedArray, longest: int) -> NDArray[np.int64]:
    """The code points that occur at least `RARE` times in the truncated texts."""
    counts = np.zeros(CODE_POINTS, np.int64)
    for chunk in chunks(texts):
        counts += np.bincount(code_points(pc.utf8_slice_codeunits(chunk, 0, longest)), minlength=CODE_POINTS)
    return np.flatnonzero(counts >= RARE)


def joined(texts: pa.Array) -> Tokens:
    """The bytes of the texts, (T,), one text after the other."""
    _, offsets, content = texts.buffers()
    start, stop = np.frombuffer(offsets, np.int32)[[texts.offset, texts.offset + len(texts)]]
    return np.frombuffer(content, np.uint8)[start:stop]


def code_points(texts: pa.StringArray) -> NDArray[np.uint32]:
    """The code points of the texts, (T,)."""
    return np.frombuffer(joined(texts).tobytes().decode().encode("utf-32-le"), np.uint32)


def chunks(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """The values of a column, `ROWS` at a time."""
    for start in range(0, len(column), ROWS):
        yield column.slice(start, ROWS).combine_chunks()


def write(path: Path, table: pa.Table, encode: Encode) -> None:
    """The texts of `table` as tokens, with their labels, in an Arrow file of `SCHEMA`."""
    rows = zip(chunks(table["text"]), chunks(table["label"].cast(pa.uint8())), strict=True)
    batches = len(range(0, len(table), ROWS))
    with tracked(rows, f"Text {path.stem}", batches) as stream, arrow_file(path, SCHEMA) as file:
        for texts, labels in stream:
            file.write_batch(pa.record_batch([encode(texts), labels], schema=SCHEMA))


@final
@dataclass(frozen=True, kw_only=True)
class TextData(TokenData[TokenExamples]):
    """Film reviews from the Hugging Face hub, or from the files in the folder `source`.

    The test reviews are the official ones; the validation reviews are drawn at random from the official training
    reviews, equally many of each label. conf/task/lra_text.yaml explains the options.
    """

    name, reader, num_tokens, num_classes = "lra_text", TokenExamples, BYTES, CLASSES

    seq_len: int
    source: str | None = None
    tokens: Alphabet = "bytes"
    seed: int = 0
    train: int = 22_500
    val: int = 2_500
    test: int = 25_000

    def __post_init__(self) -> None:
        self.require_at_least(seq_len=1, seed=0, train=1, val=1, test=1)
        allowed = get_args(Alphabet)
        require(self.tokens in allowed, "tokens", self.tokens, f"must be one of {', '.join(allowed)}")

    @cached_property
    def spec(self) -> dict[str, object]:
        """The options, and the revision or the contents of what the reviews are read from."""
        options = {name: getattr(self, name) for name in ("seq_len", "tokens", "seed", *Splits._fields)}
        return {"version": VERSION, **IMDB.identity(self.source), **options}

    def build(self, folder: Path) -> None:
        """Write train.arrow, val.arrow, test.arrow and, where characters are tokens, vocabulary.json."""
        splits = self.reviews()
        encode: Encode = partial(byte_tokens, longest=self.seq_len)
        if self.tokens == "characters":
            known = vocabulary(splits["train"]["text"], self.seq_len)
            allowed = f"must be bytes: {len(known):,} characters occur {RARE} times in train, {MOST} can have a token"
            require(len(known) <= MOST, "tokens", self.tokens, allowed)
            token_of = np.full(CODE_POINTS, UNKNOWN, np.uint8)
            token_of[known] = np.arange(UNKNOWN + 1, UNKNOWN + 1 + len(known))
            write_atomically(folder / "vocabulary.json", json.dumps([chr(point) for point in known]))
            encode = partial(character_tokens, longest=self.seq_len, token_of=token_of)
        for split, table in splits.items():
            write(folder / f"{split}.arrow", table, encode)

    def reviews(self) -> dict[str, pa.Table]:
        """The texts and labels of every split."""
        tables = IMDB.tables(self.source)
        for split, table in tables.items():
            row = pc.index(pc.equal(pc.binary_length(table["text"]), 0), True).as_py()
            require(row < 0, "source", self.source, f"{split} has an empty text in row {row}")
        train = divided(tables["train"], sizes={"val": self.val, "train": self.train}, seed=self.seed)
        return {**train, **divided(tables["test"], sizes={"test": self.test}, seed=self.seed)}


@final
class Text(TokenClassification):
    """Is a review positive? From its tokens; cross-entropy, accuracy."""

    data: TextData

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]  # the vocabulary is in the data
        """A review as text; negative or positive."""
        text = preprocessing.Text()
        if self.data.tokens == "characters":
            known = json.loads((self.data.prepare() / "vocabulary.json").read_text(encoding="utf-8"))
            text = preprocessing.Text("characters", known)
        return Preprocessing(text, Classes(("negative", "positive")))

    def baselines(self) -> dict[str, float]:
        """Test accuracies of the most frequent label, and of logistic regression on token frequencies."""
        train, test = self.data.examples("train"), self.data.examples("test")
        x, unseen = standardized(shares(train), shares(test))
        guesses = unseen @ logistic_regression(x, train.labels) > 0
        return {**super().baselines(), f"bag of {self.data.tokens}": float((test.labels == guesses).mean())}


def shares(examples: TokenExamples) -> NDArray[np.float64]:
    """The relative frequency of each token in each sequence, (n, V)."""
    return examples.tokens.counts(BYTES) / examples.tokens.lengths[:, None]


def standardized(x: NDArray[np.float64], *others: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """All arrays shifted and scaled by the column means and standard deviations of `x`, with a column of ones added."""
    mean, std = x.mean(0), x.std(0)
    scale = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
    return [np.column_stack([(one - mean) * scale, np.ones(len(one))]) for one in (x, *others)]


def logistic_regression(x: NDArray[np.float64], labels: Tokens) -> NDArray[np.float64]:
    """Maximum a posteriori weights for labels 0 and 1 under a unit Gaussian prior, by Newton's method."""
    weights = np.zeros(x.shape[1])
    for _ in range(10):
        p = expit(x @ weights)
        curvature = (x.T * (p * (1 - p))) @ x + np.eye(len(weights))
        weights -= np.linalg.solve(curvature, x.T @ (p - labels) + weights)
    return weights
