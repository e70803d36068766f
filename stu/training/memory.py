"""Memory: models that are too large are refused while they are built; how much a run has taken at most.

The former happens before their parameters are written.
"""

import resource
import sys
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


def reset_peak(device: torch.device) -> None:
    """Let `peak` start anew: on CUDA devices. What a process has taken at most, its system never forgets."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes taken at most, for which no device is waited.

    On a CUDA device: by tensors of this process, since `reset_peak`. Elsewhere: of the host's memory by this process,
    since it was started, with Python, the libraries and the data (`ru_maxrss`).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident
