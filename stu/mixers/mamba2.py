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
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require
from stu.mixer import reverse_twin
from stu.mixers.selective import Selective, require_divisor, require_rates, require_sizes
from stu.ops.precision import at_least_float32
from stu.ops.ssd import ssd, ssd_step


class Mamba2(Selective):
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
        require_sizes(d_model=d_model, d_state=d_state, expand=expand, d_conv=d_conv, chunk_size=chunk_size)
        inner, matrix = expand * d_model, num_groups * d_state
        require_divisor("num_heads", num_heads, "expand · d_model", inner)
        require_divisor("num_groups", num_groups, "num_heads", num_heads)
        slowest, fastest = A_init_range
        require_rates(dt_min, dt_max, dt_init_floor, A_init_range)
        low, high = dt_limit
        require(0 <= low < high, "dt_limit", dt_limit, "must be two numbers, the first at least 0 and below the second")
        self.causal, self.num_heads, self.num_groups, self.chunk_size = causal, num_heads, num_groups, chunk_size
        self.d_model, self.widths = d_model, (inner, matrix, matrix)  # widths of x, B and C
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.A_init_range, self.dt_limit = (slowest, fastest), (low, high)
        self.hidden_shape = (num_heads, d_state, inner // num_heads)
        signals = sum(self.widths)
        self.project_in = nn.Linear(d_model, inner + signals + num_heads, bias=False)
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

    def _reset_system(self) -> None:
        self._draw_rates(self.dt_min, self.dt_max, self.dt_init_floor, self.A_init_range)
        nn.init.ones_(self.D)
        nn.init.ones_(self.gain)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """(…, D) → the gate (…, E), the signals x, B, C (…, S) and Δ (…, H), in float32 at least."""
        gate, signals, dt = self.project_in(x).split((self.widths[0], sum(self.widths), self.num_heads), -1)
        dt = F.softplus(dt.to(at_least_float32(dt)) + self.dt_bias)
        return gate, signals, (dt if self.dt_limit == (0.0, math.inf) else dt.clamp(*self.dt_limit),)

    def _split(self, signals: Tensor) -> tuple[Tensor, ...]:
        """(…, S) → x (…, H, P) and B, C (…, G, N)."""
        x, B, C = signals.split(self.widths, -1)
        groups = self.num_groups, -1
        return x.unflatten(-1, (self.num_heads, -1)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _recur(self, signals: Sequence[Tensor], controls: Sequence[Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        (x, B, C), (dt,) = signals, controls
        return ssd(x, dt, self._rates(), B, C, self.D, hidden, chunk_size=self.chunk_size)

    def _recur_step(
        self, signals: Sequence[Tensor], controls: Sequence[Tensor], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        (x, B, C), (dt,) = signals, controls
        return ssd_step(x, dt, self._rates(), B, C, self.D, hidden)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """(…, H, P) and (…, E) → (…, D); the norm is over each group, as the official code has it."""
        gated = y.flatten(-2) * F.silu(gate.to(at_least_float32(gate)))
        groups = gated.unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(groups, groups.shape[-1:], eps=1e-5).flatten(-2) * self.gain
        return self.project_out(normed.to(gate.dtype))
