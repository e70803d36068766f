"""Padding: positions of a batch that hold no input.

B batch, L length, D model width. Without a mask every position is real.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where `mask` (B, L) is False: (B, L, D) → (B, L, D)."""
    # where, not times: padding may hold inf or nan
    return x if mask is None else x.where(mask.unsqueeze(-1), x.new_zeros(()))


def real_first(mask: Tensor) -> Tensor:
    """The order of positions that puts the real ones first and keeps their order, for `take_along_dim`: (B, L)."""
    return mask.logical_not().int().argsort(stable=True, dim=1)


def steps(x: Tensor, mask: Tensor | None) -> Tensor:
    """The number of real positions of each sequence of (B, L, D): (B,)."""
    return x.new_full((len(x),), x.shape[1], dtype=torch.long) if mask is None else mask.sum(1)


def longest(x: Tensor, mask: Tensor | None) -> int:
    """The largest number of real positions of a sequence of (B, L, D)."""
    return x.shape[1] if mask is None else max(mask.sum(1).tolist(), default=0)


def at_front(x: Tensor, mask: Tensor | None) -> Tensor:
    """The real positions in their order, then zeros: (B, L, D) → (B, L, D)."""
    return x if mask is None else masked(x, mask).take_along_dim(real_first(mask).unsqueeze(-1), 1)


def at_end(x: Tensor, mask: Tensor | None, before: Tensor | None = None) -> Tensor:
    """Zeros, then the steps `before` (B, W, D), then the real positions in their order: (B, L, D) → (B, W + L, D)."""
    if before is not None:
        x = torch.cat((before, x), 1)
        mask = None if mask is None else F.pad(mask, (before.shape[1], 0), value=True)
    return x if mask is None else masked(x, mask).take_along_dim(real_first(~mask).unsqueeze(-1), 1)


def put_back(x: Tensor, mask: Tensor | None) -> Tensor:
    """What `at_front` had moved, where it was; elsewhere what came after it: (B, L, D) → (B, L, D)."""
    return x if mask is None else x.take_along_dim(real_first(mask).argsort(1).unsqueeze(-1), 1)


def between_real(mask: Tensor) -> Tensor:
    """True from the first to the last real position of each row: (B, L)."""
    return (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
