"""Runs that differ in nothing but the seed are one group: a mean and a standard deviation."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import Any

from experiments.compare.runs import Measured, Row, printable, rank
from stu.training.names import is_free, key_of
from stu.training.records import flatten

# Besides what may change between the starts of a run: what does not change what is computed.
NEUTRAL = ("seed", "log_every", "checkpoints", "hydra", "callbacks.device_stats", "task._target_", "task.data._target_")
# What runs have that were made before there was such an option.
EARLIER: dict[str, Any] = {"pretrain.objective": "none", "precondition.degree": 0}
# Of the options of a task, those that say how a model sees the data; by all others its results are of other data.
VIEWS = ("causal", "pool", "tokens", "centered", "vocab_size")
LIMITS = ("trainer.limit_test_batches", "trainer.overfit_batches")
# Of these options 1 is one batch, and 1.0 is all of them.
SHARES = (*LIMITS, "trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.val_check_interval")


@dataclass(frozen=True)
class Group(Measured):
    """Runs of one task and one model with the same settings, up to the seed; `rows` has at least one.

    settings: what tells it from the other groups of the same task and model, dotted key → value; a key is absent where
    the runs do not have it. variant: likewise, what tells the data of a task from those of other runs of it, whose
    results must not be compared with these.
    """

    task: str
    model: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    variant: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The task, and which of its variants where there are several: what has a table of its own."""
        return f"{self.task} ({described(self.variant)})" if self.variant else self.task

    @property
    def label(self) -> str:
        """The settings in words, by the last parts of their keys where these tell enough."""
        return described(self.settings)

    @property
    def finished(self) -> list[Row]:
        """The runs that have a result."""
        return [row for row in self.rows if row.status == "finished" and row.test is not None]

    @property
    def missing(self) -> Counter[str]:
        """What became of the other runs: status → how many."""
        others = (row for row in self.rows if row.status != "finished" or row.test is None)
        return Counter("damaged" if row.status == "finished" else row.status for row in others)

    @cached_property
    def tests(self) -> list[float]:
        """The metric on the test set, of each finished run."""
        return [row.test for row in self.finished if row.test is not None]

    @property
    def n(self) -> int:
        """The number of finished runs."""
        return len(self.tests)

    @property
    def seeds(self) -> int:
        """The number of different seeds among them."""
        return len({row.seed for row in self.finished})

    @property
    def mean(self) -> float | None:
        """The mean of `tests`."""
        return mean_of(self.tests) if self.tests else None

    @property
    def std(self) -> float | None:
        """Their sample standard deviation; None of fewer than two."""
        return std_of(self.tests)

    @property
    def best(self) -> float | None:
        """The best of `tests`."""
        return min(self.tests, key=lambda test: rank(test, self.mode), default=None)

    @property
    def best_val(self) -> float | None:
        """The mean of the best validation values of the finished runs, by which settings are chosen."""
        values = [row.best_val for row in self.finished if row.best_val is not None]
        return mean_of(values) if values else None

    @property
    def trivial(self) -> float | None:
        """The best trivial baseline, the median over the runs: it depends on the data alone."""
        return self.median(lambda row: row.trivial)

    def median(self, of: Callable[[Row], float | None]) -> float | None:
        """The median of a number over the runs that have it: parameters, tokens per second, …"""
        values = [value for row in self.rows if (value := of(row)) is not None and math.isfinite(value)]
        return statistics.median(values) if values else None

    @property
    def repeated(self) -> list[int]:
        """Seeds of several finished runs, which are no independent results."""
        seeds = Counter(row.seed for row in self.finished if row.seed is not None)
        return sorted(seed for seed, count in seeds.items() if count > 1)

    @property
    def order(self) -> tuple[bool, float, bool, float]:
        """Sorts groups of one task, best first: by the mean on the test set, then by that on the validation set."""
        return *rank(self.mean, self.mode), *rank(self.best_val, self.mode)


def mean_of(values: Sequence[float]) -> float:
    """The mean, also of numbers so large that their sum is infinite; NaN of inf and -inf."""
    try:
        return statistics.fmean(values)
    except (OverflowError, ValueError):
        return sum(value / len(values) for value in values)


