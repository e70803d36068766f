r"""The roofline: the least time for the work of the Spectral Transform Unit at the rates that a device can reach.

B batch, L length, D model width, F = L + 1 frequencies, n = 2L, K filters and input lags, k_y lags of a learned
recurrence; Φ the spectra of the filters (F, K), M their matrices (K, D, D)

The work is that of one MIMO transfer function (see stu/ops/convolution.py), in real operations and real numbers:

    forward         operations            numbers read       numbers written
    U = rfft(u)     2.5 n log₂ n · BD     BLD                2BFD*
    H = Φ M         4KFD²*                KD²                2FD²*
    Y = U H         8BFD²                 2FD²* + 2BFD*      2BFD*
    y = irfft(Y)    2.5 n log₂ n · BD     2BFD*              BLD
    recurrence      2k_y BLD²             k_y D²

    backward, from the gradient g of y and U, which was kept
    G = rfft(g)     2.5 n log₂ n · BD     BLD                2BFD*
    H = Φ M         4KFD²*                KD²*               2FD²*
    V = G Hᴴ        8BFD²                 2FD²* + 2BFD*      2BFD*
    irfft(V)        2.5 n log₂ n · BD     2BFD*              BLD
    C = Uᴴ G        8BFD²                 4BFD*              2FD²*
    Re Φᴴ C         4KFD²*                2FD²*              KD²
    recurrence      4k_y BLD²                                k_y D²

What has a * counts on devices alone, whose form has H, C and the spectra whole in memory. On a CPU they stay in its
cache, some frequencies at a time; and where the spectra of the filters are combinations of R < K functions, making H
takes 4RFD² operations, for which there is no smallest R. With both directions M has twice as many numbers, H as many.
The time of a phase is that of its operations or that of its numbers, whichever is longer.
"""

import math
import timeit
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from experiments.speed.bench import Settings, synchronize
from experiments.speed.candidates import Size
from experiments.speed.literal import LiteralSTU
from stu.mixers.stu import STU


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that cross the memory bus."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.flops - other.flops, self.bytes - other.bytes)


@dataclass(frozen=True)
class Peak:
    """What a device was measured to do per second: operations in one large matrix product, bytes in one large copy."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """A lower bound on the time for this work."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def least_work(mixer: nn.Module, size: Size, *, backward: bool, on_cpu: bool = True) -> Work | None:
    """The least work of a forward pass, or of forward and backward; None for what is not an exact STU.

    on_cpu: without what is marked above.
    """
    if not isinstance(mixer, STU | LiteralSTU):
        return None
    length, batch, width = size.length, size.batch, size.width
    frequencies, parameters = length + 1, dict(mixer.named_parameters())
    lags = sum(parameter.numel() for name, parameter in parameters.items() if name.endswith("m_y"))  # k_y·D²
    learned = sum(parameter.numel() for parameter in parameters.values())
    products = 8 * batch * frequencies * width**2 + 2 * batch * length * lags
    transforms = 2 * batch * width * 2.5 * 2 * length * math.log2(2 * length)
    bytes_each = next(iter(parameters.values())).element_size()
    ends = 2 * batch * length * width + learned

    mixing = 0 if on_cpu else 4 * frequencies * (learned - lags) // (1 if mixer.causal else 2)
    signal, response = (0, 0) if on_cpu else (2 * batch * frequencies * width, 2 * frequencies * width**2)
    forward = Work(products + transforms + mixing, bytes_each * (ends + 4 * signal + 2 * response))
    if not backward:
        return forward
    again = 0 if on_cpu else learned - lags
    numbers = ends + again + 6 * signal + 4 * response
    return forward + Work(2 * products + transforms + 2 * mixing, bytes_each * numbers)


def measured_peak(settings: Settings) -> Peak | None:
    """The best of a few large matrix products and copies, in the settings' precision; None without memory for them."""
    try:
        return _measured_peak(settings)
    except torch.OutOfMemoryError:
        return None


def _measured_peak(settings: Settings) -> Peak:
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    width, copied = (1536, 1 << 25) if device.type == "cpu" else (8192, 1 << 28)
    a, b = torch.randn(2, width, width, dtype=dtype, device=device)
    out = torch.empty_like(a)
    product = _best_time(lambda: torch.mm(a, b, out=out), device)
    source = torch.zeros(copied, dtype=dtype, device=device)
    target = torch.ones_like(source)
    copy = _best_time(lambda: target.copy_(source), device)
    return Peak(2 * width**3 / product, 2 * copied * source.element_size() / copy)


def _best_time(call: Callable[[], object], device: torch.device) -> float:
    def run() -> None:
        call()
        synchronize(device)

    return min(timeit.repeat(run, number=1, repeat=4)[1:])  # the first warms up
