r"""Causal convolution with a bank of fixed filters, mixed by learned matrices: one MIMO transfer function.

B batch, L length, K filters, R ≤ K basis functions of a band, I input width, O output width, n FFT length,
F frequencies (of a band, or fewer)

    y_t = Σ_k Σ_{i≤t} φ_k(i) · u_{t−i} M_k

Convolving every channel with every filter costs K FFTs per channel and B·L·K·I numbers of memory. But the layer is
linear and time-invariant: with φ̂_k = rfft(φ_k) its transfer function is H(f) = Σ_k φ̂_k(f) M_k, and
Y(f) = U(f) H(f) needs one FFT per channel on either side, independent of K. A `FilterBank` has the filters of a band of
frequencies as φ̂_k(f) = Σ_r a_r(f) W_rk with R < K, hence H(f) = Σ_r a_r(f) M̃_r with M̃_r = Σ_k W_rk M_k. Without
bands, H of all frequencies takes more arithmetic, in few and large calls (`stu.ops.dense_transfer`).
"""

import functools
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stu.errors import require
from stu.ops.bank import Band, FilterBank, Spectra
from stu.ops.dense_transfer import DenseTransfer
from stu.ops.flops import fft_flops, flops_of
from stu.ops.forms import budget, chunks, on_cpu
from stu.ops.long_convolution import fft_length
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.transforms import exporting, owned, plain_gradients, transformed

