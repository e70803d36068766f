r"""Attention of one head with a bias that depends on the distance alone, by softmax or by the Laplace function.

B batch, T queries, S keys, Z width of queries and keys, E width of values

    softmax:  A_t = softmax_s(q_tᵀ k_s / √Z + b(t − s))
    laplace:  A_ts = f(q_tᵀ k_s / n_t + b(t − s)),   f(x) = (1 + erf((x − μ) / (σ √2))) / 2,   n_t keys seen by t

with μ = √(1/2) and σ = √(1/(4π)), where f is near the squared ReLU but bounded. Source: Ma et al., "Mega", 2209.10655,
section 3.5, equation 16.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from stu.ops.attention import ENTRIES_ON_CPU, softmax_attention
from stu.ops.forms import budget, chunks
from stu.ops.precision import at_least_float32, no_autocast

Kind = Literal["softmax", "laplace"]
MEAN, DEVIATION = math.sqrt(0.5), math.sqrt(0.25 / math.pi)


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kind: Kind, *, causal: bool, count: Tensor | None
) -> Tensor:
    """Each of the last T of S positions attends to all, or with causal to those up to itself.

    query: (B, T, Z); key: (B, S, Z); value: (B, S, E); bias: that of the distances 1 − T … S − 1 in this order; count:
    (B,), how many keys are real, the first ones; None: all. With causal, queries that are not real count as real.
    Returns (B, T, E). The memory is that of T × S numbers per sequence; forward alone, it is bounded.
    """
    length, total = query.shape[1], key.shape[1]

    def block(start: int, stop: int) -> Tensor:
        """That of some of the queries."""
        places = torch.arange(total, device=query.device)
        own = torch.arange(total - length + start, total - length + stop, device=query.device).unsqueeze(1)
        seen, number = None, own.new_full((1, 1), total)
        if causal:
            seen, number = places <= own, own + 1
        elif count is not None:
            seen = (places < count[:, None, None]) | (places == own)  # itself: a softmax over nothing is nan
            number = count.clamp_min(1)[:, None, None]
        biases = None if bias is None else toeplitz(bias[start : stop + total - 1], total)
        return attend(query[:, start:stop], key, value, biases, kind, seen=seen, number=number)

    if torch.compiler.is_compiling():  # blocks would hold the program to one length
        return block(0, length)
    parts = chunks(length, len(query) * total, budget(query, ENTRIES_ON_CPU))
    outputs = [block(part.start, part.stop) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kind: Kind, *, seen: Tensor | None, number: Tensor
) -> Tensor:
    """Query (B, T, Z), key (B, S, Z), value (B, S, E) → (B, T, E).

    bias, seen: (T, S) or (B, T, S), or None; number: how many keys a query sees, (…, T, 1).
    """
    if kind == "softmax":
        mask = seen
        if bias is not None:
            bias = bias.to(query.dtype)
            if not len(query):  # of no sequence, the kernels return what no gradient of the bias goes through
                return (query @ key.mT + bias).softmax(-1) @ value
            mask = bias if seen is None else bias.where(seen, -torch.inf)
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return softmax_attention(query, key, value, mask).squeeze(1)
    dtype = at_least_float32(query, value)
    with no_autocast(query):
        scores = query.to(dtype) @ key.to(dtype).mT / number
        weights = laplace(scores if bias is None else scores + bias.to(dtype))
        weights = weights if seen is None else weights * seen
        return (weights @ value.to(dtype)).to(value.dtype)


def laplace(x: Tensor) -> Tensor:
    """The distribution function of a normal of mean √(1/2) and variance 1/(4π)."""
    return torch.special.ndtr((x - MEAN) / DEVIATION)


def toeplitz(values: Tensor, columns: int) -> Tensor:
    """[t, s] = values[t − s + columns − 1] as a matrix of so many columns: (T + S − 1,) → (T, S)."""
    if torch.compiler.is_compiling():  # `unfold` would hold the program to one length; its gradient is no scatter
        last = torch.arange(columns - 1, len(values), device=values.device)
        return values[last.unsqueeze(1) - torch.arange(columns, device=values.device)]
    return values.flip(0).unfold(0, columns, 1).flip(0)
