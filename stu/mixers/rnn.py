r"""Gated recurrent networks, the LSTM and the GRU, by PyTorch's own kernels.

B batch, L length, D model width, N state size; σ the logistic function, products of vectors entry by entry

    LSTM  i, f, o = σ(W x_t + U h_{t−1} + b),   g = tanh(W x_t + U h_{t−1} + b)      each with W, U, b of its own
          c_t = f c_{t−1} + i g,   h_t = o tanh(c_t)
    GRU   r, z = σ(W x_t + U h_{t−1} + b),   n = tanh(W x_t + b + r (U h_{t−1} + b'))
          h_t = (1 − z) n + z h_{t−1}
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stu.errors import require
from stu.mixer import Mixer

Cell = Literal["lstm", "gru"]


class RNNState(NamedTuple):
    """h and, of an LSTM, c after the last step, each (1, B, N)."""

    hidden: Tensor
    cell: Tensor | None


class RNN(Mixer):
    """One layer of LSTM or GRU; y_t = h_t, projected to d_model where the state has another size.

    causal: without it, a second network with parameters of its own (`reverse`) runs from the end and is added, as in
    Deep Speech 2 (1512.02595). d_state: N. Padding is no step at all: each sequence is run through its real positions.

    Initialised by PyTorch, but for the forget gate of the LSTM, whose bias starts at 1, so that it remembers.

    Sources: Hochreiter, Schmidhuber, "Long short-term memory", 1997; Cho et al., 1406.1078; the forget gate's bias:
    Jozefowicz et al., "An empirical exploration of recurrent network architectures", 2015.
    """

    def __init__(self, d_model: int, *, d_state: int, cell: Cell = "lstm", causal: bool = True) -> None:
        super().__init__()
        require(d_state >= 1, "d_state", d_state, "must be at least 1")
        require(cell in ("lstm", "gru"), "cell", cell, "must be lstm or gru")
        self.d_state, self.causal = d_state, causal
        self.rnn = (nn.LSTM if cell == "lstm" else nn.GRU)(d_model, d_state, batch_first=True)
        if cell == "lstm":
            weights, forget = dict(self.rnn.named_parameters()), slice(d_state, 2 * d_state)  # of gates i, f, g, o
            nn.init.ones_(weights["bias_ih_l0"][forget])
            nn.init.zeros_(weights["bias_hh_l0"][forget])  # PyTorch adds two biases
        self.project_out = nn.Identity() if d_state == d_model else nn.Linear(d_state, d_model)
        self.reverse = None if causal else RNN(d_model, d_state=d_state, cell=cell)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        y = self._run_real(x, mask)
        if self.reverse is None:
            return y
        return y + self.reverse._run_real(x.flip(1), None if mask is None else mask.flip(1)).flip(1)

    def initial_state(self, batch_size: int) -> RNNState:
        """Zeros."""
        self._require_causal()
        return self._zeros(batch_size)

    def step(self, x: Tensor, state: RNNState) -> tuple[Tensor, RNNState]:
        """x_t (B, D), state → y_t (B, D), state."""
        self._require_causal()
        y, state = self._run(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def prefill(self, x: Tensor) -> tuple[Tensor, RNNState]:
        """(B, L, D) → (B, L, D) and the state from which `step` goes on."""
        return self._run(x, self.initial_state(len(x)))

    def _require_causal(self) -> None:
        if not self.causal:
            raise NotImplementedError("an RNN runs step by step only with causal=true")

    def _zeros(self, batch_size: int) -> RNNState:
        weight = next(self.rnn.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        zeros = weight.new_zeros(1, batch_size, self.d_state, dtype=dtype)
        return RNNState(zeros, zeros if isinstance(self.rnn, nn.LSTM) else None)

    def _run_real(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """From the first to the last real position, (B, L, D) → (B, L, D)."""
        start = self._zeros(len(x))
        if mask is None:
            return self._run(x, start)[0]
        x = x.where(mask.unsqueeze(-1), x.new_zeros(()))
        real_first = mask.logical_not().int().argsort(stable=True, dim=1).unsqueeze(-1)  # (B, L, 1)
        y, _ = self._run(x.take_along_dim(real_first, 1), start)
        return y.take_along_dim(real_first.argsort(1), 1)

    def _run(self, x: Tensor, state: RNNState) -> tuple[Tensor, RNNState]:
        """(B, L, D), state → (B, L, D), state; the recurrence in float32 at least, whatever an enclosing autocast."""
        dtype = state.hidden.dtype
        weights = {name: weight.to(dtype) for name, weight in self.rnn.named_parameters()}
        before = state.hidden if state.cell is None else (state.hidden, state.cell)
        with torch.autocast(x.device.type, enabled=False):
            y, after = functional_call(self.rnn, weights, (x.to(dtype), before))
        state = RNNState(after, None) if state.cell is None else RNNState(*after)
        return self.project_out(y.to(x.dtype)), state
