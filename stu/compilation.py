"""`torch.compile` of residual blocks: whole, for all lengths and batch sizes, or refused in one line.

B batch, L length, D model width
"""

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stu.errors import OptionError, require
from stu.ops.transforms import transformed

# Programs of one process before PyTorch refuses another: a block has one for each combination of training or
# evaluation, with or without a mask, autocast, dtype and options, and a sweep trains many models in one process.
PROGRAMS = 256
# The same random numbers as without compilation: dropout then drops the same.
OPTIONS: dict[str, Any] = {"fallback_random": True}


def compiled(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """`block(x, mask)`, (B, L, D) → (B, L, D), compiled without a break; equal blocks share one program.

    A function of the block and no part of it, so that copies and a `state_dict` know nothing of it. Raises what
    `block(x, mask)` raises, and `OptionError` where PyTorch cannot compile it.
    """
    for tensor in (x, mask):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])  # B and L, but not D, which is that of the parameters
    try:
        return _program()(block, x, mask)
    except torch._dynamo.exc.TorchDynamoException as error:
        block(x, mask)  # raises what is wrong with the inputs, if that is it
        first = str(error).strip().partition("\n")[0]
        raise OptionError("compile", True, f"must be false, as PyTorch cannot compile this: {first}") from error


def compilable(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether a program may run here: not where something else takes PyTorch's operations apart.

    That is a function transform, a dispatch mode such as `FlopCounterMode`, an enclosing `torch.compile` or export, and
    the meta device. PyTorch would not only refuse it, but refuse the same program everywhere from then on.
    """
    inside = torch.compiler.is_compiling() or x.is_meta or torch._C._len_torch_dispatch_stack() > 0
    return not inside and not transformed(x, *parameters)


def require_compilable(module: nn.Module) -> None:
    """Raise `OptionError` for a module that PyTorch does not compile, and where there is nothing to compile with."""
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    require(not recurrent, "compile", True, "must be false: PyTorch does not compile its LSTM and GRU")
    if not torch.cuda.is_available():  # there, Triton compiles
        _require_compiler()


def _require_compiler() -> None:
    from torch._inductor import cpp_builder, exc  # takes a second

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        allowed = "needs a C++ compiler, such as g++ (CXX names another); false computes the same without"
        raise OptionError("compile", True, allowed) from error


@cache
def _program() -> Any:
    """What is compiled, made when it is first used: the compiler takes seconds to import."""
    # of complex products, which PyTorch's own kernels compute here as they do elsewhere
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
    return torch.compile(_whole, fullgraph=True, options=OPTIONS)


def _whole(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = block(x, mask)
    return y
