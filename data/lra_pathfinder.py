"""Pathfinder and Path-X: an image, read row by row as a sequence of grey values, and a yes-or-no question about it.

n images, B batch, S side of an image

Sources: Tay et al., "Long Range Arena" (2011.04006), section 2.2, whose files are read too; `data.pathfinder_images`
for what is drawn.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from data.cache import cached, fingerprint, in_processes, tracked
from data.pathfinder_images import CHUNK, Geometry, Images, NoRoom, draw
from stu.encoders import LinearEncoder
from stu.errors import OptionError, require
from stu.heads import Pool, PooledHead
from stu.task import Batch, Splits, Task

VERSION = 1  # raise it when the same options come to mean other images, or the same images other files

CLASSES = 2
HELD_OUT = 10  # of the official images, one in ten is for validation, and one for the test

Bytes = NDArray[np.uint8]


class Record(NamedTuple):
    """One of the official images."""

    path: Path
    label: int
    size: int  # bytes of the file


def official_records(source: str) -> list[Record]:
    """The images that the metadata in the folder `source` list, in their order, but for empty files.

    A line holds the folder of an image, its name, a number, the label, and more; the files are plain text, whatever
    they are called, or, fresh from the generator, arrays of such columns.
    """
    folder = Path(source).expanduser()
    lists = sorted(folder.glob("metadata/*.npy"), key=lambda path: (len(path.name), path.name))
    require(bool(lists), "source", source, "must hold the official files: metadata/*.npy and imgs/*/*.png")
    records = [record_of(folder, path, line, columns) for path in lists for line, columns in rows_of(path)]
    records = [record for record in records if record.size]
    require(len(records) >= HELD_OUT, "source", source, f"must hold at least {HELD_OUT} images")
    return records


def rows_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number and the columns of every line of a file of metadata."""
    try:
        content = path.read_bytes()
        plain = not content.startswith(b"\x93NUMPY")
        lines = map(str.split, content.decode().splitlines()) if plain else np.load(path).astype(str).tolist()
    except (OSError, ValueError) as error:
        raise OptionError("source", str(path), f"cannot be read: {error}") from error
    return enumerate(lines, 1)


def record_of(folder: Path, path: Path, line: int, columns: list[str]) -> Record:
    """The image that one line of the file of metadata at `path` is about."""
    try:
        where, name, _, label, *_ = columns
        if label not in ("0", "1"):
            raise ValueError(f"label {label!r}, must be 0 or 1")
        image = folder / where / name
        return Record(image, int(label), image.stat().st_size)
    except (OSError, ValueError) as error:
        raise OptionError("source", str(path), f"line {line}: {error}") from error


def read_official(records: Sequence[Record], side: int) -> dict[str, np.ndarray]:
    """The columns of these images."""
    pixels = np.empty((len(records), side, side), np.uint8)
    for row, record in zip(pixels, records, strict=True):
        try:
            with Image.open(record.path) as image:
                if image.size != (side, side):
                    raise ValueError("its size is {} × {}".format(*image.size))
                row[:] = np.asarray(image.convert("L"))
        except Exception as error:  # Pillow raises many kinds
            allowed = f"must be an image of {side} × {side} pixels: {error}"
            raise OptionError("source", str(record.path), allowed) from error
    return {"pixels": pixels, "label": np.array([record.label for record in records], np.uint8)}


def columns_of(images: Images) -> dict[str, np.ndarray]:
    """What is stored of images that were drawn."""
    return {
        "pixels": images.pixels,
        "label": images.labels,
        "markers": images.markers,
        "distractors": images.distractors,
    }


def shard(folder: Path, chunk: int) -> Path:
    """The file of a chunk's images."""
    return folder / f"{chunk:05}.arrow"


def write(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """An Arrow file, whole or not at all, of arrays (n, ...) as lists of numbers."""
    arrays = []
    for column in columns.values():
        values = pa.array(column.reshape(-1))
        arrays.append(values if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, column[0].size))
    batch = pa.record_batch(arrays, names=list(columns))
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    partial.rename(path)


