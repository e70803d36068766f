r"""Multi-head attention, bidirectional or causal, global or in a local window.

B batch, L length, D model width, H heads, E = D / H width of a head, T length of a block, K keys of a block
"""

from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.encoders import Positions, RotaryPositions
from stu.errors import require
from stu.mixer import Mixer
from stu.ops.padding import masked, real_first

BLOCK = 64  # fewest queries of a block of local attention; smaller ones cost more than they save in keys


class AttentionState(NamedTuple):
    """Keys and values of all steps so far, or of the last `window`, each (B, H, steps, E); position: steps taken."""

    keys: Tensor
    values: Tensor
    position: int


class Attention(Mixer):
    """Softmax attention through `scaled_dot_product_attention`, whose memory is linear in L.

    causal: position t attends to 1 … t only. window: to the last `window` of them, t included, or without causal to
    t − window//2 … t + window//2; time is then linear in L, too. positions: "rotary" turns queries and keys by angles
    that grow with the position (RoFormer, 2104.09864); other values concern the backbone alone. dropout: of attention
    weights; on CPUs PyTorch then forms all of them, L × L.

    Sources: Vaswani et al., 1706.03762; local windows: Longformer, 2004.05150, and Griffin, 2402.19427.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        causal: bool = True,
        window: int | None = None,
        dropout: float = 0.0,
        positions: Positions = "none",
    ) -> None:
        super().__init__()
        fits = num_heads >= 1 and d_model % num_heads == 0
        require(fits, "num_heads", num_heads, f"must divide d_model ({d_model})")
        require(window is None or window >= 1, "window", window, "must be at least 1, or null")
        require(0 <= dropout < 1, "dropout", dropout, "must be in [0, 1)")
        require(positions in get_args(Positions), "positions", positions, "must be none, learned, sinusoidal or rotary")
        self.rotary = RotaryPositions() if positions == "rotary" else None
        even = f"must leave heads of even width for rotary positions (d_model {d_model})"
        require(self.rotary is None or d_model // num_heads % 2 == 0, "num_heads", num_heads, even)
        self.d_model, self.num_heads, self.causal, self.window = d_model, num_heads, causal, window
        self.dropout = dropout
        self.project_in = nn.Linear(d_model, 3 * d_model)
        self.project_out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self._output(self._attend(*self._heads(masked(x, mask), 0), mask))

    def initial_state(self, batch_size: int) -> AttentionState:
        """No keys, no values."""
        shape = (batch_size, self.num_heads, 0, self.d_model // self.num_heads)
        empty = self.project_in.weight.new_zeros(shape)
        return AttentionState(empty, empty, 0)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """x_t (B, D), state → y_t (B, D), state; without a window the state grows by one key and value per step."""
        query, key, value = self._heads(x.unsqueeze(1), state.position)
        keys, values = torch.cat((state.keys, key), 2), torch.cat((state.values, value), 2)
        state = self._remembered(keys, values, state.position + 1)
        y = F.scaled_dot_product_attention(query, state.keys, state.values, dropout_p=self._dropout())
        return self._output(y).squeeze(1), state

    def prefill(self, x: Tensor) -> tuple[Tensor, AttentionState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        query, key, value = self._heads(x, 0)
        return self._output(self._attend(query, key, value)), self._remembered(key, value, x.shape[1])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Heads (B, H, L, E) → (B, H, L, E)."""
        length, dropout = query.shape[2], self._dropout()
        if self.window is not None:
            before, after = (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)
            if before < length - 1:
                return local_attention(query, key, value, before=before, after=after, mask=mask, dropout=dropout)
        if mask is None:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=self.causal)
        if not self.causal:
            return F.scaled_dot_product_attention(query, key, value, mask[:, None, None], dropout_p=dropout)
        # Causality and padding together would need a mask of L × L per sequence. But with all real positions first, in
        # their order, none of them has padding in its past.
        order = real_first(mask)[:, None, :, None]  # (B, 1, L, 1)
        query, key, value = (heads.take_along_dim(order, 2) for heads in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return y.take_along_dim(order.argsort(2), 2)

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) → query, key, value (B, H, L, E), rotated from position `start` on."""
        query, key, value = self.project_in(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotary is not None:
            query, key = self.rotary(query, start), self.rotary(key, start)
        return query, key, value

    def _output(self, heads: Tensor) -> Tensor:
        """(B, H, L, E) → (B, L, D)."""
        return self.project_out(heads.transpose(1, 2).flatten(2))

    def _remembered(self, keys: Tensor, values: Tensor, position: int) -> AttentionState:
        last = slice(None if self.window is None else -self.window, None)
        return AttentionState(keys[:, :, last], values[:, :, last], position)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    before: int,
    after: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each position t to t − before … t + after, in time and memory linear in L.

    query, key, value: (B, H, L, E); mask: (B, L), True where a key may be seen. Returns (B, H, L, E).

    Blocks of T queries attend to the K = before + T + after keys around them, so that one mask of T × K serves them
    all, except at the ends of the sequence and where `mask` is False.
    """
    batch, heads, length, width = query.shape
    block = max(BLOCK, before + after)
    blocks = -(-length // block)
    spare = blocks * block - length
    strip = before + block + after
    real = query.new_ones(1, length, dtype=torch.bool) if mask is None else mask
    real = F.pad(real, (before, after + spare)).unfold(1, strip, block).transpose(0, 1)  # (blocks, B or 1, K)
    q = F.pad(query, (0, 0, 0, spare)).unfold(2, block, block)  # (B, H, blocks, E, T)
    k, v = (F.pad(each, (0, 0, before, after + spare)).unfold(2, strip, block) for each in (key, value))
    ahead = torch.arange(strip, device=query.device) - torch.arange(block, device=query.device).unsqueeze(1)
    seen = (ahead >= 0) & (ahead <= before + after) & real.unsqueeze(2)  # (blocks, B or 1, T, K)
    seen = seen | (ahead == before)  # always itself: a softmax over nothing is nan
    # Merge the batch with the heads where all sequences share the mask of a block, and with the blocks otherwise.
    merge = (1, 2) if mask is None else (0, 1)
    q, k, v = (each.permute(2, 0, 1, 4, 3).flatten(*merge) for each in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, seen.unsqueeze(2).flatten(*merge), dropout_p=dropout)
    y = y.reshape(blocks, batch, heads, block, width).permute(1, 2, 0, 3, 4)
    return y.flatten(2, 3)[:, :, :length]
