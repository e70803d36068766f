"""Images as sequences: pixels read row by row, at full resolution or as the means of square blocks.

n images, B batch, S side of an image, L length, C channels
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.store.arrow import read_arrays
from data.store.stored import LabelledData, LabelledExamples, StoredClassification
from stu.errors import require
from stu.heads import Pool

Bytes = NDArray[np.uint8]


@final
class PixelExamples(LabelledExamples):
    """The (pixels, label) pairs of a file with these two columns. pixels: (n, S² C)."""

    def __init__(self, path: Path) -> None:
        columns = read_arrays(path)
        super().__init__(columns["label"], path)
        self.pixels: Bytes = columns["pixels"]

    def __getitem__(self, index: int, /) -> tuple[Bytes, int]:
        return self.pixels[index], int(self.labels[index])


class PixelClassification(StoredClassification):
    """One label per image of S × S pixels, of which the model gets L = S², or the means of L square blocks.

    allowed: what an error says about `seq_len`.
    """

    image_shape: tuple[int, int]

    def __init__(
        self, *, seq_len: int, causal: bool, pool: Pool, data: LabelledData[Any], side: int, allowed: str
    ) -> None:
        rows = math.isqrt(max(seq_len, 1))
        require(seq_len == rows**2 and side % rows == 0, "seq_len", seq_len, allowed)
        super().__init__(seq_len=seq_len, causal=causal, data=data, num_classes=data.num_classes, pool=pool)
        self.side, self.image_shape = side, (rows, rows)

    def pixels(self, examples: Sequence[tuple[Any, Any]]) -> Tensor:
        """What the model gets of examples with (S² C,) uint8 pixels: (B, L, C), floats where blocks are averaged."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in examples])).unflatten(1, (self.side**2, -1))
        if self.seq_len == self.side**2:
            return pixels
        square = pixels.mT.unflatten(2, (self.side, self.side)).float()  # (B, C, S, S)
        return nn.functional.avg_pool2d(square, self.side // self.image_shape[0]).flatten(2).mT.contiguous()
