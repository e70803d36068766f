"""Models that are too large for the machine are refused while they are built, before their parameters are written."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from stu.resources import memory

COPIES = 4  # of every parameter: its value, its gradient and the two moments of Adam


@contextmanager
def within_memory() -> Iterator[None]:
    """Raise `MemoryError` as soon as the modules built in this context could not be trained in the memory there is."""
    gpus = (torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    room, needed = memory() + sum(gpus), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal needed
        if parameter is not None:
            needed += COPIES * parameter.numel() * parameter.element_size()
        if needed > room:
            raise MemoryError(f"training needs over {needed / 1e9:,.0f} GB, and there are {room / 1e9:,.0f} GB")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
