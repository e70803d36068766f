"""System identification against the systems that it should find."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.systems.identification import fit_arx, fit_fir, ho_kalman, impulse_response_error, lagged, mode_error
from data.systems.lds import LDSData
from data.systems.system import StateSpace, respond
from stu.errors import OptionError


def random_space(seed: int, d_state: int = 4, d_input: int = 2, d_output: int = 3, radius: float = 0.9) -> StateSpace:
    """A dense A of this spectral radius, with complex modes."""
    random = np.random.default_rng(seed)
    A = random.standard_normal((d_state, d_state))
    A *= radius / np.abs(np.linalg.eigvals(A)).max()
    shapes = ((d_state, d_input), (d_output, d_state), (d_output, d_input))
    return StateSpace(A, *(random.standard_normal(shape) for shape in shapes))


def simulated(space: StateSpace, inputs: np.ndarray) -> np.ndarray:
    """The definition, step by step, for one sequence (L, C)."""
    state, outputs = np.zeros(len(space.A)), []
    for u in inputs:
        outputs.append(space.C @ state + space.D @ u)
        state = space.A @ state + space.B @ u
    return np.array(outputs)


def white(space: StateSpace, sequences: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.random.default_rng(seed).standard_normal((sequences, length, space.B.shape[1]))
    return inputs, np.stack([simulated(space, one) for one in inputs])


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 5))
def test_impulse_response_and_outputs_are_the_recurrence(seed, length, d_state):
    space = random_space(seed, d_state)
    for unit in range(2):
        impulse = np.zeros((length, 2))
        impulse[0, unit] = 1
        expected = simulated(space, impulse)
        np.testing.assert_allclose(space.impulse_response(length)[..., unit], expected, rtol=0, atol=1e-12)
    inputs, outputs = white(space, 2, length, seed)
    np.testing.assert_allclose(space.respond(inputs), outputs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("spectrum", ["signs", "uniform", "complex"])
def test_the_truth_in_this_convention(spectrum):
    data = LDSData(seq_len=50, spectrum=spectrum, seed=3)
    truth = StateSpace.of(data.system)
    np.testing.assert_allclose(truth.impulse_response(50), data.system.impulse_response(50), rtol=0, atol=1e-12)
    inputs, targets = data.splits().test[0]
    np.testing.assert_allclose(truth.respond(inputs[None])[0] / data.scale, targets, rtol=0, atol=1e-6)


def test_a_short_response_is_cut_convolution():
    response = np.random.default_rng(0).standard_normal((3, 2, 1))
    inputs = np.random.default_rng(1).standard_normal((1, 6, 1))
    expected = [sum(response[i] @ inputs[0, t - i] for i in range(min(3, t + 1))) for t in range(6)]
    np.testing.assert_allclose(respond(response, inputs)[0], expected, rtol=0, atol=1e-13)


def test_lags():
    x = np.arange(1.0, 9).reshape(1, 4, 2)
    assert lagged(x, 3)[0, 3].tolist() == [[7, 8], [5, 6], [3, 4]]
    assert lagged(x, 3)[0, 1].tolist() == [[3, 4], [1, 2], [0, 0]]


# --- estimates ---


def test_fir_is_exact_from_rest():
    """Sequences as many as inputs or more determine each step of h, however long the memory is."""
    space = random_space(0, radius=1.0)
    inputs, outputs = white(space, 4, 12)
    np.testing.assert_allclose(fit_fir(inputs, outputs, lags=12), space.impulse_response(12), rtol=0, atol=1e-9)


def test_fir_of_a_long_memory_is_its_beginning_in_noise():
    space = random_space(1, radius=0.9)
    inputs, outputs = white(space, 20, 500)
    estimate = fit_fir(inputs, outputs, lags=8)
    error = impulse_response_error(estimate, space.impulse_response(8))
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("output_lags", [2, 3])
def test_arx_is_exact(output_lags):
    """Four states seen through three outputs need two lags of them."""
    space = random_space(2, radius=1.0)
    estimate = fit_arx(*white(space, 1, 200), output_lags=output_lags, input_lags=output_lags + 1)
    assert impulse_response_error(estimate.impulse_response(100), space.impulse_response(100)) < 1e-6


def test_arx_of_too_low_an_order_is_not():
    space = random_space(2, radius=1.0)
    estimate = fit_arx(*white(space, 1, 200), output_lags=1, input_lags=2)
    assert impulse_response_error(estimate.impulse_response(100), space.impulse_response(100)) > 0.01


@pytest.mark.parametrize(("output_lags", "input_lags"), [(1, 1), (2, 1), (1, 3), (3, 4)])
def test_the_system_of_an_arx_is_its_difference_equation(output_lags, input_lags):
    random = np.random.default_rng(4)
    by_outputs = 0.2 * random.standard_normal((output_lags, 3, 3))
    by_inputs = random.standard_normal((input_lags, 3, 2))
    inputs = random.standard_normal((1, 300, 2))
    y = np.zeros((300, 3))
    for t in range(300):
        y[t] += sum(by_outputs[i] @ y[t - 1 - i] for i in range(min(output_lags, t)))
        y[t] += sum(by_inputs[i] @ inputs[0, t - i] for i in range(min(input_lags, t + 1)))
    space = fit_arx(inputs, y[None], output_lags=output_lags, input_lags=input_lags)
    np.testing.assert_allclose(space.respond(inputs)[0], y, rtol=0, atol=1e-9)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_ho_kalman_finds_the_system_up_to_its_basis(seed, d_state):
    space = random_space(seed, d_state)
    found = ho_kalman(space.impulse_response(2 * d_state + 4), d_state)
    np.testing.assert_allclose(found.impulse_response(60), space.impulse_response(60), rtol=0, atol=1e-5)
    assert len(found.A) == d_state


def test_ho_kalman_does_not_invent_states():
    space = random_space(5, 2)
    found = ho_kalman(space.impulse_response(20), 6)
    assert found.A.shape == (2, 2)
    assert mode_error(found.modes, space.modes) < 1e-10
    nothing = ho_kalman(np.zeros((5, 3, 2)), 4)
    assert not nothing.impulse_response(10).any()


def test_ho_kalman_keeps_what_dominates():
    slow, fast = 0.99, 0.3
    space = StateSpace(np.diag([slow, fast]), np.ones((2, 1)), np.array([[1.0, 0.01]]), np.zeros((1, 1)))
    assert ho_kalman(space.impulse_response(40), 1).modes[0] == pytest.approx(slow, abs=1e-3)


def test_the_paper_s_system_from_few_sequences():
    """Marginally stable: A = ±0.9999. Targets are rounded to float32."""
    data = LDSData(seq_len=256, seed=2)
    inputs, targets = (np.stack(x) for x in zip(*(data.splits().train[i] for i in range(8)), strict=True))
    truth = StateSpace.of(data.system)
    response = truth.impulse_response(256) / data.scale
    regressed = fit_arx(inputs[:1], targets[:1], output_lags=2, input_lags=3)
    assert impulse_response_error(regressed.impulse_response(256), response) < 1e-3
    realised = ho_kalman(fit_fir(inputs[:, :16], targets[:, :16], lags=16), 4)
    assert impulse_response_error(realised.impulse_response(256), response) < 1e-3
    minimal = ho_kalman(truth.impulse_response(40), 4)
    assert mode_error(realised.modes, minimal.modes) < 1e-4


# --- errors ---


def test_impulse_response_error_is_relative():
    h = np.random.default_rng(0).standard_normal((5, 2, 2))
    assert impulse_response_error(h, h) == 0
    assert impulse_response_error(np.zeros_like(h), h) == 1
    assert impulse_response_error(1.5 * h, h) == pytest.approx(0.5)
    assert impulse_response_error(h[:3], h) == 0  # over the steps that both have
    assert impulse_response_error(h * np.nan, h) == np.inf
    explosive = StateSpace(np.array([[1e9]]), np.ones((1, 2)), np.ones((2, 1)), np.zeros((2, 2)))
    assert impulse_response_error(explosive.impulse_response(5000), np.ones((5000, 2, 2))) == np.inf


def test_modes_are_matched_one_to_one():
    truth = np.array([1.0, 1.0, -0.5])
    assert mode_error(np.array([-0.5, 1.0, 1.0]), truth) == 0
    assert mode_error(np.array([-0.5, 1.0, 0.4]), truth) == pytest.approx(0.2)  # one estimate serves one mode
    assert mode_error(np.array([1.0, -0.5]), truth) == pytest.approx(1 / 3)  # the missing one counts as 0
    assert mode_error(np.array([1j, 1.0, 1.0, -0.5]), truth) == 0


def test_modes_come_largest_first():
    space = StateSpace(np.diag([0.1, -0.9, 0.5]), np.ones((3, 1)), np.ones((1, 3)), np.zeros((1, 1)))
    np.testing.assert_allclose(space.modes, [-0.9, 0.5, 0.1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, y: fit_fir(u, y, lags=6), "lags=6: must be in 1 … 5, the length"),
        (lambda u, y: fit_fir(u, y, lags=0), "lags=0: must be in 1 … 5"),
        (lambda u, y: fit_arx(u, y, output_lags=0, input_lags=1), "output_lags=0: must be at least 1"),
        (lambda u, y: fit_arx(u, y, output_lags=1, input_lags=0), "input_lags=0: must be at least 1"),
        (lambda u, y: ho_kalman(u[0, :2, :, None], 1), "impulse_response=2: must have at least 3 steps"),
        (lambda u, y: ho_kalman(u[0, ..., None], 0), "d_state=0: must be at least 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(call, message):
    with pytest.raises(OptionError, match=f"^{message.replace('…', '.')}"):
        call(np.ones((2, 5, 1)), np.ones((2, 5, 1)))