# What is computed first: with "transfer" the matrices H(f), which the whole batch shares, with "features" the filtered
# inputs a_r(f) U(f), which one large matrix product then mixes; both band by band, as much at a time as fits in a
# cache. "dense" has H(f) of all frequencies, or of as many as there is memory for.
Algorithm = Literal["auto", "transfer", "features", "dense"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

# Numbers at a time on a CPU: of H or the features, and of the signal under the FFT.
PRODUCT_CHUNK, SIGNAL_CHUNK = 1 << 19, 1 << 19
TINY, NARROW = 24**2, 48**2  # sizes of matrices for which "dense" is fastest on a CPU, always or with a large batch


def filter_convolution(
    u: Tensor,
    filters: FilterBank | Tensor,
    weight: Tensor,
    reverse: Tensor | None = None,
    *,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """y_t = Σ_k Σ_{i≤t} φ_k(i) u_{t−i} M_k, and with `reverse` also Σ_k Σ_i φ_k(i) u_{t+i} R_k, from the end.

    u: (B, L, I); filters: (L' ≥ L, K), fixed (no gradient), preferably a `FilterBank`, which keeps their spectra;
    weight, reverse: (K, I, O). Returns (B, L, O) in u's dtype. The FFTs run in float32 at least, whatever the dtype of
    u or an enclosing autocast. To `torch.compile` this is one opaque operator; the bank must be made outside of it.
    """
    require(algorithm in ALGORITHMS, "algorithm", algorithm, f"must be one of {', '.join(ALGORITHMS)}")
    dtype = torch.promote_types(u.dtype, at_least_float32(weight))
    chosen = choose_algorithm(u, weight, two_way=reverse is not None) if algorithm == "auto" else algorithm
    mirrored = None if reverse is None else reverse.to(dtype)
    bank = filters if isinstance(filters, FilterBank) else FilterBank(filters)
    y = _convolved(u.to(dtype), weight.to(dtype), mirrored, bank, chosen)
    return y.to(u.dtype)


def choose_algorithm(u: Tensor, weight: Tensor, *, two_way: bool) -> Algorithm:
    """The fastest, for u (B, L, I) and weight (K, I, O).

    On devices other than CPUs "dense". On a CPU, in units of F·I·O flops, "transfer" takes 4R + 8B, "features" 4RB, or
    8RB with both directions, and "dense" 4K + 8B. Where matrices are narrow, copies and calls take longer than that,
    and "dense" has fewest; the wider they are, the larger the batch has to be that shares H. Else "features" wins for
    one sequence, by its larger matrix products. Measured by `python -m experiments.speed`.
    """
    size, batch = weight[0].numel(), u.shape[0]  # len(u) would fix the batch size of a compiled program
    if not on_cpu(u) or size <= TINY or (size <= NARROW and weight.shape[0] <= 8 * batch):
        return "dense"
    return "features" if batch == 1 and not two_way else "transfer"


def filter_convolution_reference(u: Tensor, filters: Tensor, weight: Tensor) -> Tensor:
    """The same sum, written out: every feature Σ_i φ_k(i) u_{t−i} by a Toeplitz matrix, then M_k.

    u: (B, L, I); filters: (L' ≥ L, K); weight: (K, I, O). O(K·L²) time and memory.
    """
    length = u.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)  # (t, s)
    toeplitz = filters[lag.clamp_min(0)] * (lag >= 0).unsqueeze(-1)  # (L, L, K)
    features = torch.einsum("tsk,bsi->btki", toeplitz.to(u.dtype), u)  # (B, L, K, I)
    return torch.einsum("btki,kio->bto", features, weight)


# --- the operator ---


def _convolved(u: Tensor, weight: Tensor, reverse: Tensor | None, bank: FilterBank, algorithm: str) -> Tensor:
    if transformed(u, weight, reverse) or (exporting() and not bank.named):  # so filters are in the program itself
        return _plain(bank, u, weight, reverse)
    y: Tensor = _convolution(u, weight, reverse, bank.name, algorithm)
    return y


def _plain(bank: FilterBank, u: Tensor, weight: Tensor, reverse: Tensor | None) -> Tensor:
    """The same by H(f) of all frequencies at once."""
    with no_autocast(u):
        n = fft_length(2 * u.shape[1] - 1)
        filters = bank.on(u.device, weight.dtype)[: u.shape[1]]
        spectra = torch.fft.rfft(filters.to(weight.dtype), n=n, dim=0)  # (F, K)
        response = torch.einsum("fk,kio->fio", spectra, weight.to(spectra.dtype))
        if reverse is not None:
            response = response + torch.einsum("fk,kio->fio", spectra.conj(), reverse.to(spectra.dtype))
        product = torch.einsum("bfi,fio->bfo", torch.fft.rfft(u, n=n, dim=1), response)
        return torch.fft.irfft(product, n=n, dim=1)[:, : u.shape[1]]


@torch.library.custom_op("stu::filter_convolution", mutates_args=())
def _convolution(u: Tensor, weight: Tensor, reverse: Tensor | None, bank: str, algorithm: str) -> Tensor:
    """Y(f) = U(f) H(f); in bands by real matrix products, which CPUs do best."""
    with no_autocast(u):
        n = fft_length(2 * u.shape[1] - 1)
        spectra = _spectra(bank, n, weight, algorithm)
        if isinstance(spectra, Spectra):
            return DenseTransfer(spectra, n, weight, reverse).convolve(u)
        products = []
        for band, signal in zip(spectra, _spectrum(u, n, spectra), strict=True):
            products.append(signal.new_empty(*signal.shape[:3], weight.shape[2]))
            _PRODUCTS[algorithm](band, weight, reverse).multiply(products[-1], signal)
        return _samples(products, spectra, n, u.shape[1])


@_convolution.register_fake
def _(u: Tensor, weight: Tensor, reverse: Tensor | None, bank: str, algorithm: str) -> Tensor:
    return u.new_empty(*u.shape[:2], weight.shape[2])


@torch.library.custom_op("stu::filter_convolution_backward", mutates_args=())
def _convolution_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    reverse: Tensor | None,
    bank: str,
    algorithm: str,
    wants_u: bool,
    wants_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, irfft(G Hᴴ), and of weight and reverse, Σ_f Re φ̂_k(f)* U(f)ᴴ G(f); empty where not wanted.

    No gradient passes through a complex FFT: the adjoint of convolution is correlation. U and H are recomputed rather
    than kept: an FFT costs less than the memory of every layer's spectra.
    """
    with no_autocast(u):
        n = fft_length(2 * u.shape[1] - 1)
        spectra = _spectra(bank, n, weight, algorithm)
        if isinstance(spectra, Spectra):
            whole = DenseTransfer(spectra, n, weight, reverse)
            by_u, by_matrices = whole.gradients(u, grad, wants_u, wants_matrices)
        else:
            products = [_PRODUCTS[algorithm](band, weight, reverse) for band in spectra]
            by_u, by_matrices = _gradients(products, spectra, n, u, grad, wants_u, wants_matrices)
        missing = [None] * (2 - len(by_matrices))
        wanted = by_u, *(owned(found.view_as(weight)) for found in by_matrices), *missing
        by_input, by_weight, by_reverse = (u.new_empty(0) if found is None else found for found in wanted)
        return by_input, by_weight, by_reverse


@_convolution_backward.register_fake
def _(grad: Tensor, u: Tensor, weight: Tensor, reverse: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    *_, wants_u, wants_matrices = options
    wanted = (u, wants_u), (weight, wants_matrices), (weight, wants_matrices and reverse is not None)
    return tuple(like.new_empty(like.shape) if wants else u.new_empty(0) for like, wants in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = sum(isinstance(x, Tensor) or x is None for x in inputs)
    ctx.save_for_backward(*inputs[:tensors])
    ctx.options = name, *_ = inputs[tensors:]
    ctx.bank = FilterBank.of(name)  # it lives as long as the graph


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if transformed(grad):
        return *plain_gradients(functools.partial(_plain, ctx.bank), inputs, grad), None, None
    needed = ctx.needs_input_grad[:3]
    found = _convolution_backward(grad, *inputs, *ctx.options, needed[0], needed[1] or needed[2])
    return *(gradient if needs else None for gradient, needs in zip(found, needed, strict=True)), None, None


def _backward_of_backward(ctx: Any, for_u: Tensor, for_weight: Tensor, for_reverse: Tensor) -> tuple[Any, ...]:
    """Of ⟨grad, for_u ∗ (weight, reverse) + u ∗ (for_weight, for_reverse)⟩: each factor enters linearly."""
    grad, u, weight, reverse = ctx.saved_tensors
    *options, wants_u, wants_matrices = ctx.options
    other = None if reverse is None else for_reverse
    by_grad, by_u, by_weight, by_reverse = torch.zeros_like(grad), None, None, None
    if wants_u:
        by_grad = by_grad + _convolution(for_u, weight, reverse, *options)
        _, by_weight, by_reverse = _convolution_backward(grad, for_u, weight, reverse, *options, False, True)
    if wants_matrices:
        by_grad = by_grad + _convolution(u, for_weight, other, *options)
        by_u, *_ = _convolution_backward(grad, u, for_weight, other, *options, True, False)
    return by_grad, by_u, by_weight, None if reverse is None else by_reverse, None, None, None, None


_convolution.register_autograd(_backward, setup_context=_save)
_convolution_backward.register_autograd(_backward_of_backward, setup_context=_save)


@flops_of(_convolution)
def _flops(u: Tensor, weight: Tensor, reverse: Tensor | None, bank: str, algorithm: str, **_: Any) -> int:
    n = fft_length(2 * u.shape[1] - 1)
    if algorithm == "dense":
        products = _dense_flops(n, weight) + _dense_flops(n, weight[:1], 2 * len(u))
    else:
        bands = FilterBank.of(bank).bands(n, weight.dtype, torch.device("cpu"))
        products = sum(_product_flops(band, len(u), weight, reverse, algorithm) for band in bands)
    return fft_flops(n, len(u) * (weight.shape[1] + weight.shape[2])) + products


@flops_of(_convolution_backward)
def _backward_flops(grad: Tensor, *inputs: Any, **_: Any) -> int:
    u, weight, reverse, bank, algorithm, wants_u, wants_matrices = inputs
    n = fft_length(2 * u.shape[1] - 1)
    total: int = fft_flops(n, len(u) * (weight.shape[2] + weight.shape[1] * (wants_u + wants_matrices)))
    if algorithm == "dense":
        spectra, products = _dense_flops(n, weight), _dense_flops(n, weight[:1], 2 * len(u))
        return total + (wants_u + wants_matrices) * (spectra + products)
    for band in FilterBank.of(bank).bands(n, weight.dtype, torch.device("cpu")):
        mixing = 2 * band.mix.numel() * weight[0].numel() * (1 if reverse is None else 2)
        product = _product_flops(band, len(u), weight, reverse, algorithm) - mixing
        # the gradients of the matrices, too, cost a product, and mixing them back
        total += mixing + (wants_u + wants_matrices) * product + wants_matrices * mixing
    return total


def _product_flops(band: Band, batch: int, weight: Tensor, reverse: Tensor | None, algorithm: str) -> int:
    """Of mixing the matrices into those of a band, and of the product with a signal."""
    _, frequencies, rank = band.basis.shape
    width, size = weight.shape[1], weight[0].numel()
    directions = 1 if reverse is None else 2
    mixing = 2 * band.mix.numel() * size * directions
    if algorithm == "features":
        return mixing + 4 * frequencies * batch * rank * directions * (size + 2 * width)
    return mixing + 4 * frequencies * (rank + 2 * batch) * size


def _dense_flops(n: int, weight: Tensor, times: int = 1) -> int:
    """Of two real products of (F, K) with (K, I·O), `times` over."""
    return 4 * (n // 2 + 1) * weight.numel() * times


# --- between samples and bands ---


def _spectra(bank: str, n: int, like: Tensor, algorithm: str) -> list[Band] | Spectra:
    """The filters' spectra as the algorithm needs them."""
    filters = FilterBank.of(bank)
    return (filters.spectra if algorithm == "dense" else filters.bands)(n, like.dtype, like.device)


def _spectrum(x: Tensor, n: int, bands: list[Band]) -> list[Tensor]:
    """The rfft over time, (B, L, I) → (F, B, 2, I) for each band, real and imaginary parts apart."""
    planes = [x.new_empty(band.basis.shape[1], len(x), 2, x.shape[2]) for band in bands]
    _, batch, _, width = planes[0].shape
    for rows in chunks(batch, n * width, budget(planes[0], SIGNAL_CHUNK)):
        whole = torch.view_as_real(torch.fft.rfft(x[rows], n=n, dim=1)).permute(1, 0, 3, 2)  # (F, B, 2, I)
        for band, plane in zip(bands, planes, strict=True):
            plane[:, rows] = whole[band.frequencies]
    return planes


def _gradients(
    products: "list[_Transfer | _Features]",
    bands: list[Band],
    n: int,
    u: Tensor,
    grad: Tensor,
    wants_u: bool,
    wants_matrices: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """As `DenseTransfer.gradients`, band by band."""
    gradients = _spectrum(grad, n, bands)
    signals = _spectrum(u, n, bands) if wants_matrices else gradients
    by_u: list[Tensor] = []
    by_matrices: list[Tensor] = []
    for product, band, signal, gradient in zip(products, bands, signals, gradients, strict=True):
        if wants_u:
            by_u.append(gradient.new_empty(*gradient.shape[:3], u.shape[2]))
            product.multiply_adjoint(by_u[-1], gradient)
        if wants_matrices:
            parts = product.correlate(signal, gradient)
            sums: list[Any] = by_matrices or [None] * len(parts)
            by_matrices = [_added(total, band.mix.mT, part) for total, part in zip(sums, parts, strict=True)]
    return _samples(by_u, bands, n, u.shape[1]) if wants_u else None, by_matrices


def _samples(planes: list[Tensor], bands: list[Band], n: int, length: int) -> Tensor:
    """The inverse of `_spectrum`, cut to the first `length` samples: (B, L, O)."""
    _, batch, _, width = planes[0].shape
    y = planes[0].new_empty(batch, length, width)
    for rows in chunks(batch, n * width, budget(y, SIGNAL_CHUNK)):
        whole = y.new_empty(len(y[rows]), width, n // 2 + 1, 2)
        for band, plane in zip(bands, planes, strict=True):
            whole[:, :, band.frequencies] = plane[:, rows].permute(1, 3, 0, 2)
        y[rows] = torch.fft.irfft(torch.view_as_complex(whole), n=n, dim=2)[..., :length].mT
    return y


# --- the products on one band ---


class _Transfer:
    """Multiplication by H on a band, and its derivatives: H(f) for some frequencies at a time.

    Signals and gradients are (F, B, 2, width). `_Features` has the same methods.

    A filter that runs from the end has the conjugate spectrum, so both directions cost what one does:
    H = Σ_r a_r M̃_r + a_r* R̃_r = Σ_r Re a_r (M̃_r + R̃_r) + i Im a_r (M̃_r − R̃_r).
    """

    def __init__(self, band: Band, weight: Tensor, reverse: Tensor | None) -> None:
        self.basis, self.weighted, self.shape, self.two_way = band.basis, band.weighted, weight.shape[1:], False
        self.even = self.odd = band.mix @ weight.flatten(1)  # (R, I·O)
        if reverse is not None:
            mirrored = band.mix @ reverse.flatten(1)
            self.even, self.odd, self.two_way = self.even + mirrored, self.odd - mirrored, True

    def multiply(self, out: Tensor, signal: Tensor) -> None:
        """out(f) = signal(f) H(f)."""
        for f in self._frequencies(signal):
            real, imaginary = self._at(f)
            _complex_product(out[f], signal[f], real, imaginary)

    def multiply_adjoint(self, out: Tensor, gradient: Tensor) -> None:
        """out(f) = gradient(f) H(f)ᴴ."""
        for f in self._frequencies(gradient):
            real, imaginary = self._at(f)
            _complex_product(out[f], gradient[f], real.mT, imaginary.mT, conjugate=True)

    def correlate(self, signal: Tensor, gradient: Tensor) -> list[Tensor]:
        """The gradients of M̃, and of R̃ if there is one, (R, I·O) each: Σ_f Re a_r(f)* signal(f)ᴴ gradient(f)."""
        even: Any = None
        odd: Any = None
        real, imaginary = self.weighted
        for f in self._frequencies(signal):
            left, right = signal[f].flatten(1, 2).mT, gradient[f]
            even = _added(even, real[f].mT, torch.bmm(left, right.flatten(1, 2)).flatten(1))
            turned = torch.stack((right[:, :, 1], -right[:, :, 0]), 2)  # −i times the gradient
            product = torch.bmm(left, turned.flatten(1, 2)).flatten(1)
            odd = _added(odd if self.two_way else even, imaginary[f].mT, product)
        return [even + odd, even - odd] if self.two_way else [even]

    def _frequencies(self, signal: Tensor) -> list[slice]:
        return chunks(len(signal), self.shape.numel(), budget(signal, PRODUCT_CHUNK))

    def _at(self, f: slice) -> tuple[Tensor, Tensor]:
        """Re H and Im H, each (F, I, O)."""
        real, imaginary = self.basis[0, f] @ self.even, self.basis[1, f] @ self.odd
        return real.view(-1, *self.shape), imaginary.view(-1, *self.shape)


class _Features:
    """The same by a_r(f) U(f) for some frequencies at a time; the other direction adds the features a_r(f)* U(f)."""

    def __init__(self, band: Band, weight: Tensor, reverse: Tensor | None) -> None:
        matrices = [band.mix @ matrix.flatten(1) for matrix in (weight, reverse) if matrix is not None]
        self.directions = len(matrices)
        self.matrix = torch.cat(matrices).view(-1, weight.shape[2])  # (R·I, O), or (2R·I, O)
        # (F, 2R, 2): multiplication by a_r as a real matrix
        self.turn, self.weighted = (_as_real(basis, reverse is not None) for basis in (band.basis, band.weighted))

    def multiply(self, out: Tensor, signal: Tensor) -> None:
        for f in self._frequencies(signal):
            out[f] = (self._features(self.turn[f], signal[f]) @ self.matrix).view_as(out[f])

    def multiply_adjoint(self, out: Tensor, gradient: Tensor) -> None:
        for f in self._frequencies(gradient):
            frequencies, batch = gradient[f].shape[:2]
            features = (gradient[f].flatten(0, 2) @ self.matrix.mT).view(frequencies, batch, self.turn.shape[1], -1)
            out[f] = self.turn[f].mT.unsqueeze(1) @ features

    def correlate(self, signal: Tensor, gradient: Tensor) -> list[Tensor]:
        total = torch.zeros_like(self.matrix)
        for f in self._frequencies(signal):
            total.addmm_(self._features(self.weighted[f], signal[f]).mT, gradient[f].flatten(0, 2))
        return list(total.view(self.directions, -1, signal.shape[-1] * gradient.shape[-1]))

    def _frequencies(self, signal: Tensor) -> list[slice]:
        return chunks(len(signal), 2 * signal.shape[1] * len(self.matrix), budget(signal, PRODUCT_CHUNK))

    def _features(self, turn: Tensor, signal: Tensor) -> Tensor:
        """(F, 2R, 2) and (F, B, 2, I) → rows (F·B·2, R·I)."""
        return (turn.unsqueeze(1) @ signal).view(2 * signal.shape[0] * signal.shape[1], -1)


def _complex_product(out: Tensor, x: Tensor, real: Tensor, imaginary: Tensor, *, conjugate: bool = False) -> None:
    """Write x (real ± i·imaginary) to out, for planes x (F, B, 2, I), out (F, B, 2, O) and matrices (F, I, O)."""
    by_real = torch.bmm(x.flatten(1, 2), real).view_as(out)
    by_imaginary = torch.bmm(x.flatten(1, 2), imaginary).view_as(out)
    sign = -1 if conjugate else 1
    torch.sub(by_real[:, :, 0], by_imaginary[:, :, 1], alpha=sign, out=out[:, :, 0])
    torch.add(by_real[:, :, 1], by_imaginary[:, :, 0], alpha=sign, out=out[:, :, 1])


def _as_real(basis: Tensor, two_way: bool) -> Tensor:
    """Multiplication by a_r, and by a_r* where `two_way`, as real matrices: (2, F, R) → (F, 2R, 2) or (F, 4R, 2)."""
    real, imaginary = basis
    if two_way:
        real, imaginary = torch.cat((real, real), 1), torch.cat((imaginary, -imaginary), 1)
    to_real, to_imaginary = torch.stack((real, -imaginary), -1), torch.stack((imaginary, real), -1)
    return torch.cat((to_real, to_imaginary), 1)


def _added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Total + a b, in place unless it is the first."""
    return a @ b if total is None else total.addmm_(a, b)


_PRODUCTS: dict[str, type[_Transfer] | type[_Features]] = {
    "transfer": _Transfer,
    "features": _Features,
}
