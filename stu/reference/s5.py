r"""S5, the simplified state space layer: one multi-input, multi-output diagonal system.

B batch, L length, D model width, P modes, one of each conjugate pair: the others are implied

    x'(t) = Λ x(t) + B u(t),    y(t) = 2 Re C x(t) + D ⊙ u(t)        (with a time step dt per mode)

Source: Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling", 2208.04933, section 3.
"""

from torch import Tensor

from stu.reference.common import diagonal_ssm, zero_order_hold


def s5(u: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, D: Tensor, dt: Tensor) -> Tensor:
    """The whole model, (B, L, D) → (B, L, D). Complex Λ (P,), B (P, D), C (D, P); D (D,), dt (P,)."""
    Lambda_bar, gain = zero_order_hold(Lambda, dt)
    return 2 * diagonal_ssm(u, Lambda_bar, gain.unsqueeze(-1) * B, C) + D * u
