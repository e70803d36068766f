"""Function transforms and forward-mode derivatives, to which a custom operator is closed.

`torch.func` (grad, vjp, jvp, vmap and what is made of them) and forward-mode differentiation take a function apart into
PyTorch's own operations. Each of our operators therefore has a plain form too, tensor code of the same value, which
serves wherever a transform is at work; it also gives derivatives of derivatives.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()  # of all operators
Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def transformed(*inputs: Any) -> bool:
    """Whether a function transform is at work, or forward-mode differentiation on any of the tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def exporting() -> bool:
    """Whether `torch.export` is making a program that may run in another process; never before PyTorch 2.7."""
    return torch.compiler.is_exporting() if hasattr(torch.compiler, "is_exporting") else False


def plain_gradients(plain: Callable[..., Any], inputs: tuple[Any, ...], grads: Any) -> tuple[Any, ...]:
    """The gradients of a plain form's inputs, differentiable themselves; None for what is no tensor.

    grads: those of its output, a tensor or a tuple of tensors, as the output is.
    """
    places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]

    def of_tensors(*tensors: Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        return plain(*(given.get(i, x) for i, x in enumerate(inputs)))

    pull_back = torch.func.vjp(of_tensors, *(inputs[i] for i in places))[1]
    found = dict(zip(places, pull_back(grads), strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


def compiled_as_one(name: str, shape: Callable[..., tuple[int, ...]]) -> Callable[[Kernel], Kernel]:
    """Make a function of three tensors and a length one operator `stu::name` in the eyes of `torch.compile`.

    A compiled program then holds for all lengths, as it does not see the loops over powers of two inside. `shape` gives
    that of the result, which is real, from the same arguments. Everywhere else the function is what it was.
    """

    def decorate(plain: Kernel) -> Kernel:
        tensors = "Tensor a, Tensor b, Tensor c"
        whole = torch.library.custom_op(
            f"stu::{name}",
            lambda *inputs: owned(plain(*inputs)),
            mutates_args=(),
            schema=f"({tensors}, SymInt length) -> Tensor",
        )

        def gradients(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
            with _disable_current_modes(), torch._C._ForceDispatchKeyGuard(*OUTSIDE):  # autograd is off inside
                return tuple(owned(part) for part in plain_gradients(plain, inputs, grad)[:3])

        backward = torch.library.custom_op(
            f"stu::{name}_backward",
            gradients,
            mutates_args=(),
            schema=f"(Tensor grad, {tensors}, SymInt length) -> (Tensor, Tensor, Tensor)",
        )
        whole.register_fake(lambda *inputs: inputs[0].real.new_empty(shape(*inputs)))
        backward.register_fake(lambda grad, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]))

        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, ctx.length = inputs
            ctx.save_for_backward(*tensors)

        whole.register_autograd(
            lambda ctx, grad: (*backward(grad, *ctx.saved_tensors, ctx.length), None), setup_context=save
        )

        @functools.wraps(plain)
        def chosen(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
            opaque = torch.compiler.is_compiling() and not transformed(a, b, c)
            y: Tensor = (whole if opaque else plain)(a, b, c, length)
            return y

        return chosen

    return decorate


@contextmanager
def outside() -> Iterator[None]:
    """Outside of every transform, trace, mode and default device: tensors made here may be kept."""
    with (
        torch.inference_mode(False),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        torch.device("cpu"),
    ):
        yield


def owned(x: Tensor) -> Tensor:
    """The same contiguous and as no view: an operator may not return one, which could not be changed in place."""
    y: Tensor = torch.ops.aten._unsafe_view(x.contiguous(), x.shape)
    return y
