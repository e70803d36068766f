r"""What Mamba-2 and the gated DeltaNet share: a short convolution, then a recurrence whose decays follow the input.

B batch, L length, D model width, H heads, N state size, P width of a head, E = H·P inner width, S convolved signals
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require
from stu.mixer import Mixer
from stu.ops.padding import at_front, masked, put_back
from stu.ops.precision import at_least_float32, no_autocast, product_dtype
from stu.structure import Structured


class SelectiveState(NamedTuple):
    """The memory of a streaming layer.

    signals: (B, d_conv − 1, S), the last inputs of the convolution, the newest last; hidden: (B, H, N, P).
    """

    signals: Tensor
    hidden: Tensor


class Selective(Structured, Mixer):
    """Projections, convolution, recurrence, output, where padding is a step that leaves the state as it is.

    A layer sets what follows, `reverse` being its twin from the end or None, and says what is projected, how the
    convolved signals are split, what the recurrence is, and what its output.
    """

    d_model: int
    hidden_shape: tuple[int, int, int]  # (H, N, P)
    project_in: nn.Linear
    conv: nn.Conv2d  # images of one column: unlike those of sequences, their channels may stay in the last dimension
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    project_out: nn.Linear
    reverse: Self | None

    @abstractmethod
    def _reset_system(self) -> None:
        """Draw what is neither a projection nor the convolution."""

    @abstractmethod
    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """(…, D) → the gate (…, E), the signals (…, S), and what is zero where nothing happens, (…, H) each."""

    @abstractmethod
    def _split(self, signals: Tensor) -> tuple[Tensor, ...]:
        """The convolved signals (…, S) → those of each head or group."""

    @abstractmethod
    def _recur(self, signals: Sequence[Tensor], controls: Sequence[Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """From the state before the first step → y (B, L, H, P) and the last state (B, H, N, P)."""

    @abstractmethod
    def _recur_step(
        self, signals: Sequence[Tensor], controls: Sequence[Tensor], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same for one step, without L."""

    @abstractmethod
    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """(…, H, P) and (…, E) → (…, D)."""

    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        self.project_in.reset_parameters()
        self.conv.reset_parameters()
        self._reset_system()
        self.project_out.reset_parameters()
        if self.reverse is not None:
            self.reverse.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        y, *_ = self._run(masked(x, mask), mask, self._zeros(len(x)))
        if self.reverse is None:
            return y
        return y + self.reverse(x.flip(1), None if mask is None else mask.flip(1)).flip(1)

    def initial_state(self, batch_size: int) -> SelectiveState:
        """Zeros."""
        return self._zeros(batch_size)

    def step(self, x: Tensor, state: SelectiveState) -> tuple[Tensor, SelectiveState]:
        """x_t (B, D), state → y_t (B, D), state."""
        gate, signal, controls = self._project(x)
        signals = torch.cat((state.signals, signal.unsqueeze(1)), 1)  # (B, d_conv, S)
        y, hidden = self._recur_step(self._split(self._convolve(signals).squeeze(1)), controls, state.hidden)
        return self._output(y, gate), SelectiveState(signals[:, 1:], hidden)

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, state: SelectiveState | None = None
    ) -> tuple[Tensor, SelectiveState]:
        """(B, L, D) → (B, L, D) and the state from which `step` continues."""
        state = self._zeros(len(x)) if state is None else state
        if mask is None:
            y, signals, hidden = self._run(x, None, state)
            return y, SelectiveState(signals[:, x.shape[1] :].clone(), hidden)
        count = mask.sum(1, keepdim=True)
        real = torch.arange(x.shape[1], device=x.device) < count
        y, signals, hidden = self._run(at_front(x, mask), real, state)
        newest = count + torch.arange(self.conv.kernel_size[0] - 1, device=x.device)  # (B, d_conv − 1)
        return put_back(y, mask), SelectiveState(signals.take_along_dim(newest.unsqueeze(-1), 1), hidden)

    def _signal_dtype(self) -> torch.dtype:
        """That in which the signals are projected."""
        return product_dtype(self.project_in.weight)

    def _zeros(self, batch_size: int) -> SelectiveState:
        weight = self.conv.weight
        signals = weight.new_zeros(batch_size, self.conv.kernel_size[0] - 1, len(weight), dtype=self._signal_dtype())
        return SelectiveState(signals, weight.new_zeros(batch_size, *self.hidden_shape, dtype=at_least_float32(weight)))

    def _run(self, x: Tensor, mask: Tensor | None, state: SelectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D), zero on padding → y, like it, the signals (B, d_conv − 1 + L, S) and the last h (B, H, N, P)."""
        gate, signals, controls = self._project(x)
        if mask is not None:
            controls = [control * mask.unsqueeze(-1) for control in controls]
        signals = torch.cat((state.signals, signals), 1)
        y, hidden = self._recur(self._split(self._convolve(signals)), controls, state.hidden)
        return self._output(y, gate), signals, hidden

    def _convolve(self, signals: Tensor) -> Tensor:
        """Silu of the convolution, in float32 at least: (B, d_conv − 1 + L, S) → (B, L, S)."""
        dtype = at_least_float32(signals)
        signals, weight = signals.to(dtype), self.conv.weight.to(dtype)
        bias = None if self.conv.bias is None else self.conv.bias.to(dtype)
        if signals.shape[1] == self.conv.kernel_size[0]:  # one step
            convolved = (signals * weight[:, 0, :, 0].T).sum(1, keepdim=True)
            convolved = convolved if bias is None else convolved + bias
        elif torch.compiler.is_compiling():  # a convolution would hold the program to one length; these are fused
            taps = weight[:, 0, :, 0].T  # (d_conv, S)
            length = signals.shape[1] - len(taps) + 1
            convolved = taps.new_zeros(()) if bias is None else bias
            for lag, tap in enumerate(taps):
                convolved = convolved + signals[:, lag : lag + length] * tap
        else:
            columns = signals.unsqueeze(2).permute(0, 3, 1, 2)  # (B, S, L, 1), in memory (B, L, 1, S)
            with no_autocast(signals):
                columns = F.conv2d(columns, weight, bias, groups=len(weight))
            convolved = columns.squeeze(-1).transpose(1, 2)
        return F.silu(convolved)

    def _rates(self) -> Tensor:
        """A, a scalar per head (H,)."""
        return -self.A_log.to(at_least_float32(self.A_log)).exp()

    def _draw_rates(self, dt_min: float, dt_max: float, floor: float, A_range: tuple[float, float]) -> None:
        """Δ log-uniform from dt_min to dt_max but at least `floor`, −A uniform in A_range."""
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        dt = dt.clamp_min(floor)
        with torch.no_grad():
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.uniform_(*A_range).log_()


def require_sizes(**sizes: int) -> None:
    """Raises `OptionError` for the first that is below 1."""
    for name, value in sizes.items():
        require(value >= 1, name, value, "must be at least 1")


def require_divisor(name: str, value: int, of: str, whole: int) -> None:
    """Raises `OptionError` unless `value` divides the number called `of`."""
    require(value >= 1 and whole % value == 0, name, value, f"must divide {of} ({whole})")


def require_rates(dt_min: float, dt_max: float, floor: float, A_range: tuple[float, float]) -> None:
    """Raises `OptionError` for what Δ and A cannot be initialised to."""
    require(0 < dt_min <= dt_max, "dt_min", dt_min, f"must be above 0 and at most dt_max ({dt_max})")
    require(dt_max <= 1e6, "dt_max", dt_max, "must be at most 1e6")
    require(floor > 0, "dt_init_floor", floor, "must be above 0")
    slowest, fastest = A_range
    allowed = "must be two finite numbers above 0, the smaller first"
    require(0 < slowest <= fastest < math.inf, "A_init_range", A_range, allowed)
