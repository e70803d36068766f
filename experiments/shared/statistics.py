"""Rows of results, selected and summarised; null (None), which JSON has for what is not finite, is read as infinity."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.shared.grid import Row


def from_json(value: float | None) -> float:
    """A number of results.json: None is infinite."""
    return math.inf if value is None else value


def quartiles(values: Iterable[float | None]) -> list[float]:
    """Lower quartile, median and upper quartile, each one of the values: nothing is interpolated to infinity."""
    ordered = [from_json(value) for value in values]
    return [float(x) for x in np.quantile(ordered, [0.25, 0.5, 0.75], method="inverted_cdf")]


def median(values: Iterable[float | None]) -> float:
    """The middle one of the values, or the lower of the two."""
    return quartiles(values)[1]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of `key`, each once, in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def at_best_rate(rows: Sequence[Row]) -> list[Row]:
    """The rows with the learning rate whose median validation error is the smallest."""
    lr = min(distinct(rows, "lr"), key=lambda lr: median(row["val"] for row in select(rows, lr=lr)))
    return select(rows, lr=lr)


def final_error(row: Row) -> float:
    """The last error of a row that holds a `Curve`."""
    return from_json(row["errors"][-1])


def reached(row: Row, error: float) -> int | None:
    """The samples at the first checkpoint whose error is `error` or less; None where there is none."""
    counts = (count for count, value in zip(row["samples"], row["errors"], strict=True) if from_json(value) <= error)
    return next(counts, None)
