"""Whether two models differ by more than their seeds: permutation tests and bootstrap intervals, by scipy.stats.

Samples are results on the test set, one per seed, of the settings that validation has chosen. Where both models have
the same seeds, and so many that a test of pairs can reach 5 %, results of one seed are a pair. Of the p-values of one
task the smallest is multiplied by their number, the next by one less, …: Holm's correction.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any

from experiments.compare.groups import Group, mean_of
from experiments.compare.leaderboard import Sheet, doubts, name_of, scaled
from experiments.compare.rounding import beside, number
from experiments.compare.runs import is_share
from stu.errors import require

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95  # of the intervals
EXACT = 20_000  # permutations up to which all are counted, else so many are drawn: up to 8 against 8, or 14 pairs
RESAMPLES = 5000  # of a bootstrap
PAIRS = 6  # from so many on 2 / 2^n is below 5 %
MOST = 1000  # pairs, of about 0.02 s each
FEW = 5  # results, below which an interval is a rough one


@dataclass(frozen=True)
class Difference:
    """Of the mean results of two groups, first minus second: with its interval, p-value and the least possible one."""

    first: Group
    second: Group
    paired: bool
    difference: float
    low: float
    high: float
    p: float
    least_p: float
    corrected: float  # p after Holm's correction over all pairs of the task


def differences(groups: Sequence[Group]) -> list[Difference]:
    """All pairs of groups of one task that have two finite results or more, each. Raises `OptionError` for too many."""
    pairs = list(combinations(filter(is_enough, groups), 2))
    require(
        len(pairs) <= MOST, "--significance", f"{len(pairs):,} pairs", "too many to be told apart: --where, or no --all"
    )
    found = [_difference(first, second) for first, second in pairs]
    corrected = holm([one.p for one in found])
    return [replace(one, corrected=p) for one, p in zip(found, corrected, strict=True)]


def is_enough(group: Group) -> bool:
    """Whether a group has two results or more, all of them finite."""
    return group.n > 1 and all(map(math.isfinite, group.tests))


def holm(values: Sequence[float]) -> list[float]:
    """p-values, corrected for their number by the method of Holm."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def least_p(n_first: int, n_second: int, *, paired: bool) -> float:
    """The p-value of two samples that do not overlap at all: 2 / C(n + m, n), of n pairs 2 / 2^n."""
    return min(1.0, 2 / (2**n_first if paired else math.comb(n_first + n_second, n_first)))


def sheets(groups: Sequence[Group]) -> tuple[list[Sheet], list[Difference]]:
    """A sheet per task with a line per pair, and what is in them; groups are sorted by task."""
    made, found = [], []
    for title, some in groupby(groups, key=lambda group: group.title):
        of_task = list(some)
        pairs = differences(of_task)
        made.append(_sheet(title, of_task, pairs))
        found += pairs
    return made, found


def facts(one: Difference) -> dict[str, Any]:
    """A difference as an object of JSON."""
    names = {
        name: {"model": group.model, "settings": dict(group.settings), "n": group.n}
        for name, group in (("first", one.first), ("second", one.second))
    }
    return {"task": one.first.task, "variant": dict(one.first.variant), **vars(one), **names}


def _difference(first: Group, second: Group) -> Difference:
    import numpy as np
    from scipy import stats

    a, b, paired = _samples(first, second)
    x, y = np.array(a), np.array(b)

    def statistic(x: "np.ndarray", y: "np.ndarray", axis: int = -1) -> "np.ndarray":
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    kind = "samples" if paired else "independent"
    test = stats.permutation_test(
        (x, y), statistic, permutation_type=kind, vectorized=True, n_resamples=EXACT, random_state=0
    )
    low, high = _interval(x, y, statistic, paired)
    return Difference(
        first=first,
        second=second,
        paired=paired,
        difference=mean_of(a) - mean_of(b),
        low=low,
        high=high,
        p=float(test.pvalue),
        least_p=least_p(len(a), len(b), paired=paired),
        corrected=math.nan,
    )


def _samples(first: Group, second: Group) -> tuple[list[float], list[float], bool]:
    """The results of two groups, and whether those at one place belong together."""
    by_seed = [{row.seed: row.test for row in group.finished} for group in (first, second)]
    seeds = [seed for seed in by_seed[0] if seed is not None]
    alone = len(seeds) == first.n == second.n  # no seed occurs twice
    if not (alone and by_seed[0].keys() == by_seed[1].keys() and len(seeds) >= PAIRS):
        return first.tests, second.tests, False
    return first.tests, [by_seed[1][seed] or 0.0 for seed in seeds], True


def _interval(x: "np.ndarray", y: "np.ndarray", statistic: Any, paired: bool) -> tuple[float, float]:
    """A bootstrap interval of the difference, bias-corrected and accelerated (BCa) where that is defined."""
    from scipy import stats

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of samples without variance, whose interval is then by percentiles
            found = stats.bootstrap(
                (x, y), statistic, paired=paired, vectorized=True, method=method, confidence_level=LEVEL,
                n_resamples=RESAMPLES, random_state=0,
            ).confidence_interval  # fmt: skip
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(found.low), float(found.high)


def _sheet(title: str, groups: Sequence[Group], pairs: Sequence[Difference]) -> Sheet:
    metric = groups[0].metric
    percent = is_share(metric)
    columns = ["first", "second", "n", f"difference{' (points)' * percent}", f"{LEVEL:.0%} interval", "p", "p (Holm)"]
    notes = [*_without(groups), *doubts([group for group in groups if is_enough(group)])]
    if pairs:
        least = min(one.least_p for one in pairs)
        after = f", {min(1.0, least * len(pairs)):.2g} after Holm's correction for {len(pairs)} pairs" * (
            len(pairs) > 1
        )
        notes.append(f"{metric}: difference of means, first minus second; permutation tests, {_tests(pairs)}")
        notes.append(f"with so many seeds p can be {least:.2g} at the least{after}")
        if min(min(one.first.n, one.second.n) for one in pairs) < FEW:
            notes.append(f"bootstrap intervals of fewer than {FEW} seeds are too narrow: take them as rough")
    lines = [_line(one, percent) for one in pairs]
    return Sheet(f"{title}: differences over seeds", columns, lines, notes, texts=("first", "second"))


def _line(one: Difference, percent: bool) -> list[str]:
    value, low, high = scaled(percent, one.difference, one.low, one.high)
    spread = None if low is None or high is None else (high - low) / 4 or None
    n = str(one.first.n) if one.first.n == one.second.n else f"{one.first.n}, {one.second.n}"
    ends = f"{beside(low, value, spread)} … {beside(high, value, spread)}"
    n += " pairs" * one.paired
    return [
        name_of(one.first),
        name_of(one.second),
        n,
        beside(value, value, spread),
        ends,
        number(one.p, ".2g"),
        number(one.corrected, ".2g"),
    ]


def _without(groups: Sequence[Group]) -> Iterator[str]:
    """Which groups have no test, and why."""
    few = [name_of(group) for group in groups if group.n < 2]
    other = [name_of(group) for group in groups if group.n > 1 and not is_enough(group)]
    for names, why in ((few, "it takes two finished runs or more"), (other, "a result is not finite")):
        if names:
            yield f"no test of {'; '.join(names)}: {why}"


def _tests(pairs: Sequence[Difference]) -> str:
    exact = all(_count(one) <= EXACT for one in pairs)
    return "exact (all permutations)" if exact else f"by {EXACT:,} permutations where there are more"


def _count(one: Difference) -> int:
    n, m = one.first.n, one.second.n
    return 2**n if one.paired else math.comb(n + m, n)
