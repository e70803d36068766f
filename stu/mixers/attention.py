r"""Multi-head attention, bidirectional or causal.

B batch, L length, D model width, H heads, E = D / H width of a head
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.encoders import Positions
from stu.errors import require
from stu.mixer import Mixer


class AttentionState(NamedTuple):
    """Keys and values of all steps so far, each (B, H, steps, E)."""

    keys: Tensor
    values: Tensor


class Attention(Mixer):
    """Softmax attention through `scaled_dot_product_attention`.

    causal: position t attends to 1 … t only. positions: "rotary" turns queries and keys by angles that grow with the
    position (RoFormer, 2104.09864); other values are the backbone's business. Source: Vaswani et al., 1706.03762.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 8,
        causal: bool = False,
        dropout: float = 0.0,
        positions: Positions = "none",
    ) -> None:
        super().__init__()
        require(
            num_heads >= 1 and d_model % num_heads == 0,
            "num_heads",
            num_heads,
            f"must divide d_model ({d_model})",
        )
        self.rotary = positions == "rotary"
        require(
            not (self.rotary and d_model // num_heads % 2),
            "num_heads",
            num_heads,
            f"must leave heads of even width for rotary positions (d_model {d_model})",
        )
        self.d_model, self.num_heads, self.causal, self.dropout = d_model, num_heads, causal, dropout
        self.project_in = nn.Linear(d_model, 3 * d_model)
        self.project_out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        if mask is not None:  # hidden values have weight zero, but zero times nan is nan
            x = x.where(mask.unsqueeze(-1), x.new_zeros(()))
        query, key, value = self._heads(x, 0)
        return self._attend(query, key, value, self.causal and mask is None, self._visible(x, mask))

    def initial_state(self, batch_size: int) -> AttentionState:
        """No keys, no values."""
        self._require_causal()
        shape = (batch_size, self.num_heads, 0, self.d_model // self.num_heads)
        empty = self.project_in.weight.new_zeros(shape)
        return AttentionState(empty, empty)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """x_t (B, D), state → y_t (B, D), state; the state grows by one key and value a step."""
        self._require_causal()
        query, key, value = self._heads(x.unsqueeze(1), state.keys.shape[2])
        state = AttentionState(torch.cat((state.keys, key), 2), torch.cat((state.values, value), 2))
        return self._attend(query, *state, causal=False).squeeze(1), state

    def prefill(self, x: Tensor) -> tuple[Tensor, AttentionState]:
        """(B, L, D) → (B, L, D) and the state from which `step` goes on."""
        self._require_causal()
        query, key, value = self._heads(x, 0)
        return self._attend(query, key, value, causal=True), AttentionState(key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, visible: Tensor | None = None) -> Tensor:
        """Heads (B, H, L, E) → (B, L, D)."""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, visible, dropout_p=dropout, is_causal=causal)
        return self.project_out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) → query, key, value (B, H, L, E), rotated from position `start` on."""
        query, key, value = self.project_in(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            query, key = rotate(query, start), rotate(key, start)
        return query, key, value

    def _visible(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which keys a query may see, broadcastable to (B, H, L, L); None where there is nothing to hide."""
        if mask is None:
            return None
        visible = mask[:, None, None, :]  # (B, 1, 1, L)
        if not self.causal:
            return visible
        time = torch.arange(x.shape[1], device=x.device)
        # The first positions may be padding: a query sees itself whatever the mask says, or its softmax is nan.
        return (visible & (time <= time[:, None])) | (time == time[:, None])

    def _require_causal(self) -> None:
        if not self.causal:
            raise NotImplementedError("attention runs step by step only with causal=true")


def rotate(x: Tensor, start: int, base: float = 10_000.0) -> Tensor:
    """Rotary positions: turn the pairs (x_j, x_{j+E/2}) of (…, L, E) by angle t · base^{−2j/E}, t from `start`."""
    length, width = x.shape[-2:]
    frequency = torch.exp(torch.arange(0, width, 2, device=x.device) * (-math.log(base) / width))
    angle = torch.arange(start, start + length, device=x.device)[:, None] * frequency  # (L, E/2)
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)
