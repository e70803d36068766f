r"""Power series in the delay z, cut at z^L: products, reciprocals, and systems with a feedback of low rank.

L length, D channels, M, H inputs and outputs, R feedbacks

Impulse responses are power series in the delay, and a feedback of low rank is closed on them directly. Where input r is
fed −1 times output r, the responses of outputs i to inputs j become

    K_ij ← K_ij − K_ir (1 + K_rr)^{−1} K_rj

one r after the other. Products are convolutions, and Newton's iteration finds the reciprocal, all in O(L log L).
"""

from typing import Any

import torch
from torch import Tensor

from stu.ops.flops import fft_flops, flops_of
from stu.ops.long_convolution import fft_length, long_convolution
from stu.ops.transforms import transformed


def closed_loop(responses: Tensor, rank: int) -> Tensor:
    """The responses once the last R inputs are fed −1 times the last R outputs: (H + R, M + R, D, L) → (H, M, D, L).

    Well conditioned for a passive feedback, whose R by R responses K have Re K ≥ 0 inside the unit circle: there
    |1 + K_rr| ≥ 1 for the first r, and for each further one after the loops before it are closed.
    """
    for _ in range(rank):
        *outputs, (*feedback, loop) = (row.unbind() for row in responses.unbind())
        fed_back = quotient(torch.stack(feedback), loop)  # (M + R − 1, D, L)
        rows = [torch.stack(inputs) - series_product(fed_back, kernel) for *inputs, kernel in outputs]
        responses = torch.stack(rows)
    return responses


def series_product(x: Tensor, y: Tensor) -> Tensor:
    """The product of power series, cut at z^L: (M, D, L), (D, L) → (M, D, L)."""
    return long_convolution(x.mT, y.mT).mT


def quotient(x: Tensor, series: Tensor) -> Tensor:
    """The power series x/(1 + s), cut at z^L: (M, D, L), (D, L) → (M, D, L).

    Differentiable any number of times.
    """
    if transformed(x, series):
        return series_product(x, reciprocal(series))
    q: Tensor = _quotient(x, series, _reciprocal(series.detach()))
    return q


def reciprocal(series: Tensor) -> Tensor:
    """The power series 1/(1 + s) of every channel, cut at z^L: (D, L) → (D, L).

    Differentiable any number of times.
    """
    v: Tensor = (_newton if transformed(series) else _reciprocal)(series)
    return v


def _newton(series: Tensor) -> Tensor:
    """Newton's iteration, v − v ∗ ((1 + s) ∗ v − 1): each step doubles the number of correct entries.

    Of (1 + s) ∗ v − 1, the entries where v is already correct are rounding errors and left out, which halves the FFTs.
    One more step then corrects the rounding of all entries.
    """
    length = series.shape[1]
    rows = torch.cat((series[:, :1] + 1, series[:, 1:]), 1)
    v, sizes = 1 / rows[:, :1], [length]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    for size in sizes[-2::-1]:
        known, n = v.shape[1], fft_length(2 * v.shape[1])
        spectrum = torch.fft.rfft(v, n=n)
        error = _filtered(rows[:, :size], spectrum, n)[:, known:size]  # what wraps around falls on the entries before
        v = torch.cat((v, -_filtered(error, spectrum, n)[:, : size - known]), 1)
    n = fft_length(2 * length)
    spectrum = torch.fft.rfft(v, n=n)
    product = _filtered(rows, spectrum, n)[:, :length]
    error = torch.cat((product[:, :1] - 1, product[:, 1:]), 1)
    return v - _filtered(error, spectrum, n)[:, :length]


def _filtered(x: Tensor, spectrum: Tensor, n: int) -> Tensor:
    """The circular convolution of rows x (D, …) with those of a spectrum (D, n/2 + 1): (D, n)."""
    return torch.fft.irfft(torch.fft.rfft(x, n=n) * spectrum, n=n)


@torch.library.custom_op("stu::reciprocal", mutates_args=())
def _reciprocal(series: Tensor) -> Tensor:
    return _newton(series)


@_reciprocal.register_fake
def _(series: Tensor) -> Tensor:
    return torch.empty_like(series, memory_format=torch.contiguous_format)


def _save_reciprocal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output)


def _reciprocal_backward(ctx: Any, grad: Tensor) -> Tensor:
    """The adjoint of ds → −v ∗ v ∗ ds, which runs backwards in time."""
    (v,) = ctx.saved_tensors
    squared = series_product(v.unsqueeze(0), v)
    return -series_product(grad.flip(1).unsqueeze(0), squared.squeeze(0)).squeeze(0).flip(1)


_reciprocal.register_autograd(_reciprocal_backward, setup_context=_save_reciprocal)


@torch.library.custom_op("stu::series_quotient", mutates_args=())
def _quotient(x: Tensor, series: Tensor, v: Tensor) -> Tensor:
    """x/(1 + s), given v = 1/(1 + s) without a gradient: (M, D, L), (D, L), (D, L) → (M, D, L).

    The gradient of s comes from the quotient q itself, −g/(1 + s) ∗ q: fewer FFTs than through v, half for one x.
    """
    return series_product(x, v)


@_quotient.register_fake
def _(x: Tensor, series: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(x.mT).mT


def _save_quotient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, series, v = inputs
    ctx.save_for_backward(series, v, output)


def _quotient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Adjoints run backwards in time."""
    series, v, q = ctx.saved_tensors
    if torch.is_grad_enabled():
        v = reciprocal(series)  # with its own history: the gradients are differentiable in s
    turned = series_product(grad.flip(2), v)
    by_series = torch.cat([series_product(g.unsqueeze(0), each) for g, each in zip(turned, q, strict=True)])
    return turned.flip(2), -by_series.sum(0).flip(1), None


_quotient.register_autograd(_quotient_backward, setup_context=_save_quotient)


@flops_of(_reciprocal)
def _reciprocal_flops(series: Tensor, **_: Any) -> int:
    channels, size = series.shape
    total = fft_flops(fft_length(2 * size), 5 * channels)
    while size > 1:
        size = -(-size // 2)
        total += fft_flops(fft_length(2 * size), 5 * channels)
    return total


@flops_of(_quotient)
def _quotient_flops(x: Tensor, series: Tensor, v: Tensor, **_: Any) -> int:
    return fft_flops(fft_length(2 * x.shape[2] - 1), (1 + 2 * len(x)) * x.shape[1])
