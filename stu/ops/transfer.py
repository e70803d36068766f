"""Tensors of the host that are needed on another device."""

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; the host goes on before it is there, where that is safe."""
    if device.type == "cuda":
        x = x.pin_memory()  # from other memory, the copy would make the host wait
    return x.to(device, non_blocking=device.type != "mps")  # there, a copy may be overtaken
