"""Data that are built once and stored in the cache, and the classification of their examples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.store.cache import cached, fingerprint
from stu.task import Classification, Data, Examples, Splits

E_co = TypeVar("E_co", bound=Examples, covariant=True)


@dataclass(frozen=True, kw_only=True)
class StoredData(Data, Generic[E_co]):
    """Examples in the folder <dir>/<name>/<fingerprint> of the cache `dir`."""

    resumable: ClassVar[bool] = False  # whether an interrupted build continues where it was

    dir: str

    @property
    @abstractmethod
    def name(self) -> str:
        """What the data set is called in the cache."""

    @property
    @abstractmethod
    def spec(self) -> Mapping[str, object]:
        """Everything that determines the examples, as JSON values."""

    @abstractmethod
    def build(self, folder: Path) -> None:
        """Write the files into `folder`."""

    @abstractmethod
    def opened(self, folder: Path, split: str) -> E_co:
        """The memory-mapped examples of train, val or test that were built into `folder`."""

    def examples(self, split: str) -> E_co:
        """The memory-mapped examples of train, val or test, built first if necessary."""
        return self.opened(self.prepare(), split)

    def prepare(self) -> Path:
        """The folder of the data, built first if necessary, or again where files are damaged."""
        return cached(self.dir, self.name, self.spec, self.build, resumable=self.resumable, probe=self.probe)

    def probe(self, folder: Path) -> None:
        """Open all that is read of `folder`; raises where it cannot be."""
        for split in Splits._fields:
            self.opened(folder, split)

    def fingerprint(self) -> str:
        """SHA-256 of `spec`, shortened."""
        return fingerprint(self.spec)


@dataclass(frozen=True, kw_only=True)
class LabelledData(StoredData[E_co]):
    """Stored examples of `num_classes` classes, by default in one file per split, which `reader` reads."""

    num_classes: ClassVar[int]
    reader: ClassVar[type[Any]]

    def opened(self, folder: Path, split: str) -> E_co:
        """The examples in <split>.arrow."""
        return self.reader(folder / f"{split}.arrow")


class LabelledExamples(ABC):
    """Memory-mapped examples with one class each; pickled as the arguments of their constructor.

    labels: (n,) classes. lengths: (n,) of the sequences; None if all are equally long.
    """

    lengths: NDArray[np.int64] | None = None

    def __init__(self, labels: NDArray[np.uint8], *arguments: object) -> None:
        self.labels, self._arguments = labels, arguments

    def __reduce__(self) -> tuple[type["LabelledExamples"], tuple[object, ...]]:
        return type(self), self._arguments

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class StoredClassification(Classification):
    """Classification of stored examples, whose trivial baseline is the most frequent label."""

    data: LabelledData[LabelledExamples]

    def baselines(self) -> dict[str, float]:
        """Test accuracy of the most frequent label of the training split."""
        train, test = self.data.examples("train").labels, self.data.examples("test").labels
        return {"majority": float((test == np.bincount(train).argmax()).mean())}
