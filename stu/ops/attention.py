"""Attention where a mask is needed, in blocks, so that no mask of all queries and keys is formed.

B batch, H heads, L length, E width of a head, C keys before the first query, T queries of a block, K keys of a block
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stu.ops.forms import budget, chunks
from stu.ops.transforms import transformed

BLOCK = 64  # fewest queries of a block of local attention; smaller ones cost more than they save in keys
ENTRIES_ON_CPU = 1 << 20  # of a mask at a time


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """`scaled_dot_product_attention`, and in forward mode by the one of its kernels that has such derivatives."""
    with sdpa_kernel(SDPBackend.MATH) if transformed(query, key, value) else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, mask, **options)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of each of the last L of C + L positions to all up to itself.

    query: (B, H, L, E); key, value: (B, H, C + L, E); mask: (B, C + L), False where the first C keys may not be seen.
    Returns (B, H, L, E). The masks of all blocks are kept for the backward pass.
    """
    length, total = query.shape[2], key.shape[2]
    outputs = []
    for block in chunks(length, total if mask is None else mask.numel(), budget(query, ENTRIES_ON_CPU)):
        start, stop = (total - length + edge for edge in (block.start, block.stop))
        seen = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)  # (T, K)
        if mask is not None:
            seen = seen & mask[:, None, None, :stop]  # (B, 1, T, K)
        q, k, v = query[:, :, block], key[:, :, :stop], value[:, :, :stop]
        outputs.append(softmax_attention(q, k, v, seen, dropout_p=dropout))
    return torch.cat(outputs, 2)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    before: int,
    after: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each position t to t − before … t + after, in time and memory linear in L.

    query: (B, H, L, E), of the last L positions; key, value: (B, H, C + L, E), C ≤ before; mask: (B, C + L), True where
    a key may be seen. Returns (B, H, L, E).

    Blocks of T queries attend to the K = before + T + after keys around them, so that one mask of T × K serves them
    all, except at the ends of the sequence and where `mask` is False.
    """
    batch, heads, length, width = query.shape
    block = min(length, max(BLOCK, before + after))
    blocks = -(-length // block)
    spare = blocks * block - length
    strip = before + block + after
    missing = before - (key.shape[2] - length)
    real = query.new_ones(1, key.shape[2], dtype=torch.bool) if mask is None else mask
    real = F.pad(real, (missing, after + spare)).unfold(1, strip, block).transpose(0, 1)  # (blocks, B or 1, K)
    q = _padded(query, 0, spare).unfold(2, block, block)  # (B, H, blocks, E, T)
    k, v = (_padded(each, missing, after + spare).unfold(2, strip, block) for each in (key, value))
    ahead = torch.arange(strip, device=query.device) - torch.arange(block, device=query.device).unsqueeze(1)
    seen = (ahead >= 0) & (ahead <= before + after) & real.unsqueeze(2)  # (blocks, B or 1, T, K)
    seen = seen | (ahead == before)  # always itself: a softmax over nothing is nan
    # Merge the batch with the heads where all sequences share the mask of a block, and with the blocks otherwise.
    merge = (1, 2) if mask is None else (0, 1)
    q, k, v = (each.permute(2, 0, 1, 4, 3).flatten(*merge) for each in (q, k, v))
    y = softmax_attention(q, k, v, seen.unsqueeze(2).flatten(*merge), dropout_p=dropout)
    y = y.reshape(blocks, batch, heads, block, width).permute(1, 2, 0, 3, 4)
    return y.flatten(2, 3)[:, :, :length]


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """Zeros before and after (B, H, L, E) in time; torch.compile expects another layout of a pad by none."""
    return F.pad(x, (0, 0, before, after)) if before or after else x
