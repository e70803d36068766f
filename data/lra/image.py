"""Image: what does a small image show? Its pixels, row by row, are the sequence.

n images, S side, B batch, L length, C channels

Sources: Krizhevsky, "Learning multiple layers of features from tiny images" (2009), for CIFAR-10; Tay et al., "Long
Range Arena" (2011.04006), section 2.2, for grey pixels; the code of S4 (state-spaces/s4) and of the STU
(google-deepmind/spectral_ssm) for the normalisation of grey and coloured pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from data.store.arrow import write_arrays
from data.store.cache import tracked
from data.store.pixels import Bytes, PixelClassification, PixelExamples
from data.store.sources import HubData, divided
from data.store.stored import LabelledData
from stu.encoders import LinearEncoder, TokenEncoder
from stu.errors import OptionError, require
from stu.heads import Pool
from stu.preprocessing import Classes, Numbers, Preprocessing, Tokens
from stu.task import Batch, Splits

VERSION = 1  # increment when the same options produce different examples, or the same examples different files

SIDE = 32
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES = len(LABELS)
LEVELS = 256  # of a pixel
CIFAR10 = HubData(
    name="uoft-cs/cifar10",
    revision="0b2714987fa478483af9968de7c934580d0bb9a2",
    files="plain_text/{}-00000-of-00001.parquet",
    columns={"img.bytes": pa.binary(), "label": pa.int64()},
    rows={"train": 50_000, "test": 10_000},
    classes=CLASSES,
)

# Means and standard deviations of all training pixels in 0…1, by channel.
GREY = ((122.6 / 255,), (61.0 / 255,))
COLORED = ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784))


def decoded(content: bytes, mode: str) -> Bytes:
    """The pixels (S² C,) of an image file, "L" for grey (ITU-R 601-2 luma, rounded to 8 bits) or "RGB"."""
    with Image.open(BytesIO(content)) as image:
        if (image.size, image.mode) != ((SIDE, SIDE), "RGB"):
            raise ValueError(f"{image.size[0]} × {image.size[1]} pixels of mode {image.mode}")
        return np.asarray(image.convert(mode)).reshape(-1)


@final
@dataclass(frozen=True, kw_only=True)
class CIFARData(LabelledData[PixelExamples]):
    """CIFAR-10 from the Hugging Face hub, or from the files in the folder `source`.

    The test images are the official ones; the validation images are drawn at random from the official training images,
    equally many of each class. conf/task/lra_image.yaml explains the options.
    """

    name, seq_len, num_classes, reader = "cifar10", None, CLASSES, PixelExamples

    color: bool
    source: str | None = None
    seed: int = 0
    train: int = 45_000
    val: int = 5_000
    test: int = 10_000

    def __post_init__(self) -> None:
        self.require_at_least(seed=0, train=1, val=1, test=1)

    @cached_property
    def spec(self) -> dict[str, object]:
        """The options, and the revision or the contents of what the images are read from."""
        options = {name: getattr(self, name) for name in ("color", "seed", *Splits._fields)}
        return {"version": VERSION, **CIFAR10.identity(self.source), **options}

    def build(self, folder: Path) -> None:
        """Write train.arrow, val.arrow and test.arrow."""
        sizes = {"train": {"val": self.val, "train": self.train}, "test": {"test": self.test}}
        for official, table in CIFAR10.tables(self.source).items():
            for split, part in divided(table, sizes=sizes[official], seed=self.seed).items():
                labels = part["label"].to_numpy().astype(np.uint8)
                pixels = self.pixels(part["img.bytes"], split)
                write_arrays(folder / f"{split}.arrow", {"pixels": pixels, "label": labels})

    def pixels(self, files: pa.ChunkedArray, split: str) -> Bytes:
        """The pixels of many image files, (n, S² C)."""
        pixels = np.empty((len(files), SIDE**2 * (3 if self.color else 1)), np.uint8)
        with tracked(files, f"CIFAR-10 {split}", len(files)) as stream:
            for row, file in enumerate(stream):
                try:
                    pixels[row] = decoded(file.as_py(), "RGB" if self.color else "L")
                except Exception as error:  # Pillow raises many kinds
                    allowed = f"image {row} of {split} must be RGB, {SIDE} × {SIDE} pixels: {error}"
                    raise OptionError("source", self.source, allowed) from error
        return pixels


@final
class SequentialCIFAR(PixelClassification):
    """Which of ten kinds of objects does an image show? From its pixels; cross-entropy, accuracy."""

    data: CIFARData

    def __init__(self, *, seq_len: int, causal: bool, pool: Pool, tokens: bool, data: CIFARData) -> None:
        allowed = f"must be {SIDE**2}, or the square of what divides {SIDE}"
        super().__init__(seq_len=seq_len, causal=causal, pool=pool, data=data, side=SIDE, allowed=allowed)
        require(not (tokens and data.color), "tokens", tokens, "must be false where data.color=true")
        self.tokens = tokens
        means, stds = map(torch.tensor, COLORED if data.color else GREY)  # (C,)
        pixels = Tokens(LEVELS) if tokens else Numbers(tuple((255 * means).tolist()), tuple((255 * stds).tolist()))
        self.preprocessing = Preprocessing(pixels, Classes(LABELS))
        self.scale, self.shift = 1 / (255 * stds), -means / stds

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """(B, L, C) normalised pixels, or (B, L) grey levels 0…255; means of square blocks if `seq_len` is shorter."""
        pixels, targets = self.pixels(examples), torch.tensor([label for _, label in examples])
        if self.tokens:
            return Batch(pixels.squeeze(2).round().long(), targets, None)
        return Batch(pixels * self.scale + self.shift, targets, None)

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, C) or (B, L) → (B, L, d_model)."""
        if self.tokens:
            return TokenEncoder(d_model, vocab_size=LEVELS)
        return LinearEncoder(d_model, d_input=len(self.scale))
