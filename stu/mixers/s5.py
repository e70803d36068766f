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

from stu.errors import require
from stu.mixer import Mixer
from stu.ops.discretize import Discretization, discretize
from stu.ops.hippo import nplr_legs
from stu.ops.padding import masked
from stu.ops.precision import to_complex128, to_float64
from stu.ops.scan import diagonal_ssm, diagonal_step

OutputInit = Literal["trunc_standard_normal", "lecun_normal", "complex_normal"]
LARGEST_REAL_PART = -1e-4  # of eigenvalues with clip_eigs
TRUNCATED_STD = 0.87962566103423978  # of a standard normal distribution truncated at ±2


class S5State(NamedTuple):
    """The modes, complex (B, P)."""

    modes: Tensor


class S5(Mixer):
    """One diagonal state space for all channels together, run as a scan.

    causal: if false, a second state with the same Λ, dt and B runs from the end, and has a C of its own.
    d_state: N. num_blocks: J; the state matrix is initialised block-diagonal, every block the normal part of HiPPO-LegS
    of size N/J. conj_sym: keep one mode of each conjugate pair, y = 2 Re C x. C_init: in the basis of HiPPO both parts
    of C are normal, truncated at two standard deviations, of variance 1/N (trunc_standard_normal) or 1/(N·D)
    (lecun_normal); complex_normal draws C in the basis of the modes, of variance 1. clip_eigs: Re Λ is clipped to at
    most −1e−4, so that the system is stable. dt_min, dt_max: dt is initialised log-uniform between them. step_rescale:
    a factor of dt, for inputs sampled at another rate than in training.

    Complex parameters are real pairs (…, 2). B is initialised in the basis of HiPPO, like C, of variance 1/N; D normal
    of variance 1.
    """

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
        step_rescale: float = 1.0,
    ) -> None:
        super().__init__()
        require(d_state >= 1, "d_state", d_state, "must be at least 1")
        fits = num_blocks >= 1 and d_state % num_blocks == 0
        require(fits, "num_blocks", num_blocks, f"must divide d_state ({d_state})")
        even = f"must leave blocks of even size for conjugate pairs (d_state {d_state})"
        require(not conj_sym or d_state // num_blocks % 2 == 0, "num_blocks", num_blocks, even)
        require(discretization in ("zoh", "bilinear"), "discretization", discretization, "must be zoh or bilinear")
        require(C_init in get_args(OutputInit), "C_init", C_init, f"must be one of {', '.join(get_args(OutputInit))}")
        require(0 < dt_min <= dt_max, "dt_min", dt_min, f"must be above 0 and at most dt_max ({dt_max})")
        require(step_rescale > 0, "step_rescale", step_rescale, "must be above 0")
        self.d_model, self.causal, self.num_blocks, self.conj_sym = d_model, causal, num_blocks, conj_sym
        self.discretization, self.C_init, self.clip_eigs = discretization, C_init, clip_eigs
        self.dt_min, self.dt_max, self.step_rescale = dt_min, dt_max, step_rescale
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self._run(masked(x, mask))[0]

    def initial_state(self, batch_size: int) -> S5State:
        """Zeros."""
        return S5State(to_complex128(self.C).new_zeros(batch_size, len(self.Lambda)))

    def step(self, x: Tensor, state: S5State) -> tuple[Tensor, S5State]:
        """x_t (B, D), state → y_t (B, D), state."""
        y, modes = diagonal_step(x, *self._system(), state.modes)
        return y + (self.D * x).to(x.dtype), S5State(modes)

    def prefill(self, x: Tensor) -> tuple[Tensor, S5State]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        return self._run(x)

    def _run(self, x: Tensor) -> tuple[Tensor, S5State]:
        y, modes = diagonal_ssm(x, *self._system())
        return y + (self.D * x).to(x.dtype), S5State(modes)

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Λ̄ (P,), B̄ (P, D), and C for Re C x (directions, D, P)."""
        real, imaginary = to_float64(self.Lambda).unbind(-1)
        if self.clip_eigs:
            real = real.clamp(max=LARGEST_REAL_PART)
        dt = self.step_rescale * to_float64(self.log_dt).exp()
        decay, gain = discretize(torch.complex(real, imaginary), dt, self.discretization)
        C = to_complex128(self.C)
        return decay, gain.unsqueeze(-1) * to_complex128(self.B), 2 * C if self.conj_sym else C


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
