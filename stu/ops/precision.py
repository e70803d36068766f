"""Precision: float32 at least, or float64, whatever the dtype of the inputs or an enclosing autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: that of the tensors together, but float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor.dtype == dtype else torch.promote_types(dtype, tensor.dtype)
    return dtype


def has_autocast(device: str) -> bool:
    """Whether devices of this type have autocast: all but meta. Before 2.13 PyTorch's compiler cannot ask PyTorch."""
    return device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a product with `weight`: its own, or that of an enclosing autocast, which leaves float64 alone."""
    device = weight.device.type
    if weight.dtype != torch.float64 and has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which an enclosing autocast changes no dtype on the device of x."""
    if has_autocast(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()  # of the meta device


def double_dtype(like: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has no more."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def to_float64(x: Tensor) -> Tensor:
    """In `double_dtype`."""
    return x.to(double_dtype(x))


def all_to_float64(*tensors: Tensor) -> list[Tensor]:
    """`to_float64` of each, by one conversion of all."""
    together = to_float64(torch.cat([x.flatten() for x in tensors]))
    return [part.view_as(x) for part, x in zip(together.split([x.numel() for x in tensors]), tensors, strict=True)]


def to_complex128(x: Tensor) -> Tensor:
    """The complex numbers that real pairs (…, 2) stand for, in the precision of `to_float64`: (…, 2) → (…)."""
    return torch.view_as_complex(to_float64(x).contiguous())
