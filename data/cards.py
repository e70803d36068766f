"""Cards of data sets: sizes, lengths, inputs and targets of every split, counted and checked example by example.

n sequences, B batch, L length

A task is asked for nothing but what `stu.task` promises. Its examples go through its own `collate`, encoder, head and
`scored`, all one wide, so that what is counted is what a model gets and is judged by.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.cache import tracked
from stu.heads import StepHead
from stu.task import Batch, Examples, Splits, Task

BATCH = 256
MOST_LABELS = 20  # that are listed one by one
SHORT = 16  # digits of a fingerprint that tell data apart, as at the start of a run
COLUMNS = ("task", "train / val / test", "length", "targets of train", "no achievement", "fingerprint")


class Faulty(ValueError):
    """Data that are not what their task promises."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Say where it was that data could not be read, or were not as they must be."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Faulty(f"{where}: {error}") from error


def insist(condition: object, what: str) -> None:
    """Raise `ValueError` unless `condition` holds."""
    if not condition:
        raise ValueError(what)


@final
class Moments:
    """Mean, deviation and range of real numbers that come in parts."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.least, self.greatest = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        """Of any shape; raises `ValueError` where they are not finite."""
        least, greatest = (x.item() for x in values.aminmax())
        insist(math.isfinite(least) and math.isfinite(greatest), "not all numbers are finite")
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        self.count += values.numel()
        self.sum += values.sum(dtype=torch.float64).item()
        self.squares += values.double().square().sum().item()

    @property
    def mean(self) -> float:
        """Of all so far."""
        return self.sum / self.count

    @property
    def deviation(self) -> float:
        """Of all so far, from their mean."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2))


@final
class Counts:
    """How often each of the numbers 0, 1, 2, … occurs among those that come in parts: `times` (values,)."""

    def __init__(self, values: int = 0) -> None:
        self.times = np.zeros(values, np.int64)

    def add(self, values: Tensor) -> None:
        """Of any shape, none below 0."""
        more = torch.bincount(values.flatten(), minlength=len(self.times)).numpy()
        more[: len(self.times)] += self.times
        self.times = more

    @property
    def shares(self) -> NDArray[np.float64]:
        """(values,) of all so far."""
        return self.times / self.times.sum()


@dataclass(frozen=True)
class Split:
    """What is in one of the three data sets.

    lengths: (n,) of the sequences. inputs, targets: counts of tokens and labels, or moments of reals. repeats: examples
    whose inputs came before, in this split or in an earlier one.
    """

    size: int
    lengths: NDArray[np.int64]
    inputs: Counts | Moments
    targets: Counts | Moments
    repeats: int


