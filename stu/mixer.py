"""What a mixer is: it mixes along time, (B, L, D) → (B, L, D), and owns no residual, norm, dropout or transposition.

B batch, L length, D model width
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

State = Any  # each mixer's own NamedTuple of tensors; opaque to everybody else


class Mixer(nn.Module, ABC):
    """A map over time. Built by `Mixer(d_model, *, …)` with plain keywords.

    `causal` says whether y_t depends on x_1 … x_t alone. A causal mixer also runs one step at a time: `forward`,
    `prefill` and `step` agree. Others raise `NotImplementedError` from `initial_state`, `prefill` and `step`.
    """

    causal: bool
    rotary: bool = False  # whether it turns by the position itself, which `positions=rotary` of a backbone asks for

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D); `mask` (B, L) is True on real positions, which never see the others."""

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: x_t (B, D) and the state before it → y_t (B, D) and the state after it."""

    @abstractmethod
    def prefill(self, x: Tensor) -> tuple[Tensor, State]:
        """`forward` over a whole prefix (B, L, D), and the state from which `step` goes on."""


MixerFactory = Callable[[int], Mixer]
ChannelMixerFactory = Callable[[int], nn.Module]
