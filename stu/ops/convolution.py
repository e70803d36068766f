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

# How many numbers of H(f) exist at a time: 2²² complex64 are 32 MiB, small enough to stay near the processor.
CHUNK = 1 << 22


def filter_convolution(u: Tensor, filters: Tensor, weight: Tensor) -> Tensor:
    """y_t = Σ_k Σ_{i≤t} φ_k(i) u_{t−i} M_k.

    u: (B, L, I); filters: (L' ≥ L, K), fixed (no gradient); weight: (K, I, O). Returns (B, L, O) in u's dtype.
    The FFTs run in float32 at least, whatever the dtype of u or an enclosing autocast.
    """
    length = u.shape[1]
    dtype = torch.promote_types(torch.promote_types(u.dtype, weight.dtype), torch.float32)
    n = next_fast_len(2 * length - 1, real=True)  # long enough that nothing wraps around
    with torch.autocast(u.device.type, enabled=False):
        spectrum = torch.fft.rfft(filters[:length].to(dtype), n=n, dim=0)  # (F, K)
        signal = torch.fft.rfft(u.to(dtype), n=n, dim=1)  # (B, F, I)
        mixed = _SpectralMix.apply(signal, spectrum, weight.to(dtype))  # (B, F, O)
        return torch.fft.irfft(mixed, n=n, dim=1)[:, :length].to(u.dtype)


def filter_convolution_reference(u: Tensor, filters: Tensor, weight: Tensor) -> Tensor:
    """The same sum, written out: every feature Σ_i φ_k(i) u_{t−i} by a Toeplitz matrix, then M_k.

    Shapes as in `filter_convolution`; O(K·L²) time and memory.
    """
    length = u.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)  # (t, s)
    toeplitz = filters[lag.clamp_min(0)] * (lag >= 0).unsqueeze(-1)  # (L, L, K)
    features = torch.einsum("tsk,bsi->btki", toeplitz.to(u.dtype), u)  # (B, L, K, I)
    return torch.einsum("btki,kio->bto", features, weight)


class _SpectralMix(torch.autograd.Function):
    """Y(f) = U(f) Σ_k φ̂_k(f) M_k, in chunks of frequencies; H is recomputed in the backward pass, not stored."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, spectrum: Tensor, weight: Tensor) -> Tensor:
        """Signal (B, F, I), spectrum (F, K), weight (K, I, O) → (B, F, O)."""
        ctx.save_for_backward(signal, spectrum, weight)
        out = signal.new_empty(*signal.shape[:2], weight.shape[2])
        for f in _frequency_chunks(spectrum.shape[0], weight):
            out[:, f] = _per_frequency(signal[:, f], _transfer(spectrum[f], weight))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of signal and weight: grad Hᴴ, and Re Σ_f φ̂_k(f)* U(f)ᴴ grad(f)."""
        signal, spectrum, weight = ctx.saved_tensors
        grad_signal = torch.empty_like(signal) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        with torch.autocast(grad.device.type, enabled=False):  # backward may be called inside one, too
            for f in _frequency_chunks(spectrum.shape[0], weight):
                if grad_signal is not None:
                    grad_signal[:, f] = _per_frequency(grad[:, f], _transfer(spectrum[f], weight).mH)
                if grad_weight is not None:
                    grad_transfer = torch.bmm(signal[:, f].permute(1, 2, 0).conj(), grad[:, f].transpose(0, 1))
                    grad_weight += _real_product(spectrum[f], grad_transfer).view_as(weight)
        return grad_signal, None, grad_weight


def _frequency_chunks(frequencies: int, weight: Tensor) -> list[slice]:
    """Slices of the frequency axis with about `CHUNK` entries of H each."""
    size = max(1, CHUNK // (weight.shape[1] * weight.shape[2]))
    return [slice(start, min(start + size, frequencies)) for start in range(0, frequencies, size)]


def _transfer(spectrum: Tensor, weight: Tensor) -> Tensor:
    """H(f) = Σ_k φ̂_k(f) M_k: (F, K), (K, I, O) → (F, I, O), as one real matrix product."""
    frequencies, filters = spectrum.shape
    flat = weight.reshape(filters, -1)  # (K, I·O)
    real, imaginary = spectrum.real @ flat, spectrum.imag @ flat
    return torch.complex(real, imaginary).view(frequencies, *weight.shape[1:])


def _real_product(spectrum: Tensor, grad_transfer: Tensor) -> Tensor:
    """Re Σ_f φ̂_k(f)* G(f): (F, K), (F, I, O) → (K, I·O)."""
    flat = grad_transfer.flatten(1)
    return spectrum.real.mT @ flat.real + spectrum.imag.mT @ flat.imag


def _per_frequency(signal: Tensor, transfer: Tensor) -> Tensor:
    """(B, F, I) by (F, I, O), frequency by frequency → (B, F, O)."""
    return torch.bmm(signal.transpose(0, 1), transfer).transpose(0, 1)
