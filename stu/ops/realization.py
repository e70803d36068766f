r"""Spectral filters as sums of few exponentials: a diagonal state space in closed form.

B batch, L length, D width, K filters, N poles

    σ_k^{1/4} φ_k(i) ≈ Σ_n c_nk p_n^i,   hence   Σ_i σ_k^{1/4} φ_k(i) u_{t−i} ≈ Σ_n c_nk s_t,n
    with the states s_t,n = Σ_i p_n^i u_{t−i} = p_n s_{t−1,n} + u_t, at a cost per step that does not depend on L.

The filters are mixtures of α^i = e^{−xi} over all x > 0 (`stu.ops.filters`) that are smooth in log x. A geometric
progression of decay rates x from about 1/L to where a decay lasts for one step, up to four per octave, does what the
continuum does; the coefficients are those of least squares.

The terms are large compared with the late filters they sum to. Their rounding, ε · |c| / σ_k^{1/4}, dominates the error
of the last of 24 filters: 1e-9 from L = 1024 on, but 1e-4 at L = 64. For the same reason the states need float64,
whatever the dtype of u.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy.linalg import lstsq
from torch import Tensor

from stu.errors import require
from stu.ops.filters import Hankel, row_quadrature, spectral_filters
from stu.ops.transforms import outside

DENSE = 3.2  # poles per octave: from here on the ends of the progression limit the error, below it the gaps do
MOST = 4.6  # poles per octave: with more of them only rounding errors remain
SLACK = 3.0  # errors up to this multiple of the smallest attainable one count as equal
Streaming = Literal["auto", "states", "window"]
STREAMING: tuple[Streaming, ...] = get_args(Streaming)

# Where `streaming="auto"` keeps states: from the seq_len at which a step takes half as long as with a window, if no
# filter has a larger relative error.
STATES_FROM = 512
STATES_ERROR = 1e-6

TOLERANCE = 1e-11  # of the exponentials that stand for the filters in a layer
CHUNK = 1 << 12  # rows of powers of the poles in memory at a time


class Realization(NamedTuple):
    """K filters as N exponentials: poles (N,) between −1 and 1, coefficients (N, K), error (K,), all float64.

    error: the 2-norm of each filter's error over all L entries, relative to the filter's norm.
    """

    poles: Tensor
    coefficients: Tensor
    error: Tensor

    def response(self, length: int) -> Tensor:
        """The first `length` entries of the filters, (length, K).

        They go on past L, where φ_k(i) = Σ_j Z_ij φ_k(j) / σ_k defines them. Measured for 24 filters and a tolerance of
        1e-11: on L … 2L the 2-norm of a filter's error is at most 0.4% of that of the filter there for L = 1024, 1.4%
        for 256, 12% for 64, and a tenth of that for most filters; on 2L … 4L at most 17%, 30% and 60%. (The first
        filters have ended by then, and are below 1e-4 of their maximum, with errors below 2e-6 of it.)

        By that definition the last of many filters grow: on L … 2L the 24th reaches 0.8 times its maximum for L = 4096,
        15 times for 1024, 850 times for 256 and half a million times for 64; the 16th of L = 256 five times.
        """
        return torch.cat([rows for _, rows in self.chunks(length)])

    def chunks(self, length: int) -> Iterator[tuple[slice, Tensor]]:
        """The same in chunks, each with its rows."""
        powers = self.poles ** torch.arange(min(length, CHUNK), dtype=torch.float64)[:, None]  # (chunk, N)
        for start in range(0, length, CHUNK):
            rows = slice(start, min(start + CHUNK, length))
            yield rows, powers[: rows.stop - start] @ (self.poles[:, None] ** start * self.coefficients)


def realize_for_streaming(
    seq_len: int,
    num_filters: int,
    hankel: Hankel,
    streaming: Streaming,
    device: torch.device,
    built_for: int = 0,
) -> Realization | None:
    """The exponentials whose sums a streaming layer keeps; None where it keeps a window of its inputs.

    "states" or "window" force either; "auto" takes the sums where they are faster and as exact. built_for: the length
    of the filters themselves where they go on up to seq_len.
    """
    automatic = streaming == "auto"
    waves = hankel == "slepian"  # `stu.ops.bank.require_filters` refuses states of them
    # MPS has no float64, which the states need
    if streaming == "window" or waves or (automatic and (seq_len < STATES_FROM or device.type == "mps")):
        return None
    found = realize_filters(built_for or seq_len, num_filters, hankel, tolerance=TOLERANCE)
    return None if automatic and found.error.max() > STATES_ERROR else found


def continued_filters(
    seq_len: int, num_filters: int, hankel: Hankel, built_for: int, bandwidth: float | None = None
) -> Tensor:
    """The weighted filters σ_k^{1/4} φ_k of length built_for ≤ seq_len, which go on as their `Realization`: (L, K)."""
    eigenvalues, filters = spectral_filters(built_for, num_filters, hankel, bandwidth)
    weighted = eigenvalues**0.25 * filters
    if built_for == seq_len:
        return weighted
    response = realize_filters(built_for, num_filters, hankel, tolerance=TOLERANCE).response(seq_len)
    return torch.cat((weighted, response[built_for:]))


def realize_filters(
    seq_len: int,
    num_filters: int,
    hankel: Hankel = "standard",
    *,
    tolerance: float = 1e-6,
    num_states: int | None = None,
) -> Realization:
    """The weighted filters σ_k^{1/4} φ_k of `spectral_filters` as sums of exponentials.

    num_states: N; if None, the fewest with which no relative error exceeds `tolerance`, or with which all are about as
    small as rounding allows. The poles depend on L and N alone; Hankel-L has pairs ±p.

    Raises `OptionError` for what `spectral_filters` refuses, and for a `num_states` below 1, or odd for Hankel-L.
    """
    require(
        hankel != "slepian", "hankel", hankel, "has no realisation by exponentials that decay: its filters are waves"
    )
    branches = 2 if hankel == "L" else 1
    if num_states is not None:
        require(num_states >= 1, "num_states", num_states, "must be at least 1")
        require(num_states % branches == 0, "num_states", num_states, "must be even for hankel=L, whose poles are ±p")
    with outside():
        return Realization(*(part.clone() for part in _realize(seq_len, num_filters, hankel, tolerance, num_states)))


def exponential_sums(u: Tensor, poles: Tensor) -> Tensor:
    """The states after a whole sequence, Σ_i p_n^i u_{L−i}: (B, L, D) and (N,) → (B, N, D) in the dtype of the poles.

    Matrix products over chunks of time; nothing of size L·N·D exists.
    """
    chunk = min(u.shape[1], CHUNK)
    powers = poles[:, None] ** torch.arange(chunk - 1, -1, -1, dtype=poles.dtype, device=poles.device)  # (N, chunk)
    sums = u.new_zeros(len(u), len(poles), u.shape[2], dtype=poles.dtype)
    for part in u.split(CHUNK, 1):
        steps = part.shape[1]
        sums = poles[:, None] ** steps * sums + powers[:, chunk - steps :] @ part.to(poles.dtype)
    return sums


def free_response(states: Tensor, poles: Tensor, length: int) -> Tensor:
    """What the states go on to without inputs, Σ_n p_n^j s_n, j = 1 … length: (B, N, D) and (N,) → (B, length, D)."""
    powers = poles ** torch.arange(1, min(length, CHUNK) + 1, device=poles.device)[:, None]  # (chunk, N)
    starts = range(0, length, CHUNK)
    return torch.cat([powers[: length - start] @ (poles[:, None] ** start * states) for start in starts], 1)


def exponential_sums_reference(u: Tensor, poles: Tensor) -> Tensor:
    """The same, one step at a time: s_t = p s_{t−1} + u_t."""
    sums = u.new_zeros(len(u), len(poles), u.shape[2], dtype=poles.dtype)
    for u_t in u.unbind(1):
        sums = poles[:, None] * sums + u_t.unsqueeze(1)
    return sums


@lru_cache(maxsize=32)
def _realize(seq_len: int, num_filters: int, hankel: Hankel, tolerance: float, num_states: int | None) -> Realization:
    eigenvalues, filters = spectral_filters(seq_len, num_filters, hankel)
    target = eigenvalues**0.25 * filters
    # Hankel-L: the entries of either parity are a problem of their own in β = α²; both get the same poles.
    parts = [target.numpy()] if hankel == "standard" else [target[::2].numpy(), target[1::2].numpy()]
    count = _fewest(parts, tolerance) if num_states is None else num_states // len(parts)
    rates = _decay_rates(len(parts[0]), count)
    fits = [_fit(part, rates)[0] for part in parts]
    if hankel == "standard":
        poles, coefficients = np.exp(-rates), fits[0]
    else:
        # β^m is (p^i + (−p)^i) / 2 at i = 2m and (p^i − (−p)^i) / 2p at i = 2m + 1, and 0 at the others
        root = np.exp(-rates / 2)
        even, odd = fits[0] / 2, fits[1] / (2 * root[:, None])
        poles, coefficients = np.concatenate((root, -root)), np.concatenate((even + odd, even - odd))
    found = Realization(torch.from_numpy(poles), torch.from_numpy(coefficients), target.norm(dim=0))
    squared = torch.zeros_like(found.error)
    for rows, response in found.chunks(seq_len):
        squared += (response - target[rows]).square().sum(0)
    return found._replace(error=squared.sqrt() / target.norm(dim=0))


def _fewest(parts: list[np.ndarray], tolerance: float) -> int:
    """The smallest number of decay rates with an error of `tolerance`, or nearly the smallest attainable."""
    rows = len(parts[0])
    counts = range(2, int(MOST * _octaves(rows)) + 2, 2)
    errors = [max(_fit(part, _decay_rates(rows, count))[1] for part in parts) for count in counts]
    enough = max(tolerance, SLACK * min(errors))
    return next(count for count, error in zip(counts, errors, strict=True) if error <= enough)


def _octaves(rows: int) -> float:
    return float(np.log2(5 * rows))


def _decay_rates(rows: int, count: int) -> np.ndarray:
    """A geometric progression from about 1/rows to where a decay lasts for one row, a little denser at its ends.

    The ends were found by minimising the error for 8 to 32 filters and 64 to 2^20 rows: a few terms are better placed
    closer together.
    """
    slowest, fastest = (1.2, 6.0) if count >= DENSE * _octaves(rows) else (2.2, 5.0)
    place = np.linspace(-1, 1, count)
    place = (1 + place + 0.03 * np.sin(np.pi * place)) / 2
    return slowest / rows * (fastest * rows / slowest) ** place


def _fit(part: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares for columns of `part` by e^{−x·row}: coefficients (N, K), the worst relative error."""
    index, weight = row_quadrature(len(part))
    index, root = np.round(index).astype(int), np.sqrt(weight)[:, None]
    scale = np.sqrt(-np.expm1(-2 * rates))  # makes ‖e^{−x·row}‖ about 1
    basis, sample = np.exp(-np.outer(index, rates)) * scale * root, part[index] * root
    solution = lstsq(basis, sample, cond=1e-15)[0]
    norm = np.linalg.norm(sample, axis=0)
    error = np.linalg.norm(basis @ solution - sample, axis=0)
    return scale[:, None] * solution, (error / np.where(norm > 0, norm, 1)).max()
