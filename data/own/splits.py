"""Which sequence is in which split: by file, by a column, by groups, by time, or drawn at random by a seed.

n sequences
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.own import columns
from data.own.columns import Integers
from data.own.sources import UNDECIDED, Rows
from data.store.sources import split_named, stratified
from stu.errors import require
from stu.task import Splits

TRAIN, VAL, TEST = range(3)
UNUSED = 3
DRAWN = (TEST, VAL)  # the first does not depend on the size of the second


def by_column(rows: Rows, column: str) -> NDArray[np.int8]:
    """The split of every row, as a column says."""
    codes, names = columns.labels(rows, column)
    splits = [split_named(str(name)) for name in names]
    if (bad := next((code for code, split in enumerate(splits) if split is None), None)) is not None:
        row = int(np.flatnonzero(codes == bad)[0])
        rows.refuse(row, column, f"{names[bad]!r} is no split, must be train, val or test")
    return np.array([Splits._fields.index(str(split)) for split in splits], np.int8)[codes]


def missing(split: NDArray[np.int8]) -> list[int]:
    """The splits that are yet to be divided off, in the order in which they are."""
    return [one for one in DRAWN if not (split == one).any()]


def divided(
    split: NDArray[np.int8],
    sizes: Mapping[str, Any],
    *,
    seed: int,
    labels: Integers | None = None,
    groups: Integers | None = None,
    times: NDArray[Any] | None = None,
) -> NDArray[np.int8]:
    """Every sequence in a split: val and test, where no file and no column says which they are, are divided off train.

    sizes: of the splits, as fractions of the sequences that are not in another split or, from 1 on, as their number;
    what train leaves is `UNUSED`, nothing where its size is None.
    groups: (n,), no group is in two splits. times: (n,), the last are the test set, those before it the validation
    set. Otherwise drawn at random, of each of the labels (n,) in about its overall proportion.
    """
    split = np.where(split == UNDECIDED, TRAIN, split).astype(np.int8)
    wanted = missing(split)
    pool = np.flatnonzero(split == TRAIN)
    if times is not None:
        order = np.argsort(-np.unique(times[pool], return_inverse=True)[1], kind="stable")  # the latest first
    elif labels is not None and groups is None:
        order = stratified(labels[pool], seed)
    else:
        order = np.random.default_rng(seed).permutation(len(pool))
    unit = order if groups is None else _first_of_group(groups[pool], order)
    start = 0
    for one in wanted:
        name = Splits._fields[one]
        stop = start + _count(name, sizes[name], len(pool))
        require(stop < len(pool), name, sizes[name], f"leaves no sequence for train: there are {len(pool):,}")
        if groups is not None:
            stop = _end_of_group(groups[pool][unit], start, stop)
            require(stop < len(pool), name, sizes[name], "leaves no group for train")
        split[pool[unit[start:stop]]] = one
        start = stop
    if sizes["train"] is not None:
        split[pool[unit[start + _count("train", sizes["train"], len(pool)) :]]] = UNUSED
    return split


def cuts(lengths: Integers, sizes: Mapping[str, Any], split: NDArray[np.int8]) -> tuple[Integers, NDArray[np.int8]]:
    """Lengths (n, 3) of the parts of every series, and the splits of those that are not empty.

    Val and test, where no series is in them yet, are the ends of all that are not in another split.
    """
    pool = (split == UNDECIDED) | (split == TRAIN)
    pieces = np.zeros((len(lengths), len(Splits._fields)), np.int64)
    pieces[:, TRAIN] = lengths
    for one in missing(split):
        name = Splits._fields[one]
        pieces[pool, one] = [_count(name, sizes[name], int(length), "steps") for length in lengths[pool]]
        pieces[:, TRAIN] -= pieces[:, one]
        shortest = f"leaves no step of a series of {lengths[pool].min():,} for train"
        require(bool((pieces[:, TRAIN] > 0).all()), name, sizes[name], shortest)
    splits = np.tile(np.arange(len(Splits._fields), dtype=np.int8), (len(lengths), 1))
    splits[~pool, TRAIN] = split[~pool]
    return pieces, splits[pieces > 0]


def _count(name: str, size: float, of: int, what: str = "sequences") -> int:
    allowed = f"must be a fraction between 0 and 1, or a number of {what} below {of:,}"
    require(0 < size < 1 or (size >= 1 and size == int(size)), name, size, allowed)
    return max(1, round(size * of)) if size < 1 else int(size)


def _first_of_group(groups: Integers, order: Integers) -> Integers:
    """The order with the sequences of a group together, groups in the order of their first sequence."""
    rank = np.empty(groups.max() + 1, np.int64)
    ordered = groups[order]
    values, first = np.unique(ordered, return_index=True)
    rank[values] = first
    return order[np.argsort(rank[ordered], kind="stable")]


def _end_of_group(groups: Integers, start: int, stop: int) -> int:
    """The end of a group, of those after `start`, that is nearest to `stop`."""
    ends = np.append(np.flatnonzero(np.diff(groups)) + 1, len(groups))
    ends = ends[ends > start]
    return int(ends[np.abs(ends - stop).argmin()])
