r"""Slepian filters: the sequences of finite length that are most concentrated in a band of frequencies.

L length, K filters, R rows of one half, W half of the bandwidth in cycles per step

They are the eigenvectors of the prolate matrix ∫_{−W}^{W} e^{2πi f (m−n)} df = sin(2πW(m−n)) / π(m−n), the sum of μμ*
over all μ = (α^0 … α^{L−1}) with α on the arc |arg α| ≤ 2πW of the unit circle; the eigenvalue is the share of a
sequence's energy in the band. About 2WL of them are near 1, and the next ones fall faster than exponentially. So K
filters span, to the root of what is left out, the responses r^i cos(ωi + φ) of all pairs of eigenvalues with |ω| ≤ 2πW
and r near 1. The band is symmetric, so the filters are real.

An `eigh` of this matrix returns noise, for nearly all of its eigenvalues are 0 or 1 to rounding. It commutes with a
tridiagonal one (Slepian 1978), whose eigenvalues lie apart. In centred form, x = n − (L−1)/2 and χ the smallest first,

    e_{n+1} (v_{n+1} − v_n) = e_n (v_n − v_{n−1}) + (2 sin²(πW) x² − χ) v_n,    e_n = n (L−n) / 2,

a conductor with a potential, which is solved from the end, where v is smallest, to the middle; fluxes in place of
differences keep all digits, and Newton's method finds the χ with which the halves meet.

Sources: Slepian, "Prolate spheroidal wave functions, Fourier analysis, and uncertainty V: the discrete case" (1978);
Hazan and Marsden, "Spectral filtering for complex linear dynamical systems", 2601.22400, for their use.
"""

from functools import lru_cache

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import eigh_tridiagonal

from stu.errors import require
from stu.ops.filter_store import Eigenpairs, stored

SMALLEST = 1e-20  # the least eigenvalue that is offered: ten digits below rounding, of its root ten are left
SMALL = 0.1  # of wide bands, eigenvalues below it are computed as energies; others are near 1, with errors of 1e-14
NARROW = 64  # waves of the band in the length, up to which all eigenvalues are
EXTRA = 12  # filters besides those that the band holds, which reach eigenvalues of 1e-8 or less
BLOCK = 32  # rows between changes of the scale: one row grows by 10^6 at most
PASSES = 3  # of Newton's method, from 1e-6 of a gap between eigenvalues


def default_bandwidth(seq_len: int, num_filters: int) -> float:
    """The W that K filters cover: 2WL is K less `EXTRA`, or half of K where that is more."""
    return max(num_filters / 2, num_filters - EXTRA) / (2 * seq_len)


def slepian_filters(seq_len: int, num_filters: int, bandwidth: float | None = None) -> Eigenpairs:
    """The `num_filters` leading eigenpairs of the prolate matrix of size `seq_len`: (K,) and (L, K), float64.

    bandwidth: W; None: `default_bandwidth`. Errors, against exact arithmetic: of filters 1e-13 in their norm, of
    eigenvalues σ 1e-13 of them and, where they are small, 1e-15 / √σ. As few as are offered may be returned.

    Raises `OptionError` for a bandwidth outside of 0 … ½.
    """
    width = default_bandwidth(seq_len, num_filters) if bandwidth is None else bandwidth
    require(0 < width < 0.5, "bandwidth", bandwidth, "must be above 0 and below 0.5, in cycles per step")
    require(seq_len * width > SMALLEST, "bandwidth", bandwidth, f"is too narrow for {seq_len} steps to tell from 0")
    return _eigenpairs(seq_len, min(num_filters, seq_len), width)


def prolate_matrix(seq_len: int, bandwidth: float) -> np.ndarray:
    """The matrix itself, (L, L): the definition, for tests and small lengths."""
    lag = np.subtract.outer(np.arange(seq_len), np.arange(seq_len))
    return 2 * bandwidth * np.sinc(2 * bandwidth * lag)


@lru_cache(maxsize=32)
def _eigenpairs(seq_len: int, num_filters: int, bandwidth: float) -> Eigenpairs:
    name = f"slepian-{bandwidth!r}-{seq_len}-{num_filters}"
    return stored(name, __file__, (seq_len, num_filters), lambda: _computed(seq_len, num_filters, bandwidth))


