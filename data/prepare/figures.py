"""Figures of data sets: images as such, classes as histograms of lengths and labels, real numbers as curves.

n sequences, L length, C channels of the input

Needs matplotlib, as in the extra `plot`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data.prepare.cards import MOST_LABELS, SHORT, Card, Counts
from stu.task import Task

IMAGES, ACROSS = 12, 4
CURVES = 3  # sequences drawn over time
BINS = 60


def draw(card: Card, task: Task, file: Path) -> None:
    """Write a figure of the data of `task` as PNG."""
    train = task.datasets().train
    if task.image_shape is not None:
        batch = task.collate([train[index] for index in range(min(IMAGES, len(train)))])
        figure = contact_sheet(batch.inputs.numpy(), batch.targets.numpy(), task.image_shape)
    elif isinstance(card.splits["train"].targets, Counts):
        figure = histograms(card)
    else:
        batch = task.collate([train[index] for index in range(min(CURVES, len(train)))])
        figure = curves(batch.inputs.numpy(), batch.targets.numpy())
    figure.suptitle(f"{card.name}, {card.fingerprint[:SHORT]}", fontsize="medium")
    figure.savefig(file, dpi=100)


def contact_sheet(inputs: np.ndarray, labels: np.ndarray, shape: tuple[int, int]) -> Figure:
    """Images (n, L) or (n, L, C), read row by row, each channel scaled from its minimum to its maximum."""
    images = inputs.reshape(len(inputs), *shape, -1).astype(np.float64)  # (n, rows, columns, C)
    low, high = images.min((0, 1, 2)), images.max((0, 1, 2))  # (C,)
    images = (images - low) / np.maximum(high - low, 1e-12)
    rows = math.ceil(len(images) / ACROSS)
    figure = Figure(figsize=(2.25 * ACROSS, 2.5 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, ACROSS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label in zip(axes.flat, images, labels, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"label {label}", fontsize="small")
    return figure


def histograms(card: Card) -> Figure:
    """The lengths of the sequences and the frequencies of the labels, by split."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shortest, longest = card.lengths.min(), card.lengths.max()
    width = (longest - shortest) // BINS + 1
    edges = np.arange(shortest, longest + width + 1, width) - 0.5
    for index, (name, split) in enumerate(card.splits.items()):
        found, _ = np.histogram(split.lengths, edges)
        left.stairs(found / len(split.lengths), edges, label=f"{name}: {split.size:,}")
        assert isinstance(split.targets, Counts)
        labels = np.arange(len(split.targets.counts))
        if len(labels) <= MOST_LABELS:
            right.bar(labels + 0.27 * (index - 1), split.targets.shares, width=0.25)
            right.set_xticks(labels)
        else:
            right.stairs(split.targets.shares, np.arange(len(labels) + 1) - 0.5)
    left.set(xlabel="length", ylabel="share of the sequences")
    right.set(xlabel="label", ylabel="share of the targets")
    left.legend()
    return figure


def curves(inputs: np.ndarray, targets: np.ndarray) -> Figure:
    """Inputs (n, L, C) of some sequences over time, and their targets: (n, L, O) below them, or (n,) above."""
    rows = [("inputs", inputs), ("targets", targets)][: targets.ndim]
    figure = Figure(figsize=(11, 2.5 * len(rows)), layout="constrained")
    axes: Any = figure.subplots(len(rows), len(inputs), sharex=True, sharey="row", squeeze=False)
    for row, (title, values) in zip(axes, rows, strict=True):
        row[0].set_ylabel(title)
        for axis, sequence in zip(row, values, strict=True):
            axis.plot(sequence, linewidth=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    if targets.ndim == 1:
        for axis, target in zip(axes[0], targets, strict=True):
            axis.set_title(f"target {target:.3g}", fontsize="small")
    return figure
