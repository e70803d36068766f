r"""What several of the papers share: convolution by FFT, the zero-order hold and the associative scan.

B batch, L length, D model width, N state size
"""

from collections.abc import Callable

import torch
from torch import Tensor


def fft_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = Σ_{i≤t} k(i) u_{t−i} in each channel, by FFTs of length 2L: (B, L, D), (D, L) → (B, L, D)."""
    n = 2 * u.shape[1]  # nothing wraps around
    product = torch.fft.rfft(u.mT, n=n) * torch.fft.rfft(kernel, n=n)  # (B, D, L + 1)
    return torch.fft.irfft(product, n=n)[..., : u.shape[1]].mT


def zero_order_hold(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Ā = e^{dt A} and the factor (Ā − 1)/A of B that makes B̄, for a diagonal A; shapes broadcast."""
    A_bar = torch.exp(dt * A)
    return A_bar, (A_bar - 1) / A


def diagonal_ssm(u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor) -> Tensor:
    """Re(C x_t) with x_t = Ā ⊙ x_{t−1} + B̄ u_t: u (B, L, D), complex Ā (N,), B̄ (N, D), C (D, N) → (B, L, D)."""
    drive = u.to(B_bar.dtype) @ B_bar.T  # (B, L, N)
    _, x = associative_scan(A_bar.expand(1, u.shape[1], -1), drive)  # like jax.vmap, one Ā serves the whole batch
    return (x @ C.T).real


def associative_scan(
    a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.mul
) -> tuple[Tensor, Tensor]:
    """The products of all prefixes under (a₁, b₁), (a₂, b₂) → (a₂ a₁, a₂ b₁ + b₂), as `jax.lax.associative_scan`.

    a: (B or 1, L, N), b: (B, L, N); returns the same shapes. With torch.matmul as `product` a has matrices in place of
    numbers, (…, L, N, S, S), and b columns, (…, L, N, S, 1). Neighbours are multiplied; the prefixes of these
    products, half as many, are those of all odd steps; and those of the even steps are one product away.
    """
    length = b.shape[1]
    if length == 1:
        return a, b
    pair_a = product(a[:, 1::2], a[:, : length - 1 : 2])
    pair_b = product(a[:, 1::2], b[:, : length - 1 : 2]) + b[:, 1::2]
    odd_a, odd_b = associative_scan(pair_a, pair_b, product)
    before_a, before_b = odd_a[:, : (length - 1) // 2], odd_b[:, : (length - 1) // 2]
    even_a = torch.cat((a[:, :1], product(a[:, 2::2], before_a)), 1)
    even_b = torch.cat((b[:, :1], product(a[:, 2::2], before_b) + b[:, 2::2]), 1)
    return _interleaved(even_a, odd_a), _interleaved(even_b, odd_b)


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """Steps 0, 2, … and 1, 3, … in their order: (B, ⌈L/2⌉, N), (B, ⌊L/2⌋, N) → (B, L, N)."""
    pairs = torch.stack((even[:, : odd.shape[1]], odd), 2).flatten(1, 2)
    return torch.cat((pairs, even[:, odd.shape[1] :]), 1)
