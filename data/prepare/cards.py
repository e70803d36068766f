"""Cards of data sets: sizes, lengths, inputs and targets of every split, counted and checked example by example.

n sequences, B batch, L length

Only the interface of `stu.task` is used. The examples go through the task's own `collate`, encoder, head and `scored`,
with d_model = 1, so that what is counted is what a model gets and is scored on.
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

from data.store.cache import tracked
from stu.task import Batch, Examples, Splits, Task

BATCH = 256
MOST_LABELS = 20  # more than these are not listed one by one
SHORT = 16  # digits of a fingerprint that are shown, as at the start of a run
COLUMNS = ("task", "train / val / test", "length", "targets of train", "trivial baselines", "fingerprint")


class InvalidData(ValueError):
    """Data that are not what their task promises."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn an error into `InvalidData` that says where it occurred."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InvalidData(f"{where}: {error}") from error


def check(condition: object, problem: str) -> None:
    """Raise `ValueError` unless `condition` holds."""
    if not condition:
        raise ValueError(problem)


@final
class Moments:
    """Mean, standard deviation and range of real numbers that come in parts."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.min, self.max = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        """Count values of any shape; raises `ValueError` unless they are finite."""
        low, high = (x.item() for x in values.aminmax())
        check(math.isfinite(low) and math.isfinite(high), "not all numbers are finite")
        self.min, self.max = min(self.min, low), max(self.max, high)
        self.count += values.numel()
        self.sum += values.sum(dtype=torch.float64).item()
        self.squares += values.double().square().sum().item()

    @property
    def mean(self) -> float:
        """The mean of all values so far."""
        return self.sum / self.count

    @property
    def std(self) -> float:
        """The standard deviation of all values so far."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2))


@final
class Counts:
    """How often each of 0, 1, 2, … occurs among integers that come in parts: `counts` (values,)."""

    def __init__(self, values: int = 0) -> None:
        self.counts = np.zeros(values, np.int64)

    def add(self, values: Tensor) -> None:
        """Count integers of any shape, none below 0."""
        more = torch.bincount(values.flatten(), minlength=len(self.counts)).numpy()
        more[: len(self.counts)] += self.counts
        self.counts = more

    @property
    def shares(self) -> NDArray[np.float64]:
        """The relative frequencies so far, (values,)."""
        return self.counts / self.counts.sum()


