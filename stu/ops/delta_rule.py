r"""The gated delta rule: a memory of keys and values that forgets and corrects itself, as products of matrices.

B batch, L length, H heads, N width of a key, P width of a value, c chunks of Q steps

    h_t = α_t (I − β_t k_t k_tᵀ) h_{t−1} + β_t k_t v_tᵀ,    y_t = h_tᵀ q_t      h (N, P), α_t = exp(g_t), β_t scalars

Written as h_t = α_t h_{t−1} + β_t k_t e_tᵀ, the errors e_t = v_t − α_t h_{t−1}ᵀ k_t of a chunk solve a triangular
system. With a_t = exp Σ_{r≤t} g_r and D_ts = exp Σ_{s<r≤t} g_r, h before the chunk, T below the diagonal of K Kᵀ ∘ D,

    (I + T β) [W_v, W_k] = [V, a K],   E = W_v − W_k h
    Y = a Q h + (Q Kᵀ ∘ D) β E,        h ← a_Q h + K̃ᵀ E = (a_Q I − K̃ᵀ W_k) h + K̃ᵀ W_v,   K̃_s = D_Qs β_s k_s

Only the state follows from chunk to chunk, which a CPU does one by one (`sequential`); otherwise its linear maps are
multiplied in a tree (`parallel`). All decays are sums of terms of one sign: nothing cancels, nothing is divided by.
What is formed of chunks is formed of a piece of the sequence at a time, so that memory is bounded at any length.
Source: Yang, Kautz, Hatamizadeh, "Gated delta networks", 2412.06464, section 3.3; the WY form is that of Yang, Wang,
Zhang, Shen, Kim, "Parallelizing linear transformers with the delta rule over sequence length", 2406.06484.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.flops import flops_of
from stu.ops.forms import budget, choose, chunks
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.ssd import Algorithm, crossing_sums, save_states, segment_sums, shapes_of_gradients
from stu.ops.transforms import owned, plain_gradients, transformed

ENTRIES_ON_CPU = 1 << 21  # of all arrays of a piece


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial: Tensor | None = None,
    *,
    chunk_size: int = 64,
    algorithm: Algorithm = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = h_tᵀ q_t with h_t = exp(g_t) (I − β_t k_t k_tᵀ) h_{t−1} + β_t k_t v_tᵀ, without a loop over time.

    q, k: (B, L, H, N), with β_t |k_t|² in 0 … 2; v: (B, L, H, P); beta: (B, L, H); log_decay: g ≤ 0, (B, L, H);
    initial: the state before the first step, (B, H, N, P), zeros where None; chunk_size: the longest chunk; algorithm:
    "sequential" from chunk to chunk, "parallel" in a tree over them, or "auto", the one that suits the device.
    Returns y (B, L, H, P) in v's dtype, and the state after the last step (B, H, N, P).

    Computed in float32 at least, the state included, whatever the dtypes or an enclosing autocast. One state per chunk
    is kept for the backward pass, which recomputes the rest.
    """
    dtype = at_least_float32(q, v, beta)
    if initial is None:
        initial = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    with no_autocast(v):
        inputs = [signal.to(dtype) for signal in (q, k, v, beta, log_decay, initial)]
        form: Callable[..., tuple[Tensor, Tensor, Tensor]] = _chunkwise if transformed(*inputs) else _gated_delta_rule
        y, final, _ = form(*inputs, chunk_size, choose(algorithm, v, "sequential", "parallel"))
        return y.to(v.dtype), final


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: q, k (B, H, N), v (B, H, P), beta, log_decay (B, H), state (B, H, N, P) → y (B, H, P), state."""
    q, k = q.unsqueeze(-1), k.unsqueeze(-1)
    state = log_decay.exp()[..., None, None] * state
    correction = beta.unsqueeze(-1) * (v - (k * state).sum(-2))
    state = state + k * correction.unsqueeze(-2)
    return (q * state).sum(-2), state


# --- the operator ---


@torch.library.custom_op("stu::gated_delta_rule", mutates_args=())
def _gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, initial: Tensor, chunk_size: int, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_delta_rule`, and the states that enter the chunks (B, H, c, N, P), which the backward pass needs."""
    with no_autocast(v):
        y, final, entering = _chunkwise(q, k, v, beta, log_decay, initial, chunk_size, algorithm)
        return owned(y), owned(final), owned(entering)


