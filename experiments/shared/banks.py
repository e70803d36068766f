"""Fixed filters for an STU, those of the Hankel matrix and others in their place, and the least errors they allow.

L length, K filters per branch, C inputs, O outputs
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from stu.mixers.stu import STU
from stu.ops.bank import FilterBank, filter_bank
from stu.ops.filters import hankel_matrix, spectral_filters


def hankel(seq_len: int, num_filters: int, seed: int) -> Tensor:
    """The weighted filters σ_k^{1/4} φ_k, to nearly all digits of float64."""
    eigenvalues, filters = spectral_filters(seq_len, num_filters)
    return with_signs(eigenvalues**0.25 * filters)


def dense(seq_len: int, num_filters: int, seed: int) -> Tensor:
    """The same as published codes compute them: by a dense float64 `eigh`, whose last eigenpairs are rounding errors.

    Where σ is negative, |σ|: there the published codes have nan.
    """
    eigenvalues, filters = np.linalg.eigh(hankel_matrix(seq_len).numpy())
    weighted = np.abs(eigenvalues) ** 0.25 * filters
    return with_signs(torch.from_numpy(weighted[:, ::-1][:, :num_filters].copy()))


def gaussian(seq_len: int, num_filters: int, seed: int) -> Tensor:
    """As many random orthonormal filters as both branches have."""
    random = np.random.default_rng((seed, seq_len))  # not the random stream of the system
    return torch.from_numpy(np.linalg.qr(random.standard_normal((seq_len, 2 * num_filters)))[0])


def cosines(seq_len: int, num_filters: int, seed: int) -> Tensor:
    """The K lowest frequencies of the orthonormal cosine transform (DCT-II), plain and with alternating signs."""
    angle = np.pi / seq_len * np.outer(np.arange(seq_len) + 0.5, np.arange(num_filters))
    return with_signs(torch.from_numpy(np.cos(angle) / np.linalg.norm(np.cos(angle), axis=0)))


def lags(seq_len: int, num_filters: int, seed: int) -> Tensor:
    """Unit impulses: 2K more input lags after the three of the STU, which becomes an FIR filter."""
    impulses = torch.eye(seq_len, 2 * num_filters + 1, dtype=torch.float64)
    return torch.cat((impulses[:, 1::2], impulses[:, 2::2]), 1)


BANKS: Mapping[str, Callable[[int, int, int], Tensor]] = {
    "Hankel": hankel,
    "Hankel, dense eigh": dense,
    "cosines": cosines,
    "random": gaussian,
    "lags": lags,
}


def with_signs(filters: Tensor) -> Tensor:
    """Both branches, (L, K) → (L, 2K): φ(i), then (−1)^i φ(i)."""
    return filter_bank(filters, two_sided=True, delay=0)


def responses(kind: str, *, seq_len: int, num_filters: int, seed: int, recurrence: int = 0) -> Tensor:
    """Every impulse response that an STU with these filters mixes, (L, 2K + 3): 2K, delayed by two, and three lags.

    recurrence: k_y = 2 folds in a fixed y_{t−2}.
    """
    return filter_bank(BANKS[kind](seq_len, num_filters, seed), delay=2, k_u=3, recurrence=recurrence)


def leading(bank: Tensor, count: int) -> Tensor:
    """`responses` of only `count` filters: the first of each branch, and the lags."""
    branch = (bank.shape[1] - 3) // 2
    first, second, lagged = bank.split((branch, branch, 3), 1)
    return torch.cat((first[:, :count], second[:, :count], lagged), 1)


def with_filters(layer: STU, bank: Tensor) -> STU:
    """The layer with these responses (L, K') in place of its own."""
    assert bank.shape == layer.bank.filters.shape
    layer.bank = FilterBank(bank)
    return layer


def best_error(bank: Tensor, truth: np.ndarray) -> float:
    """The least expected error of y = Σ_k f_k ∗ (u M_k) over all matrices M_k, for white inputs, as a share of E y².

    bank: responses f_k (L, K'); truth: impulse response h (L, O, C). Lag i of h occurs in L − i steps of a sequence, so
    the error is Σ_i (L − i) |h_i − Σ_k f_k(i) M_k|², a separate least-squares problem per input and output.
    """
    length = len(truth)
    weight = np.sqrt(np.arange(length, 0, -1.0))[:, None]
    features = weight * bank.numpy()
    features = features / np.linalg.norm(features, axis=0)  # those of small eigenvalues count as the others do
    target = weight * truth.reshape(length, -1)
    solution, *_ = np.linalg.lstsq(features, target, rcond=None)
    return float(np.square(features @ solution - target).sum() / np.square(target).sum())
