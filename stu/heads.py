"""Ways out: one answer a sequence, or one a step. All of them know which positions are real.

B batch, L length, D model width, O outputs
"""

from typing import Literal

import torch
from torch import Tensor, nn

from stu.errors import require

Pool = Literal["mean", "first", "last"]


def pooled(x: Tensor, mask: Tensor | None, how: Pool = "mean") -> Tensor:
    """Reduce (B, L, D) to (B, D) over the real positions of `mask` (B, L): their mean, the first or the last."""
    if how == "first":
        first = x.new_zeros(len(x), dtype=torch.long) if mask is None else mask.int().argmax(1)  # (B,)
        return x[torch.arange(len(x), device=x.device), first]
    if how == "last":
        if mask is None:
            return x[:, -1]
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,)
        return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
    if mask is None:
        return x.mean(1)
    weight = mask.unsqueeze(-1).to(x.dtype)  # (B, L, 1)
    # where, not times: a padded position may hold inf or nan
    return x.where(mask.unsqueeze(-1), x.new_zeros(())).sum(1) / weight.sum(1).clamp_min(1)


class PooledHead(nn.Module):
    """Linear map of the pooled sequence, (B, L, D) → (B, O)."""

    def __init__(self, d_model: int, *, d_output: int, pool: Pool = "mean") -> None:
        super().__init__()
        require(pool in ("mean", "first", "last"), "pool", pool, "must be mean, first or last")
        self.pool: Pool = pool
        self.linear = nn.Linear(d_model, d_output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, O)."""
        return self.linear(pooled(x, mask, self.pool))


class StepHead(nn.Module):
    """Linear map of every step, (B, L, D) → (B, L, O)."""

    def __init__(self, d_model: int, *, d_output: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, O)."""
        return self.linear(x)