@dataclass(frozen=True)
class Split:
    """What is in one of the three data sets.

    lengths: (n,) of the sequences. inputs, targets: counts of tokens and labels, or moments of real numbers. repeats:
    examples whose inputs occurred before, in this split or in an earlier one.
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


def card_of(name: str, task: Task, rebuilt: Task) -> Card:
    """The card of prepared data; `rebuilt` is the same task from another constructor call. Raises `InvalidData`."""
    with reading("rebuilt"):
        check(task.fingerprint() == rebuilt.fingerprint(), "the fingerprint differs")
        pairs = list(zip(Splits._fields, task.datasets(), rebuilt.datasets(), strict=True))
    splits, known = {}, set[int]()
    for split, examples, same in pairs:
        with reading(split):
            check(len(examples) > 0, "there are no examples")
        splits[split] = read(task, examples, known, name, split)
        with reading(f"{split}, rebuilt"):
            first, second = (task.collate([x[0], x[len(examples) - 1]]) for x in (examples, same))
            check(all(map(torch.equal, first[:2], second[:2])), "the examples differ")
    return Card(name, task.fingerprint(), task.monitor, task.baselines(), splits)


def read(task: Task, examples: Examples, known: set[int], name: str, split: str) -> Split:
    """Check and count a split. known: digests of the inputs of earlier splits, to which those of this one are added."""
    reader = Reader(task, known)
    starts = range(0, len(examples), BATCH)
    with tracked(starts, f"{name} {split}, batches of {BATCH}", len(starts)) as stream:
        for start in stream:
            stop = min(start + BATCH, len(examples))
            with reading(f"{split}, examples {start:,} to {stop - 1:,}"):
                lengths = None if examples.lengths is None else examples.lengths[start:stop]
                reader.add(task.collate([examples[index] for index in range(start, stop)]), lengths)
    return Split(len(examples), np.concatenate(reader.lengths), repeats=reader.repeats, **reader.counters)


@final
class Reader:
    """Checks and counts the batches of one split."""

    def __init__(self, task: Task, known: set[int]) -> None:
        self.task, self.known, self.repeats = task, known, 0
        self.encoder, self.head = task.encoder(1), task.head(1).to("meta")
        self.lengths: list[NDArray[np.int64]] = []
        self.counters: dict[str, Counts | Moments] = {}

    @torch.inference_mode()
    def add(self, batch: Batch, stated: NDArray[np.integer] | None) -> None:
        """Count a batch. stated: (B,) lengths according to the data set. Raises `ValueError` for invalid data."""
        lengths = lengths_of(batch)  # (n,), n = B, or a multiple of it where an example is several sequences
        longest = self.task.seq_len
        check(lengths.min() > 0, "a sequence is empty")
        check(lengths.max() <= longest, f"a sequence has {lengths.max():,} steps, must have at most {longest:,}")
        if stated is not None and len(lengths) == len(batch.targets):
            check(np.array_equal(stated, lengths), "the sequences have other lengths than their data set says")
        self.lengths.append(lengths)

        prediction, targets = self.task.scored(self.predicted(batch), batch)
        classes = 0
        if not targets.is_floating_point():
            classes = prediction.shape[1]  # of predictions (n, classes, ...)
            low, high = (x.item() for x in targets.aminmax())
            check(low >= 0 and high < classes, f"labels are {low} to {high}, must be 0 to {classes - 1}")
        inputs = batch.inputs if batch.mask is None else batch.inputs[batch.mask]
        self.counters.setdefault("inputs", counter(inputs)).add(inputs)
        self.counters.setdefault("targets", counter(targets, classes)).add(targets)

        for digest in digests(batch, lengths):
            self.repeats += digest in self.known
            self.known.add(digest)

    def predicted(self, batch: Batch) -> Tensor:
        """Zeros in the shape of a prediction, without memory of their own: one per step and token may be too many.

        Raises `ValueError` for tokens that the encoder does not know.
        """
        try:
            encoded = self.encoder(batch.inputs)
        except IndexError:
            low, high = (x.item() for x in batch.inputs.aminmax())
            raise ValueError(f"tokens are {low} to {high}, which the encoder does not take") from None
        mask = None if batch.mask is None else batch.mask.to("meta")
        return torch.zeros(()).expand(self.head(encoded.to("meta"), mask).shape)  # "meta": a shape, without numbers


def lengths_of(batch: Batch) -> NDArray[np.int64]:
    """(n,) the number of real steps per row; raises `ValueError` unless all padding is on the right."""
    n, longest = batch.inputs.shape[:2]
    if batch.mask is None:
        return np.full(n, longest)
    lengths = batch.mask.sum(1)
    check(torch.equal(batch.mask, torch.arange(longest) < lengths[:, None]), "there is padding within a sequence")
    return lengths.numpy()


def counter(values: Tensor, classes: int = 0) -> Counts | Moments:
    """An empty counter for such values; labels are below `classes`."""
    return Moments() if values.is_floating_point() else Counts(classes)


def digests(batch: Batch, lengths: NDArray[np.int64]) -> list[int]:
    """(B,) hashes of the inputs of every example, without padding."""
    rows = [hash(row[:length].tobytes()) for row, length in zip(batch.inputs.numpy(), lengths, strict=True)]
    size = len(batch.targets)
    return [hash(tuple(rows[example::size])) for example in range(size)]


def rows_of(card: Card) -> list[tuple[str, list[str]]]:
    """The rows of the table of a card: titles, and one entry per split."""
    equal = len(np.unique(card.lengths)) == 1
    columns = [
        {
            "examples": f"{split.size:,}",
            "inputs seen before": f"{split.repeats:,}",
            **format_lengths(split.lengths, equal=equal),
            **format_inputs(split.inputs),
            **format_targets(split.targets),
        }
        for split in card.splits.values()
    ]
    return [(title, [column[title] for column in columns]) for title in columns[0]]


def format_lengths(lengths: NDArray[np.int64], *, equal: bool) -> dict[str, str]:
    """Title → entry; a single one where the sequences of all splits are equally long."""
    if equal:
        return {"length": f"{lengths[0]:,}"}
    low, below, median, above, high = np.quantile(lengths, (0, 0.05, 0.5, 0.95, 1))
    entries = {"min": low, "5 %": below, "median": median, "mean": lengths.mean(), "95 %": above, "max": high}
    return {f"length, {name}": f"{value:,.0f}" for name, value in entries.items()}


def format_inputs(inputs: Counts | Moments) -> dict[str, str]:
    """Title → entry."""
    if isinstance(inputs, Moments):
        return format_moments("inputs", inputs)
    return {"different tokens": f"{np.count_nonzero(inputs.counts):,}"}


def format_targets(targets: Counts | Moments) -> dict[str, str]:
    """Title → entry."""
    if isinstance(targets, Moments):
        return format_moments("targets", targets)
    shares = {f"label {label}": share for label, share in enumerate(targets.shares)}
    if len(shares) > MOST_LABELS:
        shares = {"rarest label": targets.shares.min(), "most frequent label": targets.shares.max()}
    return {title: percent(share) for title, share in shares.items()}


def format_moments(title: str, of: Moments) -> dict[str, str]:
    """Title → entry."""
    entries = {"mean": of.mean, "std": of.std, "min": of.min, "max": of.max}
    return {f"{title}, {name}": f"{value:.3f}" for name, value in entries.items()}


def format_baselines(card: Card) -> str:
    """The trivial baselines, in the monitored metric."""
    form = percent if card.monitor == "accuracy" else "{:.3g}".format
    return f"{', '.join(f'{name} {form(score)}' for name, score in card.baselines.items())} ({card.monitor})"


def percent(share: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * share:.1f} %"


def markdown(cards: Sequence[Card]) -> str:
    """A table with one line per card."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, cards)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(card: Card) -> list[str]:
    """A card in one line."""
    low, mean, high = card.lengths.min(), card.lengths.mean(), card.lengths.max()
    targets = card.splits["train"].targets
    if isinstance(targets, Counts):
        kind = f"{len(targets.counts)} labels, {percent(targets.shares.min())} to {percent(targets.shares.max())}"
    else:
        kind = f"reals, {targets.mean:.2f} ± {targets.std:.2f}"
    return [
        f"`{card.name}`",
        " / ".join(f"{split.size:,}" for split in card.splits.values()),
        f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {mean:,.0f}",
        kind,
        format_baselines(card),
        f"`{card.fingerprint[:SHORT]}`",
    ]
