"""Nonlinear dynamical systems: their equations, and their trajectories to a stated tolerance, many at once.

S state variables, C observed channels, n trajectories, T samples, K levels of the force

Every system may be driven by one force u(t), in the unit of the term it adds to; 0: unforced. It is constant over some
samples at a time, so that the state and the force at one sample determine the next state.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import final

import numpy as np
from scipy.integrate import solve_ivp

from data.store.synthetic import Reals
from stu.errors import require

EVALUATIONS = 20_000  # of the equations per sample, at most, on average: a second


@dataclass(frozen=True, kw_only=True)
class Dynamics(ABC):
    """x'(t) = f(x(t), u(t)), from random states; the equations are written for many trajectories at once."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(abs(value) < math.inf, field.name, value, "must be a finite number")

    @property
    @abstractmethod
    def states(self) -> int:
        """S."""

    @property
    def channels(self) -> int:
        """C; all states unless a subclass says otherwise."""
        return self.states

    @property
    def lyapunov(self) -> float | None:
        """Largest Lyapunov exponent of the unforced system, in 1/time; None if it is not known."""
        return None

    @abstractmethod
    def derivative(self, state: Reals, force: Reals | float) -> Reals:
        """f, (S, n) and (n,) → (S, n)."""

    @abstractmethod
    def start(self, uniform: Reals) -> Reals:
        """Initial states from random numbers in [0, 1), (S, n) → (S, n)."""

    def observe(self, state: Reals) -> Reals:
        """What is observed of the state, (S, …) → (C, …)."""
        return state


@final
@dataclass(frozen=True, kw_only=True)
class Pendulum(Dynamics):
    """θ'' = −(g/l) sin θ − d θ' + u, θ from the downward vertical; u is a torque over the moment of inertia.

    Starts at any angle with a velocity of up to 2/s. Observed as sin θ, cos θ and θ', because θ grows without bound
    where the pendulum turns over. Source: Strogatz, "Nonlinear dynamics and chaos" (1994), sections 6.7 and 8.5.

    gravity: m/s². length: m. damping: 1/s.
    """

    states, channels = 2, 3

    gravity: float = 9.81
    length: float = 1.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.length > 0, "length", self.length, "must be above 0")
        require(self.damping >= 0, "damping", self.damping, "must be at least 0")

    def derivative(self, state: Reals, force: Reals | float) -> Reals:
        """(2, n) and (n,) → (2, n)."""
        angle, velocity = state
        return np.stack((velocity, -self.gravity / self.length * np.sin(angle) - self.damping * velocity + force))

    def start(self, uniform: Reals) -> Reals:
        """(2, n) → (2, n)."""
        return (2 * uniform - 1) * [[math.pi], [2]]

    def observe(self, state: Reals) -> Reals:
        """(2, …) → (3, …)."""
        angle, velocity = state
        return np.stack((np.sin(angle), np.cos(angle), velocity))

    def energy(self, state: Reals) -> Reals:
        """Energy per unit mass, constant without damping and force; (2, …) → (…), J/kg."""
        angle, velocity = state
        return (self.length * velocity) ** 2 / 2 - self.gravity * self.length * np.cos(angle)


