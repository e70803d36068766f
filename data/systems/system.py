r"""Linear dynamical systems: how they respond, and how random ones are drawn.

S sequences, L length, N state size, C inputs, O outputs, T steps of an impulse response h

    x_{t+1} = A x_t + B u_t,    y_t = C x_t + D u_t,    from rest    y_t = Σ_i h_i u_{t−i},  h_0 = D,  h_i = C A^{i−1} B

is a `StateSpace`; in a `System` the input reaches the state in the same step, x_t = A x_{t−1} + B u_t. All in float64.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import lfilter

from data.store.synthetic import Reals
from stu.task import Examples

Complexes = NDArray[np.complex128]
Modes = Reals | Complexes
Spectrum = Literal["signs", "uniform", "complex"]
Structure = Literal["diagonal", "symmetric", "general"]


@dataclass(frozen=True, eq=False)
class System:
    """x_t = A x_{t−1} + B u_t + w_t and y_t = C x_t + D u_t + v_t, at rest before t = 0.

    The input reaches the output in the same step: h_0 = CB + D and h_t = C Aᵗ B. With this convention, that of Hazan
    et al., "Spectral filtering for general linear dynamical systems" (1802.03981), the paper's STU is exact except for
    its filters, with M^u = (CB + D, CAB, −D).

    modes: (N,) real, a diagonal; or (N/2,) complex, each standing for a 2×2 rotation block on the diagonal.
    B: (N, C), C: (O, N), D: (O, C).
    basis: (N, N) invertible T; A is T times that diagonal times T⁻¹. None: the identity.
    """

    modes: Modes
    B: Reals
    C: Reals
    D: Reals
    basis: Reals | None = None

    @property
    def A(self) -> Reals:  # noqa: N802 (the paper's name)
        """(N, N) transition matrix."""
        # Viewed as complex p + iq, the (p, q) pairs of a row are rotated by one product; real modes need no view.
        modal = (np.eye(self.B.shape[0]).view(self.modes.dtype) * self.modes).view(np.float64).T
        return modal if self.basis is None else self.basis @ np.linalg.solve(self.basis.T, modal.T).T

    def states(self, drive: Reals) -> Reals:
        """x_t = A x_{t−1} + drive_t from rest, (L, N) → (L, N) float64."""
        if self.basis is not None:
            drive = np.ascontiguousarray(np.linalg.solve(self.basis, drive.T).T)
        modal = drive.view(self.modes.dtype)  # (L, N) or (L, N/2)
        filtered = [lfilter([1], [1, -mode], one) for mode, one in zip(self.modes, modal.T, strict=True)]
        states = np.stack(filtered, axis=1).view(np.float64)
        return states if self.basis is None else states @ self.basis.T

    def respond(
        self, inputs: np.ndarray, process_noise: Reals | float = 0.0, observation_noise: Reals | float = 0.0
    ) -> Reals:
        """Outputs (L, O) for inputs u (L, C), process noise w (L, N) and observation noise v (L, O)."""
        states = self.states(inputs @ self.B.T + process_noise)
        return states @ self.C.T + inputs @ self.D.T + observation_noise

    def impulse_response(self, length: int) -> Reals:
        """The first h_t of y = h * u, (length, O, C)."""
        start = np.eye(length, 1)  # (L, 1)
        return np.stack([self.respond(start * unit) for unit in np.eye(self.B.shape[1])], axis=-1)

    def power(self, length: int, correlation: float = 0.0) -> float:
        """E y² for `coloured` inputs, averaged over `length` steps from rest and over the outputs."""
        # u_0, and every later e_s times √(1 − ρ²), passes through the colouring filter and then through h.
        response = lfilter([1], [1, -correlation], self.impulse_response(length), axis=0)
        energy = np.square(response).sum((1, 2))  # (L,)
        return float(((1 - correlation**2) * energy.cumsum() + correlation**2 * energy).mean() / self.C.shape[0])

    def driven_by_noise(self) -> "System":
        """The system from w to y."""
        return replace(self, B=np.eye(self.C.shape[1]), D=np.zeros_like(self.C))


class StateSpace(NamedTuple):
    """A (N, N), B (N, C), C (O, N), D (O, C): x_{t+1} = A x_t + B u_t and y_t = C x_t + D u_t."""

    A: Reals
    B: Reals
    C: Reals
    D: Reals

    @classmethod
    def of(cls, system: System) -> "StateSpace":
        """The same map from inputs to outputs, with the input reaching the state one step later."""
        return cls(system.A, system.B, system.C @ system.A, system.C @ system.B + system.D)

    @property
    def modes(self) -> Complexes:
        """Eigenvalues of A, by decreasing magnitude."""
        modes = np.linalg.eigvals(self.A).astype(np.complex128)
        return modes[np.argsort(-np.abs(modes), kind="stable")]

    def impulse_response(self, length: int) -> Reals:
        """The first `length` steps of h, (T, O, C); infinite or nan where they overflow."""
        states, power = self.B[None], self.A  # Aⁱ B for the first 2ʲ steps, and A to the power 2ʲ
        with np.errstate(over="ignore", invalid="ignore"):
            while len(states) < length - 1:
                states, power = np.concatenate((states, power @ states)), power @ power
            return np.concatenate((self.D[None], self.C @ states))[:length]

    def respond(self, inputs: np.ndarray) -> Reals:
        """Outputs (S, L, O) for inputs (S, L, C), from rest."""
        return respond(self.impulse_response(inputs.shape[1]), inputs)


def respond(impulse_response: Reals, inputs: np.ndarray) -> Reals:
    """Σ_i h_i u_{t−i}: (T, O, C) and (S, L, C) → (S, L, O)."""
    length = inputs.shape[1]
    n = next_fast_len(length + len(impulse_response) - 1, real=True)
    transfer, spectra = rfft(impulse_response, n, axis=0), rfft(inputs.astype(np.float64), n, axis=1)
    return irfft(np.einsum("foc,sfc->sfo", transfer, spectra), n, axis=1)[:, :length]


def draw_modes(spectrum: Spectrum, d_state: int, radius: float, random: np.random.Generator) -> Modes:
    """The `modes` of a `System` with `d_state` states and a spectral radius of at most `radius`."""
    if spectrum == "signs":
        return radius * random.choice((-1.0, 1.0), d_state)
    if spectrum == "uniform":
        return random.uniform(-radius, radius, d_state)
    return radius * np.exp(2j * np.pi * random.random(d_state // 2))


def draw_basis(structure: Structure, d_state: int, condition: float, random: np.random.Generator) -> Reals | None:
    """The `basis` of a `System`: none, orthogonal, or U Σ Vᵀ with U and V orthogonal and Σ from 1 to `condition`."""
    if structure == "diagonal":
        return None
    left = draw_orthogonal(d_state, random)
    if structure == "symmetric":
        return left
    return (left * np.geomspace(1, condition, d_state)) @ draw_orthogonal(d_state, random)


def draw_orthogonal(size: int, random: np.random.Generator) -> Reals:
    """A uniformly distributed orthogonal matrix. Source: Mezzadri (math-ph/0609050), section 5."""
    Q, R = np.linalg.qr(random.standard_normal((size, size)))
    return Q * np.sign(np.diag(R))


def coloured(white: np.ndarray, correlation: float) -> Reals:
    """u_t = ρ u_{t−1} + √(1 − ρ²) e_t from noise e (L, C), u_0 = e_0: stationary, with the variance of the noise."""
    drive = math.sqrt(1 - correlation**2) * white.astype(np.float64)
    drive[0] = white[0]
    return lfilter([1], [1, -correlation], drive, axis=0)


def white(shape: tuple[int, int], std: float, random: np.random.Generator) -> Reals | float:
    """Gaussian noise of standard deviation `std`; if that is 0, nothing is drawn."""
    return random.normal(0.0, std, shape) if std else 0.0


def first_sequences(examples: Examples, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (S, L, C) and targets (S, L, O) of the first sequences, `count` at most."""
    inputs, targets = zip(*(examples[index] for index in range(min(count, len(examples)))), strict=True)
    return np.stack(inputs), np.stack(targets)


def mean_square(x: np.ndarray) -> float:
    """Mean of x² in float64."""
    return float(np.square(x, dtype=np.float64).mean())
