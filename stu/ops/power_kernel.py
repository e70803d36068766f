r"""The kernel of a dense system, k_l = s C A^l B, in few, large calls.

D channels, N state size, H outputs, L length, T = 2^h ≥ √L block length, R = ⌈L/T⌉ blocks

Split at l = iT + j, the rows c_i = C A^{iT} and the columns b_j = A^j B are tables that double h times each, both by
one product: row vectors b_jᵀ times powers of Aᵀ, and c_i times powers of A^T. Powers are squared 2h − 1 times.
Backwards, the gradients g_q of all entries of a table v_{q+1} = v_q S follow from those of the kernel, y_q, by a scan,

    g_q = y_q + g_{q+1} Sᵀ,    ∂/∂S = Σ_q v_qᵀ g_{q+1},

in h products again, so that only the powers up to A^T are gone through backwards. `stu.ops.kernels.dense_kernel` takes
less arithmetic and more calls.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.flops import flops_of
from stu.ops.kernels import dense_kernel
from stu.ops.precision import no_autocast
from stu.ops.transforms import owned, plain_gradients, transformed


def power_kernel(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, length: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The impulse responses (H, L, D) in the given dtype: `scale` times C A^l B, and the skip D in the first entry.

    Real A (D, N, N), B (D, N), C (H, D, N), D (D,), of one dtype, in which is computed. Exact to rounding where the
    powers of A stay bounded. Differentiable any number of times.
    """
    inputs = A.mT, B, C, D, length, scale, dtype
    return _plain(*inputs).mT if transformed(*inputs) else _power_kernel(*inputs)[0].mT


def _plain(A_T: Tensor, B: Tensor, C: Tensor, D: Tensor, length: int, scale: float, dtype: torch.dtype) -> Tensor:
    """The same by the operations of a CPU: (H, D, L)."""
    kernel = dense_kernel(A_T.mT, B, scale * C, length).mT
    first = torch.cat((kernel[:1, :, :1] + D.unsqueeze(-1), kernel[:1, :, 1:]), 2)
    return torch.cat((first, kernel[1:])).to(dtype)


def _doublings(length: int) -> int:
    """The h of the block length T = 2^h, T² ≥ L."""
    return ((length - 1).bit_length() + 1) // 2


