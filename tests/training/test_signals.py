"""Which signals stop a run, and what a second one means."""

import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import get_context

import pytest
from torch.utils.data import DataLoader

from stu.training.signals import ANNOUNCED, PERSONAL, Handlers, end_workers_at_exit, hurries, leaving, spare

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in PERSONAL + ANNOUNCED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_signals():
    assert {number.name for number in PERSONAL + ANNOUNCED} == {"SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"}


@pytest.mark.parametrize("number", PERSONAL + ANNOUNCED)
def test_handlers_come_and_go(number: signal.Signals):
    before, got = signal.getsignal(number), []
    handlers = Handlers(lambda number, frame: got.append(number))
    os.kill(os.getpid(), number)
    assert got == [number]
    handlers.restore()
    assert signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)
    handlers.restore()
    assert signal.getsignal(number) is signal.SIG_IGN


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    handlers = Handlers(lambda number, frame: pytest.fail("was not ignored"))
    os.kill(os.getpid(), signal.SIGHUP)
    handlers.restore()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_other_threads_change_nothing():
    before = signal.getsignal(TERM)
    thread = threading.Thread(target=Handlers, args=(lambda number, frame: None,))
    thread.start()
    thread.join()
    assert signal.getsignal(TERM) is before


@pytest.mark.parametrize("number", [TERM, *ANNOUNCED])
def test_outside_training_a_signal_ends_the_process_in_order(number: signal.Signals):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, leaving():
        os.kill(os.getpid(), number)
    assert end.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_who_hurries():
    usr1, usr2, hup = ANNOUNCED
    for first, number in ((INT, INT), (TERM, TERM), (INT, TERM), (TERM, INT), (usr1, usr1), (usr2, usr2)):
        assert hurries(number, first)
    for first, number in ((hup, hup), (usr1, TERM), (hup, TERM), (TERM, usr2), (INT, hup), (usr1, usr2)):
        assert not hurries(number, first)


def _leave_a_worker() -> None:
    """As a run that is stopped: nobody has shut its loader down when the process ends."""
    end_workers_at_exit()
    loader = DataLoader([0, 1], num_workers=1, persistent_workers=True, worker_init_fn=spare)  # type: ignore[arg-type]
    iterator = threading.current_thread().kept = iter(loader)  # type: ignore[attr-defined]
    next(iterator)


@pytest.mark.slow
def test_a_worker_that_is_left_ends_with_its_process():
    process = get_context("forkserver").Process(target=_leave_a_worker)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0
