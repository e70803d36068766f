r"""STU-T: the Spectral Transform Unit in its tensor-product ("tensordot") approximation.

B batch, L length, D model width, K filters (of all branches)

    v_t = u_t M,    y_{t,d} = Σ_{i≥0} k_d(i) v_{t−i,d},    k_d(i) = Σ_k m^+_{k,d} σ_k^{1/4} φ_k(i)
                                                                  + Σ_k m^−_{k,d} σ_k^{1/4} (−1)^i φ_k(i)

The matrices M_k of the STU, one per filter, become one matrix times a diagonal: M_k ≈ M diag(m_k). So every channel has
one kernel, and the layer is one long convolution of D channels with D² + K·D parameters instead of K·D².

Source: Liu, Nguyen, Devre, Dogariu, Majumdar, Hazan, "Flash STU: Fast Spectral Transform Units", 2409.10489, and its
code (hazan-lab/flash-stu-2).
"""

import copy
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stu.errors import require, require_length
from stu.mixer import Mixer
from stu.ops.bank import (
    Extension,
    FilterBank,
    extended_bank,
    lengthened,
    require_filters,
    require_lag,
    spectral_bank,
)
from stu.ops.filters import Hankel
from stu.ops.long_convolution import long_convolution
from stu.ops.padding import at_front, longest, masked, put_back
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.realization import Streaming
from stu.ops.streaming import Memory, MemoryState, Past, streaming_memory
from stu.structure import Structured


class STUTState(NamedTuple):
    """The memory of a streaming STU-T.

    inputs: what the filters need of the projected inputs v (`stu.ops.streaming`). system: the kernel of every channel
    in terms of that memory. position: steps taken.
    """

    inputs: MemoryState
    system: Tensor
    position: int


