"""Spectral filters against exact arithmetic, and what holds for eigenpairs at any length."""

import re

import mpmath
import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from torch import Tensor

from stu.errors import OptionError
from stu.ops import filters
from stu.ops.filters import hankel_matrix, spectral_filters
from tests.golden import cases

EPSILON = torch.finfo(torch.float64).eps
KINDS = ("standard", "L")
kinds = pytest.mark.parametrize("hankel", KINDS)


@pytest.fixture
def sampled(monkeypatch):
    """Make every length take the way of the long ones; the first 256 rows are never sampled."""
    filters._eigenpairs.cache_clear()
    monkeypatch.setattr(filters, "DIRECT", 255)
    yield
    filters._eigenpairs.cache_clear()


def conditioning(eigenvalues: Tensor) -> Tensor:
    """The relative error of σ_k where √σ_k, a singular value, has an absolute one of ε·√σ_1.

    A dense `eigh` has ε·σ_1/σ_k instead: the square of it.
    """
    return EPSILON * (eigenvalues[0] / eigenvalues).sqrt()


def assert_eigenpairs(found: tuple[Tensor, Tensor], values: Tensor, vectors: Tensor, limit: float) -> None:
    """Errors of what float64 can reach for each filter, and below `limit` (values) and 10·`limit` (vectors) at all."""
    bound = conditioning(values)
    error = (found[0] / values - 1).abs()
    assert (error <= (1e-13 + bound).clamp_max(limit)).all(), error
    error = (found[1] - vectors).norm(dim=0)
    assert (error <= (1e-12 + 10 * bound).clamp_max(10 * limit)).all(), error


def meaningful(seq_len: int, hankel: str) -> int:
    """How many filters of this length are offered, as the error message says."""
    try:
        spectral_filters(seq_len, seq_len, hankel)
    except OptionError as error:
        return int(re.search(r"in 1 … (\d+);", error.allowed)[1])
    return seq_len


def exact_eigenpairs(seq_len: int, hankel: str) -> tuple[Tensor, Tensor]:
    """All eigenpairs in 60-digit arithmetic, largest first, largest entries positive."""
    with mpmath.workdps(60):
        z = mpmath.matrix(seq_len, seq_len)
        for i in range(1, seq_len + 1):
            for j in range(1, seq_len + 1):
                s = mpmath.mpf(i + j)
                standard = 2 / (s**3 - s)
                other = (1 + (-1) ** (i + j)) * 8 / ((s + 3) * (s - 1) * (s + 1))
                z[i - 1, j - 1] = standard if hankel == "standard" else other
        values, vectors = mpmath.eigsy(z)
        order = sorted(range(seq_len), key=lambda k: -values[k])
        exact = np.array([[float(vectors[i, k]) for k in order] for i in range(seq_len)])
        sign = np.sign(exact[np.abs(exact).argmax(0), np.arange(seq_len)])
        return torch.tensor([float(values[k]) for k in order], dtype=torch.float64), torch.from_numpy(exact * sign)


def hankel_product(hankel: str, vectors: np.ndarray) -> np.ndarray:
    """Z V without Z: z depends on i + j, so that the product is a convolution."""
    length = len(vectors)
    s = np.arange(2, 2 * length + 1, dtype=np.float64)
    z = 2 / (s**3 - s) if hankel == "standard" else np.where(s % 2 == 0, 16 / ((s + 3) * (s - 1) * (s + 1)), 0)
    return fftconvolve(z[:, None], vectors[::-1], axes=0)[length - 1 : 2 * length - 1]


@pytest.mark.parametrize(
    ("kind", "seq_len", "num_filters"), cases("stu_filters", r"hp__(std|L)_L(\d+)_K(\d+)__eig_vals")
)
@pytest.mark.parametrize("way", ["direct", "sampled"])
def test_eigenpairs_equal_exact_ones(way, kind, seq_len, num_filters, golden, request):
    if way == "sampled":
        request.getfixturevalue("sampled")
    name = f"hp__{kind}_L{seq_len}_K{num_filters}__"
    arrays = golden("stu_filters")
    values, vectors = arrays[name + "eig_vals"].flip(0), arrays[name + "eig_vecs"].flip(1)
    found = spectral_filters(int(seq_len), int(num_filters), "standard" if kind == "std" else "L")
    assert_eigenpairs(found, values, vectors, 1e-6)


@kinds
@pytest.mark.parametrize("seq_len", [1, 2, 3, 8, 13, 24])
def test_all_offered_filters_are_exact(seq_len, hankel):
    count = meaningful(seq_len, hankel)
    values, vectors = exact_eigenpairs(seq_len, hankel)
    found = spectral_filters(seq_len, count, hankel)
    assert_eigenpairs(found, values[:count], vectors[:, :count], 1e-4)
    if count < seq_len:
        assert values[count] < filters.SMALLEST * values[0] <= values[count - 1]


