r"""Causal convolution with a bank of fixed filters, mixed by learned matrices: one MIMO transfer function.

B batch, L length, K filters, I input width, O output width, n FFT length, F = n/2 + 1 frequencies

    y_t = Σ_k Σ_{i≤t} φ_k(i) · u_{t−i} M_k

Convolving every channel with every filter costs K FFTs a channel and B·L·K·I numbers of memory. But the layer is
linear and time-invariant: with φ̂_k = rfft(φ_k) its transfer function is H(f) = Σ_k φ̂_k(f) M_k, and
Y(f) = U(f) H(f) needs one FFT a channel on either side, independent of K.
"""

from typing import Any

import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.autograd.function import once_differentiable

# How many numbers of H exist at a time: few enough to stay in a processor's cache between their making and use.
CHUNK = 1 << 18


def filter_convolution(u: Tensor, filters: Tensor, weight: Tensor, reverse: Tensor | None = None) -> Tensor:
    """y_t = Σ_k Σ_{i≤t} φ_k(i) u_{t−i} M_k, and with `reverse` also Σ_k Σ_i φ_k(i) u_{t+i} R_k, from the end.

    u: (B, L, I); filters: (L' ≥ L, K), fixed (no gradient); weight, reverse: (K, I, O). Returns (B, L, O) in u's dtype.
    The FFTs run in float32 at least, whatever the dtype of u or an enclosing autocast.
    """
    dtype = torch.promote_types(torch.promote_types(u.dtype, weight.dtype), torch.float32)
    matrices = weight if reverse is None else torch.cat((weight, reverse))
    with torch.autocast(u.device.type, enabled=False):
        y: Tensor = _FilterConvolution.apply(u.to(dtype), filters[: u.shape[1]].to(dtype), matrices.to(dtype))
    return y.to(u.dtype)


def filter_convolution_reference(u: Tensor, filters: Tensor, weight: Tensor) -> Tensor:
    """The same sum, written out: every feature Σ_i φ_k(i) u_{t−i} by a Toeplitz matrix, then M_k.

    Shapes as in `filter_convolution`; O(K·L²) time and memory.
    """
    length = u.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)  # (t, s)
    toeplitz = filters[lag.clamp_min(0)] * (lag >= 0).unsqueeze(-1)  # (L, L, K)
    features = torch.einsum("tsk,bsi->btki", toeplitz.to(u.dtype), u)  # (B, L, K, I)
    return torch.einsum("btki,kio->bto", features, weight)


