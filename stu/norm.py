"""Normalisation over (…, D), with a common signature: `norm(x, mask)`.

B batch, L length, D model width
"""

from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from stu.errors import OptionError
from stu.ops.padding import masked
from stu.ops.precision import at_least_float32, no_autocast
from stu.structure import Structured

Norm = Literal["batch", "layer", "rms", "none"]


def make_norm(name: Norm, d_model: int) -> nn.Module:
    """The norm called `name`, a module (x, mask) → x."""
    match name:
        case "batch":
            return BatchNorm(d_model)
        case "layer":
            return PositionNorm(nn.LayerNorm(d_model))
        case "rms":
            return PositionNorm(nn.RMSNorm(d_model, eps=1e-6))
        case "none":
            return PositionNorm(nn.Identity())
    raise OptionError("norm", name, "must be one of batch, layer, rms, none")


class PositionNorm(nn.Module):
    """A norm of one position at a time, which needs no mask."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, D) → (…, D)."""
        return self.norm(x)


class BatchNorm(Structured):
    """Batch normalisation over all *real* positions of all sequences, on every device together.

    As in Haiku and the official STU code, the moving averages are exponential, of the biased variance, and debiased for
    their start at zero, so they are usable from the first step on; `momentum` is the share of the new batch, as in
    PyTorch (Haiku's decay rate is 1 − momentum).

    Source: Ioffe and Szegedy, 1502.03167.
    """

    structure = ("momentum", "eps")

    def __init__(self, d_model: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("hidden_mean", torch.zeros(d_model))
        self.register_buffer("hidden_var", torch.zeros(d_model))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))
        self.hidden_mean: Tensor
        self.hidden_var: Tensor
        self.num_batches: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, D) → (…, D); statistics over the positions where `mask` (…) is True."""
        with no_autocast(x):
            upcast = x.to(at_least_float32(x, self.weight))
            mean, var = self._batch_statistics(upcast, mask) if self.training else self._averages()
            scale = self.weight * torch.rsqrt(var + self.eps)
            return ((upcast - mean) * scale + self.bias).to(x.dtype)

    @torch.no_grad()
    def recount_(self, num_batches: Tensor) -> None:
        """Count as many batches, and keep the mean and the variance that evaluations use."""
        mean, var = self._averages()
        debias = 1 - (1 - self.momentum) ** num_batches.to(self.hidden_mean.dtype)
        self.hidden_mean.copy_(mean * debias)
        self.hidden_var.copy_(var * debias)
        self.num_batches.copy_(num_batches)

    def _batch_statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        keep = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x.dtype)  # (…, 1)
        over = tuple(range(x.ndim - 1))
        real = _sum_over_devices(keep.sum())
        count, counts = real.clamp_min(1), real > 0  # a batch of padding alone does not
        x = masked(x, mask)
        mean = _sum_over_devices(x.sum(over)) / count
        var = _sum_over_devices(((x - mean).square() * keep).sum(over)) / count
        with torch.no_grad():
            for average, value in ((self.hidden_mean, mean), (self.hidden_var, var)):
                average.copy_(torch.where(counts, average.lerp(value.to(average.dtype), self.momentum), average))
            self.num_batches += counts
        return mean, var

    def _averages(self) -> tuple[Tensor, Tensor]:
        debias = 1 - (1 - self.momentum) ** self.num_batches.to(self.hidden_mean.dtype)
        unused = self.num_batches == 0  # no batch yet: the identity
        mean = self.hidden_mean / torch.where(unused, 1.0, debias)
        return mean, torch.where(unused, torch.ones_like(self.hidden_var), self.hidden_var / debias)


def _sum_over_devices(x: Tensor) -> Tensor:
    """Sum over the processes of a distributed run, differentiable; x itself elsewhere."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return _Sum.apply(x)
    return x


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the same sum; that of `torch.distributed.nn` does not compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.apply(grads[0])
