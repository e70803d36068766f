"""Blocks that keep nothing but their input for the backward pass, and compute the rest again there.

B batch, L length, D model width
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stu.ops.transforms import transformed

Forward = Callable[[Tensor, Tensor | None], Tensor]


def recomputed(run: Forward, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """`run(x, mask)`, (B, L, D) → (B, L, D), a forward pass of `block`, which the backward pass repeats.

    The repetition draws the same random numbers, and what it writes into buffers of the block, such as running
    statistics, is undone: they count a batch once.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Unwritten(block.buffers())

    y: Tensor = checkpoint(run, x, mask, use_reentrant=False, context_fn=contexts)
    return y


def recomputable(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether there is a backward pass, and it can repeat something: not within function transforms or a program."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed(x, *parameters)


class _Unwritten(AbstractContextManager[None]):
    """What is written into these tensors is undone at the end."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def __enter__(self) -> None:
        self.before = [(tensor, tensor._version, tensor.clone()) for tensor in self.tensors]

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for tensor, version, before in self.before:
            if tensor._version != version:
                tensor.copy_(before)
