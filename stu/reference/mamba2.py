r"""Mamba-2: a selective state space model with a scalar decay per head.

B batch, L length, D model width, H heads, P width of a head, E = H·P inner width, G groups of heads that share B and C,
N state size, S = E + 2·G·N convolved signals, c chunks of Q steps; dt is Δ, and A, B, C, D in formulas are the system

    z, (x, B, C), Δ = W_in u
    x, B, C ← silu(a short causal convolution of each signal),   Δ ← softplus(Δ + bias)
    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ,   y_t = h_tᵀ C_t + D x_t        in each head
    output = W_out rms_norm(y · silu(z))

Source: Dao, Gu, "Transformers are SSMs", 2405.21060, section 7; the recurrence by listing 1 of section 6.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def mamba2(
    u: Tensor,
    W_in: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    gain: Tensor,
    W_out: Tensor,
    *,
    num_groups: int,
    chunk_size: int,
) -> Tensor:
    """The whole block, (B, L, D) → (B, L, D); L is a multiple of chunk_size.

    W_in: (E + S + H, D); conv_weight: (S, taps); conv_bias: (S,); dt_bias, A, D: (H,); gain: (E,); W_out: (D, E).
    """
    inner, heads, matrix = len(gain), len(A), (len(conv_bias) - len(gain)) // 2  # matrix: G·N, of B or C
    z, signals, dt = F.linear(u, W_in).split((inner, len(conv_bias), heads), -1)
    dt = F.softplus(dt + dt_bias)  # (B, L, H)
    signals = F.silu(causal_convolution(signals, conv_weight, conv_bias))
    x, B, C = signals.split((inner, matrix, matrix), -1)
    x = x.unflatten(-1, (heads, -1))  # (B, L, H, P)
    B, C = (for_heads(each, num_groups, heads) for each in (B, C))  # (B, L, H, N)
    y = minimal_ssd(x * dt.unsqueeze(-1), dt * A, B, C, chunk_size) + D.unsqueeze(-1) * x
    return F.linear(gated_norm(y.flatten(-2), z, gain, num_groups), W_out)


def causal_convolution(signals: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every signal with a few taps of its own: (B, L, S), (S, taps), (S,) → (B, L, S)."""
    columns = F.conv1d(signals.mT, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=len(weight))
    return columns[..., : signals.shape[1]].mT


def for_heads(matrix: Tensor, num_groups: int, heads: int) -> Tensor:
    """B or C for every head, the same for all heads of a group: (B, L, G·N) → (B, L, H, N)."""
    return matrix.unflatten(-1, (num_groups, -1)).repeat_interleave(heads // num_groups, 2)


def minimal_ssd(x: Tensor, steps: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """y_t = h_tᵀ C_t with h_t = exp(steps_t) h_{t−1} + B_t x_tᵀ, in chunks of Q steps (listing 1).

    x: (B, L, H, P), Δ_t x_t in the model; steps: (B, L, H), Δ_t A; B, C: (B, L, H, N). Returns (B, L, H, P).
    """
    x, steps, B, C = (each.unflatten(1, (-1, chunk_size)) for each in (x, steps, B, C))  # (B, c, Q, …)
    steps = steps.permute(0, 3, 1, 2)  # (B, H, c, Q)
    sums = steps.cumsum(-1)
    inside = torch.einsum("bcthn,bcshn,bhcts,bcshp->bcthp", C, B, segment_sums(steps).exp(), x)
    added = torch.einsum("bcshn,bhcs,bcshp->bchpn", B, (sums[..., -1:] - sums).exp(), x)
    states = torch.cat((torch.zeros_like(added[:, :1]), added), 1)
    between = segment_sums(F.pad(sums[..., -1], (1, 0))).exp()  # (B, H, c + 1, c + 1)
    entering = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    return (inside + torch.einsum("bcthn,bchpn,bhct->bcthp", C, entering, sums.exp())).flatten(1, 2)


def segment_sums(steps: Tensor) -> Tensor:
    """Σ_{s<r≤t} steps_r of all t and s, −∞ where s > t: (…, Q) → (…, Q, Q)."""
    length = steps.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=steps.device).tril()
    repeated = steps.unsqueeze(-1).expand(*steps.shape, length).masked_fill(~lower.tril(-1), 0)  # [r, s]
    return repeated.cumsum(-2).masked_fill(~lower, -torch.inf)


def gated_norm(y: Tensor, z: Tensor, gain: Tensor, num_groups: int) -> Tensor:
    """rms_norm(y · silu(z)) · gain, normed over each group, as in the official code: (B, L, E) → (B, L, E)."""
    gated = (y * F.silu(z)).unflatten(-1, (num_groups, -1))
    return (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * gain
