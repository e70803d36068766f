r"""State space duality: a selective linear recurrence as products of matrices, chunk by chunk.

B batch, L length, H heads, P width of a head, G groups of R = H/G heads that share B and C, N state size,
c chunks of Q steps, F = B·c; dt is Δ, and A, B, C, D in formulas and arguments are the system, as in the paper

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ        h (N, P), A and Δ_t scalars, B_t and C_t (N,), x_t and y_t (P,)
    y_t = h_tᵀ C_t + D x_t

As one matrix over time this is y = M (Δ x) + D x, M_ts = C_tᵀ B_s exp(Σ_{s<r≤t} Δ_r A) for s ≤ t. Inside a chunk M is
formed; whatever lies before a chunk acts through the one state that enters it. So nearly all the work is matrix
products, its cost is linear in L, and only the L/Q states at the seams follow one another. Source: Dao, Gu,
"Transformers are SSMs", 2405.21060, sections 5 and 6.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.flops import flops_of
from stu.ops.forms import budget, chunks
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.transforms import owned, plain_gradients, transformed

ENTRIES_ON_CPU = 1 << 18  # of M at a time; there are several matrices of its size


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """y_t = h_tᵀ C_t + D x_t with h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ, without a loop over time.

    x: (B, L, H, P); dt: (B, L, H); A, D: (H,), with dt·A ≤ 0; B, C: (B, L, G, N), heads 0 … R − 1 have those of group
    0; initial: the state before the first step, (B, H, N, P), zeros where None; chunk_size: the longest chunk.
    Returns y (B, L, H, P) in x's dtype, and the state after the last step (B, H, N, P).

    Computed in float32 at least, the state included, whatever the dtypes or an enclosing autocast. One state per chunk
    is kept for the backward pass, which recomputes M.
    """
    dtype = at_least_float32(x, dt)
    if initial is None:
        initial = x.new_zeros(len(x), x.shape[2], B.shape[3], x.shape[3])
    with no_autocast(x):
        inputs = [signal.to(dtype) for signal in (x, dt, A, B, C, initial)]
        form: Callable[..., tuple[Tensor, Tensor, Tensor]] = _chunkwise if transformed(*inputs) else _ssd
        y, final, _ = form(*inputs, chunk_size)
        return (y + D.to(dtype).unsqueeze(-1) * x).to(x.dtype), final


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: x (B, H, P), dt (B, H), B, C (B, G, N), state (B, H, N, P) → y (B, H, P), state."""
    heads_of_group = x.shape[1] // B.shape[1]
    B, C = (matrix.repeat_interleave(heads_of_group, 1).unsqueeze(-1) for matrix in (B, C))  # (B, H, N, 1)
    decay, drive = torch.exp(dt * A), dt.unsqueeze(-1) * x
    state = decay[..., None, None] * state + B * drive.unsqueeze(-2)
    return (C * state).sum(-2) + D.unsqueeze(-1) * x, state


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, one step at a time; shapes as in `ssd`."""
    outputs, state = [], initial
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


# --- the operator ---


@torch.library.custom_op("stu::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssd` without D, and the states that enter the chunks, which the backward pass needs."""
    with no_autocast(x):
        y, final, entering = _chunkwise(x, dt, A, B, C, initial, chunk_size)
        return owned(y), owned(final), owned(entering)


