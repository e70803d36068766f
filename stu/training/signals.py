"""Signals that stop a run: from its user, from a terminal that closes, from a cluster whose time limit is near."""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

PERSONAL = (signal.SIGINT, signal.SIGTERM)
# SLURM announces the end of a job by whichever it was asked for; platforms without a signal lack its name.
ANNOUNCED = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))


class Handlers:
    """`handler` for these signals, from now on until `restore`.

    Those that this process was started to ignore (by `nohup`, or in the background of a script) stay ignored. Python
    allows handlers in the main thread alone: elsewhere nothing changes.
    """

    def __init__(
        self,
        handler: Callable[[int, FrameType | None], None],
        numbers: tuple[signal.Signals, ...] = PERSONAL + ANNOUNCED,
    ) -> None:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
                self._before[number] = signal.signal(number, handler)

    def restore(self) -> None:
        """Put back what was there before; the second time, nothing."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


@contextmanager
def leaving() -> Iterator[None]:
    """Raise `SystemExit(128 + signal)` where one arrives; SIGINT stays Python's `KeyboardInterrupt`.

    A second one ends the process as it would have without this.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        handlers.restore()
        raise SystemExit(128 + number)

    handlers = Handlers(leave, (signal.SIGTERM, *ANNOUNCED))
    try:
        yield
    finally:
        handlers.restore()


def signal_behind(end: BaseException) -> int:
    """The signal by which a process ends: of `leaving`, or SIGINT, of which Lightning makes exit code 1; 0: none."""
    if isinstance(end, KeyboardInterrupt) or isinstance(end.__context__, KeyboardInterrupt):
        return signal.SIGINT
    code = end.code if isinstance(end, SystemExit) else None
    return code - 128 if isinstance(code, int) and code - 128 in set(signal.Signals) else 0


def hurries(number: int, first: int) -> bool:
    """Whether signal `number` after signal `first` means that the process shall not wait for a checkpoint.

    The same again does, and either of SIGINT and SIGTERM after the other. Not SIGTERM after SIGUSR1, by which SLURM
    says again, a minute later, that the time is over; nor SIGHUP, of which a terminal that closes sends two.
    """
    again = number == first or (number in PERSONAL and first in PERSONAL)
    return again and number != getattr(signal, "SIGHUP", None)


def spare(worker: int) -> None:
    """Let a worker of a loader live on where all processes are signalled, by Ctrl-C or by SLURM.

    The process that it works for needs its batches until it has saved, and then ends it, by another SIGTERM if need be.
    """
    for number in (signal.SIGINT, *ANNOUNCED):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def end_workers_at_exit() -> None:
    """Have workers of loaders killed at the end of this process, which would wait for them (see `spare`)."""
    Finalize(None, _end_workers, exitpriority=1)  # what multiprocessing calls first, in processes that it made, too


def _end_workers() -> None:
    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises where a worker is killed
        for worker in workers:
            worker.kill()
