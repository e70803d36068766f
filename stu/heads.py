"""Heads: one prediction per sequence, per pair of sequences, or per step. All of them respect padding.

B batch, L length, D model width, O outputs
"""

from typing import Literal

import torch
from torch import Tensor, nn

from stu.errors import require
from stu.ops.padding import masked
from stu.ops.precision import at_least_float32
from stu.structure import Structured

Pool = Literal["mean", "first", "last"]


def pooled(x: Tensor, mask: Tensor | None, how: Pool = "mean") -> Tensor:
    """Reduce (B, L, D) to (B, D) over the real positions of `mask` (B, L): their mean, the first or the last."""
    if mask is None:
        return x.mean(1) if how == "mean" else x[:, 0 if how == "first" else -1]
    if how == "mean":
        total = masked(x, mask).sum(1, dtype=at_least_float32(x))
        return (total / mask.sum(1, keepdim=True).clamp_min(1)).to(x.dtype)
    position = mask.int().argmax(1) if how == "first" else mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,)
    return x[torch.arange(len(x), device=x.device), position]


class PooledHead(Structured):
    """Linear map of the pooled sequence, (B, L, D) → (B, O)."""

    structure = ("pool",)

    def __init__(self, d_model: int, *, d_output: int, pool: Pool = "mean") -> None:
        super().__init__()
        require(pool in ("mean", "first", "last"), "pool", pool, "must be mean, first or last")
        self.pool: Pool = pool
        self.linear = nn.Linear(d_model, d_output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, O)."""
        return self.linear(pooled(x, mask, self.pool))


class TwoTowerHead(Structured):
    """Compare two sequences encoded by one tower, (2B, L, D) → (B, O): row i with row B + i.

    Their pooled forms x₁ and x₂ give the features [x₁, x₂, x₁ ∘ x₂, x₁ − x₂], and these the prediction by two layers,
    4D → D and D → O, with a GELU between them.

    Sources: Tay et al., "Long Range Arena" (2011.04006), section 2.2, for the features; Gu et al., "Efficiently
    modeling long sequences with structured state spaces" (2111.00396), the code of which has these layers.
    """

    structure = ("pool",)

    def __init__(self, d_model: int, *, d_output: int, pool: Pool = "mean") -> None:
        super().__init__()
        require(pool in ("mean", "first", "last"), "pool", pool, "must be mean, first or last")
        self.pool: Pool = pool
        self.hidden = nn.Linear(4 * d_model, d_model)
        self.linear = nn.Linear(d_model, d_output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(2B, L, D) → (B, O)."""
        first, second = pooled(x, mask, self.pool).unflatten(0, (2, -1))  # (B, D) each
        features = torch.cat((first, second, first * second, first - second), dim=1)  # (B, 4D)
        return self.linear(nn.functional.gelu(self.hidden(features)))


class StepHead(Structured):
    """Linear map of every step, (B, L, D) → (B, L, O)."""

    structure = ("pool",)
    pool = "none"

    def __init__(self, d_model: int, *, d_output: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, O)."""
        return self.linear(x)
