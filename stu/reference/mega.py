r"""Mega: moving averages one step after the other, and all of the attention matrix.

B batch, L length, D model width, N averages of each channel, Z width of queries and keys, E width of values

    h_t = (1 − α ⊙ δ) ⊙ h_{t−1} + α ⊙ β x_t,   x̂_t = silu(ηᵀ h_t / √N + ω x_t)
    z = silu(W_z x̂),   q = κ_q ⊙ z + μ_q,   k = κ_k ⊙ z + μ_k,   v = silu(W_v x),   γ = silu(W_γ x̂),   φ = σ(W_φ x̂)
    o = f(q kᵀ + b) v,   ĥ = silu(W_h x̂ + U_h (γ ⊙ o)),   y = φ ⊙ ĥ + (1 − φ) ⊙ x

Source: Ma et al., "Mega: moving average equipped gated attention", 2209.10655, equations 7 to 16; ω and the silu of the
average as in the official code.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Affine = tuple[Tensor, Tensor]  # a matrix and a vector


def mega(
    x: Tensor,
    averages: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    omega: Tensor,
    W_v: Affine,
    W_average: Affine,
    kappa: Tensor,
    mu: Tensor,
    U_h: Affine,
    bias: Tensor,
    *,
    attention: str,
    chunk_size: int,
) -> Tensor:
    """The gated attention with its residual, (B, L, D) → (B, L, D); L is a multiple of chunk_size.

    averages: α, δ, β, η (D, N), α and δ in 0 … 1, of the average from the start, and without causality of that from the
    end; W_average: the rows of W_φ, W_z, W_γ, W_h in this order; kappa, mu: (2, Z), of queries and keys; bias: (Q, Q),
    [t, s], for the chunks of Q steps; attention: "softmax" or "laplace".
    """
    causal = len(averages) == 1
    average = moving_average(x, *averages[0])
    if not causal:
        average = average + moving_average(x.flip(1), *averages[1]).flip(1)
    average = F.silu(average + omega * x)
    v = F.silu(F.linear(x, *W_v))
    widths = (x.shape[-1], kappa.shape[-1], v.shape[-1], x.shape[-1])
    update, z, reset, candidate = F.linear(average, *W_average).split(widths, -1)
    q, k = (F.silu(z) * scale + offset for scale, offset in zip(kappa, mu, strict=True))
    outputs = []
    chunks = (each.split(chunk_size, 1) for each in (q, k, v))
    for q_c, k_c, v_c in zip(*chunks, strict=True):
        outputs.append(attend(q_c, k_c, v_c, bias, attention=attention, causal=causal))
    attended = torch.cat(outputs, 1)
    candidate = F.silu(candidate + F.linear(F.silu(reset) * attended, *U_h))
    return update.sigmoid() * candidate + (1 - update.sigmoid()) * x


def moving_average(x: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor) -> Tensor:
    """The multidimensional damped average of each channel (equations 7, 8): (B, L, D), four of (D, N) → (B, L, D)."""
    h = torch.zeros_like(x[:, 0]).unsqueeze(-1) * alpha  # (B, D, N)
    outputs = []
    for t in range(x.shape[1]):
        h = alpha * (beta * x[:, t].unsqueeze(-1)) + (1 - alpha * delta) * h
        outputs.append((eta * h).sum(-1) / math.sqrt(eta.shape[-1]))
    return torch.stack(outputs, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, attention: str, causal: bool) -> Tensor:
    """q, k: (B, Q, Z); v: (B, Q, E); bias: (Q, Q) → (B, Q, E)."""
    length = q.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    if attention == "softmax":
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    scores = q @ k.mT / seen.sum(-1, keepdim=True) + bias
    weights = (1 + torch.erf((scores - math.sqrt(1 / 2)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2)))) / 2
    return (weights * seen) @ v


def simple_bias(weight: Tensor, length: int, *, causal: bool) -> Tensor:
    """[t, s], a number for each distance t − s: from 0 on, or from 1 − M on, of M positions."""
    zero = 0 if causal else len(weight) // 2
    rows = [[weight[zero + t - s] if t >= s or not causal else weight.new_zeros(()) for s in range(length)]
            for t in range(length)]  # fmt: skip
    return torch.stack([torch.stack(row) for row in rows])


def rotary_bias(alpha: Tensor, beta: Tensor, length: int) -> Tensor:
    """[t, s], the product of α turned by the position t and β by s (as in the official code)."""
    half = len(alpha) // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=alpha.dtype) / half)
    angle = torch.arange(length, dtype=alpha.dtype).unsqueeze(-1) * frequency  # (L, Z/2)

    def turned(vector: Tensor) -> Tensor:
        first, second = vector.chunk(2)
        real, imaginary = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        return torch.cat((real, imaginary), -1)

    return turned(alpha) @ turned(beta).mT
