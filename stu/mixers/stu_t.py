r"""STU-T: the Spectral Transform Unit in its tensor-product ("tensordot") approximation.

B batch, L length, D model width, K filters (of all branches)

    v_t = u_t M,    y_{t,d} = Σ_{i≥0} k_d(i) v_{t−i,d},    k_d(i) = Σ_k m^+_{k,d} σ_k^{1/4} φ_k(i)
                                                                  + Σ_k m^−_{k,d} σ_k^{1/4} (−1)^i φ_k(i)

The matrices M_k of the STU, one for every filter, become one matrix times a diagonal: M_k ≈ M diag(m_k). So every
channel has one kernel, and the layer is one long convolution of D channels with D² + K·D parameters instead of K·D².
Source: Liu, Nguyen, Devre, Dogariu, Majumdar, Hazan, "Flash STU: Fast Spectral Transform Units", 2409.10489, and its
code (hazan-lab/flash-stu-2).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require
from stu.mixer import Mixer
from stu.mixers.stu import filter_bank
from stu.ops.bank import FilterBank
from stu.ops.filters import Hankel, spectral_filters
from stu.ops.long_convolution import long_convolution
from stu.ops.realization import STREAMING, Streaming, exponential_sums, realize_for_streaming


class STUTState(NamedTuple):
    """What a streaming STU-T remembers: y_t = Σ_n readout_n · memory_n, channel by channel.

    memory: (B, N, D), either the last inputs, projected, the newest first, or their sums Σ_i p_n^i v_{t−i}.
    readout: (N, D), the kernels or their coefficients. poles: (N, 1), or None with a window of inputs. recent:
    (B, delay, D), inputs still to come into the sums, the newest first. position: steps taken.
    """

    memory: Tensor
    readout: Tensor
    poles: Tensor | None
    recent: Tensor
    position: int


class STUT(Mixer):
    """STU-T: one input projection, then a mixture of fixed spectral filters for every channel.

    seq_len: the longest input, for which the filters are built. causal: without it, every channel has a second mixture
    (`m_reverse`), which runs from the end and is added. num_filters: filters of one branch. two_sided: the second
    branch with alternating signs, which systems with negative eigenvalues need; Hankel-L covers them with its single
    branch. delay: steps by which the filters lag (Flash STU: 0). shared_branches: one set of weights for both
    branches, as the published code has it; odd lags then cancel, and it is there for comparison only.
    streaming: what `step` remembers, as in the STU.

    Initialised as in that code: normal, of variance 2 / (rows + columns) for M and for the weights of each branch.
    """

    def __init__(
        self,
        d_model: int,
        *,
        seq_len: int,
        causal: bool = True,
        num_filters: int = 24,
        two_sided: bool = True,
        hankel: Hankel = "standard",
        delay: int = 0,
        shared_branches: bool = False,
        streaming: Streaming = "auto",
    ) -> None:
        super().__init__()
        require(delay >= 0, "delay", delay, "must be at least 0")
        require(
            not (two_sided and hankel == "L"),
            "two_sided",
            two_sided,
            "must be false with hankel=L (one branch)",
        )
        require(streaming in STREAMING, "streaming", streaming, f"must be one of {', '.join(STREAMING)}")
        require(two_sided or not shared_branches, "shared_branches", shared_branches, "needs two_sided=true")
        self.d_model, self.seq_len, self.causal = d_model, seq_len, causal
        self.num_filters, self.two_sided, self.hankel, self.delay = num_filters, two_sided, hankel, delay
        self.streaming = streaming
        eigenvalues, filters = spectral_filters(seq_len, num_filters, hankel)
        responses = filter_bank(eigenvalues**0.25 * filters, two_sided=two_sided, delay=delay)
        if shared_branches:
            responses = responses.unflatten(1, (2, -1)).sum(1)
        self.bank = FilterBank(responses)  # no buffer: a model cast to half precision must not take its filters along
        self.m_inputs = nn.Parameter(torch.empty(d_model, d_model))  # [in, out]
        self.m_filters = nn.Parameter(torch.empty(responses.shape[1], d_model))  # [filter, channel]
        self.m_reverse = None if causal else nn.Parameter(torch.empty_like(self.m_filters))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        nn.init.xavier_normal_(self.m_inputs)
        # Xavier's deviation of one branch, (K, D), for both: one matrix (2K, D) would start the wider unit smaller
        deviation = (2 / (self.num_filters + self.d_model)) ** 0.5
        nn.init.normal_(self.m_filters, std=deviation)
        if self.m_reverse is not None:
            nn.init.normal_(self.m_reverse, std=deviation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D), L ≤ seq_len."""
        if mask is not None:
            x = x.where(mask.unsqueeze(-1), x.new_zeros(()))
        return self._convolved(x @ self.m_inputs)

    def initial_state(self, batch_size: int) -> STUTState:
        """Zeros: nothing was seen."""
        return self._state(self.m_inputs.new_zeros(batch_size, 0, self.d_model))

    def step(self, x: Tensor, state: STUTState) -> tuple[Tensor, STUTState]:
        """x_t (B, D), state → y_t (B, D), state; at most seq_len steps."""
        self._require_causal()
        memory, readout, poles, recent, position = state
        require(position < self.seq_len, "seq_len", self.seq_len, "steps were taken; the filters end here")
        recent = torch.cat(((x @ self.m_inputs).unsqueeze(1), recent), 1)  # (B, delay + 1, D)
        memory = torch.cat((recent, memory[:, :-1]), 1) if poles is None else poles * memory + recent[:, -1:]
        y = (readout * memory).sum(1).to(recent.dtype)
        return y, STUTState(memory, readout, poles, recent[:, :-1], position + 1)

    def prefill(self, x: Tensor) -> tuple[Tensor, STUTState]:
        """(B, L, D) → (B, L, D) and the state from which `step` goes on."""
        v = x @ self.m_inputs
        return self._convolved(v), self._state(v)

    def _require_causal(self) -> None:
        if not self.causal:
            raise NotImplementedError("an STU-T runs step by step only with causal=true")

    def _state(self, v: Tensor) -> STUTState:
        """The state after the projected inputs (B, L, D)."""
        self._require_causal()
        length = v.shape[1]
        realization = realize_for_streaming(self.seq_len, self.num_filters, self.hankel, self.streaming, v.device)
        if realization is None:
            window = F.pad(v.flip(1), (0, 0, 0, self.seq_len - length))
            return STUTState(
                window, self._kernel(self.m_filters, self.bank.on(v.device, v.dtype)), None, v[:, :0], length
            )
        poles, coefficients = (t.to(v.device) for t in realization[:2])
        readout = self._kernel(self.m_filters.unflatten(0, (-1, self.num_filters)), coefficients)  # (S, N, D)
        if self.two_sided:  # (−1)^i p^i = (−p)^i
            poles, readout = torch.cat((poles, -poles)), readout.expand(2, -1, -1)
        sums = exponential_sums(v[:, : max(0, length - self.delay)], poles)
        recent = F.pad(v, (0, 0, self.delay, 0)).flip(1)[:, : self.delay]
        return STUTState(sums, readout.flatten(0, 1), poles.unsqueeze(1), recent, length)

    def _convolved(self, v: Tensor) -> Tensor:
        """Every channel with its kernel, (B, L, D) → (B, L, D)."""
        require(v.shape[1] <= self.seq_len, "seq_len", self.seq_len, f"is below the input's {v.shape[1]} steps")
        filters = self.bank.on(v.device, v.dtype)[: v.shape[1]]
        kernel = self._kernel(self.m_filters, filters)
        if self.m_reverse is None:
            return long_convolution(v, kernel)
        reverse = self._kernel(self.m_reverse, filters)  # both hear the present; the future begins one step ahead
        return long_convolution(v, torch.cat((kernel[:1] + reverse[:1], kernel[1:])), reverse[1:])

    def _kernel(self, weight: Tensor, filters: Tensor) -> Tensor:
        """Σ_k m_k φ_k in the dtype of the filters, whatever that of the weights or an enclosing autocast."""
        with torch.autocast(filters.device.type, enabled=False):
            return filters @ weight.to(filters.dtype)
