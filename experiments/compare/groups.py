"""Runs that differ in nothing but the seed are one group: a mean and a standard deviation."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from experiments.compare.runs import Mode, Row, rank
from experiments.compare.select import options
from stu.training.names import is_free

# Besides what may change between the starts of a run: what does not change what is computed.
NEUTRAL = ("seed", "log_every", "checkpoints", "hydra")


@dataclass(frozen=True)
class Group:
    """Runs of one task and one model with the same settings, up to the seed; `rows` has at least one.

    settings: what tells it from the other groups of the same task and model, dotted key → value; a key is absent where
    the runs do not have it.
    """

    task: str
    model: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def metric(self) -> str | None:
        """The monitored metric."""
        return next((row.metric for row in self.rows if row.metric), None)

    @property
    def mode(self) -> Mode:
        """Whether less or more of it is better."""
        return next((row.mode for row in self.rows if row.metric), self.rows[0].mode)

    @property
    def label(self) -> str:
        """The settings in words, by the last parts of their keys where these are unique."""
        last = [key.rpartition(".")[2] for key in self.settings]
        names = [part if last.count(part) == 1 else key for part, key in zip(last, self.settings, strict=True)]
        return ", ".join(f"{name}={_text(value)}" for name, value in zip(names, self.settings.values(), strict=True))

    @property
    def finished(self) -> list[Row]:
        """The runs that have a result."""
        return [row for row in self.rows if row.status == "finished" and row.test is not None]

    @cached_property
    def tests(self) -> list[float]:
        """The metric on the test set, of each finished run."""
        return [row.test for row in self.finished if row.test is not None]

    @property
    def n(self) -> int:
        """The number of finished runs."""
        return len(self.tests)

    @property
    def mean(self) -> float | None:
        """The mean of `tests`."""
        return statistics.fmean(self.tests) if self.tests else None

    @property
    def std(self) -> float | None:
        """Their sample standard deviation; None of fewer than two."""
        finite = all(map(math.isfinite, self.tests))
        return statistics.stdev(self.tests) if self.n > 1 and finite else None

    @property
    def best(self) -> float | None:
        """The best of `tests`."""
        return (max if self.mode == "max" else min)(self.tests, default=None)

    @property
    def best_val(self) -> float | None:
        """The mean of the best validation values of the finished runs, by which settings are chosen."""
        values = [row.best_val for row in self.finished if row.best_val is not None]
        return statistics.fmean(values) if values else None

    @property
    def trivial(self) -> float | None:
        """The best trivial baseline, the mean over the runs: it depends on the data alone."""
        return self.median(lambda row: row.trivial)

    def median(self, of: Callable[[Row], float | None]) -> float | None:
        """The median of a number over the runs that have it: parameters, tokens per second, …"""
        values = [value for row in self.rows if (value := of(row)) is not None and math.isfinite(value)]
        return statistics.median(values) if values else None

    @property
    def order(self) -> tuple[bool, float, bool, float]:
        """Sorts groups of one task, best first: by the mean on the test set, then by that on the validation set."""
        return *rank(self.mean, self.mode), *rank(self.best_val, self.mode)


def grouped(rows: Iterable[Row]) -> list[Group]:
    """All groups, sorted by task and then best first."""
    groups = []
    by_model = sorted(rows, key=lambda row: (row.task, row.model))
    for (task, model), some in groupby(by_model, key=lambda row: (row.task, row.model)):
        groups += _split(task, model, list(some))
    return sorted(groups, key=lambda group: (group.task, group.order, group.model, group.label))


def chosen(groups: Sequence[Group]) -> list[Group]:
    """Of each task and model the group that a search would choose: of those with the most finished runs, the one that
    is best on the validation set. The test set has no say.
    """
    best: dict[tuple[str, str], Group] = {}
    for group in groups:
        key = group.task, group.model
        if key not in best or _choice(group) < _choice(best[key]):
            best[key] = group
    return [group for group in groups if best[group.task, group.model] is group]


def _choice(group: Group) -> tuple[int, bool, float]:
    return -group.n, *rank(group.best_val, group.mode)


def _split(task: str, model: str, rows: Sequence[Row]) -> list[Group]:
    """The groups of one task and model."""
    flat = [{key: _hashable(value) for key, value in options(row.config).items() if _tells(key)} for row in rows]
    values: dict[str, set[Any]] = {}
    for settings in flat:
        for key, content in settings.items():
            values.setdefault(key, set()).add(content)
    telling = [key for key, different in values.items() if len(different) > 1]
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, settings in enumerate(flat):
        found.setdefault(tuple(settings.get(key) for key in telling), []).append(index)
    return [
        Group(
            task=task,
            model=model,
            settings={key: flat[some[0]][key] for key in telling if key in flat[some[0]]},
            rows=tuple(rows[index] for index in some),
        )
        for some in found.values()
    ]


def _tells(key: str) -> bool:
    return not is_free(key) and not any(key == one or key.startswith(f"{one}.") for one in NEUTRAL)


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, Mapping):
        return tuple((key, _hashable(content)) for key, content in value.items())
    return (str(value) if value != value else value) if isinstance(value, float) else value


def _text(value: Any) -> str:
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, tuple) else str(value)