@_gated_delta_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, initial, chunk_size, algorithm = rest
    (batch, length, heads, width), d_state = v.shape, k.shape[3]
    count, _ = _sizes(length, chunk_size, algorithm)
    return v.new_empty(v.shape), v.new_empty(initial.shape), v.new_empty(batch, heads, count, d_state, width)


def _chunkwise(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, initial: Tensor, chunk_size: int, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors inside each chunk by the triangular system, between the chunks by the states."""
    count, chunk = _sizes(v.shape[1], chunk_size, algorithm)
    outputs, entering, state = [], [], initial
    for piece in _pieces(k, v, count, chunk, algorithm):
        signals = [signal[:, chunk * piece.start : chunk * piece.stop] for signal in (q, k, v, beta, log_decay)]
        parts = _parts(signals, piece.stop - piece.start, chunk)
        solved, through, added = _maps(parts)
        before, state = _propagated(through, added, state, algorithm)
        corrections = parts.beta * _errors(solved, before)
        y = parts.mixing @ corrections + parts.from_start * (parts.q @ before)
        outputs.append(_by_time(y, signals[2].shape[1]))
        entering.append(before)
    return _joined(outputs, 1), state, _joined(entering, 2)


@torch.library.custom_op("stu::gated_delta_rule_backward", mutates_args=())
def _gated_delta_rule_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial: Tensor,
    entering: Tensor,
    chunk_size: int,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, β, g and the initial state; the states were kept, all else is recomputed."""
    count, chunk = _sizes(v.shape[1], chunk_size, algorithm)
    found, dstate = [], torch.zeros_like(initial) if dfinal is None else dfinal
    with no_autocast(v):
        for piece in reversed(_pieces(k, v, count, chunk, algorithm)):
            time = slice(chunk * piece.start, chunk * piece.stop)
            signals = [signal[:, time] for signal in (q, k, v, beta, log_decay)]
            *gradients, dstate = _gradients(dy[:, time], signals, entering[:, :, piece], dstate, chunk, algorithm)
            found.append(gradients)
        dq, dk, dv, dbeta, dsteps = (owned(_joined(parts[::-1], 1)) for parts in zip(*found, strict=True))
        return dq, dk, dv, dbeta, dsteps, owned(dstate)


def _gradients(
    dy: Tensor, signals: Sequence[Tensor], entering: Tensor, dfinal: Tensor, chunk: int, algorithm: str
) -> tuple[Tensor, ...]:
    """Those of a piece: of its signals q, k, v, β, g, and of the state before it.

    Those of the steps g_t are sums over everything that crosses t, as in `stu.ops.ssd`.
    """
    length, sizes = dy.shape[1], (entering.shape[2], chunk)
    parts = _parts(signals, *sizes)
    both, q, k, v, beta, pairs, mixing, from_start, to_end, decay = parts
    solved, through, _ = _maps(parts)
    errors = _errors(solved, entering)
    corrections = beta * errors
    dy = _by_chunk(dy, *sizes)
    read, seen = from_start * dy, mixing.mT @ dy
    added = q.mT @ read - solved[..., v.shape[-1] :].mT @ (beta * seen)
    leaving, dinitial = _propagated(through.mT, added, dfinal, algorithm, backwards=True)
    dcorrections = torch.linalg.solve_triangular(
        (beta * pairs).mT, seen + (to_end * k) @ leaving, upper=True, unitriangular=True
    )
    dbeta, dv = (dcorrections * errors).sum(-1), beta * dcorrections
    dmixing, dpairs = dy @ corrections.mT, (dv @ corrections.mT).tril_(-1)  # the second with the other sign
    crossing = k.new_empty(*decay.shape[:-1], decay.shape[-1] + 1)
    torch.addcmul(dmixing * mixing, dpairs, pairs, value=-1, out=crossing[..., 1:])
    dmixing, dpairs = dmixing * decay, dpairs * decay
    dq_entering, dk_entering = read @ entering.mT, from_start * (dv @ entering.mT)
    dk_leaving = to_end * (corrections @ leaving.mT)
    dq = dq_entering + dmixing @ k
    dk = torch.cat((-dpairs - dpairs.mT, dmixing.mT), -1) @ both + dk_leaving - dk_entering
    dsteps = crossing_sums(
        crossing,
        torch.addcmul(dq_entering * q, dk_entering, k, value=-1).sum(-1).mT,
        (dk_leaving * k).sum(-1).mT,
        (entering * leaving).sum((-2, -1)) * from_start[..., -1, 0],
    ).mT
    return *(_by_time(each, length) for each in (dq, dk, dv, dbeta, dsteps)), dinitial


_gated_delta_rule_backward.register_fake(shapes_of_gradients)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dentering: Tensor | None) -> tuple[Any, ...]:
    *inputs, entering = ctx.saved_tensors
    options = ctx.chunk_size, ctx.algorithm
    dy = torch.zeros_like(inputs[2]) if dy is None else dy
    if torch.is_grad_enabled() or transformed(dy, dfinal):
        dfinal = torch.zeros_like(inputs[-1]) if dfinal is None else dfinal
        return plain_gradients(_outputs, (*inputs, *options), (dy, dfinal))
    return *_gated_delta_rule_backward(dy, dfinal, *inputs, entering, *options), None, None


