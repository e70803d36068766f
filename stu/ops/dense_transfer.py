r"""Convolution with a bank of filters by one dense transfer function, in few large calls.

B batch, L length, K filters, I input width, O output width, n FFT length, F = n/2 + 1 frequencies, b, p some of them

    Y(f) = U(f) H(f),    H(f) = Σ_k φ̂_k(f) M_k + φ̂_k(f)* R_k = Σ_k Re φ̂_k (M_k + R_k) + i Im φ̂_k (M_k − R_k)

A filter that runs from the end, with matrices R_k, has the conjugate spectrum. H is two real products, of (F, K) with
(K, I·O), and multiplies all sequences at once, in one complex product per frequency. That moves less data than K
filtered copies of every channel, and the number of calls depends on no size, as long as there is memory for H; else the
frequencies are divided into as few pieces as possible.
"""

import torch
from torch import Tensor

from stu.ops.bank import Spectra
from stu.ops.forms import budget, chunks, on_cpu, room

SIGNAL_CHUNK = 1 << 19  # numbers under the FFT at a time, on a CPU


class DenseTransfer:
    """H of the matrices (K, I, O), and of as many that run from the end where `reverse` is given.

    filters: their spectra under FFTs of length n.
    """

    def __init__(self, filters: Spectra, n: int, weight: Tensor, reverse: Tensor | None) -> None:
        self.filters, self.n, self.shape, self.two_way = filters, n, weight.shape, reverse is not None
        self.even = self.odd = weight.flatten(1)  # (K, I·O)
        if reverse is not None:
            self.even, self.odd = self.even + reverse.flatten(1), self.odd - reverse.flatten(1)
        per_frequency = 4 * weight[0].numel()  # Re H and Im H, apart and together
        self.pieces = chunks(n // 2 + 1, per_frequency, room(weight))

    def convolve(self, u: Tensor) -> Tensor:
        """irfft(U H): (B, L, I) → (B, L, O)."""
        y = u.new_empty(*u.shape[:2], self.shape[2])
        first = self._at(self.pieces[0], self.odd)
        for rows in self._rows(u):
            signal = self._spectrum(u[rows])
            product = signal.new_empty(*signal.shape[:2], self.shape[2])
            for f in self.pieces:
                response = first if f is self.pieces[0] else self._at(f, self.odd)
                torch.bmm(signal[f], response, out=product[f])
            y[rows] = self._samples(product, u.shape[1])
        return y

    def gradients(
        self, u: Tensor, grad: Tensor, wants_u: bool, wants_matrices: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Of the input, irfft(G Hᴴ), and of the matrices, Σ_f Re φ̂_k(f)* U(f)ᴴ G(f), and those from the end."""
        by_u, odd = u.new_empty(u.shape) if wants_u else None, -self.odd
        first = self._at(self.pieces[0], odd) if wants_u else odd  # H*
        correlation, sums = None, None
        for rows in self._rows(u):
            gradient = self._spectrum(grad[rows])
            if by_u is not None:
                product = gradient.new_empty(*gradient.shape[:2], self.shape[1])
                for f in self.pieces:
                    response = first if f is self.pieces[0] else self._at(f, odd)
                    torch.bmm(gradient[f], response.mT, out=product[f])
                by_u[rows] = self._samples(product, u.shape[1])
            if wants_matrices:
                conjugate = self._spectrum(u[rows]).conj_physical_().mT
                for f in self.pieces:
                    if f is not self.pieces[0]:
                        sums = self._with_share(sums, f, torch.bmm(conjugate[f], gradient[f]))
                    elif correlation is None:
                        correlation = torch.bmm(conjugate[f], gradient[f])
                    else:
                        correlation.baddbmm_(conjugate[f], gradient[f])
        if correlation is None:
            return by_u, []
        even, odd = self._with_share(sums, self.pieces[0], correlation)
        return by_u, [even + odd, even - odd] if self.two_way else [even + odd]

    def _at(self, f: slice, odd: Tensor) -> Tensor:
        """H at some frequencies, or H* with −odd: (p, I, O)."""
        real, imaginary = self.filters.basis[0, f] @ self.even, self.filters.basis[1, f] @ odd
        return torch.complex(real, imaginary).view(-1, *self.shape[1:])

    def _with_share(self, sums: tuple[Tensor, Tensor] | None, f: slice, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over f of Re φ̂_k(f) Re C(f) and of Im φ̂_k(f) Im C(f) with those of C (p, I, O): two (K, I·O)."""
        planes = torch.view_as_real(correlation).flatten(1)  # (p, I·O·2)
        by_real, by_imaginary = (weighted[f].mT @ planes for weighted in self.filters.weighted)
        even, odd = by_real[:, 0::2], by_imaginary[:, 1::2]
        return (even, odd) if sums is None else (sums[0] + even, sums[1] + odd)

    def _rows(self, x: Tensor) -> list[slice]:
        """Slices of the batch; on a CPU of so many sequences that their spectra stay in its cache."""
        return chunks(len(x), self.n * max(self.shape[1:]), budget(x, SIGNAL_CHUNK, arrays=6))

    def _spectrum(self, x: Tensor) -> Tensor:
        """The rfft over time, (b, L, I) → (F, b, I); on a CPU by contiguous rows, and contiguous."""
        if on_cpu(x):
            return torch.fft.rfft(x.mT, n=self.n).permute(2, 0, 1).contiguous()
        return torch.fft.rfft(x, n=self.n, dim=1).transpose(0, 1)

    def _samples(self, product: Tensor, length: int) -> Tensor:
        """The inverse, cut to the first steps: (F, b, O) → (b, L, O)."""
        return torch.fft.irfft(product.transpose(0, 1), n=self.n, dim=1)[:, :length]
