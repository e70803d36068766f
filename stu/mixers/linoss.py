r"""LinOSS, linear oscillatory state spaces: forced harmonic oscillators, with or without damping.

B batch, L length, D model width, N oscillators

    x''(t) = −A ⊙ x(t) − G ⊙ x'(t) + B u(t),    y(t) = Re(C x(t)) + D ⊙ u(t)        (A, G ≥ 0; G = 0 without damping)

with complex x, B and C. In steps of Δt, with the velocity z = x', both discretisations are

    z_t = (z_{t−1} + Δt (B u_t − A x_{t−1})) / S,    x_t = x_{t−1} + Δt z_t

and differ in S: 1 + Δt² A for the implicit one (IM), which loses energy, and 1 + Δt G for the implicit-explicit one
(IMEX), which keeps it without damping. A step is a matrix M (2, 2) of the pair (z, x) of each oscillator. A, G and Δt
are real, so the real and the imaginary part of x are two oscillators without influence on each other, 2N together, and
each x_t is the convolution of its force with the impulse response of M. The eigenvectors of M are not needed: they
coincide for A = 0 and at critical damping.

Sources: Rusch, Rus, "Oscillatory State-Space Models", 2410.03943, section 2, and tk-rusch/linoss; with damping Boyer,
Rusch, Rus, "Learning to Dissipate Energy in Oscillatory State-Space Models", 2505.12171, and jaredbmit/damped-linoss.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stu.errors import require
from stu.mixer import Mixer
from stu.ops.discretize import is_current
from stu.ops.kernels import dense_kernel, dense_state
from stu.ops.long_convolution import long_convolution
from stu.ops.oscillators import oscillator_response
from stu.ops.padding import masked, put_back
from stu.ops.precision import at_least_float32, no_autocast, to_float64
from stu.structure import Structured

Scheme = Literal["im", "imex"]


class LinOSSState(NamedTuple):
    """Velocity and position of the 2N real oscillators, (B, 2N, 2), in double precision where the device has it.

    system: that of `LinOSS._system`, made once for all steps.
    """

    oscillators: Tensor
    system: tuple[Tensor, Tensor, Tensor, Tensor]


class LinOSS(Structured, Mixer):
    """Forced oscillators for all channels together, run as a long convolution of every force.

    causal: if false, the same oscillators also run from the end, read out by a C of their own (the papers' are causal).
    d_state: N. discretization: "im" or "imex". damping: with G (D-LinOSS), which is defined for "imex" alone. With
    damping the eigenvalues of M are initialised uniformly on the ring of radii r_min and r_max, with phases from 0 to
    max_phase; without it A is uniform in 0 … 1, and these three have no effect.

    A and G are kept at least 0, and with "imex" A also where M oscillates, as in D-LinOSS: smaller A are overdamped,
    larger ones unstable, which tk-rusch/linoss leaves to training. Complex parameters are real pairs (…, 2). Both parts
    of B are initialised uniform up to 1/√D, those of C up to 1/√N; D normal of variance 1; Δt = sigmoid(logit_dt), and
    logit_dt is uniform in 0 … 1, with damping normal of standard deviation ½.
    """

    structure = ("discretization",)

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        d_state: int = 64,
        discretization: Scheme = "im",
        damping: bool = False,
        r_min: float = 0.9,
        r_max: float = 1.0,
        max_phase: float = math.pi,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require(d_state >= 1, "d_state", d_state, "must be at least 1")
        require(discretization in ("im", "imex"), "discretization", discretization, "must be im or imex")
        require(not damping or discretization == "imex", "damping", damping, "needs discretization=imex")
        require(0 < r_min < r_max, "r_min", r_min, f"must be above 0 and below r_max ({r_max})")
        require(r_max <= 1, "r_max", r_max, "must be at most 1")
        require(0 < max_phase <= math.pi, "max_phase", max_phase, "must be above 0 and at most π")
        self.d_model, self.causal, self.discretization = d_model, causal, discretization
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.A = nn.Parameter(torch.empty(d_state))
        self.G = nn.Parameter(torch.empty(d_state)) if damping else None
        self.logit_dt = nn.Parameter(torch.empty(d_state))
        self.B = nn.Parameter(torch.empty(d_state, d_model, 2))
        self.C = nn.Parameter(torch.empty(1 if causal else 2, d_model, d_state, 2))  # [direction, out, oscillator]
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        if self.G is None:
            nn.init.uniform_(self.A)
            nn.init.uniform_(self.logit_dt)
        else:
            nn.init.normal_(self.logit_dt, std=0.5)
            with torch.no_grad():
                dt = to_float64(self.logit_dt).sigmoid()
                share, turn = torch.rand(2, len(dt), dtype=dt.dtype, device=dt.device)
                radius = (share * (self.r_max**2 - self.r_min**2) + self.r_min**2).sqrt()
                A, G = ring_oscillators(radius, self.max_phase * turn, dt)
                self.A.copy_(A)
                self.G.copy_(G)
        nn.init.uniform_(self.B, -(self.d_model**-0.5), self.d_model**-0.5)
        nn.init.uniform_(self.C, -(len(self.A) ** -0.5), len(self.A) ** -0.5)
        nn.init.normal_(self.D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self._forced(masked(x, mask))[0]

    def initial_state(self, batch_size: int) -> LinOSSState:
        """Oscillators at rest."""
        system = self._system()
        return LinOSSState(system[1].new_zeros(batch_size, *system[1].shape), system)

    def step(self, x: Tensor, state: LinOSSState) -> tuple[Tensor, LinOSSState]:
        """x_t (B, D), state → y_t (B, D), state."""
        M, F, B, C = system = state.system if is_current(state.system, self.parameters()) else self._system()
        u = to_float64(x)
        after = torch.einsum("nij,bnj->bni", M, state.oscillators) + F * (u @ B.T).unsqueeze(-1)
        return (after[..., 1] @ C[0].T + self.D * u).to(x.dtype), LinOSSState(after, system)

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, state: LinOSSState | None = None
    ) -> tuple[Tensor, LinOSSState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        x, (M, F, B, C) = masked(x, mask), self._system()
        y, force = self._forced(x)
        initial = None if state is None or not len(x) else state.oscillators
        if initial is not None:
            positions = dense_kernel(M.mT, M[:, 1], initial, x.shape[1])  # (B, L, 2N): those of M^{t+1} (z_0, x_0)
            y = (y + put_back(positions @ C[0].T, mask)).to(x.dtype)
        return y, LinOSSState(dense_state(M, F, force, mask, initial), (M, F, B, C))

    def _forced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs (B, L, D) of oscillators that begin at rest, and the forces (B, L, 2N)."""
        dtype = at_least_float32(x)
        response = self._response(x.shape[1]).to(dtype)
        B, C = (each.to(dtype) for each in self._real_parts())
        with no_autocast(x):
            force = x.to(dtype) @ B.T
            y = long_convolution(force, response) @ C[0].T
            if not self.causal:
                y = y + long_convolution(force.flip(1), response).flip(1) @ C[1].T
        return (y + self.D * x).to(x.dtype), force

    def _response(self, length: int) -> Tensor:
        """The positions after an impulse of the force, (L, 2N)."""
        stiffness, dt, decay = self._oscillators()
        response = (dt * dt * decay).unsqueeze(-1) * oscillator_response(stiffness, decay, length)
        return response.repeat(2, 1).mT

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """M (2N, 2, 2), what a force adds to (z, x) (2N, 2), B (2N, D) and C (directions, D, 2N), all real."""
        stiffness, dt, decay = self._oscillators()
        F = torch.stack((dt * decay, dt * dt * decay), -1)
        M = torch.stack((decay, -stiffness / dt, F[:, 0], 1 - stiffness), -1).unflatten(-1, (2, 2))
        return M.repeat(2, 1, 1), F.repeat(2, 1), *map(to_float64, self._real_parts())

    def _oscillators(self) -> tuple[Tensor, Tensor, Tensor]:
        """Δt² A/S = det(M − 1), Δt and 1/S = det M: (N,) each.

        IMEX oscillates, with eigenvalues of absolute value r = 1/√S, while (1 − r)² ≤ Δt² A/S ≤ (1 + r)².
        """
        dt, A = to_float64(self.logit_dt).sigmoid(), to_float64(self.A)
        if self.discretization == "im":
            stiffness = dt * dt * A.relu()
            return stiffness / (1 + stiffness), dt, 1 / (1 + stiffness)
        if self.G is None:
            return (dt * dt * A).clamp(0, 4), dt, torch.ones_like(dt)
        decay = 1 / (1 + dt * to_float64(self.G).relu())
        radius = decay.sqrt()
        return (dt * dt * A * decay).clamp((1 - radius) ** 2, (1 + radius) ** 2), dt, decay

    def _real_parts(self) -> tuple[Tensor, Tensor]:
        """B (2N, D) and C (directions, D, 2N) of the real oscillators: those of Re(B u), then those of Im(B u)."""
        return self.B.movedim(-1, 0).flatten(0, 1), torch.cat((self.C[..., 0], -self.C[..., 1]), -1)


def ring_oscillators(radius: Tensor, phase: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """A and G with which the eigenvalues λ of M, for IMEX, are radius · e^{±i phase}: (N,) each, 0 < radius ≤ 1.

    det M = 1/(1 + Δt G) = |λ|², and det(M − 1) = Δt² A |λ|² = |1 − λ|².
    """
    distance = 1 - 2 * radius * phase.cos() + radius**2
    return distance / (radius * dt) ** 2, (1 / radius**2 - 1) / dt
