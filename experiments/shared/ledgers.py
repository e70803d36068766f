"""What the ledger of a sweep, `<runs>/.sweeps/<name>/`, says: read without what runs sweeps, which takes a while."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from stu.files import mapping_in

ABOUT, CHANGES = "sweep.yaml", "jobs.jsonl"


def about(ledger: Path) -> dict[str, Any]:
    """The command, what is swept, versions; empty where the file is missing or damaged."""
    return mapping_in(ledger / ABOUT, yaml.safe_load) or {}


def latest(ledger: Path) -> list[dict[str, str]]:
    """The latest change of the job of each run; lines that are damaged are left out."""
    found: dict[str, dict[str, str]] = {}
    with suppress(OSError):
        for line in (ledger / CHANGES).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                found[entry["run"]] = {key: str(entry[key]) for key in ("job", "title", "run", "state", "reason")}
    return list(found.values())
