r"""Mamba-2: a selective state space model with a scalar decay per head.

B batch, L length, D model width, H heads, P width of a head, E = H·P inner width, G groups of heads that share B and C,
N state size, S = E + 2·G·N convolved signals; dt is Δ, and A, B, C, D in formulas are the system, as in the paper

    z, (x, B, C), Δ = one projection of the input
    x, B, C ← silu(a short causal convolution of each signal),   Δ ← softplus(Δ + bias)
    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ,   y_t = h_tᵀ C_t + D x_t        in each head
    output = projection of rms_norm(y · silu(z))

Source: Dao, Gu, "Transformers are SSMs", 2405.21060, section 7, and its official code (state-spaces/mamba).
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require
from stu.mixer import Mixer, reverse_twin
from stu.ops.padding import at_front, masked, put_back
from stu.ops.precision import at_least_float32, no_autocast, product_dtype
from stu.ops.ssd import ssd, ssd_step
from stu.structure import Structured


class Mamba2State(NamedTuple):
    """The memory of a streaming Mamba-2.

    signals: (B, d_conv − 1, S), the last inputs of the convolution, the newest last; hidden: (B, H, N, P).
    """

    signals: Tensor
    hidden: Tensor


class Mamba2(Structured, Mixer):
    """The block of Mamba-2: projections, convolution, recurrence, gate and norm.

    causal: if false, a second unit with parameters of its own (`reverse`) runs from the end and is added, as in the
    STU. num_heads: H, so that a head has width P = expand · d_model / num_heads (64 in the paper). d_state: N.
    num_groups: G. d_conv: taps of the convolution. chunk_size: steps computed as one matrix; it affects speed only.
    dt_limit: the smallest and the largest Δ.

    Initialised as in the official code: Δ log-uniform in dt_min … dt_max but at least dt_init_floor, −A uniform in
    A_init_range, D and the gain of the norm one, the rest by PyTorch. Padding leaves the state unchanged: Δ is zero.
    """

    structure = ("num_heads", "num_groups", "dt_limit")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        d_state: int = 128,
        num_heads: int = 4,
        expand: int = 2,
        num_groups: int = 1,
        d_conv: int = 4,
        chunk_size: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        for name, value in {"d_state": d_state, "expand": expand, "d_conv": d_conv, "chunk_size": chunk_size}.items():
            require(value >= 1, name, value, "must be at least 1")
        inner, matrix = expand * d_model, num_groups * d_state
        _require_divisor("num_heads", num_heads, "expand · d_model", inner)
        _require_divisor("num_groups", num_groups, "num_heads", num_heads)
        require(0 < dt_min <= dt_max, "dt_min", dt_min, f"must be above 0 and at most dt_max ({dt_max})")
        require(dt_max <= 1e6, "dt_max", dt_max, "must be at most 1e6")
        require(dt_init_floor > 0, "dt_init_floor", dt_init_floor, "must be above 0")
        slowest, fastest = A_init_range
        allowed = "must be two finite numbers above 0, the smaller first"
        require(0 < slowest <= fastest < math.inf, "A_init_range", A_init_range, allowed)
        low, high = dt_limit
        require(0 <= low < high, "dt_limit", dt_limit, "must be two numbers, the first at least 0 and below the second")
        self.causal, self.num_heads, self.num_groups, self.chunk_size = causal, num_heads, num_groups, chunk_size
        self.d_model, self.widths = d_model, (inner, matrix, matrix)  # widths of x, B and C
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.A_init_range, self.dt_limit = (slowest, fastest), (low, high)
        signals = sum(self.widths)
        self.project_in = nn.Linear(d_model, inner + signals + num_heads, bias=False)
        # As images of one column: unlike those of sequences, their channels may stay in the last dimension.
        self.conv = nn.Conv2d(signals, signals, (d_conv, 1), groups=signals)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.gain = nn.Parameter(torch.empty(inner))
        self._reset_system()
        self.project_out = nn.Linear(inner, d_model, bias=False)
        self.reverse: Mamba2 | None = None
        if not causal:
            self.reverse = reverse_twin(self)

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        self.project_in.reset_parameters()
        self.conv.reset_parameters()
        self._reset_system()
        self.project_out.reset_parameters()
        if self.reverse is not None:
            self.reverse.reset_parameters()

    def _reset_system(self) -> None:
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp()
        dt = dt.clamp_min(self.dt_init_floor)
        with torch.no_grad():
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.uniform_(*self.A_init_range).log_()
        nn.init.ones_(self.D)
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        y, *_ = self._run(masked(x, mask), mask, self._zeros(len(x)))
        if self.reverse is None:
            return y
        return y + self.reverse(x.flip(1), None if mask is None else mask.flip(1)).flip(1)

    def initial_state(self, batch_size: int) -> Mamba2State:
        """Zeros."""
        return self._zeros(batch_size)

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """x_t (B, D), state → y_t (B, D), state."""
        gate, signal, dt = self._project(x)
        signals = torch.cat((state.signals, signal.unsqueeze(1)), 1)  # (B, d_conv, S)
        inputs, B, C = (each.squeeze(1) for each in self._convolve(signals))
        y, hidden = ssd_step(inputs, dt, self._rates(), B, C, self.D, state.hidden)
        return self._output(y, gate), Mamba2State(signals[:, 1:], hidden)

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, state: Mamba2State | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        state = self._zeros(len(x)) if state is None else state
        if mask is None:
            y, signals, hidden = self._run(x, None, state)
            return y, Mamba2State(signals[:, x.shape[1] :].clone(), hidden)
        count = mask.sum(1, keepdim=True)
        real = torch.arange(x.shape[1], device=x.device) < count
        y, signals, hidden = self._run(at_front(x, mask), real, state)
        newest = count + torch.arange(self.conv.kernel_size[0] - 1, device=x.device)  # (B, d_conv − 1)
        return put_back(y, mask), Mamba2State(signals.take_along_dim(newest.unsqueeze(-1), 1), hidden)

    def _zeros(self, batch_size: int) -> Mamba2State:
        inner, matrix, _ = self.widths
        weight = self.project_in.weight
        taken = batch_size, self.conv.kernel_size[0] - 1, sum(self.widths)
        kept = batch_size, self.num_heads, matrix // self.num_groups, inner // self.num_heads
        signals = weight.new_zeros(taken, dtype=product_dtype(weight))
        return Mamba2State(signals, weight.new_zeros(kept, dtype=at_least_float32(weight)))

    def _run(self, x: Tensor, mask: Tensor | None, state: Mamba2State) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D), zero on padding → y, like it, the signals (B, d_conv − 1 + L, S) and the last h (B, H, N, P)."""
        gate, signals, dt = self._project(x)
        if mask is not None:
            dt = dt * mask.unsqueeze(-1)
        signals = torch.cat((state.signals, signals), 1)
        inputs, B, C = self._convolve(signals)
        y, hidden = ssd(inputs, dt, self._rates(), B, C, self.D, state.hidden, chunk_size=self.chunk_size)
        return self._output(y, gate), signals, hidden

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, D) → the gate (…, E), the signals x, B, C (…, S) and Δ (…, H), in float32 at least."""
        gate, signals, dt = self.project_in(x).split((self.widths[0], sum(self.widths), self.num_heads), -1)
        dt = F.softplus(dt.to(at_least_float32(dt)) + self.dt_bias)
        return gate, signals, dt if self.dt_limit == (0.0, math.inf) else dt.clamp(*self.dt_limit)

    def _convolve(self, signals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, d_conv − 1 + L, S) → x (B, L, H, P) and B, C (B, L, G, N), in float32 at least."""
        dtype = at_least_float32(signals)
        signals, weight, bias = signals.to(dtype), self.conv.weight.to(dtype), cast(Tensor, self.conv.bias).to(dtype)
        if signals.shape[1] == self.conv.kernel_size[0]:  # one step
            convolved = (signals * weight[:, 0, :, 0].T).sum(1, keepdim=True) + bias
        elif torch.compiler.is_compiling():  # a convolution would hold the program to one length; these are fused
            taps = weight[:, 0, :, 0].T  # (d_conv, S)
            length, convolved = signals.shape[1] - len(taps) + 1, bias
            for lag, tap in enumerate(taps):
                convolved = convolved + signals[:, lag : lag + length] * tap
        else:
            columns = signals.unsqueeze(2).permute(0, 3, 1, 2)  # (B, S, L, 1), in memory (B, L, 1, S)
            with no_autocast(signals):
                columns = F.conv2d(columns, weight, bias, groups=len(weight))
            convolved = columns.squeeze(-1).transpose(1, 2)
        x, B, C = F.silu(convolved).split(self.widths, -1)
        groups = self.num_groups, -1
        return x.unflatten(-1, (self.num_heads, -1)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _rates(self) -> Tensor:
        """A, a scalar per head (H,)."""
        return -self.A_log.to(at_least_float32(self.A_log)).exp()

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """(…, H, P) and (…, E) → (…, D); the norm is over each group, as the official code has it."""
        gated = y.flatten(-2) * F.silu(gate.to(at_least_float32(gate)))
        groups = gated.unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(groups, groups.shape[-1:], eps=1e-5).flatten(-2) * self.gain
        return self.project_out(normed.to(gate.dtype))


def _require_divisor(name: str, value: int, of: str, whole: int) -> None:
    require(value >= 1 and whole % value == 0, name, value, f"must divide {of} ({whole})")