class STUT(Structured, Mixer):
    """STU-T: one input projection, then a mixture of fixed spectral filters for every channel.

    seq_len: the longest input, for which the filters are built. causal: if false, every channel has a second mixture
    (`m_reverse`), which runs from the end and is added. num_filters: filters per branch. two_sided: the second
    branch with alternating signs, which systems with negative eigenvalues need; Hankel-L covers them with its single
    branch. bandwidth: of hankel="slepian", as in the STU. delay: steps by which the filters lag (Flash STU: 0).
    shared_branches: one set of weights for both branches, as in the published code; odd lags then cancel, so it is
    there for comparison only.
    streaming: what `step` keeps; extension: how `resized` makes the filters longer; as in the STU.

    Initialised as in that code: normal, of variance 2 / (rows + columns) for M and for the weights of each branch.
    """

    structure = ("bank.structure", "shared_branches")

    def __init__(
        self,
        d_model: int,
        *,
        seq_len: int,
        causal: bool = True,
        num_filters: int = 24,
        two_sided: bool = True,
        hankel: Hankel = "standard",
        bandwidth: float | None = None,
        delay: int = 0,
        shared_branches: bool = False,
        streaming: Streaming = "auto",
        extension: Extension = "recomputed",
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require_lag("delay", delay, seq_len)
        require_filters(hankel, two_sided=two_sided, streaming=streaming, extension=extension)
        require(two_sided or not shared_branches, "shared_branches", shared_branches, "needs two_sided=true")
        self.d_model, self.seq_len, self.causal = d_model, seq_len, causal
        self.num_filters, self.shared_branches, self.streaming = num_filters, shared_branches, streaming
        self.extension = extension
        # not a buffer: the filters must stay exact in a model of half precision
        bank = spectral_bank(seq_len, num_filters, hankel, two_sided=two_sided, delay=delay, bandwidth=bandwidth)
        self.bank = _shared(bank) if shared_branches else bank
        self.m_inputs = nn.Parameter(torch.empty(d_model, d_model))  # [in, out]
        self.m_filters = nn.Parameter(torch.empty(self.bank.filters.shape[1], d_model))  # [filter, channel]
        self.m_reverse = None if causal else nn.Parameter(torch.empty_like(self.m_filters))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        nn.init.xavier_normal_(self.m_inputs)
        # of one branch, (K, D), for both: as one matrix (2K, D) they would start smaller
        std = (2 / (self.num_filters + self.d_model)) ** 0.5
        nn.init.normal_(self.m_filters, std=std)
        if self.m_reverse is not None:
            nn.init.normal_(self.m_reverse, std=std)

    @property
    def filters(self) -> Tensor:
        """(L, K) every filter that the kernels mix."""
        return self.bank.filters

    def resized(self, seq_len: int) -> AbstractContextManager[None]:
        """Inside, inputs may have up to seq_len steps; longer filters are made as `extension` says."""
        if seq_len <= self.seq_len:
            return super().resized(seq_len)
        return lengthened([self], seq_len, self._extended_bank(seq_len, self.extension))

    def extended(self, seq_len: int) -> "STUT":
        """A copy with the same parameters for sequences of up to `seq_len` steps; see `STU.extended`."""
        bank, longer = self._extended_bank(seq_len, "continued"), copy.deepcopy(self)
        longer.seq_len, longer.bank = seq_len, bank
        return longer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D), L ≤ seq_len."""
        require_length(x.shape[1], self.seq_len)
        return self._convolved(masked(x, mask) @ self.m_inputs)

    def initial_state(self, batch_size: int) -> STUTState:
        """Zeros."""
        return STUTState(self._memory().initial(batch_size, self.d_model), self._readout(), 0)

    def step(self, x: Tensor, state: STUTState) -> tuple[Tensor, STUTState]:
        """x_t (B, D), state → y_t (B, D), state; at most seq_len steps."""
        require(state.position < self.seq_len, "seq_len", self.seq_len, "steps were taken; the filters end here")
        v, memory = x @ self.m_inputs, self._memory()
        inputs = memory.advance(v, state.inputs)
        y = memory.read(inputs, state.system).to(v.dtype)
        return y, STUTState(inputs, state.system, state.position + 1)

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, state: STUTState | None = None
    ) -> tuple[Tensor, STUTState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues; at most seq_len steps in all."""
        memory, position, past = self._memory(), longest(x, mask), None
        v = masked(x, mask) @ self.m_inputs
        if state is None:
            require_length(x.shape[1], self.seq_len)
            y = self._convolved(v)
        else:
            position += state.position
            steps = f"is below the {position} steps of state and input"
            require(position <= self.seq_len, "seq_len", self.seq_len, steps)
            past = memory.past(state.inputs, state.position)
            with no_autocast(v):
                y = put_back(self._resumed(at_front(v, mask), past), mask)
        with no_autocast(v):
            return y, STUTState(memory.after(v, mask, past), self._readout(), position)

    def _extended_bank(self, seq_len: int, extension: Extension) -> FilterBank:
        bank = extended_bank(self.bank, seq_len, extension)
        return _shared(bank) if self.shared_branches else bank

    def _resumed(self, v: Tensor, past: Past) -> Tensor:
        """What follows a past, (B, L, D) → (B, L, D)."""
        whole = torch.cat((past.inputs, v), 1).to(at_least_float32(v, self.m_filters))
        y = self._convolved(whole)[:, -v.shape[1] :]
        return self._memory().with_sums(y, past, self.m_filters).to(v.dtype)

    def _convolved(self, v: Tensor) -> Tensor:
        """Every channel with its kernel, (B, L, D) → (B, L, D)."""
        filters = self.bank.on(v.device, v.dtype)[: v.shape[1]]
        with no_autocast(v):
            kernel = filters @ self.m_filters.to(filters.dtype)  # (L, D)
            if self.m_reverse is None:
                return long_convolution(v, kernel)
            reverse = filters @ self.m_reverse.to(filters.dtype)
        # both directions see the present; the future starts one step ahead
        return long_convolution(v, torch.cat((kernel[:1] + reverse[:1], kernel[1:])), reverse[1:])

    def _readout(self) -> Tensor:
        with no_autocast(self.m_filters):
            return self._memory().readout(self.m_filters)

    def _memory(self) -> Memory:
        return streaming_memory(self.bank, self.streaming, self.m_inputs.device, at_least_float32(self.m_inputs))


def _shared(bank: FilterBank) -> FilterBank:
    """Filters that share one weight per channel in both branches: their sums."""
    return FilterBank(bank.filters.unflatten(1, (2, -1)).sum(1), bank.spectral)
