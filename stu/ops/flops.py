"""FLOPs of the custom operators, for `torch.utils.flop_counter.FlopCounterMode`, which cannot look inside.

As that mode does for PyTorch's own operations, matrix products count two FLOPs per multiplication and addition, and
work on single elements counts nothing. Complex products count as the four real ones that they are; that mode takes them
for one. FFTs, which it leaves out, count 2.5 n log₂ n each, as is usual for real ones.
"""

import math
from collections.abc import Callable
from typing import TypeVar

from torch._library.custom_ops import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

F = TypeVar("F", bound=Callable[..., int])


def flops_of(operator: CustomOpDef) -> Callable[[F], F]:
    """Register a function of the operator's arguments, and more that it may ignore, that returns its FLOPs."""

    def register(formula: F) -> F:
        register_flop_formula(operator._opoverload.overloadpacket, get_raw=True)(formula)
        return formula

    return register


def fft_flops(n: int, count: int) -> int:
    """Of `count` real FFTs of length n, in either direction."""
    return round(2.5 * n * math.log2(n)) * count if n > 1 else 0
