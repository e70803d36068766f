"""Data computed on demand: nothing is stored, and every sequence comes from random numbers of its own.

n sequences, L length, R random numbers per sequence, K choices per sequence
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.store.cache import fingerprint
from stu.errors import require
from stu.task import Data, Splits

VERSION = 1  # increment when the same options produce different sequences

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


def uniforms(seed: int, split: int, indices: Sequence[int], count: int) -> Reals:
    """Random numbers in [0, 1), (n, count): row i depends on (seed, split, indices[i]) alone.

    Philox encrypts a counter under a key, so that a stream can start anywhere at no cost. Here the key is the seed, and
    the words of the counter are (block, index, split, 0): no two rows have a block in common. Source: Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    philox = np.random.Philox(key=seed)
    random, state = np.random.Generator(philox), philox.state
    numbers = np.empty((len(indices), count))
    for row, index in zip(numbers, indices, strict=True):
        state["state"]["counter"] = np.array((0, index, split, 0), np.uint64)
        philox.state = state
        random.random(out=row)
    return numbers


def integers(uniform: Reals, count: int | Integers) -> Integers:
    """One of 0…count−1 for each number, all equally likely."""
    return (uniform * count).astype(np.int64)


def subsets(uniform: Reals, count: int) -> Integers:
    """K different ones of 0…count−1 per row (n, K): every set is equally likely, though not every order.

    Source: Robert Floyd's algorithm, in Bentley, "Programming pearls: a sample of brilliance" (CACM 30, 1987).
    """
    n, size = uniform.shape
    last = np.arange(count - size, count)  # (K,), what step i may choose for the first time
    choices = integers(uniform, last + 1)
    chosen, rows = np.zeros((n, count), bool), np.arange(n)
    for i in range(size):
        choices[:, i] = np.where(chosen[rows, choices[:, i]], last[i], choices[:, i])
        chosen[rows, choices[:, i]] = True
    return choices


def shuffled(rows: Integers, uniform: Reals) -> Integers:
    """Each row (n, K) in an order of its own, all equally likely."""
    return np.take_along_axis(rows, uniform.argsort(1), 1)


@dataclass(frozen=True, kw_only=True)
class OnDemandData(Data):
    """Sequences that depend on (seed, split, index) and the options alone.

    train, val and test are the sizes of the splits, which stay the same in every epoch.
    """

    seq_len: int
    train: int
    val: int
    test: int
    seed: int = 0

    def require_room(self, size: float) -> None:
        """Raise `OptionError` unless there is memory for a sequence of `size` bytes, and for the order of all."""
        self.require_memory(8 * self.train + 40 * max(self.val, self.test), *Splits._fields)
        others = [one.name for one in fields(self) if one.name not in ("seed", *Splits._fields)]
        self.require_memory(size, *(name for name in others if isinstance(getattr(self, name), int)))

    @abstractmethod
    def sequences(self, split: int, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (n, L, …) and targets (n, …) of some sequences of a split, given as its place in `Splits`."""

    def prepare(self) -> None:
        """There is nothing to build."""

    def examples(self, split: str) -> "Sequences":
        """The sequences of train, val or test."""
        return Sequences(self, Splits._fields.index(split), getattr(self, split))


@dataclass(frozen=True)
class Sequences:
    """One split of `OnDemandData`, as `stu.task.Examples`."""

    data: OnDemandData
    split: int
    size: int

    lengths = None  # all sequences are equally long

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int], /) -> list[tuple[Any, Any]]:
        """Many at once, which is how a `DataLoader` asks."""
        return list(zip(*self.stacked(indices), strict=True))

    def stacked(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of many sequences, (n, …) each."""
        for index in indices:
            if not 0 <= index < self.size:
                raise IndexError(f"{index} is not in 0…{self.size - 1}")
        return self.data.sequences(self.split, indices)


@dataclass(frozen=True, kw_only=True)
class SyntheticData(OnDemandData):
    """Sequences that a subclass generates from uniform random numbers, many at once."""

    train: int = 100_000
    val: int = 2_000
    test: int = 2_000

    def __post_init__(self) -> None:
        for split in Splits._fields:
            self.require_least(split, 1)
        require(0 <= self.seed < 2**128, "seed", self.seed, "must be at least 0 and below 2^128")
        self.require_room(8 * self.num_uniforms + 16 * self.seq_len)  # random numbers; inputs and targets

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """R, how many random numbers a sequence is generated from."""

    @abstractmethod
    def generate(self, uniform: Reals) -> tuple[np.ndarray, np.ndarray]:
        """(n, R) → inputs (n, L, …) and targets (n, …), each row from its own numbers."""

    def sequences(self, split: int, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (n, L, …) and targets (n, …)."""
        return self.generate(uniforms(self.seed, split, indices, self.num_uniforms))

    def fingerprint(self) -> str:
        """SHA-256 of the options and the version, shortened."""
        return fingerprint({"data": type(self).__name__, "version": VERSION, **asdict(self)})