@final
class ImageExamples:
    """Images `start` … `stop` − 1 of the shards in `folder`, in memory-mapped form; pickled as these three.

    labels: (n,). markers: (n, 2, 2) positions of the discs; None for the official images, whose files say nothing.
    """

    lengths = None  # all sequences are equally long

    def __init__(self, folder: Path, start: int, stop: int) -> None:
        self.folder, self.start, self.stop = folder, start, stop
        first = start // CHUNK
        tables = [Dataset.from_file(str(shard(folder, chunk))).data for chunk in range(first, -(-stop // CHUNK))]
        self.skipped = start - first * CHUNK
        self.pixels: list[Bytes] = [rows(table, "pixels") for table in tables]  # (CHUNK, S²) each, but for the last

        def whole(name: str) -> np.ndarray:
            return np.concatenate([rows(table, name) for table in tables])[self.skipped :][: len(self)]

        self.labels: Bytes = whole("label")
        self.markers = whole("markers").reshape(-1, 2, 2) if "markers" in tables[0].column_names else None

    def __reduce__(self) -> tuple[type["ImageExamples"], tuple[Path, int, int]]:
        return ImageExamples, (self.folder, self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int, /) -> tuple[Bytes, int]:
        index = range(len(self))[index]
        number, row = divmod(self.skipped + index, CHUNK)
        return self.pixels[number][row].copy(), int(self.labels[index])


def rows(table: Any, name: str) -> np.ndarray:
    """A column of a shard: (n,) of numbers, (n, …) of lists; a view."""
    [array] = table.column(name).chunks
    return array.flatten().to_numpy().reshape(len(array), -1) if pa.types.is_nested(array.type) else array.to_numpy()


@dataclass(frozen=True, kw_only=True)
class PathfinderData:
    """Images drawn at random, or the official ones in the folder `source`, as Arrow files in the cache `dir`.

    The defaults are the official ones of Pathfinder; conf/task/lra_pathfinder.yaml explains the options.
    """

    dir: str
    source: str | None = None
    seed: int = 0
    train: int = 160_000
    val: int = 20_000
    test: int = 20_000
    workers: int | None = None
    side: int = 32
    border: int = 1
    seed_distance: int = 7
    marker_radius: float = 1.5
    contour_length: int = 14
    distractor_paddles: int = 20
    paddle_length: int = 2
    thickness: float = 0.5
    margins: Sequence[int] = (1,)
    continuity: float = 1.0
    target_contrast: float = 1.5
    distractor_contrast: float = 2.0

    def __post_init__(self) -> None:
        least = {"train": 1, "val": 1, "test": 1, "seed": 0, "border": 1, "seed_distance": 1, "paddle_length": 1}
        for name, bound in {**least, "contour_length": 3, "distractor_paddles": 0}.items():
            require(getattr(self, name) >= bound, name, getattr(self, name), f"must be at least {bound}")
        for name in ("marker_radius", "continuity", "target_contrast", "distractor_contrast"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "must be above 0")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "must be at least 1, or null")
        least_side = 2 * max(self.border, 2 * self.seed_distance)
        require(
            self.side > least_side, "side", self.side, f"must be above {least_side} for this border and seed_distance"
        )
        require(0.25 < self.thickness <= self.side, "thickness", self.thickness, "must be above 0.25 and at most side")
        margins = list(self.margins)
        distinct = bool(margins) and min(margins) >= 1 and len(set(margins)) == len(margins)
        require(distinct, "margins", margins, "must be different numbers, at least 1")

    @property
    def geometry(self) -> Geometry:
        """What is drawn."""
        options = {field.name: getattr(self, field.name) for field in fields(Geometry)}
        return Geometry(**{**options, "margins": tuple(self.margins)})

    @cached_property
    def records(self) -> list[Record]:
        """The official images."""
        return [] if self.source is None else official_records(self.source)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many images are for training, validation and test."""
        if self.source is None:
            return self.train, self.val, self.test
        held_out = len(self.records) // HELD_OUT
        return len(self.records) - 2 * held_out, held_out, held_out

    @cached_property
    def spec(self) -> dict[str, object]:
        """Everything that determines the examples; of the official images their names, labels and sizes."""
        if self.source is None:
            geometry = {**vars(self.geometry), "margins": list(self.margins)}
            sizes = dict(zip(Splits._fields, self.sizes, strict=True))
            return {"version": VERSION, "seed": self.seed, **sizes, **geometry}
        folder = Path(self.source).expanduser()
        lines = [f"{path.relative_to(folder)} {label} {size}\n" for path, label, size in self.records]
        return {"version": VERSION, "side": self.side, "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}

    def prepare(self) -> Path:
        """The folder of 00000.arrow, 00001.arrow, … with `CHUNK` images each, drawn or read if need be."""
        return cached(self.dir, "lra_pathfinder", self.spec, self.build, resumable=True)

    def build(self, folder: Path) -> None:
        """Write the files that are not in `folder` yet."""
        missing = [chunk for chunk in range(-(-sum(self.sizes) // CHUNK)) if not shard(folder, chunk).exists()]
        with tracked(self.chunks(missing), f"Pathfinder, files of {CHUNK:,} images", len(missing)) as stream:
            for chunk, columns in zip(missing, stream, strict=True):
                write(shard(folder, chunk), columns)

    def chunks(self, numbers: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """The columns of some chunks; only the last of all is smaller than `CHUNK`."""
        if self.source is not None:
            for chunk in numbers:
                yield read_official(self.records[chunk * CHUNK :][:CHUNK], self.side)
            return
        jobs = [(self.geometry, self.seed, chunk, min(CHUNK, sum(self.sizes) - chunk * CHUNK)) for chunk in numbers]
        try:
            yield from map(columns_of, in_processes(draw, jobs, self.workers))
        except NoRoom as error:
            raise OptionError("side", self.side, f"leaves no room for such contours: {error}") from error

    def examples(self, split: str) -> ImageExamples:
        """The prepared train, val or test examples, which follow each other in this order."""
        index = Splits._fields.index(split)
        start = sum(self.sizes[:index])
        return ImageExamples(self.prepare(), start, start + self.sizes[index])


@final
class Pathfinder(Task):
    """Do both markers of an image lie on one contour? Cross-entropy, accuracy."""

    monitor = "accuracy"
    mode: Literal["min", "max"] = "max"

    def __init__(self, *, seq_len: int, causal: bool, pool: Pool, centered: bool, data: PathfinderData) -> None:
        side = math.isqrt(max(seq_len, 1))
        fits = seq_len == side**2 and data.side % side == 0
        allowed = f"must be data.side² = {data.side**2}, or the square of what divides data.side"
        require(fits, "seq_len", seq_len, allowed)
        self.seq_len, self.causal, self.centered, self.data = seq_len, causal, centered, data
        self.pool: Pool = pool
        self.image_shape = side, side  # rows and columns of what a model gets

    def prepare(self) -> None:
        """Fill the cache, unless it holds the data."""
        self.data.prepare()

    def datasets(self) -> Splits:
        """(S²,) uint8 grey values and a label, from the cache."""
        return Splits(*map(self.data.examples, Splits._fields))

    def fingerprint(self) -> str:
        """SHA-256, cut, of the generator's options or of what lists the official images."""
        return fingerprint(self.data.spec)

    def baselines(self) -> dict[str, float]:
        """Test accuracies of train's most frequent label, and of the best threshold on the distance of the markers."""
        train, test = self.data.examples("train"), self.data.examples("test")
        majority = np.bincount(train.labels, minlength=CLASSES).argmax()
        found = {"majority": float((test.labels == majority).mean())}
        if train.markers is not None and test.markers is not None:
            above, threshold = best_threshold(distances(train.markers), train.labels)
            guess = np.where(distances(test.markers) > threshold, above, 1 - above)
            found["marker distance"] = float((guess == test.labels).mean())
        return found

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """(B, L, 1) grey values, 0…1 or, centered, −1…1; a shorter `seq_len` gets the means of square blocks."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in examples])).float()  # (B, S²)
        if self.seq_len < pixels.shape[1]:
            square = pixels.unflatten(1, (1, self.data.side, self.data.side))
            pixels = nn.functional.avg_pool2d(square, self.data.side // math.isqrt(self.seq_len)).flatten(1)
        inputs = pixels.div_(127.5).sub_(1) if self.centered else pixels.div_(255)
        return Batch(inputs.unsqueeze(-1), torch.tensor([label for _, label in examples]), None)

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, 1) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=1)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, 2)."""
        return PooledHead(d_model, d_output=CLASSES, pool=self.pool)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every image: (B, 2) and (B,)."""
        return prediction, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The share of right answers."""
        return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}


def distances(markers: np.ndarray) -> NDArray[np.float64]:
    """(n, 2, 2) → (n,), from the one marker to the other."""
    return np.hypot(*(markers[:, 1] - markers[:, 0]).T.astype(np.float64))


def best_threshold(values: NDArray[np.float64], labels: Bytes) -> tuple[int, float]:
    """The label and the value such that saying this label above it, and the other elsewhere, is right most often."""
    levels, index = np.unique(values, return_inverse=True)
    table = np.zeros((len(levels), CLASSES), np.int64)
    np.add.at(table, (index, labels), 1)
    below = table.cumsum(0)
    above = below[-1] - below
    right = below[:, ::-1] + above  # (levels, label said above): the other label below, this one above
    level, label = np.unravel_index(right.argmax(), right.shape)
    return int(label), float(levels[level])
