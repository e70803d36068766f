r"""Fixed filters, made ready to be convolved with: their spectra, compressed band by band.

L length, K filters, R ≤ K basis functions of a band, n FFT length, F = n/2 + 1 frequencies

The filters never change, so what is common to their spectra φ̂_k = rfft(φ_k) can be taken out beforehand. Away from
frequency zero the spectrum of a slowly varying filter is smooth (away from the other end, where its signs alternate).
The filters end abruptly, at n/2 where they are long enough, which adds a second smooth part times (−1)^f: even and odd
frequencies are each smooth. So on a band of one parity all K filters are combinations of few functions,
φ̂_k(f) = Σ_r a_r(f) W_rk to the rounding error of the dtype, by a truncated SVD. Of 24 filters of 1024 steps R = 14
remain on average in float32, of the 48 of two branches 20.
"""

import itertools
import threading
import weakref
from collections import OrderedDict
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

NARROWEST = 64  # frequencies in the first bands on either end; the others double towards the middle
REMEMBERED = 64  # FFT lengths whose bands a bank keeps


class Band(NamedTuple):
    """The filters on some frequencies: φ̂_k(f) = Σ_r basis_r(f) mix_rk.

    basis: (2, F, R), real and imaginary parts; mix: (R, K).
    """

    frequencies: slice
    basis: Tensor
    mix: Tensor

    def to(self, dtype: torch.dtype, device: torch.device) -> "Band":
        """For the arithmetic of a dtype and a device."""
        return self._replace(basis=self.basis.to(dtype).to(device), mix=self.mix.to(dtype).to(device))


class FilterBank:
    """Fixed filters (L, K), kept in float64, and their compressed spectra for every FFT length that was asked for.

    An operator takes no objects but tensors, numbers and strings, so a bank has a `name` by which `FilterBank.of`
    finds it while it lives (a string, as `torch.compile` may make a variable of a number).
    """

    _numbers: ClassVar = itertools.count()
    _living: ClassVar["weakref.WeakValueDictionary[str, FilterBank]"] = weakref.WeakValueDictionary()

    def __init__(self, filters: Tensor) -> None:
        self.filters = filters.detach().to("cpu", torch.float64)
        self.name = str(next(self._numbers))
        self._turn = threading.Lock()  # replicas of a model share its banks, a thread each
        self._bands: OrderedDict[tuple[int, torch.dtype, torch.device], list[Band]] = OrderedDict()
        self._placed: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._living[self.name] = self

    @classmethod
    def of(cls, name: str) -> "FilterBank":
        """The living bank of that name."""
        return cls._living[name]

    def __reduce__(self) -> tuple[type["FilterBank"], tuple[Tensor]]:
        return FilterBank, (self.filters,)

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The filters (L, K) themselves, on a device and in float32 at least."""
        key = torch.promote_types(dtype, torch.float32), device
        if key not in self._placed:
            with torch.inference_mode(False):  # or training could not use what an evaluation placed
                self._placed[key] = self.filters.to(key[0]).to(device)
        return self._placed[key]

    def bands(self, n: int, dtype: torch.dtype, device: torch.device) -> list[Band]:
        """The spectra under FFTs of length n; every filter's relative error is at most the rounding of `dtype`.

        Filters are cut to (n + 1) // 2 steps, so that with inputs of at most as many nothing wraps around.
        """
        key = n, dtype, device
        with self._turn:
            if key not in self._bands:
                with torch.inference_mode(False):
                    bands = _compressed(self.filters, n, torch.finfo(dtype).eps)
                    self._bands[key] = [band.to(dtype, device) for band in bands]
                if len(self._bands) > REMEMBERED:
                    self._bands.popitem(last=False)
            self._bands.move_to_end(key)
            return self._bands[key]


def _compressed(filters: Tensor, n: int, tolerance: float) -> list[Band]:
    """Truncated SVDs of the spectra, each filter scaled to norm 1, on bands that double from either end."""
    filters = filters[: (n + 1) // 2]
    norm = filters.norm(dim=0)
    scaled = filters / norm.where(norm > 0, 1.0)
    spectra = torch.view_as_real(torch.fft.rfft(scaled, n=n, dim=0))  # (F, K, 2)
    bands = []
    for frequencies in _bands(len(spectra)):
        planes = spectra[frequencies].permute(2, 0, 1)  # (2, F, K)
        q, triangle = torch.linalg.qr(planes.flatten(0, 1))
        left, singular, right = torch.linalg.svd(triangle, full_matrices=False)
        energy = (singular[:, None] * right).square() / n  # of each filter, by Parseval's theorem, in each term
        lost = energy.flip(0).cumsum(0).flip(0).sqrt().amax(1)  # worst error of a filter from the r-th term on
        rank = max(1, int((lost > tolerance).sum()))
        basis = (q @ left[:, :rank]).view(2, -1, rank)
        bands.append(Band(frequencies, basis, singular[:rank, None] * right[:rank] * norm))
    return bands


def _bands(count: int) -> list[slice]:
    """Frequencies 0 … 63, 64 … 127, 128 … 255 and so on, and the same from the other end, each in two parities."""
    edges = {0, count}
    width = NARROWEST
    while width < count // 2:
        edges |= {width, count - width}
        width *= 2
    ranges = itertools.pairwise(sorted(edges))
    return [slice(first, stop, 2) for start, stop in ranges for first in (start, start + 1) if first < stop]
