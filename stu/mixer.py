"""The mixer contract: a map along time, (B, L, D) → (B, L, D), without residual, norm, dropout or transposition.

B batch, L length, D model width, K filters
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

State = Any  # each mixer's own NamedTuple of tensors; opaque to everything else


class Mixer(nn.Module, ABC):
    """A map along time. Built by `Mixer(d_model, *, …)` with plain keywords.

    `causal` says whether y_t depends on x_1 … x_t alone. A causal mixer also runs one step at a time: `forward`,
    `prefill` and `step` agree. Others raise `NotImplementedError` from `initial_state`, `prefill` and `step`.
    """

    causal: bool

    @property
    def filters(self) -> Tensor | None:
        """Fixed impulse responses (L, K) that the mixer convolves with, for figures; None where it has none."""
        return None

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
        """`forward` over a whole prefix (B, L, D), and the state from which `step` continues."""

    def require_causal(self) -> None:
        """Raise `NotImplementedError` unless the mixer is causal."""
        if not self.causal:
            raise NotImplementedError(f"{type(self).__name__} runs step by step only with causal=true")


MixerFactory = Callable[[int], Mixer]
ChannelMixerFactory = Callable[[int], nn.Module]


M = TypeVar("M", bound=Mixer)


def reverse_twin(mixer: M) -> M:
    """A causal copy of `mixer` with parameters drawn again, by its `reset_parameters`: to run from the end."""
    twin: Any = copy.deepcopy(mixer)
    twin.causal = True
    twin.reset_parameters()
    return twin
