"""What the studies of linear dynamics train, one layer each, and what they train it on.

L length, C inputs, O outputs

All learners have about as many parameters as the STU with 25 filters a branch, 477. The STU, LRU and S5 are systems of
many inputs and outputs by themselves and map the inputs to the outputs directly. S4D has a system of its own in every
channel, attention needs a width: each stands between two linear maps without bias.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.lds import LDSData
from experiments.study import Cell, Curve, fit
from stu.backbone import Backbone
from stu.channel import MLP
from stu.mixers.attention import Attention
from stu.mixers.lru import LRU
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5
from stu.mixers.stu import STU

WIDTH = 3  # inputs and outputs of every system, as in the paper

Learner = Callable[[int, int], nn.Module]  # of the length of a sequence and the number of filters, if it has any


def stu(seq_len: int, num_filters: int, **options: Any) -> STU:
    """The STU of both branches with three input lags."""
    return STU(WIDTH, seq_len=seq_len, num_filters=num_filters, algorithm="transfer", **options)  # faster so narrow


def lru(seq_len: int, num_filters: int, **options: Any) -> nn.Module:
    """The LRU of 32 complex states."""
    return LRU(WIDTH, d_state=32, **options)


def s4d(seq_len: int, num_filters: int) -> nn.Module:
    """S4D of ten channels with 16 modes each."""
    return between(10, S4D(10, d_state=32))


def s5(seq_len: int, num_filters: int) -> nn.Module:
    """S5 of 32 modes in one block."""
    return S5(WIDTH, d_state=64, num_blocks=1)


def transformer(seq_len: int, num_filters: int) -> nn.Module:
    """A pre-norm block of causal attention and an MLP, with sinusoidal positions."""
    block = Backbone(
        8,
        depth=1,
        mixer=partial(Attention, num_heads=2, causal=True),
        channel_mixer=partial(MLP, expand=2),
        channel_residual=True,
        positions="sinusoidal",
    )
    return between(8, block)


def between(width: int, layer: nn.Module) -> nn.Module:
    """Inputs → linear → layer → linear → outputs."""
    return nn.Sequential(nn.Linear(WIDTH, width, bias=False), layer, nn.Linear(width, WIDTH, bias=False))


LEARNERS: Mapping[str, Learner] = {
    "STU": partial(stu, k_y=0),
    "STU with y_{t−2}": partial(stu, k_y=2, recurrence="fixed"),  # the paper's, with coefficient I
    "STU with M^y": partial(stu, k_y=2, recurrence="learned"),  # the official code's
    "LRU": lru,
    "LRU, λ itself learned": partial(lru, exponential=False),
    "LRU, no ring": partial(lru, ring=False),
    "LRU, not normalised": partial(lru, normalize=False),
    "LRU, ring to 0.9999": partial(lru, r_min=0.99, r_max=0.9999),
    "S4D": s4d,
    "S5": s5,
    "Transformer": transformer,
}


class Problem:
    """One system with its training sequences, drawn as they are asked for, and two sets to measure errors on.

    Targets are divided by their expected root mean square, so 1 is the error of predicting zero.
    """

    def __init__(self, data: LDSData) -> None:
        self.data, self.splits = data, data.splits()

    @classmethod
    def of(cls, cell: Cell) -> "Problem":
        """That of a cell with seed, seq_len, samples, evaluated, delta and spectrum."""
        return cls(
            LDSData(
                seq_len=cell["seq_len"],
                spectrum=cell["spectrum"],
                radius=1 - cell["delta"],
                seed=cell["seed"],
                train=cell["samples"],
                val=cell["evaluated"],
                test=cell["evaluated"],
            )
        )

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Sequence `index`, alone in its batch: (1, L, C) and (1, L, O)."""
        inputs, targets = self.splits.train[index]
        return torch.from_numpy(inputs).unsqueeze(0), torch.from_numpy(targets).unsqueeze(0)

    def arrays(self, split: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first sequences of a split, (S, L, C) and (S, L, O)."""
        sequences = getattr(self.splits, split)
        chosen = range(len(sequences) if count is None else count)
        inputs, targets = zip(*(sequences[i] for i in chosen), strict=True)
        return np.stack(inputs), np.stack(targets)

    @cached_property
    def val(self) -> tuple[Tensor, Tensor]:
        """What learning rates are chosen on."""
        inputs, targets = self.arrays("val")
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """What is reported."""
        inputs, targets = self.arrays("test")
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def error(module: nn.Module, sequences: tuple[Tensor, Tensor]) -> float:
    """Mean squared error over all steps and outputs, in units of the targets' expected variance."""
    inputs, targets = sequences
    return float(F.mse_loss(module(inputs), targets))


def impulse_response(module: nn.Module, length: int) -> np.ndarray:
    """What a unit impulse in each input leads to, (L, O, C)."""
    impulses = torch.zeros(WIDTH, length, WIDTH)
    impulses[:, 0] = torch.eye(WIDTH)
    with torch.no_grad():
        response: np.ndarray = module(impulses).permute(1, 2, 0).double().numpy()
    return response


def train(module: nn.Module, problem: Problem, *, lr: float) -> dict[str, Any]:
    """Every training sequence once; the curve of test errors and the last validation error."""
    curve: Curve = fit(
        module,
        problem.sample,
        lambda trained: error(trained, problem.test),
        lr=lr,
        steps=len(problem.splits.train),
        decay=0.5,
    )
    with torch.no_grad():
        val = error(module, problem.val)
    return {**curve._asdict(), "val": val}


def learn(cell: Cell) -> tuple[nn.Module, Problem, dict[str, Any]]:
    """Train the learner of a cell with model, lr and num_filters, and what `Problem.of` wants."""
    problem = Problem.of(cell)
    torch.manual_seed(cell["seed"])
    module = LEARNERS[cell["model"]](cell["seq_len"], cell["num_filters"])
    return module, problem, train(module, problem, lr=cell["lr"])
