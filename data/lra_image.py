"""Image: what does a small picture show? Its pixels, row by row, are the sequence.

n pictures, S side, B batch, L length, C channels

Sources: Krizhevsky, "Learning multiple layers of features from tiny images" (2009), for CIFAR-10; Tay et al., "Long
Range Arena" (2011.04006), section 2.2, for grey pixels; the codes of S4 (state-spaces/s4) and of the STU
(google-deepmind/spectral_ssm) for how grey and coloured ones are normalised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from data.cache import cached, fingerprint, tracked
from data.sources import HubData, divided
from data.tokens import arrow_file
from stu.encoders import LinearEncoder, TokenEncoder
from stu.errors import OptionError, require
from stu.heads import Pool, PooledHead
from stu.task import Batch, Splits, Task

VERSION = 1  # raise it when the same options come to mean other examples, or the same examples other files

SIDE = 32
CLASSES = 10
LEVELS = 256  # of a pixel
CIFAR10 = HubData(
    name="uoft-cs/cifar10",
    revision="0b2714987fa478483af9968de7c934580d0bb9a2",
    files="plain_text/{}-00000-of-00001.parquet",
    columns={"img.bytes": pa.binary(), "label": pa.int64()},
    rows={"train": 50_000, "test": 10_000},
    classes=CLASSES,
)

# Means and deviations of all training pixels in 0…1, by channel.
GREY = ((122.6 / 255,), (61.0 / 255,))
COLORED = ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784))

Bytes = NDArray[np.uint8]


def decoded(content: bytes, mode: str) -> Bytes:
    """The pixels (S² C,) of a picture file, "L" for grey (ITU-R 601-2 luma, rounded to 8 bits) or "RGB"."""
    with Image.open(BytesIO(content)) as picture:
        if (picture.size, picture.mode) != ((SIDE, SIDE), "RGB"):
            raise ValueError(f"{picture.size[0]} × {picture.size[1]} pixels of mode {picture.mode}")
        return np.asarray(picture.convert(mode)).reshape(-1)


def write(path: Path, pixels: Bytes, labels: Bytes) -> None:
    """An Arrow file of one record batch with the columns pixels (n, S² C) and label (n,)."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels.shape[1])
    batch = pa.record_batch([column, pa.array(labels)], names=["pixels", "label"])
    with arrow_file(path, batch.schema) as file:
        file.write_batch(batch)


@final
class PixelExamples:
    """The (pixels, label) pairs of such a file in memory-mapped form; pickled as its path.

    pixels: (n, S² C). labels: (n,).
    """

    lengths = None  # all sequences are equally long

    def __init__(self, path: Path) -> None:
        self.path = path
        table = Dataset.from_file(str(path)).data
        self.labels: Bytes = table.column("label").to_numpy()
        [pixels] = table.column("pixels").chunks
        self.pixels: Bytes = pixels.values.to_numpy().reshape(len(self), -1)

    def __reduce__(self) -> tuple[type["PixelExamples"], tuple[Path]]:
        return PixelExamples, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Bytes, int]:
        return self.pixels[index], int(self.labels[index])


