"""What the report shows, as JSON: runs, groups, configurations, curves, figures."""

import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.compare.groups import Group
from experiments.compare.history import read_history
from experiments.compare.leaderboard import diverged
from experiments.compare.published import SECOND_HAND, published_of, reduced
from experiments.compare.report import curves, figures
from experiments.compare.runs import Row
from experiments.compare.sweeps import importance, sweeps
from stu.files import mapping_in, unsealed
from stu.training.records import flatten

RESULTS = ("test/", "best/")  # of the log: single numbers, which the summary has, too
MODELS = Path(__file__).resolve().parents[3] / "conf" / "model"
PACKAGES = ("torch", "lightning", "numpy")


def collected(rows: Sequence[Row], groups: Sequence[Group], folder: Path) -> dict[str, Any]:
    """All that the page needs to know; `folder` is where it will lie."""
    group_of = {row.path: index for index, group in enumerate(groups) for row in group.rows}
    histories = [read_history(Path(row.path) / "metrics.csv") for row in rows]
    drawn, steps = curves.coded(
        {name: curve for name, curve in history.curves().items() if not name.startswith(RESULTS)}
        for history in histories
    )
    pictures = figures.embedded(rows, groups, folder)
    keys, values, chosen = _configurations(rows)
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": os.path.commonpath([row.path for row in rows]) if rows else "",
        "sources": sources(rows),
        "sweeps": _sweeps(rows),
        "models": models(rows),
        "groups": [_group(group) for group in groups],
        "keys": keys,
        "values": values,
        "steps": steps,
        "runs": [
            _run(row)
            | {
                "group": group_of.get(row.path),
                "settings": settings,
                "curves": curve,
                "figures": pictures.get(row.path, []),
                "steps_per_epoch": history.steps_per_epoch,
                "commands": commands(row, groups[group_of[row.path]].rows if row.path in group_of else [row]),
            }
            for row, settings, curve, history in zip(rows, chosen, drawn, histories, strict=True)
        ],
    }


def as_json(data: Any) -> str:
    """JSON in ASCII that is inert inside of a <script> element; numbers that JSON lacks are texts."""
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def models(rows: Iterable[Row]) -> list[str]:
    """The models of conf/model and then others: the place of a model, and with it its colour, is always the same."""
    known = sorted(file.stem for file in MODELS.glob("[!_]*.yaml"))
    return [*known, *sorted({row.model for row in rows} - set(known))]


def sources(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Commits and versions of packages, as the manifests tell them of the latest start of each run."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        manifest = mapping_in(Path(row.path) / "manifest.json", unsealed) or {}
        starts = manifest.get("starts")
        start = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
        git, packages = (part if isinstance(part := start.get(key), dict) else {} for key in ("git", "packages"))
        if git.get("commit"):
            changed = " with changes" if git.get("dirty") else ""
            found.setdefault("commit", {})[f"{str(git['commit'])[:8]}{changed}"] = None
        for name in PACKAGES:
            if name in packages:
                found.setdefault(name, {})[str(packages[name])] = None
    return {name: list(seen) for name, seen in found.items()}


def commands(row: Row, group: Sequence[Row]) -> dict[str, str]:
    """How to go on with a run: what to do → a command."""
    try:
        words = shlex.split(row.command or "")
    except ValueError:
        words = []
    if not words:
        return {}
    seeds = [other.seed for other in group if other.seed is not None]
    again = ["python", *(word for word in words if not word.startswith(("mode=", "overwrite=")))]
    other = [word for word in again if not word.startswith(("seed=", "name="))]
    other.append(f"seed={max(seeds, default=0) + 1}")
    if diverged(row):
        return {"another seed": shlex.join(other)}
    if row.status == "finished":
        return {"test again": shlex.join([*again, "mode=test"]), "another seed": shlex.join(other)}
    start = (
        {} if row.status == "running" else {"start" if row.status == "never trained" else "resume": shlex.join(again)}
    )
    return start | {"another seed": shlex.join(other)}


def _sweeps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is known of the importance of the keys that a sweep varied."""
    found = []
    for sweep in sweeps(rows):
        try:
            shares = importance(sweep)
        except ImportError:
            return []  # without Optuna
        about = f"{sweep.task}, {len(sweep.rows)} runs; shares of what tells the best quarter from all others"
        found.append({"name": sweep.name, "about": about, "importance": shares})
    return found


def _run(row: Row) -> dict[str, Any]:
    shown = {field.name: getattr(row, field.name) for field in fields(Row) if field.name != "config"}
    return shown | {"state": row.state, "trivial": row.trivial}


def _group(group: Group) -> dict[str, Any]:
    return {
        "task": group.task,
        "model": group.model,
        "title": group.title,
        "label": group.label,
        "metric": group.metric,
        "mode": group.mode,
        "published": _published(group),
    }


def _published(group: Group) -> dict[str, Any] | None:
    result = published_of(group.task, group.model)
    if result is None:
        return None
    why, mark = reduced(group), f"{SECOND_HAND} published, second hand" if result.second_hand else "published"
    return {
        "text": f"({result.text})" if why else result.text,
        "name": f"{result.name}{f' ({result.remark})' * bool(result.remark)}",
        "source": f"{mark}: {result.source}",
        "reduced": why,
    }


def _configurations(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]], list[list[int]]]:
    """All keys, the different values under each, and for each run which of these it has, -1 for none."""
    flat = [flatten(row.config) for row in rows]
    keys = list(dict.fromkeys(str(key) for settings in flat for key in settings))
    seen: list[dict[str, tuple[int, Any]]] = [{} for _ in keys]
    chosen = []
    for settings in flat:
        indices = []
        for key, values in zip(keys, seen, strict=True):
            if key not in settings:
                indices.append(-1)
            else:
                text = repr(settings[key])  # tells 1 from 1.0 and True
                indices.append(values.setdefault(text, (len(values), settings[key]))[0])
        chosen.append(indices)
    return keys, [[value for _, value in values.values()] for values in seen], chosen


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(content) for key, content in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
