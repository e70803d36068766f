r"""The kernel of a diagonal system under the zero-order hold, from its parameters, in few, large calls.

D channels, n systems that they share in turn, N modes, one of each conjugate pair, H outputs, L length, T block length,
R blocks

    k_l = 2 Re Σ_n C_n g_n B_n e^{l z_n},    z = dt Λ,    g = (e^z − 1)/Λ,    Λ = −e^{log rate} + i frequency

Split at l = iT + j into two tables of powers, e^{iTz} and e^{jz}, and one complex product, whose imaginary part is left
out. Each step of the chain rule is linear in the complex numbers m = C g B and z: with X_i = Σ_j 2 dk_{iT+j} e^{jz} and
Y_j = Σ_i 2 dk_{iT+j} m e^{iTz}

    ∂/∂m = Σ_i X_i e^{iTz},    ∂/∂z = Σ_j j Y_j e^{jz} + T Σ_i i X_i m e^{iTz}

What `stu.ops.kernels` computes by many small operations for a CPU, here for devices on which a call costs more than its
numbers; both in float64, where powers by the exponential and by repeated squares are equally exact.
"""

from typing import Any

import torch
from torch import Tensor

from stu.ops.discretize import discretize
from stu.ops.flops import flops_of
from stu.ops.kernels import block_length, diagonal_kernel
from stu.ops.precision import no_autocast
from stu.ops.transforms import owned, plain_gradients, transformed


