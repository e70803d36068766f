r"""Linear systems x_t = A x_{t−1} + B u_t, y_t = C x_t without a loop over time: impulse responses and states.

B batch, L length, D channels, each with a system of its own, N size of the state, H outputs, M inputs, R feedbacks, T
block length

    k_l = C A^l B,    x_L = Σ_l A^{L−1−l} B u_l

Split at l = iT + j, k_l = (C A^{iT}) (A^j B): two tables of about √L powers each and one matrix product a channel, in
which no array has L·N entries. A may be dense: then tables grow by doubling, [X, A^m X] after m columns X, then
A^{2m} = A^m A^m. Of a diagonal A the powers alone are doubled, with a gradient of one pass, and then multiplied with B
and C; k is a product with a Vandermonde matrix, as in S4D.

The tables are float64 where the device has it: they are small, and A^l magnifies the rounding of A by l.

A feedback of low rank is closed on the responses themselves. Where input r is fed −1 times output r, the responses of
outputs i to inputs j, as power series in the delay z cut at z^L, become

    K_ij ← K_ij − K_ir (1 + K_rr)^{−1} K_rj

one r after the other. Products are convolutions, and Newton's iteration finds the reciprocal, all in O(L log L).
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.errors import require
from stu.ops.long_convolution import fft_length, long_convolution

Discretization = Literal["zoh", "bilinear"]
Times = Callable[[Tensor, Tensor], Tensor]


def widened(x: Tensor) -> Tensor:
    """In float64, or in float32 on a device that has no more."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def complex_parameter(x: Tensor) -> Tensor:
    """The complex numbers a real parameter (…, 2) holds, widened."""
    return torch.view_as_complex(widened(x).contiguous())


def discretize(A: Tensor, dt: Tensor, method: Discretization) -> tuple[Tensor, Tensor]:
    """Ā and the factor of B that makes B̄, for diagonal A (…, N) and steps dt that broadcast with it.

    zoh: Ā = e^{dt·A}, B̄ = (e^{dt·A} − 1)/A · B. bilinear: Ā = (1 + dt·A/2)/(1 − dt·A/2), B̄ = dt/(1 − dt·A/2) · B.
    """
    if method == "zoh":
        z = dt * A
        zero = z == 0  # there (e^z − 1)/z is 1
        return torch.exp(z), dt * torch.where(zero, 1, torch.expm1(z) / torch.where(zero, 1, z))
    require(method == "bilinear", "discretization", method, "must be zoh or bilinear")
    gain = dt / (1 - dt * A / 2)
    return 1 + gain * A, gain


def diagonal_kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """k_l = 2 Re Σ_n c_n a_n^l b_n: one mode of each conjugate pair.

    a, b: complex (D, N); c: complex (H, D, N). Returns (H, L, D), real.
    """
    return diagonal_responses(a, b.unsqueeze(0), c, length).squeeze(1).mT


