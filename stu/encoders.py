"""Encoders of tokens and reals, and positions.

B batch, L length, D model width, C input channels, V vocabulary, E width of a head
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from stu.description import Described
from stu.errors import require
from stu.ops.precision import to_float64
from stu.resources import require_memory

Positions = Literal["none", "learned", "sinusoidal", "rotary"]


class TokenEncoder(Described, nn.Module):
    """Learned embedding, (B, L) int64 tokens in 0…V−1 → (B, L, D)."""

    def __init__(self, d_model: int, *, vocab_size: int) -> None:
        super().__init__()
        require(vocab_size >= 1, "vocab_size", vocab_size, "must be at least 1")
        require_memory(4 * vocab_size * d_model, {"vocab_size": vocab_size, "d_model": d_model})
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=1.0)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L) → (B, L, D)."""
        return self.embedding(inputs)


class LinearEncoder(Described, nn.Module):
    """Linear map of real inputs, (B, L, C) → (B, L, D)."""

    def __init__(self, d_model: int, *, d_input: int) -> None:
        super().__init__()
        require(d_input >= 1, "d_input", d_input, "must be at least 1")
        self.linear = nn.Linear(d_input, d_model)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L, C) → (B, L, D)."""
        return self.linear(inputs)


class LearnedPositions(nn.Module):
    """One learned vector per position, (…) → (…, D)."""

    def __init__(self, d_model: int, *, seq_len: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(seq_len, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """(…) int64 → (…, D)."""
        return self.embedding(positions)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of geometrically spaced frequencies, (…) → (…, D), float32 in any model; no parameters.

    Source: Vaswani et al., "Attention is all you need" (1706.03762), section 3.5.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, positions: Tensor) -> Tensor:
        """(…) int64 → (…, D)."""
        exponent = torch.arange(0, self.d_model, 2, device=positions.device, dtype=torch.float32) / self.d_model
        angle = positions.unsqueeze(-1) * torch.exp(-math.log(10_000.0) * exponent)  # (…, ⌈D/2⌉)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., : self.d_model]


class RotaryPositions(nn.Module):
    """Turns the pairs (x_j, x_{j+E/2}) of a head by the angle t · base^{−2j/E}; no parameters.

    Scores of queries and keys then depend on their distance alone. Source: Su et al., "RoFormer" (2104.09864).
    """

    def __init__(self, base: float = 10_000.0) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor, start: int | Tensor) -> Tensor:
        """(…, L, E) at positions t = start, start + 1, … → (…, L, E); start: one for all, or integers (…, 1)."""
        length, width = x.shape[-2:]
        pairs = to_float64(torch.arange(0, width, 2, device=x.device))
        times = to_float64(start + torch.arange(length, device=x.device))  # large angles need all their digits
        angle = times.unsqueeze(-1) * torch.exp(pairs * (-math.log(self.base) / width))  # (L, E/2) or (…, L, E/2)
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)
