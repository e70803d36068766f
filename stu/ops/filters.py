r"""Spectral filters: the leading eigenvectors of the Hankel matrices of spectral filtering.

L length, K filters, R rows in a sample, M rows of a factor

The matrices ("Spectral State Space Models", 2312.06837, section 2; "Flash STU", 2409.10489):

    standard   Z_ij = 2 / ((i+j)³ − (i+j))                          = ∫₀¹ (1−α)² α^{i+j−2} dα
    L          Z_ij = (1 + (−1)^{i+j}) · 8 / ((i+j+3)(i+j−1)(i+j+1)) = ∫₋₁¹ (1−α²)² α^{i+j−2} dα

Their eigenvalues fall exponentially, soon below the rounding error of a dense float64 `eigh`, whose last filters are
noise at the usual lengths. Here all of them have the accuracy of float64, at any length:

1. A filter is a mixture of α^i, smooth in log i. In every octave of i its values at 32 places determine the others, and
   the Gauss rule of these places keeps inner products: a sample of a few hundred rows and columns stands for all of Z.
2. A Cholesky factor of the sample, FᵀF, with pivots, comes from integers, which lose no digits. Its rows fall as the
   √σ_k do.
3. Pairs of rows are rotated until all are orthogonal (Jacobi): then they are √σ_k φ_k. This keeps the relative accuracy
   of the smallest rows ("Jacobi's method is more accurate than QR", Demmel & Veselić 1992).

No sum is left to BLAS or LAPACK, which add in another order on another number of threads: filters are the same on any.

They are computed once per process, and long ones once per user (`stu.ops.filter_store`).
"""

from functools import lru_cache
from itertools import pairwise
from math import isqrt
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from stu.errors import require
from stu.ops.filter_store import Eigenpairs, stored
from stu.ops.slepian import default_bandwidth, prolate_matrix, slepian_filters

Hankel = Literal["standard", "L", "slepian"]
HANKEL: tuple[Hankel, ...] = get_args(Hankel)

SMALLEST = 1e-26  # of σ_1, the least that is offered: three digits of its root are left in a float64 factor of Z
EPSILON = 2.0**-53  # the rounding error of float64
FIRST = 256  # up to this many rows are kept one by one
NODES = 32  # rows in each octave after them: polynomials miss α^i by 1e-26
LONGEST = 2**26  # so that squares of indices are exact
BITS, PLACE_BITS = 192, 52  # after the point: of entries of the factor, of places


def spectral_filters(
    seq_len: int, num_filters: int, hankel: Hankel = "standard", bandwidth: float | None = None
) -> tuple[Tensor, Tensor]:
    """The `num_filters` leading eigenpairs of the Hankel matrix of size `seq_len`.

    hankel="slepian": of the prolate matrix, a Toeplitz one, instead, for complex eigenvalues; bandwidth is its W
    (`stu.ops.slepian`, which also says how exact they are).

    Returns eigenvalues (K,) and filters (L, K), both float64, largest eigenvalue first; every filter has unit
    norm and its entry of largest magnitude is positive. Eigenvalues have relative errors of 5e-15, filters errors of
    1e-14 in their norm. Long filters are cached on disk (`stu.ops.filter_store`).

    Raises `OptionError` where `num_filters` exceeds `seq_len` or what float64 can tell from zero.
    """
    require(1 <= seq_len <= LONGEST, "seq_len", seq_len, f"must be in 1 … {LONGEST:,}")
    require(hankel in HANKEL, "hankel", hankel, f"must be one of {', '.join(HANKEL)}")
    require(bandwidth is None or hankel == "slepian", "bandwidth", bandwidth, "must be null without hankel=slepian")
    require(num_filters >= 1, "num_filters", num_filters, "must be at least 1")
    if hankel == "slepian":
        eigenvalues, filters = slepian_filters(seq_len, min(num_filters, seq_len), bandwidth)
    else:
        eigenvalues, filters = _eigenpairs(seq_len, min(num_filters, seq_len), hankel)
    meaningful = int((eigenvalues > SMALLEST * eigenvalues[0]).sum())
    why = "drown in float64 rounding" if meaningful < seq_len else "do not exist"
    allowed = f"must be in 1 … {meaningful}; the next eigenvalues of length {seq_len} {why}"
    require(num_filters <= meaningful, "num_filters", num_filters, allowed)
    return torch.from_numpy(eigenvalues.copy()), torch.from_numpy(filters.copy())


