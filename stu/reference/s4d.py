r"""S4D, the diagonal state space model.

B batch, L length, D channels, N state size, of which N/2 modes are given: their conjugates are implied

    x'(t) = A x(t) + B u(t),    y(t) = 2 Re C x(t) + D u(t)        (per channel, with its own time step dt)

By the zero-order hold the impulse response is K_l = 2 Re Σ_n C_n Ā_n^l B̄_n, a product with a Vandermonde matrix.

Source: Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space Models", 2206.11893,
section 3.
"""

import torch
from torch import Tensor

from stu.reference.common import fft_convolution, zero_order_hold


def s4d(u: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt: Tensor) -> Tensor:
    """The whole model, (B, L, D) → (B, L, D). A, B, C: complex (D, N/2); D, dt: (D,)."""
    return fft_convolution(u, vandermonde_kernel(A, B, C, dt.unsqueeze(-1), u.shape[1])) + D * u


def vandermonde_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """K_l = 2 Re Σ_n C_n B̄_n Ā_n^l: complex (D, N/2), dt (D, 1) → (D, L)."""
    _, gain = zero_order_hold(A, dt)
    powers = torch.exp((dt * A).unsqueeze(-1) * torch.arange(length, device=A.device))  # Ā^l (D, N/2, L)
    return 2 * torch.einsum("dn,dnl->dl", C * gain * B, powers).real
