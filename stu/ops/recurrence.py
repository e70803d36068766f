r"""Linear recurrences with learned matrices: y_t = w_t + Σ_i y_{t−i} M_i.

B batch, L length, D width, P order of the recurrence, T block length, S = ⌈L/T⌉ blocks

Inside a block the response to the drive is a block-Toeplitz product with the recurrence's impulse response; what
remains is the recurrence of the P outputs before each block, s_{j+1} = e_j + s_j A^T. A is the matrix (P·D, P·D) of one
step without drive, and what A, A², …, A^T do is found by doubling. On a CPU the S outputs are carried in sequence, by
small products; elsewhere by doubling, too: products with A^T, A^{2T}, A^{4T}, … add what 1, 2, 4, … blocks before have
left, in log₂ S large ones. The gradient needs nothing new: the adjoint of a recurrence is the same recurrence with
transposed matrices, run from the end.
"""

import itertools
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.flops import flops_of
from stu.ops.forms import choose, room
from stu.ops.precision import at_least_float32, double_dtype, no_autocast
from stu.ops.transforms import owned, transformed

# How the outputs between blocks are carried on.
Algorithm = Literal["auto", "sequential", "doubling"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

SHORTEST, LONGEST = 4, 64  # block lengths
SEAM_FLOPS = 7e5  # those that take as long, on a CPU, as the small product at a seam, most of which is its call


def linear_recurrence(
    drive: Tensor, weight: Tensor, initial: Tensor | None = None, *, algorithm: Algorithm = "auto"
) -> Tensor:
    """y_t = drive_t + Σ_{i=1…P} y_{t−i} M_i, in blocks of time.

    drive: (B, L, D); weight: (P, D, D), M_i as `y @ weight[i-1]`; initial: (B, P, D), the outputs before the first,
    newest first, zeros where None. Returns (B, L, D) in drive's dtype. Computed in float32 at least, whatever the
    dtypes or an enclosing autocast: near |pole| = 1 the rounding of thousands of steps accumulates. To `torch.compile`
    this is one opaque operator.

    algorithm: "sequential" suits CPUs, "doubling" other devices; "auto" is the one for the device of `drive`.
    """
    chosen = choose(algorithm, drive, "sequential", "doubling")
    dtype = torch.promote_types(drive.dtype, at_least_float32(weight))
    batch = drive.shape[0]  # len(drive) would fix the batch size of a compiled program
    start = drive.new_zeros(batch, *weight.shape[:2]) if initial is None else initial.flip(1)  # oldest first
    inputs = drive.to(dtype), weight.to(dtype), start.to(dtype)
    with no_autocast(drive):
        y: Tensor = _plain(*inputs) if transformed(*inputs) else _recurrence(*inputs, chosen)
    return y.to(drive.dtype)


def fixed_recurrence(drive: Tensor, initial: Tensor) -> Tensor:
    """y_t = drive_t + y_{t−p}: (B, L, D), and the p outputs before it, newest first, (B, p, D), in whose dtype it runs.

    A running sum of stride p; without outputs before it, the drive itself.
    """
    stride, length = initial.shape[1], drive.shape[1]
    if not stride:
        return drive
    terms = torch.cat((initial.flip(1), drive.to(initial.dtype)), 1)
    phases = F.pad(terms, (0, 0, 0, -length % stride)).unflatten(1, (-1, stride))
    return phases.cumsum(1).flatten(1, 2)[:, stride : stride + length]


def choose_block(batch: int, length: int, width: int, algorithm: str) -> int:
    """The block length T.

    In sequence, the one that balances a step's Toeplitz product, 2·B·T·D² flops, with its share of a seam, 1/T.
    Alternatives are measured by `python -m experiments.speed.recurrence`. By doubling, every further level costs a few
    calls, and T grows like √L/2.
    """
    if algorithm == "doubling":
        return max(SHORTEST, 1 << max(0, round(math.log2(length) / 2 - 1)))
    return min(max(round((SEAM_FLOPS / (2 * max(1, batch) * width**2)) ** 0.5), SHORTEST), LONGEST)


def linear_recurrence_reference(drive: Tensor, weight: Tensor, initial: Tensor | None = None) -> Tensor:
    """The same, one step at a time; shapes as in `linear_recurrence`."""
    batch, _, width = drive.shape
    past = list((drive.new_zeros(batch, len(weight), width) if initial is None else initial).unbind(1))
    outputs = []
    for w in drive.unbind(1):
        y = w + sum(previous @ matrix for previous, matrix in zip(past, weight, strict=True))
        outputs.append(y)
        past = [y, *past[:-1]]
    return torch.stack(outputs, 1)


# --- the operator ---


@torch.library.custom_op("stu::linear_recurrence", mutates_args=())
def _recurrence(drive: Tensor, weight: Tensor, initial: Tensor, algorithm: str) -> Tensor:
    """`linear_recurrence` with the outputs before the first as (B, P, D), oldest first."""
    with no_autocast(drive):
        return owned(_blockwise(drive, weight, initial, algorithm))


@_recurrence.register_fake
def _(drive: Tensor, weight: Tensor, initial: Tensor, algorithm: str) -> Tensor:
    return drive.new_empty(drive.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, initial, ctx.algorithm = inputs
    ctx.save_for_backward(output, weight, initial)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of drive, a_t = g_t + Σ_i a_{t+i} M_iᵀ, weight, Σ_t y_{t−i}ᵀ a_t, and initial."""
    y, weight, initial = ctx.saved_tensors
    with no_autocast(grad):
        by_drive = linear_recurrence(grad.flip(1), weight.mT, algorithm=ctx.algorithm).flip(1)
        history = torch.cat((initial, y), 1)  # (B, P + L, D)
        by_weight = _correlated(history, by_drive) if ctx.needs_input_grad[1] else None
        by_initial = _entering(by_drive, weight) if ctx.needs_input_grad[2] else None
        return by_drive, by_weight, by_initial, None


def _correlated(history: Tensor, by_drive: Tensor) -> Tensor:
    """Σ_t y_{t−i}ᵀ a_t, i = 1 … P: (B, P + L, D), (B, L, D) → (P, D, D)."""
    order = history.shape[1] - by_drive.shape[1]
    length, width = by_drive.shape[1:]
    before = torch.cat([history[:, i : i + length] for i in range(order)], 2)  # (B, L, P·D), oldest first
    return (before.reshape(-1, order * width).mT @ by_drive.reshape(-1, width)).view(order, width, width).flip(0)


def _entering(by_drive: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the outputs before the first: y_{−i} enters step t through M_{t+1+i}. (B, P, D), oldest first."""
    order, length = len(weight), by_drive.shape[1]
    entering = []
    for i in range(order):
        terms = [by_drive[:, t] @ weight[t + i].mT for t in range(min(order - i, length))]
        entering.append(sum(terms, torch.zeros_like(weight[0, :1])).expand(len(by_drive), -1))
    return torch.stack(entering[::-1], 1)


_recurrence.register_autograd(_backward, setup_context=_save)


@flops_of(_recurrence)
def _flops(drive: Tensor, weight: Tensor, initial: Tensor, algorithm: str, **_: Any) -> int:
    (batch, _length, width), size = drive.shape, weight[..., 0].numel()
    block, steps = _division(drive, weight, algorithm)
    doublings = (block - 1) * width * size**2
    blocks = batch * steps * block * width * (block * width + size)
    if algorithm == "sequential":
        return 2 * (doublings + blocks + (steps - 1) * batch * size**2)
    spans = [1 << level for level in range((steps - 1).bit_length())]
    squares = max(0, len(spans) - 1) * size**3
    return 2 * (doublings + blocks + squares + sum(steps - span for span in spans) * batch * size**2)


# --- blocks ---


def _plain(drive: Tensor, weight: Tensor, initial: Tensor) -> Tensor:
    """The same for function transforms, which know no tensor that is changed in place."""
    return _blockwise(drive, weight, initial, "sequential", in_place=False)


def _blockwise(drive: Tensor, weight: Tensor, initial: Tensor, algorithm: str, in_place: bool = True) -> Tensor:
    batch, length, width = drive.shape
    size = len(weight) * width
    block, steps = _division(drive, weight, algorithm)
    exact = _continuations(weight, block, in_place)
    known = exact.to(drive.dtype)
    free, step = known[:, -block * width :], known[:, -size:]
    if spare := steps * block - length:  # padding by nothing would copy
        drive = F.pad(drive, (0, 0, 0, spare))
    blocks = drive.reshape(batch * steps, block * width)
    own = blocks @ _toeplitz(known[-width:], width, block)  # the response to each block's own drive
    ends, first = own[:, -size:].unflatten(0, (batch, steps)), initial.flatten(1)
    if algorithm == "sequential":
        seams = _in_sequence(ends, step, first)
    else:
        seams = _by_doubling(ends, [step, *_squares(exact[:, -size:], steps).to(step.dtype)], first)
    return torch.addmm(own, seams, free).view(batch, steps * block, width)[:, :length]


def _division(drive: Tensor, weight: Tensor, algorithm: str) -> tuple[int, int]:
    """The block length T and the number of blocks S."""
    batch, length, width = drive.shape
    block = min(choose_block(batch, length, width, algorithm), length)
    if algorithm == "doubling":  # of Toeplitz matrices of (T·D)² numbers, there may be few
        block = min(block, 1 << max(0, (math.isqrt(room(drive, arrays=4)) // width).bit_length() - 1))
    block = max(block, len(weight))
    return block, -(-length // block)


def _in_sequence(ends: Tensor, step: Tensor, seam: Tensor) -> Tensor:
    """The P outputs before each block, (B·S, P·D), oldest first: s_{j+1} = ends_j + s_j A^T, ends (B, S, P·D)."""
    seams = [seam]
    for end in ends.unbind(1)[:-1]:
        seams.append(torch.addmm(end, seams[-1], step))
    return torch.stack(seams, 1).flatten(0, 1)


def _by_doubling(ends: Tensor, powers: list[Tensor], seam: Tensor) -> Tensor:
    """The same by A^T, A^{2T}, A^{4T}, …: every seam adds what the one 1, 2, 4, … blocks before has left of it."""
    batch, steps, _ = ends.shape
    seams = torch.cat((seam.unsqueeze(0), ends.transpose(0, 1)[:-1])).flatten(0, 1)  # (S·B, P·D)
    for level in range((steps - 1).bit_length()):
        span = batch << level
        seams[span:].add_(seams[:-span] @ powers[level])
    return seams.unflatten(0, (steps, batch)).transpose(0, 1).flatten(0, 1)


def _squares(step: Tensor, steps: int) -> Tensor:
    """A², A⁴, … for spans below `steps`: (P·D, P·D) → (levels, P·D, P·D)."""
    found = step.new_empty(max(0, (steps - 1).bit_length() - 1), *step.shape)
    for before, after in itertools.pairwise([step, *found]):
        torch.mm(before, before, out=after)
    return found


def _continuations(weight: Tensor, block: int, in_place: bool) -> Tensor:
    """How the outputs go on for T steps from each of P·D, oldest first, without any drive: (P·D, 2T·D), in float64.

    Columns are T − P times zero, the P outputs themselves, an identity, and the T that follow. P·D columns that end m
    steps later are A^m, P·D outputs again; so [A, …, A^m] goes on as A^m [A, …, A^m]. Every squaring doubles the
    relative rounding error, hence the precision.
    """
    order, width, _ = weight.shape
    size, steps = order * width, 1
    start = block * width  # of what follows
    following, dtype = weight.flip(0).flatten(0, 1), double_dtype(weight)
    if in_place:
        found = weight.new_zeros(size, 2 * start, dtype=dtype)
        found[:, start - size : start].fill_diagonal_(1)
        found[:, start : start + width] = following
    else:
        now = torch.eye(size, dtype=dtype, device=weight.device)
        found = torch.cat((F.pad(now, (start - size, 0)), F.pad(following.to(dtype), (0, start - width))), 1)
    while steps < block:
        stop = start + steps * width  # of what is known
        power, known = found[:, stop - size : stop], found[:, start : min(stop, 2 * start - steps * width)]
        if in_place:
            torch.mm(power, known, out=found[:, stop : stop + known.shape[1]])
        else:
            found = torch.cat((found[:, :stop], power @ known, found[:, stop + known.shape[1] :]), 1)
        steps = min(2 * steps, block)
    return found


def _toeplitz(newest: Tensor, width: int, block: int) -> Tensor:
    """(T·D, T·D) matrix whose block (s, t) is P_{t−s}, zero for t < s: how an output at s goes on at t.

    newest: T − 1 times zero, then P_0 = I, P_1, …, P_T: the last D rows of `_continuations`.
    """
    return torch.cat([newest[:, shift * width : (shift + block) * width] for shift in reversed(range(block))])
