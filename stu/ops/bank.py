r"""Banks of fixed filters: which columns a layer has, and their spectra, compressed band by band.

L length, K filters, R ≤ K basis functions of a band, n FFT length, F = n/2 + 1 frequencies

The filters never change, so what their spectra φ̂_k = rfft(φ_k) have in common can be factored out beforehand. Away
from frequency zero the spectrum of a slowly varying filter is smooth (away from the other end, where its signs
alternate). The filters end abruptly, at n/2 where they are long enough, which adds a second smooth part times (−1)^f:
even and odd frequencies are each smooth. So on a band of one parity all K filters are combinations of few functions,
φ̂_k(f) = Σ_r a_r(f) W_rk to the rounding error of the dtype, by a truncated SVD. Of 24 filters of 1024 steps R = 14
remain on average in float32, of the 48 of two branches 20.
"""

import itertools
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stu.errors import OptionError, require
from stu.ops.filters import Hankel
from stu.ops.realization import STREAMING, Streaming, continued_filters
from stu.ops.transfer import sent
from stu.ops.transforms import outside

NARROWEST = 64  # frequencies in the first bands on either end; the others double towards the middle
FEW_LAGS = 16
CACHED_LENGTHS, CACHED_BYTES = 64, 1 << 28  # of spectra that a bank keeps; those of the last FFT length in any case

Made = TypeVar("Made", bound="list[Band] | Spectra")
Extension = Literal["recomputed", "continued", "truncated"]
EXTENSIONS: tuple[Extension, ...] = get_args(Extension)


def require_lag(name: str, lag: int, seq_len: int) -> None:
    """Raise `OptionError` for a lag that no input reaches; small ones are allowed for all lengths."""
    most = max(seq_len, FEW_LAGS)
    require(0 <= lag <= most, name, lag, f"must be in 0 … {most}: no input has more steps")


def require_filters(hankel: Hankel, *, two_sided: bool, streaming: Streaming, extension: Extension) -> None:
    """Raise `OptionError` for what filters of a kind cannot be: two-sided, or exponentials that decay."""
    require(not (two_sided and hankel == "L"), "two_sided", two_sided, "must be false with hankel=L (one branch)")
    require(streaming in STREAMING, "streaming", streaming, f"must be one of {', '.join(STREAMING)}")
    waves = "must be window or auto with hankel=slepian: its filters are waves, which do not decay"
    require(not (streaming == "states" and hankel == "slepian"), "streaming", streaming, waves)
    _require_extension(extension, hankel)


def _require_extension(extension: Extension, hankel: Hankel) -> None:
    require(extension in EXTENSIONS, "extension", extension, f"must be one of {', '.join(EXTENSIONS)}")
    waves = "must be recomputed or truncated with hankel=slepian: its filters are waves, which do not decay"
    require(not (extension == "continued" and hankel == "slepian"), "extension", extension, waves)


class Band(NamedTuple):
    """The filters on some frequencies: φ̂_k(f) = Σ_r basis_r(f) mix_rk.

    basis: (2, F, R), real and imaginary parts; weighted: the same times each frequency's share of a sum over all n of
    them, 2/n, but 1/n for one that is its own mirror; mix: (R, K).
    """

    frequencies: slice
    basis: Tensor
    weighted: Tensor
    mix: Tensor


class Spectra(NamedTuple):
    """The filters themselves at all frequencies, (2, F, K), and times their shares; see `Band`."""

    basis: Tensor
    weighted: Tensor


class SpectralFilters(NamedTuple):
    """Which spectral filters the columns of a bank are; see `spectral_bank`.

    built_for: the L of the Hankel matrix, where the filters go on past it (`stu.ops.realization.continued_filters`);
    0 where that is seq_len. bandwidth: of hankel=slepian. truncated: past built_for they are zero instead.
    """

    seq_len: int
    num_filters: int
    hankel: Hankel
    two_sided: bool
    delay: int
    k_u: int
    recurrence: int
    built_for: int = 0
    bandwidth: float | None = None
    truncated: bool = False


