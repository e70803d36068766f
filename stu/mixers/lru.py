r"""The Linear Recurrent Unit.

B batch, L length, D model width, N state size

    x_t = λ ⊙ x_{t−1} + exp(γ^log) ⊙ B u_t,    y_t = Re(C x_t) + D ⊙ u_t,    λ = exp(−exp(ν^log) + i exp(θ^log))

with complex x, B and C. Source: Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De, "Resurrecting Recurrent Neural
Networks for Long Sequences", 2303.06349, section 3 and appendix A, and NicolasZucchet/minimal-LRU.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stu.errors import require
from stu.mixer import Mixer
from stu.ops.discretize import is_current, require_rate
from stu.ops.padding import masked
from stu.ops.precision import to_complex128, to_float64
from stu.ops.scan import diagonal_ssm, diagonal_step, padded_ssm


class LRUState(NamedTuple):
    """The complex state x, (B, N), and the system of `LRU._system`, made once for all steps."""

    x: Tensor
    system: tuple[Tensor, Tensor, Tensor]


class LRU(Mixer):
    """A diagonal complex recurrence with the parametrisation and initialisation that make it trainable.

    exponential: λ has the stable form above (section 3.3); if false, λ itself is learned, and nothing keeps it inside
    the unit disk. ring: λ is initialised uniformly on the ring of radii r_min and r_max, with phases from 0 to
    max_phase (section 3.4); if false, on all of the unit disk, like the eigenvalues of a random dense matrix (section
    3.2). normalize: the input is scaled by the learned exp(γ^log), initialised as √(1 − |λ|²) (section 3.4). causal: if
    false, a second state with the same λ, γ^log and B runs from the end, and has a C of its own.

    rate: the time between two inputs, in those of training: 2 for half as many samples. λ then becomes λ^rate, of the
    angle in (−π, π], and the input is scaled by (1 − λ^rate)/(1 − λ) besides: the state after an input that was held
    for so long, exactly where rate is an integer. √(1 − |λ|^{2 rate}) would keep the variance of white inputs instead,
    and change the response to slow ones.

    Complex parameters are real pairs (…, 2), initialised normal: B_ij of variance 1/D, C_ij of 2/N, D of 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        d_state: int = 128,
        exponential: bool = True,
        ring: bool = True,
        normalize: bool = True,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require(d_state >= 1, "d_state", d_state, "must be at least 1")
        require(0 <= r_min < r_max, "r_min", r_min, f"must be at least 0 and below r_max ({r_max})")
        require(r_max <= 1, "r_max", r_max, "must be at most 1")
        require(0 < max_phase <= 2 * math.pi, "max_phase", max_phase, "must be above 0 and at most 2π")
        require_rate(rate)
        self.d_model, self.causal, self.rate = d_model, causal, rate
        self.r_min, self.r_max, self.max_phase = (r_min, r_max, max_phase) if ring else (0.0, 1.0, 2 * math.pi)
        self.nu_log = nn.Parameter(torch.empty(d_state)) if exponential else None
        self.theta_log = nn.Parameter(torch.empty(d_state)) if exponential else None
        self.eigenvalues = None if exponential else nn.Parameter(torch.empty(d_state, 2))
        self.gamma_log = nn.Parameter(torch.empty(d_state)) if normalize else None
        self.B = nn.Parameter(torch.empty(d_state, d_model, 2))
        self.C = nn.Parameter(torch.empty(1 if causal else 2, d_model, d_state, 2))  # [direction, out, state]
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        # inside (0, 1), so that the logarithms are finite
        radius, phase = torch.empty(2, len(self.B), dtype=torch.float64).uniform_(1e-6, 1 - 1e-6)
        nu, theta = ring_eigenvalues(radius, phase, self.r_min, self.r_max, self.max_phase)
        with torch.no_grad():
            if self.nu_log is not None and self.theta_log is not None:
                self.nu_log.copy_(nu.log())
                self.theta_log.copy_(theta.log())
            if self.eigenvalues is not None:
                self.eigenvalues.copy_(torch.view_as_real(torch.polar((-nu).exp(), theta)))
            if self.gamma_log is not None:
                self.gamma_log.copy_((-torch.expm1(-2 * nu)).log() / 2)
        nn.init.normal_(self.B, std=(2 * self.d_model) ** -0.5)
        nn.init.normal_(self.C, std=len(self.B) ** -0.5)
        nn.init.normal_(self.D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        x = masked(x, mask)
        y, _ = diagonal_ssm(x, *self._system())
        return y + (self.D * x).to(x.dtype)

    def initial_state(self, batch_size: int) -> LRUState:
        """Zeros."""
        system = self._system()
        return LRUState(system[0].new_zeros(batch_size, len(self.B)), system)

    def step(self, x: Tensor, state: LRUState) -> tuple[Tensor, LRUState]:
        """x_t (B, D), state → y_t (B, D), state."""
        system = state.system if is_current(state.system, self.parameters()) else self._system()
        y, after = diagonal_step(x, *system, state.x)
        return y + (self.D * x).to(x.dtype), LRUState(after, system)

    def prefill(self, x: Tensor, mask: Tensor | None = None, state: LRUState | None = None) -> tuple[Tensor, LRUState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        x, system = masked(x, mask), self._system()
        y, after = padded_ssm(x, mask, *system, None if state is None else state.x)
        return y + (self.D * x).to(x.dtype), LRUState(after, system)

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """λ (N,), exp(γ^log) B (N, D), C (directions, D, N), at the rate of the inputs."""
        B, decay = to_complex128(self.B), self._decay()
        if self.gamma_log is not None:
            B = to_float64(self.gamma_log).exp().unsqueeze(-1) * B
        if self.rate != 1:
            decay, gain = held(decay, self.rate)
            B = gain.unsqueeze(-1) * B
        return decay, B, to_complex128(self.C)

    def _decay(self) -> Tensor:
        if self.nu_log is None or self.theta_log is None:
            assert self.eigenvalues is not None
            return to_complex128(self.eigenvalues)
        return torch.polar((-to_float64(self.nu_log).exp()).exp(), to_float64(self.theta_log).exp())


def held(decay: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """λ^rate, and Σ_{j<rate} λ^j as (1 − λ^rate)/(1 − λ): what an input held for `rate` steps does to a state."""
    zero = decay == 0
    log = decay.masked_fill(zero, 1).log()
    one = log == 0
    gain = (torch.expm1(rate * log) / torch.expm1(log).masked_fill(one, 1)).masked_fill(one, rate)
    return (rate * log).exp().masked_fill(zero, 0), gain.masked_fill(zero, 1)


def ring_eigenvalues(
    radius: Tensor, phase: Tensor, r_min: float, r_max: float, max_phase: float
) -> tuple[Tensor, Tensor]:
    """ν and θ of λ = exp(−ν + iθ): uniform on the ring for radius and phase uniform in 0 … 1 (lemma 3.2)."""
    return -(radius * (r_max**2 - r_min**2) + r_min**2).log() / 2, max_phase * phase
