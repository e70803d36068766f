r"""Universal sequence preconditioning: predict a fixed combination of the latest outputs in place of the last one.

B batch, L length, O outputs, n degree, C channels of the inputs

    ỹ_t = y_t + Σ_{i=1..n} c_i y_{t−i}        p(z) = z^n + c_1 z^{n−1} + … + c_n,  monic
    ŷ_t = model_t − Σ_{i=1..n} c_i y_{t−i}    outputs before the first are 0

Of a linear system, ỹ_t is Σ_{s<n} (Σ_{j≤s} c_j C A^{s−j} B) u_{t−s} + Σ_{s≥n} C A^{s−n} p(A) B u_{t−s}: where |p| is
small at all eigenvalues, little is left of a long memory. On [−1, 1] no monic polynomial is smaller than Chebyshev's,
2^{1−n} at most; next to it is that of Legendre. Away from the real line both grow: |p(±i)| is 1 + ‖c‖₁, about 1.21^n.

The model is the same, and so is its error, since the outputs before are known; so the loss is that of ỹ.

Source: Marsden and Hazan, "Universal Sequence Preconditioning", 2502.06545, Algorithm 1.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, final, get_args

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Legendre, Polynomial
from torch import Tensor

from stu.errors import require

Kind = Literal["chebyshev", "legendre"]
HIGHEST = 32  # here 1 + ‖c‖₁ is 413: what that many roundings of float32 take is 2.5e-5 of the outputs
TRIVIAL = ("past outputs: last", "past outputs: fixed")  # a model that is given the outputs before has to beat them
STEPS = 1 << 14  # read for the errors, which takes a second at most

BASES = {"chebyshev": Chebyshev, "legendre": Legendre}


@final
@dataclass(frozen=True)
class Preconditioner:
    """The coefficients of a monic orthogonal polynomial, and what they do to sequences of outputs.

    Rounding of the outputs counts (1 + ‖c‖₁)-fold: 7 times at degree 10, 43 times at 20, 413 times at 32, the highest.
    In a rollout the model's own errors pass through 1 / p(z), which makes a constant one 1 / p(1) times as large:
    2^{n−1} for Chebyshev. Raises `OptionError` for another polynomial or degree.
    """

    polynomial: Kind = "chebyshev"
    degree: int = 0

    def __post_init__(self) -> None:
        known = self.polynomial in BASES
        require(known, "polynomial", self.polynomial, f"must be one of {', '.join(get_args(Kind))}")
        require(0 <= self.degree <= HIGHEST, "degree", self.degree, f"must be in 0 … {HIGHEST}; 0 changes nothing")

    @cached_property
    def coefficients(self) -> tuple[float, ...]:
        """c_1 … c_n; every second one is 0."""
        powers = BASES[self.polynomial].basis(self.degree).convert(kind=Polynomial).coef[::-1]
        return tuple(map(float, powers[1:] / powers[0]))

    @property
    def norm(self) -> float:
        """‖c‖₁ without c_0 = 1."""
        return sum(map(abs, self.coefficients))

    def past(self, outputs: Tensor) -> Tensor:
        """Σ c_i y_{t−i} of outputs (B, L, …), for every step of the same."""
        found = outputs.new_zeros(outputs.shape)
        for lag, coefficient in enumerate(self.coefficients, 1):
            if coefficient and lag < outputs.shape[1]:
                found[:, lag:] += coefficient * outputs[:, :-lag]
        return found

    def next_past(self, outputs: Tensor) -> Tensor:
        """The same for the step after outputs (B, L, …), (B, …)."""
        found = outputs.new_zeros(outputs[:, :0].sum(1).shape)
        for lag, coefficient in enumerate(self.coefficients[: outputs.shape[1]], 1):
            found += coefficient * outputs[:, -lag]
        return found

    def simulated(self, prediction: np.ndarray) -> np.ndarray:
        """The outputs y (L, …) of which ỹ is this prediction: each from those before it, ŷ_t = ỹ_t − Σ c_i ŷ_{t−i}."""
        from scipy.signal import lfilter

        return np.asarray(lfilter([1.0], [1.0, *self.coefficients], prediction, axis=0))


class Pairs(Protocol):
    """Examples, as of `stu.task`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


def errors_with_past(preconditioner: Preconditioner, train: Pairs, test: Pairs) -> dict[str, float]:
    """Test errors of predictors that know the outputs before, as a preconditioned model does.

    last: y_{t−1}; fixed: −Σ c_i y_{t−i}, the model that predicts 0; least squares: on the n outputs before and, where
    they are reals, n + 1 inputs, fitted to training sequences.
    """
    fitted, tested = _first(train), _first(test)
    lags = max(1, preconditioner.degree)
    (known, wanted), (regressors, targets) = _regressors(fitted, lags), _regressors(tested, lags)
    solution = np.linalg.lstsq(known, wanted, rcond=None)[0]
    last = np.concatenate([np.pad(y, ((1, 0), (0, 0)))[:-1] for _, y in tested])
    fixed = np.concatenate([-preconditioner.past(torch.from_numpy(y)[None]).numpy()[0] for _, y in tested])
    predictions = {"last": last, "fixed": fixed, "least squares": regressors @ solution}
    return {f"past outputs: {name}": float(np.square(targets - x).mean()) for name, x in predictions.items()}


def _first(examples: Pairs) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first sequences, until they have enough steps, targets in float64."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while len(found) < len(examples) and sum(len(y) for _, y in found) < STEPS:
        inputs, targets = map(np.asarray, examples[len(found)])
        found.append((inputs, targets.astype(np.float64)))
    return found


def _regressors(sequences: list[tuple[np.ndarray, np.ndarray]], lags: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every step the `lags` outputs before and, where they are reals, the inputs up to then; and the outputs."""
    rows = []
    for inputs, targets in sequences:
        parts = [np.pad(targets, ((lag, 0), (0, 0)))[: len(targets)] for lag in range(1, lags + 1)]
        if np.issubdtype(inputs.dtype, np.floating):
            parts += [np.pad(inputs, ((lag, 0), (0, 0)))[: len(inputs)] for lag in range(lags + 1)]
        rows.append(np.concatenate(parts, 1))
    return np.concatenate(rows), np.concatenate([targets for _, targets in sequences])
