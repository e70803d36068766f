r"""The Spectral Transform Unit.

B batch, L length, D model width, K filters (of all branches), k_u, k_y lags of the input and output terms

    y_t = Σ_{i=1}^{k_y} M^y_i y_{t−i} + Σ_{i=1}^{k_u} M^u_i u_{t+1−i}
          + Σ_k M^{φ+}_k σ_k^{1/4} U⁺_{t−2,k} + Σ_k M^{φ−}_k σ_k^{1/4} U⁻_{t−2,k}

with `U^±_{t,k} = Σ_{i=0}^{t−1} u_{t−i} (±1)^i φ_k(i)`. All terms but the first are one convolution with a fixed filter
bank, mixed by learned matrices (`stu.ops.convolution`); the first is a linear recurrence (`stu.ops.recurrence`).
`stu.reference.stu` has the equations one by one.

Source: Agarwal, Suo, Chen, Hazan, "Spectral State Space Models", 2312.06837, sections 2 and 4, and its official code
(google-deepmind/spectral_ssm).
"""

import copy
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stu.errors import require, require_length
from stu.mixer import Mixer, reverse_twin
from stu.ops.bank import Extension, extended_bank, lengthened, require_filters, require_lag, spectral_bank
from stu.ops.convolution import ALGORITHMS, Algorithm, filter_convolution
from stu.ops.filters import Hankel
from stu.ops.padding import at_end, at_front, longest, masked, put_back
from stu.ops.precision import at_least_float32, no_autocast, to_float64
from stu.ops.realization import Streaming
from stu.ops.recurrence import fixed_recurrence, linear_recurrence
from stu.ops.streaming import Memory, MemoryState, Past, last_outputs, mix, newest, streaming_memory
from stu.structure import Structured

Recurrence = Literal["learned", "fixed"]


class STUState(NamedTuple):
    """The memory of a streaming STU.

    inputs: what the filters need of the inputs (`stu.ops.streaming`). outputs: (B, k_y, D) float64, the newest first,
    those that a recurrence needs. position: steps taken.
    """

    inputs: MemoryState
    outputs: Tensor
    position: int