@final
@dataclass(frozen=True, kw_only=True)
class DoublePendulum(Dynamics):
    """Two masses on massless rods, the second hung from the first; angles θ₁ and θ₂ from the downward vertical.

    Solves M(θ) θ'' = τ(θ, θ'), Lagrange's equations; u is a torque on the first joint. Released at rest, at any angles.
    Observed as sines, cosines and velocities. Source: Shinbrot et al., "Chaos in a double pendulum" (American
    Journal of Physics 60, 1992).

    gravity: m/s². length1, length2: m. mass1, mass2: kg. damping: of each velocity, N m s.
    """

    states, channels = 4, 6  # two angles, then two velocities; two sines, two cosines, two velocities

    gravity: float = 9.81
    length1: float = 1.0
    length2: float = 1.0
    mass1: float = 1.0
    mass2: float = 1.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length1", "length2", "mass1", "mass2"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        require(self.damping >= 0, "damping", self.damping, "must be at least 0")

    def derivative(self, state: Reals, force: Reals | float) -> Reals:
        """(4, n) and (n,) → (4, n)."""
        angle1, angle2, velocity1, velocity2 = state
        l1, l2, m1, m2, g = self.length1, self.length2, self.mass1, self.mass2, self.gravity
        sine, cosine = np.sin(angle1 - angle2), np.cos(angle1 - angle2)
        # M = ((a, b c), (b c, e))
        a, b, e = (m1 + m2) * l1**2, m2 * l1 * l2, m2 * l2**2
        torque1 = -b * sine * velocity2**2 - (m1 + m2) * g * l1 * np.sin(angle1) - self.damping * velocity1 + force
        torque2 = b * sine * velocity1**2 - m2 * g * l2 * np.sin(angle2) - self.damping * velocity2
        determinant = a * e - (b * cosine) ** 2
        acceleration1 = (e * torque1 - b * cosine * torque2) / determinant
        acceleration2 = (a * torque2 - b * cosine * torque1) / determinant
        return np.stack((velocity1, velocity2, acceleration1, acceleration2))

    def start(self, uniform: Reals) -> Reals:
        """(4, n) → (4, n)."""
        return (2 * uniform - 1) * [[math.pi], [math.pi], [0], [0]]

    def observe(self, state: Reals) -> Reals:
        """(4, …) → (6, …)."""
        return np.concatenate((np.sin(state[:2]), np.cos(state[:2]), state[2:]))

    def energy(self, state: Reals) -> Reals:
        """Energy, constant without damping and force; (4, …) → (…), J."""
        angle1, angle2, velocity1, velocity2 = state
        l1, l2, m1, m2 = self.length1, self.length2, self.mass1, self.mass2
        x1, y1 = l1 * np.cos(angle1) * velocity1, l1 * np.sin(angle1) * velocity1  # velocities of the masses
        x2, y2 = x1 + l2 * np.cos(angle2) * velocity2, y1 + l2 * np.sin(angle2) * velocity2
        height1 = -l1 * np.cos(angle1)
        height2 = height1 - l2 * np.cos(angle2)
        kinetic = (m1 * (x1**2 + y1**2) + m2 * (x2**2 + y2**2)) / 2
        return kinetic + self.gravity * (m1 * height1 + m2 * height2)


@final
@dataclass(frozen=True, kw_only=True)
class Lorenz63(Dynamics):
    """x' = σ(y − x) + u, y' = x(ρ − z) − y, z' = xy − βz.

    Starts within 5 of (0, 0, ρ). Sources: Lorenz, "Deterministic nonperiodic flow" (Journal of the Atmospheric
    Sciences 20, 1963), with its parameters; Sprott, "Chaos and time-series analysis" (2003), for their largest Lyapunov
    exponent.
    """

    states = 3

    sigma: float = 10.0
    rho: float = 28.0
    beta: float = 8 / 3

    @property
    def lyapunov(self) -> float | None:
        """0.906 for the parameters of 1963."""
        return 0.906 if self == Lorenz63() else None

    def derivative(self, state: Reals, force: Reals | float) -> Reals:
        """(3, n) and (n,) → (3, n)."""
        x, y, z = state
        return np.stack((self.sigma * (y - x) + force, x * (self.rho - z) - y, x * y - self.beta * z))

    def start(self, uniform: Reals) -> Reals:
        """(3, n) → (3, n)."""
        return 10 * uniform - 5 + [[0], [0], [self.rho]]


