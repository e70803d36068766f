r"""State space duality: a selective linear recurrence as products of matrices, chunk by chunk.

B batch, L length, H heads, P width of a head, G groups of R = H/G heads that share B and C, N state size,
c chunks of Q steps, F = B·c; dt is Δ, and A, B, C, D in formulas and arguments are the system, as in the paper

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ        h (N, P), A and Δ_t scalars, B_t and C_t (N,), x_t and y_t (P,)
    y_t = h_tᵀ C_t + D x_t

As one matrix over time this is y = M (Δ x) + D x, M_ts = C_tᵀ B_s exp(Σ_{s<r≤t} Δ_r A) for s ≤ t. Inside a chunk M is
formed; whatever lies before a chunk acts through the one state that enters it. So nearly all the work is matrix
products, and its cost is linear in L. The states at the seams follow one another, which a CPU does best
(`sequential`), or are one more product with a matrix of decays, between chunks (`parallel`), or for many chunks between
blocks of them and inside each block. Source: Dao, Gu, "Transformers are SSMs", 2405.21060, sections 5 and 6.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.flops import flops_of
from stu.ops.forms import budget, choose, chunks
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.transforms import owned, plain_gradients, transformed

Algorithm = Literal["auto", "sequential", "parallel"]
ENTRIES_ON_CPU = 1 << 18  # of M at a time; there are several matrices of its size
CHUNKS_AT_ONCE = 64  # whose states are one product; those of more are products over blocks of chunks and over blocks
PRODUCT_AT_ONCE = 1 << 30  # multiplications that take less time than the launches of another level


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
    algorithm: Algorithm = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = h_tᵀ C_t + D x_t with h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ, without a loop over time.

    x: (B, L, H, P); dt: (B, L, H); A, D: (H,), with dt·A ≤ 0; B, C: (B, L, G, N), heads 0 … R − 1 have those of group
    0; initial: the state before the first step, (B, H, N, P), zeros where None; chunk_size: the longest chunk;
    algorithm: "sequential" from chunk to chunk, "parallel" over all chunks, or "auto", the one that suits the device.
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
        y, final, _ = form(*inputs, chunk_size, choose(algorithm, x, "sequential", "parallel"))
        return torch.addcmul(y, D.to(dtype).unsqueeze(-1), inputs[0]).to(x.dtype), final


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
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssd` without D, and the states that enter the chunks, which the backward pass needs."""
    with no_autocast(x):
        y, final, entering = _chunkwise(x, dt, A, B, C, initial, chunk_size, algorithm)
        return owned(y), owned(final), owned(entering)


