"""The checkpoints of a run, read: with their checksums compared, and without Lightning.

`stu.training.states` says which files there are, and writes them.
"""

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stu.errors import OptionError
from stu.files import is_written

LAST, BEST, PREVIOUS, COPY = NAMES = ("last.ckpt", "best.ckpt", "previous.ckpt", "best-copy.ckpt")


class Damaged(Exception):
    """A file is no checkpoint of a run, or not as it was written."""


class Best(NamedTuple):
    """The best validation so far: its value, None before the first, and its optimiser step."""

    value: float | None
    step: int


class State(NamedTuple):
    """What a whole checkpoint holds."""

    path: Path
    step: int
    best: Best

    @property
    def is_best(self) -> bool:
        """Whether these are the best weights so far."""
        return self.best.value is not None and self.best.step == self.step


def read(path: Path, *, tensors: bool = True) -> dict[str, Any]:
    """A checkpoint, on the CPU, after all of its checksums were compared; tensors: with what is in them.

    Raises `Damaged`, and `OSError` where the file cannot be opened.
    """
    with path.open("rb"):
        pass
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
            # what PyTorch would read as something else: a folder, or data of another size
            odd = any(part.external_attr or part.compress_size != part.file_size for part in file.infolist())
        if wrong is not None or odd:
            raise Damaged(f"wrong checksum of {wrong}" if wrong else "wrong table of contents")
        return _loaded(path, tensors=tensors)
    except Damaged:
        raise
    except Exception as error:  # of many kinds
        raise Damaged(" ".join(f"{error or type(error).__name__}".split())[:100]) from error


def is_whole(path: Path) -> bool:
    """Whether `read` would read it."""
    try:
        read(path, tensors=False)
    except (Damaged, OSError):
        return False
    return True


def checked(path: Path) -> State:
    """What a checkpoint holds, after all of its checksums were compared. Raises as `read`."""
    return _state(path, read(path, tensors=False))


def latest_step(folder: Path) -> int:
    """Optimiser steps of the latest state, 0 where there is none; checksums are not compared."""
    steps = [0]
    for name in NAMES:
        with suppress(Exception):  # what is damaged counts as absent
            steps.append(int(_loaded(folder / name, tensors=False)["global_step"]))
    return max(steps)


class Survey:
    """What of a run's checkpoints is whole: `latest`, the latest state whose best weights are there too, and `best`.

    damaged: path → what is wrong with it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.damaged, self.whole = folder, dict[Path, str](), list[State]()
        for path in (folder / name for name in NAMES):
            try:
                if is_written(path):
                    self.whole.append(checked(path))
                elif path.exists():
                    self.damaged[path] = "empty"
            except Damaged as error:
                self.damaged[path] = str(error)
            except OSError as error:
                raise OptionError("paths.runs", path, f"cannot be read: {error.strerror}") from error
        self.whole.sort(key=lambda state: -state.step)  # of equal steps the order of NAMES stays
        self.latest = next((state for state in self.whole if state.best.value is None or self.of(state.best)), None)
        self.best = None if self.latest is None else self.of(self.latest.best)

    def of(self, best: Best) -> State | None:
        """A whole checkpoint of these best weights."""
        found = [state for state in self.whole if state.is_best and state.best == best]
        return min(found, key=lambda state: state.path.name != BEST, default=None)

    @property
    def damages(self) -> str:
        """What is damaged, in words."""
        return ", ".join(f"{path.name} is damaged ({reason})" for path, reason in self.damaged.items())


def _loaded(path: Path, *, tensors: bool) -> dict[str, Any]:
    return torch.load(path, map_location="cpu" if tensors else "meta", weights_only=True)


def _state(path: Path, checkpoint: dict[str, Any]) -> State:
    try:
        kept = checkpoint["callbacks"]["Checkpoints"]
        return State(path, int(checkpoint["global_step"]), Best(kept["best_value"], kept["best_step"]))
    except (KeyError, TypeError, IndexError) as error:
        raise Damaged("no state of a run in it") from error
