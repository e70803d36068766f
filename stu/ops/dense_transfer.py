r"""Convolution with a bank of filters by one dense transfer function, in few large calls.

B batch, L length, K filters, I input width, O output width, n FFT length, F = n/2 + 1 frequencies, p some of them

    Y(f) = U(f) H(f),    H(f) = Σ_k φ̂_k(f) M_k + φ̂_k(f)* R_k = Σ_k Re φ̂_k (M_k + R_k) + i Im φ̂_k (M_k − R_k)

A filter that runs from the end, with matrices R_k, has the conjugate spectrum. H is two real products, of (F, K) with
(K, I·O), and multiplies all sequences at once, in one complex product per frequency. That moves less data than K
filtered copies of every channel, and the number of calls depends on no size, as long as there is memory for H; else the
frequencies are divided into as few pieces as possible. On a CPU, pieces are as large as its cache.
"""

import functools

import torch
from torch import Tensor

from stu.ops.bank import Spectra
from stu.ops.forms import budget, chunks, on_cpu

# Numbers at a time on a CPU: of what there is for some frequencies, and of the signal under the FFT.
PRODUCT_CHUNK, SIGNAL_CHUNK = 1 << 21, 1 << 18


class DenseTransfer:
    """H of the matrices (K, I, O), and of as many that run from the end where `reverse` is given.

    filters: their spectra under FFTs of length n.
    """

    def __init__(self, filters: Spectra, n: int, weight: Tensor, reverse: Tensor | None) -> None:
        self.filters, self.n, self.shape, self.two_way = filters, n, weight.shape, reverse is not None
        self.even = self.odd = weight.flatten(1)  # (K, I·O)
        if reverse is not None:
            self.even, self.odd = self.even + reverse.flatten(1), self.odd - reverse.flatten(1)
        # Re H and Im H, apart and together
        self.pieces = chunks(n // 2 + 1, 4 * weight[0].numel(), budget(weight, PRODUCT_CHUNK, arrays=1))

    def convolve(self, u: Tensor) -> Tensor:
        """irfft(U H): (B, L, I) → (B, L, O)."""
        signal = self._spectrum(u)
        product = signal.new_empty(*signal.shape[:2], self.shape[2])
        for f in self.pieces:
            torch.bmm(signal[f], self._at(f, self.odd), out=product[f])
        return self._samples(product, u.shape[1])

    def gradients(
        self, u: Tensor, grad: Tensor, wants_u: bool, wants_matrices: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Of the input, irfft(G Hᴴ), and of the matrices, Σ_f Re φ̂_k(f)* U(f)ᴴ G(f), and those from the end."""
        gradient, by_u, by_matrices = self._spectrum(grad), None, []
        if wants_u:
            product, odd = gradient.new_empty(*gradient.shape[:2], self.shape[1]), -self.odd
            for f in self.pieces:
                torch.bmm(gradient[f], self._at(f, odd).mT, out=product[f])  # (H*)ᵀ
            by_u = self._samples(product, u.shape[1])
            del product
        if wants_matrices:
            conjugate = self._spectrum(u).conj_physical_().mT
            shares = (self._shares(f, torch.bmm(conjugate[f], gradient[f])) for f in self.pieces)
            even, odd = functools.reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), shares)
            by_matrices = [even + odd, even - odd] if self.two_way else [even + odd]
        return by_u, by_matrices

    def _at(self, f: slice, odd: Tensor) -> Tensor:
        """H at some frequencies, or H* with −odd: (p, I, O)."""
        real, imaginary = self.filters.basis[0, f] @ self.even, self.filters.basis[1, f] @ odd
        return torch.complex(real, imaginary).view(-1, *self.shape[1:])

    def _shares(self, f: slice, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_f Re φ̂_k(f) Re C(f) and Σ_f Im φ̂_k(f) Im C(f) of C (p, I, O): (K, I·O) each."""
        real, imaginary = torch.view_as_real(correlation.flatten(1)).movedim(-1, 0).contiguous()  # (p, I·O) each
        by_real, by_imaginary = self.filters.weighted
        return by_real[f].mT @ real, by_imaginary[f].mT @ imaginary

    def _rows(self, x: Tensor) -> list[slice]:
        """Slices of the batch; on a CPU of so many sequences that the FFTs of all stay in its cache."""
        return chunks(len(x), self.n * x.shape[2], budget(x, SIGNAL_CHUNK, arrays=6))

    def _spectrum(self, x: Tensor) -> Tensor:
        """The rfft over time, (B, L, I) → (F, B, I); on a CPU by contiguous rows, and contiguous."""
        if len(x) and not on_cpu(x):
            return torch.fft.rfft(x, n=self.n, dim=1).transpose(0, 1).contiguous()  # or every product would copy it
        spectrum = x.new_empty(self.n // 2 + 1, len(x), x.shape[2], dtype=torch.promote_types(x.dtype, torch.complex64))
        for rows in self._rows(x):
            spectrum[:, rows] = torch.fft.rfft(x[rows].mT, n=self.n).permute(2, 0, 1)
        return spectrum

    def _samples(self, product: Tensor, length: int) -> Tensor:
        """The inverse, cut to the first steps: (F, B, O) → (B, L, O)."""
        y = product.real.new_empty(product.shape[1], length, product.shape[2])
        for rows in self._rows(y):
            some = product[:, rows].contiguous().transpose(0, 1)  # (b, F, O), from few cache lines at a time
            y[rows] = torch.fft.irfft(some, n=self.n, dim=1)[:, :length]
        return y
