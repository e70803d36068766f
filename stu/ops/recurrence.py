r"""Linear recurrences with learned matrices: y_t = w_t + Σ_i y_{t−i} M_i.

B batch, L length, D width, P order of the recurrence, T block length, S = ⌈L/T⌉ blocks

Inside a block the response to the drive is a block-Toeplitz product with the recurrence's impulse response; the P
outputs at the seam of two blocks are carried in sequence, by S small products. The gradient needs nothing new: the
adjoint of a recurrence is the same recurrence with transposed matrices, run from the end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.flops import flops_of
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.transforms import owned, transformed

SHORTEST, LONGEST = 4, 64  # block lengths
# Flops that take as long as the small product at a seam, which is dominated by the cost of the call.
SEAM_FLOPS_ON_CPU, SEAM_FLOPS = 7e5, 1e8


def linear_recurrence(drive: Tensor, weight: Tensor, initial: Tensor | None = None) -> Tensor:
    """y_t = drive_t + Σ_{i=1…P} y_{t−i} M_i, in blocks of time.

    drive: (B, L, D); weight: (P, D, D), M_i as `y @ weight[i-1]`; initial: (B, P, D), the outputs before the first,
    newest first, zeros where None. Returns (B, L, D) in drive's dtype. Computed in float32 at least, whatever the
    dtypes or an enclosing autocast: near |pole| = 1 the rounding of thousands of steps accumulates. To `torch.compile`
    this is one opaque operator.
    """
    dtype = torch.promote_types(drive.dtype, at_least_float32(weight))
    start = drive.new_zeros(len(drive), *weight.shape[:2]) if initial is None else initial
    inputs = drive.to(dtype), weight.to(dtype), start.to(dtype)
    with no_autocast(drive):
        y: Tensor = (_blockwise if transformed(*inputs) else _recurrence)(*inputs)
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


def choose_block(batch: int, width: int, device: str) -> int:
    """The block length T that balances a step's Toeplitz product, 2·B·T·D² flops, with its share of a seam, 1/T.

    Alternatives are measured by `python -m experiments.speed.recurrence`.
    """
    seam = SEAM_FLOPS_ON_CPU if device == "cpu" else SEAM_FLOPS
    return min(max(round((seam / (2 * max(1, batch) * width**2)) ** 0.5), SHORTEST), LONGEST)


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
def _recurrence(drive: Tensor, weight: Tensor, initial: Tensor) -> Tensor:
    with no_autocast(drive):
        return owned(_blockwise(drive, weight, initial))


@_recurrence.register_fake
def _(drive: Tensor, weight: Tensor, initial: Tensor) -> Tensor:
    return drive.new_empty(drive.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, weight, initial = inputs
    ctx.save_for_backward(output, weight, initial)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of drive, a_t = g_t + Σ_i a_{t+i} M_iᵀ, weight, Σ_t y_{t−i}ᵀ a_t, and initial."""
    y, weight, initial = ctx.saved_tensors
    order, width = weight.shape[:2]
    with no_autocast(grad):
        by_drive = linear_recurrence(grad.flip(1), weight.mT).flip(1)
        history = torch.cat((initial.flip(1), y), 1)  # (B, P + L, D), oldest first
        lagged = (history[:, order - i : -i].reshape(-1, width) for i in range(1, order + 1))  # y_{t−i}
        by_weight = torch.stack([outputs.mT @ by_drive.reshape(-1, width) for outputs in lagged])
        by_initial = [  # y_{−i} enters step t through M_{t+1+i}
            sum(
                (by_drive[:, t] @ weight[t + i].mT for t in range(min(order - i, y.shape[1]))),
                torch.zeros_like(y[:, 0]),
            )
            for i in range(order)
        ]
        return by_drive, by_weight, torch.stack(by_initial, 1)


_recurrence.register_autograd(_backward, setup_context=_save)


@flops_of(_recurrence)
def _flops(drive: Tensor, weight: Tensor, initial: Tensor, **_: Any) -> int:
    (batch, length, width), order = drive.shape, len(weight)
    block, steps = _division(batch, length, width, order, drive.device.type)
    response = sum(min(n, order) for n in range(1, block)) + sum(
        block - start for i in range(order) for start in range(i + 1)
    )
    blocks = batch * steps * (block + order) * block + (steps - 1) * batch * order**2
    return 2 * (response * width**3 + blocks * width**2)


# --- blocks ---


def _blockwise(drive: Tensor, weight: Tensor, initial: Tensor) -> Tensor:
    batch, length, width = drive.shape
    order = len(weight)
    block, steps = _division(batch, length, width, order, drive.device.type)
    response = _impulse_response(weight, block)  # (T, D, D)
    free = _free_response(weight, response)  # (P·D, T·D)
    blocks = F.pad(drive, (0, 0, 0, steps * block - length)).reshape(batch * steps, block * width)
    own = blocks @ _toeplitz(response)  # the response to each block's own drive
    ends = own[:, -order * width :].unflatten(0, (batch, steps))
    seams = _seams(ends, free[:, -order * width :], initial.flip(1).flatten(1))
    return torch.addmm(own, seams.flatten(0, 1), free).view(batch, steps * block, width)[:, :length]


def _division(batch: int, length: int, width: int, order: int, device: str) -> tuple[int, int]:
    """The block length T and the number of blocks S."""
    block = max(min(choose_block(batch, width, device), length), order)
    return block, -(-length // block)


def _seams(ends: Tensor, free: Tensor, seam: Tensor) -> Tensor:
    """The P outputs before each block, (B, S, P·D), oldest first: s_{j+1} = ends_j + s_j free."""
    seams = [seam]
    for end in ends.unbind(1)[:-1]:
        seams.append(torch.addmm(end, seams[-1], free))
    return torch.stack(seams, 1)


def _impulse_response(weight: Tensor, length: int) -> Tensor:
    """P_0 = I, P_n = Σ_i P_{n−i} M_i: (length, D, D), row vectors from the left."""
    response = [torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)]
    for n in range(1, length):
        terms = [response[n - i - 1] @ weight[i] for i in range(min(n, len(weight)))]
        response.append(torch.stack(terms).sum(0))
    return torch.stack(response)


def _toeplitz(response: Tensor) -> Tensor:
    """(T·D, T·D) matrix whose block (s, t) is P_{t−s}, zero for t < s."""
    block, width, _ = response.shape
    time = torch.arange(block, device=response.device)
    lag = time - time[:, None]  # (s, t)
    blocks = response[lag.clamp_min(0)] * (lag >= 0)[..., None, None]  # (T, T, D, D)
    return blocks.transpose(1, 2).reshape(block * width, block * width)


def _free_response(weight: Tensor, response: Tensor) -> Tensor:
    """(P·D, T·D): the response in a block to the P outputs before it, oldest first, without any drive.

    Output t−i (i = 1…P) enters step t' of the block through M_{t'+i}, t' ≤ P − i, and continues as P_{t−t'}.
    """
    order, block = len(weight), len(response)
    rows = []
    for i in range(order, 0, -1):
        ringing = [
            F.pad(weight[start + i - 1] @ response[: block - start], (0, 0, 0, 0, start, 0))  # (T, D, D)
            for start in range(order - i + 1)
        ]
        rows.append(torch.stack(ringing).sum(0).transpose(0, 1).flatten(1))
    return torch.cat(rows)
