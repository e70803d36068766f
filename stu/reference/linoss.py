r"""LinOSS, linear oscillatory state spaces, and D-LinOSS, the same with damping.

B batch, L length, D model width, N oscillators

    x''(t) = −A ⊙ x(t) − G ⊙ x'(t) + B u(t),    y(t) = Re(C x(t)) + D ⊙ u(t)        (G = 0 in LinOSS)

Sources: Rusch, Rus, "Oscillatory State-Space Models", 2410.03943, section 2; Boyer, Rusch, Rus, "Learning to Dissipate
Energy in Oscillatory State-Space Models", 2505.12171, section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stu.reference.common import associative_scan

# (z, x) and force → the next (z, x), for every oscillator
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def linoss(u: Tensor, step: Step, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The whole model by the papers' parallel scan, (B, L, D) → (B, L, D). Complex B (N, D), C (D, N); D (D,)."""
    M, F = matrices(step, B[:, 0].real)
    force = u.to(B.dtype) @ B.T  # (B, L, N)
    forces = (F * force.unsqueeze(-1)).unsqueeze(-1)  # (B, L, N, 2, 1)
    steps = M.to(B.dtype).expand(1, u.shape[1], -1, -1, -1)
    _, states = associative_scan(steps, forces, torch.matmul)
    return (states[..., 1, 0] @ C.T).real + D * u


def over_time(u: Tensor, step: Step, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The same, one step after the other."""
    z = x = u.new_zeros(len(u), len(B), dtype=B.dtype)
    outputs = []
    for u_t in u.unbind(1):
        z, x = step(z, x, u_t.to(B.dtype) @ B.T)
        outputs.append((x @ C.T).real + D * u_t)
    return torch.stack(outputs, 1)


def implicit(A: Tensor, dt: Tensor) -> Step:
    """IM: z_t = z_{t−1} + Δt (−A x_t + f_t), x_t = x_{t−1} + Δt z_t, solved by the Schur complement 1/(1 + Δt² A)."""

    def step(z: Tensor, x: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        schur = 1 / (1 + dt**2 * A)
        position = schur * (x + dt * z + dt**2 * force)
        return z + dt * (-A * position + force), position

    return step


def implicit_explicit(A: Tensor, dt: Tensor) -> Step:
    """IMEX: z_t = z_{t−1} + Δt (−A x_{t−1} + f_t), x_t = x_{t−1} + Δt z_t."""

    def step(z: Tensor, x: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        velocity = z + dt * (-A * x + force)
        return velocity, x + dt * velocity

    return step


def damped(A: Tensor, G: Tensor, dt: Tensor) -> Step:
    """D-LinOSS: z_t = z_{t−1} + Δt (−A x_{t−1} − G z_t + f_t), x_t = x_{t−1} + Δt z_t."""

    def step(z: Tensor, x: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        velocity = (z + dt * (-A * x + force)) / (1 + dt * G)
        return velocity, x + dt * velocity

    return step


def projected(A: Tensor, G: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """A and G of D-LinOSS, where oscillators are stable and oscillate, for any real numbers: (N,) each."""
    G = torch.relu(G)
    low = (2 + dt * G - 2 * torch.sqrt(1 + dt * G)) / dt**2
    high = (2 + dt * G + 2 * torch.sqrt(1 + dt * G)) / dt**2
    return low + torch.relu(A - low) - torch.relu(A - high), G


def matrices(step: Step, like: Tensor) -> tuple[Tensor, Tensor]:
    """M and F of (z, x)_t = M (z, x)_{t−1} + F f_t, what a step does to unit vectors: (N, 2, 2), (N, 2)."""
    one, zero = torch.ones_like(like), torch.zeros_like(like)
    columns = [torch.stack(step(*unit), -1) for unit in ((one, zero, zero), (zero, one, zero), (zero, zero, one))]
    return torch.stack(columns[:2], -1), columns[2]
