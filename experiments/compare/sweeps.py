"""Sweeps, by what their runs and the ledgers beside them say: what was varied, and what it did to the metric."""

import math
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from experiments.compare.groups import grouped
from experiments.compare.runs import Measured, Row
from experiments.compare.select import ABSENT, value
from experiments.shared import ledgers
from stu.training.names import key_of

LEAST = 20  # finished runs, below which an importance would say more about chance
QUANTILE = 0.25  # the share of the runs that counts as good
STUDY = "optuna.jsonl"


@dataclass(frozen=True)
class Axis:
    """What one key was in each run of a sweep.

    values: places on the axis, None where a run does not have the key; labels: of 0, 1, …, where these are categories,
    else empty; log: whether the numbers, all above 0, are better seen on a logarithmic scale.
    """

    key: str
    values: tuple[float | None, ...]
    labels: tuple[str, ...] = ()
    log: bool = False


@dataclass(frozen=True)
class Sweep(Measured):
    """The runs of one task among the jobs of a sweep, at least one: metrics of several tasks can't be compared.

    task: with what tells its data from those of other runs, as the title of a group. keys: what the command varies, in
    its order. settings: path of a run → key → its value; a key is absent where the run does not have it. logarithmic:
    keys that the command varies on a logarithmic scale. ledger: its folder, which may be gone.
    """

    name: str
    task: str
    command: str | None
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    logarithmic: frozenset[str] = frozenset()
    ledger: Path | None = None

    @property
    def study(self) -> Path | None:
        """The study of Optuna; None where nothing was searched."""
        file = self.ledger / STUDY if self.ledger else None
        return file if file and file.is_file() else None

    @cached_property
    def axes(self) -> list[Axis]:
        """The keys of more than one value, without the seed, which is chance."""
        found = [_axis(key, self._values(key), key in self.logarithmic) for key in self.keys if key != "seed"]
        return [axis for axis in found if len({*axis.values} - {None}) > 1]

    def _values(self, key: str) -> list[Any]:
        return [self.settings.get(row.path, {}).get(key, ABSENT) for row in self.rows]


def sweeps(rows: Iterable[Row]) -> list[Sweep]:
    """The sweeps of which these runs are jobs, by name and task.

    A run belongs to the sweep that its manifest names, and to those whose ledgers, beside the folders of tasks, name
    it: earlier versions wrote no name into the manifest, and a finished run may be a job of several sweeps.
    """
    places: dict[Path, list[Row]] = {}
    for row in rows:
        places.setdefault(Path(row.path).parents[:3][-1], []).append(row)
    found = []
    for place, some in places.items():
        home = place / ".sweeps"
        names = {ledger.parent.name for ledger in home.glob(f"*/{ledgers.CHANGES}")}
        for name in names | {row.sweep for row in some if row.sweep}:
            found += _sweeps(home / name, some)
    return sorted(found, key=lambda sweep: (sweep.name, sweep.task, str(sweep.ledger)))


def importance(sweep: Sweep) -> dict[str, float]:
    """Swept key → its share, the largest first, of what tells the best quarter of the finished runs from all others.

    By PED-ANOVA (2304.10255) of Optuna, from the best validation values; the shares add up to 1. Empty for fewer than
    `LEAST` runs, whether they were searched or are a grid. Raises `ImportError` without Optuna.
    """
    kept = [k for k, row in enumerate(sweep.rows) if row.status == "finished" and is_finite(row.best_val)]
    if len(kept) < LEAST or not sweep.axes:
        return {}
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize" if sweep.mode == "max" else "minimize")
        study.add_trials([_trial(sweep, k) for k in kept])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            evaluator = PedAnovaImportanceEvaluator(target_quantile=QUANTILE)
            shares = get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {key: float(share) for key, share in shares.items()}


