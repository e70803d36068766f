r"""Streaming: a bank of spectral filters applied to one input at a time, or to some.

B batch, L length, D width, K columns of a bank, K' filters of a branch, S branches, N poles of a branch, W inputs kept

    f_{t,k} = Σ_i φ_k(i) u_{t−i}

There are two kinds of memory. A `Window` keeps all inputs and applies the filters themselves: exact, O(L) per step.
`ExponentialSums` keeps s_{t,n} = Σ_i p_n^i u_{t−i} = p_n s_{t−1,n} + u_t for the poles of the realisation
φ_k(i) ≈ Σ_n c_kn p_n^i (`stu.ops.realization`): O(1) per step. The features of both are in the order of the bank's
columns. The sums do not include a fixed recurrence y_{t−p} that the bank has folded in: the layer adds it, and
`feedback` is p.

A piece of a sequence follows its `Past`, which adds the response to the inputs kept, convolved together with those of
the piece, and to the sums of all inputs before, which decay: Σ_n c_kn p_n^j s_n after j steps.
"""

from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from stu.errors import require
from stu.ops.bank import FilterBank, SpectralFilters, spectral_bank
from stu.ops.convolution import Algorithm, filter_convolution
from stu.ops.forms import budget, chunks
from stu.ops.padding import at_end
from stu.ops.realization import Realization, Streaming, exponential_sums, free_response, realize_for_streaming
from stu.ops.transforms import outside

FEW = 64  # steps, of all sequences together, whose features take less time than matrices for every frequency or pole
MATRICES_CHUNK, TOEPLITZ_CHUNK = 1 << 20, 1 << 22  # numbers at a time on a CPU: matrices for the poles, of filters


class MemoryState(NamedTuple):
    """What a layer remembers of its inputs.

    inputs: (B, W, D), the newest first: all L of a window, else as many as delay and lags need. sums: (B, S, N, D)
    float64, Σ_i (±p_n)^i u_{t−delay−i}; none with a window.
    """

    inputs: Tensor
    sums: Tensor


class Past(NamedTuple):
    """The same before another piece of the sequence.

    inputs: (B, W', D), the oldest first, W' ≤ W: those that the piece follows. sums: those of all inputs before them.
    """

    inputs: Tensor
    sums: Tensor


