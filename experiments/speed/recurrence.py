r"""Algorithms for y_t = w_t + Σ_i y_{t−i} M_i, compared: python -m experiments.speed.recurrence.

B batch, L length, D width, P order of the recurrence, n FFT length, F = n/2 + 1 frequencies

The library's, `stu.ops.recurrence`: in sequence, at several block lengths and at the one it chooses, and by doubling;
the loop over time; and the solution in the frequency domain, Y(z) = W(z) (I − Σ_i M_i z^{−i})^{−1}. This needs an
inverse at every frequency and, because the response to an input never ends, damping: on the circle |z| = 1/ρ the
sequences are w_t ρ^t and y_t ρ^t, and what wraps around is ρ^n times as large.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Column, Table
from scipy.fft import next_fast_len
from torch import Tensor

from experiments.shared.files import command
from experiments.speed.bench import synchronize
from experiments.speed.measure import interleaved
from stu.ops import recurrence
from stu.ops.recurrence import choose_block, linear_recurrence, linear_recurrence_reference

SIZES = ((8, 1024, 128), (32, 1024, 128), (8, 4096, 128), (1, 16384, 64))  # B, L, D
BLOCKS = (4, 8, 16, 32)
WRAPPED = 1e-4  # ρ^n, what wraps around; its inverse magnifies the rounding errors of late steps


def on_circle(drive: Tensor, weight: Tensor) -> Tensor:
    """The recurrence solved at every frequency of a circle: (B, L, D), (P, D, D) → (B, L, D)."""
    length = drive.shape[1]
    n = next_fast_len(2 * length, real=True)
    damping = WRAPPED ** (torch.arange(length, device=drive.device, dtype=drive.dtype) / n)  # ρ^t
    lag = torch.arange(1, len(weight) + 1, device=drive.device)
    angle = 2j * torch.pi * torch.arange(n // 2 + 1, device=drive.device)[:, None] * lag / n
    turned = torch.exp(-angle).to(torch.promote_types(drive.dtype, torch.complex64)) * WRAPPED ** (lag / n)  # (F, P)
    feedback = torch.einsum("fp,pij->fij", turned, weight.to(turned.dtype))
    system = torch.eye(drive.shape[2], device=drive.device) - feedback
    spectrum = torch.fft.rfft(drive * damping.unsqueeze(1), n=n, dim=1).transpose(0, 1)  # (F, B, D)
    solved = torch.linalg.solve(system, spectrum, left=False).transpose(0, 1)
    return torch.fft.irfft(solved, n=n, dim=1)[:, :length] / damping.unsqueeze(1)


def in_blocks(drive: Tensor, weight: Tensor, block: int) -> Tensor:
    """The library's algorithm for CPUs with a given block length."""
    with patch.object(recurrence, "choose_block", lambda *_: block):
        return linear_recurrence(drive, weight, algorithm="sequential")


def main(arguments: Sequence[str] | None = None) -> None:
    """Time forward and backward of each, and print a table per size."""
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.recurrence", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-s", type=float, default=1.0, help="minimum seconds of each call, in total (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for batch, length, width in SIZES:
        Console().print(_compared(batch, length, width, options.device, options.min_s))


def _compared(batch: int, length: int, width: int, device: str, min_seconds: float) -> Table:
    torch.manual_seed(0)
    drive = torch.randn(batch, length, width, device=device, requires_grad=True)
    weight = (0.25 * torch.linalg.qr(torch.randn(2, width, width, device=device)).Q).requires_grad_()
    exact = linear_recurrence_reference(drive.detach().double(), weight.detach().double())
    chosen = choose_block(batch, length, width, "sequential")
    in_sequence = partial(linear_recurrence, algorithm="sequential")
    algorithms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {f"blocks of {chosen} (chosen)": in_sequence}
    algorithms |= {f"blocks of {block}": partial(in_blocks, block=block) for block in BLOCKS if block != chosen}
    algorithms |= {"doubling": partial(linear_recurrence, algorithm="doubling")}
    algorithms |= {"frequency domain": on_circle, "loop over time": linear_recurrence_reference}
    calls = {name: partial(_forward_backward, way, drive, weight) for name, way in algorithms.items()}
    timings, failures = interleaved(calls, min_seconds=min_seconds, repeats=3)
    numbers = (Column(name, justify="right") for name in ("forward + backward", "× loop", "error"))
    table = Table("", *numbers, title=f"B = {batch}, L = {length}, D = {width}, P = 2", title_justify="left")
    for name, algorithm in algorithms.items():
        if name in failures:
            table.add_row(name, str(failures[name]))
            continue
        error = (algorithm(drive, weight) - exact).norm() / exact.norm()
        seconds, by_loop = timings[name].min, timings["loop over time"].min
        table.add_row(name, f"{1e3 * seconds:.0f} ms", f"{by_loop / seconds:.1f}", f"{error.item():.0e}")
    return table


def _forward_backward(algorithm: Callable[[Tensor, Tensor], Tensor], drive: Tensor, weight: Tensor) -> None:
    torch.autograd.grad(algorithm(drive, weight).sum(), (drive, weight))
    synchronize(drive.device)


if __name__ == "__main__":
    command(main)