@_ssd.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, width), (groups, d_state) = x.shape, B.shape[2:]
    chunks = batch * -(-length // chunk_size)
    states = x.new_empty(chunks, groups, d_state, heads // groups * width)
    return x.new_empty(x.shape), x.new_empty(batch, heads, d_state, width), states


def _chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Inside each chunk by M itself, between them by the states."""
    batch, length, _, width = x.shape
    groups = B.shape[2]
    x, dt, B, C = (_chunked(signal, chunk_size) for signal in (x, dt, B, C))  # each (F, Q, …)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (F, G, Q, N)
    slices = _slices(x)
    decay = _decays(dt * A, groups, algorithm, slices)
    added = B.mT @ _by_group(x * (dt * decay.to_end).unsqueeze(-1), groups)  # (F, G, N, RP)
    entering, final = _carried(added, decay.total, initial, algorithm)
    parts = []
    for f in slices:
        mixing = _scores(B[f], C[f]) * decay.pairs(f)  # (F, G, R, Q, Q)
        drive = x[f] * dt[f].unsqueeze(-1)
        between = _by_head(C[f] @ entering[f], width) * decay.from_start[f].unsqueeze(-1)
        parts.append(between + (mixing.flatten(1, 2) @ drive.transpose(1, 2)).transpose(1, 2))
    y = parts[0] if len(parts) == 1 else torch.cat(parts or [x])
    return _sequences(y, batch, length), final, entering


@torch.library.custom_op("stu::ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    entering: Tensor,
    chunk_size: int,
    algorithm: str,
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
        slices = _slices(x)
        decay = _decays(dt * A, groups, algorithm, slices)
        read = dy * decay.from_start.unsqueeze(-1)
        dfinal = torch.zeros_like(initial) if dfinal is None else dfinal
        added = C.mT @ _by_group(read, groups)
        leaving, dinitial = _carried(added, decay.total, dfinal, algorithm, backwards=True)

        def inside(f: slice) -> tuple[Tensor, ...]:
            """The gradients of x, Δ, Δ A, B and C of some chunks."""
            drive, to_end = x[f] * dt[f].unsqueeze(-1), decay.to_end[f].unsqueeze(-1)
            ddrive, dscores, crossing = _within(drive, dy[f], _scores(B[f], C[f]), decay.pairs(f))
            dwritten = _by_head(B[f] @ leaving[f], width) * to_end
            dsteps = crossing_sums(
                crossing,
                (_by_head(C[f] @ entering[f], width) * read[f]).sum(-1),
                (dwritten * drive).sum(-1),
                (entering[f] * leaving[f]).unflatten(-1, (-1, width)).sum((2, 4)).flatten(1) * decay.total[f].exp(),
            )
            ddrive += dwritten
            dB = dscores.mT @ C[f] + _by_group(drive * to_end, groups) @ leaving[f].mT
            dC = dscores @ B[f] + _by_group(read[f], groups) @ entering[f].mT
            ddt = torch.addcmul((ddrive * x[f]).sum(-1), dsteps, A)
            return ddrive * dt[f].unsqueeze(-1), ddt, dsteps, dB, dC

        if len(slices) == 1:
            dx, ddt, dsteps, dB, dC = inside(*slices)
        else:
            dx, ddt, dsteps, dB, dC = wholes = tuple(map(torch.empty_like, (x, dt, dt, B, C)))
            for f in slices:
                for whole, part in zip(wholes, inside(f), strict=True):
                    whole[f] = part
        dA = (dsteps * dt).sum((0, 1))
        by_time = (dx, ddt, dB.transpose(1, 2), dC.transpose(1, 2))
        dx, ddt, dB, dC = (owned(_sequences(signal, batch, length)) for signal in by_time)
        return dx, ddt, dA, dB, dC, owned(dinitial)


@_ssd_backward.register_fake
def shapes_of_gradients(dy: Tensor, dfinal: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """Of a backward pass that gets the inputs and the states that enter the chunks: as the inputs."""
    *signals, _entering, _chunk_size, _algorithm = inputs
    return tuple(like.new_empty(like.shape) for like in signals)


def save_states(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what that backward pass gets."""
    *tensors, ctx.chunk_size, ctx.algorithm = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # the states seldom have any


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dentering: Tensor | None) -> tuple[Any, ...]:
    *inputs, entering = ctx.saved_tensors
    options = ctx.chunk_size, ctx.algorithm
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    if torch.is_grad_enabled() or transformed(dy, dfinal):
        grads = dy, *(torch.zeros_like(x) if g is None else g for g, x in ((dfinal, inputs[-1]), (dentering, entering)))
        return plain_gradients(_chunkwise, (*inputs, *options), grads)
    return *_ssd_backward(dy, dfinal, *inputs, entering, *options), None, None


_ssd.register_autograd(_backward, setup_context=save_states)


@flops_of(_ssd)
def _flops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any, **_: Any) -> int:
    *_tensors, chunk_size, algorithm = rest
    chunks, chunk, states, scores, within = _sizes(x, B, chunk_size)
    carried = 0 if algorithm == "sequential" else _propagated_flops(len(x), chunks, states)
    return 2 * chunks * chunk * (2 * states + scores + within) + carried


@flops_of(_ssd_backward)
def _backward_flops(dy: Tensor, dfinal: Tensor | None, *inputs: Any, **_: Any) -> int:
    x, _dt, _A, B, *_tensors, chunk_size, algorithm = inputs
    chunks, chunk, states, scores, within = _sizes(x, B, chunk_size)
    carried = 0 if algorithm == "sequential" else _propagated_flops(len(x), chunks, states)
    return 2 * chunks * chunk * (5 * states + 3 * scores + 2 * within) + carried


