"""Text: does a film review praise or condemn? Its bytes, one after the other, are the sequence.

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
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from data.cache import cached, fingerprint, tracked
from data.sources import HubData, divided
from data.tokens import ROWS, SCHEMA, TokenExamples, Tokens, arrow_file, list_array
from stu.encoders import TokenEncoder
from stu.errors import require
from stu.heads import Pool, PooledHead
from stu.task import Batch, Splits, Task

VERSION = 1  # raise it when the same options come to mean other examples, or the same examples other files

CLASSES = 2  # condemned, praised
IMDB = HubData(
    name="stanfordnlp/imdb",
    revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
    files="plain_text/{}-00000-of-00001.parquet",
    columns={"text": pa.string(), "label": pa.int64()},
    rows={"train": 25_000, "test": 25_000},
    classes=CLASSES,
)

BYTES = 257  # tokens: 0 is padding, b + 1 the byte b
UNKNOWN = 1  # where characters are tokens: one that is not in the vocabulary
RARE = 15  # characters seen less often in the training texts are not in it, as in S4's code
CODE_POINTS = 0x110000

Alphabet = Literal["bytes", "characters"]
Encode = Callable[[pa.StringArray], pa.ListArray]  # texts → their tokens, both cut


def byte_tokens(texts: pa.StringArray, longest: int) -> pa.ListArray:
    """The first `longest` bytes of each text, UTF-8, each plus 1. No text has the byte 255."""
    cut = pc.binary_slice(texts.cast(pa.binary()), 0, longest)
    return list_array(joined(cut) + 1, pc.binary_length(cut).to_numpy())


def character_tokens(texts: pa.StringArray, longest: int, token_of: Tokens) -> pa.ListArray:
    """The first `longest` characters of each text, each as `token_of` its code point."""
    cut = pc.utf8_slice_codeunits(texts, 0, longest)
    return list_array(token_of[code_points(cut)], pc.utf8_length(cut).to_numpy())


def vocabulary(texts: pa.ChunkedArray, longest: int) -> NDArray[np.int64]:
    """The code points that the texts, cut, have at least `RARE` times."""
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


def chunks(texts: pa.ChunkedArray) -> Iterator[pa.StringArray]:
    """The texts, `ROWS` at a time."""
    for start in range(0, len(texts), ROWS):
        yield texts.slice(start, ROWS).combine_chunks()


def write(path: Path, table: pa.Table, encode: Encode) -> None:
    """The texts of `table` as tokens, with their labels, in an Arrow file of `SCHEMA`."""
    labels = table["label"].to_numpy().astype(np.uint8)
    batches = len(range(0, len(labels), ROWS))
    with tracked(chunks(table["text"]), f"Text {path.stem}", batches) as stream, arrow_file(path, SCHEMA) as file:
        for batch, texts in enumerate(stream):
            some = pa.array(labels[batch * ROWS : (batch + 1) * ROWS])
            file.write_batch(pa.record_batch([encode(texts), some], schema=SCHEMA))


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Film reviews from the Hugging Face hub, or from the files in the folder `source`, in the cache `dir`.

    The test reviews are the official ones; the reviews for validation are taken from the official training reviews,
    at random, as many of each label. conf/task/lra_text.yaml explains the options.
    """

    dir: str
    seq_len: int
    source: str | None = None
    tokens: Alphabet = "bytes"
    seed: int = 0
    train: int = 22_500
    val: int = 2_500
    test: int = 25_000

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("seed", 0), ("train", 1), ("val", 1), ("test", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}")
        allowed = get_args(Alphabet)
        require(self.tokens in allowed, "tokens", self.tokens, f"must be one of {', '.join(allowed)}")

    @cached_property
    def spec(self) -> dict[str, object]:
        """Everything that determines the examples."""
        options = {name: getattr(self, name) for name in ("seq_len", "tokens", "seed", *Splits._fields)}
        return {"version": VERSION, **IMDB.identity(self.source), **options}

    def prepare(self) -> Path:
        """The folder of train.arrow, val.arrow and test.arrow, built if need be."""
        return cached(self.dir, "lra_text", self.spec, self.build)

    def build(self, folder: Path) -> None:
        """Write the three files into `folder`."""
        splits = self.reviews()
        encode: Encode = partial(byte_tokens, longest=self.seq_len)
        if self.tokens == "characters":
            known = vocabulary(splits["train"]["text"], self.seq_len)
            token_of = np.full(CODE_POINTS, UNKNOWN, np.uint8)
            token_of[known] = np.arange(UNKNOWN + 1, UNKNOWN + 1 + len(known))
            (folder / "vocabulary.json").write_text(json.dumps([chr(point) for point in known]))
            encode = partial(character_tokens, longest=self.seq_len, token_of=token_of)
        for split, table in splits.items():
            write(folder / f"{split}.arrow", table, encode)

    def reviews(self) -> dict[str, pa.Table]:
        """The texts and labels of every split."""
        tables = {split: IMDB.table(split, self.source) for split in IMDB.rows}
        for split, table in tables.items():
            row = pc.index(pc.equal(pc.binary_length(table["text"]), 0), True).as_py()
            require(row < 0, "source", self.source, f"{split} has an empty text in row {row}")
        train = divided(tables["train"], sizes={"val": self.val, "train": self.train}, seed=self.seed)
        return {**train, **divided(tables["test"], sizes={"test": self.test}, seed=self.seed)}

    def examples(self, split: str) -> TokenExamples:
        """The prepared train, val or test examples."""
        return TokenExamples(self.prepare() / f"{split}.arrow")


