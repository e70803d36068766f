r"""S5, the simplified state space layer: one multi-input, multi-output diagonal system.

B batch, L length, D model width, N state size, J blocks, P modes kept: N, or N/2 where conjugates are implied

    x'(t) = Λ x(t) + B u(t),    y(t) = Re C x(t) + D ⊙ u(t)        (with a time step dt per mode)

Source: Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling", 2208.04933, and the
official code (lindermanlab/S5).
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from stu.errors import OptionError, require
from stu.mixer import Mixer
from stu.ops.discretize import Discretization, discretize, is_current, require_rate
from stu.ops.hippo import nplr_legs
from stu.ops.irregular import ContinuousSystem, irregular_ssm
from stu.ops.padding import between_real, masked
from stu.ops.precision import to_complex128, to_float64
from stu.ops.scan import diagonal_ssm, diagonal_step, padded_ssm
from stu.structure import Structured

OutputInit = Literal["trunc_standard_normal", "lecun_normal", "complex_normal"]
LARGEST_REAL_PART = -1e-4  # of eigenvalues with clip_eigs
TRUNCATED_STD = 0.87962566103423978  # of a standard normal distribution truncated at ±2


class S5State(NamedTuple):
    """The modes, complex (B, P), and the system of `S5._system`, made once for all steps with this factor of dt."""

    modes: Tensor
    system: tuple[Tensor, Tensor, Tensor]
    step_rescale: float


class S5(Structured, Mixer):
    """One diagonal state space for all channels together, run as a scan.

    causal: if false, a second state with the same Λ, dt and B runs from the end, and has a C of its own.
    d_state: N. num_blocks: J; the state matrix is initialised block-diagonal, every block the normal part of HiPPO-LegS
    of size N/J. conj_sym: keep one mode of each conjugate pair, y = 2 Re C x. C_init: in the basis of HiPPO both parts
    of C are normal, truncated at two standard deviations, of variance 1/N (trunc_standard_normal) or 1/(N·D)
    (lecun_normal); complex_normal draws C in the basis of the modes, of variance 1. clip_eigs: Re Λ is clipped to at
    most −1e−4, so that the system is stable. dt_min, dt_max: dt is initialised log-uniform between them. rate: a factor
    of dt, for inputs sampled at another rate than in training: 2 for half as many samples.

    Every call takes a further factor, `step_rescale`: a number, or those of all steps (B, L), for
    sequences sampled irregularly, like the pendulum of the paper. Factor t is that of the interval which ends at sample
    t, in both directions: over it the state goes from x_{t−1} to x_t, and from the end from z_{t+1} to z_t. Padding
    before the first and after the last real position takes no time. Factors in a tensor should be positive; their
    values are not checked.

    Complex parameters are real pairs (…, 2). B is initialised in the basis of HiPPO, like C, of variance 1/N; D normal
    of variance 1.
    """

    structure = ("conj_sym", "discretization", "clip_eigs")

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        d_state: int = 256,
        num_blocks: int = 8,
        conj_sym: bool = True,
        discretization: Discretization = "zoh",
        C_init: OutputInit = "trunc_standard_normal",
        clip_eigs: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require(d_state >= 1, "d_state", d_state, "must be at least 1")
        fits = num_blocks >= 1 and d_state % num_blocks == 0
        require(fits, "num_blocks", num_blocks, f"must divide d_state ({d_state})")
        even = f"must leave blocks of even size for conjugate pairs (d_state {d_state})"
        require(not conj_sym or d_state // num_blocks % 2 == 0, "num_blocks", num_blocks, even)
        require(discretization in ("zoh", "bilinear"), "discretization", discretization, "must be zoh or bilinear")
        require(C_init in get_args(OutputInit), "C_init", C_init, f"must be one of {', '.join(get_args(OutputInit))}")
        require(0 < dt_min <= dt_max, "dt_min", dt_min, f"must be above 0 and at most dt_max ({dt_max})")
        require(dt_max <= 1e6, "dt_max", dt_max, "must be at most 1e6")
        require_rate(rate)
        self.d_model, self.causal, self.num_blocks, self.conj_sym = d_model, causal, num_blocks, conj_sym
        self.discretization, self.C_init, self.clip_eigs = discretization, C_init, clip_eigs
        self.dt_min, self.dt_max, self.rate = dt_min, dt_max, rate
        modes = d_state // 2 if conj_sym else d_state
        self.Lambda = nn.Parameter(torch.empty(modes, 2))
        self.log_dt = nn.Parameter(torch.empty(modes))
        self.B = nn.Parameter(torch.empty(modes, d_model, 2))
        self.C = nn.Parameter(torch.empty(1 if causal else 2, d_model, modes, 2))  # [direction, out, mode]
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        d_state = len(self.Lambda) * (2 if self.conj_sym else 1)
        eigenvalues, V = hippo_modes(d_state // self.num_blocks, self.conj_sym)
        B = truncated_normal(d_state, self.d_model, variance=1 / d_state)
        with torch.no_grad():
            self.Lambda.copy_(torch.view_as_real(eigenvalues).repeat(self.num_blocks, 1))
            self.B.copy_(torch.view_as_real(input_modes(B, V)))
            if self.C_init == "complex_normal":
                self.C.normal_(std=math.sqrt(0.5))  # of each part
            else:
                fan_in = d_state if self.C_init == "trunc_standard_normal" else d_state * self.d_model
                parts = truncated_normal(*self.C.shape[:2], d_state, 2, variance=1 / fan_in)
                self.C.copy_(torch.view_as_real(output_modes(torch.view_as_complex(parts), V)))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.D)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, step_rescale: float | Tensor = 1.0) -> Tensor:
        """(B, L, D) → (B, L, D). step_rescale: a factor of dt, or those of all steps (B, L)."""
        _check_step_rescale(step_rescale, x)
        x = masked(x, mask)
        if isinstance(step_rescale, Tensor):
            y, _ = self._irregular(x, mask, step_rescale)
        else:
            y, _ = diagonal_ssm(x, *self._system(step_rescale))
        return y + (self.D * x).to(x.dtype)

    def initial_state(self, batch_size: int) -> S5State:
        """Zeros."""
        system = self._system()
        return S5State(system[0].new_zeros(batch_size, len(system[0])), system, 1.0)

    def step(self, x: Tensor, state: S5State, *, step_rescale: float | Tensor = 1.0) -> tuple[Tensor, S5State]:
        """x_t (B, D), state → y_t (B, D), state. step_rescale: a factor of dt, or those of all sequences (B,)."""
        _check_step_rescale(step_rescale, x)
        if isinstance(step_rescale, Tensor):
            y, modes = self._irregular(x.unsqueeze(1), None, step_rescale.unsqueeze(1), state.modes)
            return y.squeeze(1) + (self.D * x).to(x.dtype), state._replace(modes=modes)
        current = step_rescale == state.step_rescale and is_current(state.system, self.parameters())
        system = state.system if current else self._system(step_rescale)
        y, modes = diagonal_step(x, *system, state.modes)
        return y + (self.D * x).to(x.dtype), S5State(modes, system, step_rescale)

    def prefill(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: S5State | None = None,
        *,
        step_rescale: float | Tensor = 1.0,
    ) -> tuple[Tensor, S5State]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues. step_rescale: as in `forward`."""
        _check_step_rescale(step_rescale, x)
        x, initial = masked(x, mask), None if state is None else state.modes
        if isinstance(step_rescale, Tensor):
            y, modes = self._irregular(x, mask, step_rescale, initial)
            system, step_rescale = self._system(), 1.0
        else:
            system = self._system(step_rescale)
            y, modes = padded_ssm(x, mask, *system, initial)
        return y + (self.D * x).to(x.dtype), S5State(modes, system, step_rescale)

    def _irregular(
        self, x: Tensor, mask: Tensor | None, factors: Tensor, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if mask is not None:
            factors = factors.where(between_real(mask), factors.new_zeros(()))
        return irregular_ssm(x, factors, self._continuous(), initial)

    def _system(self, step_rescale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Λ̄ (P,), B̄ (P, D), and C for Re C x (directions, D, P)."""
        A, dt, B, C, method = self._continuous()
        decay, gain = discretize(A, step_rescale * dt, method)
        return decay, gain.unsqueeze(-1) * B, C

    def _continuous(self) -> ContinuousSystem:
        real, imaginary = to_float64(self.Lambda).unbind(-1)
        if self.clip_eigs:
            real = real.clamp(max=LARGEST_REAL_PART)
        dt = self.rate * to_float64(self.log_dt).exp()
        B, C = to_complex128(self.B), to_complex128(self.C)
        return ContinuousSystem(
            torch.complex(real, imaginary), dt, B, 2 * C if self.conj_sym else C, self.discretization
        )


def _check_step_rescale(step_rescale: float | Tensor, x: Tensor) -> None:
    """Raise `OptionError` unless it is a finite number above 0, or has one real number for each step of x (…, D)."""
    if not isinstance(step_rescale, Tensor):
        require(0 < step_rescale < math.inf, "step_rescale", step_rescale, "must be above 0 and finite")
    elif step_rescale.shape != x.shape[:-1] or not step_rescale.is_floating_point():
        found = f"{step_rescale.dtype} {tuple(step_rescale.shape)}"
        raise OptionError("step_rescale", found, f"must be a number, or floating-point {tuple(x.shape[:-1])}")


def hippo_modes(d_state: int, conj_sym: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues (P,) and eigenvectors (N, P) of HiPPO-N; with `conj_sym` only those with negative imaginary part."""
    normal = nplr_legs(d_state)
    kept = d_state // 2 if conj_sym else d_state
    return normal.eigenvalues[:kept], normal.V[:, :kept]


def input_modes(B: Tensor, V: Tensor) -> Tensor:
    """An input matrix in the basis of the modes, block by block: Vᴴ B, (N, D) → (P, D)."""
    return (V.mH @ B.to(V).unflatten(0, (-1, len(V)))).flatten(0, 1)


def output_modes(C: Tensor, V: Tensor) -> Tensor:
    """An output matrix in the basis of the modes, block by block: C V, (…, D, N) → (…, D, P)."""
    return (C.to(V).unflatten(-1, (-1, len(V))) @ V).flatten(-2)


def truncated_normal(*shape: int, variance: float) -> Tensor:
    """Normal numbers truncated at two standard deviations, of this variance (JAX's lecun_normal), float64."""
    std = math.sqrt(variance) / TRUNCATED_STD
    draws = torch.empty(shape, dtype=torch.float64)
    return nn.init.trunc_normal_(draws, std=std, a=-2 * std, b=2 * std)
