"""System identification: what a model of linear dynamics must beat, and the errors of an estimate.

S sequences, L length, C inputs, O outputs, N state size, T steps of an impulse response h

Least squares on lags of inputs (FIR) or of inputs and outputs (ARX); the realisation of an impulse response by Ho and
Kalman, "Effective construction of linear state-variable models from input/output functions" (1966), as in Oymak and
Ozay, "Non-asymptotic identification of LTI systems from a single trajectory" (1806.05722). All in float64; systems are
those of `StateSpace`.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.optimize import linear_sum_assignment

from data.store.synthetic import Reals
from data.systems.system import Complexes, StateSpace
from stu.errors import require

RANK = 1e-10  # singular values of a Hankel matrix below this fraction of the first are rounding errors


def fit_fir(inputs: np.ndarray, outputs: np.ndarray, *, lags: int) -> Reals:
    """Least squares of y_t on u_t … u_{t−lags+1}: the estimate of h, (lags, O, C), of smallest norm.

    inputs: (S, L, C), outputs: (S, L, O), from rest. A memory longer than `lags` acts as noise. Of sequences cut to
    their first `lags` steps no memory is longer, and C of them determine h exactly.
    """
    require(1 <= lags <= inputs.shape[1], "lags", lags, f"must be in 1 … {inputs.shape[1]}, the length")
    solution = least_squares(lagged(inputs, lags), outputs)  # (lags·C, O)
    return solution.reshape(lags, inputs.shape[2], -1).swapaxes(1, 2)


def fit_arx(inputs: np.ndarray, outputs: np.ndarray, *, output_lags: int, input_lags: int) -> StateSpace:
    """Least squares of y_t on y_{t−1} … y_{t−output_lags} and u_t … u_{t−input_lags+1}, as a system of inputs alone.

    inputs: (S, L, C), outputs: (S, L, O), from rest. Exact without noise if the order suffices: output_lags at least
    the observability index, which is ⌈N/O⌉ or more, and input_lags one more. Observation noise biases the estimate.
    """
    require(output_lags >= 1, "output_lags", output_lags, "must be at least 1; without them it is fit_fir")
    require(input_lags >= 1, "input_lags", input_lags, "must be at least 1")
    d_input, d_output = inputs.shape[2], outputs.shape[2]
    before = np.pad(outputs, ((0, 0), (1, 0), (0, 0)))[:, :-1]  # y_{t−1}
    past = lagged(before, output_lags).reshape(*outputs.shape[:2], -1)
    drive = lagged(inputs, input_lags).reshape(*inputs.shape[:2], -1)
    solution = least_squares(np.concatenate((past, drive), 2), outputs).T  # (O, …)
    by_outputs, by_inputs = np.split(solution, [output_lags * d_output], axis=1)
    return _companion(by_outputs, by_inputs[:, d_input:], by_inputs[:, :d_input])


def ho_kalman(impulse_response: Reals, d_state: int) -> StateSpace:
    """A system of at most `d_state` states that approximates this impulse response (T, O, C), T ≥ 3.

    The block Hankel matrix (h_{i+j+1}) is truncated to rank N by its singular values, H = U Σ Vᵀ = (U Σ^½)(Σ^½ Vᵀ), the
    observability times the controllability matrix. Exact if N states suffice; fewer states if the rank is less.
    """
    length, d_output, d_input = impulse_response.shape
    require(length >= 3, "impulse_response", length, "must have at least 3 steps")
    require(d_state >= 1, "d_state", d_state, "must be at least 1")
    rows = length // 2
    windows = sliding_window_view(impulse_response[1:], length - rows - 1, axis=0)  # [i, o, c, j] = h_{i+j+1}
    blocks = windows.transpose(0, 1, 3, 2).reshape(len(windows) * d_output, -1)  # (rows + 1, O) × (columns, C)
    left, singular, right = np.linalg.svd(blocks[: rows * d_output], full_matrices=False)
    rank = max(1, min(d_state, int((singular > RANK * singular[0]).sum())))
    root = np.sqrt(singular[:rank])
    root_inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)  # 0 where there is no response at all
    observability, controllability = left[:, :rank] * root, root[:, None] * right[:rank]
    shifted = blocks[d_output : (rows + 1) * d_output]
    A = (root_inverse[:, None] * left[:, :rank].T) @ shifted @ (right[:rank].T * root_inverse)
    return StateSpace(A, controllability[:, :d_input], observability[:d_output], impulse_response[0])


def impulse_response_error(estimate: Reals, truth: Reals) -> float:
    """‖ĥ − h‖ / ‖h‖ over the steps that both have, all outputs and all inputs; inf if ĥ is not finite."""
    steps = min(len(estimate), len(truth))
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.linalg.norm(estimate[:steps] - truth[:steps]) / np.linalg.norm(truth[:steps])
    return float(error) if np.isfinite(error) else float("inf")


def mode_error(estimate: Complexes, truth: Complexes) -> float:
    """Mean |λ̂ − λ| over the true modes, under the one-to-one matching that makes it smallest.

    Missing modes count as 0. A model without a state has those of `ho_kalman(its impulse response, N)`.
    """
    missing = np.zeros(max(0, len(truth) - len(estimate)))
    distance = np.abs(truth[:, None] - np.concatenate((estimate, missing)))
    return float(distance[linear_sum_assignment(distance)].mean())


def lagged(x: np.ndarray, lags: int) -> np.ndarray:
    """x_t, x_{t−1} … x_{t−lags+1}, zeros before the first: (S, L, C) → (S, L, lags, C)."""
    padded = np.pad(x, ((0, 0), (lags - 1, 0), (0, 0)))
    return sliding_window_view(padded, lags, axis=1)[..., ::-1].swapaxes(2, 3)


def least_squares(regressors: np.ndarray, outputs: np.ndarray) -> Reals:
    """The solution of smallest norm, (S, L, …) and (S, L, O) → (features, O)."""
    rows = outputs.shape[0] * outputs.shape[1]
    features = regressors.reshape(rows, -1).astype(np.float64)
    solution, *_ = np.linalg.lstsq(features, outputs.reshape(rows, -1), rcond=None)
    return np.asarray(solution)


def _companion(by_outputs: Reals, by_earlier: Reals, by_current: Reals) -> StateSpace:
    """The system whose state is (y_{t−1} … y_{t−p}, u_{t−1} … u_{t−q+1}).

    by_outputs: (O, p·O), by_earlier: (O, (q−1)·C), by_current: (O, C).
    """
    (d_output, remembered), d_earlier, d_input = by_outputs.shape, by_earlier.shape[1], by_current.shape[1]
    C = np.concatenate((by_outputs, by_earlier), 1)
    A, B = np.zeros((remembered + d_earlier,) * 2), np.zeros((remembered + d_earlier, d_input))
    A[:d_output], B[:d_output] = C, by_current
    A[d_output:remembered, : remembered - d_output] = np.eye(remembered - d_output)
    if d_earlier:
        B[remembered : remembered + d_input] = np.eye(d_input)
        A[remembered + d_input :, remembered : remembered + d_earlier - d_input] = np.eye(d_earlier - d_input)
    return StateSpace(A, B, C, by_current)
