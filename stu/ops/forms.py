"""Forms: an operation in the order that suits a device, and the one place that chooses.

A CPU is fast on what stays in its cache between the operations that use it: there an operation runs over few numbers at
a time, and each has measured how many. Every other device is fast on few, large calls, whose memory alone has to be
bounded. Operations whose order differs have a form for either, an `algorithm`; both run everywhere, with equal results.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from stu.errors import require

Algorithm = TypeVar("Algorithm", bound=str)
GIGABYTE = 1 << 30
_device_bytes: int = GIGABYTE  # what an operation may take at a time on devices other than CPUs
_taken_for: str | None = None  # the type of device that all tensors are taken to be on


def on_cpu(like: Tensor) -> bool:
    """Whether the form for CPUs is the one that suits the device of `like`."""
    return (_taken_for or like.device.type) == "cpu"


def choose(algorithm: Algorithm, like: Tensor, for_cpu: Algorithm, for_device: Algorithm) -> Algorithm:
    """The algorithm itself, or, where that is "auto", the one that suits the device of `like`.

    Raises `OptionError` unless it is one of these three.
    """
    names = "auto", for_cpu, for_device
    require(algorithm in names, "algorithm", algorithm, f"must be one of {', '.join(names)}")
    if algorithm != "auto":
        return algorithm
    return for_cpu if on_cpu(like) else for_device


def budget(like: Tensor, numbers: int, arrays: int = 4) -> int:
    """How many numbers to compute with at a time: those given on a CPU, elsewhere as many as there is `room` for."""
    return numbers if on_cpu(like) else room(like, arrays)


def room(like: Tensor, arrays: int = 1) -> int:
    """How many numbers an array may have where `arrays` of its size exist at once, temporary ones included.

    Those of half precision are computed with in float32.
    """
    return max(1, _device_bytes // (arrays * max(4, like.element_size())))


def chunks(count: int, size: int, numbers: int) -> list[slice]:
    """Slices of `count` items of `size` numbers each that hold about `numbers` of them, and one item at least."""
    step = max(1, numbers // max(1, size))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@contextmanager
def taken_for(device: str) -> Iterator[None]:
    """Within it, every operation has the form that suits this type of device, "cpu" or "cuda", wherever it runs."""
    global _taken_for
    before, _taken_for = _taken_for, device
    try:
        yield
    finally:
        _taken_for = before


@contextmanager
def device_memory(size: float) -> Iterator[None]:
    """Within it, an operation may take `size` bytes at a time on devices other than CPUs; a gigabyte otherwise.

    Beyond inputs and outputs and, in the STU, their spectra, and of one operation, forward or backward. Less memory
    means more and smaller calls.
    """
    global _device_bytes
    require(size >= 1, "size", size, "must be at least 1 byte")
    before, _device_bytes = _device_bytes, int(size)
    try:
        yield
    finally:
        _device_bytes = before
