"""Filters as sums of exponentials: against the filters themselves, and the states against their recurrence."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from stu.errors import OptionError
from stu.ops import realization
from stu.ops.filters import hankel_matrix, spectral_filters
from stu.ops.realization import (
    TOLERANCE,
    exponential_sums,
    exponential_sums_reference,
    free_response,
    realize_filters,
)
from tests.sizes import Sizes

KINDS = ("standard", "L")
kinds = pytest.mark.parametrize("hankel", KINDS)


@pytest.fixture(autouse=True)
def _no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("STU_CACHE", str(tmp_path))


def weighted(seq_len, num_filters, hankel):
    """What is realised: σ_k^{1/4} φ_k, (L, K)."""
    values, vectors = spectral_filters(seq_len, num_filters, hankel)
    return (values**0.25 * vectors).numpy()


def literal(found, index):
    """Σ_n c_nk p_n^i as it is written."""
    return np.power(found.poles.numpy(), np.asarray(index, dtype=np.float64)[:, None]) @ found.coefficients.numpy()


def relative_error(found, target):
    rows = range(0, len(target), 4096)
    missing = sum(
        np.square(literal(found, np.arange(r, min(r + 4096, len(target)))) - target[r : r + 4096]).sum(0) for r in rows
    )
    return np.sqrt(missing) / np.linalg.norm(target, axis=0)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("seq_len", [512, 1024, 3000, 8192, 16384])
def test_24_filters_are_64_exponentials(seq_len, hankel):
    found = realize_filters(seq_len, 24, hankel)
    assert len(found.poles) <= 64
    assert found.error.max() <= 1e-6
    assert relative_error(found, weighted(seq_len, 24, hankel)).max() <= 1e-6


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(("seq_len", "limit"), [(1024, 1e-8), (8192, 1e-9), (40000, 1e-9)])
def test_more_exponentials_are_as_good_as_rounding_allows(seq_len, limit, hankel):
    found = realize_filters(seq_len, 24, hankel, tolerance=1e-12)
    assert len(found.poles) <= (80 if hankel == "standard" else 128)
    assert relative_error(found, weighted(seq_len, 24, hankel)).max() <= limit


@kinds
@pytest.mark.parametrize(("seq_len", "num_filters"), [(1, 1), (2, 2), (3, 3), (8, 8), (64, 24), (257, 24), (9000, 5)])
@pytest.mark.parametrize("num_states", [None, 2, 30, 64])
def test_the_error_is_what_is_missing(seq_len, num_filters, num_states, hankel):
    found = realize_filters(seq_len, num_filters, hankel, num_states=num_states)
    assert found.poles.dtype == found.coefficients.dtype == found.error.dtype == torch.float64
    count = len(found.poles)
    assert num_states in (None, count)
    assert (found.coefficients.shape, found.error.shape) == ((count, num_filters), (num_filters,))
    assert found.poles.abs().max() < 1
    error = relative_error(found, weighted(seq_len, num_filters, hankel))
    rounding = (
        1e-15
        * np.abs(found.coefficients.numpy()).max(0)
        / np.linalg.norm(weighted(seq_len, num_filters, hankel), axis=0)
    )
    np.testing.assert_array_less(np.abs(found.error.numpy() - error), 0.01 * error + 20 * rounding)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    seq_len=st.integers(1, 1500),
    num_filters=st.integers(1, 24),
    hankel=st.sampled_from(KINDS),
    digits=st.integers(1, 10),
)
def test_a_tolerance_is_kept_with_few_exponentials(seq_len, num_filters, hankel, digits):
    assume(num_filters <= seq_len)
    try:
        best = realize_filters(seq_len, num_filters, hankel, tolerance=0.0)
    except OptionError:
        assume(False)
    found = realize_filters(seq_len, num_filters, hankel, tolerance=10.0**-digits)
    assert len(found.poles) <= len(best.poles)
    assert found.error.max() <= max(1.05 * 10.0**-digits, best.error.max())
    fewer = len(found.poles) - (4 if hankel == "L" else 2)
    if fewer > 0:
        fewer = realize_filters(seq_len, num_filters, hankel, num_states=fewer)
        assert fewer.error.max() > 0.9 * 10.0**-digits


@kinds
def test_poles_depend_on_length_and_number_alone(hankel):
    """So that states outlive what else changes: filters added, another machine's rounding."""
    first = realize_filters(500, 4, hankel, num_states=40).poles
    assert torch.equal(realize_filters(500, 20, hankel, num_states=40).poles, first)
    assert not torch.equal(realize_filters(501, 4, hankel, num_states=40).poles, first)


def test_hankel_l_has_pairs_of_poles_and_filters_of_one_parity():
    found = realize_filters(700, 10, "L")
    half = len(found.poles) // 2
    assert torch.equal(found.poles[:half], -found.poles[half:])
    response = found.response(700)
    assert torch.stack((response[::2].norm(dim=0), response[1::2].norm(dim=0))).min(0).values.max() < 1e-15


@kinds
def test_a_response_is_the_sum_as_written(hankel, monkeypatch):
    monkeypatch.setattr(realization, "CHUNK", 100)
    found = realize_filters(350, 6, hankel)
    for length in (1, 99, 100, 101, 200, 350, 457):
        response = found.response(length)
        assert response.shape == (length, 6)
        np.testing.assert_allclose(response, literal(found, np.arange(length)), rtol=0, atol=1e-14)


