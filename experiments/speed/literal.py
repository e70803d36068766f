r"""The Spectral Transform Unit as the paper writes it: one function an equation, nothing rearranged.

B batch, L length, D model width, K filters of one branch, F = L + 1 frequencies, k_u, k_y lags of input and output

    y_t = Σ_{i=1}^{k_y} M^y_i y_{t−i} + Σ_{i=1}^{k_u} M^u_i u_{t+1−i}
          + Σ_k M^{φ+}_k σ_k^{1/4} U⁺_{t−2,k} + Σ_k M^{φ−}_k σ_k^{1/4} U⁻_{t−2,k}

with U^±_{t,k} = Σ_{i=0}^{t−1} u_{t−i} (±1)^i φ_k(i). Source: Agarwal, Suo, Chen, Hazan, "Spectral State Space
Models", 2312.06837, section 2.

Published implementations compute it in just this order: every channel convolved with every filter, all features held
in memory, then one contraction. That makes it the baseline of the benchmark, and the oracle of `stu.STU` in the tests.
"""

import torch
from torch import Tensor, nn

from stu.mixers.stu import Recurrence
from stu.ops.filters import Hankel, spectral_filters
from stu.ops.recurrence import linear_recurrence_reference


class LiteralSTU(nn.Module):
    """The paper's equations, with the options and the parameters of `stu.STU`.

    Takes what `STU` takes, raises what its filters raise, and loads its `state_dict`. B·L·2K·D numbers of memory, and
    a loop over time where there is an output recurrence. Parameters begin as noise, M^y at zero.
    """

    filters: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        seq_len: int,
        causal: bool = True,
        num_filters: int = 24,
        two_sided: bool = True,
        k_u: int = 3,
        k_y: int = 2,
        recurrence: Recurrence = "learned",
        hankel: Hankel = "standard",
        delay: int = 2,
    ) -> None:
        super().__init__()
        self.d_model, self.seq_len, self.causal, self.delay = d_model, seq_len, causal, delay
        self.fixed_lag = k_y if recurrence == "fixed" else 0
        eigenvalues, filters = spectral_filters(seq_len, num_filters, hankel)
        self.register_buffer("filters", eigenvalues**0.25 * filters, persistent=False)  # (L, K), σ_k^{1/4} φ_k
        spectral, learned = num_filters * (1 + two_sided), 0 if self.fixed_lag else k_y
        self.m_phi = nn.Parameter(torch.randn(spectral, d_model, d_model) * (spectral * d_model) ** -0.5)
        self.m_u = nn.Parameter(torch.randn(k_u, d_model, d_model) * d_model**-0.5) if k_u else None
        self.m_y = nn.Parameter(torch.zeros(learned, d_model, d_model)) if learned else None
        self.reverse: LiteralSTU | None = None
        if not causal:
            self.reverse = LiteralSTU(
                d_model,
                seq_len=seq_len,
                num_filters=num_filters,
                two_sided=two_sided,
                k_u=k_u,
                k_y=k_y,
                recurrence=recurrence,
                hankel=hankel,
                delay=delay,
            )

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D), L ≤ seq_len."""
        num_filters = self.filters.shape[1]
        w = spectral_term(u, self.filters, self.m_phi[:num_filters], self.delay)
        if len(self.m_phi) > num_filters:
            w = w + spectral_term(u, alternating(self.filters), self.m_phi[num_filters:], self.delay)
        if self.m_u is not None:
            w = w + input_term(u, self.m_u)
        y = w
        if self.fixed_lag:
            y = recurrence(w, fixed_matrices(w, self.fixed_lag))
        elif self.m_y is not None:
            y = recurrence(w, self.m_y)
        return y if self.reverse is None else y + self.reverse(u.flip(1)).flip(1)


def spectral_term(u: Tensor, filters: Tensor, m_phi: Tensor, delay: int) -> Tensor:
    """Σ_k M^φ_k U_{t−delay,k}: (B, L, D), filters (L' ≥ L, K), m_phi (K, D, D) → (B, L, D)."""
    features = delayed(spectral_features(u, filters[: u.shape[1]]), delay)  # (B, L, K, D)
    return torch.einsum("blki,kio->blo", features, m_phi)


def spectral_features(u: Tensor, filters: Tensor) -> Tensor:
    """U_{t,k} = Σ_{i=0}^{t−1} u_{t−i} φ_k(i), every channel with every filter: (B, L, D), (L, K) → (B, L, K, D).

    In float32 at least: FFTs know no half precision.
    """
    n = 2 * u.shape[1]  # nothing wraps around
    dtype = torch.promote_types(u.dtype, torch.float32)
    spectrum = torch.fft.rfft(u.to(dtype), n=n, dim=1)  # (B, F, D)
    response = torch.fft.rfft(filters.to(dtype), n=n, dim=0)  # (F, K)
    product = spectrum.unsqueeze(2) * response.unsqueeze(-1)  # (B, F, K, D)
    return torch.fft.irfft(product, n=n, dim=1)[:, : u.shape[1]].to(u.dtype)


def alternating(filters: Tensor) -> Tensor:
    """(−1)^i φ_k(i), the filters of the second branch: (L, K) → (L, K)."""
    signs = torch.ones(len(filters), dtype=filters.dtype, device=filters.device)
    signs[1::2] = -1
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
    dtype = torch.promote_types(w.dtype, torch.float32)  # rounding adds up over the steps
    with torch.autocast(w.device.type, enabled=False):
        return linear_recurrence_reference(w.to(dtype), m_y.to(dtype)).to(w.dtype)


def fixed_matrices(w: Tensor, lag: int) -> Tensor:
    """The M^y of y_{t−lag} with coefficient I: zeros, and I last, (lag, D, D)."""
    matrices = w.new_zeros(lag, w.shape[2], w.shape[2])
    matrices[-1] = torch.eye(w.shape[2], dtype=w.dtype, device=w.device)
    return matrices