def zoh_kernel(
    log_dt: Tensor,
    log_rate: Tensor,
    frequency: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    length: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The impulse responses (H, L, D) of every output, of the given dtype, with the skip D in the first entry.

    log_dt, D: (D,); log_rate, frequency: (n, N), where no mode is both 0; B: (n, N, 2), C: (H, D, N, 2), complex pairs;
    all real, of one dtype, in which is computed. Differentiable any number of times.
    """
    inputs = log_dt, log_rate, frequency, B, C, D, length, dtype
    return _plain(*inputs) if transformed(*inputs) else _zoh_kernel(*inputs)[0].mT


def _plain(
    log_dt: Tensor,
    log_rate: Tensor,
    frequency: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """The same by the operations of a CPU."""
    copies = len(log_dt) // len(log_rate)
    A = torch.complex(-log_rate.exp(), frequency).repeat(copies, 1)
    a, gain = discretize(A, log_dt.exp().unsqueeze(-1), "zoh")
    b = gain * torch.view_as_complex(B.contiguous()).repeat(copies, 1)
    kernel = diagonal_kernel(a, b, torch.view_as_complex(C.contiguous()), length)
    first = torch.cat((kernel[:1, :1] + D, kernel[:1, 1:]), 1)
    return torch.cat((first, kernel[1:])).to(dtype)


@torch.library.custom_op("stu::zoh_kernel", mutates_args=())
def _zoh_kernel(
    log_dt: Tensor,
    log_rate: Tensor,
    frequency: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    length: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel (H, D, L), and for the backward pass Λ (n, N), z, g (D, N), m (D, H, N) and two tables (D, N, …)."""
    with no_autocast(log_dt):
        block = block_length(length)
        blocks, systems, outputs = -(-length // block), len(log_rate), len(C)
        A = torch.complex(-log_rate.exp(), frequency)
        z = log_dt.exp().view(-1, systems, 1) * A
        gain = torch.expm1(z) / A
        B, C = (torch.view_as_complex(pairs.contiguous()) for pairs in (B, C))
        m = (gain * B).flatten(0, 1).unsqueeze(1) * C.transpose(0, 1)
        exponents = z.view(-1, z.shape[-1], 1) * torch.arange(block, dtype=log_dt.dtype, device=log_dt.device)
        columns = exponents.exp()
        rows = (exponents[..., :blocks] * block).exp_()
        kernel = _twice((m.unsqueeze(-1) * rows.unsqueeze(1)).mT.flatten(1, 2), columns).real  # (D, H·R, T)
        kernel[:, 0, 0] += D
        kernel = kernel.view(-1, outputs, blocks * block).transpose(0, 1)[..., :length]
        kernel = owned(kernel.to(dtype, memory_format=torch.contiguous_format))
        return kernel, A, z.flatten(0, 1), gain.flatten(0, 1), m.contiguous(), columns, rows


@_zoh_kernel.register_fake
def _(log_dt: Tensor, log_rate: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *_tensors, C, _D, length, dtype = inputs
    (systems, modes), (outputs, width), block = log_rate.shape, C.shape[:2], block_length(length)
    sizes = ((systems, modes), (width, modes), (width, modes), (width, outputs, modes))
    tables = ((width, modes, block), (width, modes, -(-length // block)))
    kept = (log_dt.new_empty(size, dtype=log_dt.dtype.to_complex()) for size in (*sizes, *tables))
    return log_dt.new_empty(outputs, width, length, dtype=dtype), *kept


@torch.library.custom_op("stu::zoh_kernel_backward", mutates_args=())
def _zoh_kernel_backward(
    dk: Tensor,
    log_dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    z: Tensor,
    gain: Tensor,
    m: Tensor,
    columns: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_dt, log_rate, frequency, B, C and D, from that of the kernel (H, D, L) and what was kept.

    dx of a complex x is here the number with d loss = Re(dx · change of x): the conjugate of PyTorch's gradient.
    """
    with no_autocast(dk):
        (outputs, width, length), (systems, modes) = dk.shape, A.shape
        block, blocks = columns.shape[-1], rows.shape[-1]
        new = m.new_empty if length == block * blocks else m.new_zeros
        K = new(width, outputs, blocks * block)
        K[..., :length] = dk.transpose(0, 1)
        K = K.view(width, outputs * blocks, block)
        X = _twice(columns, K.mT).unflatten(-1, (outputs, blocks)).mul_(rows.unsqueeze(2))  # (D, N, H, R)
        Y = _twice((m.unsqueeze(-1) * rows.unsqueeze(1)).transpose(1, 2).flatten(2), K)  # (D, N, T)
        steps = torch.arange(block, dtype=log_dt.dtype, device=dk.device)
        dm = X.sum(-1).transpose(1, 2)  # (D, H, N)
        by_row = _over_outputs(X.mul_(steps[:blocks]).sum(-1).transpose(1, 2).mul(m))
        dz = Y.mul_(columns).mul_(steps).sum(-1).add_(by_row, alpha=block)  # (D, N)
        B, C = (torch.view_as_complex(pairs.contiguous()) for pairs in (B, C))
        C = C.transpose(0, 1)  # (D, H, N)
        dz, z, gain = (x.view(-1, systems, modes) for x in (dz, z, gain))
        db = _over_outputs(dm * C).view_as(z)
        dC = dm * (gain * B).view(width, 1, modes)
        dgain = db * B
        by_A = dgain / A
        dz = torch.addcmul(dz, dgain, gain).add_(by_A)  # e^z/Λ = g + 1/Λ
        by_log_dt = dz * z
        dA = torch.addcmul(by_log_dt / A, by_A, gain, value=-1).sum(0)  # z/Λ = dt
        return (
            owned(by_log_dt.sum(-1).real.flatten()),
            dA.real * A.real,
            -dA.imag,
            owned(torch.view_as_real((db * gain).sum(0).conj_physical_())),
            owned(torch.view_as_real(dC.transpose(0, 1).conj_physical())),
            dk[0, :, 0].to(log_dt.dtype, copy=True),
        )


def _twice(x: Tensor, y: Tensor) -> Tensor:
    """2 x y of matrices."""
    return torch.baddbmm(x.new_empty(1, 1, 1), x, y, beta=0, alpha=2)


def _over_outputs(x: Tensor) -> Tensor:
    """Σ_h x_h: (D, H, N) → (D, N)."""
    return x.squeeze(1) if x.shape[1] == 1 else x.sum(1)


@_zoh_kernel_backward.register_fake
def _(dk: Tensor, log_dt: Tensor, B: Tensor, C: Tensor, A: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    rates = (log_dt.new_empty(A.shape) for _ in range(2))
    return log_dt.new_empty(log_dt.shape), *rates, B.new_empty(B.shape), C.new_empty(C.shape), torch.empty_like(log_dt)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.length, ctx.dtype = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dk: Tensor, *_: None) -> tuple[Any, ...]:
    log_dt, log_rate, frequency, B, C, D, *kept = ctx.saved_tensors
    if torch.is_grad_enabled() or transformed(dk):
        return plain_gradients(_plain, (log_dt, log_rate, frequency, B, C, D, ctx.length, ctx.dtype), dk.mT)
    return *_zoh_kernel_backward(dk, log_dt, B, C, *kept), None, None


_zoh_kernel.register_autograd(_backward, setup_context=_save)


@flops_of(_zoh_kernel)
def _flops(log_dt: Tensor, log_rate: Tensor, *rest: Any, **_: Any) -> int:
    *_tensors, C, _D, length, _dtype = rest
    block = block_length(length)
    return 8 * C.shape[0] * C.shape[1] * -(-length // block) * block * C.shape[2]


@flops_of(_zoh_kernel_backward)
def _backward_flops(dk: Tensor, *rest: Any, **_: Any) -> int:
    *_tensors, columns, rows = rest
    return 16 * dk.shape[0] * columns.numel() * rows.shape[-1]
