r"""The roofline: the least work that the Spectral Transform Unit needs, and what a device can do per second.

B batch, L length, D model width, F = L + 1 frequencies, n = 2L, k_y lags of a learned recurrence

As one MIMO transfer function (see stu/ops/convolution.py) Y(f) = U(f) H(f) takes 8·B·F·D² operations in matrix products
and 2·B·D real FFTs of length n, each 2.5·n·log₂ n. The backward pass takes twice the products, and as many FFTs. A
learned recurrence adds 2·k_y·B·L·D², and twice that backward. Making H is not counted: it takes 4·R·F·D² where the
filters' spectra are combinations of R functions, and there is no smallest R. Input, output and parameters, and in the
backward pass their gradients, have to cross the memory bus once.
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


@dataclass(frozen=True)
class Peak:
    """What a device was measured to do per second: operations in one large matrix product, bytes in one large copy."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """A lower bound on the time for this work."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def least_work(mixer: nn.Module, size: Size, *, backward: bool) -> Work | None:
    """The least work of a forward pass, or of forward and backward; None for what is not an exact STU."""
    if not isinstance(mixer, STU | LiteralSTU):
        return None
    length, batch, width = size.length, size.batch, size.width
    lags = sum(parameter.numel() for name, parameter in mixer.named_parameters() if name.endswith("m_y"))  # k_y·D²
    products = 8 * batch * (length + 1) * width**2 + 2 * batch * length * lags
    transforms = 2 * batch * width * 2.5 * 2 * length * math.log2(2 * length)
    parameters = list(mixer.parameters())
    entries = 2 * batch * length * width + sum(parameter.numel() for parameter in parameters)
    return Work(
        flops=products * (3 if backward else 1) + transforms * (2 if backward else 1),
        bytes=parameters[0].element_size() * entries * (2 if backward else 1),
    )


def measured_peak(settings: Settings) -> Peak:
    """The best of a few large matrix products and copies, in the settings' precision."""
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
