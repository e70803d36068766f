"""What the studies of linear dynamics train, one layer each, and what they train it on.

L length, C inputs, O outputs

All learners have about as many parameters as the STU with 25 filters per branch, 477. The STU, LRU and S5 are systems
of many inputs and outputs by themselves and map the inputs to the outputs directly. S4D has a system of its own in
every channel, and attention needs a width: each stands between two linear maps without bias.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.systems.lds import LDSData
from experiments.shared.banks import best_error, leading, responses, with_filters
from experiments.shared.fit import fit
from experiments.shared.grid import Cell, Row, Settings
from stu.backbone import Backbone
from stu.channel import MLP
from stu.mixers.attention import Attention
from stu.mixers.lru import LRU
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5
from stu.mixers.stu import STU

WIDTH = 3  # inputs and outputs of every system, as in the paper

SMALL: Settings = {"seeds": 2, "seq_len": 32, "lrs": [0.1], "samples": 20, "evaluated": 4}  # for smoke tests

Learner = Callable[[int, int], nn.Module]  # from the length of a sequence and the number of filters, if it has any


def stu(seq_len: int, num_filters: int, **options: Any) -> STU:
    """The STU of both branches with three input lags."""
    # algorithm: the faster one at this width
    return STU(WIDTH, seq_len=seq_len, num_filters=num_filters, algorithm="transfer", **options)


def transformer() -> nn.Module:
    """A pre-norm block of causal attention and an MLP, with sinusoidal positions."""
    attention, mlp = partial(Attention, num_heads=2, causal=True), partial(MLP, expand=2)
    options: dict[str, Any] = {"norm": "layer", "channel_residual": True, "positions": "sinusoidal"}
    return between(8, Backbone(8, depth=1, mixer=attention, channel_mixer=mlp, **options))


def between(width: int, layer: nn.Module) -> nn.Module:
    """Inputs → linear → layer → linear → outputs."""
    return nn.Sequential(nn.Linear(WIDTH, width, bias=False), layer, nn.Linear(width, WIDTH, bias=False))


LEARNERS: Mapping[str, Learner] = {
    "STU": partial(stu, k_y=0),
    "STU with y_{t−2}": partial(stu, k_y=2, recurrence="fixed"),  # the paper's, with coefficient I
    "STU with M^y": partial(stu, k_y=2, recurrence="learned"),  # the official code's
    "LRU": lambda *_: LRU(WIDTH, d_state=32),
    "LRU, λ itself learned": lambda *_: LRU(WIDTH, d_state=32, exponential=False),
    "LRU, no ring": lambda *_: LRU(WIDTH, d_state=32, ring=False),
    "LRU, not normalised": lambda *_: LRU(WIDTH, d_state=32, normalize=False),
    "LRU, ring to 0.9999": lambda *_: LRU(WIDTH, d_state=32, r_min=0.99, r_max=0.9999),
    "S4D": lambda *_: between(10, S4D(10, d_state=32)),
    "S5": lambda *_: S5(WIDTH, d_state=64, num_blocks=1),
    "Transformer": lambda *_: transformer(),
}


class Problem:
    """The system of a cell, with its training sequences, drawn on demand.

    cell: has seed, seq_len, samples, evaluated, delta and spectrum; d_state, if it is not 4; sector, the largest angle
    of complex eigenvalues in units of π, if it is not 1; noise, its standard deviation as a share of that of the
    outputs, if there is any. val, test: inputs and targets, (S, L, C) and (S, L, O), on which learning rates are
    chosen and errors are measured. Targets are divided by their expected root mean square, so that predicting zero has
    an error of 1.
    """

    def __init__(self, cell: Cell) -> None:
        counts = {"train": cell["samples"], "val": cell["evaluated"], "test": cell["evaluated"]}
        given = {key: cell[key] for key in ("seq_len", "spectrum", "seed", "d_state") if key in cell}
        self.data = self._system(cell, LDSData(radius=1 - cell["delta"], **given, **counts))
        if noise := cell.get("noise"):
            self.data = self._system(cell, replace(self.data, observation_noise=noise * self.data.scale))
        self.splits = self.data.splits()
        self.val, self.test = (tuple(map(torch.from_numpy, self.arrays(split))) for split in ("val", "test"))

    @staticmethod
    def _system(cell: Cell, data: LDSData) -> LDSData:
        """The same data of a system whose eigenvalues have smaller angles."""
        if (sector := cell.get("sector", 1)) != 1:
            modes = data.system.modes
            angles = (np.angle(modes) % (2 * np.pi) - np.pi) * sector
            vars(data)["system"] = replace(data.system, modes=np.abs(modes) * np.exp(1j * angles))  # is computed once
        return data

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Sequence `index`, alone in its batch: (1, L, C) and (1, L, O)."""
        inputs, targets = map(torch.from_numpy, self.splits.train[index])
        return inputs.unsqueeze(0), targets.unsqueeze(0)

    def arrays(self, split: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first sequences of a split, (S, L, C) and (S, L, O)."""
        sequences = getattr(self.splits, split)
        chosen = range(len(sequences) if count is None else count)
        inputs, targets = zip(*(sequences[i] for i in chosen), strict=True)
        return np.stack(inputs), np.stack(targets)


def error(module: nn.Module, sequences: tuple[Tensor, ...]) -> float:
    """Mean squared error over all steps and outputs, in units of the targets' expected variance."""
    inputs, targets = sequences
    return float(F.mse_loss(module(inputs), targets))


@torch.no_grad()
def impulse_response(module: nn.Module, length: int) -> np.ndarray:
    """The response to a unit impulse in each input, (L, O, C)."""
    impulses = F.pad(torch.eye(WIDTH).unsqueeze(1), (0, 0, 0, length - 1))
    return module(impulses).permute(1, 2, 0).double().numpy()


def learn(cell: Cell, learner: Learner) -> tuple[nn.Module, Problem, Row]:
    """Train a new module on every training sequence once. The row: test errors (`Curve`), the last validation error.

    cell: has lr and num_filters, and what `Problem` needs.
    """
    problem = Problem(cell)
    torch.manual_seed(cell["seed"])
    module = learner(cell["seq_len"], cell["num_filters"])
    test_error, steps = partial(error, sequences=problem.test), len(problem.splits.train)
    curve = fit(module, problem.sample, test_error, lr=cell["lr"], steps=steps, decay=0.5)
    with torch.no_grad():
        val = error(module, problem.val)
    return module, problem, {**curve._asdict(), "val": val}


def learn_with_filters(cell: Cell) -> Row:
    """Train an STU with the kind of filters that a cell names, without output recurrence."""
    bank = responses(cell["filters"], **{key: cell[key] for key in ("seq_len", "num_filters", "seed")})
    return learn(cell, lambda seq_len, num_filters: with_filters(stu(seq_len, num_filters, k_y=0), bank))[2]


def least_errors(cell: Cell, counts: Sequence[int], *, recurrence: int = 0) -> list[float]:
    """The least errors (`best_error`) for the first `counts` filters per branch of the kind that a cell names."""
    length = cell["seq_len"]
    truth = Problem({**cell, "samples": 1, "evaluated": 1}).data.system.impulse_response(length)
    bank = responses(cell["filters"], seq_len=length, num_filters=max(counts), seed=cell["seed"], recurrence=recurrence)
    return [best_error(leading(bank, count), truth) for count in counts]
