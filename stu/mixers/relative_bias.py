"""Biases of attention that depend on the distance of two positions alone.

T queries, S keys, M positions, Z width of a query
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import OptionError, require
from stu.ops.precision import to_float64

Bias = Literal["simple", "rotary", "none"]


class SimpleBias(nn.Module):
    """A learned number for each distance t − s: 0 … M − 1, and without causal also 1 − M … −1."""

    def __init__(self, positions: int, *, causal: bool) -> None:
        super().__init__()
        self.causal, self.positions = causal, positions
        self.weight = nn.Parameter(torch.empty(positions if causal else 2 * positions - 1))

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, queries: int, keys: int) -> Tensor:
        """Those of the distances 1 − T … S − 1, zero where no causal attention looks and beyond M: (T + S − 1,)."""
        if self.causal:
            return F.pad(self.weight[:keys], (queries - 1, max(0, keys - self.positions)))
        return self.weight[self.positions - queries : self.positions + keys - 1]


class RotaryBias(nn.Module):
    """The scalar product of two learned vectors, turned by angles that grow with the positions of query and key."""

    def __init__(self, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        require(width % 2 == 0, "d_query", width, "must be even for relative_bias=rotary")
        self.base = base
        self.alpha = nn.Parameter(torch.empty(width))
        self.beta = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        nn.init.normal_(self.alpha, std=0.02)
        nn.init.normal_(self.beta, std=0.02)

    def forward(self, queries: int, keys: int) -> Tensor:
        """Those of the distances 1 − T … S − 1: (T + S − 1,)."""
        (a, b), (c, d) = self.alpha.chunk(2), self.beta.chunk(2)
        pairs = to_float64(torch.arange(len(a), device=a.device))
        distances = to_float64(torch.arange(1 - queries, keys, device=a.device))
        angle = distances.unsqueeze(-1) * torch.exp(pairs * (-math.log(self.base) / len(a)))  # (T + S − 1, Z/2)
        return angle.cos().to(a.dtype) @ (a * c + b * d) + angle.sin().to(a.dtype) @ (a * d - b * c)


def make_bias(name: Bias, positions: int, width: int, causal: bool) -> SimpleBias | RotaryBias | None:
    """The bias called `name`, for that many positions and queries of that width."""
    match name:
        case "simple":
            require(positions >= 1, "seq_len", positions, "must be given for relative_bias=simple")
            return SimpleBias(positions, causal=causal)
        case "rotary":
            return RotaryBias(width)
        case "none":
            return None
    raise OptionError("relative_bias", name, "must be simple, rotary or none")