@final
class Text(Task):
    """Whether a review praises the film, from its tokens; cross-entropy, accuracy."""

    monitor = "accuracy"
    mode: Literal["min", "max"] = "max"

    def __init__(self, *, seq_len: int, causal: bool, vocab_size: int, pool: Pool, data: TextData) -> None:
        require(seq_len == data.seq_len, "seq_len", seq_len, f"must be the data's, {data.seq_len}")
        require(vocab_size >= BYTES, "vocab_size", vocab_size, f"must be at least {BYTES}")
        self.seq_len, self.causal, self.vocab_size, self.data = seq_len, causal, vocab_size, data
        self.pool: Pool = pool

    def prepare(self) -> None:
        """Fill the cache, unless it holds the data."""
        self.data.prepare()

    def datasets(self) -> Splits:
        """(L,) uint8 tokens and a label, from the cache."""
        return Splits(*map(self.data.examples, Splits._fields))

    def fingerprint(self) -> str:
        """SHA-256, cut, of the options and of what the reviews were read from."""
        return fingerprint(self.data.spec)

    def baselines(self) -> dict[str, float]:
        """Test accuracies of train's most frequent label, and of a linear classifier of how often each token occurs."""
        train, test = self.data.examples("train"), self.data.examples("test")
        majority = np.bincount(train.labels).argmax()
        x, unseen = standardized(shares(train), shares(test))
        guesses = unseen @ logistic_regression(x, train.labels) > 0
        return {
            "majority": float((test.labels == majority).mean()),
            f"bag of {self.data.tokens}": float((test.labels == guesses).mean()),
        }

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L) → (B, L, d_model)."""
        return TokenEncoder(d_model, vocab_size=self.vocab_size)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, 2)."""
        return PooledHead(d_model, d_output=CLASSES, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every sequence: (B, 2) and (B,)."""
        return prediction, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The share of right answers."""
        return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}


def shares(examples: TokenExamples) -> NDArray[np.float64]:
    """How often each token occurs in each sequence, as a share of its length, (n, V)."""
    return examples.tokens.counts(BYTES) / examples.lengths[:, None]


def standardized(x: NDArray[np.float64], *others: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """All with the columns shifted and scaled as `x` needs for mean 0 and deviation 1, and a column of ones added."""
    mean, deviation = x.mean(0), x.std(0)
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    return [np.column_stack([(one - mean) * scale, np.ones(len(one))]) for one in (x, *others)]


def logistic_regression(x: NDArray[np.float64], labels: Tokens) -> NDArray[np.float64]:
    """Weights of the most likely logistic model of labels 0 and 1, under a unit Gaussian prior; Newton's method."""
    weights = np.zeros(x.shape[1])
    for _ in range(10):
        p = expit(x @ weights)
        curvature = (x.T * (p * (1 - p))) @ x + np.eye(len(weights))
        weights -= np.linalg.solve(curvature, x.T @ (p - labels) + weights)
    return weights
