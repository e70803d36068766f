r"""The bilinear rule for a system of normal plus low rank, dense, in few calls.

D channels, n systems that they share in turn, N state size, N/2 modes, one of each conjugate pair, R rank. All matrices
act on interleaved real and imaginary parts; p_r are those of P_r, and diag Λ has a block of two rows for every mode

    M = diag Λ − 2 Σ_r p_r p_rᵀ,    Y = (1 − dt M/2)^{−1}/2,    Ā = 4 Y − 1,    B̄ = 2 dt Y B

With v = 1/(2 − dt Λ), Woodbury's identity reads Y = diag v − diag v p (1/(2 dt) + pᵀ diag v p)^{−1} pᵀ diag v.
Backwards, dY = Y d(dt M) Y: the gradient of dt M is Γ = Yᵀ (∂/∂Y) Yᵀ, of which Λ takes the blocks on the diagonal, and
P the products with its parts.
"""

from typing import Any

import torch
from torch import Tensor

from stu.ops.flops import flops_of
from stu.ops.kernels import conjugate
from stu.ops.precision import no_autocast
from stu.ops.transforms import owned, plain_gradients, transformed


def dense_bilinear(log_dt: Tensor, log_rate: Tensor, frequency: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Ā (D, N, N) and B̄/2 (D, N).

    log_dt: (D,); log_rate, frequency: log −Re Λ and Im Λ (n, N/2); P: (R, n, N); B: (n, N); all real, of one dtype, in
    which is computed. Differentiable any number of times.
    """
    inputs = log_dt, log_rate, frequency, P, B
    A, half_B, _ = _plain(*inputs) if transformed(*inputs) else _dense_bilinear(*inputs)
    return A, half_B


def _plain(log_dt: Tensor, log_rate: Tensor, frequency: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ā, B̄/2 and Y."""
    (systems, half), rank = log_rate.shape, len(P)
    dt, P = log_dt.exp().view(-1, systems, 1, 1), P.transpose(0, 1)  # (D/n, n, 1, 1), (n, R, N)
    modes = torch.view_as_complex(P.unflatten(-1, (half, 2)).contiguous())
    v_conj = (dt * torch.complex(log_rate.exp(), frequency).unsqueeze(1) + 2).reciprocal()  # (D/n, n, 1, N/2)
    rows, columns = (torch.view_as_real(modes * v).flatten(-2) for v in (v_conj, conjugate(v_conj)))
    eye = torch.eye(2 * half, dtype=dt.dtype, device=dt.device)
    # A block of v's conjugate is one of v transposed.
    diagonal = torch.view_as_real(v_conj * torch.view_as_complex(eye.view(-1, half, 2))).flatten(-2)
    gram, step = rows @ P.mT, -0.5 / dt  # (D/n, n, R, R); never singular below, as Re v > 0
    negative = step - gram if rank == 1 else step * eye[:rank, :rank] - gram
    inverse = negative.reciprocal() if rank == 1 else torch.linalg.inv_ex(negative).inverse
    Y = torch.baddbmm(*(x.flatten(0, 1) for x in (diagonal, columns.mT, inverse @ rows)))
    half_B = dt * (Y.view_as(diagonal) @ B.unsqueeze(-1))
    return 4 * Y - eye, half_B.view(-1, 2 * half), Y


@torch.library.custom_op("stu::dense_bilinear", mutates_args=())
def _dense_bilinear(
    log_dt: Tensor, log_rate: Tensor, frequency: Tensor, P: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ā, B̄/2 and Y."""
    with no_autocast(log_dt):
        A, half_B, Y = _plain(log_dt, log_rate, frequency, P, B)
        return owned(A), owned(half_B), owned(Y)


@_dense_bilinear.register_fake
def _(log_dt: Tensor, log_rate: Tensor, frequency: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width, size = len(log_dt), B.shape[1]
    matrix = (width, size, size)
    return log_dt.new_empty(matrix), log_dt.new_empty(width, size), log_dt.new_empty(matrix)


@torch.library.custom_op("stu::dense_bilinear_backward", mutates_args=())
def _dense_bilinear_backward(
    dA: Tensor,
    dB: Tensor,
    log_dt: Tensor,
    log_rate: Tensor,
    frequency: Tensor,
    P: Tensor,
    B: Tensor,
    half_B: Tensor,
    Y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all parameters, from those of Ā and B̄/2."""
    with no_autocast(dA):
        (systems, half), width, size = log_rate.shape, len(log_dt), B.shape[1]
        dt = log_dt.exp().view(-1, 1, 1)
        p = P.permute(1, 2, 0).expand(width // systems, -1, -1, -1).flatten(0, 1)  # (D, N, R)
        inputs = B.expand(width // systems, -1, -1).flatten(0, 1).unsqueeze(1)  # (D, 1, N)
        by_step = dB.unsqueeze(-1) * dt  # (D, N, 1)
        transposed = Y.mT
        of_M = transposed @ torch.baddbmm(dA, by_step, inputs, beta=4) @ transposed
        of_M.mul_(dt)
        dp = torch.baddbmm(of_M @ p, of_M.mT, p)  # up to a factor of −2
        blocks = of_M.view(width, half, 2, half, 2).diagonal(dim1=1, dim2=3)  # [channel, row, column, mode]
        real = (blocks[:, 0, 0] + blocks[:, 1, 1]).view(-1, systems, half)
        imaginary = (blocks[:, 1, 0] - blocks[:, 0, 1]).view(-1, systems, half)
        by_rate = real * log_rate.exp()
        by_modes = (imaginary * frequency).sub_(by_rate).sum(-1).flatten()
        by_P, by_B = (dp * p).sum((1, 2)), (dB * half_B).sum(-1)
        return (
            by_modes.sub_(by_P).add_(by_B),
            by_rate.sum(0).neg_(),
            imaginary.sum(0),
            owned(dp.view(-1, systems, size, len(P)).sum(0).mul_(-2).permute(2, 0, 1)),
            (transposed @ by_step).view(-1, systems, size).sum(0),
        )


@_dense_bilinear_backward.register_fake
def _(dA: Tensor, dB: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    *parameters, _half_B, _Y = inputs
    return tuple(x.new_empty(x.shape) for x in parameters)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, dA: Tensor, dB: Tensor, _: Any) -> tuple[Any, ...]:
    *inputs, half_B, Y = ctx.saved_tensors
    if torch.is_grad_enabled() or transformed(dA, dB):
        return plain_gradients(lambda *parameters: _plain(*parameters)[:2], tuple(inputs), (dA, dB))
    gradients: tuple[Tensor, ...] = _dense_bilinear_backward(dA, dB, *inputs, half_B, Y)
    return gradients


_dense_bilinear.register_autograd(_backward, setup_context=_save)


@flops_of(_dense_bilinear)
def _flops(log_dt: Tensor, log_rate: Tensor, frequency: Tensor, P: Tensor, B: Tensor, **_: Any) -> int:
    rank, size = len(P), B.shape[1]
    return 2 * len(log_dt) * (2 * rank**2 * size + (rank + 1) * size**2)


@flops_of(_dense_bilinear_backward)
def _backward_flops(dA: Tensor, *inputs: Tensor, **_: Any) -> int:
    width, size, _size = dA.shape
    rank = len(inputs[4])
    return 2 * width * size**2 * (2 * size + 2 + 2 * rank)
