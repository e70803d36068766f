"""Padding: positions of a batch that hold no input.

B batch, L length, D model width
"""

from torch import Tensor


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where `mask` (B, L) is False: (B, L, D) → (B, L, D)."""
    # where, not times: padding may hold inf or nan
    return x if mask is None else x.where(mask.unsqueeze(-1), x.new_zeros(()))


def real_first(mask: Tensor) -> Tensor:
    """The order of positions that puts the real ones first and keeps their order, for `take_along_dim`: (B, L)."""
    return mask.logical_not().int().argsort(stable=True, dim=1)
