r"""Gated DeltaNet: a memory of keys and values that forgets by a gate and corrects what it already holds.

B batch, L length, D model width, H heads, N width of a key, P width of a value, E = H·P,
S = 2·H·N + E convolved signals

    z, (q, k, v), b, a = one projection of the input;   q, k, v ← silu(a short causal convolution of each signal)
    q ← q / |q|,   k ← k / |k|,   β = σ(b),   α = exp(−exp(A_log) softplus(a + dt_bias))        in each head
    S_t = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ,   y_t = S_t q_t
    output = projection of rms_norm(y) · silu(z)

Source: Yang, Kautz, Hatamizadeh, "Gated delta networks", 2412.06464, section 3; initialised as in its official code
(NVlabs/GatedDeltaNet and fla-org/flash-linear-attention).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require
from stu.mixer import reverse_twin
from stu.mixers.selective import Selective, require_divisor, require_rates, require_sizes
from stu.ops.delta_rule import gated_delta_rule, gated_delta_step
from stu.ops.precision import at_least_float32, no_autocast


class GatedDeltaNet(Selective):
    """The block of the gated DeltaNet: projections, convolution, recurrence, norm and gate.

    causal: if false, a second unit with parameters of its own (`reverse`) runs from the end and is added. num_heads: H.
    d_state: N. expand: E = expand · d_model, so that a head has values of width P = E / H. d_conv: taps of the
    convolution. allow_negative_eigenvalues: β in 0 … 2 instead of 0 … 1, so that a step may also reflect a direction of
    the memory (Grazzi et al., 2411.12537). chunk_size: steps computed as one matrix; it affects speed only.

    α is initialised by a Δ log-uniform in dt_min … dt_max but at least dt_init_floor and a rate exp(A_log) uniform in
    A_init_range, the gain of the norm is one, the rest is PyTorch's. Padding leaves the state unchanged: β is zero and
    α one.
    """

    structure = ("num_heads", "allow_negative_eigenvalues")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        d_state: int = 48,
        num_heads: int = 2,
        expand: float = 1.5,
        d_conv: int = 4,
        allow_negative_eigenvalues: bool = False,
        chunk_size: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_init_range: tuple[float, float] = (1e-3, 16.0),
    ) -> None:
        super().__init__()
        require_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, chunk_size=chunk_size)
        whole = 0 < expand < 1e6 and expand * d_model % 1 == 0
        require(
            whole, "expand", expand, f"must be above 0 and make expand · d_model a whole number (d_model {d_model})"
        )
        inner, keys = int(expand * d_model), num_heads * d_state
        require_divisor("num_heads", num_heads, "expand · d_model", inner)
        slowest, fastest = A_init_range
        require_rates(dt_min, dt_max, dt_init_floor, A_init_range)
        self.d_model, self.causal, self.num_heads, self.chunk_size = d_model, causal, num_heads, chunk_size
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.A_init_range = slowest, fastest
        self.hidden_shape = (num_heads, d_state, inner // num_heads)
        self.widths = (2 * keys, inner)  # of q and k together, and of v
        signals = sum(self.widths)
        self.project_in = nn.Linear(d_model, inner + signals + 2 * num_heads, bias=False)
        self.conv = nn.Conv2d(signals, signals, (d_conv, 1), groups=signals, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.gain = nn.Parameter(torch.empty(inner // num_heads))
        self._reset_system()
        self.project_out = nn.Linear(inner, d_model, bias=False)
        self.reverse: GatedDeltaNet | None = None
        if not causal:
            self.reverse = reverse_twin(self)

    def _signal_dtype(self) -> torch.dtype:
        return self.project_in.weight.dtype

    def _reset_system(self) -> None:
        self._draw_rates(self.dt_min, self.dt_max, self.dt_init_floor, self.A_init_range)
        nn.init.ones_(self.gain)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """(…, D) → the gate (…, E), the signals q, k, v (…, S), and β and log α (…, H), in float32 at least."""
        sizes = (self.widths[1], sum(self.widths), self.num_heads, self.num_heads)
        weight = self.project_in.weight
        with no_autocast(x):  # the norm of a small y magnifies what rounding does to q and k
            gate, signals, b, a = F.linear(x.to(weight.dtype), weight).split(sizes, -1)
        dtype = at_least_float32(b)
        beta = b.to(dtype).sigmoid()
        log_decay = self._rates() * F.softplus(a.to(dtype) + self.dt_bias)
        return gate, signals, (2 * beta if self.allow_negative_eigenvalues else beta, log_decay)

    def _split(self, signals: Tensor) -> tuple[Tensor, ...]:
        """(…, S) → q and k of unit length (…, H, N), and v (…, H, P)."""
        pairs, v = signals.split(self.widths, -1)
        pairs = pairs.unflatten(-1, (2, self.num_heads, -1))
        unit = pairs * torch.rsqrt(pairs.square().sum(-1, keepdim=True) + 1e-6)
        return *unit.unbind(-3), v.unflatten(-1, (self.num_heads, -1))

    def _recur(self, signals: Sequence[Tensor], controls: Sequence[Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        (q, k, v), (beta, log_decay) = signals, controls
        return gated_delta_rule(q, k, v, beta, log_decay, hidden, chunk_size=self.chunk_size)

    def _recur_step(
        self, signals: Sequence[Tensor], controls: Sequence[Tensor], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        (q, k, v), (beta, log_decay) = signals, controls
        return gated_delta_step(q, k, v, beta, log_decay, hidden)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """(…, H, P) and (…, E) → (…, D); the norm is over each head, before the gate."""
        normed = (F.rms_norm(y, y.shape[-1:], eps=1e-5) * self.gain).flatten(-2)
        return self.project_out((normed * F.silu(gate.to(normed.dtype))).to(gate.dtype))