@final
class Window:
    """All inputs so far. filters: (L, K)."""

    feedback = 0
    unfolded: FilterBank | None = None

    def __init__(self, filters: Tensor) -> None:
        self.filters = filters

    def initial(self, batch_size: int, width: int) -> MemoryState:
        """Zeros."""
        return self.after(self.filters.new_zeros(batch_size, 0, width))

    def advance(self, u: Tensor, state: MemoryState) -> MemoryState:
        """The memory after one more input u_t (B, D)."""
        return state._replace(inputs=_shifted(u, state.inputs))

    def past(self, state: MemoryState, position: int) -> Past:
        """What a piece follows that begins after `position` steps, or fewer."""
        return Past(state.inputs[:, :position].flip(1), state.sums)

    def after(self, u: Tensor, mask: Tensor | None = None, past: Past | None = None) -> MemoryState:
        """The memory after a piece (B, L' ≤ L, D), of each sequence after the last real position."""
        inputs = newest(at_end(u, mask, past and past.inputs), len(self.filters))
        inputs = inputs.to(torch.promote_types(inputs.dtype, self.filters.dtype))
        return MemoryState(inputs, inputs.new_zeros(len(u), 0, 0, u.shape[2]))

    def with_sums(self, y: Tensor, past: Past, weight: Tensor) -> Tensor:
        """The response (B, L', D) to the past and a piece, given that to the inputs; there are no sums."""
        return y

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

    poles: (S, N, 1). coefficients: (K', N), of the filters of one branch. unfolded: the filters without the fixed
    recurrence, where the bank has one.
    """

    def __init__(self, filters: SpectralFilters, realization: Realization, device: torch.device) -> None:
        poles = realization.poles.unsqueeze(1)
        branches = torch.stack((poles, -poles)) if filters.two_sided else poles.unsqueeze(0)  # (−1)^i p^i = (−p)^i
        self.poles, self.coefficients = branches.to(device), realization.coefficients.T.contiguous().to(device)
        self.delay, self.lags, self.feedback = filters.delay, filters.k_u, filters.recurrence
        self.unfolded = spectral_bank(**filters._replace(recurrence=0)._asdict()) if self.feedback else None

    def initial(self, batch_size: int, width: int) -> MemoryState:
        """Zeros."""
        return self.after(self.poles.new_zeros(batch_size, 0, width))

    def advance(self, u: Tensor, state: MemoryState) -> MemoryState:
        """The memory after one more input u_t (B, D)."""
        inputs = _shifted(u, state.inputs)
        entering = inputs[:, self.delay, None, None]  # (B, 1, 1, D)
        return MemoryState(inputs, torch.addcmul(entering, self.poles, state.sums))

    def past(self, state: MemoryState, position: int) -> Past:
        """What a piece follows that begins after `position` steps, or fewer."""
        inputs = state.inputs.flip(1)
        return Past(inputs, state.sums - self._sums(inputs))

    def after(self, u: Tensor, mask: Tensor | None = None, past: Past | None = None) -> MemoryState:
        """The memory after a piece (B, L', D), of each sequence after the last real position."""
        inputs = at_end(u, mask, past and past.inputs)
        sums = self._sums(inputs)
        if past is not None:
            steps = u.shape[1] if mask is None else mask.sum(1)[:, None, None, None]
            sums = sums + self.poles**steps * past.sums
        return MemoryState(newest(inputs.to(self.poles.dtype), max(self.delay + 1, self.lags)), sums)

    def with_sums(self, y: Tensor, past: Past, weight: Tensor) -> Tensor:
        """The response (B, L', D) to the past and a piece, given that to the inputs.

        weight: (K, D, D), a matrix for every filter, or (K, D), a diagonal one.
        """
        return y + self._response(past.sums, weight, y.shape[1], y.dtype).to(y.dtype)

    def features(self, state: MemoryState, lags: int) -> tuple[Tensor, Tensor]:
        """f_t of the spectral filters (B, K − lags, D), and the lagged inputs (B, lags, D)."""
        return (self.coefficients @ state.sums).flatten(1, 2), state.inputs[:, :lags]

    def readout(self, weight: Tensor) -> Tensor:
        """Per channel Σ_k c_kn w_kd, for `read`: weight (K, D) → (S, N, D), or (1, N, D) where branches share it."""
        return self.coefficients.T @ weight.to(self.poles.dtype).unflatten(0, (-1, len(self.coefficients)))

    def read(self, state: MemoryState, readout: Tensor) -> Tensor:
        """Σ_k w_kd f_{t,kd}: (B, D)."""
        return (readout * state.sums).sum((1, 2))

    def _sums(self, inputs: Tensor) -> Tensor:
        """Those after inputs (B, L', D) alone."""
        entered = inputs[:, : max(0, inputs.shape[1] - self.delay)]
        return exponential_sums(entered, self.poles.flatten()).unflatten(1, self.poles.shape[:2])

    def _response(self, sums: Tensor, weight: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        """Σ_k (Σ_n c_kn p_n^j s_n) M_k, j = 1 … steps, whatever is less work: the features first, or c_kn M_k."""
        if weight.ndim == 3 and len(sums) * steps <= FEW:
            decay = self.poles.mT ** torch.arange(1, steps + 1, device=sums.device)[:, None, None, None]
            coefficients = self.coefficients * decay  # (steps, S, K', N)
            features = torch.einsum("jskn,bsnd->bjskd", coefficients, sums).flatten(2, 3)
            return mix(features.to(dtype), weight)
        terms = self.readout(weight) * sums if weight.ndim == 2 else self._mixed(sums, weight)
        return free_response(terms.flatten(1, 2), self.poles.flatten(), steps)

    def _mixed(self, sums: Tensor, weight: Tensor) -> Tensor:
        """Σ_k c_kn s_n M_k, some columns of the matrices at a time: (B, S, N, D) → (B, S, N, D)."""
        branches, count = self.poles.shape[:2]
        mixed = []
        for columns in chunks(weight.shape[2], branches * count * weight.shape[1], budget(weight, MATRICES_CHUNK)):
            some = weight[:, :, columns].to(sums.dtype).unflatten(0, (branches, -1))  # (S, K', D, columns)
            matrices = torch.einsum("kn,skio->snio", self.coefficients, some)
            mixed.append(torch.einsum("bsni,snio->bsno", sums, matrices))
        return torch.cat(mixed, -1)


Memory = Window | ExponentialSums


def streaming_memory(bank: FilterBank, streaming: Streaming, device: torch.device, dtype: torch.dtype) -> Memory:
    """The memory of a layer with these filters, a window in the given dtype.

    streaming: "window", "states" (exponential sums), or "auto": sums where they are faster and as exact. Banks of other
    than spectral filters have a window.
    """
    _make(bank.name, streaming, device, dtype)
    memory: Memory = bank.memories[streaming, device, dtype]
    return memory


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make(bank: str, streaming: Streaming, device: torch.device, dtype: torch.dtype) -> None:
    """Make what `streaming_memory` returns, once; `torch.compile` does so while it traces."""
    found = FilterBank.of(bank)
    if (streaming, device, dtype) not in found.memories:
        with outside():
            found.memories[streaming, device, dtype] = _build(found, streaming, device, dtype)


def _build(bank: FilterBank, streaming: Streaming, device: torch.device, dtype: torch.dtype) -> Memory:
    filters = bank.spectral
    if filters is not None and filters.truncated:
        require(streaming != "states", "streaming", streaming, "cannot end filters: extension=truncated needs a window")
    elif filters is not None:
        realization = realize_for_streaming(
            filters.seq_len, filters.num_filters, filters.hankel, streaming, device, filters.built_for
        )
        if realization is not None:
            return ExponentialSums(filters, realization, device)
    return Window(bank.on(device, dtype))


def last_outputs(u: Tensor, bank: FilterBank, weight: Tensor, count: int, algorithm: Algorithm) -> Tensor:
    """The last `count` steps of `filter_convolution`, (B, L, D) → (B, count, D): without FFTs where they are few."""
    if len(u) * count > FEW:
        return filter_convolution(u, bank, weight, algorithm=algorithm)[:, -count:]
    filters = bank.on(u.device, u.dtype).mT  # (K, L)
    time = torch.arange(u.shape[1], device=u.device)
    outputs = []
    for steps in chunks(count, u.shape[1] * len(filters), budget(u, TOEPLITZ_CHUNK)):
        lag = time[-count:, None][steps] - time  # (t, s)
        toeplitz = filters[:, lag.clamp(0, filters.shape[1] - 1)] * ((lag >= 0) & (lag < filters.shape[1]))
        outputs.append(mix(torch.einsum("kts,bsi->btki", toeplitz.to(u.dtype), u), weight))
    return torch.cat(outputs, 1)


def mix(features: Tensor, weight: Tensor) -> Tensor:
    """Σ_k f_k M_k: (…, K, D), (K, D, D) → (…, D)."""
    return features.flatten(-2) @ weight.to(features.dtype).flatten(0, 1)


def _shifted(u: Tensor, inputs: Tensor) -> Tensor:
    """The newest input (B, D) in front of the others, (B, W, D), and the oldest dropped; in the wider dtype."""
    return torch.cat((u.unsqueeze(1), inputs[:, :-1]), 1)


def newest(sequence: Tensor, count: int) -> Tensor:
    """The last `count` steps of (B, L, D), the newest first, zeros where there are fewer."""
    last = sequence[:, max(0, sequence.shape[1] - count) :].flip(1)
    return F.pad(last, (0, 0, 0, count - last.shape[1]))
