"""Recall: tokens that occurred earlier in the sequence are to be said again, at the steps where they are asked for.

B batch, L length, V vocabulary, n sequences, R random numbers for each, K answers in each

Copying, selective copying, induction heads, associative recall and its multi-query form are one task with different
data: files beside this one.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassExactMatch

from data.synthetic import Example, Integers, Reals, SyntheticData, collate
from stu.encoders import TokenEncoder
from stu.errors import require
from stu.heads import StepHead
from stu.task import Batch, Splits, Task

IGNORE = -100  # the target of a step where nothing is asked
BASELINE_TOKENS = 2**20  # counted at most, which takes a moment


@dataclass(frozen=True, kw_only=True)
class RecallData(SyntheticData):
    """Sequences of the tokens 0…V−1, which all ask for the same number of answers."""

    vocab_size: int

    @property
    @abstractmethod
    def answers(self) -> range:
        """The tokens that can be asked for, all equally likely."""

    @abstractmethod
    def make(self, uniform: Reals) -> tuple[Integers, Integers]:
        """(n, R) → inputs and targets, (n, L) each; a target is the answer or, where nothing is asked, `IGNORE`."""


@final
class Recall(Task):
    """The right token at every step where one is asked for; cross-entropy and accuracy over these steps alone."""

    monitor = "accuracy"
    mode: Literal["min", "max"] = "max"

    def __init__(self, *, seq_len: int, causal: bool, data: RecallData) -> None:
        require(seq_len == data.seq_len, "seq_len", seq_len, f"must be the data's, {data.seq_len}")
        self.seq_len, self.causal, self.data = seq_len, causal, data

    def prepare(self) -> None:
        """Nothing is stored, and the data have checked their options."""

    def datasets(self) -> Splits:
        """(L,) int64 tokens and (L,) int64 targets, computed on demand."""
        return self.data.splits()

    def fingerprint(self) -> str:
        """SHA-256, cut, of the options and the version of the generator."""
        return self.data.fingerprint()

    def baselines(self) -> dict[str, float]:
        """Accuracies of any answer and, on the test split, of the one that a sequence has most often before it asks."""
        answers, test = self.data.answers, self.data.split("test")
        count = min(len(test), max(1, BASELINE_TOKENS // max(self.seq_len, self.data.vocab_size)))
        inputs, targets = test.stacked(range(count))
        asked = targets != IGNORE
        right = targets == commonest(inputs, asked, answers)[:, None]  # (n, L)
        return {"chance": 1 / len(answers), "commonest": float(right[asked].mean())}

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L) → (B, L, d_model)."""
        return TokenEncoder(d_model, vocab_size=self.data.vocab_size)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, L, V)."""
        return StepHead(d_model, d_output=self.data.vocab_size)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is asked of every sequence: (B, V, K) and (B, K)."""
        asked = batch.targets != IGNORE  # (B, L), K in each row
        rows = (len(asked), -1)
        return prediction[asked].unflatten(0, rows).mT, batch.targets[asked].unflatten(0, rows)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the answers."""
        return nn.functional.cross_entropy(prediction.mT.flatten(0, 1), target.flatten())

    def metrics(self) -> dict[str, Metric]:
        """The share of right answers, and of sequences with right answers only."""
        classes = self.data.vocab_size
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "sequence_accuracy": MulticlassExactMatch(classes),
        }

    def collate(self, examples: Sequence[Example]) -> Batch:
        """No padding: all sequences are equally long."""
        return collate(examples)


def commonest(inputs: Integers, asked: NDArray[np.bool_], answers: range) -> Integers:
    """The one of `answers` that each sequence (n, L) has most often before it asks, the first of several, (n,)."""
    before = ~np.logical_or.accumulate(asked, 1)
    counts = [np.bincount(row[b], minlength=answers.stop) for row, b in zip(inputs, before, strict=True)]
    return answers.start + np.stack(counts)[:, answers.start : answers.stop].argmax(1)