class STU(Structured, Mixer):
    """Spectral Transform Unit: fixed spectral filters, learned matrices.

    seq_len: the longest input, for which the filters are built; `extended` goes on past it. causal: if false, a second
    unit with parameters of its own (`reverse`) runs from the end and is added. num_filters: filters per branch.
    two_sided: the second branch with alternating signs, which systems with negative eigenvalues need; Hankel-L
    covers them with its single branch. hankel="slepian": filters for complex eigenvalues α with |arg α| ≤ 2π·bandwidth,
    and around −1 where two_sided (`stu.ops.slepian`; 2601.22400); None: the bandwidth that K filters cover.
    k_u: input lags with matrices M^u of their own. k_y: output lags;
    `recurrence="learned"` gives each a matrix M^y (AR-STU), "fixed" is the paper's y_{t−k_y} with coefficient I.
    delay: steps by which the spectral features lag (2 in the paper; 0 for the purely spectral unit of Flash STU,
    2409.10489, which also has k_u = k_y = 0).
    algorithm: how `stu.ops.convolution` computes; "auto" is the fastest one.
    streaming: what `step` keeps: a "window" of all inputs, O(seq_len) per step, or the "states" of the filters'
    exponentials (`stu.ops.realization`), O(1) per step. "auto": states where they are faster and as exact.
    extension: how `resized` makes the filters longer than seq_len: "recomputed" for that length, "continued" as their
    exponentials, which Slepian filters have not, or "truncated", zero past their length. The first changes all outputs,
    the others leave the first seq_len as they are; experiments/length_generalization compares them.

    Initialised as in the official code: M^φ and M^y zero, M^u normal of standard deviation D^{−1/2}, truncated at twice
    that. Without M^u the layer would start as zero, so M^φ is then normal of variance 1/(K·D).
    """

    structure = ("bank.structure",)

    def __init__(
        self,
        d_model: int,
        *,
        seq_len: int,
        causal: bool = True,
        num_filters: int = 24,
        two_sided: bool = True,
        k_u: int = 3,
        k_y: int = 0,
        recurrence: Recurrence = "fixed",
        hankel: Hankel = "standard",
        bandwidth: float | None = None,
        delay: int = 2,
        algorithm: Algorithm = "auto",
        streaming: Streaming = "auto",
        extension: Extension = "recomputed",
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        for name, lag in {"k_u": k_u, "k_y": k_y, "delay": delay}.items():
            require_lag(name, lag, seq_len)
        require(recurrence in ("learned", "fixed"), "recurrence", recurrence, "must be learned or fixed")
        require(algorithm in ALGORITHMS, "algorithm", algorithm, f"must be one of {', '.join(ALGORITHMS)}")
        require_filters(hankel, two_sided=two_sided, streaming=streaming, extension=extension)
        self.d_model, self.seq_len, self.causal = d_model, seq_len, causal
        self.algorithm, self.streaming, self.extension = algorithm, streaming, extension
        learned = k_y if recurrence == "learned" else 0
        # not a buffer: the filters must stay exact in a model of half precision
        lags: dict[str, Any] = {"delay": delay, "k_u": k_u, "recurrence": k_y - learned}
        self.bank = spectral_bank(seq_len, num_filters, hankel, two_sided=two_sided, bandwidth=bandwidth, **lags)
        self.m_phi = nn.Parameter(torch.empty(num_filters * (1 + two_sided), d_model, d_model))  # [filter, in, out]
        self.m_u = nn.Parameter(torch.empty(k_u, d_model, d_model)) if k_u else None  # [lag, in, out]
        self.m_y = nn.Parameter(torch.empty(learned, d_model, d_model)) if learned else None  # [lag, in, out]
        self.reverse: STU | None = None
        self.reset_parameters()
        if not causal:
            self.reverse = reverse_twin(self)

    def reset_parameters(self) -> None:
        """Draw the initial parameters, also those of `reverse`."""
        std = self.d_model**-0.5
        if self.m_u is None:
            nn.init.normal_(self.m_phi, std=std * len(self.m_phi) ** -0.5)
        else:
            nn.init.zeros_(self.m_phi)
            nn.init.trunc_normal_(self.m_u, std=std, a=-2 * std, b=2 * std)
        if self.m_y is not None:
            nn.init.zeros_(self.m_y)
        if self.reverse is not None:
            self.reverse.reset_parameters()

    @property
    def filters(self) -> Tensor:
        """(L, K) every impulse response that the matrices mix."""
        return self.bank.filters

    def resized(self, seq_len: int) -> AbstractContextManager[None]:
        """Inside, inputs may have up to seq_len steps; longer filters are made as `extension` says."""
        if seq_len <= self.seq_len:
            return super().resized(seq_len)
        units = [unit for unit in (self, self.reverse) if unit is not None]
        return lengthened(units, seq_len, extended_bank(self.bank, seq_len, self.extension))

    def extended(self, seq_len: int) -> "STU":
        """A copy with the same parameters for sequences of up to `seq_len` steps, no fewer than now.

        Its filters are exactly those of this layer, and go on as the exponentials that realise them: the first outputs
        stay the same, and the sums of `streaming="states"` run on as they are. How accurate that is says
        `Realization.response`; also, that the last of many filters grow past their length.
        Parameters may be exchanged between both.

        Raises `OptionError` for fewer steps than now, and for a bank of other than spectral filters.
        """
        bank, longer = extended_bank(self.bank, seq_len), copy.deepcopy(self)
        for unit in (longer, longer.reverse):
            if unit is not None:
                unit.seq_len, unit.bank = seq_len, bank
        return longer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D), L ≤ seq_len."""
        require_length(x.shape[1], self.seq_len)
        x = masked(x, mask)
        # without a recurrence, both directions are one convolution
        reverse = None if self.reverse is None or self.m_y is not None else self.reverse._weight()
        y = filter_convolution(x, self.bank, self._weight(), reverse, algorithm=self.algorithm)
        if self.m_y is None:
            return y
        y = linear_recurrence(y, self.m_y)
        return y if self.reverse is None else y + self.reverse(x.flip(1)).flip(1)

    def initial_state(self, batch_size: int) -> STUState:
        """Zeros."""
        outputs = self.m_phi.new_zeros(batch_size, 0, self.d_model)
        return STUState(self._memory(outputs).initial(batch_size, self.d_model), self._kept(outputs), 0)

    def step(self, x: Tensor, state: STUState) -> tuple[Tensor, STUState]:
        """x_t (B, D), state → y_t (B, D), state; at most seq_len steps."""
        require(state.position < self.seq_len, "seq_len", self.seq_len, "steps were taken; the filters end here")
        memory = self._memory(x)
        with no_autocast(x):
            inputs = memory.advance(x, state.inputs)
            spectral, lagged = memory.features(inputs, 0 if self.m_u is None else len(self.m_u))
            dtype = at_least_float32(x, self.m_phi)
            y = self._mixed(spectral.to(dtype), lagged.to(dtype), state.outputs)
        outputs = torch.cat((y.unsqueeze(1).to(state.outputs.dtype), state.outputs), 1)[:, : state.outputs.shape[1]]
        return y.to(x.dtype), STUState(inputs, outputs, state.position + 1)

    def prefill(self, x: Tensor, mask: Tensor | None = None, state: STUState | None = None) -> tuple[Tensor, STUState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues; at most seq_len steps in all."""
        position, past, before = longest(x, mask), None, None
        if state is None:
            y = self.forward(x, mask)
        else:
            position += state.position
            steps = f"is below the {position} steps of state and input"
            require(position <= self.seq_len, "seq_len", self.seq_len, steps)
            past, before = self._memory(x).past(state.inputs, state.position), state.outputs.flip(1)
            with no_autocast(x):
                y = put_back(self._resumed(at_front(x, mask), past, state.outputs), mask)
        with no_autocast(x):
            inputs, outputs = self._memory(x).after(x, mask, past), self._kept(y, mask, before)
            return y.to(x.dtype), STUState(inputs, outputs, position)

    def _resumed(self, x: Tensor, past: Past, outputs: Tensor) -> Tensor:
        """What follows a past and the outputs before, newest first: (B, L, D) → (B, L, D), in float32 at least."""
        memory, dtype = self._memory(x), at_least_float32(x, self.m_phi)
        whole = torch.cat((past.inputs.to(dtype), x.to(dtype)), 1)
        drive = last_outputs(whole, memory.unfolded or self.bank, self._weight(), x.shape[1], self.algorithm)
        drive = memory.with_sums(drive, past, self.m_phi)
        return fixed_recurrence(drive, outputs) if self.m_y is None else linear_recurrence(drive, self.m_y, outputs)

    def _mixed(self, spectral: Tensor, lagged: Tensor, outputs: Tensor) -> Tensor:
        """One step of the equation: features (B, K, D), lagged inputs (B, k_u, D), the outputs before → (B, D)."""
        y = mix(spectral, self.m_phi)
        if self.m_u is not None:
            y = y + mix(lagged, self.m_u)
        if self.m_y is not None:
            return y + mix(outputs.to(y.dtype), self.m_y)
        return y + outputs[:, -1] if outputs.shape[1] else y

    def _kept(self, y: Tensor, mask: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """The newest outputs that a recurrence needs; in float64, since its rounding errors accumulate."""
        lags = self._memory(self.m_phi).feedback if self.m_y is None else len(self.m_y)
        return to_float64(newest(at_end(y, mask, before), lags) if lags else y[:, :0])

    def _weight(self) -> Tensor:
        """The matrices of all columns of the bank, (K + k_u, D, D)."""
        return self.m_phi if self.m_u is None else torch.cat((self.m_phi, self.m_u))

    def _memory(self, x: Tensor) -> Memory:
        """What streaming keeps of the inputs, for inputs like x."""
        return streaming_memory(self.bank, self.streaming, self.m_phi.device, at_least_float32(x, self.m_phi))