def _trial(sweep: Sweep, k: int) -> Any:
    """The k-th run as a trial of Optuna."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.trial import create_trial

    params: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for axis in sweep.axes:
        known, own = [place for place in axis.values if place is not None], axis.values[k]
        if own is not None:
            params[axis.key] = axis.labels[int(own)] if axis.labels else own
            numbers = FloatDistribution(min(known), max(known), log=axis.log)
            distributions[axis.key] = CategoricalDistribution(axis.labels) if axis.labels else numbers
    return create_trial(params=params, distributions=distributions, value=sweep.rows[k].best_val)


def _sweeps(ledger: Path, rows: Sequence[Row]) -> list[Sweep]:
    """The sweep of a ledger, one for each task."""
    words = {Path(entry["run"]).parts[-3:]: _words(entry["job"]) for entry in ledgers.latest(ledger)}
    own = [row for row in rows if row.sweep == ledger.name or _place(row) in words]
    jobs = {row.path: _by_key(words.get(_place(row)) or _words(row.command)[1:]) for row in own}
    about = ledgers.about(ledger)
    swept = about.get("swept")
    if isinstance(swept, dict):
        told = {key_of(str(name).partition(" | ")[0]): str(text) for name, text in swept.items()}
    else:
        told = dict.fromkeys(_varied(list(jobs.values())), "")
    settings = {
        row.path: {key: _value(row, key, jobs[row.path][key]) for key in told if key in jobs[row.path]} for row in own
    }
    titles = {row.path: group.title for group in grouped(own) for row in group.rows}
    return [
        Sweep(
            name=ledger.name,
            task=title,
            command=command if isinstance(command := about.get("command"), str) else None,
            keys=tuple(told),
            rows=tuple(row for row in own if titles[row.path] == title),
            settings=settings,
            logarithmic=frozenset(key for key, text in told.items() if text.startswith("tag(log")),
            ledger=ledger,
        )
        for title in sorted(set(titles.values()))
    ]


def _place(row: Row) -> tuple[str, ...]:
    """Task, model and name: what stays when all runs and their ledgers are moved together."""
    return Path(row.path).parts[-3:]


def _words(text: str | None) -> list[str]:
    try:
        return shlex.split(text or "")
    except ValueError:
        return []


def _by_key(words: Iterable[str]) -> dict[str, str]:
    """Key → what the last word about it says."""
    return {key_of(word): word.partition("=")[2] for word in words if "=" in word}


def _varied(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose words differ, in the order of the words."""
    keys = dict.fromkeys(key for job in jobs for key in job if key != "name")
    return [key for key in keys if len({job.get(key) for job in jobs}) > 1]


def _value(row: Row, key: str, word: str) -> Any:
    """What a key was in a run: of a choice of a group, such as optimizer=adamw, the name."""
    found = value(row, key)
    return word if found is ABSENT or isinstance(found, Mapping) else found


def _axis(key: str, values: Sequence[Any], log: bool) -> Axis:
    known = [one for one in values if one is not ABSENT]
    if all(is_finite(one) for one in known):
        numbers = tuple(None if one is ABSENT else float(one) for one in values)
        return Axis(key, numbers, log=log or is_logarithmic({float(one) for one in known}))
    labels = {_label(one): None for one in sorted(known, key=_order)}
    places = {label: float(place) for place, label in enumerate(labels)}
    return Axis(key, tuple(None if one is ABSENT else places[_label(one)] for one in values), tuple(labels))


def is_logarithmic(numbers: Iterable[float]) -> bool:
    """Whether numbers are spread like their orders of magnitude: 1, 3, 10, or 16, 32, 64, but not 8, 16, 24."""
    ordered = sorted(set(numbers))
    if len(ordered) < 2 or ordered[0] <= 0:
        return False
    low, high, middle = ordered[0], ordered[-1], median(ordered)
    if high >= (10 if len(ordered) == 2 else 50) * low:
        return True
    return abs(math.log(middle / math.sqrt(low * high))) < abs(math.log(middle / ((low + high) / 2)))


def _label(content: Any) -> str:
    """As on the command line."""
    return str(content).lower() if isinstance(content, bool) else "null" if content is None else str(content)


def _order(content: Any) -> tuple[bool, float, str]:
    """Numbers before texts."""
    number = is_finite(content)
    return not number, float(content) if number else 0.0, str(content)


def is_finite(content: Any) -> bool:
    """Whether this is a number that has a place on an axis."""
    return isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content)