@dataclass(frozen=True, kw_only=True)
class CIFARData:
    """CIFAR-10 from the Hugging Face hub, or from the files in the folder `source`, in the cache `dir`.

    The test pictures are the official ones; those for validation are taken from the official training pictures, at
    random, as many of each class. conf/task/lra_image.yaml explains the options.
    """

    dir: str
    source: str | None = None
    color: bool = False
    seed: int = 0
    train: int = 45_000
    val: int = 5_000
    test: int = 10_000

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("train", 1), ("val", 1), ("test", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}")

    @cached_property
    def spec(self) -> dict[str, object]:
        """Everything that determines the examples."""
        options = {name: getattr(self, name) for name in ("color", "seed", *Splits._fields)}
        return {"version": VERSION, **CIFAR10.identity(self.source), **options}

    def prepare(self) -> Path:
        """The folder of train.arrow, val.arrow and test.arrow, built if need be."""
        return cached(self.dir, "cifar10", self.spec, self.build)

    def build(self, folder: Path) -> None:
        """Write the three files into `folder`."""
        sizes = {"train": {"val": self.val, "train": self.train}, "test": {"test": self.test}}
        for official, parts in sizes.items():
            table = CIFAR10.table(official, self.source)
            for split, part in divided(table, sizes=parts, seed=self.seed).items():
                labels = part["label"].to_numpy().astype(np.uint8)
                write(folder / f"{split}.arrow", self.pixels(part["img.bytes"], split), labels)

    def pixels(self, files: pa.ChunkedArray, split: str) -> Bytes:
        """The pixels of many picture files, (n, S² C)."""
        pixels = np.empty((len(files), SIDE**2 * (3 if self.color else 1)), np.uint8)
        with tracked(files, f"CIFAR-10 {split}", len(files)) as stream:
            for row, file in enumerate(stream):
                try:
                    pixels[row] = decoded(file.as_py(), "RGB" if self.color else "L")
                except Exception as error:  # Pillow raises many kinds
                    allowed = f"picture {row} of {split} is no RGB picture of {SIDE} × {SIDE} pixels: {error}"
                    raise OptionError("source", self.source, allowed) from error
        return pixels

    def examples(self, split: str) -> PixelExamples:
        """The prepared train, val or test examples."""
        return PixelExamples(self.prepare() / f"{split}.arrow")


@final
class SequentialCIFAR(Task):
    """One of ten kinds of things, from the pixels of its picture; cross-entropy, accuracy."""

    monitor = "accuracy"
    mode: Literal["min", "max"] = "max"

    def __init__(self, *, seq_len: int, causal: bool, pool: Pool, tokens: bool, data: CIFARData) -> None:
        side = math.isqrt(max(seq_len, 1))
        fits = seq_len == side**2 and SIDE % side == 0
        require(fits, "seq_len", seq_len, f"must be {SIDE**2}, or the square of what divides {SIDE}")
        require(not (tokens and data.color), "tokens", tokens, "must be false where data.color=true")
        self.seq_len, self.causal, self.tokens, self.data = seq_len, causal, tokens, data
        self.pool: Pool = pool
        self.image_shape = side, side  # rows and columns of what a model gets
        means, deviations = map(torch.tensor, COLORED if data.color else GREY)  # (C,)
        self.scale, self.shift = 1 / (255 * deviations), -means / deviations

    def prepare(self) -> None:
        """Fill the cache, unless it holds the data."""
        self.data.prepare()

    def datasets(self) -> Splits:
        """(S² C,) uint8 pixels and a label, from the cache."""
        return Splits(*map(self.data.examples, Splits._fields))

    def fingerprint(self) -> str:
        """SHA-256, cut, of the options and of what the pictures were read from."""
        return fingerprint(self.data.spec)

    def baselines(self) -> dict[str, float]:
        """Test accuracy of train's most frequent label."""
        train, test = self.data.examples("train"), self.data.examples("test")
        return {"majority": float((test.labels == np.bincount(train.labels).argmax()).mean())}

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """(B, L, C) normalised pixels, or (B, L) grey values 0…255; a shorter `seq_len` has means of square blocks."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in examples])).unflatten(1, (SIDE**2, -1))
        targets = torch.tensor([label for _, label in examples])
        if self.seq_len < SIDE**2:
            square = pixels.mT.unflatten(2, (SIDE, SIDE)).float()  # (B, C, S, S)
            pixels = nn.functional.avg_pool2d(square, SIDE // math.isqrt(self.seq_len)).flatten(2).mT
        if self.tokens:
            return Batch(pixels.squeeze(2).round().long(), targets, None)
        return Batch(pixels * self.scale + self.shift, targets, None)

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, C) or (B, L) → (B, L, d_model)."""
        if self.tokens:
            return TokenEncoder(d_model, vocab_size=LEVELS)
        return LinearEncoder(d_model, d_input=len(self.scale))

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, 10)."""
        return PooledHead(d_model, d_output=CLASSES, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every picture: (B, 10) and (B,)."""
        return prediction, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The share of right answers."""
        return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