def beyond(seq_len, num_filters, hankel, length):
    """The filters past their length as their eigenvector equation says: φ_k(i) = Σ_j Z_ij φ_k(j) / σ_k for any i."""
    values, vectors = spectral_filters(seq_len, num_filters, hankel)
    return hankel_matrix(length, hankel)[seq_len:, :seq_len] @ vectors * values**-0.75


@kinds
def test_filters_go_on_past_their_length(hankel):
    seq_len, num_filters = 1000, 8
    exact = beyond(seq_len, num_filters, hankel, 2 * seq_len)
    found = realize_filters(seq_len, num_filters, hankel, tolerance=1e-12).response(2 * seq_len)[seq_len:]
    near = seq_len // 10
    error = (found - exact)[:, 3:].norm(dim=0) / exact[:, 3:].norm(dim=0)  # the first filters have ended by then
    assert error.max() < 1e-2
    assert ((found - exact)[:near, 3:].norm(dim=0) / exact[:near, 3:].norm(dim=0)).max() < 1e-5


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(
    ("seq_len", "errors", "growth"),
    [(64, (0.12, 0.6), 5e5), (256, (0.014, 0.3), 850), (1024, (0.004, 0.17), 15)],
)
def test_how_well_they_go_on(seq_len, errors, growth, hankel):
    """The numbers in the docstring of `Realization.response`; Hankel-L does better."""
    num_filters = 24 if (hankel, seq_len) != ("L", 64) else 20
    exact = beyond(seq_len, num_filters, hankel, 4 * seq_len)
    largest = torch.from_numpy(weighted(seq_len, num_filters, hankel)).abs().amax(0)
    found = realize_filters(seq_len, num_filters, hankel, tolerance=TOLERANCE).response(4 * seq_len)[seq_len:]
    for rows, limit in zip((slice(seq_len), slice(seq_len, None)), errors, strict=True):
        error, size = (found - exact)[rows], exact[rows]
        ended = size.abs().amax(0) < 1e-4 * largest
        assert (error.norm(dim=0) / size.norm(dim=0))[~ended].max() < limit
        assert (error.abs().amax(0) / largest)[ended].max() < 2e-6
    reached = (exact[:seq_len].abs().amax(0) / largest).max()
    assert 0.8 * growth < reached < 1.2 * growth if hankel == "standard" else reached < growth


def test_states_convolve_with_the_filters():
    found = realize_filters(400, 6)
    u = torch.randn(1, 400, 1, dtype=torch.float64)
    features = found.coefficients.T @ exponential_sums(u, found.poles)  # (1, K, 1)
    filters = torch.from_numpy(weighted(400, 6, "standard"))
    torch.testing.assert_close(features[0], filters.T @ u[0].flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 14, 30])
def test_sums_are_those_of_the_recurrence(length, monkeypatch):
    monkeypatch.setattr(realization, "CHUNK", 7)
    poles = torch.tensor([0.999, 0.5, 0.0025, 0.0, -0.3, -0.99], dtype=torch.float64)
    u = torch.randn(2, length, 3, dtype=torch.float64)
    sums = exponential_sums(u, poles)
    torch.testing.assert_close(sums, exponential_sums_reference(u, poles), rtol=0, atol=1e-13)
    assert sums.shape == (2, 6, 3)
    low = u.to(torch.float32)
    assert torch.equal(exponential_sums(low, poles), exponential_sums(low.double(), poles))


@pytest.mark.parametrize("length", [1, 6, 7, 8, 30])
def test_a_free_response_is_the_recurrence_without_inputs(length, monkeypatch):
    monkeypatch.setattr(realization, "CHUNK", 7)
    poles = torch.tensor([0.999, 0.5, 0.0025, 0.0, -0.3, -0.99], dtype=torch.float64)
    states = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    outputs, state = [], states
    for _ in range(length):
        state = poles[:, None] * state
        outputs.append(state.sum(1))
    found = free_response(states, poles, length)
    torch.testing.assert_close(found, torch.stack(outputs, 1), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda states: free_response(states, poles, length), states)


def test_gradients_of_sums(monkeypatch):
    monkeypatch.setattr(realization, "CHUNK", 4)
    poles = torch.tensor([0.9, -0.4], dtype=torch.float64)
    u = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: exponential_sums(u, poles), u)


def test_sums_never_hold_all_steps_of_all_states():
    length, poles = 3 * realization.CHUNK + 5, torch.linspace(0.1, 0.9999, 50, dtype=torch.float64)
    u = torch.randn(1, length, 16)
    with Sizes() as sizes:
        exponential_sums(u, poles)
    assert 0 < sizes.largest <= max(u.numel(), len(poles) * realization.CHUNK)


def test_exponentials_are_plain_tensors_whatever_is_going_on():
    with torch.device("meta"), torch.inference_mode(), FakeTensorMode():
        found = realize_filters(41, 3)
    assert all(type(tensor) is torch.Tensor and not tensor.is_inference() for tensor in found)
    assert found.poles.device.type == "cpu"
    assert torch.equal(realize_filters(41, 3).poles, found.poles)


def test_changing_what_was_returned_leaves_the_cache_alone():
    found = realize_filters(40, 5)
    before = [tensor.clone() for tensor in found]
    for tensor in found:
        tensor.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(realize_filters(40, 5), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((0, 1), {}, "seq_len"),
        ((64, 60), {}, "num_filters"),
        ((64, 4, "M"), {}, "hankel"),
        ((64, 4), {"num_states": 0}, "num_states"),
        ((64, 4, "L"), {"num_states": 7}, "num_states"),
    ],
)
def test_impossible_options_are_named(arguments, options, name):
    with pytest.raises(OptionError) as caught:
        realize_filters(*arguments, **options)
    assert caught.value.name == name
