"""Discretisation of diagonal continuous systems, x'(t) = A x(t) + B u(t), with steps dt."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from stu.errors import require

Discretization = Literal["zoh", "bilinear"]


def discretize(A: Tensor, dt: Tensor, method: Discretization) -> tuple[Tensor, Tensor]:
    """Ā and the factor of B that makes B̄, for diagonal A (…, N) and steps dt that broadcast with it.

    zoh: Ā = e^{dt·A}, B̄ = (e^{dt·A} − 1)/A · B. bilinear: Ā = (1 + dt·A/2)/(1 − dt·A/2), B̄ = dt/(1 − dt·A/2) · B.
    """
    if method == "zoh":
        z = dt * A
        zero = z == 0  # there (e^z − 1)/z is 1
        return torch.exp(z), dt * (torch.expm1(z) / z.masked_fill(zero, 1)).masked_fill(zero, 1)
    require(method == "bilinear", "discretization", method, "must be zoh or bilinear")
    gain = dt / (1 - dt * A / 2)
    return 1 + gain * A, gain


def require_rate(rate: float) -> None:
    """Raise `OptionError` unless a factor of all time steps is above 0 and finite."""
    require(0 < rate < math.inf, "rate", rate, "must be above 0 and finite")


def at_rate(log_dt: Tensor, rate: float) -> Tensor:
    """The logarithm of rate · dt."""
    return log_dt if rate == 1 else log_dt + math.log(rate)


def is_current(system: Iterable[Tensor], parameters: Iterable[Tensor]) -> bool:
    """Whether a system discretised before serves a step: not where a gradient is wanted that it would not pass on."""
    wanted = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    return not wanted or all(part.requires_grad for part in system)
