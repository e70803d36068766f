r"""Gated recurrent networks, the LSTM and the GRU, by PyTorch's own kernels.

B batch, L length, D model width, N state size; σ the logistic function; products of vectors are elementwise

    LSTM  i, f, o = σ(W x_t + U h_{t−1} + b),   g = tanh(W x_t + U h_{t−1} + b)      each with its own W, U, b
          c_t = f c_{t−1} + i g,   h_t = o tanh(c_t)
    GRU   r, z = σ(W x_t + U h_{t−1} + b),   n = tanh(W x_t + b + r (U h_{t−1} + b'))
          h_t = (1 − z) n + z h_{t−1}
"""

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stu.errors import require
from stu.mixer import Mixer, map_state, reverse_twin
from stu.ops.padding import at_front, put_back
from stu.ops.precision import at_least_float32, no_autocast
from stu.ops.transforms import transformed

Cell = Literal["lstm", "gru"]


class RNNState(NamedTuple):
    """h and, of an LSTM, c after the last step, each (B, N)."""

    hidden: Tensor
    cell: Tensor | None


class RNN(Mixer):
    """One layer of LSTM or GRU; y_t = h_t, projected to d_model where the state has another size.

    causal: if false, a second network with parameters of its own (`reverse`) runs from the end and is added, as in
    Deep Speech 2 (1512.02595). d_state: N. Padding is skipped: each sequence runs through its real positions only.

    Initialised by PyTorch, except that the bias of the LSTM's forget gate starts at 1, so that it remembers.

    Sources: Hochreiter, Schmidhuber, "Long short-term memory", 1997; Cho et al., 1406.1078; the forget gate's bias:
    Jozefowicz et al., "An empirical exploration of recurrent network architectures", 2015.
    """

    def __init__(self, d_model: int, *, d_state: int, cell: Cell, causal: bool = True) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require(d_state >= 1, "d_state", d_state, "must be at least 1")
        require(cell in ("lstm", "gru"), "cell", cell, "must be lstm or gru")
        self.d_model, self.d_state, self.causal = d_model, d_state, causal
        self.rnn = (nn.LSTM if cell == "lstm" else nn.GRU)(d_model, d_state, batch_first=True)
        self._open_forget_gate()
        self.project_out = nn.Identity() if d_state == d_model else nn.Linear(d_state, d_model)
        self.reverse: RNN | None = None
        if not causal:
            self.reverse = reverse_twin(self)

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        self.rnn.reset_parameters()
        self._open_forget_gate()
        if isinstance(self.project_out, nn.Linear):
            self.project_out.reset_parameters()
        if self.reverse is not None:
            self.reverse.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        y, _ = self._run(at_front(x, mask), self._zeros(len(x)))
        y = put_back(y, mask)
        if self.reverse is None:
            return y
        return y + self.reverse(x.flip(1), None if mask is None else mask.flip(1)).flip(1)

    def initial_state(self, batch_size: int) -> RNNState:
        """Zeros."""
        return self._zeros(batch_size)

    def step(self, x: Tensor, state: RNNState) -> tuple[Tensor, RNNState]:
        """x_t (B, D), state → y_t (B, D), state."""
        y, state = self._run(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def prefill(self, x: Tensor, mask: Tensor | None = None, state: RNNState | None = None) -> tuple[Tensor, RNNState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        state = self._zeros(len(x)) if state is None else state
        counts = None if mask is None or len(x) == 0 else mask.sum(1)  # packing needs a sequence
        y, state = self._run(at_front(x, mask), state, counts)
        return put_back(y, mask), state

    def _open_forget_gate(self) -> None:
        if isinstance(self.rnn, nn.LSTM):
            forget = slice(self.d_state, 2 * self.d_state)  # of gates i, f, g, o
            biases = dict(self.rnn.named_parameters())
            nn.init.ones_(biases["bias_ih_l0"][forget])
            nn.init.zeros_(biases["bias_hh_l0"][forget])  # PyTorch adds two biases

    def _zeros(self, batch_size: int) -> RNNState:
        weight = cast(Tensor, self.rnn.weight_hh_l0)  # replicas of `DataParallel` have attributes, no parameters
        zeros = weight.new_zeros(batch_size, self.d_state, dtype=at_least_float32(weight))
        return RNNState(zeros, zeros.clone() if isinstance(self.rnn, nn.LSTM) else None)

    def _run(self, x: Tensor, state: RNNState, counts: Tensor | None = None) -> tuple[Tensor, RNNState]:
        """(B, L, D), state → (B, L, D), state; the recurrence in float32 at least, whatever an enclosing autocast.

        counts: how many positions (B,) of each sequence lead to its state; all where None.
        """
        dtype = state.hidden.dtype
        weights = {name: weight.to(dtype) for name, weight in self.rnn.named_parameters()}
        hidden, cell = map_state(lambda part: part.unsqueeze(0), state)  # (1, B, N)
        inputs: Any = x.to(dtype)
        if transformed(inputs, *weights.values(), *state):
            with no_autocast(x):
                y, after = _step_by_step(inputs, state, counts, *weights.values())
            return self.project_out(y.to(x.dtype)), after
        if counts is not None:
            inputs = pack_padded_sequence(inputs, counts.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False)
        self.rnn.train(torch.is_grad_enabled())  # cuDNN has gradients only there; there is no dropout to switch
        with no_autocast(x):
            y, after = functional_call(self.rnn, weights, (inputs, hidden if cell is None else (hidden, cell)))
        after = RNNState(after[0], None) if cell is None else RNNState(after[0][0], after[1][0])
        if counts is not None:
            y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
            some = (counts > 0).unsqueeze(1)
            after = map_state(lambda new, old: new.where(some, old), after, state)
        return self.project_out(y.to(x.dtype)), after


def _step_by_step(
    x: Tensor,
    state: RNNState,
    counts: Tensor | None,
    w_input: Tensor,
    w_hidden: Tensor,
    b_input: Tensor,
    b_hidden: Tensor,
) -> tuple[Tensor, RNNState]:
    """The equations themselves, for function transforms, which PyTorch's kernels do not bear; arguments as `_run` has.

    The weights of all gates are together, in PyTorch's order: i, f, g, o or r, z, n.
    """
    outputs = []
    for t, drive in enumerate((x @ w_input.T + b_input).unbind(1)):
        fed_back = state.hidden @ w_hidden.T + b_hidden
        if state.cell is None:
            (r, z, n), (r_fed, z_fed, n_fed) = drive.chunk(3, -1), fed_back.chunk(3, -1)
            z, n = (z + z_fed).sigmoid(), (n + (r + r_fed).sigmoid() * n_fed).tanh()
            after = RNNState((1 - z) * n + z * state.hidden, None)
        else:
            i, f, g, o = (drive + fed_back).chunk(4, -1)
            cell = f.sigmoid() * state.cell + i.sigmoid() * g.tanh()
            after = RNNState(o.sigmoid() * cell.tanh(), cell)
        outputs.append(after.hidden)
        real = None if counts is None else (counts > t).unsqueeze(1)
        state = after if real is None else map_state(lambda new, old, real=real: new.where(real, old), after, state)
    return torch.stack(outputs, 1), state