class _FilterConvolution(torch.autograd.Function):
    """U = rfft(u), Y(f) = U(f) H(f), y = irfft(Y), in real arithmetic and in chunks of frequencies.

    Real matrix products are what every library does best: U's parts are stacked along the batch, so that two products
    with Re H and Im H hold all four of a complex one. H is recomputed in the backward pass instead of stored, and no
    gradient passes through a complex FFT: convolution's adjoint is correlation, G(f) H(f)ᴴ.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, filters: Tensor, weight: Tensor) -> Tensor:
        """Real (B, L, I), (L, K), (K or 2K, I, O) → (B, L, O); the second K matrices are those of reversed filters."""
        length = u.shape[1]
        n = next_fast_len(2 * length - 1, real=True)  # long enough that nothing wraps around
        signal = _spectrum(u, n)  # (F, 2B, I)
        response = torch.view_as_real(torch.fft.rfft(filters, n=n, dim=0))  # (F, K, 2)
        if len(weight) > filters.shape[1]:  # reversed in time is conjugate in frequency; with n ≥ 2L − 1 both sides fit
            response = torch.cat((response, response * response.new_tensor([1.0, -1.0])), 1)  # (F, 2K, 2)
        ctx.save_for_backward(signal, response, weight)
        ctx.n, ctx.length = n, length
        out = signal.new_empty(*signal.shape[:2], weight.shape[2])
        for f in _frequency_chunks(len(response), weight):
            real, imaginary = _transfer(response[f], weight)
            out[f] = _turned(torch.bmm(signal[f], real), torch.bmm(signal[f], imaginary), 1)
        return _samples(out, n, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of u, irfft(G Hᴴ), and weight, Σ_f Re φ̂_k(f)* U(f)ᴴ G(f) over *all* n frequencies, by Parseval."""
        signal, response, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):  # backward may be called inside one, too
            gradient = _spectrum(grad, ctx.n)  # (F, 2B, O)
            grad_signal = torch.empty_like(signal) if ctx.needs_input_grad[0] else None
            grad_weight = weight.new_zeros(len(weight), weight[0].numel()) if ctx.needs_input_grad[2] else None
            share = _parseval(ctx.n, response) if grad_weight is not None else None
            for f in _frequency_chunks(len(response), weight):
                if grad_signal is not None:
                    real, imaginary = _transfer(response[f], weight)
                    by_real, by_imaginary = torch.bmm(gradient[f], real.mT), torch.bmm(gradient[f], imaginary.mT)
                    grad_signal[f] = _turned(by_real, by_imaginary, -1)
                if grad_weight is not None and share is not None:
                    turned = _turned(torch.zeros_like(gradient[f]), gradient[f], -1)  # −i G
                    transfer = torch.stack((torch.bmm(signal[f].mT, gradient[f]), torch.bmm(signal[f].mT, turned)))
                    grad_weight.addmm_(share[f].permute(1, 2, 0).flatten(1), transfer.view(-1, grad_weight.shape[1]))
            return (
                None if grad_signal is None else _samples(grad_signal, ctx.n, ctx.length),
                None,
                None if grad_weight is None else grad_weight.view_as(weight),
            )


def _spectrum(x: Tensor, n: int) -> Tensor:
    """The rfft over time, (B, L, I) → planes (F, 2B, I): all real parts, then all imaginary parts."""
    return torch.view_as_real(torch.fft.rfft(x, n=n, dim=1)).permute(1, 3, 0, 2).flatten(1, 2)


def _samples(planes: Tensor, n: int, length: int) -> Tensor:
    """The inverse of `_spectrum`, cut to the first `length` samples: (F, 2B, O) → (B, L, O)."""
    whole = torch.view_as_complex(planes.unflatten(1, (2, -1)).permute(2, 0, 3, 1).contiguous())  # (B, F, O)
    return torch.fft.irfft(whole, n=n, dim=1)[:, :length]


def _parseval(n: int, response: Tensor) -> Tensor:
    """The response times each frequency's share of a sum over all n: 2/n, but 1/n for one that is its own mirror."""
    count = torch.full((len(response), 1, 1), 2 / n, dtype=response.dtype, device=response.device)
    count[0] = 1 / n
    if n % 2 == 0:
        count[-1] = 1 / n
    return response * count


def _frequency_chunks(frequencies: int, weight: Tensor) -> list[slice]:
    """Slices of the frequency axis with about `CHUNK` entries of H each."""
    size = max(1, CHUNK // (weight.shape[1] * weight.shape[2]))
    return [slice(start, min(start + size, frequencies)) for start in range(0, frequencies, size)]


def _transfer(response: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Re and Im of Σ_k φ̂_k(f) M_k, each (F, I, O), as one matrix product."""
    planes = response.permute(2, 0, 1).flatten(0, 1) @ weight.flatten(1)  # (2F, I·O)
    real, imaginary = planes.view(2, len(response), *weight.shape[1:])
    return real, imaginary


def _turned(real: Tensor, imaginary: Tensor, sign: int) -> Tensor:
    """Add sign·i·imaginary to real, for planes (F, 2B, O): i maps (Re, Im) to (−Im, Re)."""
    half = real.shape[1] // 2
    out = real.clone()
    out[:, :half].sub_(imaginary[:, half:], alpha=sign)
    out[:, half:].add_(imaginary[:, :half], alpha=sign)
    return out
