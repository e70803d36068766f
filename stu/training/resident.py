"""Examples that live on the training device, where their batches are made, too.

n examples, B batch, R sequences of an example (two of a pair), L length
"""

from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from stu.errors import require
from stu.ops.transfer import sent
from stu.task import Batch, Examples, Task

AT_ONCE = 512  # examples collated together
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


@final
class Resident:
    """A split on a device; `__getitems__`, which is what a `DataLoader` calls, makes batches there.

    They equal those of the task's `collate` to the last bit, padding and mask included, and making them never waits for
    the device. Stored are sequences padded to the longest, integers in the smallest dtype that holds them.

    share: of the device's free memory, that a split may take. Raises `OptionError` where it takes more, and where
    `collate` does more than put examples side by side and pad them on the right.
    """

    def __init__(self, task: Task, examples: Examples, device: torch.device, *, share: float) -> None:
        self.device, self.size = device, len(examples)
        first = task.collate(_some(examples, range(min(self.size, AT_ONCE))))
        longest = first.inputs.shape[1] if examples.lengths is None else int(examples.lengths.max())
        self.inputs, self.targets = (_Column(x, self.size, longest, first) for x in (first.inputs, first.targets))
        needed, free = self.inputs.nbytes + self.targets.nbytes, share * free_memory(device)
        _require(needed <= free, f"{self.size:,} examples take {needed / 2**30:.2f} GiB, more than {free / 2**30:.2f}")
        self.lengths = np.empty((self.inputs.rows, self.size), np.int64)
        for start in range(0, self.size, AT_ONCE):
            place = slice(start, min(start + AT_ONCE, self.size))
            batch = task.collate(_some(examples, range(place.start, place.stop)))
            self.inputs.write(place, batch.inputs, device)
            self.targets.write(place, batch.targets, device)
            self.lengths[:, place] = _lengths(batch).view(self.inputs.rows, -1)
        self.lengths_there = torch.from_numpy(self.lengths).to(device)
        shortest = 0 if examples.lengths is None else int(examples.lengths.argmin())
        for some in ([shortest], [self.size - 1, shortest, 0]):
            same = _equal(self.__getitems__(some), task.collate(_some(examples, some)))
            _require(same, "a batch of this task is more than its examples side by side")

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: Sequence[int], /) -> Batch:
        """The batch of these examples."""
        chosen = np.asarray(indices)
        lengths = self.lengths[:, chosen]  # (R, B)
        longest = int(lengths.max())
        place = sent(torch.from_numpy(chosen), self.device)
        inputs, targets = (column.read(place, longest) for column in (self.inputs, self.targets))
        if lengths.min() == longest:
            return Batch(inputs, targets, None)
        real = self.lengths_there.index_select(1, place).view(-1, 1)  # (R·B, 1)
        mask = torch.arange(longest, device=self.device) < real
        return Batch(inputs, targets, mask, int(lengths.sum()))


class _Column:
    """Inputs or targets of all examples, `data`: (R, n, longest, …), or (1, n, …) where there is no step.

    like: some rows of them as in a `Batch`. dtype: what they are in a batch.
    """

    def __init__(self, like: Tensor, size: int, longest: int, batch: Batch) -> None:
        self.rows, self.dtype = len(like) // len(batch.targets), like.dtype
        self.every_step = like.shape[1:2] == batch.inputs.shape[1:2]
        self.shape = (self.rows, size, *((longest, *like.shape[2:]) if self.every_step else like.shape[1:]))
        self.data = torch.empty(0, dtype=_smallest(like))

    @property
    def nbytes(self) -> int:
        """What it takes, as far as known."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.data.itemsize

    def write(self, place: slice, rows: Tensor, device: torch.device) -> None:
        """Store the examples `place`."""
        if not self.data.numel():
            self.data = torch.zeros(self.shape, dtype=self.data.dtype, device=device)
        part = rows.unflatten(0, (self.rows, -1))
        dtype = torch.promote_types(self.data.dtype, _smallest(rows))
        if dtype != self.data.dtype:  # larger numbers than before
            needed = self.data.numel() * dtype.itemsize
            _require(needed <= free_memory(device), f"examples take {needed / 2**30:.2f} GiB, more than is free")
            self.data = self.data.to(dtype)
        there = self.data[:, place, : rows.shape[1]] if self.every_step else self.data[:, place]
        _require(there.shape == part.shape, f"examples of shapes {tuple(there.shape)} and {tuple(part.shape)}")
        there.copy_(part.to(dtype))

    def read(self, place: Tensor, longest: int) -> Tensor:
        """Those at `place` (B,), cut to `longest` steps: (R·B, …)."""
        data = self.data[:, :, :longest] if self.every_step else self.data
        return data.index_select(1, place).flatten(0, 1).to(self.dtype)


def free_memory(device: torch.device) -> float:
    """Bytes; infinite where they are not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _require(condition: bool, why: str) -> None:
    require(condition, "device_resident", True, f"must be false: {why}")


def _some(examples: Examples, indices: Iterable[int]) -> list[tuple[Any, Any]]:
    many = getattr(examples, "__getitems__", None)
    return many(list(indices)) if many else [examples[index] for index in indices]


def _lengths(batch: Batch) -> Tensor:
    """(R·B,)."""
    if batch.mask is not None:
        return batch.mask.sum(1)
    return torch.full((len(batch.inputs),), batch.inputs.shape[1])


def _smallest(x: Tensor) -> torch.dtype:
    """The smallest integer dtype that holds the integers x; that of x for others."""
    if x.dtype != torch.int64:
        return x.dtype
    low, high = (int(end) for end in x.aminmax())
    return next(t for t in INTEGERS if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)


def _equal(found: Batch, expected: Batch) -> bool:
    there, here = ([x for x in batch if isinstance(x, Tensor)] for batch in (found, expected))
    return len(there) == len(here) and all(
        x.dtype == y.dtype and torch.equal(x.cpu(), y) for x, y in zip(there, here, strict=True)
    )