def diagonal_responses(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """The kernels of every output for every input: complex (D, N), (M, D, N), (H, D, N) → real (H, M, D, L)."""
    with torch.autocast(a.device.type, enabled=False):
        block = _block(length)
        powers, past = _powers(a, block)
        rows, _ = _powers(past.conj(), -(-length // block))  # Re xy is the scalar product of x* and y
        return _product(_planes(_times(2 * c.conj(), rows)), _planes(_times(b, powers)), length)


def diagonal_state(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """x_L = Σ_l a^{L−1−l} b u_l of each mode: complex (D, N), (D, N) and real u (B, L, D) → complex (B, D, N)."""
    with torch.autocast(a.device.type, enabled=False):
        powers, past = _powers(a, _block(u.shape[1]))
        columns = _planes(_times(b.unsqueeze(0), powers)).squeeze(2)
        ends = torch.complex(*_block_ends(columns, u).chunk(2, 1))
        return _final_state(torch.mul, _squares(torch.mul, past.unsqueeze(-1)), ends)


def dense_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """k_l = C A^l B: real A (D, N, N), B (D, N), C (H, D, N). Returns (H, L, D).

    Exact to rounding where the powers of A stay bounded. O(log L · D·N³) time on top of O(L·D·N).
    """
    with torch.autocast(A.device.type, enabled=False):
        powers = _squares(torch.matmul, A)
        columns = _table(powers, B.unsqueeze(-1), _block(length))
        transposed = (power.mT for power in powers)
        rows = _table(transposed, C.movedim(0, -1), -(-length // columns.shape[-1])).unflatten(2, (-1, len(C)))
        return _product(rows.mT, columns.unsqueeze(2), length).squeeze(1).mT


def dense_state(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """x_L = Σ_l A^{L−1−l} B u_l: real (D, N, N), (D, N) and u (B, L, D) → (B, D, N)."""
    with torch.autocast(A.device.type, enabled=False):
        powers = _squares(torch.matmul, A)
        columns = _table(powers, B.unsqueeze(-1), _block(u.shape[1]))
        return _final_state(torch.matmul, powers, _block_ends(columns, u))


def closed_loop(responses: Tensor, rank: int) -> Tensor:
    """The responses once the last R inputs are fed −1 times the last R outputs: (H + R, M + R, D, L) → (H, M, D, L).

    Well conditioned for a passive feedback, whose R by R responses K have Re K ≥ 0 inside the unit circle: there
    |1 + K_rr| ≥ 1 for the first r, and for the others still when it is closed.
    """
    for _ in range(rank):
        *outputs, (*seen, loop) = (row.unbind() for row in responses.unbind())
        fed_back = _quotient(torch.stack(seen), loop, reciprocal(loop))  # (M + R − 1, D, L)
        rows = [torch.stack(inputs) - _series_product(fed_back, kernel) for *inputs, kernel in outputs]
        responses = torch.stack(rows)
    return responses


def reciprocal(series: Tensor) -> Tensor:
    """The power series 1/(1 + s) of every channel, cut at z^L: (D, L) → (D, L).

    Differentiable any number of times.
    """
    v: Tensor = _reciprocal(series)
    return v


def kernel_reference(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """k_l = C A^l B for dense A, real or complex, one power after the other; shapes as in `dense_kernel`."""
    kernel, x = [], B
    for _ in range(length):
        kernel.append((C * x).sum(-1))  # (H, D)
        x = (A @ x.unsqueeze(-1)).squeeze(-1)
    return torch.stack(kernel, 1)


def state_reference(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """x_L for dense A, real or complex, one step after the other; shapes as in `dense_state`."""
    x = B.new_zeros(len(u), *B.shape)
    for u_t in u.unbind(1):
        x = (A @ x.unsqueeze(-1)).squeeze(-1) + B * u_t.unsqueeze(-1)
    return x


def _block(length: int) -> int:
    """A power of two near √L."""
    return 1 << ((length - 1).bit_length() + 1) // 2


def _squares(times: Times, A: Tensor) -> Iterator[Tensor]:
    """A, A², A⁴, … on demand; `times` is torch.matmul for A (D, N, N) and torch.mul for a diagonal (D, N, 1)."""
    while True:
        yield A
        A = times(A, A)


def _table(powers: Iterator[Tensor], start: Tensor, count: int) -> Tensor:
    """[X, A X, A² X, …] of X = start (D, N, m): a power of two of them, `count` or more; (D, N, … · m)."""
    table, size = start, 1
    while size < count:
        table, size = torch.cat((table, next(powers) @ table), -1), 2 * size
    return table


def _powers(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """1, a, a², …, a power of two of them, `count` or more, and the one behind them: (D, N) → (D, N, T), (D, N)."""
    table: Tensor = _power_table(a, 1 << (count - 1).bit_length())
    return table, table[..., -1] * a


def _times(factors: Tensor, powers: Tensor) -> Tensor:
    """(m, D, N), (D, N, T) → (D, N, m, T)."""
    return factors.movedim(0, -1).unsqueeze(-1) * powers.unsqueeze(2)


def _planes(x: Tensor) -> Tensor:
    """Real parts, then imaginary parts: complex (D, N, …) → (D, 2N, …)."""
    return torch.view_as_real(x).movedim(-1, 1).flatten(1, 2)


def _product(rows: Tensor, columns: Tensor, length: int) -> Tensor:
    """k_{iT+j} = row_i column_j: (D, N, H, i), (D, N, M, T) → (H, M, D, L)."""
    blocks = (rows.flatten(2).mT @ columns.flatten(2)).unflatten(2, columns.shape[2:]).unflatten(1, rows.shape[2:])
    return blocks.permute(1, 3, 0, 2, 4).flatten(3)[..., :length]


def _block_ends(columns: Tensor, u: Tensor) -> Tensor:
    """Σ_j column_{T−1−j} u_{iT+j}: the state at the end of each block, had it begun at zero: (D, N, i, B).

    The number of blocks is a power of two, for which zeros precede u. The product has the precision of u, float32 at
    least, as it is the one array as large as √L states.
    """
    block = columns.shape[-1]
    steps = 1 << (-(-u.shape[1] // block) - 1).bit_length()
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    blocks = F.pad(u, (0, 0, steps * block - u.shape[1], 0)).unflatten(1, (steps, block)).permute(3, 2, 1, 0)
    ends = columns.flip(-1).to(u.dtype) @ blocks.flatten(2)  # (D, N, i·B)
    return ends.unflatten(-1, (steps, -1)).to(columns.dtype)


def _final_state(times: Times, powers: Iterator[Tensor], ends: Tensor) -> Tensor:
    """Σ_i A^{T(n−1−i)} ends_i by pairs, then pairs of pairs; powers begin at A^T: (D, N, n, B) → (B, D, N)."""
    while ends.shape[2] > 1:
        early, late = ends[:, :, 0::2], ends[:, :, 1::2]
        ends = times(next(powers), early.flatten(2)).view_as(late) + late
    return ends.squeeze(2).movedim(-1, 0)


def _series_product(x: Tensor, y: Tensor) -> Tensor:
    """The product of power series, cut at z^L: (M, D, L), (D, L) → (M, D, L)."""
    return long_convolution(x.mT, y.mT).mT


@torch.library.custom_op("stu::power_table", mutates_args=())
def _power_table(a: Tensor, count: int) -> Tensor:
    """1, a, … a^{count − 1}, by doubling in place: (D, N) → (D, N, T)."""
    table = torch.ones(*a.shape, count, dtype=a.dtype, device=a.device)
    power, size = a.unsqueeze(-1), 1
    while size < count:
        torch.mul(table[..., :size], power, out=table[..., size : 2 * size])
        power, size = power * power, 2 * size
    return table


@_power_table.register_fake
def _(a: Tensor, count: int) -> Tensor:
    return a.new_empty(*a.shape, count)


def _save_output(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output)


def _backward_of_power_table(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """The adjoint of da → j a^{j−1} da: one pass, where autograd would go back through every doubling."""
    (table,) = ctx.saved_tensors
    exponent = torch.arange(1, table.shape[-1], dtype=table.real.dtype, device=table.device)
    return (grad[..., 1:] * table[..., :-1].conj() * exponent).sum(-1), None


_power_table.register_autograd(_backward_of_power_table, setup_context=_save_output)


@torch.library.custom_op("stu::reciprocal", mutates_args=())
def _reciprocal(series: Tensor) -> Tensor:
    """Newton's iteration, v − v ∗ ((1 + s) ∗ v − 1): each step doubles the entries that are right.

    Of (1 + s) ∗ v − 1, the entries where v is right already are rounding and left out, which halves the FFTs. One more
    step then takes the rounding out of all entries.
    """
    length = series.shape[1]
    rows = series.clone(memory_format=torch.contiguous_format)
    rows[:, 0] += 1
    v, sizes = 1 / rows[:, :1], [length]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    for size in sizes[-2::-1]:
        known, n = v.shape[1], fft_length(2 * v.shape[1])
        spectrum = torch.fft.rfft(v, n=n)
        error = _filtered(rows[:, :size], spectrum, n)[:, known:size]  # the sums that n is too short for come before
        v = torch.cat((v, -_filtered(error, spectrum, n)[:, : size - known]), 1)
    n = fft_length(2 * length)
    spectrum = torch.fft.rfft(v, n=n)
    error = _filtered(rows, spectrum, n)[:, :length]
    error[:, 0] -= 1
    return v - _filtered(error, spectrum, n)[:, :length]


@_reciprocal.register_fake
def _(series: Tensor) -> Tensor:
    return torch.empty_like(series, memory_format=torch.contiguous_format)


def _save_reciprocal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output)
    ctx.set_materialize_grads(False)


def _backward_of_reciprocal(ctx: Any, grad: Tensor | None) -> Tensor | None:
    """The adjoint of ds → −v ∗ v ∗ ds; nothing, where 1/(1 + s) was but a help."""
    if grad is None:
        return None
    (v,) = ctx.saved_tensors
    squared = _series_product(v.unsqueeze(0), v)
    return -_series_product(grad.flip(1).unsqueeze(0), squared.squeeze(0)).squeeze(0).flip(1)


_reciprocal.register_autograd(_backward_of_reciprocal, setup_context=_save_reciprocal)


@torch.library.custom_op("stu::series_quotient", mutates_args=())
def _quotient(x: Tensor, series: Tensor, v: Tensor) -> Tensor:
    """x/(1 + s) with v = 1/(1 + s) as a help: (M, D, L), (D, L), (D, L) → (M, D, L).

    The gradient of s comes from the quotient q itself, −g/(1 + s) ∗ q, and none from v: fewer FFTs, half for one x.
    """
    return _series_product(x, v)


@_quotient.register_fake
def _(x: Tensor, series: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(x.mT).mT


def _save_quotient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], output)


def _backward_of_quotient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Adjoints run backwards in time; v, saved with its own history, makes them differentiable in s."""
    v, q = ctx.saved_tensors
    turned = _series_product(grad.flip(2), v)
    by_series = torch.cat([_series_product(g.unsqueeze(0), each) for g, each in zip(turned, q, strict=True)])
    return turned.flip(2), -by_series.sum(0).flip(1), None


_quotient.register_autograd(_backward_of_quotient, setup_context=_save_quotient)


def _filtered(x: Tensor, spectrum: Tensor, n: int) -> Tensor:
    """The circular convolution of rows x (D, …) with those of a spectrum (D, n/2 + 1): (D, n)."""
    return torch.fft.irfft(torch.fft.rfft(x, n=n).mul_(spectrum), n=n)
