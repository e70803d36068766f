r"""Linear systems x_t = A x_{t−1} + B u_t, y_t = C x_t without a loop over time: impulse responses and states.

B batch, L length, D channels, each with a system of its own, N state size, H outputs, M inputs, T block length

    k_l = C A^l B,    x_L = A^L x_0 + Σ_l A^{L−1−l} B u_l

Split at l = iT + j, k_l = (C A^{iT}) (A^j B): two tables of about √L powers each and one matrix product per channel, in
which no array has L·N entries. A may be dense: then tables grow by doubling, [X, A^m X] after m columns X, then
A^{2m} = A^m A^m. For a diagonal A the powers alone are doubled, with a gradient of one pass, and then multiplied with B
and C; k is a product with a Vandermonde matrix, as in S4D.

The tables are float64 where the device has it: they are small, and A^l magnifies the rounding of A by l.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.padding import at_end
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.transforms import compiled_as_one, transformed

Product = Callable[[Tensor, Tensor], Tensor]


def diagonal_kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """k_l = 2 Re Σ_n c_n a_n^l b_n: one mode of each conjugate pair.

    a, b: complex (D, N); c: complex (H, D, N). Returns (H, L, D), real.
    """
    return diagonal_responses(a, b.unsqueeze(0), c, length).squeeze(1).mT


@compiled_as_one("diagonal_responses", lambda a, b, c, length: (len(c), len(b), len(a), length))
def diagonal_responses(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """The kernels of every output for every input: complex (D, N), (M, D, N), (H, D, N) → real (H, M, D, L)."""
    with no_autocast(a):
        block = block_length(length)
        powers, next_power = _powers(a, block)
        rows, _ = _powers(conjugate(next_power), -(-length // block))  # Re xy is the scalar product of x* and y
        row_parts = _real_and_imaginary(_scaled_powers(2 * conjugate(c), rows))
        return _kernel_product(row_parts, _real_and_imaginary(_scaled_powers(b, powers)), length)


def diagonal_state(
    a: Tensor, b: Tensor, u: Tensor, mask: Tensor | None = None, initial: Tensor | None = None
) -> Tensor:
    """x_L of each mode: complex (D, N), (D, N) and real u (B, L, D), zero in the padding → complex (B, D, N).

    mask: (B, L), True where a step is taken; L is a sequence's number of those. initial: x_0 (B, D, N), or None: zeros.
    """
    with no_autocast(a):
        powers, next_power = _powers(a, block_length(u.shape[1]))
        columns = _real_and_imaginary(_scaled_powers(b.unsqueeze(0), powers)).squeeze(2)
        ends = torch.complex(*_block_ends(columns, at_end(u, mask)).chunk(2, 1))
        forced = _final_state(torch.mul, _squares(torch.mul, next_power.unsqueeze(-1)), ends)
        return forced if initial is None else forced + diagonal_advance(a, initial, u.shape[1], mask)


def diagonal_advance(a: Tensor, x: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    """a^L x: complex (…, N), (B, …, N) → (B, …, N); a sequence's own L where there is a mask (B, L)."""
    return _advanced(torch.mul, _squares(torch.mul, a.unsqueeze(-1)), x, length, mask)


