r"""Long convolution: every channel with a learned kernel of its own, as long as the input if need be.

B batch, L length, D channels, P lags into the future, T taps for all lags, n FFT length, F = n/2 + 1 frequencies

    y_t = Σ_{i≥0} k(i) u_{t−i} + Σ_{j≥0} r(j) u_{t+1+j}        (a channel at a time; u is zero outside its L steps)

One tensor of taps holds the lags −P … T−P−1; on a circle of n steps the negative ones come last, and
y = irfft(rfft(u) · rfft(taps)). Σ_t g_t y_t is linear in g, u and taps, so that all derivatives, of any order, are such
convolutions and the correlations that are their adjoints.
"""

from collections.abc import Iterator
from typing import Any

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from stu.ops.flops import fft_flops, flops_of
from stu.ops.forms import budget, chunks, on_cpu
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.transforms import plain_gradients, transformed

CHUNK = 1 << 18  # real numbers transformed at a time on a CPU
CHANNELS = 16  # of a chunk, at least: adjacent in memory, this many fill a cache line


def long_convolution(u: Tensor, kernel: Tensor, reverse: Tensor | None = None) -> Tensor:
    """y_t = Σ_{i≥0} k(i) u_{t−i}, and with `reverse` also Σ_{j≥0} r(j) u_{t+1+j}: the future begins one step ahead.

    u: (B, L, D); kernel, reverse: (any length, D), of which at most L steps matter. Returns (B, L, D) in u's dtype
    and layout. The FFTs run in float32 at least, whatever the dtypes or an enclosing autocast. Differentiable any
    number of times.
    """
    length = u.shape[1]
    taps, future = kernel, 0
    if torch.compiler.is_compiling() or len(kernel) > length:  # a slice of all is two more calls, for its gradient
        taps = kernel[:length]
    if reverse is not None:
        ahead = reverse[: length - 1]
        taps, future = torch.cat((ahead.flip(0), taps)), len(ahead)
    form = _plain if transformed(u, taps) else _convolution
    y: Tensor = form(u, taps, future)
    return y