@final
@dataclass(frozen=True, kw_only=True)
class Lorenz96(Dynamics):
    """x_i' = (x_{i+1} − x_{i−2}) x_{i−1} − x_i + F + u at sites on a circle.

    Starts within 1 of the equilibrium x_i = F. Source: Lorenz, "Predictability: a problem partly solved" (ECMWF
    seminar, 1996), with 40 sites and F = 8. The exponent was measured here, to 0.01: errors double in 0.41; in 0.42
    according to Lorenz and Emanuel (Journal of the Atmospheric Sciences 55, 1998).
    """

    sites: int = 40
    forcing: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sites >= 4, "sites", self.sites, "must be at least 4")

    @property
    def states(self) -> int:
        """One per site."""
        return self.sites

    @property
    def lyapunov(self) -> float | None:
        """1.68 for 40 sites and F = 8."""
        return 1.68 if self == Lorenz96() else None

    def derivative(self, state: Reals, force: Reals | float) -> Reals:
        """(S, n) and (n,) → (S, n)."""
        around = np.concatenate((state[-2:], state, state[:1]))  # x_{−2}, x_{−1}, x_0, …, x_{S−1}, x_S
        return (around[3:] - around[:-3]) * around[1:-2] - state + (self.forcing + force)

    def start(self, uniform: Reals) -> Reals:
        """(S, n) → (S, n)."""
        return self.forcing + 2 * uniform - 1


@final
@dataclass(frozen=True, kw_only=True)
class VanDerPol(Dynamics):
    """x'' − μ(1 − x²) x' + x = u, observed as x and x'; both start within 3 of 0.

    Source: van der Pol, "On relaxation-oscillations" (Philosophical Magazine 2, 1926).
    """

    states = 2

    mu: float = 1.0

    def derivative(self, state: Reals, force: Reals | float) -> Reals:
        """(2, n) and (n,) → (2, n)."""
        x, velocity = state
        return np.stack((velocity, self.mu * (1 - x**2) * velocity - x + force))

    def start(self, uniform: Reals) -> Reals:
        """(2, n) → (2, n)."""
        return 6 * uniform - 3


def simulate(system: Dynamics, start: Reals, levels: Reals, *, dt: float, hold: int, tolerance: float) -> Reals:
    """States at 0, dt, 2 dt, …, from initial ones: (S, n) → (K hold + 1, S, n).

    levels: (K, n), the force, which keeps each of them for `hold` samples.

    Dormand and Prince's method of order 8 with its interpolant of order 7, restarted at every level. In no step does
    the estimated error of a trajectory (root mean square over its states) exceed tolerance · (1 + |x|): the method
    bounds the error over all n together, and so gets a tolerance smaller by √n. Raises `OptionError` where a trajectory
    is not finite, or changes too fast: more than `EVALUATIONS` per sample.
    Source: Hairer, Nørsett and Wanner, "Solving ordinary differential equations I" (1993), section II.5, in SciPy.
    """
    weaker = "choose a shorter dt, weaker terms of the system, or a weaker force"
    calls = 0

    def derivative(time: float, state: Reals, level: Reals) -> Reals:
        nonlocal calls
        calls += 1
        few = calls <= EVALUATIONS * max(1, time / dt)  # 1 where the time is not a number
        require(
            few, "dt", dt, f"{system} changes too fast, in {EVALUATIONS:,} evaluations and more per sample: {weaker}"
        )
        return system.derivative(state.reshape(start.shape), level).ravel()

    shared = tolerance / math.sqrt(start.shape[1])
    times = dt * np.arange(1, hold + 1)
    samples = [start[None]]
    for level in levels:
        state, span, calls = samples[-1][-1].ravel(), (0, times[-1]), 0
        with np.errstate(all="ignore"):  # what is not finite is named
            solution = solve_ivp(derivative, span, state, "DOP853", times, args=(level,), rtol=shared, atol=shared)
        finite = solution.success and bool(np.isfinite(solution.y).all())
        require(finite, "dt", dt, f"{system} cannot be integrated ({solution.message}): {weaker}")
        samples.append(solution.y.T.reshape(hold, *start.shape))
    return np.concatenate(samples)
