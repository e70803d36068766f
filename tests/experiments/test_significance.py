"""Tests between models over seeds, against all permutations counted by hand."""

from collections.abc import Sequence
from itertools import combinations, product
from math import comb, nan
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.compare.groups import Group, grouped
from experiments.compare.significance import differences, holm, least_p, sheets
from stu.errors import OptionError
from tests.experiments.test_leaderboard import lines, row

TESTS = st.lists(st.integers(0, 9).map(lambda n: n / 8), min_size=2, max_size=4)


def two(first: Sequence[float], second: Sequence[float], *, seeds: Sequence[int] | None = None) -> list[Group]:
    """Two models with these results, of seeds that the other does not have unless they are given."""
    models = (("a", first, seeds or range(100)), ("b", second, seeds or range(100, 200)))
    rows = [
        row(model=model, seed=seed, test=test)
        for model, tests, of in models
        for seed, test in zip(of, tests, strict=False)
    ]
    return sorted(grouped(rows), key=lambda group: group.model)


def counted(first: Sequence[float], second: Sequence[float]) -> float:
    """The share of all ways to divide the results that are as extreme, of the smaller tail, twice."""
    pool, n = [*first, *second], len(first)
    ways = [set(way) for way in combinations(range(len(pool)), n)]
    means = [fmean(pool[i] for i in way) - fmean(pool[i] for i in range(len(pool)) if i not in way) for way in ways]
    return _both_tails(means, fmean(first) - fmean(second))


def _both_tails(all_of_them: Sequence[float], observed: float) -> float:
    tails = [sum(x <= observed + 1e-9 for x in all_of_them), sum(x >= observed - 1e-9 for x in all_of_them)]
    return min(1.0, 2 * min(tails) / len(all_of_them))


@settings(max_examples=15)
@given(TESTS, TESTS)
def test_p_is_that_of_all_permutations(first: list[float], second: list[float]):
    [one] = differences(two(first, second))
    assert one.p == pytest.approx(counted(first, second))
    assert one.difference == pytest.approx(fmean(first) - fmean(second))
    assert one.least_p <= one.p <= 1
    assert one.low <= one.difference + 1e-9
    assert one.high >= one.difference - 1e-9


def test_six_common_seeds_are_pairs():
    first, second = [0.5, 0.6, 0.7, 0.8, 0.9, 0.65], [0.45, 0.58, 0.66, 0.81, 0.85, 0.6]
    [one] = differences(two(first, second, seeds=range(6)))
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    signs = [fmean(s * gap for s, gap in zip(sign, gaps, strict=True)) for sign in product((1, -1), repeat=6)]
    assert one.paired
    assert one.p == pytest.approx(_both_tails(signs, fmean(gaps)))
    assert 0 < one.low < one.difference < one.high < 0.06  # of the gaps, not of the results
    [few] = differences(two(first[:5], second[:5], seeds=range(5)))
    assert not few.paired  # five pairs can never be below 5 %
    [others] = differences(two(first, second))
    assert not others.paired


def test_pairs_are_found_by_their_seeds():
    first, second = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.11, 0.21, 0.31, 0.41, 0.51, 0.61]
    rows = [row(model="a", seed=s, test=x) for s, x in enumerate(first)]
    rows += [row(model="b", seed=s, test=second[s]) for s in (5, 3, 1, 0, 2, 4)]
    [one] = differences(grouped(rows))
    assert one.paired
    assert one.p == pytest.approx(2 / 64)
    assert one.high - one.low < 1e-9  # each gap is the same


@pytest.mark.parametrize("n", [2, 3, 5])
def test_apart_as_far_as_can_be(n: int):
    [one] = differences(two([0.9 + i / 100 for i in range(n)], [0.1 + i / 100 for i in range(n)]))
    assert one.p == pytest.approx(2 / comb(2 * n, n)) == one.least_p
    assert least_p(n, n, paired=True) == 2 / 2**n


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_corrected_over_the_pairs_of_a_task_alone():
    models = {"a": (0.9, 0.91, 0.92, 0.93), "b": (0.5, 0.51, 0.52, 0.53), "c": (0.1, 0.11, 0.12, 0.13)}
    rows = [
        row(task=task, model=model, seed=seed, test=test)
        for task in ("t", "u")
        for model, tests in models.items()
        for seed, test in enumerate(tests)
    ]
    [sheet, _], found = sheets(grouped(rows))
    assert [one.corrected for one in found] == pytest.approx([6 / 70] * 6)
    assert [(line["first"], line["second"], line["p"], line["p (Holm)"]) for line in lines(sheet)] == [
        ("a", "b", "0.029", "0.086"),
        ("a", "c", "0.029", "0.086"),
        ("b", "c", "0.029", "0.086"),
    ]
    assert {line["difference (points)"] for line in lines(sheet)} <= {"40.00", "80.00", "40.0", "80.0"}
    assert sheet.notes[1] == "with so many seeds p can be 0.029 at the least, 0.086 after Holm's correction for 3 pairs"
    assert "too narrow" in sheet.notes[2]


def test_what_makes_p_too_small_is_said():
    rows = [row(model=model, seed=s // 2, name=str(s), test=s / 8) for model in ("a", "b") for s in range(3)]
    rows.append(row(model="a", seed=7, test=None, status="failed"))
    [sheet], _ = sheets(grouped(rows))
    assert sheet.notes[:3] == [
        "a: without the runs that have no result: 1 failed",
        "a: several runs of seed 0, which are no independent results",
        "b: several runs of seed 0, which are no independent results",
    ]


def test_too_few_or_no_numbers_are_said():
    rows = [*(row(model="a", seed=s) for s in (0, 1)), row(model="b"), row(model="c"), row(model="c", seed=1, test=nan)]
    [sheet], found = sheets(grouped(rows))
    assert (found, sheet.lines) == ([], [])
    assert sorted(sheet.notes) == [
        "no test of b: it takes two finished runs or more",
        "no test of c: a result is not finite",
    ]


def test_too_many_pairs_are_refused():
    rows = [row(model=str(i), seed=s) for i in range(46) for s in (0, 1)]
    with pytest.raises(OptionError, match=r"--significance=1,035 pairs: too many"):
        differences(grouped(rows))


def test_results_without_variance():
    [one] = differences(two([0.5, 0.5], [0.5, 0.5]))
    assert (one.p, one.low, one.high) == (1.0, 0.0, 0.0)
    [one] = differences(two([0.75, 0.75, 0.75], [0.5, 0.5, 0.5]))
    assert (one.p, one.low, one.high) == (pytest.approx(0.1), 0.25, 0.25)
