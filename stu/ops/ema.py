r"""The kernel of sums of exponential moving averages, real decays per channel, in few, large calls.

D channels, N averages of each, L length, T = 2^h ≥ √L block length, R = ⌈L/T⌉ blocks

    k_l = Σ_n c_n b_n q_n^l

Split at l = iT + j, it is a product of two tables, c_n b_n q_n^{iT} and q_n^j, so that no array has L·N entries.
"""

import torch
from torch import Tensor

from stu.ops.kernels import block_length
from stu.ops.precision import no_autocast
from stu.ops.transforms import compiled_as_one


@compiled_as_one("ema_kernel", lambda a, b, c, length: (*a.shape[:-1], length))
def ema_kernel(log_decay: Tensor, inputs: Tensor, outputs: Tensor, length: int) -> Tensor:
    """k_l = Σ_n c_n b_n q_n^l from log q ≤ 0, b and c, each (…, D, N); returns (…, D, L)."""
    with no_autocast(log_decay):
        block = block_length(length)
        time = torch.arange(block, dtype=log_decay.dtype, device=log_decay.device)
        starts = block * time[: -(-length // block)]  # R ≤ T
        rows = (inputs * outputs).unsqueeze(-2) * torch.exp(log_decay.unsqueeze(-2) * starts.unsqueeze(-1))
        columns = torch.exp(log_decay.unsqueeze(-1) * time)  # (…, D, N, T)
        return (rows @ columns).flatten(-2)[..., :length]


def ema_kernel_reference(decay: Tensor, inputs: Tensor, outputs: Tensor, length: int) -> Tensor:
    """The same from q itself, one power after the other."""
    kernel, power = [], torch.ones_like(decay)
    for _ in range(length):
        kernel.append((outputs * inputs * power).sum(-1))
        power = power * decay
    return torch.stack(kernel, -1)