class FilterBank:
    """Fixed filters (L, K) in float64, and their compressed spectra for every FFT length in use.

    spectral: what the filters are, where they are those of `spectral_bank`.

    A custom operator takes only tensors, numbers and strings, so a bank has a `name` by which `FilterBank.of` finds it
    while it lives (a string, because `torch.compile` may turn a number into a variable). That of a `spectral_bank` says
    what it is, so that a saved program finds it in another process; other names hold in this process alone.
    """

    _numbers: ClassVar = itertools.count()
    _making: ClassVar = threading.RLock()
    _living: ClassVar["weakref.WeakValueDictionary[str, FilterBank]"] = weakref.WeakValueDictionary()

    def __init__(self, filters: Tensor, spectral: SpectralFilters | None = None, name: str | None = None) -> None:
        self.filters, self.spectral = filters.detach().to("cpu", torch.float64), spectral
        self.name = name or f"{next(self._numbers)} of process {os.getpid()}"
        self._lock = threading.Lock()  # replicas of a model, one per thread, share its banks
        self._spectra: OrderedDict[tuple[Any, ...], list[Band] | Spectra] = OrderedDict()
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.memories: dict[Any, Any] = {}  # of `stu.ops.streaming`, by how they stream
        self._living.setdefault(self.name, self)

    @property
    def structure(self) -> dict[str, Any]:
        """What the filters are, but for how far they are continued."""
        if self.spectral is None:
            return {}
        found = self.spectral._asdict()
        built_for, _ = found.pop("built_for"), found.pop("truncated")
        return {**found, "seq_len": built_for or self.spectral.seq_len}

    @classmethod
    def of(cls, name: str) -> "FilterBank":
        """The bank of that name; raises `KeyError` for a name of another process, or of a bank that is gone."""
        return cls._living.get(name) or _rebuilt(name)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.named:  # all copies are one
            return FilterBank.of, (self.name,)
        return FilterBank, (self.filters, self.spectral)

    @property
    def named(self) -> bool:
        """Whether the name holds in other processes, too."""
        return self.name.startswith("[")

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The filters (L, K) themselves, on a device and in float32 at least."""
        dtype = torch.promote_types(dtype, torch.float32)
        _place(self.name, device, dtype)
        return self._placed[device, dtype]

    def bands(self, n: int, dtype: torch.dtype, device: torch.device) -> list[Band]:
        """The spectra under FFTs of length n; every filter's relative error is at most the rounding of `dtype`.

        Filters are cut to (n + 1) // 2 steps, so that with inputs of at most as many nothing wraps around.
        """

        def compressed(filters: Tensor) -> list[Band]:
            bands = _compressed(filters, n, torch.finfo(dtype).eps)
            return [Band(band[0], *(sent(part.to(dtype), device) for part in band[1:])) for band in bands]

        return self._kept(("bands", n, dtype, device), n, compressed)

    def spectra(self, n: int, dtype: torch.dtype, device: torch.device) -> Spectra:
        """The same, neither compressed nor divided."""

        def whole(filters: Tensor) -> Spectra:
            return Spectra(*(sent(part.to(dtype), device) for part in _whole(filters, n)))

        return self._kept(("spectra", n, dtype, device), n, whole)

    @property
    def _full(self) -> bool:
        tensors = (part for found in self._spectra.values() for part in tree_leaves(found) if isinstance(part, Tensor))
        return len(self._spectra) > CACHED_LENGTHS or sum(tensor.nbytes for tensor in tensors) > CACHED_BYTES

    def _kept(self, key: tuple[Any, ...], n: int, make: Callable[[Tensor], Made]) -> Made:
        with self._lock:
            if key not in self._spectra:
                with torch.inference_mode(False):
                    self._spectra[key] = make(self.filters[: (n + 1) // 2])
                while len(self._spectra) > 1 and self._full:
                    self._spectra.popitem(last=False)
            self._spectra.move_to_end(key)
            found: Any = self._spectra[key]
            return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _place(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Make what `FilterBank.on` returns, once; `torch.compile` does so while it traces."""
    bank = FilterBank.of(name)
    if (device, dtype) not in bank._placed:
        with outside():
            bank._placed[device, dtype] = sent(bank.filters.to(dtype), device)


def _whole(filters: Tensor, n: int) -> Spectra:
    basis = torch.view_as_real(torch.fft.rfft(filters, n=n, dim=0)).movedim(-1, 0).contiguous()  # (2, F, K)
    return Spectra(basis, basis * _shares(n).unsqueeze(-1))


