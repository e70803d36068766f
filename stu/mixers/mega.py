r"""Mega: a damped moving average of the input, and gated attention of one head to what it has averaged.

B batch, L length, D model width, N averages of each channel, Z width of queries and keys, E width of values, S slots of
a cache, C length of a chunk

    h_t = (1 − α ⊙ δ) ⊙ h_{t−1} + α ⊙ β x_t,   x̂_t = silu(ηᵀ h_t / √N + ω x_t)      in each channel, α and δ in 0 … 1
    z = silu(W_z x̂),   q = κ_q ⊙ z + μ_q,   k = κ_k ⊙ z + μ_k,   v = silu(W_v x)
    o = attention(q, k, v) with a bias for each distance
    γ = silu(W_γ x̂),   φ = σ(W_φ x̂),   ĥ = silu(W_h x̂ + U_h (γ ⊙ o)),   y = φ ⊙ (ĥ − x)

Source: Ma et al., "Mega: moving average equipped gated attention", 2209.10655, equations 7 to 16, and its official code
(facebookresearch/mega), which adds the skip ω and the silu to the average.
"""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require, require_length
from stu.mixer import Mixer
from stu.mixers.relative_bias import Bias, make_bias
from stu.ops.biased_attention import Kind, attend, biased_attention
from stu.ops.discretize import is_current
from stu.ops.ema import ema_kernel
from stu.ops.kernels import diagonal_kernel, diagonal_state
from stu.ops.long_convolution import long_convolution
from stu.ops.padding import at_front, masked, put_back, real_first
from stu.ops.precision import at_least_float32, product_dtype, to_float64
from stu.ops.transforms import transformed
from stu.structure import Structured


class MegaState(NamedTuple):
    """The averages, and keys and values of all steps so far, or of those of the current chunk.

    averages: (B, D, N), in double precision where the device has it. keys: (B, S, Z), values: (B, S, E), step t in slot
    t, or t mod C. position: the steps of the longest sequence. lengths: those of each, (B,). system: that of
    `Mega._system`, made once for all steps.
    """

    averages: Tensor
    keys: Tensor
    values: Tensor
    position: int
    lengths: Tensor
    system: tuple[Tensor, Tensor, Tensor]


