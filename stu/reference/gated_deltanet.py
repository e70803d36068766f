r"""Gated DeltaNet: a matrix of values by keys, one step after the other.

B batch, L length, D model width, H heads, N width of a key, P width of a value, E = H·P,
S = 2·H·N + E convolved signals

    z, (q, k, v), b, a = W_in u;   q, k, v ← silu(a short causal convolution of each signal)
    q ← q / |q|,   k ← k / |k|,   β = σ(b),   α = exp(−exp(A_log) softplus(a + bias))
    S_t = S_{t−1} (α_t (I − β_t k_t k_tᵀ)) + β_t v_t k_tᵀ,   y_t = S_t q_t        in each head
    output = W_out (rms_norm(y) · silu(z))

Source: Yang, Kautz, Hatamizadeh, "Gated delta networks", 2412.06464, equation 10 and figure 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.reference.mamba2 import causal_convolution


def gated_deltanet(
    u: Tensor,
    W_in: Tensor,
    conv_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    gain: Tensor,
    W_out: Tensor,
    *,
    largest_beta: float = 1.0,
) -> Tensor:
    """The whole block, (B, L, D) → (B, L, D).

    W_in: (E + S + 2H, D); conv_weight: (S, taps); dt_bias, A_log: (H,); gain: (P,); W_out: (D, E); largest_beta: 2 for
    negative eigenvalues (2411.12537).
    """
    heads, inner = len(A_log), W_out.shape[1]
    keys = (len(conv_weight) - inner) // 2
    z, signals, b, a = F.linear(u, W_in).split((inner, len(conv_weight), heads, heads), -1)
    signals = F.silu(causal_convolution(signals, conv_weight, conv_weight.new_zeros(len(conv_weight))))
    q, k, v = (each.unflatten(-1, (heads, -1)) for each in signals.split((keys, keys, inner), -1))
    alpha = torch.exp(-A_log.exp() * F.softplus(a + dt_bias))
    y = delta_rule(unit(q), unit(k), v, largest_beta * b.sigmoid(), alpha)  # (B, L, H, P)
    normed = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * gain
    return F.linear(normed.flatten(-2) * F.silu(z), W_out)


def unit(x: Tensor) -> Tensor:
    """X / |x|, finite where x is zero, as in the official code."""
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """y_t = S_t q_t with S_t = S_{t−1} (α_t (I − β_t k_t k_tᵀ)) + β_t v_t k_tᵀ, S_0 = 0.

    q, k: (B, L, H, N); v: (B, L, H, P); beta, alpha: (B, L, H). Returns (B, L, H, P).
    """
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    S = torch.zeros_like(v[:, 0]).unsqueeze(-1) * k[:, 0].unsqueeze(-2)  # (B, H, P, N)
    outputs = []
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        beta_t, alpha_t = beta[:, t, :, None, None], alpha[:, t, :, None, None]
        S = S @ (alpha_t * (eye - beta_t * outer(k_t, k_t))) + beta_t * outer(v_t, k_t)
        outputs.append((S @ q[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The product a bᵀ of vectors, (…, P), (…, N) → (…, P, N)."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)
