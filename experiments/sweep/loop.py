"""The loop of a sweep: jobs into free slots, retries, signals, and what is said meanwhile."""

import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.sweep.executors import Executor, Handle, Work
from experiments.sweep.jobs import Job
from experiments.sweep.ledger import Ledger
from experiments.sweep.table import Display
from stu.errors import DIVERGED, Busy, OptionError
from stu.training.signals import Handlers, hurries

POLL, WATCH = 0.2, 1.0  # seconds between two looks at the processes, and at what a run has written
PUT_OFF = 1.0  # seconds until a job that another process works on is looked at again
STOPPED = 128  # exit codes from here on: ended by a signal
HOPELESS = (OptionError.exit_code, DIVERGED)  # exit codes that come again
ELSEWHERE = "another process works on it"
LONGEST = 300  # characters of a reason


class Source(Protocol):
    """Where the loop takes jobs from."""

    total: int | None  # how many there are; None: not known

    def next(self) -> Job | None:
        """A job, whether or not it is finished or worked on elsewhere, which the loop sees; None: none now."""

    def again(self, job: Job) -> None:
        """Take a job back: another process works on it, or it is to be tried again."""

    def watch(self, job: Job) -> None:
        """Look at a running job, about once a second; to prune it, set its state and reason."""

    def told(self, job: Job) -> None:
        """A job has ended for good: finished, failed or pruned."""

    @property
    def empty(self) -> bool:
        """Whether nothing will come any more, unless something is given back."""


