"""The files of a run that say what became of it, read without PyTorch."""

import csv
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stu.files import mapping_in

PRUNED = "pruned.json"  # in a run that a search has given up, until it is finished all the same
AT = "@"  # between the name of a test metric and the length of the sequences, where it is not that of training
SWEEP = "STU_SWEEP"  # in the environment: the sweep that this command is a job of

Row = tuple[int, float, str, float]  # of a metrics.csv, a value at an optimiser step: step, epoch, metric, value


def parse_row(line: str) -> Row | None:
    """A line of a `metrics.csv`, None where it is damaged."""
    try:
        # the names of metrics have those of parameter groups in them, which may have commas; most lines have no quotes
        step, epoch, metric, value = next(csv.reader([line])) if '"' in line else line.split(",")
        return (int(step), float(epoch or "nan"), metric, float(value)) if "\ufffd" not in line else None
    except (ValueError, csv.Error):
        return None


def flatten(config: Any, prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one: {"a": {"b": 1}} → {"a.b": 1}; the mappings of a list by their numbers.

    Other lists and empty mappings are values.
    """
    if isinstance(config, list) and config and all(isinstance(value, Mapping) for value in config):
        config = dict(enumerate(config))
    if not isinstance(config, Mapping) or not config:
        return {prefix: config} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{separator}{key}" if prefix else str(key), separator)
    return flat


def summary_in(file: Path) -> dict[str, Any] | None:
    """The summary in a file, None unless it is whole."""
    summary = mapping_in(file)
    return summary if summary and is_summary(summary) else None


def is_summary(content: Mapping[str, Any]) -> bool:
    """Whether a mapping has all that is shown of a finished run."""
    best = content.get("best")
    parts = content.get("test"), content.get("baselines"), best
    if not all(isinstance(part, dict) for part in parts) or not isinstance(best, dict):
        return False
    numbers = [*content["test"].values(), *content["baselines"].values(), content.get("seconds")]
    numbers += [best.get(key) for key in ("value", "epoch", "step")]
    return isinstance(best.get("metric"), str) and all(isinstance(number, int | float) for number in numbers)


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a checkout."""
    root = Path(__file__).parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def version_of(package: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()
