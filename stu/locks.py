"""Who holds a lock file: read from the file, without taking the lock."""

import errno
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# How file systems answer that do not lock files: network mounts without a lock service, FUSE, Lustre.
WITHOUT_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """What a lock file says: two lines, the process and its host, written when the lock was taken, `seconds` ago.

    Files of earlier versions are empty: pid and host are then None.
    """

    file: Path
    pid: int | None
    host: str | None
    seconds: float

    @classmethod
    def of(cls, file: Path) -> "Holder":
        """Read a lock file. Raises `OSError` where there is none."""
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        named = len(lines) >= 2 and lines[0].isdecimal() and len(lines[0]) < 20 and lines[1].isprintable()
        pid, host = (int(lines[0]), lines[1]) if named else (None, None)
        return cls(file, pid, host, max(0.0, time.time() - file.stat().st_mtime))

    @property
    def is_gone(self) -> bool:
        """Whether the process was one of this host that has ended; other hosts cannot be asked."""
        if self.pid is None or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False  # one of another user; a number that is no process
        return False

    def __str__(self) -> str:
        process = "" if self.pid is None else f"process {self.pid} on {self.host}, "
        return f"{process}for {timedelta(seconds=round(self.seconds))}, by the lock file {self.file}"


def holder_lines() -> str:
    """What a process writes into the file of a lock that it holds; `filelock` writes the same without `flock`."""
    return f"{os.getpid()}\n{socket.gethostname()}\n"
