r"""Multi-head attention, bidirectional or causal, global or in a local window.

B batch, L length, D model width, H heads, E = D / H width of a head, S slots of a cache, C steps before a piece
"""

from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.encoders import Positions, RotaryPositions
from stu.errors import require
from stu.mixer import Mixer
from stu.ops.attention import causal_attention, local_attention, softmax_attention
from stu.ops.padding import at_front, masked, put_back, real_first
from stu.ops.precision import product_dtype
from stu.ops.transforms import transformed
from stu.structure import Structured


class AttentionState(NamedTuple):
    """Keys and values of all steps so far, or of the last `window`.

    keys, values: (B, H, S, E), step t = 0, 1, … of a sequence in slot t, or in slot t mod S of a full window.
    position: the steps of the longest sequence. lengths: those of each, (B,); None where all are equal and no slot is
    empty.
    """

    keys: Tensor
    values: Tensor
    position: int
    lengths: Tensor | None

    def steps(self) -> Tensor:
        """The steps of each sequence (B,), or of all (1,)."""
        if self.lengths is None:
            return torch.full((1,), self.position, device=self.keys.device)
        return self.lengths


class Attention(Structured, Mixer):
    """Softmax attention through `scaled_dot_product_attention`, whose memory is linear in L.

    causal: position t attends to 1 … t only. window: to the last `window` of them, t included, or without causal to
    t − window//2 … t + window//2; time is then linear in L, too. positions: "rotary" turns queries and keys by angles
    that grow with the position (RoFormer, 2104.09864); other values concern the backbone alone. dropout: of attention
    weights; on CPUs PyTorch then forms all of them, L × L. Second derivatives exist within PyTorch's
    `sdpa_kernel(SDPBackend.MATH)`.

    Sources: Vaswani et al., 1706.03762; local windows: Longformer, 2004.05150, and Griffin, 2402.19427.
    """

    structure = ("causal", "num_heads", "window", "positions")

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
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        fits = num_heads >= 1 and d_model % num_heads == 0
        require(fits, "num_heads", num_heads, f"must divide d_model ({d_model})")
        require(window is None or window >= 1, "window", window, "must be at least 1, or null")
        require(0 <= dropout < 1, "dropout", dropout, "must be in [0, 1)")
        require(positions in get_args(Positions), "positions", positions, "must be none, learned, sinusoidal or rotary")
        self.rotary = RotaryPositions() if positions == "rotary" else None
        even = f"must leave heads of even width for rotary positions (d_model {d_model})"
        require(self.rotary is None or d_model // num_heads % 2 == 0, "num_heads", num_heads, even)
        self.d_model, self.num_heads, self.causal, self.window = d_model, num_heads, causal, window
        self.dropout, self.positions = dropout, positions
        self.project_in = nn.Linear(d_model, 3 * d_model)
        self.project_out = nn.Linear(d_model, d_model)

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        self.project_in.reset_parameters()
        self.project_out.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self._output(self._attend(*self._heads(masked(x, mask), 0), mask))

    def initial_state(self, batch_size: int) -> AttentionState:
        """No keys, no values."""
        weight = self.project_in.weight
        shape = (batch_size, self.num_heads, 0, self.d_model // self.num_heads)
        empty = weight.new_zeros(shape, dtype=product_dtype(weight))
        return AttentionState(empty, empty, 0, None)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """x_t (B, D), state → y_t (B, D), state; without a window the state grows by one key and value per step."""
        state = self._copied(state, 1)
        lengths = None if state.lengths is None else state.lengths + 1
        y, state = self._advance(x, state)
        return y, state._replace(position=state.position + 1, lengths=lengths)

    def step_(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """`step` in place: writes one key and one value of each head, into an empty slot or over the oldest.

        A CUDA graph of it counts in the `lengths` of a reserved state alone; `prefill` and `reserve` then read them.
        """
        slots = state.keys.shape[2]
        room = state.position < slots or slots == self.window
        require(room, "state", tuple(state.keys.shape), "has no room for one more step; see `reserve`")
        with torch.no_grad():
            y, state = self._advance(x, state)
        if state.lengths is not None:
            state.lengths.add_(1)
        return y, state._replace(position=state.position + 1)

    def reserve(self, state: AttentionState, max_steps: int) -> AttentionState:
        """A copy with empty slots for `max_steps` more steps, or as many as a window has."""
        state = self._copied(_counted(state), max_steps)
        return state._replace(lengths=state.steps().expand(len(state.keys)).clone())

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        state = self.initial_state(len(x)) if state is None else _counted(state)
        count = x.shape[1] if mask is None else mask.sum(1)
        after = None if mask is None and state.lengths is None else state.steps() + count
        y, state = self._continue(at_front(x, mask), state, after)
        return put_back(y, mask), state

    def _copied(self, state: AttentionState, steps: int) -> AttentionState:
        """Its keys and values copied, with slots for so many more steps."""
        batch, heads, slots, width = state.keys.shape
        room = state.keys.new_zeros(batch, heads, max(0, self._slots(state.position + steps) - slots), width)
        keys, values = (torch.cat((cache, room), 2) for cache in (state.keys, state.values))
        return AttentionState(keys, values, state.position, state.lengths)

    def _slots(self, steps: int) -> int:
        """How many of so many steps are remembered."""
        return steps if self.window is None else min(steps, self.window)

    def _advance(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """x_t (B, D) → y_t (B, D); writes its keys and values into the state, but does not count it."""
        steps, slots = state.steps(), state.keys.shape[2]
        query, key, value = self._heads(x.unsqueeze(1), steps[:, None, None])
        slot = steps if self.window is None else steps % self.window
        slot = slot[:, None, None, None].expand_as(key)
        write = Tensor.scatter if transformed(query) else Tensor.scatter_  # of a batch into no batch
        keys, values = (
            write(cache, 2, slot, new.to(cache.dtype)) for cache, new in ((state.keys, key), (state.values, value))
        )
        seen = None
        if state.lengths is not None:
            seen = torch.arange(slots, device=x.device) <= steps[:, None, None, None]  # (B, 1, 1, S)
        y = softmax_attention(query, keys.to(query.dtype), values.to(query.dtype), seen, dropout_p=self._dropout())
        return self._output(y).squeeze(1), state._replace(keys=keys, values=values)

    def _continue(self, x: Tensor, state: AttentionState, after: Tensor | None) -> tuple[Tensor, AttentionState]:
        """A piece (B, L, D), its real positions first → (B, L, D) and the state of lengths `after` it."""
        before, length, slots = state.steps().unsqueeze(1), x.shape[1], state.keys.shape[2]
        past = min(slots, self._slots(state.position + 1) - 1)  # C, of which the next step sees all
        query, key, value = self._heads(x, before.unsqueeze(2))
        steps = before + torch.arange(-past, 0, device=x.device)  # (B, C), or (1, C) for all
        key, value = (
            torch.cat((_at(cache, steps % slots).to(new.dtype), new), 2)
            for cache, new in ((state.keys, key), (state.values, value))
        )
        real = None if state.lengths is None or not past else F.pad(steps >= 0, (0, length), value=True)
        y = self._attend(query, key, value, real)
        state = _counted(state._replace(position=state.position + length, lengths=after))
        slots = max(slots, self._slots(state.position))
        last = state.steps().unsqueeze(1) - 1
        steps = last - (last - torch.arange(slots, device=x.device)) % slots  # of each slot, negative where it is empty
        order = (steps - before + past).clamp_min(0)
        keys, values = (_at(new, order).to(state.keys.dtype) for new in (key, value))
        return self._output(y), state._replace(keys=keys, values=values)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, H, L, E), keys and values (B, H, C + L, E), seen where `mask` (B, C + L) → (B, H, L, E)."""
        length, total, dropout = query.shape[2], key.shape[2], self._dropout()
        if self.window is not None:
            before, after = (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)
            if before < total - 1:
                return local_attention(query, key, value, before=before, after=after, mask=mask, dropout=dropout)
        if total > length:
            return causal_attention(query, key, value, mask=mask, dropout=dropout)
        if mask is None:
            return softmax_attention(query, key, value, dropout_p=dropout, is_causal=self.causal)
        if not self.causal:
            return softmax_attention(query, key, value, mask[:, None, None], dropout_p=dropout)
        # Causality and padding together would need a mask of L × L per sequence. But with all real positions first, in
        # their order, none of them has padding in its past.
        order = real_first(mask)[:, None, :, None]  # (B, 1, L, 1)
        # gather: take_along_dim would hold a compiled program to one batch size and length
        query, key, value = (heads.gather(2, order.expand_as(heads)) for heads in (query, key, value))
        y = softmax_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return y.gather(2, order.argsort(2).expand_as(y))

    def _heads(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) → query, key, value (B, H, L, E), rotated from position `start` on, of each sequence (B, 1, 1)."""
        heads = self.project_in(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        if self.rotary is not None:
            query, key = self.rotary(heads[:2], start)
        return query, key, value

    def _output(self, heads: Tensor) -> Tensor:
        """(B, H, L, E) → (B, L, D)."""
        return self.project_out(heads.transpose(1, 2).flatten(2))

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


def _at(cache: Tensor, slots: Tensor) -> Tensor:
    """Keys or values (B, H, S, E) from some slots of each sequence (B, N), or of all (1, N) → (B, H, N, E)."""
    if len(slots) == 1:
        return cache.index_select(2, slots[0])
    return cache[torch.arange(len(slots), device=slots.device).unsqueeze(1), :, slots].transpose(1, 2)


def _counted(state: AttentionState) -> AttentionState:
    """The same state; its `position` read from the lengths."""
    if state.lengths is None:
        return state
    return state._replace(position=max(state.lengths.tolist(), default=0))