@torch.library.custom_op("stu::power_kernel", mutates_args=())
def _power_kernel(
    A_T: Tensor, B: Tensor, C: Tensor, D: Tensor, length: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel (H, D, L) of Aᵀ, the powers (h, 2, D, N, N) of Aᵀ and A^T, and the tables (2, D, T, H, N)."""
    with no_autocast(A_T):
        (outputs, width, size), doublings = C.shape, _doublings(length)
        block = 1 << doublings
        powers = A_T.new_empty(doublings, 2, width, size, size)
        powers[:1, 0] = A_T
        for k in range(1, doublings):
            torch.bmm(powers[k - 1, 0], powers[k - 1, 0], out=powers[k, 0])
        for k in range(doublings):
            last = powers[k - 1, 1] if k else powers[-1, 0].mT
            torch.bmm(last, last, out=powers[k, 1])
        tables = A_T.new_empty(2, width, block, outputs, size)
        tables[0, :, 0], tables[1, :, 0] = B.unsqueeze(1), C.transpose(0, 1)
        entries = tables.view(2 * width, block * outputs, size)
        for k in range(doublings):
            known = outputs << k
            torch.bmm(entries[:, :known], powers[k].flatten(0, 1), out=entries[:, known : 2 * known])
        rows = tables[1, :, : -(-length // block)].flatten(1, 2)  # (D, R·H, N)
        kernel = _scaled_product(rows, tables[0, :, :, 0].mT, scale).view(width, -1, outputs, block)
        kernel[:, 0, 0, 0] += D
        kernel = kernel.permute(2, 0, 1, 3).to(dtype, memory_format=torch.contiguous_format)
        return owned(kernel.flatten(2)[..., :length]), powers, tables


@_power_kernel.register_fake
def _(
    A_T: Tensor, B: Tensor, C: Tensor, D: Tensor, length: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    (outputs, width, size), doublings = C.shape, _doublings(length)
    powers = A_T.new_empty(doublings, 2, width, size, size)
    tables = A_T.new_empty(2, width, 1 << doublings, outputs, size)
    return A_T.new_empty(outputs, width, length, dtype=dtype), powers, tables


@torch.library.custom_op("stu::power_kernel_backward", mutates_args=())
def _power_kernel_backward(
    dk: Tensor, powers: Tensor, tables: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of Aᵀ, B, C and D, from that of the kernel (H, D, L) and what was kept."""
    with no_autocast(dk):
        _, width, block, outputs, size = tables.shape
        doublings, blocks = len(powers), -(-dk.shape[2] // block)
        dD = dk[0, :, 0].to(tables.dtype, copy=True)
        whole = outputs == 1 and dk.shape[2] == block * blocks  # every entry has a gradient
        if spare := blocks * block - dk.shape[2]:
            dk = F.pad(dk, (0, spare))
        K = dk.unflatten(2, (blocks, block)).permute(1, 2, 0, 3)
        K = K.to(tables.dtype, memory_format=torch.contiguous_format, copy=True)
        K = K.mul_(scale).flatten(1, 2)  # (D, R·H, T)
        grads = (torch.empty_like if whole and blocks == block else torch.zeros_like)(tables)
        rows = tables[1, :, :blocks].flatten(1, 2)  # (D, R·H, N)
        torch.bmm(K.mT, rows, out=grads[0, :, :, 0])
        torch.bmm(K, tables[0, :, :, 0], out=grads[1, :, :blocks].flatten(1, 2))
        entries = block * outputs
        grads = grads.view(2 * width, entries, size)
        for k in range(doublings):
            later = grads[:, outputs << k :] @ powers[k].flatten(0, 1).mT
            grads[:, : entries - (outputs << k)].add_(later)
        dB, dC = grads[:, :outputs].unflatten(0, (2, width))
        known = tables.view(2 * width, entries, size)[:, : entries - outputs]
        dA_T, dlast = (known.mT @ grads[:, outputs:entries]).unflatten(0, (2, width))
        dpower = dlast.mT  # of the last square of Aᵀ
        for k in reversed(range(doublings)):
            root = powers[k, 0].mT
            left = root @ dpower if k else torch.baddbmm(dA_T, root, dpower)
            dpower = torch.baddbmm(left, dpower, root)
        dC = dC.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        return owned(dpower if doublings else dA_T), dB[:, 0].clone(memory_format=torch.contiguous_format), dC, dD


def _scaled_product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """`scale` x y of matrices (D, …)."""
    return torch.baddbmm(x.new_empty(1, 1, 1), x, y, beta=0, alpha=scale)


@_power_kernel_backward.register_fake
def _(dk: Tensor, powers: Tensor, tables: Tensor, scale: float) -> tuple[Tensor, ...]:
    _, width, _, outputs, size = tables.shape
    sizes = ((width, size, size), (width, size), (outputs, width, size), (width,))
    return tuple(tables.new_empty(shape) for shape in sizes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.length, ctx.scale, ctx.dtype = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dk: Tensor, *_: None) -> tuple[Any, ...]:
    *inputs, powers, tables = ctx.saved_tensors
    if torch.is_grad_enabled() or transformed(dk):
        return plain_gradients(_plain, (*inputs, ctx.length, ctx.scale, ctx.dtype), dk)
    return *_power_kernel_backward(dk, powers, tables, ctx.scale), None, None, None


_power_kernel.register_autograd(_backward, setup_context=_save)


@flops_of(_power_kernel)
def _flops(A_T: Tensor, B: Tensor, C: Tensor, D: Tensor, length: int, *_: Any, **__: Any) -> int:
    (outputs, width, size), doublings = C.shape, _doublings(length)
    block = 1 << doublings
    squares = max(0, 2 * doublings - 1) * width * size**3
    tables = 2 * width * (block - 1) * outputs * size**2
    return 2 * (squares + tables + width * -(-length // block) * outputs * size * block)


@flops_of(_power_kernel_backward)
def _backward_flops(dk: Tensor, powers: Tensor, tables: Tensor, *_: Any, **__: Any) -> int:
    (outputs, width, length), (block, size), doublings = dk.shape, (tables.shape[2], tables.shape[4]), len(powers)
    products = 2 * width * -(-length // block) * outputs * size * block
    scans = 2 * width * outputs * size**2 * (doublings * block)
    return 2 * (products + scans + 2 * doublings * width * size**3)
