r"""Linear recurrences with a diagonal state matrix, x_t = a_t ⊙ x_{t−1} + b_t, without a loop over time.

L length, D input width, O output width, N state size; the first axis of a sequence is the batch

Two steps of a linear recurrence are one such step again, (a₁, b₁), (a₂, b₂) → (a₂ a₁, a₂ b₁ + b₂), and this product is
associative. So a scan runs over a tree, in place (Brent and Kung, "A regular layout for parallel adders", 1982):
upwards, until the last state of each span of 2, 4, 8, … steps covers its whole span; then downwards, where the state
before a span enters the half that lacks it. That is 2·log₂ L operations on whole tensors, which update a
state less than twice on average, need no memory and never divide: a decay may be zero.

Where a decay is the same at all times, a block of T steps is a product with the matrix of its powers, Λ_st = λ^{t−s},
for each of the N states, and what leaves the blocks is a scan with λ^T again. With T about √L that is a handful of
large products, which suits other devices than CPUs.

The adjoint is a recurrence from the end: with g_t the gradient of x_t by itself, ḡ_t = g_t + conj(a_{t+1}) ḡ_{t+1} is
the gradient of b_t, and conj(x_{t−1}) ḡ_t that of a_t.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.flops import flops_of
from stu.ops.forms import budget, choose, chunks
from stu.ops.kernels import diagonal_advance
from stu.ops.padding import put_back, real_first
from stu.ops.precision import at_least_float32, double_dtype, no_autocast
from stu.ops.transforms import plain_gradients, transformed

# How the states are found where a decay is the same at all times.
Algorithm = Literal["auto", "tree", "blocks"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

CHUNK = 1 << 20  # real numbers of states at a time on a CPU
LONGEST_BLOCK = 128  # steps of a block; longer sequences have more levels of them


def linear_scan(
    drive: Tensor,
    decay: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """x_t = a_t ⊙ x_{t−1} + b_t; with `reverse` from the end, x_t = a_t ⊙ x_{t+1} + b_t.

    drive: b, (batch, L, N); decay: a, (N,) at all times or (batch, L, N); initial: (batch, N), the state before the
    first step, zeros where None; each real or complex. Returns (batch, L, N), complex where drive or decay is, in
    drive's precision, but float32 at least, whatever an enclosing autocast.

    algorithm: "tree" suits CPUs, "blocks" other devices; "auto" is the one for the device of `drive`. With decays of
    all times it is a tree in any case.
    """
    chosen = choose(algorithm, drive, "tree", "blocks")
    dtype = torch.promote_types(drive.dtype, torch.complex64 if decay.is_complex() else torch.float32)
    decay = decay.to(dtype if decay.ndim > 1 else torch.promote_types(decay.dtype, dtype))
    drive = drive.to(dtype)
    if initial is not None:
        first = drive.shape[1] - 1 if reverse else 0
        entering = ((decay if decay.ndim == 1 else decay[:, first]) * initial).to(dtype)
        drive = drive.index_add(1, torch.full((1,), first, device=drive.device), entering.unsqueeze(1))
    return _scanned(drive, decay, reverse, chosen)


def linear_scan_reference(
    drive: Tensor, decay: Tensor, initial: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """The same, one step at a time; shapes as in `linear_scan`."""
    times = range(drive.shape[1])
    x = torch.zeros_like(drive[:, 0]) if initial is None else initial
    states = {}
    for t in reversed(times) if reverse else times:
        x = (decay if decay.ndim == 1 else decay[:, t]) * x + drive[:, t]
        states[t] = x
    return torch.stack([states[t] for t in times], 1)


def diagonal_ssm(
    u: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None = None,
    *,
    algorithm: Algorithm = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = Re(C_1 x_t) + Re(C_2 z_t) with x_t = λ ⊙ x_{t−1} + B u_t and, from the end, z_t = λ ⊙ z_{t+1} + B u_t.

    u: (batch, L, D), real. Complex are decay: λ, (N,); B: (N, D); C: (2, O, N), or (1, O, N) without z; initial:
    (batch, N), the x before the first, zeros where None. Returns y (batch, L, O) in u's dtype and the last x (batch, N)
    in decay's, which should be double: an error in a decay near 1 enters every step.

    States exist for a few sequences at a time and are not stored, but recomputed in the backward pass; in u's
    precision, but float32 at least, whatever an enclosing autocast. algorithm: as in `linear_scan`.
    """
    chosen = choose(algorithm, u, "tree", "blocks")
    dtype = at_least_float32(u)
    complex_dtype = torch.promote_types(dtype, torch.complex64)
    rows = torch.view_as_real(B.resolve_conj()).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
    inputs = (
        u.to(dtype),
        decay,
        rows.flatten(0, 1),  # (2N, D)
        torch.stack((C.real, -C.imag), -1).flatten(2).to(dtype),  # (1 or 2, O, 2N)
        u.new_zeros(len(u), len(decay), dtype=complex_dtype) if initial is None else initial.to(complex_dtype),
    )
    y, last = _plain_ssm(*inputs) if transformed(*inputs) else _diagonal_ssm(*inputs, chosen)
    return y.to(u.dtype), last.to(decay.dtype)


