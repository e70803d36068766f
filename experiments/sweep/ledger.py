"""The ledger of a sweep, `<paths.runs>/.sweeps/<name>/`: derived from what happens, and never the truth.

sweep.yaml    the command, what is swept, versions and git state of the latest start that had something to do
jobs.jsonl    every change of a job, a line each
logs/         the output of each job, of all its attempts
wandb/        links to what W&B has written for each run: `wandb sync` and `wandb leet` take the whole sweep
"""

import hashlib
import json
import os
import shlex
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from experiments.shared import ledgers
from experiments.shared.ledgers import ABOUT, CHANGES
from experiments.sweep.jobs import Job
from stu.files import write_atomically

HEADER = 7  # bytes of a .wandb file that holds nothing, at which `wandb sync` would end


class Ledger:
    """The folder of one sweep; made when the first job starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def changes(self) -> Path:
        """The file of all changes."""
        return self.folder / CHANGES

    def log(self, job: Job) -> Path:
        """Where the output of a job is appended."""
        digest = hashlib.sha256(job.key.encode()).hexdigest()[:12]
        return self.folder / "logs" / f"{digest}.log"

    def open(self, about: Mapping[str, Any]) -> None:
        """Make the folder, and write what the sweep is."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        (self.folder / "wandb").mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another worker of the same sweep has just written it
            write_atomically(self.folder / ABOUT, yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True))

    def write(self, job: Job) -> None:
        """Append the state of a job."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": shlex.join(job.overrides),
            "title": job.title,
            "run": str(job.run),
            "state": job.state,
            "attempt": job.attempts,
            "value": job.value,
            "seconds": round(job.seconds, 1),
            "reason": job.reason,
        }
        with self.changes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")  # one write: others append, too

    def read(self) -> list[dict[str, str]]:
        """The latest line of each run; lines that are damaged are left out."""
        return ledgers.latest(self.folder)

    @property
    def total(self) -> int | None:
        """The number of all jobs, where it was known."""
        total = ledgers.about(self.folder).get("jobs")
        return total if isinstance(total, int) else None

    def here(self, run: Path) -> Path:
        """Where a run of the sweep is now: beside the sweep, where all runs were moved."""
        moved = self.folder.resolve().parents[1].joinpath(*run.parts[-3:])
        return moved if moved.exists() and not run.exists() else run

    def link(self, job: Job) -> None:
        """Link what W&B has written for a run, as far as `wandb sync` can read it; drop links to what is gone."""
        folder = self.folder / "wandb"
        for link in folder.iterdir():
            if not link.exists():  # a killed start of a run, whose folder has another name now
                link.unlink(missing_ok=True)
        for made in (*job.run.glob("wandb/offline-run-*"), *job.run.glob("wandb/run-*")):
            if any(file.stat().st_size > HEADER for file in made.glob("*.wandb")):
                with suppress(FileExistsError):
                    (folder / made.name).symlink_to(os.path.relpath(made, folder.resolve()), target_is_directory=True)