def std_of(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of fewer than two, or of what is not finite."""
    try:
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    except OverflowError:
        return math.inf


def grouped(rows: Iterable[Row]) -> list[Group]:
    """All groups, sorted by task and variant and then best first."""
    groups = [
        Group(task, model, settings, tuple(some), variant)
        for task, of_task in _by(sorted(rows, key=_place), lambda row: row.task)
        for variant, of_variant in _apart(of_task, tells_data)
        for model, of_model in _by(of_variant, lambda row: row.model)
        for settings, some in _apart(of_model, tells)
    ]
    return sorted(groups, key=lambda group: (group.task, group.title, group.order, group.model, group.label))


def chosen(groups: Sequence[Group]) -> list[Group]:
    """Of each task, variant and model the group that a search would choose: of those with the most finished seeds, the
    one that is best on the validation set. The test set has no say.
    """
    best: dict[tuple[str, str], Group] = {}
    for group in groups:
        key = group.title, group.model
        if key not in best or _choice(group) < _choice(best[key]):
            best[key] = group
    return [group for group in groups if best[group.title, group.model] is group]


def described(settings: Mapping[str, Any]) -> str:
    """Settings in words, by the last part of a key where all keys that end so have one value."""
    values: dict[str, set[Any]] = {}
    for key, value in settings.items():
        values.setdefault(key.rpartition(".")[2], set()).add(value)
    last = {key: key.rpartition(".")[2] for key in settings}
    words = {last[key] if len(values[last[key]]) == 1 else key: value for key, value in settings.items()}
    return ", ".join(f"{name}={_text(value)}" for name, value in words.items())


def _choice(group: Group) -> tuple[int, bool, float, str]:
    return -group.seeds, *rank(group.best_val, group.mode), group.label


def _place(row: Row) -> tuple[float, str]:
    return math.inf if row.seed is None else row.seed, row.path


def _by(rows: Iterable[Row], key: Callable[[Row], str]) -> Iterator[tuple[str, list[Row]]]:
    return ((name, list(some)) for name, some in groupby(sorted(rows, key=key), key=key))


def _apart(rows: Sequence[Row], counts: Callable[[str], bool]) -> list[tuple[dict[str, Any], list[Row]]]:
    """The rows in parts that agree in all options that tell: what tells a part from the others, and its rows.

    An option that only some rows have tells nothing unless these differ, as earlier versions did not have it; but it
    is null where there is nothing in its place, such as groups of an optimiser, and where a command added it.
    """
    flat = [{key: told(key, value) for key, value in _options(row).items() if counts(key)} for row in rows]
    every = Counter(key for settings in flat for key in settings)
    optional = {key_of(word) for row in rows for word in row.words if word.startswith("+")}
    for key in (key for key, count in every.items() if count < len(rows)):
        above = [key[:at] for at, letter in enumerate(key) if letter == "."]
        added = not optional.isdisjoint((key, *above))
        for settings in flat:
            if key not in settings and (added or any(settings.get(one, key) in ((), None) for one in above)):
                settings[key] = None
    values: dict[str, set[Any]] = {}
    for settings in flat:
        for key, content in settings.items():
            values.setdefault(key, set()).add(content)
    telling = [key for key, different in values.items() if len(different) > 1]
    found: dict[frozenset[tuple[str, Any]], tuple[dict[str, Any], list[Row]]] = {}
    for settings, row in zip(flat, rows, strict=True):
        own = {key: settings[key] for key in telling if key in settings}
        found.setdefault(frozenset(own.items()), (own, []))[1].append(row)
    return list(found.values())


def _options(row: Row) -> dict[str, Any]:
    """All of them by their keys; of the callbacks their names instead of their classes."""
    flat = EARLIER | flatten(row.config)
    names = {key.split(".")[1] for key in flat if key.startswith("callbacks.") and tells(key)}
    classes = {f"callbacks.{name}._target_" for name in names}
    kept = {key: content for key, content in flat.items() if key not in classes}
    return kept | {"callbacks": ", ".join(sorted(names)) or "none"}


@cache
def tells(key: str) -> bool:
    """Whether an option changes what is computed, and is no seed."""
    return not is_free(key) and not any(key == one or key.startswith(f"{one}.") for one in NEUTRAL)


@cache
def tells_data(key: str) -> bool:
    """Whether results under other values of an option are of other data: sizes, lengths, difficulty."""
    views = key.rpartition(".")[2] in VIEWS or key.endswith(".workers")
    return (key.startswith("task.") and not views and tells(key)) or key in LIMITS


def told(key: str, value: Any) -> Any:
    """The value of an option as one that can be compared and hashed, equal where runs do not differ by it."""
    return str(value) if key in SHARES else hashable(value)


def hashable(value: Any) -> Any:
    """A value of an option as one that can be hashed: lists as tuples, NaN as a text."""
    if isinstance(value, list | tuple):
        return tuple(map(hashable, value))
    if isinstance(value, Mapping):
        return tuple((key, hashable(content)) for key, content in value.items())
    if isinstance(value, set):  # yaml has them
        return tuple(sorted(map(str, value)))
    return str(value) if isinstance(value, float) and math.isnan(value) else value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return "null" if value is None else printable(str(value).lower() if isinstance(value, bool) else str(value))
