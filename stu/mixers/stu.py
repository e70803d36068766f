r"""The Spectral Transform Unit.

B batch, L length, D model width, K filters (of all branches), k_u, k_y lags of the input and output terms

    y_t = Σ_{i=1}^{k_y} M^y_i y_{t−i} + Σ_{i=1}^{k_u} M^u_i u_{t+1−i}
          + Σ_k M^{φ+}_k σ_k^{1/4} U⁺_{t−2,k} + Σ_k M^{φ−}_k σ_k^{1/4} U⁻_{t−2,k}

with U^±_{t,k} = Σ_{i=0}^{t−1} u_{t−i} (±1)^i φ_k(i). Source: Agarwal, Suo, Chen, Hazan, "Spectral State Space
Models", 2312.06837, sections 2 and 4, and its official code (google-deepmind/spectral_ssm).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stu.errors import require
from stu.mixer import Mixer
from stu.ops.bank import FilterBank
from stu.ops.convolution import ALGORITHMS, Algorithm, filter_convolution
from stu.ops.filters import Hankel, spectral_filters
from stu.ops.realization import STREAMING, Streaming, exponential_sums, realize_for_streaming
from stu.ops.recurrence import linear_recurrence

Recurrence = Literal["learned", "fixed"]


class STUState(NamedTuple):
    """What a streaming STU remembers.

    inputs: (B, W, D), the newest first: all that the filters reach with a window, else what delay and k_u ask for.
    outputs: (B, P, D), the newest first. sums: (B, S, N, D) float64, Σ_i (±p_n)^i u_{t−delay−i} for S branches and N
    poles, none with a window. position: steps taken.
    """

    inputs: Tensor
    outputs: Tensor
    sums: Tensor
    position: int


class STU(Mixer):
    """Spectral Transform Unit: fixed spectral filters, learned matrices.

    seq_len: the longest input, for which the filters are built. causal: without it, a second unit with parameters of
    its own (`reverse`) runs from the end and is added. num_filters: filters of one branch.
    two_sided: the second branch with alternating signs, which systems with negative eigenvalues need; Hankel-L
    covers them with its single branch. k_u: input lags with matrices M^u of their own. k_y: output lags;
    `recurrence="learned"` gives each a matrix M^y (AR-STU), "fixed" is the paper's y_{t−k_y} with coefficient I.
    delay: steps by which the spectral features lag (2 in the paper; 0 for the purely spectral unit of Flash STU,
    2409.10489, which also has k_u = k_y = 0).
    algorithm: how `stu.ops.convolution` computes; "auto" is the faster one.
    streaming: what `step` remembers: a "window" of all inputs, O(seq_len) a step, or the "states" of the filters'
    exponentials (`stu.ops.realization`), O(1) a step. "auto": states where they are faster and as exact.

    Initialised as in the official code: M^φ and M^y at zero, M^u normal of deviation D^{−1/2}, truncated at twice that.
    Without M^u the layer would begin as zero, so M^φ is then normal of variance 1/(K·D).
    """

    def __init__(
        self,
        d_model: int,
        *,
        seq_len: int,
        causal: bool = True,
        num_filters: int = 24,
        two_sided: bool = True,
        k_u: int = 3,
        k_y: int = 2,
        recurrence: Recurrence = "learned",
        hankel: Hankel = "standard",
        delay: int = 2,
        algorithm: Algorithm = "auto",
        streaming: Streaming = "auto",
    ) -> None:
        super().__init__()
        require(k_u >= 0, "k_u", k_u, "must be at least 0")
        require(k_y >= 0, "k_y", k_y, "must be at least 0")
        require(delay >= 0, "delay", delay, "must be at least 0")
        require(recurrence in ("learned", "fixed"), "recurrence", recurrence, "must be learned or fixed")
        require(algorithm in ALGORITHMS, "algorithm", algorithm, f"must be one of {', '.join(ALGORITHMS)}")
        require(streaming in STREAMING, "streaming", streaming, f"must be one of {', '.join(STREAMING)}")
        require(
            not (two_sided and hankel == "L"),
            "two_sided",
            two_sided,
            "must be false with hankel=L (one branch)",
        )
        self.d_model, self.seq_len, self.causal = d_model, seq_len, causal
        self.num_filters, self.two_sided, self.hankel, self.delay = num_filters, two_sided, hankel, delay
        self.k_u, self.fixed_lag = k_u, k_y if recurrence == "fixed" else 0
        self.algorithm, self.streaming = algorithm, streaming
        eigenvalues, filters = spectral_filters(seq_len, num_filters, hankel)
        responses = filter_bank(
            eigenvalues**0.25 * filters, two_sided=two_sided, delay=delay, k_u=k_u, recurrence=self.fixed_lag
        )
        self.bank = FilterBank(responses)  # no buffer: a model cast to half precision must not take its filters along
        self._realized: dict[torch.device, tuple[Tensor, Tensor] | None] = {}
        spectral = responses.shape[1] - k_u
        self.m_phi = nn.Parameter(torch.empty(spectral, d_model, d_model))  # [filter, in, out]
        self.m_u = nn.Parameter(torch.empty(k_u, d_model, d_model)) if k_u else None  # [lag, in, out]
        learned = k_y if recurrence == "learned" else 0
        self.m_y = nn.Parameter(torch.empty(learned, d_model, d_model)) if learned else None  # [lag, in, out]
        self.reset_parameters()
        self.reverse: STU | None = None
        if not causal:
            self.reverse = STU(
                d_model,
                seq_len=seq_len,
                num_filters=num_filters,
                two_sided=two_sided,
                k_u=k_u,
                k_y=k_y,
                recurrence=recurrence,
                hankel=hankel,
                delay=delay,
                algorithm=algorithm,
            )

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        deviation = self.d_model**-0.5
        if self.m_u is None:
            nn.init.normal_(self.m_phi, std=deviation * len(self.m_phi) ** -0.5)
        else:
            nn.init.zeros_(self.m_phi)
            nn.init.trunc_normal_(self.m_u, std=deviation, a=-2 * deviation, b=2 * deviation)
        if self.m_y is not None:
            nn.init.zeros_(self.m_y)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D), L ≤ seq_len."""
        require(x.shape[1] <= self.seq_len, "seq_len", self.seq_len, f"is below the input's {x.shape[1]} steps")
        if mask is not None:
            x = x.where(mask.unsqueeze(-1), x.new_zeros(()))
        if self.reverse is None:
            return self._run(x)
        if self.m_y is not None:
            return self._run(x) + self.reverse._run(x.flip(1)).flip(1)
        return filter_convolution(x, self.bank, self._weight(), self.reverse._weight(), algorithm=self.algorithm)

    def initial_state(self, batch_size: int) -> STUState:
        """Zeros: nothing was seen."""
        self._require_causal()
        realized = self._realization(self.m_phi.device)
        if realized is None:
            before, branches, poles = self.seq_len - 1, 0, 0
        else:
            before, (branches, poles, _) = max(self.delay, self.k_u - 1), realized[0].shape
        lags = len(self.m_y) if self.m_y is not None else self.fixed_lag if poles else 0
        double = torch.float64 if poles else None  # outputs too: a fixed recurrence sums up their rounding
        inputs = self.m_phi.new_zeros(batch_size, before, self.d_model)
        outputs = self.m_phi.new_zeros(batch_size, lags, self.d_model, dtype=double)
        sums = self.m_phi.new_zeros(batch_size, branches, poles, self.d_model, dtype=double)
        return STUState(inputs, outputs, sums, 0)

    def step(self, x: Tensor, state: STUState) -> tuple[Tensor, STUState]:
        """x_t (B, D), state → y_t (B, D), state; at most seq_len steps."""
        self._require_causal()
        require(state.position < self.seq_len, "seq_len", self.seq_len, "steps were taken; the filters end here")
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.m_phi.dtype), torch.float32)
        inputs, outputs = torch.cat((x.unsqueeze(1), state.inputs), 1), state.outputs  # (B, W + 1, D)
        with torch.autocast(x.device.type, enabled=False):
            spectral, lagged, sums = self._features(inputs, state.sums, dtype)
            y = _mix(spectral, self.m_phi)
            if self.m_u is not None:
                y = y + _mix(lagged, self.m_u)
            if self.m_y is not None:
                y = y + _mix(outputs.to(dtype), self.m_y)
            elif outputs.shape[1]:  # a fixed recurrence, unless the window has it folded into the filters
                y = y + outputs[:, -1]
            outputs = torch.cat((y.unsqueeze(1), outputs), 1)[:, : outputs.shape[1]]
        return y.to(x.dtype), STUState(inputs[:, :-1], outputs, sums, state.position + 1)

    def prefill(self, x: Tensor) -> tuple[Tensor, STUState]:
        """(B, L, D) → (B, L, D) and the state from which `step` goes on."""
        y = self.forward(x)
        start, length = self.initial_state(len(x)), x.shape[1]
        sums, realized = start.sums, self._realization(x.device)
        if realized is not None:
            with torch.autocast(x.device.type, enabled=False):
                sums = exponential_sums(x[:, : max(0, length - self.delay)], realized[0].flatten()).view_as(sums)
        return y, STUState(_newest(x, start.inputs), _newest(y, start.outputs), sums, length)

    def _features(self, inputs: Tensor, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What the matrices act on, U_{t−delay} (B, K, D) and u_t … u_{t+1−k_u} (B, k_u, D), and the sums after u_t."""
        realized = self._realization(inputs.device)
        if realized is None:
            features = self.bank.on(inputs.device, dtype).to(dtype).T @ inputs.to(dtype)
            return features[:, : len(self.m_phi)], features[:, len(self.m_phi) :], sums
        poles, coefficients = realized
        sums = torch.addcmul(inputs[:, self.delay, None, None].to(sums.dtype), poles, sums)  # (B, S, N, D)
        return (coefficients @ sums).flatten(1, 2).to(dtype), inputs[:, : self.k_u].to(dtype), sums

    def _require_causal(self) -> None:
        if not self.causal:
            raise NotImplementedError("an STU runs step by step only with causal=true")

    def _run(self, x: Tensor) -> Tensor:
        """From the first step to the last, (B, L, D) → (B, L, D)."""
        y = filter_convolution(x, self.bank, self._weight(), algorithm=self.algorithm)
        return y if self.m_y is None else linear_recurrence(y, self.m_y)

    def _weight(self) -> Tensor:
        """The matrices of all filters, (K, D, D)."""
        return self.m_phi if self.m_u is None else torch.cat((self.m_phi, self.m_u))

    def _realization(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Poles (S, N, 1) and coefficients (K, N) of the states; None where `step` keeps a window."""
        if device not in self._realized:
            with torch.inference_mode(False):
                self._realized[device] = self._realize(device)
        return self._realized[device]

    def _realize(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Decide between states and window, at the first streaming call."""
        found = realize_for_streaming(self.seq_len, self.num_filters, self.hankel, self.streaming, device)
        if found is None:
            return None
        poles, coefficients, _ = found
        branches = torch.stack((poles, -poles)) if self.two_sided else poles.unsqueeze(0)  # (−1)^i p^i = (−p)^i
        return branches.unsqueeze(-1).to(device), coefficients.T.contiguous().to(device)


def _mix(features: Tensor, weight: Tensor) -> Tensor:
    """Σ_k f_k M_k: (B, K, D), (K, D, D) → (B, D)."""
    return features.flatten(1) @ weight.to(features.dtype).flatten(0, 1)


def _newest(sequence: Tensor, before: Tensor) -> Tensor:
    """The last n of what was `before` (B, n, D; the newest first) and a sequence after it, the newest first."""
    n = before.shape[1]
    return torch.cat((sequence[:, max(0, sequence.shape[1] - n) :].flip(1), before), 1)[:, :n]


def filter_bank(
    scaled: Tensor, *, two_sided: bool = False, delay: int = 2, k_u: int = 0, recurrence: int = 0
) -> Tensor:
    """Every fixed impulse response of an STU, (L, K), so that the layer is one convolution.

    scaled: (L, K₁) filters σ_k^{1/4} φ_k. Columns: the positive branch, the branch of alternating signs where
    `two_sided`, both later by `delay`, then the input lags 0 … k_u − 1 as unit impulses. `recurrence` = p > 0 folds
    a fixed y_{t−p} in: a running sum of stride p over each response.
    """
    length = len(scaled)
    branches = [scaled]
    if two_sided:
        branches.append(scaled * (1 - 2 * (torch.arange(length) % 2)).unsqueeze(1))
    spectral = torch.cat(branches, 1)
    delayed = torch.cat((spectral.new_zeros(min(delay, length), spectral.shape[1]), spectral))[:length]
    bank = torch.cat((delayed, torch.eye(length, k_u, dtype=scaled.dtype)), 1)
    for phase in range(min(recurrence, length)):
        bank[phase::recurrence] = bank[phase::recurrence].cumsum(0)
    return bank