def padded_ssm(
    u: Tensor, mask: Tensor | None, decay: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`diagonal_ssm` of sequences with padding, where u is zero, before or after their real steps; without z.

    mask: (batch, L), or None: no padding. `initial` is the x before the first real step of each sequence, and the last
    x that after its last one.
    """
    if mask is None:
        return diagonal_ssm(u, decay, B, C, initial)
    order = real_first(mask.logical_not()).unsqueeze(-1)  # padding first: zeros that lead to zeros
    y, last = diagonal_ssm(u.take_along_dim(order, 1), decay, B, C)
    y = y.take_along_dim(order.argsort(1), 1)
    if initial is None:
        return y, last
    free, _ = diagonal_ssm(torch.zeros_like(u), decay, B, C, initial)
    return y + put_back(free, mask), last + diagonal_advance(decay, initial, u.shape[1], mask)


def diagonal_step(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of `diagonal_ssm`, no z: u_t (batch, D), x_{t−1} (batch, N) → y_t (batch, O), x_t in decay's dtype."""
    state = decay * state + u.to(decay.dtype) @ B.to(decay.dtype).T
    return (state @ C[0].to(decay.dtype).T).real.to(u.dtype), state


def _scanned(drive: Tensor, decay: Tensor, reverse: bool, algorithm: str) -> Tensor:
    if transformed(drive, decay):
        return _plain_scan(drive, decay, reverse)
    states: Tensor = _linear_scan(drive, decay, reverse, algorithm)
    return states


def _plain_scan(drive: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """The same out of place: spans of 1, 2, 4, … steps that end at every step (Hillis and Steele, 1986)."""
    if reverse:
        return _plain_scan(drive.flip(1), decay if decay.ndim == 1 else decay.flip(1), False).flip(1)
    if decay.ndim == 1:
        decay = decay.to(torch.promote_types(decay.dtype, double_dtype(decay)))
    span = 1
    while span < drive.shape[1]:
        drive = drive + decay.to(drive.dtype) * F.pad(drive[:, :-span], (0, 0, span, 0))
        decay = decay * (decay if decay.ndim == 1 else F.pad(decay[:, :-span], (0, 0, span, 0)))
        span *= 2
    return drive


@torch.library.custom_op("stu::linear_scan", mutates_args=())
def _linear_scan(drive: Tensor, decay: Tensor, reverse: bool, algorithm: str) -> Tensor:
    x = drive.clone(memory_format=torch.contiguous_format)
    if decay.ndim > 1:
        return _gated_scan_(x, decay.clone(), reverse)
    with no_autocast(x):
        return _constant(decay, x.dtype, x.shape[1], algorithm).scan_(x, reverse)


@_linear_scan.register_fake
def _(drive: Tensor, decay: Tensor, reverse: bool, algorithm: str) -> Tensor:
    return torch.empty_like(drive, memory_format=torch.contiguous_format)


def _save_scan(ctx: Any, inputs: tuple[Tensor, Tensor, bool, str], output: Tensor) -> None:
    _, decay, ctx.reverse, ctx.algorithm = inputs
    ctx.save_for_backward(decay, output)


def _scan_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    decay, states = ctx.saved_tensors
    adjoint = decay.conj() if decay.ndim == 1 else _before(decay.conj(), not ctx.reverse)
    grad_drive = _scanned(grad, adjoint.resolve_conj(), not ctx.reverse, ctx.algorithm)
    grad_decay = _before(states, ctx.reverse).conj() * grad_drive
    return grad_drive, grad_decay.sum((0, 1)).to(decay.dtype) if decay.ndim == 1 else grad_decay, None, None


_linear_scan.register_autograd(_scan_backward, setup_context=_save_scan)


def _plain_ssm(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """`_diagonal_ssm` with all states at once."""
    with no_autocast(u):
        drive = _complex((u @ B.T).contiguous())  # (batch, L, N)
        entering = (decay * initial).to(drive.dtype).unsqueeze(1)
        states = _plain_scan(torch.cat((drive[:, :1] + entering, drive[:, 1:]), 1), decay, False)
        y = torch.view_as_real(states).flatten(2) @ C[0].T
        if len(C) == 2:
            y = y + torch.view_as_real(_plain_scan(drive, decay, True)).flatten(2) @ C[1].T
        return y, states[:, -1]


@torch.library.custom_op("stu::diagonal_ssm", mutates_args=())
def _diagonal_ssm(
    u: Tensor, decay: Tensor, B: Tensor, C: Tensor, initial: Tensor, algorithm: str
) -> tuple[Tensor, Tensor]:
    """`diagonal_ssm` in real matrices, on states as rows of pairs (Re x, Im x): B (2N, D), C (1 or 2, O, 2N)."""
    y = u.new_empty(*u.shape[:2], C.shape[1])
    last = torch.empty_like(initial)
    with no_autocast(u):
        over_time = _constant(decay, initial.dtype, u.shape[1], algorithm)
        for rows in _chunks(u, B):
            drive = u[rows] @ B.T  # (b, L, 2N)
            states = drive if len(C) == 1 else drive.clone()
            last[rows] = _from_start_(states, decay, initial[rows], over_time)[:, -1]
            torch.matmul(states, C[0].T, out=y[rows])
            if len(C) == 2:
                over_time.scan_(_complex(drive), reverse=True)
                y[rows] += drive @ C[1].T
    return y, last


@_diagonal_ssm.register_fake
def _(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, initial: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(*u.shape[:2], C.shape[1]), torch.empty_like(initial)


@torch.library.custom_op("stu::diagonal_ssm_backward", mutates_args=())
def _diagonal_ssm_backward(
    grad: Tensor,
    grad_last: Tensor,
    u: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all inputs of `_diagonal_ssm`."""
    grad_u, grad_initial = u.new_empty(u.shape), torch.empty_like(initial)
    sums: list[Tensor] = []  # gradients of decay, B and C
    conjugate = decay.conj_physical()  # a lazy conjugate inside an operator is lost under dispatch modes
    with no_autocast(u):
        over_time = _constant(decay, initial.dtype, u.shape[1], algorithm)
        adjoint = over_time.conjugated()
        for rows in _chunks(u, B):
            drive = u[rows] @ B.T  # (b, L, 2N)
            states = drive if len(C) == 1 else drive.clone()
            x = _from_start_(states, decay, initial[rows], over_time)
            by_C = [_outer(grad[rows], states)]
            grad_drive = grad[rows] @ C[0]  # (b, L, 2N)
            g = _complex(grad_drive)
            g[:, -1] += grad_last[rows]
            adjoint.scan_(g, reverse=True)
            grad_initial[rows] = conjugate * g[:, 0]
            by_decay = _inner(x[:, :-1], g[:, 1:]) + _inner(initial[rows], g[:, 0])
            if len(C) == 2:
                z = over_time.scan_(_complex(drive), reverse=True)
                by_C.append(_outer(grad[rows], drive))
                grad_reverse = grad[rows] @ C[1]
                g = adjoint.scan_(_complex(grad_reverse), reverse=False)
                by_decay += _inner(z[:, 1:], g[:, :-1])
                grad_drive += grad_reverse
            torch.matmul(grad_drive, B, out=grad_u[rows])
            parts = by_decay.to(decay.dtype), _outer(grad_drive, u[rows]), torch.stack(by_C)
            sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else list(parts)
    grad_decay, grad_B, grad_C = sums or map(torch.zeros_like, (decay, B, C))
    return grad_u, grad_decay, grad_B, grad_C, grad_initial


@_diagonal_ssm_backward.register_fake
def _(grad: Tensor, grad_last: Tensor, u: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    decay, B, C, initial, _algorithm = inputs
    return u.new_empty(u.shape), *map(torch.empty_like, (decay, B, C, initial))


def _save_ssm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.algorithm = inputs
    ctx.save_for_backward(*tensors)


def _ssm_backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() or transformed(grad, grad_last):
        return *plain_gradients(_plain_ssm, ctx.saved_tensors, (grad, grad_last)), None
    return *_diagonal_ssm_backward(grad, grad_last, *ctx.saved_tensors, ctx.algorithm), None


_diagonal_ssm.register_autograd(_ssm_backward, setup_context=_save_ssm)


@flops_of(_linear_scan)
def _flops_of_scan(drive: Tensor, decay: Tensor, reverse: bool, algorithm: str, **_: Any) -> int:
    batch, length, states = drive.shape
    return _scan_flops(batch, length, states, algorithm) if decay.ndim == 1 else 0


@flops_of(_diagonal_ssm)
def _flops(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, initial: Tensor, algorithm: str, **_: Any) -> int:
    scans = len(C) * _scan_flops(len(u), u.shape[1], len(decay), algorithm)
    return 2 * u[..., 0].numel() * (B.numel() + C.numel()) + scans


@flops_of(_diagonal_ssm_backward)
def _backward_flops(grad: Tensor, grad_last: Tensor, *inputs: Any, **_: Any) -> int:
    u, decay, B, C, _initial, algorithm = inputs
    scans = 2 * len(C) * _scan_flops(len(u), u.shape[1], len(decay), algorithm)
    return 2 * u[..., 0].numel() * (3 * B.numel() + 2 * C.numel()) + scans


def _scan_flops(batch: int, length: int, states: int, algorithm: str) -> int:
    """Of the complex products with matrices of powers."""
    if algorithm == "tree":
        return 0
    block, levels = _division(length)
    total, count = 0, length
    for _ in range(levels - 1):
        count = -(-count // block)
        total += count * block * (1 + block)
    return 8 * batch * states * (total + count**2)


class _Tree(NamedTuple):
    """Scans with the decays of 1, 2, 4, … steps: (levels, N)."""

    powers: Tensor

    def conjugated(self) -> "_Tree":
        return _Tree(self.powers.conj_physical())

    def scan_(self, x: Tensor, reverse: bool) -> Tensor:
        """Turn x (batch, L, N) from the drive into the states, in place."""
        for level, targets, sources in _tree(x.shape[1], reverse):
            x[:, targets].addcmul_(self.powers[level], x[:, sources])
        return x


class _Blocks(NamedTuple):
    """Scans with matrices Λ_st = λ^{t−s}, zero for t < s, over steps, over blocks of T, of T², …: (m, N, T, T)."""

    matrices: Tensor

    def conjugated(self) -> "_Blocks":
        return _Blocks(self.matrices.conj_physical())

    def scan_(self, x: Tensor, reverse: bool) -> Tensor:
        """Turn x (batch, L, N) from the drive into the states, in place."""
        batch, _, states = x.shape
        *inner, outer = (self.matrices.mT if reverse else self.matrices).unbind()
        sequence, levels = x.permute(2, 0, 1), []  # (N, batch, L)
        for matrix in inner:
            blocks = _in_blocks(sequence, matrix.shape[-1])  # (N, batch, S, T)
            levels.append((blocks, sequence.shape[2]))
            leaving = matrix[:, :, :1] if reverse else matrix[:, :, -1:]
            sequence = torch.bmm(blocks.flatten(1, 2), leaving).view(states, batch, -1)
        count = sequence.shape[2]
        found = torch.bmm(sequence, outer[:, :count, :count])
        for (blocks, count), matrix in zip(reversed(levels), reversed(inner), strict=True):
            step = (matrix[:, 1, 0] if reverse else matrix[:, 0, 1])[:, None, None]
            if reverse:
                blocks[:, :, :-1, -1].addcmul_(step, found[:, :, 1:])
            else:
                blocks[:, :, 1:, 0].addcmul_(step, found[:, :, :-1])
            found = torch.bmm(blocks.flatten(1, 2), matrix).view(states, batch, -1)[..., :count]
        return x.copy_(found.permute(1, 2, 0))


def _constant(decay: Tensor, dtype: torch.dtype, length: int, algorithm: str) -> _Tree | _Blocks:
    """Scans of `length` steps with the decay λ (N,) at all times, of states of a dtype.

    Powers are those of λ in float64: an error in a decay near 1 would enter every step.
    """
    exact = decay.to(torch.promote_types(decay.dtype, double_dtype(decay)))
    if algorithm == "tree":
        spans = torch.arange((length - 1).bit_length(), dtype=exact.real.dtype, device=decay.device).exp2()
        return _Tree((exact ** spans.unsqueeze(1)).to(dtype))
    block, levels = _division(length)
    steps = torch.arange(block, dtype=exact.real.dtype, device=decay.device)
    steps = torch.stack([steps * block**level for level in range(levels)])
    powers = (exact.unsqueeze(1) ** steps.unsqueeze(1)).to(dtype)  # (m, N, T)
    powers[..., 0] = 1  # also of zero
    # flip also copies: rows of an unfolded tensor overlap
    return _Blocks(F.pad(powers, (block - 1, 0)).unfold(-1, block, 1).flip(-2))


def _division(length: int) -> tuple[int, int]:
    """The block length T and the number of levels m, T^m ≥ L: as few as can be, and then as short."""
    levels = 1
    while LONGEST_BLOCK**levels < length:
        levels += 1
    return max(1, length) if levels == 1 else 1 << math.ceil(math.log2(length) / levels), levels


def _in_blocks(sequence: Tensor, block: int) -> Tensor:
    """A copy with zeros after the end: (N, batch, L) → (N, batch, S, T)."""
    length = sequence.shape[2]
    count = -(-length // block)
    whole = count * block == length
    blocks = (sequence.new_empty if whole else sequence.new_zeros)(*sequence.shape[:2], count * block)
    blocks[..., :length] = sequence
    return blocks.unflatten(2, (count, block))


def _gated_scan_(x: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """The same with decays (batch, L, N) of each step, overwritten by their products over spans."""
    for _, targets, sources in _tree(x.shape[1], reverse):
        x[:, targets].addcmul_(decay[:, targets], x[:, sources])
        decay[:, targets].mul_(decay[:, sources])
    return x


def _tree(length: int, reverse: bool) -> Iterator[tuple[int, slice, slice]]:
    """The operations of a scan: (level, targets, sources), each source 2^level steps before its target."""
    levels = range((length - 1).bit_length())
    upwards = [(level, (2 << level) - 1) for level in levels]
    downwards = [(level, (3 << level) - 1) for level in reversed(levels)]
    for level, first in upwards + downwards:
        targets = range(first, length, 2 << level)
        if targets:
            start, stop, back = targets[0], targets[-1] + 1, -(1 << level)
            if reverse:
                start, stop, back = length - stop, length - start, -back
            yield level, slice(start, stop, 2 << level), slice(start + back, stop + back, 2 << level)


def _from_start_(drive: Tensor, decay: Tensor, initial: Tensor, over_time: _Tree | _Blocks) -> Tensor:
    """Turn rows of pairs (b, L, 2N) from the drive into the states in place, viewed as complex numbers (b, L, N)."""
    x = _complex(drive)
    x[:, 0] += decay * initial
    return over_time.scan_(x, reverse=False)


def _chunks(u: Tensor, B: Tensor) -> list[slice]:
    """Slices of the batch, by the size of their states."""
    return chunks(len(u), u.shape[1] * len(B), budget(u, CHUNK, arrays=8))


def _complex(rows: Tensor) -> Tensor:
    """(…, 2N) pairs of real and imaginary parts, viewed as (…, N) complex numbers."""
    return torch.view_as_complex(rows.unflatten(-1, (-1, 2)))


def _before(x: Tensor, reverse: bool) -> Tensor:
    """(batch, L, N) one step earlier in the direction of a scan, zero before the first."""
    return F.pad(x, (0, 0, -1, 1) if reverse else (0, 0, 1, -1))


def _inner(x: Tensor, g: Tensor) -> Tensor:
    """Σ conj(x) g over all but the last axis."""
    return (x.conj_physical() * g).flatten(0, -2).sum(0)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Σ a_t b_tᵀ over batch and time: (b, L, I), (b, L, J) → (I, J)."""
    return a.flatten(0, 1).T @ b.flatten(0, 1)
