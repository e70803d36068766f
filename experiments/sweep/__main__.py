"""The command line: python -m experiments.sweep [runs/.sweeps/NAME …]. See --help."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.shared.files import command, refuse, runs_folder
from experiments.shared.ledgers import ABOUT, CHANGES
from experiments.sweep.jobs import Job
from experiments.sweep.ledger import Ledger
from experiments.sweep.table import Board


def main(arguments: Sequence[str] | None = None) -> int:
    """Show what has become of sweeps, by the directories of their runs; return the exit code."""
    folder = runs_folder() / ".sweeps"
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        description="What has become of the jobs of sweeps, by the directories of their runs as they are now.",
    )
    help_sweeps = f"folders of sweeps (default: all in {folder})"
    parser.add_argument("sweeps", nargs="*", type=Path, help=help_sweeps)
    options = parser.parse_args(arguments)
    found = options.sweeps or sorted(path for path in folder.glob("*") if (path / CHANGES).exists())
    for path in options.sweeps:
        if not (path / ABOUT).exists() and not (path / CHANGES).exists():
            return refuse(f"{path}: is no folder of a sweep")
    if not found:
        print(f"no sweeps in {folder}", file=sys.stderr)
        return 1
    for path in found:
        show(Ledger(path), whole=bool(options.sweeps))
    return 0


def show(ledger: Ledger, *, whole: bool) -> None:
    """Print how many jobs of a sweep are in which state; whole: and the best of them, those that failed, and why."""
    entries, total = ledger.read(), ledger.total
    board = Board(ledger.folder.name, ledger, total if total and total >= len(entries) else None)
    for entry in entries:
        job = Job(overrides=(entry["job"],), run=ledger.here(Path(entry["run"])), title=entry["title"])
        job.state = state_of(job, entry["state"])
        job.seconds, job.attempts = float(entry.get("seconds", 0)), int(entry.get("attempt", 0))
        job.reason = str(entry["reason"]) if job.state == entry["state"] else ""
        board.jobs[str(job.run)] = job
    if whole:
        board.show_all()
    else:
        print(f"{board.title}: {board.counts()}")


def state_of(job: Job, noted: str) -> str:
    """The state of a job by its run directory; where there is none, the one that was `noted` last."""
    if job.finished:
        job.value = job.result()
        return "finished"
    if job.pruned:
        return "pruned"
    if job.busy:
        return "running"
    starts = (job.manifest or {}).get("starts") or [{}]
    if starts[-1].get("failed") or noted == "failed":
        return "failed"
    return "stopped" if job.run.exists() else "waiting"


if __name__ == "__main__":
    command(main)