def long_convolution_reference(u: Tensor, kernel: Tensor, reverse: Tensor | None = None) -> Tensor:
    """The same sums, written out: a Toeplitz matrix for every channel.

    Shapes as in `long_convolution`; O(D·L²) time and memory.
    """
    time = torch.arange(u.shape[1])
    lag = time[:, None] - time  # (t, s)
    toeplitz = _at(kernel, lag)  # (L, L, D)
    if reverse is not None:
        toeplitz = toeplitz + _at(reverse, -1 - lag)
    return torch.einsum("tsd,bsd->btd", toeplitz, u)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fft_length(least: int) -> int:
    """The next fast FFT length, a multiple of 16: odd lengths take three times as long."""
    return 16 * int(next_fast_len(-(-least // 16), real=True))


@torch.library.custom_op("stu::long_convolution", mutates_args=())
def _convolution(u: Tensor, taps: Tensor, future: int) -> Tensor:
    """(B, L, D), (T, D) → (B, L, D), as one node for autograd and torch.compile."""
    y = torch.empty_like(u)
    length = y.shape[1]
    n, dtype = _plan(y, taps, future)
    for channels, batches in _chunks(y, n):
        kernel = [(taps[None, :, channels], future)]
        known: list[Tensor] = []
        for rows in batches:
            signal, *new = _spectra((u[rows, :, channels], 0), *kernel, n=n, dtype=dtype)
            kernel, known = [], known or new  # the response serves all sequences
            y[rows, :, channels] = _samples(signal.mul_(*known), n)[:, :length]
    return y


@torch.library.custom_op("stu::long_convolution_adjoint", mutates_args=())
def _adjoint(grad: Tensor, u: Tensor, taps: Tensor, future: int) -> tuple[Tensor, Tensor]:
    """Gradients of u, G(f) K(f)*, and of taps, Σ_b G(f) U(f)*; the spectra are recomputed instead of stored."""
    grad_u, grad_taps = torch.empty_like(u), torch.empty_like(taps)
    if not len(u):
        return grad_u, grad_taps.zero_()
    length = grad_u.shape[1]
    n, dtype = _plan(grad_u, taps, future)
    for channels, batches in _chunks(grad_u, n):
        kernel = [(taps[None, :, channels], future)]
        known: list[Tensor] = []
        total = None
        for rows in batches:
            signals = (grad[rows, :, channels], 0), (u[rows, :, channels], 0)
            gradient, signal, *new = _spectra(*signals, *kernel, n=n, dtype=dtype)  # (b, d, F)
            # Conjugates are materialised: torch.compile runs this where it would ignore a lazy one.
            kernel, known = [], known or [response.conj_physical_() for response in new]
            products = signal.conj_physical_().mul_(gradient).sum(0)
            total = products if total is None else total.add_(products)
            grad_u[rows, :, channels] = _samples(gradient.mul_(*known), n)[:, :length]
        assert total is not None
        lags = _samples(total, n)
        grad_taps[future:, channels] = lags[: len(taps) - future]
        if future:
            grad_taps[:future, channels] = lags[n - future :]
    return grad_u, grad_taps


def _plain(u: Tensor, taps: Tensor, future: int) -> Tensor:
    """The same by all channels and sequences at once."""
    n, dtype = _plan(u, taps, future)
    with no_autocast(u):
        circle = torch.cat((taps[future:], taps.new_zeros(n - len(taps), taps.shape[1]), taps[:future]))
        response = torch.fft.rfft(circle.to(dtype), dim=0)
        product = torch.fft.rfft(u.to(dtype), n=n, dim=1) * response
        return torch.fft.irfft(product, n=n, dim=1)[:, : u.shape[1]].to(u.dtype)


@_convolution.register_fake
def _(u: Tensor, taps: Tensor, future: int) -> Tensor:
    return torch.empty_like(u)


@_adjoint.register_fake
def _(grad: Tensor, u: Tensor, taps: Tensor, future: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(taps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.future = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, taps = ctx.saved_tensors
    if transformed(grad):
        return plain_gradients(_plain, (u, taps, ctx.future), grad)
    return *_adjoint(grad, u, taps, ctx.future), None


def _backward_of_adjoint(ctx: Any, for_u: Tensor, for_taps: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """⟨for_u, grad_u⟩ + ⟨for_taps, grad_taps⟩ = ⟨grad, for_u ∗ taps + u ∗ for_taps⟩: each factor enters linearly."""
    grad, u, taps = ctx.saved_tensors
    by_grad = _convolution(for_u, taps, ctx.future) + _convolution(u, for_taps, ctx.future)
    return by_grad, *_adjoint(grad, for_u, for_taps, ctx.future), None


_convolution.register_autograd(_backward, setup_context=_save)
_adjoint.register_autograd(_backward_of_adjoint, setup_context=_save)


@flops_of(_convolution)
def _flops(u: Tensor, taps: Tensor, future: int, **_: Any) -> int:
    n, _dtype = _plan(u, taps, future)
    return fft_flops(n, (1 + 2 * len(u)) * u.shape[2])


@flops_of(_adjoint)
def _adjoint_flops(grad: Tensor, u: Tensor, taps: Tensor, future: int, **_: Any) -> int:
    n, _dtype = _plan(u, taps, future)
    return fft_flops(n, (2 + 3 * len(u)) * u.shape[2])


def _plan(u: Tensor, taps: Tensor, future: int) -> tuple[int, torch.dtype]:
    """The FFT length at which nothing wraps around, and the real dtype."""
    return fft_length(u.shape[1] + max(len(taps) - future - 1, future)), at_least_float32(u, taps)


def _chunks(u: Tensor, n: int) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the channels, each with slices of the batch: about `CHUNK` numbers together."""
    batch, _, width = u.shape
    numbers = budget(u, CHUNK)
    channels = min(width, max(CHANNELS, numbers // (n * max(1, batch))))
    for start in range(0, width, channels):
        yield slice(start, start + channels), chunks(batch, n * channels, numbers)


def _spectra(*circles: tuple[Tensor, int], n: int, dtype: torch.dtype) -> list[Tensor]:
    """The spectra of signals (b, T, d) that begin so many lags before zero, at the end of a circle: (b, d, F) each.

    A CPU transforms one signal after the other, in its cache; elsewhere it is one call.
    """
    if on_cpu(circles[0][0]) and len(circles) > 1:
        return [spectrum for circle in circles for spectrum in _spectra(circle, n=n, dtype=dtype)]
    (x, future), sizes = circles[0], [len(x) for x, _ in circles]
    if len(circles) == 1 and not future:
        return [torch.fft.rfft(x.mT.to(dtype), n=n)]  # contiguous rows are transformed fastest
    rows = x.new_zeros(sum(sizes), x.shape[2], n, dtype=dtype)
    for row, (x, future) in zip(rows.split(sizes), circles, strict=True):
        row[..., : x.shape[1] - future] = x[:, future:].mT
        if future:
            row[..., n - future :] = x[:, :future].mT
    return list(torch.fft.rfft(rows).split(sizes))


def _samples(spectrum: Tensor, n: int) -> Tensor:
    """Its inverse, (…, d, F) → (…, n, d)."""
    return torch.fft.irfft(spectrum, n=n).mT


def _at(kernel: Tensor, lag: Tensor) -> Tensor:
    """k(lag), zero where the kernel has no such tap: (t, s) → (t, s, D)."""
    if not len(kernel):
        return kernel.new_zeros(*lag.shape, kernel.shape[1])
    return kernel[lag.clamp(0, len(kernel) - 1)] * ((lag >= 0) & (lag < len(kernel))).unsqueeze(-1)
