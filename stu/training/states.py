"""The files of a run's checkpoints: written beside their places, read with their checksums, replaced where damaged.

last.ckpt        the latest state, from which a run resumes
best.ckpt        the state after the best validation
previous.ckpt    the latest state before that of last.ckpt
best-copy.ckpt   the state of best.ckpt once more

The last two are there until a run is finished: whichever file is damaged, another one takes its place.
"""

import errno
import io
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from stu.errors import OptionError
from stu.files import is_written, kept_name, put_in_place, replacing
from stu.saved.checkpoints import (
    BEST,
    COPY,
    LAST,
    NAMES,
    PREVIOUS,
    Best,
    Damaged,
    State,
    Survey,
    checked,
    is_whole,
    latest_step,
    read,
)

__all__ = ["BEST", "COPY", "LAST", "NAMES", "PREVIOUS", "Best", "Damaged", "State", "Survey", "Writer", "checked"]
__all__ += ["is_whole", "latest_step", "mend", "read", "replace_last", "size", "tidy", "unwritable"]

FULL = (errno.ENOSPC, errno.EDQUOT)  # how a disk says that it has no room


class Writer(TorchCheckpointIO):
    """Writes checkpoints straight to their place, where Lightning fills its memory and $TMPDIR first.

    failure: why the latest was not written; raised by nobody here, for several devices have to learn of it together.
    """

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self.needed = 0  # bytes of the latest checkpoint that was not written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; it may be half there after a failure. Where the disk is full, spare files make room."""
        for spare in (PREVIOUS, COPY, None):
            self.failure = self._failure(checkpoint, Path(path))
            if self.failure is None:
                return
            if spare is None or self.failure.errno not in FULL:
                break
            Path(path).with_name(spare).unlink(missing_ok=True)
        torch.save(checkpoint, counter := _Counter())
        self.needed = counter.size

    @staticmethod
    def _failure(checkpoint: dict[str, Any], path: Path) -> OSError | None:
        try:
            with path.open("wb") as file:
                torch.save(checkpoint, file)
        except OSError as error:
            return error
        except RuntimeError as error:  # what PyTorch makes of an OSError of the file
            if not isinstance(error.__context__, OSError):
                raise
            return error.__context__
        return None


class _Counter(io.BytesIO):
    """Counts the bytes that are written to it."""

    size = 0

    def write(self, data: Any, /) -> int:
        self.size += len(data)
        return len(data)


def size(weights: Mapping[str, Any]) -> int:
    """Bytes of all tensors."""
    return sum(x.nbytes for x in weights.values() if isinstance(x, torch.Tensor))


def unwritable(path: Path, error: OSError, needed: int) -> OptionError:
    """What to raise where a checkpoint of so many bytes cannot be written."""
    room = f"{needed / 2**10:,.0f} KiB" if needed < 2**20 else f"{needed / 2**20:,.0f} MiB"
    earlier = any(is_written(path.parent / name) for name in NAMES)
    advice = "earlier checkpoints are as they were" if earlier else "no checkpoint was written yet"
    advice += ", and the same command goes on where there is room"
    return OptionError("paths.runs", path, f"cannot be written, which takes {room}: {error.strerror}; {advice}")


def replace_last(partial: Path, folder: Path, *, kept_as: str) -> None:
    """Put `partial` in the place of last.ckpt, whose old file is kept under another name, where links can be made."""
    last, kept = folder / LAST, folder / kept_as
    if is_written(last):
        link = kept.with_name(f".{kept.name}.link")
        link.unlink(missing_ok=True)
        with suppress(OSError):  # file systems without links keep fewer files
            link.hardlink_to(last)
            link.replace(kept)
    put_in_place(partial, last)


def mend(folder: Path) -> list[str]:
    """Have last.ckpt and best.ckpt whole, the latest there are, or neither; returns remarks on what was damaged.

    Damaged files that are replaced are kept under another name. Raises `OptionError` where nothing can replace them:
    before training goes on, not after.
    """
    survey = Survey(folder)
    nothing_but_empty = not survey.whole and all(not is_written(path) for path in survey.damaged)
    if survey.latest is None and not nothing_but_empty:
        lost, advice = "no other checkpoint is there", "overwrite=true starts again"
        for late in survey.whole[:1]:
            lost = f"no file has the weights of the best validation, of step {late.best.step:,}"
            advice = f"mode=test checkpoint={late.path} tests those of step {late.step:,}, another name starts again"
        raise OptionError("name", folder.parent, f"{survey.damages or f'{BEST} is missing'}; {lost}; {advice}")
    remarks = [] if survey.latest else [f"{path} is empty: the run starts again" for path in survey.damaged]
    for name, state in ((LAST, survey.latest), (BEST, survey.best)):
        path = folder / name
        if state is None or state.path == path:
            continue
        reason = "" if path.exists() else "is missing"
        if path in survey.damaged:
            reason = f"is damaged ({survey.damaged[path]})"
        if any(other.path == path and other.step > state.step for other in survey.whole):
            reason = "is whole, but the weights of its best validation are lost"
        if reason:
            remarks.append(f"{path} {reason}; {state.path.name}, of step {state.step:,}, takes its place")
            if is_written(path):
                remarks[-1] += f"; it is kept as {path.replace(kept_name(path)).name}"
        try:
            with replacing(path) as partial:
                shutil.copyfile(state.path, partial)
        except OSError as error:
            raise unwritable(path, error, state.path.stat().st_size) from error
    return remarks


def tidy(folder: Path) -> None:
    """Delete what is there for damage alone, or was left by a killed process: a finished run has no use for it."""
    for path in (folder / PREVIOUS, folder / COPY, *folder.glob(".*.ckpt.*")):
        path.unlink(missing_ok=True)
