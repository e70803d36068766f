"""Language modelling: at every step of a text, what comes next?

n tokens, B batch, L length, V vocabulary

    text      x_0 x_1 x_2 …       cut into disjoint windows of L targets
    inputs    0   x_0 … x_{L−2}   0 stands before each window, so that every token is predicted, and predicted once
    targets   x_0 x_1 … x_{L−1}

Windows are disjoint, the same in every epoch and read in another order: an epoch reads each byte once, and a run is
resumed at any step. What comes first in a window is predicted from nothing but the 0, which is how generation starts.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from data.language import baselines
from data.language.corpus import corpus
from data.language.files import Files, read, text_files
from data.store.arrow import read_arrays, write_arrays
from data.store.cache import say
from data.store.sources import sha256
from data.store.stored import StoredData
from stu.encoders import TokenEncoder
from stu.errors import OptionError, require
from stu.files import write_atomically
from stu.heads import StepHead
from stu.preprocessing import OTHER, PADDING, Preprocessing, Text
from stu.resources import require_memory
from stu.task import Batch, NextToken, Splits, Task, scored_steps

VERSION = 1  # increment when the same options produce different examples, or the same examples different files

BYTES = 256
VOCABULARY = "vocabulary.json"
COPIES = 8  # of a text in memory while it is built
SHOWN = 5  # names of files in a note

Units = Literal["bytes", "characters", "words"]
Sequences = bytes | str | list[str]  # a text in its units


@final
class Windows:
    """The windows of the tokens in an Arrow file, `first` being the token of a stored 0; pickled as these arguments.

    seq_len: L, of all but the last. count: how many are kept; None: all.
    """

    def __init__(self, path: Path, first: int, seq_len: int, count: int | None = None) -> None:
        self._arguments = (path, first, seq_len, count)
        stored = read_arrays(path)["tokens"]
        self.first, self.seq_len = first, seq_len
        self.stored = stored if count is None else stored[: count * seq_len]

    def __reduce__(self) -> tuple[type["Windows"], tuple[Any, ...]]:
        return type(self), self._arguments

    def __len__(self) -> int:
        return -(-len(self.stored) // self.seq_len)

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start = range(len(self))[index] * self.seq_len
        targets = self.tokens(slice(start, start + self.seq_len))
        return np.concatenate(([PADDING], targets[:-1])), targets

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """The last window may be shorter."""
        rest = len(self.stored) % self.seq_len
        return np.array([self.seq_len] * (len(self) - 1) + [rest]) if rest else None

    def tokens(self, part: slice | None = None) -> NDArray[np.int64]:
        """Those of a part of the text; None: of all of it."""
        return self.stored[part or slice(None)].astype(np.int64) + self.first


@final
@dataclass(frozen=True, kw_only=True)
class LanguageData(StoredData[Windows]):
    """A text in windows; conf/task/language.yaml explains the options."""

    name = "language"

    seq_len: int
    source: str | None = None
    units: Units = "bytes"
    vocab_size: int = 257
    train: int | None = None
    val: int | float = 0.05
    test: int | float = 0.05

    def __post_init__(self) -> None:
        require(self.units in get_args(Units), "units", self.units, f"must be one of {', '.join(get_args(Units))}")
        least = BYTES + 1 if self.units == "bytes" else OTHER + 2
        self.require_at_least(seq_len=1, vocab_size=least, **({} if self.train is None else {"train": 1}))
        for name in ("val", "test"):
            part = getattr(self, name)
            fits = part >= 1 if isinstance(part, int) else 0 < part < 1
            require(fits, name, part, "must be a share of the text, above 0 and below 1, or how many sequences")

    @cached_property
    def files(self) -> Files | None:
        """What the text is read from; None: the text of every Python installation."""
        return None if self.source is None else text_files(self.source)

    @cached_property
    def contents(self) -> dict[str, list[str]]:
        """The checksums of the texts, of each split or of all."""
        if self.files is None:
            return {"all": [hashlib.sha256(corpus()).hexdigest()]}
        return {split: [sha256(path) for path in paths] for split, paths in self.files.paths.items()}

    @cached_property
    def spec(self) -> dict[str, object]:
        """The contents of the files, and the options."""
        options = {name: getattr(self, name) for name in ("seq_len", "units", "vocab_size", *Splits._fields)}
        return {"version": VERSION, "sha256": self.contents, **options}

    def at_length(self, seq_len: int) -> "LanguageData":
        """The same parts of the same text in other windows, and so the same tokens."""
        counted = [name for name in Splits._fields if isinstance(getattr(self, name), int)]
        steps = {name: getattr(self, name) * self.seq_len for name in counted}
        parts: dict[str, Any] = {name: max(1, count // seq_len) for name, count in steps.items()}
        if "all" in self.contents and steps.keys() & {"val", "test"}:
            total = len(self.in_units("all", self.texts()["all"]))
            # shares that `size` rounds to as many units
            parts |= {name: (steps[name] + 0.5) / total for name in ("val", "test") if name in steps}
        return replace(self, seq_len=seq_len, **parts)

    def build(self, folder: Path) -> None:
        """Write train.arrow, val.arrow, test.arrow and the vocabulary."""
        splits = self.divided()
        known = [] if self.units == "bytes" else self.commonest(splits["train"])
        encoding = Text(self.units, tuple(known))
        for split, text in splits.items():
            write_arrays(folder / f"{split}.arrow", {"tokens": encoded(text, encoding)})
        write_atomically(folder / VOCABULARY, json.dumps(known))
        if self.files and "all" not in self.files.paths:
            named = {split: [path.name for path in paths] for split, paths in self.files.paths.items()}
            say(f"{self.source}: " + "; ".join(f"{split} is {_shown(names)}" for split, names in named.items()))
        if self.files and self.files.left_out:
            left_out = self.files.left_out
            say(f"{len(left_out)} files of {self.source} are no text, hidden, or of no split: {_shown(left_out)}")

    def divided(self) -> dict[str, Sequences]:
        """The text of every split, in units: as the files are called, or the end for test, before it val."""
        texts = {split: self.in_units(split, text) for split, text in self.texts().items()}
        if "all" not in texts:
            return texts
        text = texts["all"]
        test, val = (self.size(name, len(text)) for name in ("test", "val"))
        allowed = f"leaves nothing to train on: the text has {len(text):,} {self.units}, {test:,} are for test"
        require(val + test < len(text), "val", self.val, allowed)
        edges = (0, len(text) - val - test, len(text) - test, len(text))
        return {split: text[edges[i] : edges[i + 1]] for i, split in enumerate(Splits._fields)}

    def texts(self) -> dict[str, bytes]:
        """The contents of the files, one after the other; raises `OptionError` where they have changed just now."""
        if self.files is None:
            return {"all": corpus()}
        total = sum(path.stat().st_size for paths in self.files.paths.values() for path in paths)
        require_memory(COPIES * total, {"source": total}, why=" while the text is prepared")
        found = {}
        for split, paths in self.files.paths.items():
            parts = [read(path) for path in paths]
            same = [hashlib.sha256(part).hexdigest() for part in parts] == self.contents[split]
            require(same, "source", self.source, "was changed while it was read; give the command again")
            found[split] = b"".join(parts)
        return found

    def in_units(self, split: str, text: bytes) -> Sequences:
        """The text of a split, or all, as bytes, characters or words; raises `OptionError` where there are none."""
        found = text if self.units == "bytes" else self.decoded(text)
        whose = "" if split == "all" else f" for {split}"
        require(len(found) > 0, "source", self.source, f"has no {self.units}{whose}, must have some")
        return found

    def decoded(self, text: bytes) -> str | list[str]:
        """A text as characters or words."""
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            allowed = f"must be UTF-8 where units={self.units}: byte {error.start:,} is not; units=bytes takes any text"
            raise OptionError("source", self.source, allowed) from error
        return decoded if self.units == "characters" else decoded.split()

    def size(self, split: str, total: int) -> int:
        """How many units of `total` are for val or test."""
        part: int | float = getattr(self, split)
        return part * self.seq_len if isinstance(part, int) else max(1, int(part * total))

    def commonest(self, text: Sequences) -> list[str]:
        """The characters or words that have a token of their own, the most frequent first."""
        counts = Counter(map(str, text))
        return sorted(counts, key=lambda unit: (-counts[unit], unit))[: self.vocab_size - OTHER - 1]

    def opened(self, folder: Path, split: str) -> Windows:
        """The windows of a split; of files for val and test so many as there should be, or all."""
        part = getattr(self, split)
        windows = Windows(folder / f"{split}.arrow", self.first, self.seq_len, part if isinstance(part, int) else None)
        fits = not isinstance(part, int) or len(windows) == part
        require(fits, split, part, f"there are only {len(windows):,} sequences of {self.seq_len:,} {self.units}")
        return windows

    @property
    def first(self) -> int:
        """The token of a stored 0: bytes are stored as they are, others as tokens."""
        return 1 if self.units == "bytes" else 0

    @cached_property
    def encoding(self) -> Text:
        """Of texts as tokens; of other units than bytes, known once the data are prepared."""
        known = [] if self.units == "bytes" else json.loads((self.prepare() / VOCABULARY).read_bytes())
        return Text(self.units, tuple(known))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + " …" * (len(names) > SHOWN)


def encoded(text: Sequences, encoding: Text) -> NDArray[np.uint8] | NDArray[np.int32]:
    """What is stored of a text."""
    if isinstance(text, bytes):
        return np.frombuffer(text, np.uint8)
    return encoding.encode(text if isinstance(text, str) else " ".join(text)).astype(np.int32)


@final
class Bits(MeanMetric):
    """Cross-entropy in bits, the mean over all tokens."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")  # no check, which would make a GPU wait

    def update(self, prediction: Tensor, target: Tensor) -> None:  # type: ignore[override]  # of pairs, not of values
        """Add predictions (n, V) and targets (n,)."""
        super().update(nn.functional.cross_entropy(prediction, target, reduction="none") / math.log(2))


