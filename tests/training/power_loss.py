"""The power fails while a run builds its data and trains: python -m tests.training.power_loss FOLDER --times 10.

An ext4 file system with the default options, in a file, is shut down by an ioctl without anything that it has not
written yet, at random moments, and mounted again, which replays its journal, as after a loss of power. What counts is
what a user sees then: the same command goes on, and its results and data are those of a run that nothing happened to.
"""

import argparse
import contextlib
import fcntl
import os
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.compare.runs import find, read
from stu.files import is_written
from stu.training import Run
from tests import runs

FS_IOC_SHUTDOWN, WITHOUT_THE_LOG = 0x8004587D, 2  # linux/fs.h, and a flag of it: not even the journal is written
EVERY = 2  # steps between checkpoints
SIZES = ("task.data.val=20", "task.data.test=20", "trainer.max_epochs=null", "trainer.max_steps=16")
OFTEN = (f"checkpoints.every_n_steps={EVERY}", "log_every=1", "trainer.val_check_interval=8", "name=run")
COMMANDS = (
    ("task=lra_listops", "model=stu", "task.data.train=1500", *SIZES, *OFTEN),
    ("task=lra_pathfinder", "model=stu", "task.data.train=1200", "task.data.workers=2", *SIZES, *OFTEN),
)


class Disk:
    """An ext4 file system in a file in `folder`, mounted at `path`, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.image, self.path = folder / "disk.img", folder / "disk"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(1 << 29)  # takes no room before it is written
        _call("mkfs.ext4", "-q", "-F", str(self.image))
        self._mount()

    def _mount(self) -> None:
        _call("mount", "-t", "ext4", "-o", "loop", str(self.image), str(self.path))

    def unmount(self) -> None:
        """Wait for processes that still end."""
        for _ in range(100):
            if subprocess.run(["umount", str(self.path)], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        _call("umount", str(self.path))

    def cut(self, *, busy: bool) -> None:
        """From now on, nothing reaches the disk.

        busy: just before, another program makes its own file durable, and with it all names, but not all contents.
        """
        if busy:
            with (self.path / "other").open("w") as file:
                file.write("durable")
                file.flush()
                os.fsync(file.fileno())
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", WITHOUT_THE_LOG))
        finally:
            os.close(descriptor)

    def come_back(self) -> None:
        """With what had reached the disk."""
        self.unmount()
        self._mount()


def _call(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """A `Disk`; raises `OSError` or `CalledProcessError` where nothing can be mounted."""
    made = Disk(folder)
    try:
        yield made
    finally:
        made.unmount()
        made.image.unlink()


@dataclass(frozen=True)
class Command:
    """Arguments of train.py and what comes of them if nothing happens."""

    arguments: Sequence[str]
    results: Any
    data: dict[str, bytes]
    first: float  # seconds after which the first data are written,
    built: float  # all are
    seconds: float  # and the run ends

    @classmethod
    def measured(cls, arguments: Sequence[str], home: Path) -> "Command":
        """Run it in `home`, on the disk of the tests."""
        arguments = runs.small(*arguments)
        runs.train(home, "--help")  # the server of processes has started
        began = time.monotonic()
        started, times = runs.start(home, *arguments), []
        for pattern in ("data/*/*.partial", "data/*/*/spec.json"):
            while not [path for path in home.glob(pattern) if pattern.endswith(path.name) or path.is_dir()]:
                assert started.process.is_alive(), started.wait()
                time.sleep(0.005)
            times.append(time.monotonic() - began)
        done = started.wait()
        assert done.code == 0, done.err
        return cls(arguments, runs.results(_run(home)), _files(home / "data"), *times, time.monotonic() - began)

    def moment(self, randomly: random.Random, *, building: bool) -> float:
        """Seconds from the start: while the data are built, or at any time after that."""
        first, last = (self.first, self.built) if building else (self.built, 1.1 * self.seconds)
        return randomly.uniform(first, last)


def _run(home: Path) -> Run:
    """The run in `home`, if there is one."""
    return Run(next(home.glob("runs/*/*/run"), home / "nowhere"))


def _files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without_sync() -> None:
    """In a run: names and contents reach the disk when the system likes, as if nobody had thought of it."""
    os.fsync = os.fdatasync = lambda descriptor: None  # type: ignore[assignment]


def lose_power(
    command: Command, disk: Disk, folder: Path, moment: float, *, busy: bool, at: Callable[[], None] | None = None
) -> str:
    """Cut the power so many seconds after the start, or at the end of the run; what is spoilt, or "".

    folder: for the files of this run, beside those on the disk. at: as in `runs.start`.
    """
    home = disk.path / folder.name
    places = {"STU_RUNS": str(home / "runs"), "STU_DATA": str(home / "data"), "STU_CACHE": str(home / "cache")}
    started = runs.start(folder, *command.arguments, at=at, **places)
    try:
        started.process.join(moment)
        run, finished = _run(home), started.process.exitcode == 0
        step, summary = run.last_step, run.summary.read_bytes() if finished else b""
        disk.cut(busy=busy)
    finally:
        started.process.kill()
        started.process.join()
    disk.come_back()
    for path in find([home]):
        read(path)  # whatever is there
    if finished and not (run.summary.exists() and run.summary.read_bytes() == summary):
        return "the summary of a finished run is gone"
    shown_again = is_written(run.summary)
    done = runs.train(folder, *command.arguments, **places)
    if done.code:
        return f"the same command says {(done.err.splitlines() or [''])[-1]}"
    found = re.search(r"resumedafterstep(\d+)", "".join(done.out.split()))
    resumed = int(found[1]) if found else 0
    if not shown_again and resumed < step - EVERY:  # the last checkpoint may just have got its name
        return f"it went on after step {resumed}, and step {step} was saved"
    try:
        runs.assert_identical(runs.results(_run(home)), command.results)
        runs.assert_identical(_files(home / "data"), command.data)
    except Exception as error:  # of whatever reads what is damaged
        return f"other results: {repr(error)[:200]}"
    states = [read(path).state for path in find([home])]
    return "" if states == ["finished"] else f"compare says {states}"


def main() -> int:
    """Cut the power of as many runs as asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.training.power_loss", description=__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder for the disk and all files")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--naive", action="store_true", help="without fsync")
    options = parser.parse_args()
    runs.preload()
    commands = [Command.measured(arguments, options.folder / arguments[0]) for arguments in COMMANDS]
    randomly, spoilt = random.Random(options.seed), 0
    with disk(options.folder) as place:
        for number in range(options.times):
            command, building, busy = commands[number % 2], number // 2 % 2 == 0, randomly.random() < 0.7
            moment = command.moment(randomly, building=building)
            at = without_sync if options.naive else None
            found = lose_power(command, place, options.folder / f"{number}", moment, busy=busy, at=at)
            spoilt += bool(found)
            what = f"{COMMANDS[number % 2][0]}, {'building' if building else 'training'}, {'busy' if busy else 'idle'}"
            print(f"{what}, after {moment:.2f} of {command.seconds:.2f} s: {found or 'whole'}", flush=True)
    print(f"{spoilt} of {options.times} spoilt")
    return int(spoilt > 0)


if __name__ == "__main__":
    sys.exit(main())
