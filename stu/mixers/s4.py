r"""S4, the structured state space model: diagonal plus low rank.

B batch, L length, D model width, R rank, N state size, of which N/2 modes are kept: their conjugates are implied

    x'(t) = (Λ − P Pᴴ) x(t) + B u(t),    y(t) = C x(t) + D u(t)        (per channel, with its own time step dt)

The low-rank term is a feedback. With w_t = Pᴴ (x_t + x_{t−1})/2 the bilinear rule reads

    x_t = Ā x_{t−1} + G (B u_t − P w_t),    Ā = (1 + dt Λ/2)/(1 − dt Λ/2),    G = dt/(1 − dt Λ/2)

so that a step costs O(R·N). As power series in the delay z, with K_CB = Σ_l C Ā^l G B z^l and so on,

    K = K_CB − K_CP (1 + K_QP)^{−1} K_QB,    Q = Pᴴ (1 + z)/2

is the kernel, cut at z^L, at the cost of some FFTs. Re K_QP ≥ 0 for |z| ≤ 1, so that nothing is near singular. Where L
is large compared with N², k_l = C Ā_P^l B̄ costs less by the dense Ā_P of the same step: as Re Λ < 0 and −P Pᴴ ≤ 0, it
never lengthens a vector, and its powers are exact to rounding. Neither depends on a length chosen beforehand, as the
Cauchy kernel of the paper does, which needs Ā_P^L where C itself is the parameter. The zero-order hold has no low rank:
its Ā_P = e^{dt (Λ − P Pᴴ)} is dense, and a step costs O(N²).

Source: Gu, Goel, Ré, "Efficiently Modeling Long Sequences with Structured State Spaces", 2111.00396, and the official
code (state-spaces/s4).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require
from stu.mixer import Mixer
from stu.ops.dense_bilinear import dense_bilinear
from stu.ops.discretize import Discretization, at_rate, discretize, is_current, require_rate
from stu.ops.forms import on_cpu
from stu.ops.hippo import clipped_input, nplr_legs
from stu.ops.kernels import conjugate, dense_kernel, dense_state, diagonal_responses
from stu.ops.long_convolution import long_convolution
from stu.ops.padding import masked, put_back
from stu.ops.power_kernel import power_kernel
from stu.ops.power_series import closed_loop
from stu.ops.precision import all_to_float64, at_least_float32, to_complex128, to_float64
from stu.structure import Structured


class DenseStep(NamedTuple):
    """One step per channel: Ā_P (D, N, N) and B̄ (D, N), which act on interleaved real and imaginary parts."""

    A: Tensor
    B: Tensor

    def advance(self, modes: Tensor, u: Tensor) -> Tensor:
        """x_{t−1} (B, D, N/2), u_t (B, D) → x_t."""
        return _from_parts(torch.einsum("dmn,bdn->bdm", self.A, _to_parts(modes)) + self.B * u.unsqueeze(-1))

    def dense(self) -> "DenseStep":
        """Itself."""
        return self


class ClosedLoop(NamedTuple):
    """One bilinear step with its feedback, per channel: Ā, G B (D, N/2), P, G P (R, D, N/2), correction (D, N/2, R).

    correction: G P (1 + Pᴴ G P/2)^{−1}/2, by which the feedback Pᴴ (x_t + x_{t−1}) of the open loop changes x_t.
    """

    a: Tensor
    GB: Tensor
    P: Tensor
    GP: Tensor
    correction: Tensor

    def advance(self, modes: Tensor, u: Tensor) -> Tensor:
        """x_{t−1} (…, D, N/2), u_t (…, D) → x_t."""
        open_loop = self.a * modes + self.GB * u.unsqueeze(-1)
        feedback = 2 * torch.einsum("rdn,...dn->...dr", self.P.conj(), open_loop + modes).real
        return open_loop - torch.einsum("dnr,...dr->...dn", self.correction, feedback.to(open_loop.dtype))

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """2 Re C x_l after an impulse u_0 = 1: complex C (H, D, N/2) → (H, L, D)."""
        columns, rows = torch.cat((self.GB.unsqueeze(0), self.GP)), torch.cat((C, self.P.conj()))
        outputs, feedback = diagonal_responses(self.a, columns, rows, length).split((len(C), len(self.P)))
        feedback = (feedback + F.pad(feedback[..., :-1], (1, 0))) / 2  # Pᴴ (x_t + x_{t−1})/2
        return closed_loop(torch.cat((outputs, feedback)), len(self.P)).squeeze(1).mT

    def dense(self) -> DenseStep:
        """The same step with its feedback multiplied out."""
        width, half = self.a.shape
        basis = torch.eye(2 * half, dtype=self.a.real.dtype, device=self.a.device).view(-1, 1, half, 2)
        columns = self.advance(torch.view_as_complex(basis), self.a.real.new_zeros(width))  # (N, D, N/2)
        b = self.advance(torch.zeros_like(self.a), self.a.real.new_ones(width))
        return DenseStep(_to_parts(columns).permute(1, 2, 0), _to_parts(b))


class S4State(NamedTuple):
    """The modes of every channel, complex (B, D, N/2), in double precision where the device has it.

    system: the discretised step, made once for all: the closed loop of the bilinear rule, or dense for the zero-order
    hold.
    """

    modes: Tensor
    system: ClosedLoop | DenseStep


class S4(Structured, Mixer):
    """A diagonal plus low-rank state space per channel, run as a long convolution; initialised as HiPPO-LegS.

    causal: if false, a second kernel with a C of its own looks ahead, from the next step on. d_state: N, even.
    rank: R; HiPPO-LegS has one column P, further ones are initialised as noise of standard deviation 0.01.
    discretization: "bilinear", as in the paper, or "zoh", the zero-order hold, by a matrix exponential. n_ssm:
    independent copies of Λ, P and B, which the channels share in turn. dt_min, dt_max: dt is initialised log-uniform
    between them. rate: a factor of dt, for inputs sampled at another rate than in training: 2 for half as many samples.

    Complex parameters are real pairs (…, 2). C and D are initialised normal of variance 1.
    """

    structure = ("discretization",)

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        d_state: int = 64,
        rank: int = 1,
        discretization: Discretization = "bilinear",
        n_ssm: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require(d_state >= 2 and d_state % 2 == 0, "d_state", d_state, "must be even: modes come in conjugate pairs")
        require(rank >= 1, "rank", rank, "must be at least 1")
        require(discretization in ("zoh", "bilinear"), "discretization", discretization, "must be zoh or bilinear")
        require(n_ssm >= 1 and d_model % n_ssm == 0, "n_ssm", n_ssm, f"must divide d_model ({d_model})")
        require(0 < dt_min <= dt_max, "dt_min", dt_min, f"must be above 0 and at most dt_max ({dt_max})")
        require(dt_max <= 1e6, "dt_max", dt_max, "must be at most 1e6")
        require_rate(rate)
        self.d_model, self.causal, self.discretization = d_model, causal, discretization
        self.dt_min, self.dt_max, self.rate = dt_min, dt_max, rate
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real = nn.Parameter(torch.empty(n_ssm, d_state // 2))  # log(−Re Λ): every mode decays
        self.A_imag = nn.Parameter(torch.empty(n_ssm, d_state // 2))
        self.P = nn.Parameter(torch.empty(rank, n_ssm, d_state // 2, 2))
        self.B = nn.Parameter(torch.empty(n_ssm, d_state // 2, 2))
        self.C = nn.Parameter(torch.empty(1 if causal else 2, d_model, d_state // 2, 2))  # [direction, channel, mode]
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        half = self.A_imag.shape[1]
        A, P, B, _ = (part[:half] for part in nplr_legs(2 * half))
        nn.init.normal_(self.P, std=0.01)  # not zero, where the gradient of P Pᴴ vanishes
        with torch.no_grad():
            self.log_A_real.copy_((-A.real).log())
            self.A_imag.copy_(A.imag)
            self.P[0] = torch.view_as_real(P)
            self.B.copy_(torch.view_as_real(clipped_input(B)))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.C, std=math.sqrt(0.5))  # of each part
        nn.init.normal_(self.D)

    def kernel(self, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The impulse responses, (directions, L, D); the skip D is in the first entry."""
        if not on_cpu(self.C):
            return self._kernel_in_few_calls(length, dtype)
        C = to_complex128(self.C)
        if self._by_feedback(length):
            kernel = self._bilinear().kernel(C, length)
        else:
            kernel = dense_kernel(*self._system().dense(), _readout(C), length)
        kernel[0, 0] += self.D
        return kernel.to(dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        kernel = self.kernel(x.shape[1], at_least_float32(x))
        return long_convolution(masked(x, mask), *(kernel if len(kernel) > 1 else (kernel.squeeze(0),)))

    def initial_state(self, batch_size: int) -> S4State:
        """Zeros."""
        return S4State(to_complex128(self.C).new_zeros(batch_size, *self.C.shape[1:3]), self._system())

    def step(self, x: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """x_t (B, D), state → y_t (B, D), state."""
        system = state.system if is_current(state.system, self.parameters()) else self._system()
        u = to_float64(x)
        modes = system.advance(state.modes, u)
        y = 2 * torch.einsum("dn,bdn->bd", to_complex128(self.C[0]), modes).real + self.D * u
        return y.to(x.dtype), S4State(modes, system)

    def prefill(self, x: Tensor, mask: Tensor | None = None, state: S4State | None = None) -> tuple[Tensor, S4State]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        x, system = masked(x, mask), self._system()
        (A, B), y = system.dense(), self.forward(x)
        initial = None if state is None or not len(x) else _to_parts(state.modes)
        if initial is not None:
            readout = A.mT @ _readout(to_complex128(self.C[0])).unsqueeze(-1)
            free = dense_kernel(A.mT, readout.squeeze(-1), initial, x.shape[1])  # (B, L, D): C A^{t+1} x_0
            y = (y + put_back(free, mask)).to(x.dtype)
        return y, S4State(_from_parts(dense_state(A, B, x, mask, initial)), system)

    def _by_feedback(self, length: int) -> bool:
        """Whether the kernel costs less by (1 + R)² power series than by matrices of N² numbers.

        The factor is measured.
        """
        rank, _, half, _ = self.P.shape
        return self.discretization == "bilinear" and (1 + rank) ** 2 * length <= 2 * (2 * half) ** 2

    def _kernel_in_few_calls(self, length: int, dtype: torch.dtype) -> Tensor:
        """The same by dense matrices, for devices on which a call costs more than its numbers."""
        C, B, P, log_dt, log_rate, frequency, D = all_to_float64(
            self.C, self.B, self.P, self.log_dt, self.log_A_real, self.A_imag, self.D
        )
        log_dt = at_rate(log_dt, self.rate)
        readout = _to_parts(conjugate(torch.view_as_complex(C)))  # 2 Re C x, up to a factor
        if self.discretization == "zoh":
            return power_kernel(*self._zoh(), readout, D, length, 2.0, dtype)
        step = dense_bilinear(log_dt, log_rate, frequency, P.flatten(-2), B.flatten(-2))
        return power_kernel(*step, readout, D, length, 4.0, dtype)

    def _system(self) -> ClosedLoop | DenseStep:
        """The step of the discretized system."""
        return self._bilinear() if self.discretization == "bilinear" else self._zoh()

    def _zoh(self) -> DenseStep:
        """The zero-order hold, both parts of it in one exponential of dt [[A, B], [0, 0]]."""
        dt, A, P, B = self._continuous()
        width, half = A.shape
        basis = torch.view_as_complex(torch.eye(2 * half, dtype=dt.dtype, device=dt.device).view(-1, 1, half, 2))
        feedback = 2 * torch.einsum("rdn,jdn->jdr", P.conj(), basis.expand(-1, width, -1)).real.to(P.dtype)
        columns = A * basis - torch.einsum("rdn,jdr->jdn", P, feedback)  # (N, D, N/2)
        generator = dt.new_zeros(width, 2 * half + 1, 2 * half + 1)
        generator[:, :-1, :-1] = _to_parts(columns).permute(1, 2, 0)
        generator[:, :-1, -1] = _to_parts(B)
        exponential = torch.linalg.matrix_exp(dt.unsqueeze(-1) * generator)
        return DenseStep(exponential[:, :-1, :-1], exponential[:, :-1, -1])

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per channel: dt (D, 1), Λ (D, N/2), P (R, D, N/2) and B (D, N/2)."""
        dt = at_rate(to_float64(self.log_dt), self.rate).exp().unsqueeze(-1)
        A = torch.complex(-to_float64(self.log_A_real).exp(), to_float64(self.A_imag))
        copies = self.d_model // len(A)
        P, B = to_complex128(self.P), to_complex128(self.B)
        return dt, A.repeat(copies, 1), P.repeat(1, copies, 1), B.repeat(copies, 1)

    def _bilinear(self) -> ClosedLoop:
        """The bilinear rule."""
        dt, A, P, B = self._continuous()
        a, gain = discretize(A, dt, "bilinear")
        loop = torch.einsum("rdn,dn,sdn->drs", P.conj(), gain, P).real  # Pᴴ G P/2, conjugate modes included
        eye = torch.eye(len(P), dtype=dt.dtype, device=dt.device)
        inverse = torch.linalg.inv_ex(eye + loop).inverse  # never singular, as Re G > 0; a check would synchronise
        correction = torch.einsum("sdn,dn,dsr->dnr", P, gain, inverse.to(gain.dtype)) / 2
        return ClosedLoop(a, gain * B, P, gain * P, correction)


def _readout(C: Tensor) -> Tensor:
    """The rows (…, N) that make 2 Re C x of interleaved parts x: complex (…, N/2)."""
    return 2 * _to_parts(conjugate(C))


def _to_parts(modes: Tensor) -> Tensor:
    """Complex (…, N/2) → interleaved real and imaginary parts (…, N)."""
    return torch.view_as_real(modes).flatten(-2)


def _from_parts(parts: Tensor) -> Tensor:
    """Interleaved real and imaginary parts (…, N) → complex (…, N/2)."""
    return torch.view_as_complex(parts.unflatten(-1, (-1, 2)).contiguous())