@compiled_as_one("dense_kernel", lambda A, B, C, length: (len(C), length, len(A)))
def dense_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """k_l = C A^l B: real A (D, N, N), B (D, N), C (H, D, N). Returns (H, L, D).

    Exact to rounding where the powers of A stay bounded. O(log L · D·N³) time on top of O(L·D·N).
    """
    with no_autocast(A):
        powers = _squares(torch.matmul, A)
        columns = _table(powers, B.unsqueeze(-1), block_length(length))
        transposed = (power.mT for power in powers)
        rows = _table(transposed, C.movedim(0, -1), -(-length // columns.shape[-1])).unflatten(2, (-1, len(C)))
        return _kernel_product(rows.mT, columns.unsqueeze(2), length).squeeze(1).mT


def dense_state(A: Tensor, B: Tensor, u: Tensor, mask: Tensor | None = None, initial: Tensor | None = None) -> Tensor:
    """x_L: real (D, N, N), (D, N), u (B, L, D) and x_0 (B, D, N) → (B, D, N); otherwise as `diagonal_state`."""
    with no_autocast(A):
        powers, again = itertools.tee(_squares(torch.matmul, A))
        columns = _table(powers, B.unsqueeze(-1), block_length(u.shape[1]))
        forced = _final_state(torch.matmul, powers, _block_ends(columns, at_end(u, mask)))
        return forced if initial is None else forced + _advanced(torch.matmul, again, initial, u.shape[1], mask)


def kernel_reference(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """k_l = C A^l B for dense A, real or complex, one power after the other; shapes as in `dense_kernel`."""
    kernel, x = [], B
    for _ in range(length):
        kernel.append((C * x).sum(-1))  # (H, D)
        x = (A @ x.unsqueeze(-1)).squeeze(-1)
    return torch.stack(kernel, 1)


def state_reference(A: Tensor, B: Tensor, u: Tensor, initial: Tensor | None = None) -> Tensor:
    """x_L for dense A, real or complex, one step after the other; shapes as in `dense_state`."""
    x = B.new_zeros(len(u), *B.shape) if initial is None else initial
    for u_t in u.unbind(1):
        x = (A @ x.unsqueeze(-1)).squeeze(-1) + B * u_t.unsqueeze(-1)
    return x


def conjugate(x: Tensor) -> Tensor:
    """No lazy one, which is lost inside an operator, and none that `vmap` does not know."""
    return torch.complex(x.real, -x.imag) if transformed(x) else x.conj_physical()


def block_length(length: int) -> int:
    """A power of two near √L."""
    return 1 << ((length - 1).bit_length() + 1) // 2


def _squares(product: Product, A: Tensor) -> Iterator[Tensor]:
    """A, A², A⁴, … on demand; `product` is torch.matmul for A (D, N, N) and torch.mul for a diagonal (D, N, 1)."""
    while True:
        yield A
        A = product(A, A)


def _table(powers: Iterator[Tensor], start: Tensor, count: int) -> Tensor:
    """[X, A X, A² X, …] of X = start (D, N, m): a power of two of them, `count` or more; (D, N, … · m)."""
    table, size = start, 1
    while size < count:
        table, size = torch.cat((table, next(powers) @ table), -1), 2 * size
    return table


def _powers(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """1, a, a², …, a power of two of them, `count` or more, and the next one: (D, N) → (D, N, T), (D, N)."""
    form = _plain_power_table if transformed(a) else _power_table
    table: Tensor = form(a, 1 << (count - 1).bit_length())
    return table, table[..., -1] * a


def _scaled_powers(factors: Tensor, powers: Tensor) -> Tensor:
    """(m, D, N), (D, N, T) → (D, N, m, T)."""
    return factors.movedim(0, -1).unsqueeze(-1) * powers.unsqueeze(2)


def _real_and_imaginary(x: Tensor) -> Tensor:
    """Real parts, then imaginary parts: complex (D, N, …) → (D, 2N, …)."""
    return torch.view_as_real(x).movedim(-1, 1).flatten(1, 2)


def _kernel_product(rows: Tensor, columns: Tensor, length: int) -> Tensor:
    """k_{iT+j} = row_i column_j: (D, N, H, i), (D, N, M, T) → (H, M, D, L)."""
    blocks = (rows.flatten(2).mT @ columns.flatten(2)).unflatten(2, columns.shape[2:]).unflatten(1, rows.shape[2:])
    return blocks.permute(1, 3, 0, 2, 4).flatten(3)[..., :length]


def _block_ends(columns: Tensor, u: Tensor) -> Tensor:
    """Σ_j column_{T−1−j} u_{iT+j}: the state at the end of each block that starts from zero: (D, N, i, B).

    The number of blocks is a power of two, for which u is padded with zeros in front. The product has the precision of
    u, float32 at least, as it is the one array as large as √L states.
    """
    block = columns.shape[-1]
    steps = 1 << (-(-u.shape[1] // block) - 1).bit_length()
    u = u.to(at_least_float32(u))
    blocks = F.pad(u, (0, 0, steps * block - u.shape[1], 0)).unflatten(1, (steps, block)).permute(3, 2, 1, 0)
    ends = columns.flip(-1).to(u.dtype) @ blocks.flatten(2)  # (D, N, i·B)
    return ends.unflatten(-1, (steps, -1)).to(columns.dtype)


def _final_state(product: Product, powers: Iterator[Tensor], ends: Tensor) -> Tensor:
    """Σ_i A^{T(n−1−i)} ends_i by pairs, then pairs of pairs; powers start at A^T: (D, N, n, B) → (B, D, N)."""
    while ends.shape[2] > 1:
        early, late = ends[:, :, 0::2], ends[:, :, 1::2]
        ends = product(next(powers), early.flatten(2)).view_as(late) + late
    return ends.squeeze(2).movedim(-1, 0)


def _advanced(product: Product, powers: Iterator[Tensor], x: Tensor, length: int, mask: Tensor | None) -> Tensor:
    """A^n x by the binary digits of n, `length` or the number of steps in the mask (B, L); powers start at A."""
    steps = torch.full((len(x),), length, device=x.device) if mask is None else mask.sum(1)
    x = x.movedim(0, -1)  # (…, N, B)
    for digit in range(length.bit_length()):
        x = torch.where((steps >> digit & 1).bool(), product(next(powers), x), x)
    return x.movedim(-1, 0)


# --- the table of powers, with a gradient of one pass ---


def _plain_power_table(a: Tensor, count: int) -> Tensor:
    table, power = torch.ones_like(a).unsqueeze(-1), a.unsqueeze(-1)
    while table.shape[-1] < count:
        table, power = torch.cat((table, table * power), -1), power * power
    return table


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


def _save_table(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output)


def _power_table_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """The adjoint of da → j a^{j−1} da: one pass, where autograd would go back through every doubling."""
    (table,) = ctx.saved_tensors
    exponent = torch.arange(1, table.shape[-1], dtype=table.real.dtype, device=table.device)
    return (grad[..., 1:] * table[..., :-1].conj() * exponent).sum(-1), None


_power_table.register_autograd(_power_table_backward, setup_context=_save_table)