def _sizes(x: Tensor, B: Tensor, chunk_size: int) -> tuple[int, int, int, int, int]:
    """F, Q, and the size per step of all states, of the scores' products and of those of M."""
    (batch, length, heads, width), (groups, d_state) = x.shape, B.shape[2:]
    count = -(-length // chunk_size)
    chunk = -(-length // count)
    return batch * count, chunk, heads * width * d_state, groups * chunk * d_state, heads * chunk * width


def _propagated_flops(batch: int, chunks: int, states: int) -> int:
    """Of `_propagated`: `chunks` of all sequences, and the size of the states of one."""
    count = chunks // max(1, batch)
    if _is_one_product(count, batch * (count + 1) * states):
        return 2 * batch * states * (count + 1) ** 2
    blocks, block = _evenly(count, math.isqrt(count - 1) + 1)
    inside = block * (block + 2)
    return 2 * batch * blocks * states * inside + _propagated_flops(batch, batch * blocks, states)


# --- chunks ---


class _Decay(NamedTuple):
    """exp Σ Δ_r A over parts of each chunk: up to and including t, after t (F, Q, H), all of it; and between its steps.

    total: the sum itself (F, H). pairs: of slices of the chunks, (F, G, R, Q, Q), exp Σ_{s<r≤t} Δ_r A for s ≤ t and one
    where s > t.
    """

    from_start: Tensor
    to_end: Tensor
    total: Tensor
    pairs: Callable[[slice], Tensor]


def _evenly(length: int, most: int) -> tuple[int, int]:
    """How many chunks of at most so many steps there are, and the length of each, as even as can be."""
    count = -(-length // most)
    return count, -(-length // count)


def _chunked(signal: Tensor, chunk_size: int) -> Tensor:
    """(B, L, …) → (F, Q, …), Q ≤ chunk_size as even as can be; padded with zeros, which change no state as Δ = 0."""
    count, chunk = _evenly(signal.shape[1], chunk_size)
    if spare := count * chunk - signal.shape[1]:  # padding by nothing would copy
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


def _decays(steps: Tensor, groups: int, algorithm: str, slices: list[slice]) -> _Decay:
    """The decays of all chunks from Δ_t A (F, Q, H), whose matrices will be asked for in these slices."""
    if algorithm == "parallel" and len(slices) == 1:
        sums = segment_sums(steps.mT)  # (F, H, Q, 1 + Q)
        total = sums[..., -1, 0].clone()
        decays = sums.exp_()
        from_start, to_end = decays[..., 0].mT, decays[..., -1, 1:].mT
        return _Decay(from_start, to_end, total, lambda _: decays[..., 1:].unflatten(1, (groups, -1)))
    sums = _running_sums(steps)
    total = sums[:, :, -1].sum(0)
    to_end = (sums[:, :, -1:] - sums).sum(0).exp()
    return _Decay(sums.sum(0).exp(), to_end, total, lambda f: _pair_decays(sums[:, f], groups))


def segment_sums(steps: Tensor, diagonal: int = 0) -> Tensor:
    """[t, s] = Σ_r steps_r from r = s − diagonal to t, zero where there is none: (…, Q) → (…, Q, Q + 1 + diagonal).

    All terms have the same sign: nothing cancels.
    """
    rows = steps.unsqueeze(-1).expand(*steps.shape, steps.shape[-1] + 1 + diagonal)
    return rows.tril(diagonal).cumsum(-2)


def _running_sums(steps: Tensor) -> Tensor:
    """Σ_{r≤t} steps_r of each chunk as a rounded sum and its rounding error: (F, Q, H) → (2, F, Q, H).

    A decay is the difference of two such sums. One step of a large Δ, which forgets everything, makes all later sums
    large, and rounded to float32 alone they would no longer resolve small steps. The error of one addition can be
    computed exactly from rounded numbers (Knuth's TwoSum).
    """
    sums = steps.cumsum(1)
    before = F.pad(sums[:, :-1], (0, 0, 1, 0))
    added = before + steps
    seen = added - before
    lost = (before - (added - seen)) + (steps - seen)
    return torch.stack((sums, (added - sums + lost).cumsum(1)))


def _pair_decays(sums: Tensor, groups: int) -> Tensor:
    """The matrices of `_Decay.pairs` from running sums (2, F, Q, H)."""
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


def _carried(
    added: Tensor, total: Tensor, start: Tensor, algorithm: str, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """state_{c+1} = exp(total_c) state_c + added_c, or from the last chunk to the first.

    (F, G, N, RP), (F, H), (B, H, N, P) → the state that enters each chunk, like `added`, and the last one.
    """
    groups, width = added.shape[1], start.shape[3]
    count = len(added) // len(start) if len(start) else 1
    added, total = (t.unflatten(0, (len(start), count)) for t in (added, total))
    if algorithm == "parallel":
        by_head = added.unflatten(-1, (-1, width)).permute(0, 2, 4, 1, 3, 5)  # (B, G, R, c, N, P)
        points = _joined(start.unflatten(1, (groups, -1)).unsqueeze(3), by_head, 3, backwards=backwards)
        entering, final = _propagated(total.mT, points.flatten(1, 2).flatten(3), backwards=backwards)
        entering = entering.unflatten(1, (groups, -1)).unflatten(-1, (-1, width)).permute(0, 3, 1, 4, 2, 5)
        return entering.flatten(4).flatten(0, 1), final.clone().view_as(start)
    through = _by_group(total.exp().flatten(0, 1)[:, None, :, None].expand(-1, -1, -1, width), groups)
    through = through.unflatten(0, (-1, count))
    states = [_by_group(start.transpose(1, 2), groups)]
    for c in reversed(range(count)) if backwards else range(count):
        states.append(torch.addcmul(added[:, c], through[:, c], states[-1]))
    final = _by_head(states.pop(), width).transpose(1, 2)
    return torch.stack(states[::-1] if backwards else states, 1).flatten(0, 1), final


def _propagated(total: Tensor, points: Tensor, *, backwards: bool) -> tuple[Tensor, Tensor]:
    """state_0 = points_0, state_{c+1} = exp(total_c) state_c + points_{c+1}; the first c states, and the last one.

    (B, H, …, c), (B, H, …, 1 + c, M) → (B, H, …, c, M), (B, H, …, M). Backwards, from the last point to the first, it
    is the adjoint.
    """
    count = total.shape[-1]
    first, last = (-1, 0) if backwards else (0, -1)
    kept, added = (slice(1, None), slice(None, -1)) if backwards else (slice(None, -1), slice(1, None))
    if _is_one_product(count, points.numel()):
        states = _between(total, backwards=backwards) @ points
        return states[..., kept, :], states[..., last, :]
    blocks, block = _evenly(count, math.isqrt(count - 1) + 1)
    start, chunks = points[..., first, :].unsqueeze(-2), points[..., added, :]
    if spare := blocks * block - count:
        chunks, total = F.pad(chunks, (0, 0, 0, spare)), F.pad(total, (0, spare))
    chunks, total = chunks.unflatten(-2, (blocks, block)), total.unflatten(-1, (blocks, block))
    between = _between(total, backwards=backwards)
    # contiguous: of the rows of a transposed matrix, a CPU makes a product each
    ends = (between[..., last, added].unsqueeze(-2).contiguous() @ chunks).squeeze(-2)
    starts, final = _propagated(total.sum(-1), _joined(start, ends, -2, backwards=backwards), backwards=backwards)
    states = between[..., kept, :] @ _joined(starts.unsqueeze(-2), chunks, -2, backwards=backwards)
    return states.flatten(-3, -2)[..., :count, :], final


def _is_one_product(count: int, numbers: int) -> bool:
    """Whether states of so many chunks, of so many numbers together, are to be one product."""
    return count <= CHUNKS_AT_ONCE or numbers * count <= PRODUCT_AT_ONCE


def _between(total: Tensor, *, backwards: bool) -> Tensor:
    """The decays exp Σ_{k<r≤z} total_r from state k to state z ≥ k: (…, c) → (…, 1 + c, 1 + c).

    [z, k], or backwards [k, z]; zero for z < k.
    """
    decays = segment_sums(torch.cat((total[..., :1], total), -1), -1).exp_().tril()
    return decays.mT if backwards else decays


def _joined(start: Tensor, added: Tensor, dim: int, *, backwards: bool) -> Tensor:
    """The points of `_propagated`: what there is at the start, and what is added after it, in their order of time."""
    return torch.cat((added, start) if backwards else (start, added), dim)


def _within(drive: Tensor, dy: Tensor, scores: Tensor, decays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass through M inside chunks, from drive and dy (F, Q, H, P).

    Returns gradients of the drive, like it, and of the scores (F, G, Q, Q), and dM ∘ M of each head after a column for
    the entering state, to be filled: (F, H, Q, 1 + Q).
    """
    by_head = dy.transpose(1, 2).contiguous()  # (F, H, Q, P)
    ddrive = (scores * decays).flatten(1, 2).mT @ by_head
    dmixing = (by_head @ drive.permute(0, 2, 3, 1)).view_as(decays).mul_(decays)
    dscores = dmixing.sum(2).tril_()
    length, heads = drive.shape[1:3]
    crossing = drive.new_empty(len(drive), heads, length, 1 + length)
    torch.mul(dmixing.flatten(1, 2), scores.expand_as(decays).flatten(1, 2), out=crossing[..., 1:])
    return ddrive.transpose(1, 2), dscores, crossing


def crossing_sums(pairs: Tensor, read: Tensor, written: Tensor, through: Tensor) -> Tensor:
    """Σ over everything that crosses t, (F, Q, H). Fills `pairs`.

    pairs: (F, H, Q, 1 + Q), from a step s < t, in column 1 + s, to a step ≥ t; read: (F, Q, H), from the entering state
    to a step ≥ t; written: (F, Q, H), from a step before t to the leaving state; through: (F, H).
    """
    pairs[..., 0] = read.mT
    pairs[..., -1, 1:] += written.mT
    pairs[..., -1, 0] += through
    return pairs.cumsum(-1).tril_().sum(-2)[..., :-1].mT


def _slices(x: Tensor) -> list[slice]:
    """Slices of the chunks (F, Q, H, P), by the size of their matrices M of all heads."""
    return chunks(len(x), x.shape[2] * x.shape[1] ** 2, budget(x, ENTRIES_ON_CPU, arrays=6))
