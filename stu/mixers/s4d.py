r"""S4D, the diagonal state space model.

B batch, L length, D model width, N state size, of which N/2 modes are kept: their conjugates are implied

    x'(t) = Λ x(t) + B u(t),    y(t) = 2 Re C x(t) + D u(t)        (per channel, with its own time step dt)

Source: Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space Models", 2206.11893,
and the official code (state-spaces/s4); init=dfout: Solozabal, Bojkovic, AlQuabeh, Inui, Takáč, "Uncovering the
Spectral Bias in Diagonal State Space Models", 2508.20441.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stu.errors import require
from stu.mixer import Mixer
from stu.ops.discretize import Discretization, at_rate, discretize, is_current, require_rate
from stu.ops.forms import on_cpu
from stu.ops.hippo import DiagonalInit, diagonal_init
from stu.ops.kernels import diagonal_kernel, diagonal_state
from stu.ops.long_convolution import long_convolution
from stu.ops.padding import masked, put_back
from stu.ops.precision import all_to_float64, at_least_float32, to_complex128, to_float64
from stu.ops.zoh_kernel import zoh_kernel
from stu.structure import Structured


class S4DState(NamedTuple):
    """The modes of every channel, complex (B, D, N/2), in double precision where the device has it.

    system: that of `S4D._system`, made once for all steps.
    """

    modes: Tensor
    system: tuple[Tensor, Tensor, Tensor]


class S4D(Structured, Mixer):
    """A diagonal state space per channel, run as a long convolution.

    causal: if false, a second kernel with a C of its own looks ahead, from the next step on. d_state: N, even.
    init: "legs", the diagonal part of HiPPO-LegS, one of the closed forms "inv" and "lin", or "dfout", see below.
    n_ssm: independent copies of Λ and B, which the channels share in turn. dt_min, dt_max: dt is initialised
    log-uniform between them. rate: a factor of dt, for inputs sampled at another rate than in training: 2 for half as
    many samples.

    With init="dfout" (2508.20441, section 4.2) the discrete system itself is initialised: its poles Ā are e^{−ξ/2 + iΩ}
    with Ω on a uniform grid of the circle, which all copies together fill once (n_ssm = D: as in the paper). From then
    on dt is the damping ξ alone, and Im Λ is Ω, in radians per step. The paper does not say how the input is scaled: it
    is held, as by zoh, and multiplied by ξ, so that resonances are as high as those of the other initialisations. As in
    them every mode's rate is learned, beside the ξ of its channel, and N/2 modes on the half circle stand for N.

    Complex parameters are real pairs (…, 2). C and D are initialised normal of variance 1.
    """

    structure = ("discretization", "in_steps")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        d_state: int = 64,
        init: DiagonalInit = "legs",
        discretization: Discretization = "zoh",
        n_ssm: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require(d_state >= 2 and d_state % 2 == 0, "d_state", d_state, "must be even: modes come in conjugate pairs")
        require(discretization in ("zoh", "bilinear"), "discretization", discretization, "must be zoh or bilinear")
        held = init != "dfout" or discretization == "zoh"
        require(held, "discretization", discretization, "must be zoh with init=dfout, whose poles are of discrete time")
        require(n_ssm >= 1 and d_model % n_ssm == 0, "n_ssm", n_ssm, f"must divide d_model ({d_model})")
        require(0 < dt_min <= dt_max, "dt_min", dt_min, f"must be above 0 and at most dt_max ({dt_max})")
        require(dt_max <= 1e6, "dt_max", dt_max, "must be at most 1e6")
        require_rate(rate)
        self.d_model, self.causal, self.init, self.discretization = d_model, causal, init, discretization
        self.dt_min, self.dt_max, self.in_steps, self.rate = dt_min, dt_max, init == "dfout", rate
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real = nn.Parameter(torch.empty(n_ssm, d_state // 2))  # log(−Re Λ): every mode decays
        self.A_imag = nn.Parameter(torch.empty(n_ssm, d_state // 2))
        self.B = nn.Parameter(torch.empty(n_ssm, d_state // 2, 2))
        self.C = nn.Parameter(torch.empty(1 if causal else 2, d_model, d_state // 2, 2))  # [direction, channel, mode]
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        A, B = diagonal_init(self.init, 2 * self.A_imag.shape[1], len(self.A_imag))
        with torch.no_grad():
            self.log_A_real.copy_((-A.real).log())
            self.A_imag.copy_(A.imag)
            self.B.copy_(torch.view_as_real(B))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.C, std=math.sqrt(0.5))  # of each part
        nn.init.normal_(self.D)

    def kernel(self, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The impulse responses, (directions, L, D); the skip D is in the first entry."""
        if self.discretization == "zoh" and not on_cpu(self.C):
            C, D, *rest = all_to_float64(self.C, self.D, self.log_dt, self.log_A_real, self.A_imag, self.B)
            log_dt, log_rate, frequency, B = _in_steps(*rest) if self.in_steps else rest
            return zoh_kernel(at_rate(log_dt, self.rate), log_rate, frequency, B, C, D, length, dtype)
        kernel = diagonal_kernel(*self._system(), length)
        kernel[0, 0] += self.D
        return kernel.to(dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        kernel = self.kernel(x.shape[1], at_least_float32(x))
        return long_convolution(masked(x, mask), *(kernel if len(kernel) > 1 else (kernel.squeeze(0),)))

    def initial_state(self, batch_size: int) -> S4DState:
        """Zeros."""
        system = self._system()
        return S4DState(system[0].new_zeros(batch_size, *system[0].shape), system)

    def step(self, x: Tensor, state: S4DState) -> tuple[Tensor, S4DState]:
        """x_t (B, D), state → y_t (B, D), state."""
        a, b, C = system = state.system if is_current(state.system, self.parameters()) else self._system()
        u = to_float64(x)
        modes = a * state.modes + b * u.unsqueeze(-1)
        y = 2 * torch.einsum("dn,bdn->bd", C[0], modes).real + self.D * u
        return y.to(x.dtype), S4DState(modes, system)

    def prefill(self, x: Tensor, mask: Tensor | None = None, state: S4DState | None = None) -> tuple[Tensor, S4DState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        x, (a, b, C) = masked(x, mask), self._system()
        y, initial = self.forward(x), None if state is None or not len(x) else state.modes
        if initial is not None:
            free = diagonal_kernel(a, a * C[0], initial, x.shape[1])  # (B, L, D): C Ā^{t+1} x_0
            y = (y + put_back(free, mask)).to(x.dtype)
        return y, S4DState(diagonal_state(a, b, x, mask, initial), (a, b, C))

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ā and B̄ of every channel, complex (D, N/2), and C (directions, D, N/2)."""
        parts = [to_float64(part) for part in (self.log_dt, self.log_A_real, self.A_imag, self.B)]
        log_dt, log_rate, frequency, B = _in_steps(*parts) if self.in_steps else parts
        A, copies = torch.complex(-log_rate.exp(), frequency), self.d_model // len(log_rate)
        a, gain = discretize(A.repeat(copies, 1), at_rate(log_dt, self.rate).exp().unsqueeze(-1), self.discretization)
        return a, gain * to_complex128(B).repeat(copies, 1), to_complex128(self.C)


def _in_steps(log_xi: Tensor, log_rate: Tensor, frequency: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of init=dfout: log dt, log(−Re Λ), Im Λ and B of every channel, where dt = 1 and ξ scales the rates and B.

    (D,), (n_ssm, N/2) twice, (n_ssm, N/2, 2) → (D,), (D, N/2) twice, (D, N/2, 2).
    """
    log_xi = log_xi.view(-1, len(log_rate), 1)  # (copies, n_ssm, 1)
    frequency, B = frequency.expand(len(log_xi), -1, -1), log_xi.exp().unsqueeze(-1) * B
    dt, rate = torch.zeros_like(log_xi).flatten(), (log_rate + log_xi).flatten(0, 1)
    return dt, rate, frequency.flatten(0, 1), B.flatten(0, 1)
