"""What a sweep shows of its jobs: a live table on a terminal, lines elsewhere, and a closing table."""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Protocol

from experiments.sweep.jobs import Job
from experiments.sweep.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

REFRESH, REMIND = 1.0, 60.0  # seconds between two tables, and between two lines about the jobs that run
LISTED = 20  # jobs in a closing list
REMINDED = 4  # jobs in a line
STATES = ("running", "waiting", "finished", "pruned", "failed", "stopped")


class Display(Protocol):
    """Is told what changes."""

    def changed(self, job: Job, output: str = "") -> None:
        """A job has another state. output: what it has printed, where that is its result."""

    def update(self, running: Sequence[Job]) -> None:
        """Some time has passed."""

    def remark(self, text: str) -> None:
        """Something has gone wrong that ends no job."""

    def ending(self, jobs: Sequence[Job]) -> None:
        """These jobs were told to save and end."""


class Board:
    """The jobs of a sweep, as far as they are known, of `total` in all."""

    def __init__(self, title: str, ledger: Ledger, total: int | None = None) -> None:
        self.title, self.ledger, self.total = title, ledger, total
        self.jobs: dict[str, Job] = {}
        self._numbers: dict[str, int] = {}
        self._since: dict[str, tuple[float, int]] = {}  # when which step of an attempt was first seen
        self._began = self._reminded = self._shown = time.monotonic()
        self._console: Console | None = None
        self._live: Live | None = None

    @property
    def console(self) -> "Console":
        """As wide as the terminal, or as needed elsewhere; texts are printed as they are."""
        if self._console is None:
            from rich.console import Console  # takes a while, which a finished sweep has no need of

            width = None if sys.stdout.isatty() else 10_000
            self._console = Console(width=width, highlight=False, markup=False, emoji=False)
        return self._console

    def changed(self, job: Job, output: str = "") -> None:
        """Say it, unless the job had ended before this sweep began."""
        self.jobs[job.key] = job
        self._since.pop(job.key, None)
        if output:
            self._print(output.rstrip("\n"))
        if job.state == "running":
            number = self._numbers.setdefault(job.key, len(self._numbers) + 1 + self._before())
            of = "" if self.total is None else f" of {self.total:,}"
            if self._starts_live():
                return
            self._print(f"job {number:,}{of}: {job.title}" + f", attempt {job.attempts}" * (job.attempts > 1))
        elif job.attempts or job.reason:
            value = "" if job.value is None else f" {job.value:.4g}"
            self._print(f"{job.state}{value}: {job.title}" + f": {job.reason}" * bool(job.reason))

    def update(self, running: Sequence[Job]) -> None:
        """Show how far the jobs are."""
        now = time.monotonic()
        if self._live is not None and now - self._shown > REFRESH:
            self._shown = now
            self._live.update(self.table(running), refresh=True)
        elif self._live is None and running and now - self._reminded > REMIND:
            self._reminded = now
            told = [" ".join((job.title, *filter(None, self._progress(job)))) for job in running[:REMINDED]]
            more = [f"{len(running) - REMINDED:,} more"] * (len(running) > REMINDED)
            self._print(f"{self.counts()}; {'; '.join((*told, *more))}")

    def remark(self, text: str) -> None:
        """Say something on stderr."""
        print(text, file=sys.stderr, flush=True)

    def ending(self, jobs: Sequence[Job]) -> None:
        """Say that they save and end."""
        if jobs:
            self._print(f"stopping: {len(jobs)} of the jobs save and end; a second signal does not wait for them")

    def counts(self) -> str:
        """How many jobs are in which state."""
        found = Counter(job.state for job in self.jobs.values())
        if self.total is not None:
            found["waiting"] = max(0, self.total - sum(found[state] for state in STATES if state != "waiting"))
        return ", ".join(f"{found[state]:,} {state}" for state in STATES if found[state]) or "no jobs"

    def table(self, running: Sequence[Job]) -> "Table":
        """The counts, and the jobs that run, as many as there is room for."""
        table = _table(f"{self.title}: {self.counts()}", "job", "step", "validation", "time", "left")
        for column in table.columns:  # a line for each job, however narrow the terminal
            column.no_wrap, column.overflow = True, "ellipsis"
        room = max(3, self.console.height - 5)
        for job in running[:room]:
            step, value, left = self._progress(job)
            table.add_row(job.title, step, value, _duration(job.seconds), left.removeprefix("left "))
        if len(running) > room:
            table.add_row(f"… {len(running) - room:,} more")
        return table

    def stop(self) -> None:
        """End the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def close(self, code: int) -> None:
        """Show all that has become of the jobs."""
        self.stop()
        self.show_all(_duration(time.monotonic() - self._began))
        if code:
            without = " without overwrite=true" if any(job.replaces for job in self.jobs.values()) else ""
            print(f"next: the same command{without} goes on with what is not finished", flush=True)

    def show_all(self, time: str = "") -> None:
        """The counts, the best jobs, and on stderr what failed and why."""
        print(f"{self.title}: {self.counts()}" + f"; {time}" * bool(time), flush=True)
        for group in best_first(self.jobs.values()).values():
            self._show_best(group)
        failed = [job for job in self.jobs.values() if job.state == "failed"]
        if failed:
            print(
                f"error: {len(failed):,} of {self.total or len(self.jobs):,} jobs of the sweep failed:", file=sys.stderr
            )
            for job in failed[:LISTED]:
                print(f"  {job.title}: {job.reason} ({self.ledger.log(job)})", file=sys.stderr)
            if len(failed) > LISTED:
                print(f"  … {len(failed) - LISTED:,} more in {self.ledger.changes}", file=sys.stderr)

    def _show_best(self, group: Sequence[Job]) -> None:
        monitor = group[0].monitor
        if len(group) > 1:
            table = _table("", "job", monitor, "time")
            for job in group[:LISTED]:
                table.add_row(job.title, f"{job.value:.4g}", _duration(job.seconds) if job.attempts else "")
            if len(group) > LISTED:
                table.add_row(f"… {len(group) - LISTED:,} more")
            self.console.print(table)
        print(f"best: {group[0].title}: {monitor} {group[0].value:.4g}, {group[0].run}", flush=True)

    def _before(self) -> int:
        return sum(job.state in ("finished", "pruned") and not job.attempts for job in self.jobs.values())

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, soft_wrap=True)
        else:
            print(text, flush=True)

    def _starts_live(self) -> bool:
        """Whether there is a live table, from now on or before."""
        if self._live is None and sys.stdout.isatty() and not self.console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self._live is not None

    def _progress(self, job: Job) -> tuple[str, str, str]:
        """Step, latest validation and time left of a running job, empty where they are not known."""
        rows, manifest = job.rows, job.manifest or {}
        if not rows:
            return "", "", ""
        step, total, values = rows[-1][0], manifest.get("total_steps"), job.monitored()
        since, first = self._since.setdefault(job.key, (time.monotonic(), step))
        left = ""
        if isinstance(total, int) and step > first:
            left = f"left {_duration((time.monotonic() - since) / (step - first) * (total - step))}"
        of = f"/{total}" if isinstance(total, int) else ""
        return f"step {step}{of}", f"{job.monitor} {values[-1][1]:.4g}" if values else "", left


def best_first(jobs: Iterable[Job]) -> dict[tuple[str, str, bool], list[Job]]:
    """Finished jobs with a value, by task and metric, which alone can be compared, the best first."""
    groups: dict[tuple[str, str, bool], list[Job]] = {}
    for job in jobs:
        if job.state == "finished" and job.value is not None:
            task = job.run.parent.parent.name
            groups.setdefault((task, job.monitor, (job.manifest or {}).get("mode") == "max"), []).append(job)
    for key, group in groups.items():
        group.sort(key=partial(_rank, most=key[-1]))
    return groups


def _rank(job: Job, most: bool) -> tuple[bool, float]:
    if job.value is None or math.isnan(job.value):
        return True, 0.0
    return False, -job.value if most else job.value


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Text(title, no_wrap=True, overflow="ellipsis") if title else None
    table = Table(title=shown, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="left" if column == "job" else "right", overflow="fold")
    return table


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