class Grid:
    """Jobs that are known beforehand, in their order. Raises `OptionError` where two are the same run."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._waiting = deque(jobs)
        self._later: deque[tuple[float, Job]] = deque()
        self.total: int | None = len(self._waiting)
        first: dict[str, Job] = {}
        for job in self._waiting:
            if (other := first.setdefault(job.key, job)) is not job:
                same = f"is the run of two jobs, {other.title} and {job.title}: name them apart, as in"
                raise OptionError("name", job.run, f"{same} 'name=run-${{seed}}'")

    def next(self) -> Job | None:
        """The next one; those that were given back come after some time."""
        if self._waiting:
            return self._waiting.popleft()
        if self._later and self._later[0][0] <= time.monotonic():
            return self._later.popleft()[1]
        return None

    def again(self, job: Job) -> None:
        """Put a job behind the others."""
        self._later.append((time.monotonic() + PUT_OFF, job))

    def watch(self, job: Job) -> None:
        """Nothing is pruned."""

    def told(self, job: Job) -> None:
        """Nothing depends on it."""

    @property
    def empty(self) -> bool:
        """Whether all have been taken."""
        return not self._waiting and not self._later


@dataclass
class Running:
    """A job in a slot."""

    job: Job
    handle: Handle
    since: float
    log: Path
    logged: int  # bytes of the log before this attempt
    watched: float
    before: float  # seconds of earlier attempts

    @property
    def output(self) -> str:
        """What this attempt has printed."""
        try:
            with self.log.open("rb") as file:
                file.seek(self.logged)
                return file.read().decode(errors="replace")
        except OSError:
            return ""


class Loop:
    """Runs the jobs of a source to their ends. retries: of a job that crashes; on_failure: what a failed one ends.

    A first signal is passed on to the jobs, so that they save; a second one that `hurries` kills them. environment:
    variables that each job gets. about: what the ledger says of the sweep, asked for when the first job starts.
    """

    def __init__(
        self,
        source: Source,
        executor: Executor,
        ledger: Ledger,
        display: Display,
        *,
        retries: int = 1,
        on_failure: Literal["continue", "stop"] = "continue",
        environment: Mapping[str, str] | None = None,
        about: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.source, self.executor, self.ledger, self.display = source, executor, ledger, display
        self.retries, self.on_failure, self.environment = retries, on_failure, environment or {}
        self.running: dict[int, Running] = {}
        self.about = about
        self.failed = self._opened = self._unwritten = False
        self._ended: list[Job] = []  # that had ended before
        self._signals: list[int] = []
        self._passed_on = 0

    @property
    def ending(self) -> bool:
        """Whether no other job starts."""
        return bool(self._signals) or (self.failed and self.on_failure == "stop")

    def run(self) -> int:
        """Run them; returns the exit code: 128 + a signal, 1 where one has failed, else 0."""
        handlers = Handlers(lambda number, _: self._signals.append(number))
        try:
            while True:
                self._start()
                if not self.running and (self.ending or self.source.empty):
                    break
                time.sleep(POLL)
                self._pass_on()
                for slot, running in list(self.running.items()):
                    self._look_at(slot, running)
                self.display.update([running.job for running in self.running.values()])
        finally:
            for running in self.running.values():  # where something has gone wrong here
                running.handle.stop()
                running.job.release()
            self.executor.close()
            handlers.restore()
        return STOPPED + self._signals[0] if self._signals else int(self.failed)

    def _start(self) -> None:
        """Fill the free slots."""
        seen: set[int] = set()
        for slot in range(self.executor.workers):
            while slot not in self.running and not self.ending and (job := self.source.next()) is not None:
                if id(job) in seen:
                    self.source.again(job)
                    return
                seen.add(id(job))
                self._begin(job, slot)

    def _begin(self, job: Job, slot: int) -> None:
        """Start a job, unless it has ended before or another process works on it."""
        if self._ended_before(job):
            return
        if job.busy or not job.claim():
            self._put_off(job)
            return
        if self._ended_before(job):  # another sweep had it a moment ago
            job.release()
            return
        log = self.ledger.log(job)
        try:
            if not self._opened:
                self.ledger.open(self.about())
                self._opened = True
                for other in self._ended:
                    self.ledger.link(other)
            logged = log.stat().st_size if log.exists() else 0
            environment = {**self.environment, **job.environment}
            work = Work(job.command, log, environment, job.devices, job.nodes, slot, job.run.name)
            handle = self.executor.submit(work)
        except OSError as error:
            job.release()
            raise OptionError("paths.runs", log, f"no job can start: {error.strerror}") from error
        except BaseException:
            job.release()
            raise
        job.attempts += 1
        job.state, job.reason = "running", ""
        now = time.monotonic()
        self.running[slot] = Running(job, handle, now, log, logged, now, job.seconds)
        self._changed(job)

    def _ended_before(self, job: Job) -> bool:
        if job.finished:
            job.state, job.value, job.reason = "finished", job.result(), ""
        elif job.pruned:
            job.state = "pruned"
        else:
            return False
        job.clear()
        self.source.told(job)
        self.display.changed(job)
        self._ended.append(job)
        return True

    def _put_off(self, job: Job) -> None:
        if job.state != "waiting" or not job.reason.startswith(ELSEWHERE):
            job.state, job.reason = "waiting", ELSEWHERE + job.holder
            self.display.changed(job)
        self.source.again(job)

    def _look_at(self, slot: int, running: Running) -> None:
        job = running.job
        code = running.handle.poll()
        job.seconds = running.before + time.monotonic() - running.since
        if code is not None:
            del self.running[slot]
            self._end(running, code)
        elif job.state == "running" and time.monotonic() - running.watched > WATCH:
            running.watched = time.monotonic()
            self.source.watch(job)
            if job.state == "pruned":
                self._note(lambda: job.prune(job.reason))  # first: its process tells W&B whether it will go on
                running.handle.stop()

    def _end(self, running: Running, code: int) -> None:
        """What has become of a job, and whether it is tried again."""
        job, again = running.job, False
        job.code = code
        if code == 0:
            job.differs = False
        if job.finished:
            job.state, job.value, job.reason = "finished", job.result(), ""
        elif code == 0 and job.mode != "train":
            job.state = "finished"
        elif job.state == "pruned":
            pass
        elif code == Busy.exit_code:
            job.attempts -= 1
            job.release()
            self._put_off(job)
            return
        elif self.ending and code >= STOPPED:
            killed = code == STOPPED + signal.SIGKILL
            saved = (job.run / "checkpoints").exists()
            job.state, job.reason = "stopped", "killed" if killed else "saved" if saved else "before it could save"
        else:
            job.state, job.reason = "failed", cause(code, running.output)
            again = code not in HOPELESS and job.attempts <= self.retries and not self.ending
            self.failed |= not again
        job.release()
        self._changed(job, running.output if job.mode != "train" else "")
        if again:
            job.state, job.reason = "waiting", ""
            self.source.again(job)
        elif job.state != "stopped":
            self.source.told(job)

    def _pass_on(self) -> None:
        """Tell the jobs to save and end; once more for a signal that hurries."""
        hurry = any(hurries(number, self._signals[0]) for number in self._signals[1:])
        wanted = 1 + hurry if self.ending else 0
        if wanted > self._passed_on:
            self._passed_on = wanted
            if wanted == 1:
                self.display.ending([running.job for running in self.running.values()])
            for running in self.running.values():
                running.handle.kill() if wanted > 1 else running.handle.stop()

    def _changed(self, job: Job, output: str = "") -> None:
        self._note(lambda: self.ledger.write(job))
        self._note(lambda: self.ledger.link(job))
        self.display.changed(job, output)

    def _note(self, write: Callable[[], None]) -> None:
        """Write what is only noted: the run directories say the same, where the disk is full."""
        try:
            write()
        except OSError as error:
            if not self._unwritten:
                self._unwritten = True
                self.display.remark(f"{self.ledger.folder} cannot be written to: {error.strerror}; the sweep goes on")


def cause(code: int, output: str) -> str:
    """Why a process ended, in a line: the error that it reports last, or what it printed last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |\w[\w.]*(Error|Exception)\b", line)]
    said = (errors or lines or [""])[-1].removeprefix("error: ")[:LONGEST]
    ended = f"signal {code - STOPPED}" if code > STOPPED else f"exit code {code}"
    return f"{ended}: {said}" if said else ended
