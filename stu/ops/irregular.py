r"""Diagonal state spaces whose time steps differ, for sequences that are sampled irregularly.

L length, D input width, O output width, P modes; the first axis of a sequence is the batch

    x_t = Λ̄_t ⊙ x_{t−1} + Γ_t ⊙ B u_t,    (Λ̄_t, Γ_t) = discretize(Λ, f_t dt)

with a factor f_t of each step; where f_t = 0 the state is held. Λ̄_t and Γ_t are as large as the states, and exist for a
piece of time at once: the backward pass makes them again, from the state before the piece. They are in double precision
where the device has it: an error in a decay near 1 enters every step.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stu.ops.discretize import Discretization, discretize
from stu.ops.forms import budget
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.scan import linear_scan

# Real numbers of states at a time on a CPU. Arrays of 32 MB go back to the system when they are freed: of smaller ones
# the allocator keeps several times as much as all states together, for a tenth to a fifth less time.
CHUNK = 1 << 22


class ContinuousSystem(NamedTuple):
    """x'(t) = Λ x(t) + B u(t), y(t) = Re C x(t), and how it is discretised.

    A: Λ, complex (P,); dt: time steps (P,); B: complex (P, D); C: complex (O, P), one for each direction.
    """

    A: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    method: Discretization


def irregular_ssm(
    u: Tensor, factors: Tensor, system: ContinuousSystem, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`y_t = Re(C_1 x_t) + Re(C_2 z_t)` with, from the end, `z_t = Λ̄_t ⊙ z_{t+1} + Γ_t ⊙ B u_t`.

    u: (batch, L, D), real; factors: f, (batch, L); C of the system: (2, O, P), or (1, O, P) without z; initial: complex
    (batch, P), the x before the first, zeros where None. Returns y (batch, L, O) in u's dtype and the last x.
    """
    zeros = system.A.new_zeros(len(u), len(system.A))
    y, last = _from_start(u, factors, system, system.C[0], zeros if initial is None else initial)
    for C in system.C[1:]:
        y = y + _from_start(u.flip(1), factors.flip(1), system, C, zeros)[0].flip(1)
    return y.to(u.dtype), last


def _from_start(u: Tensor, factors: Tensor, system: ContinuousSystem, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """One direction, piece by piece: C (O, P) → y (batch, L, O) and the state after all."""
    steps, outputs = max(1, budget(u, CHUNK, arrays=16) // max(1, 2 * x.numel())), []
    for piece in zip(u.split(steps, 1), factors.split(steps, 1), strict=True):
        y, x = checkpoint(_piece, *piece, system, C, x, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, 1), x


def _piece(u: Tensor, factors: Tensor, system: ContinuousSystem, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = at_least_float32(u)
    with no_autocast(u):
        decay, gain = discretize(system.A, factors.unsqueeze(-1) * system.dt, system.method)  # (batch, l, P)
        drive = gain * torch.complex(*(u.to(dtype) @ part.T.to(dtype) for part in (system.B.real, system.B.imag)))
        states = linear_scan(drive, decay, x)
        y = states.real.to(dtype) @ C.real.T.to(dtype) - states.imag.to(dtype) @ C.imag.T.to(dtype)
    return y, states[:, -1].clone()  # a view would keep all states
