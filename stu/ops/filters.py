r"""Spectral filters: the leading eigenvectors of the Hankel matrices of spectral filtering.

L length, K filters, Q quadrature nodes

The matrices ("Spectral State Space Models", 2312.06837, section 2; "Flash STU", 2409.10489):

    standard   Z_ij = 2 / ((i+j)³ − (i+j))                          = ∫₀¹ (1−α)² α^{i+j−2} dα
    L          Z_ij = (1 + (−1)^{i+j}) · 8 / ((i+j+3)(i+j−1)(i+j+1)) = ∫₋₁¹ (1−α²)² α^{i+j−2} dα

Their eigenvalues fall exponentially, soon below the rounding error of a dense float64 `eigh`, whose last filters are
noise at the usual lengths. Z is never formed here. A quadrature of the integral gives Z = G Gᵀ, so that the left
singular vectors of G are the filters and its singular values the *square roots* of the eigenvalues: twice as many
digits survive. With α = e^{−x} and panels graded geometrically in x a few hundred nodes suffice for any L.

Filters are computed once per process, and long ones once per user (`stu.ops.filter_store`).
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from scipy.linalg import svd
from torch import Tensor

from stu.errors import require
from stu.ops.filter_store import Eigenpairs, stored

Hankel = Literal["standard", "L"]

NODES_PER_PANEL = 20
TAIL = 90.0  # e^{−90} ≈ 1e-39: below every eigenvalue that can be told from zero
SMALLEST = 1e-26  # of σ_1: √σ_k then keeps at least three digits
DIRECT = 4096  # up to this length G is decomposed whole; beyond it, through a sample of its rows
CHUNK = 1 << 12  # rows of G in memory at a time


def spectral_filters(seq_len: int, num_filters: int, hankel: Hankel = "standard") -> tuple[Tensor, Tensor]:
    """The `num_filters` leading eigenpairs of the Hankel matrix of size `seq_len`.

    Returns eigenvalues (K,) and filters (L, K), both float64, largest eigenvalue first; every filter has unit
    norm and its entry of largest magnitude is positive. Long filters are cached on disk (`stu.ops.filter_store`).

    Raises `OptionError` where `num_filters` exceeds `seq_len` or what float64 can tell from zero.
    """
    require(seq_len >= 1, "seq_len", seq_len, "must be at least 1")
    require(hankel in ("standard", "L"), "hankel", hankel, "must be standard or L")
    require(num_filters >= 1, "num_filters", num_filters, "must be at least 1")
    eigenvalues, filters = _eigenpairs(seq_len, min(num_filters, seq_len), hankel)
    meaningful = int((eigenvalues > SMALLEST * eigenvalues[0]).sum())
    why = "drown in float64 rounding" if meaningful < seq_len else "do not exist"
    allowed = f"must be in 1 … {meaningful}; the next eigenvalues of length {seq_len} {why}"
    require(num_filters <= meaningful, "num_filters", num_filters, allowed)
    return torch.from_numpy(eigenvalues.copy()), torch.from_numpy(filters.copy())


def hankel_matrix(seq_len: int, hankel: Hankel = "standard") -> Tensor:
    """The matrix Z itself, (L, L) float64: the definition, for tests and small lengths."""
    index = torch.arange(1, seq_len + 1, dtype=torch.float64)
    s = index[:, None] + index  # (L, L)
    if hankel == "standard":
        return 2 / (s**3 - s)
    return (s % 2 == 0) * 16 / ((s + 3) * (s - 1) * (s + 1))


@lru_cache(maxsize=32)
def _eigenpairs(seq_len: int, num_filters: int, hankel: Hankel) -> Eigenpairs:
    name = f"{hankel}-{seq_len}-{num_filters}"
    return stored(name, __file__, (seq_len, num_filters), lambda: _computed(seq_len, num_filters, hankel))


def _computed(seq_len: int, num_filters: int, hankel: Hankel) -> Eigenpairs:
    if hankel == "standard":
        # dα = e^{−x} dx, half of it in each factor
        eigenvalues, filters = _decompose(seq_len, num_filters, offset=0.5)
    else:
        eigenvalues, filters = _decompose_by_parity(seq_len, num_filters)
    largest = filters[np.abs(filters).argmax(0), np.arange(filters.shape[1])]
    return eigenvalues, filters * np.sign(largest)


def _decompose_by_parity(seq_len: int, num_filters: int) -> Eigenpairs:
    """Hankel-L couples only indices of equal parity: two independent problems in α², merged by eigenvalue."""
    pairs = []
    for parity in range(min(2, seq_len)):
        rows = (seq_len + 1 - parity) // 2
        # α² = β: index 2m + parity has α^{2m+parity} dα = ½ β^{m+parity/2−1/2} dβ, and both signs of α count
        pairs.append((parity, *_decompose(rows, min(num_filters, rows), offset=0.25 + parity / 2)))
    eigenvalues = np.concatenate([values for _, values, _ in pairs])
    filters = np.zeros((seq_len, len(eigenvalues)))
    column = 0
    for parity, values, vectors in pairs:
        filters[parity::2, column : column + len(values)] = vectors
        column += len(values)
    order = np.argsort(eigenvalues)[::-1][:num_filters]
    return eigenvalues[order], filters[:, order]


def _decompose(rows: int, num_filters: int, offset: float) -> Eigenpairs:
    """Eigenpairs of ∫ (1−e^{−x})² e^{−x(m+m'+2·offset)} dx over m, m' = 0 … rows−1, largest first."""
    x, weight = _graded_nodes(rows, offset)
    scale = np.sqrt(weight) * -np.expm1(-x)  # (Q,)
    if rows <= DIRECT:
        factor = np.exp(-np.outer(np.arange(rows) + offset, x)) * scale  # (rows, Q)
        left, singular, _ = svd(factor, full_matrices=False, lapack_driver="gesdd")
        return singular[:num_filters] ** 2, left[:, :num_filters]
    return _decompose_sampled(rows, num_filters, offset, x, scale)


def _decompose_sampled(
    rows: int, num_filters: int, offset: float, x: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same from a few hundred rows: a quadrature over the row index keeps GᵀG, hence σ and V; then φ = G v / √σ."""
    index, weight = row_quadrature(rows)
    sample = np.exp(-np.outer(index + offset, x)) * scale * np.sqrt(weight)[:, None]
    _, singular, right = svd(sample, full_matrices=False, lapack_driver="gesdd")
    kept = min(num_filters, int((singular**2 > SMALLEST * singular[0] ** 2).sum()))  # a filter too many takes memory
    mix = scale[:, None] * right[:kept].T / singular[:kept]  # (Q, K)
    decay = np.exp(-np.outer(np.arange(CHUNK) + offset, x))
    filters = np.empty((rows, kept))
    for start in range(0, rows, CHUNK):  # G is never whole in memory
        stop = min(start + CHUNK, rows)
        filters[start:stop] = decay[: stop - start] @ (np.exp(-start * x)[:, None] * mix)
    filters /= np.linalg.norm(filters, axis=0)
    return singular[:kept] ** 2, filters


def _graded_nodes(rows: int, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre nodes and weights in x on panels that double from 1/rows to where e^{−2·offset·x} ends."""
    end = TAIL / (2 * offset)
    edges = [end]
    while edges[-1] > 0.5 / rows:
        edges.append(edges[-1] / 2)
    edges = [0.0, *edges[::-1]]
    node, weight = np.polynomial.legendre.leggauss(NODES_PER_PANEL)
    low, high = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    half = (high - low) / 2
    return (half * (node + 1) + low).ravel(), (half * weight).ravel()


def row_quadrature(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights with Σ_i f(i) ≈ Σ_r v_r f(i_r) for sums of decaying exponentials, i = 0 … rows−1.

    The first rows are kept one by one; beyond them panels double, and in each the sum over consecutive indices is
    replaced by the Gauss rule of that *discrete* measure, exact for polynomials of degree 2n−1.
    """
    start, count = min(256, rows), 32
    index, weight = [np.arange(float(start))], [np.ones(start)]
    while start < rows:
        stop = min(2 * start, rows)
        size = stop - start
        node, share = _discrete_gauss(size, min(count, size))
        index.append(start + node)
        weight.append(share)
        start = stop
    return np.concatenate(index), np.concatenate(weight)


def _discrete_gauss(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss rule for Σ over 0 … size−1 (Golub–Welsch on the discrete Chebyshev, or Gram, polynomials)."""
    n = np.arange(1, count)
    off_diagonal = np.sqrt(n**2 * (size**2 - n**2) / (4.0 * (4 * n**2 - 1)))
    jacobi = np.diag(np.full(count, (size - 1) / 2)) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    node, vectors = np.linalg.eigh(jacobi)
    return node, size * vectors[0] ** 2
