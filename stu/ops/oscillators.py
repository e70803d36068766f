r"""Impulse responses of oscillators in discrete time, from their two coefficients, in few calls.

N oscillators, L length, n FFT length

    u_l = τ u_{l−1} − δ u_{l−2} + [l = 0],    u_l = r^l sin((l + 1)θ)/sin θ,    r = √δ,    cos θ = τ/2r

The eigenvalues are r e^{±iθ}. Where they coincide, at θ = 0 and π, the quotient is ±(l + 1). τ is given by
a = 1 − τ + δ, so that nothing cancels for slow oscillators, whose τ is almost 1 + δ:
r² sin² θ = (a − (1 − r)²)((1 + r)² − a)/4. As a power series in the delay z, u = 1/(1 − (1 + δ − a) z + δ z²), and
hence du = ((z − z²) dδ − z da) u²: all gradients are those of one convolution, u ∗ u, whatever the eigenvalues.
"""

from typing import Any

import torch
from torch import Tensor

from stu.ops.flops import fft_flops, flops_of
from stu.ops.kernels import dense_kernel
from stu.ops.long_convolution import fft_length
from stu.ops.transforms import owned, plain_gradients, transformed


def oscillator_response(a: Tensor, delta: Tensor, length: int) -> Tensor:
    """u_l of eigenvalues that are complex or coincide: (N,), (N,) → (N, L).

    0 < δ ≤ 1 and (1 − √δ)² ≤ a ≤ (1 + √δ)², both in float64, where powers of L steps stay exact. Differentiable any
    number of times.
    """
    u: Tensor = _plain(a, delta, length) if transformed(a, delta) else _response(a, delta, length)
    return u


def _plain(a: Tensor, delta: Tensor, length: int) -> Tensor:
    """The same by powers of companion matrices."""
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    companion = torch.stack((1 + delta - a, -delta, one, zero), -1).unflatten(-1, (2, 2))
    first = torch.stack((one, zero), -1)
    return dense_kernel(companion, first, first.unsqueeze(0), length)[0].mT


@torch.library.custom_op("stu::oscillator_response", mutates_args=())
def _response(a: Tensor, delta: Tensor, length: int) -> Tensor:
    steps = torch.arange(length, dtype=a.dtype, device=a.device)
    radius, mean = delta.sqrt(), (1 + delta - a) / 2
    height = ((a - (1 - radius) ** 2) * ((1 + radius) ** 2 - a)).clamp_(min=0).sqrt_().div_(2)  # r sin θ
    angle = torch.atan2(height, mean.abs()).unsqueeze(-1)  # from the real axis, in either direction
    waves = torch.where(angle > 0, (angle * (steps + 1)).sin_() / angle.sin(), steps + 1)
    return owned(torch.copysign(radius, mean).unsqueeze(-1).pow(steps).mul_(waves))


@_response.register_fake
def _(a: Tensor, delta: Tensor, length: int) -> Tensor:
    return a.new_empty(len(a), length)


@torch.library.custom_op("stu::oscillator_response_backward", mutates_args=())
def _response_backward(grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and δ: −⟨g, z u²⟩ and ⟨g, (z − z²) u²⟩."""
    length = u.shape[1]
    n = fft_length(2 * length)
    squared = torch.fft.irfft(torch.fft.rfft(u, n=n).square(), n=n)
    once = (grad[:, 1:] * squared[:, : length - 1]).sum(-1)
    twice = (grad[:, 2:] * squared[:, : max(0, length - 2)]).sum(-1)
    return -once, once - twice


@_response_backward.register_fake
def _(grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(len(u)), u.new_empty(len(u))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.length = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, delta, u = ctx.saved_tensors
    if torch.is_grad_enabled() or transformed(grad):
        return plain_gradients(_plain, (a, delta, ctx.length), grad)
    return *_response_backward(grad, u), None


_response.register_autograd(_backward, setup_context=_save)


@flops_of(_response_backward)
def _backward_flops(grad: Tensor, u: Tensor, **_: Any) -> int:
    return fft_flops(fft_length(2 * u.shape[1]), 2 * len(u))
