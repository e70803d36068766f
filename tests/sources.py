"""Small stand-ins, of the same schema, for the data sets that are downloaded: what `task.data.source` may name."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = ["a", "bad", "<br />", "café", "dull", "é", "film", "fine", "good", "great", "the", "was", "“well”", "好"]


def reviews(rows: int, seed: int = 0, longest: int = 40) -> dict[str, list[Any]]:
    """Columns of IMDB, sorted by label like the original."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(1, longest))) for _ in range(rows)]
    return {"text": texts, "label": [2 * row // rows for row in range(rows)]}


def images(rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """Columns of CIFAR-10."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (rows, 32, 32, 3), np.uint8)
    files = [{"bytes": png(one), "path": None} for one in pixels]
    return {"img": files, "label": [row % 10 for row in range(rows)]}


def png(pixels: np.ndarray) -> bytes:
    """An image file."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pairs(rows: int, seed: int = 0) -> list[tuple[str, str, str, str, str]]:
    """Lines of AAN: few papers, each in many pairs, their texts as bytes literals of Python."""
    random = np.random.default_rng(seed)
    texts = [str(" ".join(random.choice(WORDS, random.integers(5, 60))).encode()) for _ in range(12)]
    drawn = random.integers(0, len(texts), (rows, 2))
    return [(f"{row % 2}.0", f"P{i}", f"P{j}", texts[i], texts[j]) for row, (i, j) in enumerate(drawn)]


def parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """One parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: array(values) for name, values in columns.items()}), path)


def array(values: Sequence[Any]) -> pa.Array:
    """A column; images have the type that they have on the hub even where they are missing."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array(values, image if isinstance(values[0], dict) else None)


def published(folder: Path, columns: Callable[..., Mapping[str, Sequence[Any]]], train: int, test: int) -> Path:
    """A folder of train and test parquet files as on the hub."""
    for seed, (split, rows) in enumerate([("train", train), ("test", test)]):
        parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet", columns(rows, seed))
    return folder


def imdb(folder: Path, train: int = 50, test: int = 10) -> Path:
    """IMDB, small."""
    return published(folder, reviews, train, test)


def cifar10(folder: Path, train: int = 50, test: int = 10) -> Path:
    """CIFAR-10, small."""
    return published(folder, images, train, test)


def aan(folder: Path, train: int = 40, val: int = 10, test: int = 10) -> Path:
    """AAN, small."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, rows) in enumerate([("train", train), ("eval", val), ("test", test)]):
        lines = ("\t".join(columns) + "\n" for columns in pairs(rows, seed))
        (folder / f"new_aan_pairs.{split}.tsv").write_text("".join(lines))
    return folder


def table(folder: Path, rows: int = 60) -> Path:
    """A table of a user, one sequence of numbers a row: the class is whether they rise."""
    folder.mkdir(parents=True, exist_ok=True)
    series = np.random.default_rng(0).standard_normal((rows, 16)).cumsum(1)
    lines = [f"{','.join(f'{x:.4f}' for x in one)},{'rises' if one[-1] > one[0] else 'falls'}" for one in series]
    header = ",".join([*(f"x{step}" for step in range(16)), "label"])
    (folder / "series.csv").write_text("\n".join([header, *lines, ""]))
    return folder


# Tasks that read such data, enough for 40 training, 10 validation and 10 test examples.
WRITERS: dict[str, Callable[[Path], Path]] = {
    "lra_text": imdb,
    "lra_retrieval": aan,
    "lra_image": cifar10,
    "cifar_color": cifar10,
    "own": table,
}
COLUMNS = {"own": ["task.inputs=x*", "task.target=label"]}  # of tasks that have to be told


def overrides(task: str, folder: Path) -> list[str]:
    """What tells train.py where the data of a task are, written first; nothing for tasks that need no files."""
    if task not in WRITERS:
        return []
    if not (place := folder / "sources" / task).exists():
        WRITERS[task](place)
    return [f"task.data.source={place}", *COLUMNS.get(task, ())]
