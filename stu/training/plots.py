"""Plots: arrays to matplotlib figures.

L length, C inputs, O outputs, K filters

What a figure shows, and so what it costs, does not grow with the task.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTPUTS = 3  # the first outputs, of which there may be many
STEPS = 200  # the last steps of a sequence
BANKS, CURVES = 3, 8  # different banks of filters, and the filters of each that are drawn as curves
POINTS = 400  # lags at which filters are sampled


def trajectories(targets: Sequence[np.ndarray], predicted: Sequence[np.ndarray]) -> "Figure":
    """Targets and predictions (L, O) of some sequences over their last steps, one row of axes per output."""
    rows = min(targets[0].shape[1], OUTPUTS)
    figure, axes = _axes(rows, len(targets), sharex="col", sharey="row")
    for column, (target, prediction) in enumerate(zip(targets, predicted, strict=True)):
        steps = np.arange(max(0, len(target) - STEPS), len(target))
        for output, axis in enumerate(axes[:, column]):
            axis.plot(steps, target[steps, output], linewidth=3, alpha=0.4, label="true")
            axis.plot(steps, prediction[steps, output], linewidth=0.7, color="black", label="predicted")
        error = np.square(target - prediction, dtype=np.float64).mean()
        axes[0, column].set_title(f"sequence {column}: mean squared error {error:.3g}", fontsize="small")
        axes[-1, column].set_xlabel("step")
    _label_rows(axes, [f"output {output}" for output in range(rows)])
    return figure


def impulse_responses(truth: np.ndarray, model: np.ndarray) -> "Figure":
    """Two impulse responses (L, O, C) over the lag, counted from 1 for the logarithmic axis."""
    rows, columns = min(truth.shape[1], OUTPUTS), truth.shape[2]
    figure, axes = _axes(rows, columns, sharex=True, sharey="row")
    lags = np.arange(1, len(truth) + 1)
    for (row, column), axis in np.ndenumerate(axes):
        axis.plot(lags, truth[:, row, column], linewidth=3, alpha=0.4, label="true")
        axis.plot(lags, model[:, row, column], linewidth=0.7, color="black", label="model")
        _over_lags(axis)
    size = np.maximum(np.linalg.norm(truth, axis=(0, 1)), np.finfo(float).tiny)  # (C,)
    errors = np.linalg.norm(model - truth, axis=(0, 1)) / size
    for column, error in enumerate(errors):
        axes[0, column].set_title(f"input {column}: relative error {error:.3g}", fontsize="small")
        axes[-1, column].set_xlabel("lag + 1")
    _label_rows(axes, [f"output {output}" for output in range(rows)])
    return figure


def filters(banks: Sequence[Tensor]) -> "Figure":
    """Banks of filters (L, K), one row of axes each: the first as curves, and the magnitude of all, over the lag."""
    drawn = banks[:BANKS]
    figure, axes = _axes(len(drawn), 2, width=5.5, gap=0.4)
    for bank, (left, right) in zip(drawn, axes, strict=True):
        length, count = bank.shape
        lags = np.unique(np.geomspace(1, length, min(length, POINTS)).round().astype(int))
        values = bank.double().cpu().numpy()[lags - 1]  # (points, K)
        magnitude = np.abs(values) / np.maximum(np.abs(values).max(0), np.finfo(float).tiny)
        left.plot(lags, values[:, :CURVES], linewidth=0.9)
        left.set_ylabel(f"the first {min(count, CURVES)} of {count} filters")
        image = right.pcolormesh(lags, np.arange(count), magnitude.T, vmin=0, vmax=1, shading="nearest")
        right.set_ylabel("filter")
        figure.colorbar(image, ax=right, label="magnitude / maximum")
        for axis in (left, right):
            _over_lags(axis)
            axis.set_xlabel("lag + 1")
    return figure


def lengths(metric: str, values: Mapping[int, float], trained: int) -> "Figure":
    """A metric of the test against the length of the sequences, and a line at that of training."""
    figure, axes = _axes(1, 1, width=5.5)
    axis = axes[0, 0]
    axis.plot(*zip(*sorted(values.items()), strict=True), marker="o", markersize=4)
    axis.axvline(trained, linewidth=0.7, color="black", linestyle="--")
    _over_lags(axis)
    axis.set(xlabel="length (dashed: of training)", ylabel=f"test {metric}")
    return figure


def _axes(rows: int, columns: int, *, width: float = 3.7, gap: float = 0.15, **sharing: Any) -> "tuple[Figure, Any]":
    """A figure and its axes, (rows, columns), `width` inches each with the gap to the next."""
    from matplotlib.figure import Figure  # slow to import, and optional

    # Fixed margins: matplotlib's own layout takes three times as long.
    left, right, bottom, top, height = 0.9, 0.2, 0.5, 0.6, 1.8
    size = width * columns + left + right, height * rows + bottom + top
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False, **sharing)
    figure.subplots_adjust(left / size[0], bottom / size[1], 1 - right / size[0], 1 - top / size[1])
    figure.subplots_adjust(wspace=gap, hspace=gap)
    return figure, axes


def _over_lags(axis: Any) -> None:
    """A logarithmic axis with ticks at the powers of ten alone: each tick costs time."""
    axis.set_xscale("log")
    axis.minorticks_off()


def _label_rows(axes: Any, names: Iterable[str]) -> None:
    """Label each row at its left, and the curves in the first axes."""
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    axes[0, 0].legend(fontsize="small", loc="upper right")
