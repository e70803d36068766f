r"""S4, the structured state space model: diagonal plus low rank.

B batch, L length, D channels, N state size, of which N/2 modes are given: their conjugates are implied,
F = L//2 + 1 frequencies

    x'(t) = (Λ − P P*) x(t) + B u(t),    y(t) = C x(t) + D u(t)        (per channel, with its own time step dt)

By the bilinear rule the impulse response is K_l = C Ā^l B̄. At the roots of unity its generating function
K̂(ω) = Σ_l C Ā^l B̄ ω^l needs no power of Ā but Ā^L, and that one only in C̃ = C (I − Ā^L), which is what the official
code learns. Source: Gu, Goel, Ré, "Efficiently Modeling Long Sequences with Structured State Spaces", 2111.00396,
section 3 and appendix C.
"""

import torch
from torch import Tensor

from stu.reference.common import fft_convolution


def s4(u: Tensor, A: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, D: Tensor, dt: Tensor) -> Tensor:
    """The whole model, (B, L, D) → (B, L, D). A (Λ), P, B, C̃ of this L: complex (D, N/2); D, dt: (D,)."""
    modes = (with_conjugates(x) for x in (A, P, B, C_tilde))
    spectrum = generating_function(*modes, dt=dt.unsqueeze(-1), root=roots_of_unity(u))
    return fft_convolution(u, torch.fft.irfft(spectrum, n=u.shape[1])) + D * u


def generating_function(A: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, *, dt: Tensor, root: Tensor) -> Tensor:
    """K̂(ω) = 2/(1 + ω) · (k_CB − k_CP (1 + k_PP)^{−1} k_PB): Woodbury's identity corrects the diagonal part.

    With k_vw = Σ_n v_n w_n / (z − Λ_n) at z = 2/dt · (1 − ω)/(1 + ω). All modes: complex (D, N); dt (D, 1); root (F,).
    Returns (D, F).
    """
    pairs = torch.stack((B, P)).unsqueeze(1) * torch.stack((C_tilde, P.conj()))  # (2, 2, D, N)
    (CB, PB), (CP, PP) = torch.einsum("ijdn,dnf->ijdf", pairs * dt, cauchy_matrix(dt * A, root))
    half = (1 + root) / 2  # which the Cauchy matrix divides by
    return CB - CP * PB * half / (1 + PP * half)


def cauchy_matrix(dt_A: Tensor, root: Tensor) -> Tensor:
    """2/(1 + ω) · 1/(z − dt Λ) with z = 2 (1 − ω)/(1 + ω), finite at ω = −1 too: (D, N), (F,) → (D, N, F)."""
    return 2 / (2 * (1 - root) - (1 + root) * dt_A.unsqueeze(-1))


def roots_of_unity(u: Tensor) -> Tensor:
    """ω_f = e^{−2πif/L} of the L steps of u (B, L, D), up to the middle: complex (F,)."""
    length = u.shape[1]
    angle = -2 * torch.pi * torch.arange(length // 2 + 1, device=u.device, dtype=u.dtype) / length
    return torch.polar(torch.ones_like(angle), angle)


def truncated_output(A: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """C̃ = C (I − Ā^L), the output matrix of the kernel cut at L steps: complex (D, N/2), dt (D,) → (D, N/2)."""
    half = C.shape[1]
    A, P, C = (with_conjugates(x) for x in (A, P, C))
    power = torch.linalg.matrix_power(bilinear(A, P, dt), length)
    return (C - (C.unsqueeze(-2) @ power).squeeze(-2))[:, :half]


def bilinear(A: Tensor, P: Tensor, dt: Tensor) -> Tensor:
    """Ā = (I − dt/2 · (Λ − P P*))^{−1} (I + dt/2 · (Λ − P P*)), dense: all modes (D, N), dt (D,) → (D, N, N)."""
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    half_step = dt[:, None, None] / 2 * (torch.diag_embed(A) - P.unsqueeze(-1) * P.conj().unsqueeze(-2))
    return torch.linalg.solve(eye - half_step, eye + half_step)


def with_conjugates(x: Tensor) -> Tensor:
    """All modes from one of each conjugate pair: complex (D, N/2) → (D, N)."""
    return torch.cat((x, x.conj()), -1)
