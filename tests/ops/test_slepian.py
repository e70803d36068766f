"""Slepian filters against exact arithmetic, the definition of the prolate matrix, and the responses they are for."""

import mpmath
import numpy as np
import pytest
import torch
from scipy.signal.windows import dpss
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from stu.ops import filter_store, slepian
from stu.ops.filters import hankel_matrix, spectral_filters
from stu.ops.realization import realize_filters
from stu.ops.slepian import SMALLEST, default_bandwidth, prolate_matrix, slepian_filters


def exact(seq_len: int, bandwidth: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The leading eigenpairs in 80-digit arithmetic."""
    with mpmath.workdps(80):
        width = mpmath.mpf(bandwidth)
        lag = [2 * width, *(mpmath.sin(2 * mpmath.pi * width * d) / (mpmath.pi * d) for d in range(1, seq_len))]
        matrix = mpmath.matrix(seq_len, seq_len)
        for i in range(seq_len):
            for j in range(seq_len):
                matrix[i, j] = lag[abs(i - j)]
        values, vectors = mpmath.eigsy(matrix)
        order = sorted(range(seq_len), key=lambda k: -values[k])[:count]
        return np.array([float(values[k]) for k in order]), np.array(
            [[float(vectors[i, k]) for k in order] for i in range(seq_len)]
        )


@pytest.mark.parametrize(
    ("seq_len", "bandwidth", "count"),
    [(1, 0.1, 1), (2, 0.2, 2), (3, 0.2, 3), (9, 0.05, 9), (16, 0.4, 16), (21, 0.1, 12)],
)
def test_eigenpairs_equal_exact_ones(seq_len, bandwidth, count):
    (values, vectors), (found, filters) = exact(seq_len, bandwidth, count), slepian_filters(seq_len, count, bandwidth)
    kept = len(found)
    assert kept == (values > SMALLEST).sum()
    error = np.abs(found / values[:kept] - 1)
    assert (error < 1e-13 + 1e-14 / np.sqrt(found)).all()
    signs = np.sign((filters * vectors[:, :kept]).sum(0))
    assert np.linalg.norm(filters - signs * vectors[:, :kept], axis=0).max() < 1e-14


@pytest.mark.parametrize(("seq_len", "bandwidth", "count"), [(64, None, 24), (255, 0.02, 20), (256, 0.3, 60)])
def test_filters_are_eigenvectors_in_order(seq_len, bandwidth, count):
    values, filters = slepian_filters(seq_len, count, bandwidth)
    assert (np.diff(values) < 1e-13).all()  # those near 1 are equal
    assert np.abs(filters.T @ filters - np.eye(count)).max() < 1e-13
    z = prolate_matrix(seq_len, bandwidth or default_bandwidth(seq_len, count))
    assert np.abs(z @ filters - filters * values).max() < 1e-13
    assert (filters[np.abs(filters).argmax(0), range(count)] > 0).all()
    if bandwidth:
        theirs = dpss(seq_len, seq_len * bandwidth, count).T
        assert np.linalg.norm(theirs - np.sign((theirs * filters).sum(0)) * filters, axis=0).max() < 1e-8


@pytest.mark.parametrize("seq_len", [5000, pytest.param(131072, marks=pytest.mark.slow)])
def test_long_filters(seq_len):
    values, filters = slepian_filters(seq_len, 24)
    assert np.abs(filters.T @ filters - np.eye(24)).max() < 1e-13
    assert values[0] == pytest.approx(1, abs=1e-13)
    assert 1e-14 < values[-1] < 1e-12  # the default bandwidth, at any length
    frequency = 0.9 * default_bandwidth(seq_len, 24)
    wave = np.cos(2 * np.pi * frequency * np.arange(seq_len) + 1)
    assert np.linalg.norm(wave - filters @ (filters.T @ wave)) < 1e-4 * np.linalg.norm(wave)


@pytest.mark.parametrize("count", [1, 3, 12, 24, 40, 100, 200])
def test_what_the_default_bandwidth_leaves_out(count):
    seq_len = 256
    values, filters = slepian_filters(seq_len, count)
    assert len(values) == count
    assert count < 24 or values[-1] < 1e-6
    time = np.arange(seq_len)
    for place in (0.0, 0.5, 0.9):
        pole = 0.9999 * np.exp(2j * np.pi * place * default_bandwidth(seq_len, count))
        response = (pole**time).real
        left = np.linalg.norm(response - filters @ (filters.T @ response)) / np.linalg.norm(response)
        assert count < 12 or left < 2e-3


def test_options():
    assert_close(hankel_matrix(5, "slepian", 0.2), torch.from_numpy(prolate_matrix(5, 0.2)))
    values, filters = spectral_filters(32, 6, "slepian", 0.1)
    assert values.dtype == filters.dtype == torch.float64
    for wrong in (0.0, -0.1, 0.5, 0.7):
        with pytest.raises(OptionError, match=r"bandwidth=.*must be above 0 and below 0.5"):
            spectral_filters(32, 6, "slepian", wrong)
    with pytest.raises(OptionError, match=r"bandwidth=0.1: must be null without hankel=slepian"):
        spectral_filters(32, 6, "standard", 0.1)
    with pytest.raises(OptionError, match=r"num_filters=30: must be in 1 … .*drown in float64 rounding"):
        spectral_filters(32, 30, "slepian", 0.01)
    with pytest.raises(OptionError, match="num_filters=33"):
        spectral_filters(32, 33, "slepian", 0.4)
    with pytest.raises(OptionError, match="hankel=slepian: has no realisation"):
        realize_filters(32, 6, "slepian")


def test_files(tmp_path, monkeypatch):
    monkeypatch.setenv("STU_CACHE", str(tmp_path))
    monkeypatch.setattr(filter_store, "STORED", 0)
    first = slepian_filters(40, 5, 0.0625)
    slepian._eigenpairs.cache_clear()
    monkeypatch.setattr(slepian, "_computed", None)
    again = slepian_filters(40, 5, 0.0625)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert "slepian-0.0625-40-5" in next((tmp_path / "filters").iterdir()).name
    slepian._eigenpairs.cache_clear()


@pytest.mark.parametrize("layer", [STU, STUT])
def test_layers_stream_by_windows(layer):
    with pytest.raises(OptionError, match="streaming=states: must be window or auto with hankel=slepian"):
        layer(4, seq_len=600, hankel="slepian", streaming="states")
    made = layer(4, seq_len=600, hankel="slepian", bandwidth=0.01)  # auto, at a length that has states otherwise
    x = torch.randn(1, 600, 4)
    _, state = made.prefill(x[:, :599])
    y, _ = made.step(x[:, 599], state)
    assert_close(y, made(x)[:, -1], rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match="hankel=slepian"):
        made.extended(601)
