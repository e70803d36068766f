"""Errors of every mixer with products in TF32 or bfloat16: python -m experiments.speed.precision.

B batch, L length, D model width

On a CUDA device these are PyTorch's own settings. On a CPU the same products, also those inside of our operators, are
computed from inputs rounded as tensor cores round them: to 10 bits of mantissa (TF32) or 7 (bfloat16, which "medium"
allows; on GPUs PyTorch may compute that, too, in TF32), to the nearest, ties to even, and accumulated in float64; every
operation in its form for GPUs. Convolutions of cuDNN, which only Mamba-2 has, and of 4 taps, are not emulated.
"""

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.shared.files import command, refuse
from experiments.shared.machine import origin
from experiments.speed.bench import without_zeros
from experiments.speed.candidates import Size, build, find
from stu.cli.usage import options_of
from stu.errors import OptionError
from stu.files import write_atomically
from stu.ops.forms import taken_for
from stu.training.plan import set_matmul_precision

Errors = dict[str, dict[str, float]]  # of the output, the input's gradient and the parameters': maximum and rms

MANTISSA = {"highest": 23, "high": 10, "medium": 7}  # bits of a product's inputs
SETTINGS = (*MANTISSA, "bf16-mixed")
QUANTITIES = ("output", "input gradient", "parameter gradients")
PRODUCTS: dict[str, Callable[..., Any]] = {  # β·c + α·(a b), as PyTorch's kernels have them
    "mm": lambda a, b: (None, a, b, 0, 1),
    "bmm": lambda a, b: (None, a, b, 0, 1),
    "addmm": lambda c, a, b, *, beta=1, alpha=1: (c, a, b, beta, alpha),
    "baddbmm": lambda c, a, b, *, beta=1, alpha=1: (c, a, b, beta, alpha),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, show and save the errors; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    size = Size(options.length, options.batch, options.width, None)
    device = torch.device(options.device)
    rows = {}
    try:
        for candidate in find(options.models, causal=True, size=size):
            rows[candidate.name] = errors(build(candidate.node(size), size.width), size, device)
            print(_row(candidate.name, rows[candidate.name]), flush=True)
    except OptionError as error:
        return refuse(error)
    if options.out is not None:
        command = f"python -m experiments.speed.precision {shlex.join(given)}"
        content = {"command": command, "emulated": device.type == "cpu", **origin(device), "errors": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return 0


def errors(mixer: nn.Module, size: Size, device: torch.device) -> dict[str, Errors]:
    """Setting → relative errors against the same mixer in float64; of the parameters, the largest of all."""
    torch.manual_seed(0)
    mixer = without_zeros(mixer).to(device)
    x, weight = torch.randn(2, size.batch, size.length, size.width, device=device)
    found = {setting: _computed(mixer, x, weight, setting) for setting in SETTINGS}
    exact = _computed(mixer.double(), x.double(), weight.double(), "highest")
    return {setting: _compared(values, exact) for setting, values in found.items()}


def _computed(mixer: nn.Module, x: Tensor, weight: Tensor, setting: str) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    x = x.clone().requires_grad_()
    with _products(setting, x.device):
        autocast = setting == "bf16-mixed"
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
            y = mixer(x)
        learned = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(y, (x, *learned), weight.to(y.dtype))
    return [part.detach().to(torch.float64) for part in (y, *gradients)]


def _compared(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Errors:
    pairs = list(zip(found, exact, strict=True))
    maximum = [((a - e).abs().max() / e.abs().max()).item() for a, e in pairs]
    rms = [((a - e).norm() / e.norm()).item() for a, e in pairs]
    return {
        name: {"max": max(maximum[part]), "rms": max(rms[part])}
        for name, part in zip(QUANTITIES, (slice(0, 1), slice(1, 2), slice(2, None)), strict=True)
    }


@contextmanager
def _products(setting: str, device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on this device as the setting says; all in PyTorch's plain kernels on a CPU."""
    precision = setting if setting in MANTISSA else "highest"
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(taken_for("cuda"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_without_onednn())
            if precision != "highest":
                stack.enter_context(emulated(MANTISSA[precision]))
        else:
            set_matmul_precision(precision, on_gpu=True)
            stack.callback(set_matmul_precision, "highest", on_gpu=True)
        yield


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Without the library in which PyTorch's LSTM has products of its own."""
    backend: Any = torch.backends.mkldnn
    before, backend.enabled = backend.enabled, False
    try:
        yield
    finally:
        backend.enabled = before


@contextmanager
def emulated(bits: int) -> Iterator[None]:
    """Products of float32 and complex64 matrices on the CPU from inputs of so many bits, also inside of operators."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch's own kernels are replaced
            for name, read in PRODUCTS.items():
                whole, out = _kernels(read, bits)
                library.impl(name, whole, "CPU", allow_override=True)
                library.impl(f"{name}.out", out, "CPU", allow_override=True)
                if read.__kwdefaults__:
                    library.impl(f"{name}_", _in_place(out), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def _kernels(read: Callable[..., Any], bits: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A product that returns a tensor, and one that writes into `out`."""

    def whole(*inputs: Tensor, **scales: float) -> Tensor:
        c, a, b, beta, alpha = read(*inputs, **scales)
        # by NumPy: any product of PyTorch would come here again
        y = alpha * np.matmul(*(_rounded(part, bits) for part in (a, b)))
        if c is not None and beta != 0:
            y = y + beta * c.detach().resolve_conj().resolve_neg().numpy()
        return torch.from_numpy(np.ascontiguousarray(y)).to(a.dtype)

    def out(*inputs: Tensor, out: Tensor, **scales: float) -> Tensor:
        y = whole(*inputs, **scales)
        return out.resize_(y.shape).copy_(y) if out.shape != y.shape else out.copy_(y)

    return whole, out


def _in_place(out: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda c, a, b, **scales: out(c, a, b, out=c, **scales)


def _rounded(x: Tensor, bits: int) -> Any:
    """A float32 tensor to so many bits of mantissa, in float64, and both parts of a complex one; others as they are."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.dtype == torch.complex64:
        return _rounded(x.real, bits) + 1j * _rounded(x.imag, bits)
    if x.dtype != torch.float32:
        return x.numpy()
    dropped = 23 - bits
    whole = x.contiguous().numpy().view(np.int32)
    half = (1 << (dropped - 1)) - 1 + ((whole >> dropped) & 1)  # to the nearest, ties to even
    return ((whole + half) & ~((1 << dropped) - 1)).astype(np.int32).view(np.float32).astype(np.float64)


def _row(name: str, found: dict[str, Errors]) -> str:
    """A row of the table: rms errors of output, input gradient and parameter gradients, per setting."""
    cells = [" / ".join(f"{found[setting][quantity]['rms']:.0e}" for quantity in QUANTITIES) for setting in SETTINGS]
    return f"| `{name}` | " + " | ".join(cells) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.precision", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--models", nargs="+", default=options_of("model"), help="(default: all of conf/model)")
    parser.add_argument("--length", type=int, default=1024, metavar="L", help="(default: 1024)")
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="(default: 2)")
    parser.add_argument("--width", type=int, default=64, metavar="D", help="(default: 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file for all errors, maxima too")
    return parser


if __name__ == "__main__":
    command(main)
