r"""Streaming: a bank of spectral filters applied to one input at a time.

B batch, L length, D width, K columns of a bank, K' filters of a branch, S branches, N poles of a branch, W inputs kept

    f_{t,k} = Σ_i φ_k(i) u_{t−i}

There are two kinds of memory. A `Window` keeps all inputs and applies the filters themselves: exact, O(L) per step.
`ExponentialSums` keeps s_{t,n} = Σ_i p_n^i u_{t−i} = p_n s_{t−1,n} + u_t for the poles of the realisation
φ_k(i) ≈ Σ_n c_kn p_n^i (`stu.ops.realization`): O(1) per step. The features of both are in the order of the bank's
columns. The sums do not include a fixed recurrence y_{t−p} that the bank has folded in: the layer adds it, and
`feedback` is p.
"""

from typing import NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.ops.bank import FilterBank, SpectralFilters
from stu.ops.realization import Realization, Streaming, exponential_sums, realize_for_streaming
from stu.ops.transforms import lasting


class MemoryState(NamedTuple):
    """What a layer remembers of its inputs.

    inputs: (B, W, D), the newest first: all L of a window, else as many as delay and lags need. sums: (B, S, N, D)
    float64, Σ_i (±p_n)^i u_{t−delay−i}; none with a window.
    """

    inputs: Tensor
    sums: Tensor


@final
class Window:
    """All inputs so far. filters: (L, K)."""

    feedback = 0

    def __init__(self, filters: Tensor) -> None:
        self.filters = filters

    def initial(self, batch_size: int, width: int) -> MemoryState:
        """Zeros."""
        return self.after(self.filters.new_zeros(batch_size, 0, width))

    def advance(self, u: Tensor, state: MemoryState) -> MemoryState:
        """The memory after one more input u_t (B, D)."""
        return state._replace(inputs=_shifted(u, state.inputs))

    def after(self, u: Tensor) -> MemoryState:
        """The memory after inputs (B, L' ≤ L, D)."""
        inputs = newest(u.to(self.filters.dtype), len(self.filters))
        return MemoryState(inputs, inputs.new_zeros(len(u), 0, 0, u.shape[2]))

    def features(self, state: MemoryState, lags: int) -> tuple[Tensor, Tensor]:
        """f_t of the spectral filters (B, K − lags, D), and the lagged inputs (B, lags, D)."""
        features = self.filters.T @ state.inputs.to(self.filters.dtype)
        return features[:, : features.shape[1] - lags], features[:, features.shape[1] - lags :]

    def readout(self, weight: Tensor) -> Tensor:
        """One kernel per channel, Σ_k φ_k w_kd, for `read`: weight (K, D) → (L, D)."""
        return self.filters @ weight.to(self.filters.dtype)

    def read(self, state: MemoryState, readout: Tensor) -> Tensor:
        """Σ_k w_kd f_{t,kd}: (B, D)."""
        return (readout * state.inputs).sum(1)


@final
class ExponentialSums:
    """Sums of exponentials, in float64 because their terms are large compared with the filters.

    poles: (S, N, 1). coefficients: (K', N), of the filters of one branch.
    """

    def __init__(self, filters: SpectralFilters, realization: Realization, device: torch.device) -> None:
        poles = realization.poles.unsqueeze(1)
        branches = torch.stack((poles, -poles)) if filters.two_sided else poles.unsqueeze(0)  # (−1)^i p^i = (−p)^i
        self.poles, self.coefficients = branches.to(device), realization.coefficients.T.contiguous().to(device)
        self.delay, self.lags, self.feedback = filters.delay, filters.k_u, filters.recurrence

    def initial(self, batch_size: int, width: int) -> MemoryState:
        """Zeros."""
        return self.after(self.poles.new_zeros(batch_size, 0, width))

    def advance(self, u: Tensor, state: MemoryState) -> MemoryState:
        """The memory after one more input u_t (B, D)."""
        inputs = _shifted(u, state.inputs)
        entering = inputs[:, self.delay, None, None]  # (B, 1, 1, D)
        return MemoryState(inputs, torch.addcmul(entering, self.poles, state.sums))

    def after(self, u: Tensor) -> MemoryState:
        """The memory after inputs (B, L', D)."""
        entered = u[:, : max(0, u.shape[1] - self.delay)]
        sums = exponential_sums(entered, self.poles.flatten()).unflatten(1, self.poles.shape[:2])
        return MemoryState(newest(u.to(self.poles.dtype), max(self.delay + 1, self.lags)), sums)

    def features(self, state: MemoryState, lags: int) -> tuple[Tensor, Tensor]:
        """f_t of the spectral filters (B, K − lags, D), and the lagged inputs (B, lags, D)."""
        return (self.coefficients @ state.sums).flatten(1, 2), state.inputs[:, :lags]

    def readout(self, weight: Tensor) -> Tensor:
        """Per channel Σ_k c_kn w_kd, for `read`: weight (K, D) → (S, N, D), or (1, N, D) where branches share it."""
        return self.coefficients.T @ weight.to(self.poles.dtype).unflatten(0, (-1, len(self.coefficients)))

    def read(self, state: MemoryState, readout: Tensor) -> Tensor:
        """Σ_k w_kd f_{t,kd}: (B, D)."""
        return (readout * state.sums).sum((1, 2))


Memory = Window | ExponentialSums

_MEMORIES: WeakKeyDictionary[FilterBank, dict[tuple[Streaming, torch.device, torch.dtype], Memory]] = (
    WeakKeyDictionary()
)


def streaming_memory(bank: FilterBank, streaming: Streaming, device: torch.device, dtype: torch.dtype) -> Memory:
    """The memory of a layer with these filters, a window in the given dtype.

    streaming: "window", "states" (exponential sums), or "auto": sums where they are faster and as exact. Banks of other
    than spectral filters have a window.
    """
    memories = _MEMORIES.setdefault(bank, {})
    memory = memories.get((streaming, device, dtype))
    if memory is None:
        with torch.inference_mode(False):  # training could not use what an evaluation had built
            memory = _build(bank, streaming, device, dtype)
        if all(map(lasting, filter(torch.is_tensor, vars(memory).values()))):
            memories[streaming, device, dtype] = memory
    return memory


def _build(bank: FilterBank, streaming: Streaming, device: torch.device, dtype: torch.dtype) -> Memory:
    filters = bank.spectral
    if filters is not None:
        realization = realize_for_streaming(filters.seq_len, filters.num_filters, filters.hankel, streaming, device)
        if realization is not None:
            return ExponentialSums(filters, realization, device)
    return Window(bank.on(device, dtype))


def _shifted(u: Tensor, inputs: Tensor) -> Tensor:
    """The newest input (B, D) in front of the others, (B, W, D), and the oldest dropped; in the wider dtype."""
    return torch.cat((u.unsqueeze(1), inputs[:, :-1]), 1)


def newest(sequence: Tensor, count: int) -> Tensor:
    """The last `count` steps of (B, L, D), the newest first, zeros where there are fewer."""
    last = sequence[:, max(0, sequence.shape[1] - count) :].flip(1)
    return F.pad(last, (0, 0, 0, count - last.shape[1]))
