r"""The Linear Recurrent Unit.

B batch, L length, D model width, N state size

    x_t = λ ⊙ x_{t−1} + exp(γ^log) ⊙ B u_t,    y_t = Re(C x_t) + D ⊙ u_t,    λ = exp(−exp(ν^log) + i exp(θ^log))

Source: Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De, "Resurrecting Recurrent Neural Networks for Long
Sequences", 2303.06349, section 3 and appendix A.
"""

import torch
from torch import Tensor

from stu.reference.common import diagonal_ssm


def lru(u: Tensor, nu_log: Tensor, theta_log: Tensor, gamma_log: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The whole model, (B, L, D) → (B, L, D). ν^log, θ^log, γ^log: (N,); complex B (N, D), C (D, N); D (D,)."""
    normalized = gamma_log.exp().unsqueeze(-1) * B
    return diagonal_ssm(u, eigenvalues(nu_log, theta_log), normalized, C) + D * u


def eigenvalues(nu_log: Tensor, theta_log: Tensor) -> Tensor:
    """λ = exp(−exp(ν^log) + i exp(θ^log)), stable whatever the parameters: (N,), (N,) → complex (N,)."""
    return torch.exp(torch.complex(-nu_log.exp(), theta_log.exp()))
