"""Pathfinder and Path-X: an image, read row by row as a sequence of grey values, and a yes-or-no question about it.

n images, B batch, S side of an image

Sources: Tay et al., "Long Range Arena" (2011.04006), section 2.2, whose files are read too;
`data.lra.pathfinder_images` for what is drawn.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from data.lra.pathfinder_images import CHUNK, Bytes, Geometry, Images, NoRoom, draw, drawing_bytes
from data.store.arrow import read_arrays, write_arrays
from data.store.cache import in_processes, seal, tracked
from data.store.pixels import PixelClassification
from data.store.sources import files, folder_of
from data.store.stored import LabelledData, LabelledExamples
from stu.encoders import LinearEncoder
from stu.errors import OptionError, require
from stu.heads import Pool
from stu.preprocessing import Classes, Numbers, Preprocessing
from stu.resources import require_disk
from stu.task import Batch, Splits

VERSION = 1  # increment when the same options produce different images, or the same images different files

CLASSES = 2
OFFICIAL = "metadata/*.npy and imgs/*/*.png"
MAGIC = b"\x93NUMPY"  # how arrays start
LEVELS = 255  # of grey above black
HELD_OUT = 10  # one official image in ten is for validation, and one in ten for testing


class Record(NamedTuple):
    """One of the official images. size: bytes of the file."""

    path: Path
    label: int
    size: int


def official_records(source: str) -> list[Record]:
    """The images listed by the metadata in the folder `source`, in order, without empty files.

    A line has the folder of an image, its name, a number, the label, and more. The files are plain text whatever they
    are called or, straight from the generator, arrays of such columns. No image may be listed twice, or lie elsewhere.
    """
    folder = folder_of(source, OFFICIAL)
    lists = sorted(files(folder, "metadata/*.npy"), key=lambda path: (len(path.name), path.name))
    require(bool(lists), "source", source, f"must hold the official files: {OFFICIAL}")
    listed: dict[Path, str] = {}  # image → where
    records = [record for path in lists for record in read_metadata(folder, path, listed) if record.size]
    require(len(records) >= HELD_OUT, "source", source, f"must hold at least {HELD_OUT} images")
    return records


def read_metadata(folder: Path, path: Path, listed: dict[Path, str]) -> Iterator[Record]:
    """The images in `folder` that the lines of the metadata file at `path` describe; adds them to those `listed`."""
    try:
        lines = metadata_lines(path)
    except Exception as error:  # NumPy raises many kinds
        raise OptionError("source", str(path), f"cannot be read: {error}") from error
    for line, columns in enumerate(lines, 1):
        try:
            if len(columns) < 4:
                raise ValueError(f"{len(columns)} columns, must be at least 4")
            where, name, _, label, *_ = columns
            if label not in ("0", "1"):
                raise ValueError(f"label {label!r}, must be 0 or 1")
            inside = Path(where, name)
            if inside.is_absolute() or ".." in inside.parts:
                raise ValueError(f"{inside} must be the path of an image from {folder}")
            if inside in listed:
                raise ValueError(f"{inside} is listed twice, first in {listed[inside]}")
            listed[inside] = f"{path.name}, line {line}"
            yield Record(folder / inside, int(label), (folder / inside).stat().st_size)
        except (OSError, ValueError) as error:
            raise OptionError("source", str(path), f"line {line}: {error}") from error


def metadata_lines(path: Path) -> list[list[str]]:
    """The columns of every line of a metadata file, plain text or an array."""
    with path.open("rb") as file:
        is_array = file.read(len(MAGIC)) == MAGIC
    if not is_array:
        return [line.split() for line in path.read_text("utf-8").splitlines()]
    array = np.load(path)
    if array.ndim != 2 or array.dtype.kind not in "US":
        raise ValueError(f"an array of {array.ndim} dimensions and type {array.dtype}, must be one of rows of texts")
    return array.astype(str).tolist()


def read_official(records: Sequence[Record], side: int) -> dict[str, np.ndarray]:
    """The columns that are stored for official images."""
    pixels = np.empty((len(records), side, side), np.uint8)
    for row, record in zip(pixels, records, strict=True):
        try:
            with Image.open(record.path) as image:
                if image.size != (side, side):
                    raise ValueError("its size is {} × {}".format(*image.size))
                if image.mode[0] in "IF":  # of which 8 bits would keep the dark half only
                    raise ValueError(f"its mode is {image.mode}, more than 8 bits per pixel")
                row[:] = np.asarray(image.convert("L"))
        except Exception as error:  # Pillow raises many kinds
            allowed = f"must be an image of {side} × {side} pixels: {error}"
            raise OptionError("source", str(record.path), allowed) from error
    return {"pixels": pixels, "label": np.array([record.label for record in records], np.uint8)}


def columns_of(images: Images) -> dict[str, np.ndarray]:
    """The columns that are stored for drawn images."""
    return dict(zip(("pixels", "label", "markers", "distractors"), images, strict=True))


def shard(folder: Path, chunk: int) -> Path:
    """The file of a chunk's images."""
    return folder / f"{chunk:05}.arrow"