@kinds
@pytest.mark.parametrize("seq_len", [1, 2, 3, 31, 64, 127, 500])
def test_filters_are_eigenvectors_in_order(seq_len, hankel):
    count = min(24, meaningful(seq_len, hankel))
    values, vectors = spectral_filters(seq_len, count, hankel)
    assert values.dtype == vectors.dtype == torch.float64
    assert (values.shape, vectors.shape) == ((count,), (seq_len, count))
    z = hankel_matrix(seq_len, hankel)
    assert (z @ vectors - vectors * values).abs().max() < 1e-14
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count).double(), rtol=0, atol=1e-13)
    assert (values[:-1] > values[1:]).all()
    assert values[-1] > 0
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("hankel", "seq_len"),
    [("standard", 4097), ("standard", 10007), ("L", 8193), ("standard", 65536)],
)
def test_long_filters_are_eigenvectors(hankel, seq_len):
    values, vectors = spectral_filters(seq_len, 24, hankel)
    residual = torch.from_numpy(hankel_product(hankel, vectors.numpy())) - vectors * values
    assert (residual.norm(dim=0) < 1e-13 + conditioning(values)).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(24).double(), rtol=0, atol=1e-9)
    diagonal = 2 * torch.arange(1, seq_len + 1, dtype=torch.float64)
    trace = 2 / (diagonal**3 - diagonal) if hankel == "standard" else 16 / ((diagonal + 3) * (diagonal**2 - 1))
    missing = trace.sum() - values.sum()  # the eigenvalues behind the last
    assert -1e-14 < missing < (2 if hankel == "standard" else 4) * values[-1]
    assert (values[:-1] > values[1:]).all()
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("hankel", "seq_len"), [("standard", 257), ("standard", 1000), ("standard", 4097), ("L", 513), ("L", 1000)]
)
def test_both_ways_to_decompose_agree(seq_len, hankel, monkeypatch, request):
    monkeypatch.setattr(filters, "DIRECT", seq_len)
    direct = spectral_filters(seq_len, 24, hankel)
    request.getfixturevalue("sampled")
    found = spectral_filters(seq_len, 24, hankel)
    assert not torch.equal(found[1], direct[1])  # the other way was taken
    assert_eigenpairs(found, *direct, 1e-7)


@kinds
def test_row_quadrature_sums_decaying_exponentials(hankel):
    rows = 5000
    index, weight = filters._row_quadrature(rows)
    assert len(index) < rows / 10
    for rate in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 0.0):
        exact = np.exp(-rate * np.arange(rows)).sum()
        assert abs(weight @ np.exp(-rate * index) / exact - 1) < 1e-12


def test_hankel_matrices_are_moments():
    node, weight = np.polynomial.legendre.leggauss(20)
    power = np.arange(9)[:, None] + np.arange(9)
    left, right = (node + 1) / 2, weight / 2  # on [0, 1]
    moments = ((1 - left) ** 2 * right * left ** power[..., None]).sum(-1)
    np.testing.assert_allclose(hankel_matrix(9), moments, rtol=1e-12)
    moments = ((1 - node**2) ** 2 * weight * node ** power[..., None]).sum(-1)
    np.testing.assert_allclose(hankel_matrix(9, "L"), moments, rtol=1e-12, atol=1e-16)


def test_hankel_l_filters_live_on_one_parity():
    _, vectors = spectral_filters(65, 20, "L")
    norms = torch.stack((vectors[::2].norm(dim=0), vectors[1::2].norm(dim=0)))
    assert (norms.min(0).values == 0).all()


@kinds
def test_fewer_filters_are_the_first_of_more(hankel):
    values, vectors = spectral_filters(100, 20, hankel)
    few_values, few_vectors = spectral_filters(100, 7, hankel)
    torch.testing.assert_close(few_values, values[:7], rtol=1e-12, atol=0)
    torch.testing.assert_close(few_vectors, vectors[:, :7], rtol=0, atol=1e-12)


@kinds
def test_filters_come_out_the_same_again(hankel):
    first = spectral_filters(77, 12, hankel)
    filters._eigenpairs.cache_clear()
    second = spectral_filters(77, 12, hankel)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changing_what_was_returned_leaves_the_cache_alone():
    values, vectors = spectral_filters(40, 5)
    before = values.clone(), vectors.clone()
    values.fill_(torch.nan)
    vectors.fill_(torch.nan)
    after = spectral_filters(40, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@kinds
@pytest.mark.parametrize("seq_len", [40, 200, 600])
def test_more_filters_than_float64_can_tell_are_refused(seq_len, hankel):
    count = meaningful(seq_len, hankel)
    values, _ = spectral_filters(seq_len, count, hankel)
    assert values[-1] > filters.SMALLEST * values[0]
    with pytest.raises(OptionError, match=f"num_filters={count + 1}: .*1 … {count};.* {seq_len} ") as caught:
        spectral_filters(seq_len, count + 1, hankel)
    assert caught.value.name == "num_filters"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 1), "seq_len"),
        ((5, 0), "num_filters"),
        ((5, 6), "num_filters"),
        ((5, 2, "l"), "hankel"),
    ],
)
def test_impossible_options_are_named(arguments, name):
    with pytest.raises(OptionError) as caught:
        spectral_filters(*arguments)
    assert caught.value.name == name