@dataclass(frozen=True)
class Card:
    """What is known of the data of a task. monitor: the metric of the baselines."""

    name: str
    fingerprint: str
    monitor: str
    baselines: dict[str, float]
    splits: dict[str, Split]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) of the sequences of all splits."""
        return np.concatenate([split.lengths for split in self.splits.values()])


def card_of(name: str, task: Task, again: Task) -> Card:
    """The card of prepared data; `again` is the same task, made anew. Raises `Faulty`."""
    with reading("made anew"):
        insist(task.fingerprint() == again.fingerprint(), "the fingerprint is another")
        pairs = list(zip(Splits._fields, task.datasets(), again.datasets(), strict=True))
    splits, known = {}, set[int]()
    for split, examples, same in pairs:
        with reading(split):
            insist(len(examples) > 0, "there are no examples")
        splits[split] = read(task, examples, known, name, split)
        with reading(f"{split}, made anew"):
            first, second = (task.collate([x[0], x[len(examples) - 1]]) for x in (examples, same))
            insist(all(map(torch.equal, first[:2], second[:2])), "the examples are others")
    return Card(name, task.fingerprint(), task.monitor, task.baselines(), splits)


def read(task: Task, examples: Examples, known: set[int], name: str, split: str) -> Split:
    """Check and count a split. known: digests of the inputs of earlier splits; those of this one are added."""
    reader = Reader(task, known)
    starts = range(0, len(examples), BATCH)
    with tracked(starts, f"{name} {split}, batches of {BATCH}", len(starts)) as stream:
        for start in stream:
            stop = min(start + BATCH, len(examples))
            with reading(f"{split}, examples {start:,} to {stop - 1:,}"):
                named = None if examples.lengths is None else examples.lengths[start:stop]
                reader.add(task.collate([examples[index] for index in range(start, stop)]), named)
    return reader.result(len(examples))


@final
class Reader:
    """Checks and counts the batches of one split."""

    def __init__(self, task: Task, known: set[int]) -> None:
        self.task, self.known, self.repeats = task, known, 0
        self.encoder, self.head = task.encoder(1), task.head(1)
        self.lengths: list[NDArray[np.int64]] = []
        self.counters: dict[str, Counts | Moments] = {}

    @torch.inference_mode()
    def add(self, batch: Batch, named: NDArray[np.integer] | None) -> None:
        """Count a batch. named: (B,) the lengths that the data set has for it. Raises `ValueError` for a faulty one."""
        lengths = lengths_of(batch)  # (n,), n = B, or a multiple where an example is several sequences
        allowed = self.task.seq_len
        insist(lengths.min() > 0, "a sequence is empty")
        insist(lengths.max() <= allowed, f"a sequence has {lengths.max():,} steps, must have at most {allowed:,}")
        if named is not None and len(lengths) == len(batch.targets):
            insist(np.array_equal(named, lengths), "the sequences have other lengths than their data set says")
        self.lengths.append(lengths)

        prediction, targets = self.task.scored(self.predicted(batch), batch)
        classes = 0
        if not targets.is_floating_point():
            classes = prediction.shape[1]  # of predictions (n, classes, ...)
            least, most = (x.item() for x in targets.aminmax())
            insist(least >= 0 and most < classes, f"labels are {least} to {most}, must be 0 to {classes - 1}")
        inputs = batch.inputs if batch.mask is None else batch.inputs[batch.mask]
        self.counters.setdefault("inputs", counter(inputs)).add(inputs)
        self.counters.setdefault("targets", counter(targets, classes)).add(targets)

        for digest in digests(batch, lengths):
            self.repeats += digest in self.known
            self.known.add(digest)

    def predicted(self, batch: Batch) -> Tensor:
        """What has the shape of a prediction; of numbers for every step and token, which may be many, only that."""
        features = self.encoded(batch.inputs)
        if isinstance(self.head, StepHead):
            return features.new_zeros(()).expand(*features.shape[:2], self.head.linear.out_features)
        return self.head(features, batch.mask)

    def encoded(self, inputs: Tensor) -> Tensor:
        """What the encoder makes of inputs (n, L, …) that it knows."""
        try:
            return self.encoder(inputs)
        except IndexError:
            least, greatest = (x.item() for x in inputs.aminmax())
            raise ValueError(f"tokens are {least} to {greatest}, which the encoder does not take") from None

    def result(self, size: int) -> Split:
        """All that was counted."""
        return Split(size, np.concatenate(self.lengths), repeats=self.repeats, **self.counters)


def lengths_of(batch: Batch) -> NDArray[np.int64]:
    """(n,) how many steps of every row are real; what is not is on the right, or a `ValueError` is raised."""
    n, longest = batch.inputs.shape[:2]
    if batch.mask is None:
        return np.full(n, longest)
    lengths = batch.mask.sum(1)
    insist(torch.equal(batch.mask, torch.arange(longest) < lengths[:, None]), "there is padding within a sequence")
    return lengths.numpy()


def counter(values: Tensor, classes: int = 0) -> Counts | Moments:
    """What such values are counted with; labels are below `classes`."""
    return Moments() if values.is_floating_point() else Counts(classes)


def digests(batch: Batch, lengths: NDArray[np.int64]) -> list[int]:
    """(B,) hashes of the inputs of every example, without padding."""
    rows = [hash(row[:length].tobytes()) for row, length in zip(batch.inputs.numpy(), lengths, strict=True)]
    size = len(batch.targets)
    return [hash(tuple(rows[example::size])) for example in range(size)]


def rows_of(card: Card) -> list[tuple[str, list[str]]]:
    """What a card says of its splits: titles, and an entry for each of them."""
    alike = len(np.unique(card.lengths)) == 1
    columns = [
        {
            "examples": f"{split.size:,}",
            "inputs seen before": f"{split.repeats:,}",
            **lengths_in_words(split.lengths, alike),
            **inputs_in_words(split.inputs),
            **targets_in_words(split.targets),
        }
        for split in card.splits.values()
    ]
    return [(title, [column[title] for column in columns]) for title in columns[0]]


def lengths_in_words(lengths: NDArray[np.int64], alike: bool) -> dict[str, str]:
    """Title → entry; one where the sequences of all splits are equally long."""
    if alike:
        return {"length": f"{lengths[0]:,}"}
    least, low, median, high, greatest = np.quantile(lengths, (0, 0.05, 0.5, 0.95, 1))
    entries = {
        "least": least, "5 %": low, "median": median, "mean": lengths.mean(), "95 %": high, "greatest": greatest,
    }  # fmt: skip
    return {f"length, {name}": f"{value:,.0f}" for name, value in entries.items()}


def inputs_in_words(inputs: Counts | Moments) -> dict[str, str]:
    """Title → entry."""
    if isinstance(inputs, Moments):
        return moments_in_words("inputs", inputs)
    return {"different tokens": f"{np.count_nonzero(inputs.times):,}"}


def targets_in_words(targets: Counts | Moments) -> dict[str, str]:
    """Title → entry."""
    if isinstance(targets, Moments):
        return moments_in_words("targets", targets)
    shares = {f"label {label}": share for label, share in enumerate(targets.shares)}
    if len(shares) > MOST_LABELS:
        shares = {"rarest label": targets.shares.min(), "most frequent label": targets.shares.max()}
    return {title: percent(share) for title, share in shares.items()}


def moments_in_words(title: str, of: Moments) -> dict[str, str]:
    """Title → entry."""
    entries = {"mean": of.mean, "deviation": of.deviation, "least": of.least, "greatest": of.greatest}
    return {f"{title}, {name}": f"{value:.3f}" for name, value in entries.items()}


def baselines_in_words(card: Card) -> str:
    """What needs no model, in the monitored metric."""
    form = percent if card.monitor == "accuracy" else "{:.3g}".format
    return f"{', '.join(f'{name} {form(score)}' for name, score in card.baselines.items())} ({card.monitor})"


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.1f} %"


def markdown(cards: Sequence[Card]) -> str:
    """A table with a line for each card."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, cards)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(card: Card) -> list[str]:
    """A card in one line."""
    least, mean, greatest = card.lengths.min(), card.lengths.mean(), card.lengths.max()
    targets = card.splits["train"].targets
    if isinstance(targets, Counts):
        kind = f"{len(targets.times)} labels, {percent(targets.shares.min())} to {percent(targets.shares.max())}"
    else:
        kind = f"reals, {targets.mean:.2f} ± {targets.deviation:.2f}"
    return [
        f"`{card.name}`",
        " / ".join(f"{split.size:,}" for split in card.splits.values()),
        f"{least:,}" if least == greatest else f"{least:,} to {greatest:,}, mean {mean:,.0f}",
        kind,
        baselines_in_words(card),
        f"`{card.fingerprint[:SHORT]}`",
    ]
