"""Recall: tokens that occurred earlier in the sequence are to be repeated at the steps that ask for them.

B batch, L length, V vocabulary, n sequences, R random numbers per sequence, K answers per sequence

Copying, selective copying, induction heads, associative recall and its multi-query form are one task with different
data, which the other files of this folder define.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassExactMatch

from data.store.synthetic import Integers, Reals, SyntheticData
from stu.encoders import TokenEncoder
from stu.heads import StepHead
from stu.preprocessing import Preprocessing, Tokens
from stu.task import Batch, Task

IGNORE = -100  # the target of a step where nothing is asked
BASELINE_TOKENS = 2**20  # read for the baselines at most, which takes a moment


@dataclass(frozen=True, kw_only=True)
class RecallData(SyntheticData):
    """Sequences of the tokens 0…V−1, all of which ask for the same number of answers."""

    vocab_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_memory(8 * self.vocab_size, "vocab_size")  # of one count of all tokens

    @property
    @abstractmethod
    def answers(self) -> range:
        """The tokens that can be asked for, all equally likely."""

    @property
    @abstractmethod
    def num_answers(self) -> int:
        """K."""

    @abstractmethod
    def generate(self, uniform: Reals) -> tuple[Integers, Integers]:
        """(n, R) → inputs and targets, (n, L) each; a target is the answer or, where nothing is asked, `IGNORE`."""


@final
class Recall(Task):
    """The right token at every step that asks for one; cross-entropy and accuracy over these steps alone."""

    monitor = "accuracy"
    mode = "max"

    data: RecallData

    def __init__(self, *, seq_len: int, causal: bool, data: RecallData) -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data)
        tokens = Tokens(data.vocab_size)
        self.preprocessing = Preprocessing(tokens, tokens)

    def baselines(self) -> dict[str, float]:
        """Test accuracies of a random answer, and of the answer that a sequence shows most often before it asks."""
        answers, test = self.data.answers, self.data.examples("test")
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
        """The steps that ask for an answer, in order: (B, V, K) and (B, K)."""
        asked = batch.targets != IGNORE  # (B, L), K in each row: indexing with it would synchronise with a GPU
        steps = asked.int().topk(self.data.num_answers, dim=1).indices.sort(dim=1).values  # (B, K)
        rows = torch.arange(len(steps), device=steps.device)[:, None]
        return prediction[rows, steps].mT, batch.targets[rows, steps]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the answers."""
        return nn.functional.cross_entropy(prediction.mT.flatten(0, 1), target.flatten())

    def metrics(self) -> dict[str, Metric]:
        """The share of correct answers, and of sequences whose answers are all correct."""
        classes = self.data.vocab_size
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "sequence_accuracy": ExactMatch(classes, validate_args=False),
        }


@final
class ExactMatch(MulticlassExactMatch):
    """The share of sequences whose answers are all correct; unlike its base, it does not make a GPU wait."""

    correct: Tensor
    total: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add some sequences, (B, V, K) and (B, K)."""
        self.correct += (preds.argmax(1) == target).all(1).sum()
        self.total += len(target)


def commonest(inputs: Integers, asked: NDArray[np.bool_], answers: range) -> Integers:
    """Which of `answers` each sequence (n, L) has most often before it asks, the first of several, (n,)."""
    before = ~np.logical_or.accumulate(asked, 1)
    counts = [np.bincount(row[b], minlength=answers.stop) for row, b in zip(inputs, before, strict=True)]
    return answers.start + np.stack(counts)[:, answers.start : answers.stop].argmax(1)
