r"""Linear recurrences with learned matrices: y_t = w_t + Σ_i y_{t−i} M_i.

B batch, L length, D width, P order of the recurrence, T block length
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16


def linear_recurrence(drive: Tensor, weight: Tensor, initial: Tensor | None = None) -> Tensor:
    """y_t = drive_t + Σ_{i=1…P} y_{t−i} M_i, without a loop over time.

    drive: (B, L, D); weight: (P, D, D), M_i as `y @ weight[i-1]`; initial: (B, P, D), the outputs before the first,
    newest first, zeros where None. Returns (B, L, D) in drive's dtype.

    Blocks of T steps: inside a block the response to the drive is a block-Toeplitz product with the impulse response
    of the recurrence; only the P outputs at the seam of two blocks are carried in sequence. All of it in float32 at
    least, whatever the dtypes or an enclosing autocast: near |pole| = 1 the rounding of thousands of steps adds up.
    """
    dtype = torch.promote_types(torch.promote_types(drive.dtype, weight.dtype), torch.float32)
    start = drive.new_zeros(len(drive), *weight.shape[:2]) if initial is None else initial
    with torch.autocast(drive.device.type, enabled=False):
        return _blockwise(drive.to(dtype), weight.to(dtype), start.to(dtype)).to(drive.dtype)


def linear_recurrence_reference(drive: Tensor, weight: Tensor, initial: Tensor | None = None) -> Tensor:
    """The same, one step at a time; shapes as in `linear_recurrence`."""
    batch, _, width = drive.shape
    past = list((drive.new_zeros(batch, len(weight), width) if initial is None else initial).unbind(1))
    outputs = []
    for w in drive.unbind(1):
        y = w + sum(previous @ matrix for previous, matrix in zip(past, weight, strict=True))
        outputs.append(y)
        past = [y, *past[:-1]]
    return torch.stack(outputs, 1)


def _blockwise(drive: Tensor, weight: Tensor, seam: Tensor) -> Tensor:
    batch, length, width = drive.shape
    order = weight.shape[0]
    block = max(BLOCK, order)
    steps = -(-length // block)
    response = _impulse_response(weight, block)  # (T, D, D)
    padded = F.pad(drive, (0, 0, 0, steps * block - length)).reshape(batch * steps, block * width)
    local = (padded @ _toeplitz(response)).view(batch, steps, block, width)
    free = _free_response(weight, response)  # (P·D, T·D)
    seams = []
    for local_end in local[:, :, block - order :].unbind(1):  # oldest first: (B, P, D)
        seams.append(seam)
        free_end = (seam.reshape(batch, -1) @ free[:, (block - order) * width :]).view(batch, order, width)
        seam = (local_end + free_end).flip(1)
    carried = torch.stack(seams, 1).view(batch * steps, -1) @ free  # (B·steps, T·D)
    return (local + carried.view_as(local)).view(batch, steps * block, width)[:, :length]


def _impulse_response(weight: Tensor, length: int) -> Tensor:
    """P_0 = I, P_n = Σ_i P_{n−i} M_i: (length, D, D), row vectors from the left."""
    response = [torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)]
    for n in range(1, length):
        terms = [response[n - i - 1] @ weight[i] for i in range(min(n, len(weight)))]
        response.append(torch.stack(terms).sum(0))
    return torch.stack(response)


def _toeplitz(response: Tensor) -> Tensor:
    """(T·D, T·D) matrix whose block (s, t) is P_{t−s}, zero for t < s."""
    block, width, _ = response.shape
    time = torch.arange(block, device=response.device)
    lag = time - time[:, None]  # (s, t)
    blocks = response[lag.clamp_min(0)] * (lag >= 0)[..., None, None]  # (T, T, D, D)
    return blocks.transpose(1, 2).reshape(block * width, block * width)


def _free_response(weight: Tensor, response: Tensor) -> Tensor:
    """(P·D, T·D): what the P outputs before a block, newest first, leave in it without any drive.

    Output t−i (i = 1…P) re-enters step t' of the block through M_{t'+i}, t' ≤ P − i, and then rings as P_{t−t'}.
    """
    order, width, _ = weight.shape
    block = len(response)
    rows = []
    for i in range(1, order + 1):
        entries = torch.zeros(width, block, width, dtype=weight.dtype, device=weight.device)
        for start in range(order - i + 1):
            ringing = weight[start + i - 1] @ response[: block - start]  # (T − start, D, D)
            entries = entries + F.pad(ringing.transpose(0, 1), (0, 0, start, 0))
        rows.append(entries.reshape(width, block * width))
    return torch.cat(rows)
