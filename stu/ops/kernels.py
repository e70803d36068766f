r"""Linear systems x_t = A x_{t−1} + B u_t, y_t = C x_t without a loop over time: impulse responses and states.

B batch, L length, D channels, each with a system of its own, N size of the state, H outputs, T block length

    k_l = C A^l B,    x_L = Σ_l A^{L−1−l} B u_l

Split at l = iT + j, k_l = (C A^{iT}) (A^j B): two tables of about √L powers each and one matrix product a channel, in
which no array has L·N entries. Tables grow by doubling: [X, A^m X] after m columns X, then A^{2m} = A^m A^m. A may be
diagonal (k is then a product with a Vandermonde matrix, as in S4D) or dense.

The tables are float64 where the device has it: they are small, and A^l magnifies the rounding of A by l.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.errors import require

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
    with torch.autocast(a.device.type, enabled=False):
        powers = _squares(torch.mul, a.unsqueeze(-1))
        columns = _table(torch.mul, powers, b.unsqueeze(-1), _block(length))
        rows = _table(torch.mul, powers, c.movedim(0, -1), -(-length // columns.shape[-1]))
        return _product(_planes(2 * rows.conj()), _planes(columns), len(c), length)


def diagonal_state(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """x_L = Σ_l a^{L−1−l} b u_l of each mode: complex (D, N), (D, N) and real u (B, L, D) → complex (B, D, N)."""
    with torch.autocast(a.device.type, enabled=False):
        powers = _squares(torch.mul, a.unsqueeze(-1))
        columns = _table(torch.mul, powers, b.unsqueeze(-1), _block(u.shape[1]))
        ends = torch.complex(*_block_ends(_planes(columns), u).chunk(2, 1))
        return _final_state(torch.mul, powers, ends)


def dense_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """k_l = C A^l B: real A (D, N, N), B (D, N), C (H, D, N). Returns (H, L, D).

    Exact to rounding where the powers of A stay bounded. O(log L · D·N³) time on top of O(L·D·N).
    """
    with torch.autocast(A.device.type, enabled=False):
        powers = _squares(torch.matmul, A)
        columns = _table(torch.matmul, powers, B.unsqueeze(-1), _block(length))
        transposed = (power.mT for power in powers)
        rows = _table(torch.matmul, transposed, C.movedim(0, -1), -(-length // columns.shape[-1]))
        return _product(rows, columns, len(C), length)


def dense_state(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """x_L = Σ_l A^{L−1−l} B u_l: real (D, N, N), (D, N) and u (B, L, D) → (B, D, N)."""
    with torch.autocast(A.device.type, enabled=False):
        powers = _squares(torch.matmul, A)
        columns = _table(torch.matmul, powers, B.unsqueeze(-1), _block(u.shape[1]))
        return _final_state(torch.matmul, powers, _block_ends(columns, u))


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


def _table(times: Times, powers: Iterator[Tensor], start: Tensor, count: int) -> Tensor:
    """[X, A X, A² X, …] of X = start (D, N, m): a power of two of them, `count` or more; (D, N, … · m)."""
    table, size = start, 1
    while size < count:
        table, size = torch.cat((table, times(next(powers), table)), -1), 2 * size
    return table


def _planes(x: Tensor) -> Tensor:
    """Real parts, then imaginary parts: complex (D, N, m) → (D, 2N, m)."""
    return torch.cat((x.real, x.imag), 1)


def _product(rows: Tensor, columns: Tensor, outputs: int, length: int) -> Tensor:
    """k_{iT+j} = row_i column_j: (D, N, i·H), (D, N, T) → (H, L, D)."""
    blocks = (rows.mT @ columns).unflatten(1, (-1, outputs))  # (D, i, H, T)
    return blocks.permute(2, 1, 3, 0).flatten(1, 2)[:, :length]


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
