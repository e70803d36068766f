"""Trees of ListOps: nested operations on digits, drawn at random, evaluated, and written as tokens.

n trees, N nodes on one level of many trees, T tokens of many trees

Sources: Nangia and Bowman, "ListOps" (1804.06028); Tay et al., "Long Range Arena" (2011.04006), whose generator this
one follows in distribution.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DIGITS = tuple("0123456789")
VOCABULARY = ("<pad>", *DIGITS, "[MIN", "[MAX", "[MED", "[SM", "]")  # a token is an index into this
ZERO, MIN, MAX, MED, SM, CLOSE = (VOCABULARY.index(s) for s in ("0", "[MIN", "[MAX", "[MED", "[SM", "]"))

ROOTS = 4096  # trees drawn per round; the official bounds keep about 340 of them
ODDS = 4  # one node in four is an operator, except on the last level
PATIENCE = 64  # rounds over which the share of new trees is judged

Tokens = NDArray[np.uint8]
Integers = NDArray[np.int64]
Tree = tuple[bytes, int]  # one byte per token, and the value


class Bounds(NamedTuple):
    """Which trees are drawn and kept; both lengths are exclusive."""

    min_length: int
    max_length: int
    max_depth: int
    max_args: int


class Level(NamedTuple):
    """One level of many trees; the children of its nodes are the next level, in the same order.

    arity: (N,) number of children, 0 for a digit. symbols: (N,) tokens of the operators and digits.
    """

    arity: Integers
    symbols: Tokens


def distinct_trees(seed: int, bounds: Bounds) -> Iterator[Tree]:
    """Random trees, all different; ends when hardly any new ones appear.

    Round k is drawn from (seed, k) alone, so it can be repeated without the rounds before it.
    """
    seen: set[bytes] = set()
    fresh: deque[int] = deque(maxlen=PATIENCE)
    for number in count():
        known = len(seen)
        for tree in draw_trees(np.random.default_rng([seed, number]), bounds):
            if (key := digest(tree)) not in seen:
                seen.add(key)
                yield tree
        fresh.append(len(seen) - known)
        if len(fresh) == PATIENCE and 1000 * sum(fresh) <= len(seen):
            return


def digest(tree: Tree) -> bytes:
    """What stands for the tokens of a tree where many are compared."""
    return hashlib.blake2b(tree[0], digest_size=16).digest()


def value_of(tokens: bytes) -> int:
    """The value of one tree, read token by token. Raises `ValueError` where the tokens are no tree."""
    values: list[list[int]] = [[]]  # of the arguments so far: of the root, then of every open operator
    operators: list[int] = []
    for token in tokens:
        if token < MIN:
            values[-1].append(token - ZERO)
        elif token < CLOSE:
            operators.append(token)
            values.append([])
        else:
            arguments = values.pop()
            if not (operators and arguments):
                raise ValueError("a bracket closes nothing")
            values[-1].append(applied_to(operators.pop(), arguments))
    if operators or len(values[0]) != 1:
        raise ValueError(f"{len(operators)} open brackets and {len(values[0])} values, must be 0 and 1")
    return values[0][0]


def applied_to(operator: int, arguments: list[int]) -> int:
    """What `applied` computes for many nodes, for one."""
    if operator == SM:
        return sum(arguments) % 10
    ordered = sorted(arguments)
    low, high = {MIN: (0, 0), MAX: (-1, -1), MED: ((len(ordered) - 1) // 2, len(ordered) // 2)}[operator]
    return (ordered[low] + ordered[high]) // 2


def draw_trees(random: np.random.Generator, bounds: Bounds) -> Iterator[Tree]:
    """Those of `ROOTS` random trees whose length is within the bounds."""
    arities, lengths = grow(random, bounds)
    kept = (bounds.min_length < lengths) & (lengths < bounds.max_length)
    levels = with_symbols(random, arities, kept)
    tokens, evaluated = serialized(levels).tobytes(), values(levels)
    stop = 0
    for length, value in zip(lengths[kept].tolist(), evaluated.tolist(), strict=True):
        start, stop = stop, stop + length
        yield tokens[start:stop], value


def grow(random: np.random.Generator, bounds: Bounds) -> tuple[list[Integers], Integers]:
    """The shapes of `ROOTS` trees: arities (N,) level by level, and lengths (n,) in tokens.

    A tree that is already too long stops growing, which bounds the memory.
    """
    tree = np.arange(ROOTS)  # (N,), the tree of every node
    lengths = np.ones(ROOTS, np.int64)
    arities = []
    for _ in range(bounds.max_depth - 1):
        if not len(tree):  # nothing grows any more
            break
        draw = random.integers(ODDS * (bounds.max_args - 1), size=len(tree))
        arity = np.where(draw < bounds.max_args - 1, draw + 2, 0)
        operator = np.flatnonzero(arity)
        lengths += np.bincount(tree[operator], arity[operator] + 1, ROOTS).astype(np.int64)  # children and a bracket
        arity[lengths[tree] >= bounds.max_length] = 0
        arities.append(arity)
        tree = np.repeat(tree, arity)
    return [*arities, np.zeros(len(tree), np.int64)], lengths


def grown_bytes(bounds: Bounds) -> float:
    """About the memory that `grow` takes: several numbers for every node of its trees."""
    branching = (bounds.max_args + 2) / 2 / ODDS  # children of a node, on average
    nodes, level = 1.0, 1.0
    for _ in range(min(bounds.max_depth, 2**10)):
        level *= branching
        nodes += level
        if nodes > bounds.max_length:
            break
    return 48 * ROOTS * min(nodes, bounds.max_length)


def with_symbols(random: np.random.Generator, arities: list[Integers], kept: NDArray[np.bool_]) -> list[Level]:
    """The trees whose root is `kept` (n,), with operators and digits drawn for their nodes."""
    levels = []
    for arity in arities:
        arity, kept = arity[kept], np.repeat(kept, arity)
        draw = random.integers(20, size=len(arity), dtype=np.uint8)  # 20: a multiple of 4 operators and 10 digits
        levels.append(Level(arity, np.where(arity > 0, MIN + draw % 4, ZERO + draw % 10).astype(np.uint8)))
    return levels


def run_sums(x: np.ndarray, counts: Integers) -> Integers:
    """Sums over consecutive runs of `x`, whose lengths are `counts`."""
    total = np.append(0, np.cumsum(x, dtype=np.int64))
    stop = counts.cumsum()
    return total[stop] - total[stop - counts]


def values(levels: list[Level]) -> Tokens:
    """The values of the trees, (n,), from the leaves up."""
    value = levels[-1].symbols - ZERO
    for level in reversed(levels[:-1]):
        value = applied(level, value)
    return value


def applied(level: Level, children: Tokens) -> Tokens:
    """The values (N,) of the nodes of one level, given those of all their children.

    MED is the median rounded down, SM the sum modulo 10.
    """
    nodes = np.flatnonzero(level.arity)
    arity, operator = level.arity[nodes], level.symbols[nodes]
    parent = np.repeat(np.arange(len(nodes)), arity)
    ordered = np.sort(parent * 16 + children) % 16  # the children of each node, ascending
    low = np.select([operator == MIN, operator == MAX], [0, arity - 1], (arity - 1) // 2)
    high = np.where(operator == MED, arity // 2, low)
    first = arity.cumsum() - arity
    middle = (ordered[first + low] + ordered[first + high]) // 2
    value = level.symbols - ZERO
    value[nodes] = np.where(operator == SM, run_sums(children, arity) % 10, middle)
    return value


def serialized(levels: list[Level]) -> Tokens:
    """The tokens of the trees, (T,), one tree after the other."""
    sizes = [np.ones(len(levels[-1].arity), np.int64)]  # tokens of the subtree of every node
    for arity, _ in reversed(levels[:-1]):
        sizes.insert(0, 1 + (arity > 0) + run_sums(sizes[0], arity))
    tokens = np.empty(sizes[0].sum(), np.uint8)
    start = sizes[0].cumsum() - sizes[0]
    for level, size, child in zip(levels[:-1], sizes[:-1], sizes[1:], strict=True):
        nodes = np.flatnonzero(level.arity)
        tokens[start] = level.symbols
        tokens[(start + size)[nodes] - 1] = CLOSE
        arity = level.arity[nodes]
        before = child.cumsum() - child  # tokens of the earlier subtrees on the level of the children
        first = arity.cumsum() - arity
        start = before + np.repeat(start[nodes] + 1 - before[first], arity)
    tokens[start] = levels[-1].symbols
    return tokens