@final
class ImageExamples(LabelledExamples):
    """Images `start` … `stop` − 1 of the shards in `folder`.

    markers: (n, 2, 2) positions of the discs; None for the official images, whose files do not say.
    """

    def __init__(self, folder: Path, start: int, stop: int) -> None:
        first = start // CHUNK
        shards = [read_arrays(shard(folder, chunk)) for chunk in range(first, -(-stop // CHUNK))]
        self.skipped = start - first * CHUNK
        self.pixels: list[Bytes] = [columns["pixels"] for columns in shards]  # (CHUNK, S²) each, except the last

        def whole(name: str) -> np.ndarray:
            return np.concatenate([columns[name] for columns in shards])[self.skipped :][: stop - start]

        super().__init__(whole("label"), folder, start, stop)
        self.markers = whole("markers").reshape(-1, 2, 2) if "markers" in shards[0] else None

    def __getitem__(self, index: int, /) -> tuple[Bytes, int]:
        index = range(len(self))[index]
        number, row = divmod(self.skipped + index, CHUNK)
        return self.pixels[number][row].copy(), int(self.labels[index])


@final
@dataclass(frozen=True, kw_only=True)
class PathfinderData(Geometry, LabelledData[ImageExamples]):
    """Images drawn at random as `Geometry` says, or the official ones in the folder `source`, `CHUNK` images per file.

    conf/task/lra_pathfinder.yaml explains the options.
    """

    name, seq_len, num_classes, resumable = "lra_pathfinder", None, CLASSES, True

    source: str | None = None
    seed: int = 0
    train: int = 160_000
    val: int = 20_000
    test: int = 20_000
    workers: int | None = None

    def __post_init__(self) -> None:
        self.require_at_least(train=1, val=1, test=1, seed=0, border=1, seed_distance=1, paddle_length=1)
        self.require_at_least(contour_length=3, distractor_paddles=0)
        require(0 < self.continuity < math.inf, "continuity", self.continuity, "must be above 0")
        for name in ("target_contrast", "distractor_contrast", "second_contrast"):
            contrast = getattr(self, name)
            seen = contrast is None or 1 / LEVELS < contrast < LEVELS
            require(seen, name, contrast, f"must be above 1/{LEVELS} and below {LEVELS}: markers have 1")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "must be at least 1, or null")
        frame = 2 * max(self.border, 2 * self.seed_distance)
        require(self.side > frame, "side", self.side, f"must be above {frame} for this border and seed_distance")
        fits = 0 < 2 * self.marker_radius <= self.side
        require(fits, "marker_radius", self.marker_radius, f"must be above 0 and at most half of side={self.side}")
        cells = self.side**2
        for name in ("contour_length", "distractor_paddles"):
            require(getattr(self, name) <= cells, name, getattr(self, name), f"must be at most side² = {cells}")
        require(0.25 < self.thickness <= self.side, "thickness", self.thickness, "must be above 0.25 and at most side")
        margins = list(self.margins)
        distinct = bool(margins) and min(margins) >= 1 and len(set(margins)) == len(margins)
        require(distinct, "margins", margins, "must be different numbers, at least 1")
        longest = self.longest_swing
        require(
            self.paddle_length < longest, "paddle_length", self.paddle_length, f"must be below {longest}, to fit in"
        )
        widest = longest - self.paddle_length
        require(max(margins) <= widest, "margins", margins, f"must be at most {widest}, to fit in with paddle_length")
        self.require_memory(drawing_bytes(self.geometry), "side", "contour_length", "distractor_paddles")
        self.require_disk(free=False)

    def require_disk(self, *, free: bool) -> None:
        """Raise `OptionError` where the images that are to be drawn take more than there is, or is free."""
        if self.source is None:
            options = dict(zip(Splits._fields, self.sizes, strict=True))
            require_disk(self.side**2 * sum(options.values()), options, self.dir, free=free)

    @property
    def geometry(self) -> Geometry:
        """The options of `Geometry` alone, hashable."""
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
        """The options of the generator, or the names, labels and sizes of the official images."""
        if self.source is None:
            geometry = {**vars(self.geometry), "margins": list(self.margins)}
            if self.second_contrast is None:  # as before there was this option
                del geometry["second_contrast"]
            sizes = dict(zip(Splits._fields, self.sizes, strict=True))
            return {"version": VERSION, "seed": self.seed, **sizes, **geometry}
        folder = folder_of(self.source, OFFICIAL)
        lines = [f"{path.relative_to(folder)} {label} {size}\n" for path, label, size in self.records]
        return {"version": VERSION, "side": self.side, "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}

    def build(self, folder: Path) -> None:
        """Write 00000.arrow, 00001.arrow, …, except those that are in `folder` already."""
        missing = [chunk for chunk in range(-(-sum(self.sizes) // CHUNK)) if not shard(folder, chunk).exists()]
        with tracked(self.chunks(missing), f"Pathfinder, files of {CHUNK:,} images", len(missing)) as stream:
            for chunk, columns in zip(missing, stream, strict=True):
                write_arrays(shard(folder, chunk), columns)
                seal(folder, self.spec)

    def chunks(self, numbers: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the chunks of these numbers; only the very last chunk is smaller than `CHUNK`."""
        if self.source is not None:
            for chunk in numbers:
                yield read_official(self.records[chunk * CHUNK :][:CHUNK], self.side)
            return
        self.require_disk(free=True)
        jobs = [(self.geometry, self.seed, chunk, min(CHUNK, sum(self.sizes) - chunk * CHUNK)) for chunk in numbers]
        try:
            yield from map(columns_of, in_processes(draw, jobs, self.workers))
        except NoRoom as error:
            raise OptionError("side", self.side, f"leaves no room for such contours: {error}") from error

    def opened(self, folder: Path, split: str) -> ImageExamples:
        """The images of one split; the splits follow each other as in `Splits`."""
        index = Splits._fields.index(split)
        start = sum(self.sizes[:index])
        return ImageExamples(folder, start, start + self.sizes[index])


@final
class Pathfinder(PixelClassification):
    """Do both markers of an image lie on one contour? Cross-entropy, accuracy."""

    data: PathfinderData

    def __init__(self, *, seq_len: int, causal: bool, pool: Pool, centered: bool, data: PathfinderData) -> None:
        allowed = f"must be data.side² = {data.side**2}, or the square of what divides data.side"
        super().__init__(seq_len=seq_len, causal=causal, pool=pool, data=data, side=data.side, allowed=allowed)
        self.centered = centered
        grey = Numbers((127.5,), (127.5,)) if centered else Numbers((0,), (255,))
        self.preprocessing = Preprocessing(grey, Classes((False, True)))

    def baselines(self) -> dict[str, float]:
        """Test accuracies of the most frequent label, and of the best threshold on the distance of the markers."""
        found = super().baselines()
        train, test = self.data.examples("train"), self.data.examples("test")
        if train.markers is not None and test.markers is not None:
            above, threshold = best_threshold(distances(train.markers), train.labels)
            guess = np.where(distances(test.markers) > threshold, above, 1 - above)
            found["marker distance"] = float((guess == test.labels).mean())
        return found

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        """(B, L, 1) grey values in 0…1 or, centered, −1…1; means of square blocks if `seq_len` is shorter."""
        pixels = self.pixels(examples).float()
        inputs = pixels.div_(127.5).sub_(1) if self.centered else pixels.div_(255)
        return Batch(inputs, torch.tensor([label for _, label in examples]), None)

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, 1) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=1)


def distances(markers: np.ndarray) -> NDArray[np.float64]:
    """(n, 2, 2) → (n,), between the two markers."""
    return np.hypot(*(markers[:, 1] - markers[:, 0]).T.astype(np.float64))


def best_threshold(values: NDArray[np.float64], labels: Bytes) -> tuple[int, float]:
    """The label and the threshold for which predicting this label above it, and the other one below, is best."""
    levels, index = np.unique(values, return_inverse=True)
    table = np.bincount(index * CLASSES + labels, minlength=len(levels) * CLASSES).reshape(-1, CLASSES)
    below = table.cumsum(0)
    above = below[-1] - below
    right = below[:, ::-1] + above  # (levels, label predicted above)
    level, label = np.unravel_index(right.argmax(), right.shape)
    return int(label), float(levels[level])