def _outputs(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The plain form, without the states between chunks."""
    y, final, _ = _chunkwise(*inputs)
    return y, final


_gated_delta_rule.register_autograd(_backward, setup_context=save_states)


# --- chunks ---


def _pieces(k: Tensor, v: Tensor, count: int, chunk: int, algorithm: str) -> list[slice]:
    """The chunks of a piece, by the size of their matrices, pairs of vectors and maps; powers of two for trees."""
    (batch, _, heads, width), d_state = v.shape, k.shape[3]
    size = batch * heads * (10 * chunk**2 + (8 * chunk + 2 * d_state) * (width + d_state))
    most = max(1, budget(v, ENTRIES_ON_CPU, 1) // max(1, size))
    return chunks(count, 1, 1 << (most.bit_length() - 1) if algorithm == "parallel" else most)


def _joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


class _Parts(NamedTuple):
    """The chunks of all heads: k above q (B, H, c, 2Q, N), q, k, v (B, H, c, Q, …), β and what is like it (…, 1).

    pairs, mixing: K Kᵀ ∘ D and Q Kᵀ ∘ D, (B, H, c, Q, Q), zero above the diagonal. from_start: a. to_end: D_Qs.
    decay: D.
    """

    both: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    pairs: Tensor
    mixing: Tensor
    from_start: Tensor
    to_end: Tensor
    decay: Tensor


def _sizes(length: int, chunk_size: int, algorithm: str) -> tuple[int, int]:
    """How many chunks there are, a power of two where it is a tree, and the length of each: as even as can be."""
    count = -(-length // chunk_size)
    if algorithm == "parallel":
        count = 1 << (count - 1).bit_length()
    return count, -(-length // count)


def _by_chunk(signal: Tensor, count: int, chunk: int) -> Tensor:
    """(B, L, H, …) → (B, H, c, Q, …); padded with zeros, which are no steps as β and g are among them."""
    if spare := count * chunk - signal.shape[1]:  # padding by nothing would copy
        signal = F.pad(signal, (0, 0) * (signal.ndim - 2) + (0, spare))
    return signal.transpose(1, 2).unflatten(2, (count, chunk))


def _by_time(signal: Tensor, length: int) -> Tensor:
    """The inverse: (B, H, c, Q, …) → (B, L, H, …)."""
    return signal.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _parts(signals: Sequence[Tensor], count: int, chunk: int) -> _Parts:
    """Those of q, k, v, β and g."""
    q, k, v, beta, log_decay = (_by_chunk(signal, count, chunk) for signal in signals)
    decays = segment_sums(log_decay).exp().tril(1)  # (B, H, c, Q, 1 + Q)
    from_start, decay = decays[..., :1], decays[..., 1:]
    both = torch.cat((k, q), -2)
    k, q = both.chunk(2, -2)
    pairs, mixing = ((both @ k.mT).unflatten(3, (2, -1)) * decay.unsqueeze(3)).unbind(3)
    return _Parts(both, q, k, v, beta.unsqueeze(-1), pairs, mixing, from_start, decay[..., -1:, :].mT, decay)


def _maps(parts: _Parts) -> tuple[Tensor, Tensor, Tensor]:
    """[W_v, W_k] (B, H, c, Q, P + N), and what a chunk does to the state: h ← through h + added."""
    k, v, beta, from_start = parts.k, parts.v, parts.beta, parts.from_start
    right = torch.cat((v, from_start * k), -1)
    # only what is below the diagonal is read
    solved = torch.linalg.solve_triangular(parts.pairs * beta.mT, right, upper=False, unitriangular=True)
    added, taken = ((beta * parts.to_end * k).mT @ solved).split((v.shape[-1], k.shape[-1]), -1)
    kept = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) * from_start[..., -1:, :]
    return solved, kept - taken, added


def _errors(solved: Tensor, entering: Tensor) -> Tensor:
    """E = W_v − W_k h, (B, H, c, Q, P)."""
    width = entering.shape[-1]
    return solved[..., :width] - solved[..., width:] @ entering


def _propagated(
    through: Tensor, added: Tensor, start: Tensor, algorithm: str, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """h_{c+1} = through_c h_c + added_c, or from the last chunk to the first.

    (B, H, c, N, N), (B, H, c, N, P), (B, H, N, P) → the state that enters each chunk, like `added`, and the last one.
    """
    form = _by_tree if algorithm == "parallel" else _one_by_one
    if backwards:
        through, added = through.flip(2), added.flip(2)
    states, final = form(*(maps.flatten(0, 1) for maps in (through, added, start)))  # as B·H sequences
    states, final = states.unflatten(0, start.shape[:2]), final.unflatten(0, start.shape[:2])
    return states.flip(2) if backwards else states, final


def _one_by_one(through: Tensor, added: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    states = [start]
    for c in range(added.shape[1]):
        states.append(torch.baddbmm(added[:, c], through[:, c], states[-1]))
    final = states.pop()
    return torch.stack(states, 1), final


def _by_tree(through: Tensor, added: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The same by products of the maps of 2, 4, 8, … chunks; then the states between these, in the reverse order."""
    levels = (added.shape[1] - 1).bit_length()
    maps, offsets = [through], [added]
    while len(maps) < levels:
        (first, second), (one, two) = ((part[:, ::2], part[:, 1::2]) for part in (maps[-1], offsets[-1]))
        maps.append((second.flatten(0, 1) @ first.flatten(0, 1)).view_as(second))
        offsets.append(_mapped(second, one, two))
    states = torch.stack((start,), 1)
    for level in reversed(range(levels)):
        after = _mapped(maps[level][:, ::2], states, offsets[level][:, ::2])
        states = torch.stack((states, after), 2).flatten(1, 2)
    return states, torch.baddbmm(added[:, -1], through[:, -1], states[:, -1])


def _mapped(maps: Tensor, states: Tensor, offsets: Tensor) -> Tensor:
    """Maps · states + offsets, each (B·H, c, N, …), as one product."""
    return torch.baddbmm(*(part.flatten(0, 1) for part in (offsets, maps, states))).view_as(offsets)


@flops_of(_gated_delta_rule)
def _flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    *_tensors, chunk_size, algorithm = rest
    return _products(k, v, *_sizes(v.shape[1], chunk_size, algorithm), scores=2, solved=1, across=3)


@flops_of(_gated_delta_rule_backward)
def _backward_flops(dy: Tensor, dfinal: Tensor | None, *inputs: Any, **_: Any) -> int:
    _q, k, v, *_tensors, chunk_size, algorithm = inputs
    return _products(k, v, *_sizes(v.shape[1], chunk_size, algorithm), scores=5, solved=3, across=8)


def _products(k: Tensor, v: Tensor, count: int, chunk: int, *, scores: int, solved: int, across: int) -> int:
    """Of so many products Q·Q·N, Q·Q·P and Q·N·P in all chunks, one Q·N·N, and the map of each chunk to a state."""
    (batch, _, heads, width), d_state = v.shape, k.shape[3]
    within = chunk * chunk * (scores * d_state + solved * width) + chunk * d_state * (across * width + d_state)
    return 2 * batch * heads * count * (within + d_state**2 * width)
