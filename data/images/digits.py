"""Digits: which digit does a small picture show? Its 64 pixels, one after another, are the sequence.

n pictures, S side, B batch, L length

Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits" (UCI repository, 1998), whose 1,797 test
pictures, of 13 writers, scikit-learn ships.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from data.store.arrow import write_arrays
from data.store.pixels import Bytes, PixelClassification, PixelExamples
from data.store.sources import divided
from data.store.stored import LabelledData
from stu.encoders import LinearEncoder
from stu.errors import OptionError
from stu.heads import Pool
from stu.preprocessing import Classes, Numbers, Preprocessing
from stu.task import Batch, Splits

VERSION = 1  # increment when the same options produce different examples, or the same examples different files

SIDE = 8
CLASSES = 10
MEAN, STD = 4.884, 6.017  # of all pixels, which are 0…16
ORDER = 0  # from which the order of permuted pixels is drawn; the same for all seeds


def published() -> tuple[Bytes, Bytes]:
    """The pixels (n, S²) and the labels (n,) of all pictures."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise OptionError("task", "digits", 'needs scikit-learn: pip install ".[digits]"') from error
    pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.uint8), labels.astype(np.uint8)


@final
@dataclass(frozen=True, kw_only=True)
class DigitsData(LabelledData[PixelExamples]):
    """The pictures that scikit-learn ships, divided at random, equally many of each digit in every split.

    conf/task/digits.yaml explains the options.
    """

    name, seq_len, num_classes, reader = "digits", None, CLASSES, PixelExamples

    seed: int = 0
    train: int = 1_000
    val: int = 297
    test: int = 500

    def __post_init__(self) -> None:
        self.require_at_least(seed=0, train=1, val=1, test=1)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the splits, in the order in which they are drawn: that of test depends on no other."""
        return {split: getattr(self, split) for split in reversed(Splits._fields)}

    @property
    def spec(self) -> dict[str, object]:
        """The options."""
        return {"version": VERSION, "seed": self.seed, **self.sizes}

    def build(self, folder: Path) -> None:
        """Write train.arrow, val.arrow and test.arrow."""
        pixels, labels = published()
        table = pa.table({"row": np.arange(len(labels)), "label": labels})
        for split, part in divided(table, sizes=self.sizes, seed=self.seed).items():
            rows = part["row"].to_numpy()
            write_arrays(folder / f"{split}.arrow", {"pixels": pixels[rows], "label": labels[rows]})


@final
class Digits(PixelClassification):
    """Which digit does a picture show? From its pixels, row by row or in a fixed random order; accuracy."""

    data: DigitsData

    def __init__(self, *, seq_len: int, causal: bool, pool: Pool, permuted: bool, data: DigitsData) -> None:
        allowed = f"must be {SIDE**2}, or the square of what divides {SIDE}"
        super().__init__(seq_len=seq_len, causal=causal, pool=pool, data=data, side=SIDE, allowed=allowed)
        order = np.random.default_rng(ORDER).permutation(seq_len) if permuted else np.arange(seq_len)
        self.order = torch.from_numpy(order)  # (L,), which pixel comes when
        if not permuted:
            self.preprocessing = Preprocessing(Numbers((MEAN,), (STD,)), Classes(tuple(range(CLASSES))))

    def baselines(self) -> dict[str, float]:
        """Test accuracies of the most frequent label, and of the nearest mean picture of a digit."""
        train, test = self.data.examples("train"), self.data.examples("test")
        shown = np.unique(train.labels)
        means = np.stack([train.pixels[train.labels == digit].mean(0) for digit in shown])  # (digits, S²)
        distances = np.square(test.pixels[:, None] - means).sum(2)  # (n, digits)
        nearest = float((shown[distances.argmin(1)] == test.labels).mean())
        return {**super().baselines(), "nearest mean": nearest}

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """(B, L, 1) normalised pixels; means of square blocks if `seq_len` is shorter."""
        inputs = (self.pixels(examples)[:, self.order] - MEAN) / STD
        return Batch(inputs, torch.tensor([label for _, label in examples]), None)

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, 1) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=1)
