"""The lock of a run: one process works in it at a time, on file systems with `flock` and without."""

import errno
import warnings
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from stu.errors import Busy
from stu.locks import WITHOUT_FLOCK, Holder, holder_lines

SECONDS_TO_FOLLOW = 10.0  # for which processes that a killed one started may keep its lock


class RunLock:
    """The lock `.<name>.lock` beside the folder of a run, or another one of that kind: `.<name>.<kind>`.

    It is the kernel's, which a killed process gives back; where the file system has none, the file itself is the lock,
    and is taken over from a process of this host that is gone. Its text names the process (`Holder`).
    """

    def __init__(self, folder: Path, kind: str = "lock") -> None:
        self.folder = folder
        self.file = folder.parent / f".{folder.name}.{kind}"
        self._lock: BaseFileLock | None = None

    def acquire(self, *, seconds: float = 0.0) -> None:
        """Take the lock, at once or in `seconds`.

        Raises `Busy` if another process has it, `OSError` where none can be made.
        """
        if self._lock is not None:
            return
        try:
            self._lock = self._take(seconds)
        except Timeout:
            raise Busy("name", self.folder, f"another process is training this run{self._holder()}") from None
        if not isinstance(self._lock, SoftFileLock):
            try:
                self.file.write_text(holder_lines(), encoding="utf-8")
            except OSError:  # no room
                self.release()
                raise

    def release(self) -> None:
        """Give the lock back and delete its file."""
        if self._lock is not None:
            if not isinstance(self._lock, SoftFileLock):
                # before the release: after it, another process may already hold a lock of its own there
                self.file.unlink(missing_ok=True)
            self._lock.release(force=True)
            self._lock = None

    def _take(self, seconds: float) -> BaseFileLock:
        was_there = self.file.exists()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where it becomes a soft lock by itself
                return self._acquired(FileLock(self.file, timeout=seconds))
        except (NotImplementedError, OSError) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in WITHOUT_FLOCK:
                raise
            if not was_there and self.file.stat().st_size == 0:
                self.file.unlink()  # left by the attempt above; a soft lock is never empty
            return self._acquired(SoftFileLock(self.file, timeout=seconds))

    def _acquired(self, lock: BaseFileLock) -> BaseFileLock:
        try:
            lock.acquire()
        except Timeout:
            gone = False
            with suppress(OSError):  # released meanwhile
                gone = Holder.of(self.file).is_gone
            if not gone:
                raise
            lock.acquire(timeout=SECONDS_TO_FOLLOW)
        return lock

    def _holder(self) -> str:
        try:
            holder = Holder.of(self.file)
        except OSError:
            return "; choose another name"
        return f" ({holder}); choose another name, or delete that file if the process is gone"
