r"""HiPPO-LegS, the state matrix that represents the whole past by Legendre coefficients, and its diagonal forms.

N state size

    x'(t) = A x(t) + B u(t),    A = −½ I + S − P Pᵀ with S skew-symmetric

The eigenvectors of A itself are hopelessly ill-conditioned. But A + P Pᵀ is normal: a unitary V turns it into diag(Λ)
and A into diag(Λ) − p pᴴ, p = Vᴴ P. S4 keeps both terms; S4D-LegS and S5 drop p. Sources: Gu et al., "HiPPO",
2008.07669, theorem 2; "Efficiently Modeling Long Sequences with Structured State Spaces", 2111.00396, theorem 1 and
appendix C; "On the Parameterization and Initialization of Diagonal State Space Models", 2206.11893, section 4. That of
dfout has another origin: Solozabal et al., "Uncovering the Spectral Bias in Diagonal State Space Models", 2508.20441.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stu.errors import require

DiagonalInit = Literal["legs", "inv", "lin", "dfout"]
LARGEST_INPUT = 2.0
LARGEST_STATE = 4096  # in minutes; the time grows with its cube


class NormalPlusLowRank(NamedTuple):
    """A = V (diag(eigenvalues) − P Pᴴ) Vᴴ with input matrix V B, in complex128.

    eigenvalues (N,), ascending in their imaginary parts and so in conjugate pairs from both ends: the first N // 2 are
    those with negative imaginary part. P (N,), B (N,). V (N, N) is unitary, with the eigenvectors in its columns.
    """

    eigenvalues: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor]:
    """The real matrices A (N, N) and B (N,) of HiPPO-LegS, float64.

    A_nk = −√((2n+1)(2k+1)) below the diagonal, −(n+1) on it and 0 above; B_n = √(2n+1).
    """
    allowed = f"must be in 1 … {LARGEST_STATE}: eigenvectors of so many modes are computed"
    require(1 <= d_state <= LARGEST_STATE, "d_state", d_state, allowed)
    index = torch.arange(d_state, dtype=torch.float64)
    B = (2 * index + 1).sqrt()
    return -torch.outer(B, B).tril(-1) - torch.diag(index + 1), B


def nplr_legs(d_state: int) -> NormalPlusLowRank:
    """HiPPO-LegS in the basis where A + P Pᵀ, with P_n = √(n + ½), is diagonal.

    The phase of an eigenvector is arbitrary: here its first entry is real and positive.
    """
    A, B = hippo_legs(d_state)
    P = B / math.sqrt(2)
    skew = (A - A.T) / 2  # the rest of A + P Pᵀ is −½ I
    frequencies, V = torch.linalg.eigh(-1j * skew)
    V = V * V[0].conj().sgn()
    eigenvalues = torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    return NormalPlusLowRank(eigenvalues, V.mH @ P.to(V), V.mH @ B.to(V), V)


def clipped_input(B: Tensor) -> Tensor:
    """B with imaginary parts clipped to ±2, as the official code of S4 (state-spaces/s4) initialises it.

    In the basis of `nplr_legs` B is almost imaginary and of magnitude 0.6 N for the fastest mode; this bounds it.
    """
    return torch.complex(B.real, B.imag.clamp(-LARGEST_INPUT, LARGEST_INPUT))


def diagonal_init(init: DiagonalInit, d_state: int, copies: int = 1) -> tuple[Tensor, Tensor]:
    """Λ and B of S4D, (N/2,) complex128 for even N: of each conjugate pair the mode with negative imaginary part.

    lin: Λ_n = −½ − iπn. inv: Λ_n = −½ − i (N/π) (N/(2n+1) − 1). Both have B = 1. legs: the normal part of HiPPO-LegS
    and its clipped B. dfout: Λ_hn = −½ − i (2πn/N + 2πh/NH) for H copies, (H, N/2), and B = 1; frequencies in radians
    per step, which are a uniform grid of the half circle.
    """
    half = d_state // 2
    index = torch.arange(half, dtype=torch.float64)
    match init:
        case "legs":
            legs = nplr_legs(d_state)
            return legs.eigenvalues[:half], clipped_input(legs.B[:half])
        case "inv":
            frequencies = d_state / math.pi * (d_state / (2 * index + 1) - 1)
        case "dfout":
            phases = torch.arange(copies, dtype=torch.float64).unsqueeze(-1) / copies
            frequencies = 2 * math.pi / d_state * (index + phases)
        case _:
            require(init == "lin", "init", init, "must be legs, inv, lin or dfout")
            frequencies = math.pi * index
    return torch.complex(torch.full_like(frequencies, -0.5), -frequencies), torch.ones(half, dtype=torch.complex128)