@_ssd.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, width), (groups, d_state) = x.shape, B.shape[2:]
    chunks = batch * -(-length // chunk_size)
    states = x.new_empty(chunks, groups, d_state, heads // groups * width)
    return x.new_empty(x.shape), x.new_empty(batch, heads, d_state, width), states


def _chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inside each chunk by M itself, between them by the states."""
    batch, length, _, width = x.shape
    groups = B.shape[2]
    x, dt, B, C = (_chunked(signal, chunk_size) for signal in (x, dt, B, C))  # each (F, Q, …)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (F, G, Q, N)
    sums = _running_sums(dt * A)
    decay = _decays(sums, width, groups)
    added = B.mT @ _by_group(x * (dt * decay.to_end).unsqueeze(-1), groups)  # (F, G, N, RP)
    entering, final = _carried(added, decay.through, _by_group(initial.transpose(1, 2), groups))
    parts = []
    for f in _slices(x):
        mixing = _scores(B[f], C[f]) * _pair_decays(sums[:, f], groups)  # (F, G, R, Q, Q)
        drive = x[f] * dt[f].unsqueeze(-1)
        between = _by_head(C[f] @ entering[f], width) * decay.from_start[f].unsqueeze(-1)
        parts.append(between + (mixing.flatten(1, 2) @ drive.transpose(1, 2)).transpose(1, 2))
    y = parts[0] if len(parts) == 1 else torch.cat(parts or [x])
    return _sequences(y, batch, length), _by_head(final, width).transpose(1, 2), entering


@torch.library.custom_op("stu::ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    entering: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, Δ, A, B, C and the initial state; the states were kept, M and its factors are recomputed.

    Gradients of the steps Δ_t A are sums over everything that crosses t: pairs of two steps of the chunk, contributions
    of the entering state, contributions to the leaving state, and what passes through. Each sum has only terms that do
    cross. The difference of row and column sums of M would be cheaper, but cancels to noise where the decay is strong.
    """
    batch, length, _, width = x.shape
    groups = B.shape[2]
    with no_autocast(x):  # backward may be called inside one, too
        dy, x, dt, B, C = (_chunked(signal, chunk_size) for signal in (dy, x, dt, B, C))
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        sums = _running_sums(dt * A)
        decay = _decays(sums, width, groups)
        read = dy * decay.from_start.unsqueeze(-1)
        dfinal = _by_group(dfinal.transpose(1, 2), groups)
        leaving, dinitial = _carried(C.mT @ _by_group(read, groups), decay.through, dfinal, backwards=True)
        dx, ddt, dB, dC, dsteps = map(torch.empty_like, (x, dt, B, C, dt))
        for f in _slices(x):
            drive, to_end = x[f] * dt[f].unsqueeze(-1), decay.to_end[f].unsqueeze(-1)
            ddrive, dscores, pairs = _within(drive, dy[f], _scores(B[f], C[f]), _pair_decays(sums[:, f], groups))
            dwritten = _by_head(B[f] @ leaving[f], width) * to_end
            ddrive += dwritten
            dB[f] = dscores.mT @ C[f] + _by_group(drive * to_end, groups) @ leaving[f].mT
            dC[f] = dscores @ B[f] + _by_group(read[f], groups) @ entering[f].mT
            dsteps[f] = _crossing(
                pairs,
                (_by_head(C[f] @ entering[f], width) * read[f]).sum(-1),
                (dwritten * drive).sum(-1),
                _by_head((entering[f] * leaving[f] * decay.through[f]).sum(-2, keepdim=True), width).sum(-1),
            )
            ddt[f] = (ddrive * x[f]).sum(-1) + dsteps[f] * A
            dx[f] = ddrive * dt[f].unsqueeze(-1)
        dA = (dsteps * dt).sum((0, 1))
        by_time = (dx, ddt, dB.transpose(1, 2), dC.transpose(1, 2))
        dx, ddt, dB, dC = (owned(_sequences(signal, batch, length)) for signal in by_time)
        return dx, ddt, dA, dB, dC, owned(_by_head(dinitial, width).transpose(1, 2))


@_ssd_backward.register_fake
def _(dy: Tensor, dfinal: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *signals, _entering, _chunk_size = inputs
    return tuple(like.new_empty(like.shape) for like in (*signals, dfinal))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, dy: Tensor, dfinal: Tensor, dentering: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, entering = ctx.saved_tensors
    if torch.is_grad_enabled() or transformed(dy, dfinal):
        return plain_gradients(_chunkwise, (*inputs, ctx.chunk_size), (dy, dfinal, dentering))
    *inputs, _ = inputs  # the initial state is the first of those kept
    return *_ssd_backward(dy, dfinal, *inputs, entering, ctx.chunk_size), None


_ssd.register_autograd(_backward, setup_context=_save)


@flops_of(_ssd)
def _flops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any, **_: Any) -> int:
    *_tensors, chunk_size = rest
    chunks, chunk, states, scores, within = _sizes(x, B, chunk_size)
    return 2 * chunks * chunk * (2 * states + scores + within)


@flops_of(_ssd_backward)
def _backward_flops(dy: Tensor, dfinal: Tensor, *inputs: Any, **_: Any) -> int:
    x, _dt, _A, B, *_tensors, chunk_size = inputs
    chunks, chunk, states, scores, within = _sizes(x, B, chunk_size)
    crossing = x.shape[2] * chunk**2
    return 2 * chunks * chunk * (5 * states + 3 * scores + 2 * within + crossing)


def _sizes(x: Tensor, B: Tensor, chunk_size: int) -> tuple[int, int, int, int, int]:
    """F, Q, and the size per step of all states, of the scores' products and of those of M."""
    (batch, length, heads, width), (groups, d_state) = x.shape, B.shape[2:]
    count = -(-length // chunk_size)
    chunk = -(-length // count)
    return batch * count, chunk, heads * width * d_state, groups * chunk * d_state, heads * chunk * width


# --- chunks ---


class _Decay(NamedTuple):
    """exp Σ Δ_r A over parts of each chunk: up to and including t, after t (F, Q, H), and all of it (F, G, 1, RP)."""

    from_start: Tensor
    to_end: Tensor
    through: Tensor


def _chunked(signal: Tensor, chunk_size: int) -> Tensor:
    """(B, L, …) → (F, Q, …), Q ≤ chunk_size as even as can be; padded with zeros, which change no state as Δ = 0."""
    length = signal.shape[1]
    count = -(-length // chunk_size)
    chunk = -(-length // count)
    if spare := count * chunk - length:  # padding by nothing would copy
        signal = F.pad(signal, (0, 0) * (signal.ndim - 2) + (0, spare))
    return signal.unflatten(1, (count, chunk)).flatten(0, 1)


def _sequences(signal: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of `_chunked`: (F, Q, …) → (B, L, …)."""
    return signal.unflatten(0, (batch, -(-length // signal.shape[1]))).flatten(1, 2)[:, :length]


def _by_group(signal: Tensor, groups: int) -> Tensor:
    """(F, Q, H, P) → (F, G, Q, RP)."""
    return signal.unflatten(2, (groups, -1)).transpose(1, 2).flatten(3)


def _by_head(signal: Tensor, width: int) -> Tensor:
    """(F, G, Q, RP) → (F, Q, H, P)."""
    return signal.unflatten(3, (-1, width)).transpose(1, 2).flatten(2, 3)


def _running_sums(steps: Tensor) -> Tensor:
    """Σ_{r≤t} steps_r of each chunk as a rounded sum and its rounding error: (F, Q, H) → (2, F, Q, H).

    A decay is the difference of two such sums. One step of a large Δ, which forgets everything, makes all later sums
    large, and rounded to float32 alone they would no longer resolve small steps. The error of one addition can be
    computed exactly from rounded numbers (Knuth's TwoSum).
    """
    sums = steps.cumsum(1)
    before = _one_later(sums)
    added = before + steps
    seen = added - before
    lost = (before - (added - seen)) + (steps - seen)
    return torch.stack((sums, (added - sums + lost).cumsum(1)))


def _decays(sums: Tensor, width: int, groups: int) -> _Decay:
    from_start = sums.sum(0).exp()
    to_end = (sums[:, :, -1:] - sums).sum(0).exp()
    through = from_start[:, -1:, :, None].expand(-1, -1, -1, width)
    return _Decay(from_start, to_end, _by_group(through, groups))


def _pair_decays(sums: Tensor, groups: int) -> Tensor:
    """The decays exp Σ_{s<r≤t} Δ_r A of all s ≤ t of a chunk, (2, F, Q, H) → (F, G, R, Q, Q); one where s > t."""
    high, low = sums.transpose(2, 3).contiguous()  # (F, H, Q)
    between = high.unsqueeze(-1) - high.unsqueeze(-2)
    between.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    return _lower(between).exp_().unflatten(1, (groups, -1))


def _scores(B: Tensor, C: Tensor) -> Tensor:
    """C_tᵀ B_s of all s ≤ t of a chunk, zero above the diagonal: two (F, G, Q, N) → (F, G, 1, Q, Q)."""
    return _lower(C @ B.mT).unsqueeze(2)


def _lower(matrices: Tensor) -> Tensor:
    """Zeros above the diagonal, in place where `vmap` does not have to go through the batch for that."""
    return matrices.tril() if transformed(matrices) else matrices.tril_()


def _carried(added: Tensor, through: Tensor, start: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """state_{c+1} = through_c state_c + added_c, or from the last chunk to the first.

    (F, G, N, RP), (F, G, 1, RP), (B, G, N, RP) → the state that enters each chunk, like `added`, and the last one.
    """
    count = len(added) // len(start) if len(start) else 1
    added, through = (t.unflatten(0, (len(start), count)) for t in (added, through))
    states = [start]
    order = range(added.shape[1])
    for c in reversed(order) if backwards else order:
        states.append(torch.addcmul(added[:, c], through[:, c], states[-1]))
    final = states.pop()
    return torch.stack(states[::-1] if backwards else states, 1).flatten(0, 1), final


def _within(drive: Tensor, dy: Tensor, scores: Tensor, decays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass through M inside chunks, from drive and dy (F, Q, H, P).

    Returns gradients of the drive, like it, and of the scores (F, G, Q, Q), and dM ∘ M of each head (F, H, Q, Q).
    """
    by_head = dy.transpose(1, 2).contiguous()  # (F, H, Q, P)
    ddrive = (scores * decays).flatten(1, 2).mT @ by_head
    dmixing = (by_head @ drive.permute(0, 2, 3, 1)).view_as(decays).mul_(decays)
    dscores = dmixing.sum(2).tril_()
    return ddrive.transpose(1, 2), dscores, dmixing.mul_(scores).flatten(1, 2)


def _crossing(pairs: Tensor, read: Tensor, written: Tensor, through: Tensor) -> Tensor:
    """Σ over everything that crosses t, (F, Q, H).

    pairs: (F, H, Q, Q), from a step s < t to a step ≥ t; read: (F, Q, H), from the entering state to a step ≥ t;
    written: (F, Q, H), from a step before t to the leaving state; through: (F, 1, H).
    """
    length = pairs.shape[-1]
    before = pairs.new_ones(length, length).triu_(1)  # [s < t]
    inside = (pairs @ before).tril_().sum(-2).transpose(1, 2)
    return inside + read.flip(1).cumsum(1).flip(1) + _one_later(written).cumsum(1) + through


def _one_later(signal: Tensor) -> Tensor:
    """(F, Q, H) → the same, signal_{t−1} at t and zero at the start."""
    return F.pad(signal[:, :-1], (0, 0, 1, 0))


def _slices(x: Tensor) -> list[slice]:
    """Slices of the chunks (F, Q, H, P), by the size of their matrices M of all heads."""
    return chunks(len(x), x.shape[2] * x.shape[1] ** 2, budget(x, ENTRIES_ON_CPU, arrays=6))