def hankel_matrix(seq_len: int, hankel: Hankel = "standard", bandwidth: float | None = None) -> Tensor:
    """The matrix Z itself, (L, L) float64: the definition, for tests and small lengths. bandwidth: of "slepian"."""
    if hankel == "slepian":
        return torch.from_numpy(prolate_matrix(seq_len, bandwidth or default_bandwidth(seq_len, seq_len)))
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
    """Eigenpairs of z(m + m' + 2·offset) over m, m' = 0 … rows−1, largest first; z as in `_cholesky`."""
    index, weight = row_quadrature(rows)
    roots, samples = _orthogonalized(_cholesky(index + offset, weight, num_filters))
    kept = min(num_filters, int((roots**2 > SMALLEST * roots[0] ** 2).sum()))  # a filter too many takes memory
    return roots[:kept] ** 2, _extended(samples[:kept], rows)


def _cholesky(place: np.ndarray, weight: np.ndarray, num_filters: int) -> np.ndarray:
    """F (M, R) with FᵀF = √(v_r v_s) z(place_r + place_s), where z(t) = ∫₀¹ (1−β)² β^{t−1} dβ = 2 / (t (t+1) (t+2)).

    M rows leave less than the rounding error of eigenvalue `num_filters`. Integers stand for multiples of 2^{−BITS}.
    """
    one = 1 << PLACE_BITS
    place = np.array([int(p) for p in place * one], dtype=object)

    def z(t: np.ndarray) -> np.ndarray:
        return (2 << BITS + 3 * PLACE_BITS) // (t * (t + one) * (t + 2 * one))

    factor = np.empty((0, len(place)), dtype=object)
    diagonal = z(2 * place)  # of Z − FᵀF
    pivots: list[float] = []
    while len(factor) < len(place):
        left = diagonal.astype(float) * weight
        pivot = int(left.argmax())
        pivots.append(left[pivot])
        if left.sum() < EPSILON * max(pivots[:num_filters][-1], SMALLEST * pivots[0]):
            break
        row = z(place + place[pivot]) - (factor[:, pivot] @ factor >> BITS)
        row = (row << BITS) // isqrt(diagonal[pivot] << BITS)
        diagonal = diagonal - (row**2 >> BITS)
        factor = np.vstack((factor, row))
    return factor.astype(float) * 2.0**-BITS * np.sqrt(weight)


