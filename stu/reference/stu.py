r"""The Spectral Transform Unit.

B batch, L length, D model width, K filters per branch, F = L + 1 frequencies, k_u, k_y lags of input and output

    y_t = Σ_{i=1}^{k_y} M^y_i y_{t−i} + Σ_{i=1}^{k_u} M^u_i u_{t+1−i}
          + Σ_k M^{φ+}_k σ_k^{1/4} U⁺_{t−2,k} + Σ_k M^{φ−}_k σ_k^{1/4} U⁻_{t−2,k}

with U^±_{t,k} = Σ_{i=0}^{t−1} u_{t−i} (±1)^i φ_k(i). Source: Agarwal, Suo, Chen, Hazan, "Spectral State Space
Models", 2312.06837, section 2.

Published implementations compute it in just this order: every channel convolved with every filter, all features held
in memory, then one contraction.
"""

import torch
from torch import Tensor

from stu.ops.recurrence import linear_recurrence_reference


def stu(
    u: Tensor, filters: Tensor, m_phi: Tensor, m_u: Tensor | None = None, m_y: Tensor | None = None, *, delay: int = 2
) -> Tensor:
    """The whole equation, (B, L, D) → (B, L, D).

    filters: σ_k^{1/4} φ_k, (L' ≥ L, K). Matrices are [index, in, out]: m_phi (K, D, D), M^{φ+}, or (2K, D, D), then
    M^{φ−}; m_u (k_u, D, D) and m_y (k_y, D, D), None where the equation has no such term.
    """
    num_filters = filters.shape[1]
    y = spectral_term(u, filters, m_phi[:num_filters], delay)
    if len(m_phi) > num_filters:
        y = y + spectral_term(u, alternating(filters), m_phi[num_filters:], delay)
    if m_u is not None:
        y = y + input_term(u, m_u)
    return y if m_y is None else recurrence(y, m_y)


def spectral_term(u: Tensor, filters: Tensor, m_phi: Tensor, delay: int) -> Tensor:
    """Σ_k M^φ_k U_{t−delay,k}: (B, L, D), filters (L' ≥ L, K), m_phi (K, D, D) → (B, L, D)."""
    features = delayed(spectral_features(u, filters[: u.shape[1]]), delay)  # (B, L, K, D)
    return torch.einsum("blki,kio->blo", features, m_phi)


def spectral_features(u: Tensor, filters: Tensor) -> Tensor:
    """U_{t,k} = Σ_{i=0}^{t−1} u_{t−i} φ_k(i), every channel with every filter: (B, L, D), (L, K) → (B, L, K, D).

    In float32 at least, as FFTs have no half precision.
    """
    n = 2 * u.shape[1]  # nothing wraps around
    dtype = torch.promote_types(u.dtype, torch.float32)
    spectrum = torch.fft.rfft(u.to(dtype), n=n, dim=1)  # (B, F, D)
    response = torch.fft.rfft(filters.to(dtype), n=n, dim=0)  # (F, K)
    product = spectrum.unsqueeze(2) * response.unsqueeze(-1)  # (B, F, K, D)
    return torch.fft.irfft(product, n=n, dim=1)[:, : u.shape[1]].to(u.dtype)


def alternating(filters: Tensor) -> Tensor:
    """(−1)^i φ_k(i), the filters of the second branch: (L, K) → (L, K)."""
    signs = 1 - 2 * (torch.arange(len(filters), device=filters.device) % 2)
    return filters * signs.unsqueeze(1)


def delayed(x: Tensor, steps: int) -> Tensor:
    """x_{t−steps}, zero before the beginning: (B, L, …) → (B, L, …)."""
    length = x.shape[1]
    start = x.new_zeros(len(x), min(steps, length), *x.shape[2:])
    return torch.cat((start, x[:, : max(length - steps, 0)]), 1)


def input_term(u: Tensor, m_u: Tensor) -> Tensor:
    """Σ_{i=1}^{k_u} M^u_i u_{t+1−i}: (B, L, D), (k_u, D, D) → (B, L, D)."""
    return torch.stack([delayed(u, lag) @ matrix for lag, matrix in enumerate(m_u)]).sum(0)


def recurrence(w: Tensor, m_y: Tensor) -> Tensor:
    """y_t = w_t + Σ_{i=1}^{k_y} M^y_i y_{t−i}, step by step: (B, L, D), (k_y, D, D) → (B, L, D)."""
    dtype = torch.promote_types(w.dtype, torch.float32)  # rounding errors add up over the steps
    with torch.autocast(w.device.type, enabled=False):
        return linear_recurrence_reference(w.to(dtype), m_y.to(dtype)).to(w.dtype)


def fixed_recurrence(k_y: int, like: Tensor) -> Tensor:
    """The matrices M^y of a fixed y_{t−k_y} with coefficient I: zeros, and I last, (k_y, D, D); like: (…, D)."""
    matrices = like.new_zeros(k_y, like.shape[-1], like.shape[-1])
    matrices[-1].fill_diagonal_(1)
    return matrices