def _shares(n: int) -> Tensor:
    """Each frequency's share of a sum over all n of them, (F,)."""
    shares = torch.full((n // 2 + 1,), 2 / n, dtype=torch.float64)
    shares[0] = 1 / n
    if n % 2 == 0:
        shares[-1] = 1 / n
    return shares


def _compressed(filters: Tensor, n: int, tolerance: float) -> list[Band]:
    """Truncated SVDs of the spectra, each filter scaled to norm 1, on bands that double in width from either end."""
    norm = filters.norm(dim=0)
    scaled = filters / norm.where(norm > 0, 1.0)
    spectra = torch.view_as_real(torch.fft.rfft(scaled, n=n, dim=0))  # (F, K, 2)
    bands = []
    for frequencies in _bands(len(spectra)):
        planes = spectra[frequencies].permute(2, 0, 1)  # (2, F, K)
        q, triangle = torch.linalg.qr(planes.flatten(0, 1))
        left, singular, right = torch.linalg.svd(triangle, full_matrices=False)
        energy = (singular[:, None] * right).square() / n  # of each filter in each term, by Parseval's theorem
        lost = energy.flip(0).cumsum(0).flip(0).sqrt().amax(1)  # largest error of a filter without terms r, r + 1, …
        rank = max(1, int((lost > tolerance).sum()))
        basis = (q @ left[:, :rank]).view(2, -1, rank)
        weighted = basis * _shares(n)[frequencies, None]
        bands.append(Band(frequencies, basis, weighted, singular[:rank, None] * right[:rank] * norm))
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


def spectral_bank(
    seq_len: int,
    num_filters: int,
    hankel: Hankel,
    *,
    two_sided: bool,
    delay: int,
    k_u: int = 0,
    recurrence: int = 0,
    built_for: int = 0,
    bandwidth: float | None = None,
    truncated: bool = False,
) -> FilterBank:
    """The `filter_bank` of the `num_filters` spectral filters of a Hankel matrix, seq_len × seq_len: (L, K) columns.

    built_for: the size of the matrix if it is smaller; the filters then go on as `continued_filters`, or are zero where
    `truncated`. Layers with the same options share a bank. Raises `OptionError` for more filters than float64 can tell
    apart.
    """
    found = SpectralFilters(
        seq_len, num_filters, hankel, two_sided, delay, k_u, recurrence, built_for, bandwidth, truncated
    )
    name = json.dumps(found, default=int)
    with FilterBank._making:  # threads, too, share one: all but one of several would be found under no name
        if (bank := FilterBank._living.get(name)) is None:
            with outside():
                length = built_for or seq_len
                stop = length if truncated else seq_len
                scaled = continued_filters(stop, num_filters, hankel, length, bandwidth)
                scaled = torch.cat((scaled, scaled.new_zeros(seq_len - stop, scaled.shape[1])))
                columns = filter_bank(scaled, two_sided=two_sided, delay=delay, k_u=k_u, recurrence=recurrence)
                bank = FilterBank(columns, found, name)
    return bank


def extended_bank(bank: FilterBank, seq_len: int, extension: Extension = "continued") -> FilterBank:
    """The `spectral_bank` of the same filters up to seq_len; raises `OptionError` for other banks.

    extension: "continued" as `continued_filters`, "truncated": zero past their length, or "recomputed": those of the
    longer Hankel matrix instead.
    """
    filters = bank.spectral
    if filters is None:
        raise OptionError("seq_len", seq_len, "needs spectral filters; others end where they end")
    _require_extension(extension, filters.hankel)
    require(seq_len >= filters.seq_len, "seq_len", seq_len, f"must be at least {filters.seq_len}, that of the layer")
    if seq_len > filters.seq_len:
        built_for = 0 if extension == "recomputed" else filters.built_for or filters.seq_len
        filters = filters._replace(seq_len=seq_len, built_for=built_for, truncated=extension == "truncated")
    return spectral_bank(**filters._asdict())


class Filtering(Protocol):
    """A layer of fixed filters, for inputs of up to seq_len steps."""

    seq_len: int
    bank: FilterBank


@contextmanager
def lengthened(layers: Sequence[Filtering], seq_len: int, bank: FilterBank) -> Iterator[None]:
    """Inside, the layers have this bank, for inputs of up to seq_len steps."""
    before = [(layer.seq_len, layer.bank) for layer in layers]
    try:
        for layer in layers:
            layer.seq_len, layer.bank = seq_len, bank
        yield
    finally:
        for layer, (length, kept) in zip(layers, before, strict=True):
            layer.seq_len, layer.bank = length, kept


@lru_cache(maxsize=32)
def _rebuilt(name: str) -> FilterBank:
    """The `spectral_bank` that the name says."""
    if not name.startswith("["):
        raise KeyError(f"filters {name}: only spectral filters can be found by a saved program")
    return spectral_bank(**SpectralFilters(*json.loads(name))._asdict())


def filter_bank(
    scaled: Tensor, *, two_sided: bool = False, delay: int = 2, k_u: int = 0, recurrence: int = 0
) -> Tensor:
    """Every fixed impulse response of an STU, (L, K), so that the layer is one convolution.

    scaled: (L, K₁) filters σ_k^{1/4} φ_k. Columns: the positive branch, the branch of alternating signs where
    `two_sided`, both delayed by `delay` steps, then the input lags 0 … k_u − 1 as unit impulses. `recurrence` = p > 0
    folds in a fixed y_{t−p}: a running sum of stride p over each response.
    """
    length = len(scaled)
    branches = [scaled]
    if two_sided:
        branches.append(scaled * (1 - 2 * (torch.arange(length) % 2)).unsqueeze(1))
    spectral = torch.cat(branches, 1)
    delayed = torch.cat((spectral.new_zeros(min(delay, length), spectral.shape[1]), spectral))[:length]
    bank = torch.cat((delayed, torch.eye(length, k_u, dtype=scaled.dtype)), 1)
    for phase in range(min(recurrence, length)):
        bank[phase::recurrence] = bank[phase::recurrence].cumsum(0)
    return bank