def _computed(seq_len: int, num_filters: int, bandwidth: float) -> Eigenpairs:
    chi = _first_guess(seq_len, num_filters, bandwidth)
    for _ in range(PASSES):
        half, flux = _half(seq_len, chi, bandwidth)
        chi = chi + _correction(half, flux, seq_len)
    half, _ = _half(seq_len, chi, bandwidth)
    filters = np.concatenate((half, _signs(num_filters) * half[::-1][seq_len % 2 :]))
    filters[seq_len // 2, 1::2] *= 1 - seq_len % 2  # the middle of odd ones is 0
    filters /= np.sqrt(np.square(filters).sum(0))
    filters *= np.sign(filters[np.abs(filters).argmax(0), np.arange(num_filters)])
    eigenvalues = _concentrations(filters, bandwidth)
    kept = eigenvalues > SMALLEST
    return eigenvalues[kept], filters[:, kept]


def _signs(num_filters: int) -> np.ndarray:
    """Filters are even and odd by turns."""
    return (-1.0) ** np.arange(num_filters)


def _potential(seq_len: int, bandwidth: float) -> np.ndarray:
    place = np.arange(seq_len) - (seq_len - 1) / 2
    return np.asarray(2 * np.sin(np.pi * bandwidth) ** 2 * place**2)


def _conductance(seq_len: int) -> np.ndarray:
    """e_0 … e_L, which end with 0."""
    index = np.arange(seq_len + 1.0)
    return index * (seq_len - index) / 2


def _first_guess(seq_len: int, num_filters: int, bandwidth: float) -> np.ndarray:
    """The smallest χ, to the rounding error of the largest."""
    e = _conductance(seq_len)
    diagonal = e[:-1] + e[1:] + _potential(seq_len, bandwidth)
    if seq_len == 1:  # which early releases of SciPy refuse
        return diagonal
    found = eigh_tridiagonal(
        diagonal, -e[1:-1], eigvals_only=True, select="i", select_range=(0, num_filters - 1), lapack_driver="stebz"
    )
    return np.asarray(found)


def _half(seq_len: int, chi: np.ndarray, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """v_0 … up to the middle for every χ, (R, K), and the flux through the middle, (K,), in a common scale."""
    rows = (seq_len + 1) // 2
    e, excess = _conductance(seq_len)[1 : rows + 1], _potential(seq_len, bandwidth)[:rows, None] - chi
    excess[-1] *= 1 - seq_len % 2 / 2  # half of the row in the middle belongs to either side
    v, flux, half = np.ones_like(chi), np.zeros_like(chi), np.empty((rows, len(chi)))
    scales = [np.zeros(len(chi), int)]
    for start in range(0, rows, BLOCK):
        for row in range(start, min(start + BLOCK, rows)):
            half[row] = v
            flux = flux + excess[row] * v
            if row < rows - 1:
                v = v + flux / e[row]
        exponent = np.frexp(np.maximum(np.abs(v), np.abs(flux) / max(e[row], 1.0)))[1]
        v, flux = np.ldexp(v, -exponent), np.ldexp(flux, -exponent)
        scales.append(scales[-1] + exponent)
    for number, start in enumerate(range(0, rows, BLOCK)):
        half[start : start + BLOCK] = np.ldexp(half[start : start + BLOCK], scales[number] - scales[-1])
    return half, flux


def _correction(half: np.ndarray, flux: np.ndarray, seq_len: int) -> np.ndarray:
    """One step of Newton's method for each χ: the mismatch in the middle, times v there, over Σ v² of the half."""
    last, odd = half[-1], _signs(len(flux)) < 0
    energy = np.square(half).sum(0)
    if seq_len % 2:
        return np.asarray(np.where(odd, -flux, flux) * last / (energy - last**2 / 2))
    wanted = np.where(odd, -2 * _conductance(seq_len)[len(half)] * last, 0.0)
    return np.asarray((flux - wanted) * last / energy)


def _concentrations(filters: np.ndarray, bandwidth: float) -> np.ndarray:
    """The eigenvalues: Σ_τ r_τ sin(2πWτ) / πτ with the autocorrelation r; small ones are ∫ |Σ_n v_n e^{2πifn}|² df."""
    length = len(filters)
    spectra = rfft(filters, size := next_fast_len(2 * length, real=True), axis=0)
    correlations = irfft(spectra.real**2 + spectra.imag**2, size, axis=0)[:length]
    kernel = 4 * bandwidth * np.sinc(2 * bandwidth * np.arange(length))
    kernel[0] /= 2
    found = (kernel[:, None] * correlations).sum(0)
    small = found < (np.inf if bandwidth * length <= NARROW else SMALL)
    if small.any():
        found[small] = _energy(filters[:, small], bandwidth)
    return np.asarray(found)


def _energy(filters: np.ndarray, bandwidth: float) -> np.ndarray:
    """2 ∫_0^W |Σ_n v_n e^{2πi f x_n}|² df by the Gauss rule."""
    length = len(filters)
    node, weight = np.polynomial.legendre.leggauss(int(np.pi * length * bandwidth) + 40)
    place = np.arange(length) - (length - 1) / 2
    found = np.zeros(filters.shape[1])
    for frequency, share in zip(bandwidth * (1 + node) / 2, bandwidth * weight, strict=True):
        phase = 2 * np.pi * frequency * place[:, None]
        found += share * ((np.cos(phase) * filters).sum(0) ** 2 + (np.sin(phase) * filters).sum(0) ** 2)
    return found
