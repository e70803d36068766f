"""Chunks: how much of an operation is computed at a time.

On a CPU few enough numbers to stay in its cache between the operations that use them; each operation has measured how
many. On other devices large calls are fast, and only their memory has to be bounded.
"""

from torch import Tensor

ELSEWHERE = 1 << 26  # numbers at a time on devices other than CPUs


def budget(like: Tensor, on_cpu: int, elsewhere: int = ELSEWHERE) -> int:
    """How many numbers to compute with at a time on the device of `like`."""
    return on_cpu if like.device.type == "cpu" else elsewhere


def chunks(count: int, size: int, numbers: int) -> list[slice]:
    """Slices of `count` items of `size` numbers each that hold about `numbers` of them, and one item at least."""
    step = max(1, numbers // max(1, size))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
