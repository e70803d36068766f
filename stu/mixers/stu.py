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
from stu.ops.convolution import filter_convolution
from stu.ops.filters import Hankel, spectral_filters
from stu.ops.recurrence import linear_recurrence

Recurrence = Literal["learned", "fixed"]


class STUState(NamedTuple):
    """What a streaming STU remembers.

    inputs: (B, seq_len, D), the newest last; outputs: (B, k_y, D), the newest first; position: steps taken.
    """

    inputs: Tensor
    outputs: Tensor
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

    Initialised as in the official code: M^φ and M^y at zero, M^u normal of deviation
    D^{−1/2}, truncated at twice that. Without M^u the
    layer would begin as zero, so M^φ is then normal of variance 1/(K·D).
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
    ) -> None:
        super().__init__()
        require(k_u >= 0, "k_u", k_u, "must be at least 0")
        require(k_y >= 0, "k_y", k_y, "must be at least 0")
        require(delay >= 0, "delay", delay, "must be at least 0")
        require(recurrence in ("learned", "fixed"), "recurrence", recurrence, "must be learned or fixed")
        require(
            not (two_sided and hankel == "L"),
            "two_sided",
            two_sided,
            "must be false with hankel=L (one branch)",
        )
        self.d_model, self.seq_len, self.causal = d_model, seq_len, causal
        eigenvalues, filters = spectral_filters(seq_len, num_filters, hankel)
        fixed_lag = k_y if recurrence == "fixed" else 0
        # A plain attribute, no buffer: a model cast to half precision must not take its filters along.
        self.filters = filter_bank(
            eigenvalues**0.25 * filters, two_sided=two_sided, delay=delay, k_u=k_u, recurrence=fixed_lag
        )
        self._placed = self.filters, self.filters.device, self.filters  # their last copy for a device and dtype
        spectral = self.filters.shape[1] - k_u
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
        return filter_convolution(x, self._filters_for(x), self._weight(), self.reverse._weight())

    def initial_state(self, batch_size: int) -> STUState:
        """Zeros: nothing was seen."""
        self._require_causal()
        zeros = self.m_phi.new_zeros(batch_size, 1, self.d_model)
        lags = 0 if self.m_y is None else len(self.m_y)
        return STUState(zeros.expand(-1, self.seq_len, -1), zeros.expand(-1, lags, -1), 0)

    def step(self, x: Tensor, state: STUState) -> tuple[Tensor, STUState]:
        """x_t (B, D), state → y_t (B, D), state; at most seq_len steps."""
        self._require_causal()
        require(state.position < self.seq_len, "seq_len", self.seq_len, "steps were taken; the filters end here")
        inputs = torch.cat((state.inputs[:, 1:], x.unsqueeze(1)), 1)
        bank = self._filters_for(x).to(x.dtype)
        features = torch.einsum("bld,lk->bkd", inputs, bank.flip(0))  # (B, K, D)
        y = torch.einsum("bki,kio->bo", features, self._weight())
        outputs = state.outputs
        if self.m_y is not None:
            y = y + torch.einsum("bpi,pio->bo", outputs, self.m_y)
            outputs = torch.cat((y.unsqueeze(1), outputs[:, :-1]), 1)
        return y, STUState(inputs, outputs, state.position + 1)

    def prefill(self, x: Tensor) -> tuple[Tensor, STUState]:
        """(B, L, D) → (B, L, D) and the state from which `step` goes on."""
        y = self.forward(x)
        start = self.initial_state(len(x))
        length, lags = x.shape[1], start.outputs.shape[1]
        inputs = torch.cat((start.inputs[:, length:], x), 1)
        outputs = torch.cat((start.outputs, y), 1).flip(1)[:, :lags]
        return y, STUState(inputs, outputs, length)

    def _require_causal(self) -> None:
        if not self.causal:
            raise NotImplementedError("an STU runs step by step only with causal=true")

    def _run(self, x: Tensor) -> Tensor:
        """From the first step to the last, (B, L, D) → (B, L, D)."""
        y = filter_convolution(x, self._filters_for(x), self._weight())
        return y if self.m_y is None else linear_recurrence(y, self.m_y)

    def _weight(self) -> Tensor:
        """The matrices of all filters, (K, D, D)."""
        return self.m_phi if self.m_u is None else torch.cat((self.m_phi, self.m_u))

    def _filters_for(self, x: Tensor) -> Tensor:
        """The filters on the device of x, float64 only where x is."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        source, device, placed = self._placed
        if source is not self.filters or device != x.device or placed.dtype != dtype:
            self._placed = self.filters, x.device, self.filters.to(x.device, dtype)
        return self._placed[2]


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