def _orthogonalized(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (M, R), rotated in pairs until all are orthogonal: norms (M,), largest first, and directions (M, R)."""
    count = len(vectors)
    vectors = np.pad(vectors, ((0, count % 2), (0, 0)))
    middle = len(vectors) // 2
    orthogonal = False
    while not orthogonal:
        orthogonal = True
        for _ in range(len(vectors) - 1):  # all pairs meet once
            x, y = vectors[:middle], vectors[: middle - 1 : -1]
            xx, yy, xy = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
            orthogonal &= bool((xy**2 <= 1e-20 * xx * yy).all())  # convergence is quadratic: the sweep leaves 1e-16
            gap = yy - xx
            tangent = 2 * xy / (gap + np.copysign(np.sqrt(gap**2 + 4 * xy**2 + 1e-300), gap))  # never 0 / 0
            cosine = 1 / np.sqrt(1 + tangent**2)[:, None]
            sine = cosine * tangent[:, None]
            half = sine / (1 + cosine)  # the tangent of half the angle: small rotations have small errors (Rutishauser)
            x, y = x - sine * (y + half * x), y + sine * (x - half * y)
            vectors = np.concatenate((x[:1], y[:1], x[1:], y[:0:-1]))
    norms = np.sqrt((vectors**2).sum(1))
    order = np.argsort(-norms)[:count]
    return norms[order], vectors[order] / norms[order, None]


def _extended(samples: np.ndarray, rows: int) -> np.ndarray:
    """Filters (rows, K) from √v_r φ_k(i_r), (K, R), at the R rows of `row_quadrature`: in each octave a polynomial.

    Inner products stay the same.
    """
    edges = _octaves(rows)
    filters = np.empty((rows, len(samples)))
    filters[: edges[0]] = samples[:, : edges[0]].T
    for first, (start, stop) in zip(range(edges[0], samples.shape[1], NODES), pairwise(edges), strict=True):
        _, vectors = _discrete_gauss(stop - start)
        coefficients = np.einsum("nr,kr->nk", vectors, samples[:, first : first + NODES])
        np.einsum("ni,nk->ik", _gram_polynomials(stop - start), coefficients, out=filters[start:stop])
    return filters


def row_quadrature(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights with Σ_i f(i) ≈ Σ_r v_r f(i_r) for sums of decaying exponentials, i = 0 … rows−1.

    The first rows are kept one by one; in each octave after them the sum over consecutive indices is replaced by the
    Gauss rule of that *discrete* measure, exact for polynomials of degree 2·NODES − 1.
    """
    edges = _octaves(rows)
    index, weight = [np.arange(float(edges[0]))], [np.ones(edges[0])]
    for start, stop in pairwise(edges):
        node, vectors = _discrete_gauss(stop - start)
        index.append(start + node)
        weight.append((stop - start) * vectors[0] ** 2)
    return np.concatenate(index), np.concatenate(weight)


def _octaves(rows: int) -> list[int]:
    """Where octaves of rows start, and where the last of them ends; rows before the first are kept one by one."""
    edges = [rows]
    while edges[-1] > FIRST:
        edges.append(edges[-1] // 2)
    return edges[::-1]


@lru_cache(maxsize=64)
def _discrete_gauss(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes i_r of the Gauss rule for Σ over 0 … size−1, and p_n(i_r) √v_r, an orthogonal matrix (NODES, NODES).

    The eigenvectors of the symmetric tridiagonal matrix of the recurrence of `_gram_polynomials` (Golub & Welsch).
    """
    step = _recurrence(size)
    centred = np.diag(step, 1) + np.diag(step, -1)
    _, vectors = _orthogonalized(centred + size * np.eye(NODES))  # the sum is positive definite
    node = (size - 1) / 2 + 2 * (step * vectors[:, 1:] * vectors[:, :-1]).sum(1)
    return node, vectors.T * np.sign(vectors[:, 0])


def _gram_polynomials(size: int) -> np.ndarray:
    """p_n(i), orthonormal over i = 0 … size−1: the discrete Chebyshev, or Gram, polynomials, (NODES, size)."""
    step = _recurrence(size)
    centred = np.arange(size) - (size - 1) / 2
    values = np.empty((NODES, size))
    values[0] = size**-0.5
    values[1] = centred * values[0] / step[0]
    for n in range(2, NODES):
        values[n] = (centred * values[n - 1] - step[n - 2] * values[n - 2]) / step[n - 1]
    return values


def _recurrence(size: int) -> np.ndarray:
    """b_n, n = 1 … NODES − 1, in (i − (size−1)/2) p_n = b_{n+1} p_{n+1} + b_n p_{n−1}."""
    n = np.arange(1, NODES)
    return np.sqrt(n**2 * (size**2 - n**2) / (4.0 * (4 * n**2 - 1)))