class Mega(Structured, Mixer):
    """The gated attention of Mega without its residual.

    The paper's update gate mixes the candidate with the layer's input, φ ⊙ ĥ + (1 − φ) ⊙ x. Here that is the residual
    block's x + y with y = φ ⊙ (ĥ − x): exactly with `prenorm=false`, the paper's form. A norm before the mixer is in
    the place of this x, too.

    causal: if false, a second average runs from the end and is added, and all attend to all. d_state: N. d_query: Z.
    expand: E, in d_model. attention: "softmax" or "laplace". relative_bias: "simple", a number for each distance, of
    which there are as many as `seq_len`; "rotary", a scalar product of two vectors that are turned by angles that grow
    with the position; or "none". chunk_size: attend within chunks of so many steps, in time linear in L (Mega-chunk);
    None: to all. They are counted from a sequence's first real position. dropout: of x̂ and ĥ.

    Initialised as in the official code.
    """

    structure = ("attention", "chunk_size")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        seq_len: int = 0,
        d_state: int = 16,
        d_query: int = 64,
        expand: float = 2.0,
        attention: Kind = "softmax",
        relative_bias: Bias = "simple",
        chunk_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"d_model": d_model, "d_state": d_state, "d_query": d_query}.items():
            require(value >= 1, name, value, "must be at least 1")
        require(0 < expand < math.inf, "expand", expand, "must be above 0 and finite")
        require(attention in get_args(Kind), "attention", attention, "must be softmax or laplace")
        require(chunk_size is None or chunk_size >= 1, "chunk_size", chunk_size, "must be at least 1, or null")
        require(0 <= dropout < 1, "dropout", dropout, "must be in [0, 1)")
        inner, directions = max(1, round(expand * d_model)), 1 if causal else 2
        self.d_model, self.causal, self.attention = d_model, causal, attention
        self.chunk_size, self.dropout = chunk_size, dropout
        self.widths = (d_model, d_query, inner, d_model)  # of φ, z, γ and what goes into the candidate
        self.alpha = nn.Parameter(torch.empty(directions, d_model, d_state))
        self.delta = nn.Parameter(torch.empty(directions, d_model, d_state))
        self.beta = nn.Parameter(torch.empty(directions, d_model, d_state))
        self.eta = nn.Parameter(torch.empty(directions, d_model, d_state))
        self.omega = nn.Parameter(torch.empty(d_model))
        self.project_value = nn.Linear(d_model, inner)
        self.project_average = nn.Linear(d_model, sum(self.widths))
        self.project_out = nn.Linear(inner, d_model)
        self.kappa = nn.Parameter(torch.empty(2, d_query))
        self.mu = nn.Parameter(torch.empty(2, d_query))
        self.bias = make_bias(relative_bias, seq_len if chunk_size is None else chunk_size, d_query, causal)
        self.seq_len = seq_len if relative_bias == "simple" and chunk_size is None else math.inf
        self._draw()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        for linear in (self.project_value, self.project_average, self.project_out):
            linear.reset_parameters()  # as their constructors do: equal seeds give equal parameters
        self._draw()

    def _draw(self) -> None:
        for logits in (self.alpha, self.delta):
            nn.init.normal_(logits, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta[..., ::2] += 1
            self.beta[..., 1::2] -= 1
        nn.init.normal_(self.eta)
        nn.init.normal_(self.omega)
        for linear in (self.project_value, self.project_average, self.project_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.kappa, std=0.02)
        nn.init.zeros_(self.mu)
        if self.bias is not None:
            self.bias.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        require_length(x.shape[1], self.seq_len)
        x = masked(x, mask)
        query, key, value, gates = self._project(x, self._average(x, self._system()))
        if mask is None:
            return self._output(x, self._attend(query, key, value), gates)
        order = real_first(mask).unsqueeze(-1)  # (B, L, 1)
        # gather: take_along_dim would hold a compiled program to one batch size and length
        query, key, value = (part.gather(1, order.expand_as(part)) for part in (query, key, value))
        y = self._attend(query, key, value, mask.sum(1))
        return self._output(x, y.gather(1, order.argsort(1).expand_as(y)), gates)

    def initial_state(self, batch_size: int) -> MegaState:
        """No keys, no values, averages of zero."""
        weight, system = self.project_value.weight, self._system()
        dtype, (_, width, inner, _) = product_dtype(weight), self.widths
        keys, values = (weight.new_zeros(batch_size, 0, size, dtype=dtype) for size in (width, inner))
        lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return MegaState(system[0].new_zeros(batch_size, *system[0].shape[1:]), keys, values, 0, lengths, system)

    def step(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        """x_t (B, D), state → y_t (B, D), state; without chunks the state grows by one key and value per step."""
        y, state = self._advance(x, self._copied(state, 1))
        return y, state._replace(position=state.position + 1, lengths=state.lengths + 1)

    def step_(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        """`step` in place: writes one key and one value, into an empty slot or over one of the chunk before.

        A CUDA graph of it counts in the `lengths` of the state alone; `prefill` and `reserve` then read them.
        """
        slots = state.keys.shape[1]
        room = state.position < slots or slots == self.chunk_size
        require(room, "state", tuple(state.keys.shape), "has no room for one more step; see `reserve`")
        with torch.no_grad():
            y, after = self._advance(x, state)
        state.averages.copy_(after.averages)
        state.lengths.add_(1)
        return y, state._replace(position=state.position + 1)

    def reserve(self, state: MegaState, max_steps: int) -> MegaState:
        """A copy with empty slots for `max_steps` more steps, or as many as a chunk has."""
        state = self._copied(state._replace(position=_longest(state.lengths)), max_steps)
        return state._replace(averages=state.averages.clone(), lengths=state.lengths.clone())

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, state: MegaState | None = None
    ) -> tuple[Tensor, MegaState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        system, count = self._system(), None if mask is None else mask.sum(1)
        real = None if count is None else torch.arange(x.shape[1], device=x.device) < count.unsqueeze(1)
        x = at_front(x, mask)
        before = None if state is None or not len(x) else state.averages
        a, b, c = (part[0] for part in _complex(system))
        averages = diagonal_state(a, b, x, real, None if before is None else _complex((before,))[0]).real
        free = None if before is None else diagonal_kernel(a, a * c / 2, _complex((before,))[0], x.shape[1])
        query, key, value, gates = self._project(x, self._average(x, system, free))
        if state is None:
            state = self.initial_state(len(x))
        y, state = self._continue(query, key, value, count, state)
        return put_back(self._output(x, y, gates), mask), state._replace(averages=averages, system=system)

    # --- moving average ---

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """1 − α ⊙ δ, α ⊙ β and η / √N, each (directions, D, N)."""
        alpha, delta = to_float64(self.alpha).sigmoid(), to_float64(self.delta).sigmoid()
        forgotten = (alpha * delta).clamp_max(1 - torch.finfo(alpha.dtype).eps)  # or its logarithm were infinite
        return 1 - forgotten, alpha * to_float64(self.beta), to_float64(self.eta) / math.sqrt(self.eta.shape[-1])

    def _average(self, x: Tensor, system: tuple[Tensor, Tensor, Tensor], free: Tensor | None = None) -> Tensor:
        """x̂ of (B, L, D); free: what the averages before the first step add to it, (B, L, D)."""
        decay, inputs, outputs = system
        kernels = ema_kernel(decay.log(), inputs, outputs, x.shape[1]).mT.to(at_least_float32(x))  # (directions, L, D)
        if self.causal:
            y = long_convolution(x, kernels[0])
        else:  # both see the present
            forwards, backwards = kernels
            now = forwards[:1] + backwards[:1]
            y = long_convolution(x, torch.cat((now, forwards[1:])), backwards[1:])
        y = y if free is None else (y + free).to(x.dtype)
        return self._activated(y, x)

    def _activated(self, average: Tensor, x: Tensor) -> Tensor:
        activated = F.silu(average + (self.omega * x).to(x.dtype))
        return F.dropout(activated, self.dropout, self.training)

    # --- gated attention ---

    def _project(self, x: Tensor, average: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """X and x̂ (…, D) → q and k (…, Z), v (…, E), and φ, γ and what goes into the candidate."""
        update, z, reset, candidate = self.project_average(average).split(self.widths, -1)
        shared = self.kappa * F.silu(z).unsqueeze(-2) + self.mu
        query, key = shared.unbind(-2)
        return query, key, F.silu(self.project_value(x)), (update.sigmoid(), F.silu(reset), candidate)

    def _output(self, x: Tensor, attended: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        update, reset, candidate = gates
        candidate = F.silu(candidate + self.project_out(reset * attended))
        return update * (F.dropout(candidate, self.dropout, self.training) - x)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, count: Tensor | None = None) -> Tensor:
        """The last T of S positions to all before, of which the first `count` (B,) are real: (B, T, E)."""
        total = key.shape[1]
        if self.chunk_size is None or total <= self.chunk_size:
            bias = None if self.bias is None else self.bias(query.shape[1], total)
            return biased_attention(query, key, value, bias, self.attention, causal=self.causal, count=count)
        chunk = self.chunk_size
        one_program = torch.compiler.is_compiling()  # with padding for all lengths, whole chunks or not
        number = total // chunk + 1 if one_program else -(-total // chunk)
        spare = number * chunk - total
        padded = one_program or spare > 0
        if padded:
            query, key, value = (F.pad(part, (0, 0, 0, spare)) for part in (query, key, value))
            count = query.new_full((len(query),), total, dtype=torch.long) if count is None else count
        if count is not None:
            starts = chunk * torch.arange(number, device=query.device)
            count = (count.unsqueeze(1) - starts).clamp(0, chunk).flatten()
        query, key, value = (part.unflatten(1, (number, chunk)).flatten(0, 1) for part in (query, key, value))
        bias = None if self.bias is None else self.bias(chunk, chunk)
        y = biased_attention(query, key, value, bias, self.attention, causal=self.causal, count=count)
        y = y.unflatten(0, (-1, number)).flatten(1, 2)
        return y[:, :total].clone(memory_format=torch.contiguous_format) if padded else y

    # --- states ---

    def _slots(self, steps: int) -> int:
        """How many of so many steps are remembered."""
        return min(steps, self.chunk_size or steps)

    def _start(self, lengths: Tensor) -> Tensor:
        """The first step of the chunk that the next step belongs to."""
        return torch.zeros_like(lengths) if self.chunk_size is None else lengths - lengths % self.chunk_size

    def _copied(self, state: MegaState, steps: int) -> MegaState:
        """Its keys and values copied, with slots for so many more steps."""
        slots = max(0, self._slots(state.position + steps) - state.keys.shape[1])
        keys, values = (F.pad(cache, (0, 0, 0, slots)) if slots else cache.clone() for cache in state[1:3])
        return state._replace(keys=keys, values=values)

    def _advance(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        """x_t (B, D) → y_t (B, D); writes its key and value into the state, but does not count the step."""
        require_length(state.position + 1, self.seq_len)
        system = state.system if is_current(state.system, self.parameters()) else self._system()
        decay, inputs, outputs = (part[0] for part in system)
        averages = decay * state.averages + inputs * to_float64(x).unsqueeze(-1)
        average = self._activated((outputs * averages).sum(-1).to(x.dtype), x)
        query, key, value, gates = self._project(x, average)
        place = (state.lengths - self._start(state.lengths)).unsqueeze(1)  # (B, 1)
        write = Tensor.scatter if transformed(query) else Tensor.scatter_  # of a batch into no batch
        keys, values = (
            write(cache, 1, place.unsqueeze(-1).expand(-1, 1, cache.shape[2]), new.unsqueeze(1).to(cache.dtype))
            for cache, new in ((state.keys, key), (state.values, value))
        )
        slots = torch.arange(keys.shape[1], device=x.device)
        seen = (slots <= place).unsqueeze(1)  # (B, 1, S)
        bias = None
        if self.bias is not None:
            bias = self.bias(1, keys.shape[1])[(place - slots).clamp_min(0)].unsqueeze(1)
        key, value, number = keys.to(query.dtype), values.to(query.dtype), place.unsqueeze(-1) + 1
        y = attend(query.unsqueeze(1), key, value, bias, self.attention, seen=seen, number=number).squeeze(1)
        return self._output(x, y, gates), state._replace(averages=averages, keys=keys, values=values, system=system)

    def _continue(
        self, query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, state: MegaState
    ) -> tuple[Tensor, MegaState]:
        """A piece, its `count` real positions (None: all) first → what it attends to (B, L, E), and keys and values."""
        length, slots, before = query.shape[1], state.keys.shape[1], state.lengths
        start = self._start(before)
        known = before - start  # steps of the current chunk that are cached, (B,)
        fewest, most = _range(known)
        require_length(most + length, self.seq_len)
        if self.chunk_size is not None:
            fewest = 0  # chunks are attended to whole
        places = torch.arange(most + length, device=query.device)
        known = known.unsqueeze(1)
        order = torch.where(places < known, places, slots + places - known).clamp_max(slots + length - 1)
        key, value = (
            _at(torch.cat((cache.to(new.dtype), new), 1), order)
            for cache, new in ((state.keys, key), (state.values, value))
        )
        query = _at(query, (places[fewest:] - known).clamp(0, length - 1))
        y = _at(self._attend(query, key, value), known - fewest + torch.arange(length, device=query.device))
        after = before + (length if count is None else count)
        longest = _longest(after)
        kept = torch.arange(max(slots, self._slots(longest)), device=query.device)
        kept = ((self._start(after) - start).unsqueeze(1) + kept).clamp_max(len(places) - 1)
        keys, values = (_at(new, kept).to(state.keys.dtype) for new in (key, value))
        return y, state._replace(keys=keys, values=values, position=longest, lengths=after)


def _at(steps: Tensor, order: Tensor) -> Tensor:
    """Some steps of each sequence: (B, L, E), (B, K) → (B, K, E)."""
    return steps.gather(1, order.unsqueeze(-1).expand(-1, -1, steps.shape[2]))


def _range(lengths: Tensor) -> tuple[int, int]:
    numbers = lengths.tolist() or [0]
    return min(numbers), max(numbers)


def _longest(lengths: Tensor) -> int:
    return _range(lengths)[1]


def _complex(parts: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.complex(part, torch.zeros_like(part)) for part in parts]