@final
class Language(Task):
    """The next byte, character or word at every step: cross-entropy, in bits, and accuracy."""

    monitor = "bits_per_byte"
    mode = "min"
    trivial = ("uniform", "unigram", "bigram")
    next_token = NextToken(start=PADDING)

    data: LanguageData

    def __init__(self, *, seq_len: int, causal: bool, data: LanguageData) -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data)
        require(causal, "causal", causal, "must be true: the target of a step is the next step's input")
        self.monitor = f"bits_per_{data.units.removesuffix('s')}"

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """Of texts, both ways."""
        return Preprocessing(self.data.encoding, self.data.encoding)

    def baselines(self) -> dict[str, float]:
        """Test scores of counts, which a model has to beat, and of compression programs, which know longer contexts."""
        train, test = self.data.examples("train"), self.data.examples("test")
        known, unseen, size = train.tokens(), test.tokens(), self.data.encoding.vocab_size
        counted = {
            "uniform": baselines.uniform(BYTES if self.data.units == "bytes" else size),
            "unigram": baselines.unigram(known, unseen, size),
            "bigram": baselines.bigram(known, unseen, size),
        }
        if self.data.units != "bytes":
            return counted
        return counted | baselines.compressed(train.stored.tobytes(), test.stored.tobytes())

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L) → (B, L, d_model)."""
        return TokenEncoder(d_model, vocab_size=self.data.vocab_size)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, L, V)."""
        return StepHead(d_model, d_output=self.data.vocab_size)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every real step: (n, V) and (n,)."""
        return scored_steps(prediction, batch), scored_steps(batch.targets, batch)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, in nats."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """Bits per token, and the share of tokens that are the most probable one."""
        accuracy = MulticlassAccuracy(self.data.vocab_size, average="micro", validate_args=False)
        return {self.monitor: Bits(), "accuracy": accuracy}
