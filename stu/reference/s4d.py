r"""S4D, the diagonal state space model.

B batch, L length, D channels, N state size, of which N/2 modes are given: their conjugates are implied

    x'(t) = A x(t) + B u(t),    y(t) = 2 Re C x(t) + D u(t)        (per channel, with its own time step dt)

S4D-DFouT is initialised in discrete time, x_l = Ā x_{l−1} + B̄ u_l, with poles Ā on the unit circle, but for damping.

By the zero-order hold the impulse response is K_l = 2 Re Σ_n C_n Ā_n^l B̄_n, a product with a Vandermonde matrix.

Source: Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space Models", 2206.11893,
section 3; Solozabal, Bojkovic, AlQuabeh, Inui, Takáč, "Uncovering the Spectral Bias in Diagonal State Space Models",
2508.20441, sections 3.2 and 4.2.
"""

import math

import torch
from torch import Tensor

from stu.reference.common import fft_convolution, zero_order_hold


def s4d(u: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt: Tensor) -> Tensor:
    """The whole model, (B, L, D) → (B, L, D). A, B, C: complex (D, N/2); D, dt: (D,)."""
    return fft_convolution(u, vandermonde_kernel(A, B, C, dt.unsqueeze(-1), u.shape[1])) + D * u


def dfout_poles(xi: Tensor, d_state: int) -> Tensor:
    """Ā_hn = exp(−ξ_h/2 + i (2πn/N + φ_h)) with φ_h = 2π(h − 1)/NH: (H,) → complex (H, N/2), the upper half circle."""
    n = torch.arange(d_state // 2, device=xi.device)
    phase = 2 * math.pi * torch.arange(len(xi), device=xi.device) / (d_state * len(xi))
    angle = 2 * math.pi * n / d_state + phase.unsqueeze(-1)
    return torch.exp(torch.complex(-xi.unsqueeze(-1).expand_as(angle) / 2, angle.to(xi.dtype)))


def discrete_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """K_l = 2 Re Σ_n C_n B̄_n Ā_n^l: complex (D, N/2) → (D, L)."""
    kernel, x = [], B_bar
    for _ in range(length):
        kernel.append(2 * (C * x).sum(-1).real)
        x = A_bar * x
    return torch.stack(kernel, -1)


def vandermonde_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """K_l = 2 Re Σ_n C_n B̄_n Ā_n^l: complex (D, N/2), dt (D, 1) → (D, L)."""
    _, gain = zero_order_hold(A, dt)
    powers = torch.exp((dt * A).unsqueeze(-1) * torch.arange(length, device=A.device))  # Ā^l (D, N/2, L)
    return 2 * torch.einsum("dn,dnl->dl", C * gain * B, powers).real
