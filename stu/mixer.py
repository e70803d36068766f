"""The mixer contract: a map along time, (B, L, D) → (B, L, D), without residual, norm, dropout or transposition.

B batch, L length, D model width, K filters
"""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stu.errors import OptionError

State = Any  # each mixer's own NamedTuple of tensors; opaque to everything else


class Mixer(nn.Module, ABC):
    """A map along time. Built by `Mixer(d_model, *, …)` with plain keywords.

    `causal` says whether y_t depends on x_1 … x_t alone. A causal mixer also runs one step at a time: `forward`,
    `prefill` and `step` agree. Others raise `NotImplementedError` from `initial_state`, `prefill` and `step`.

    These four methods check their inputs in every mixer, see `_checked`; D is checked where a mixer has a `d_model`.
    """

    causal: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "initial_state", "step", "prefill"):
            if callable(method := vars(cls).get(name)):
                setattr(cls, name, _checked(method, name))

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


def _checked(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The method `name` of a mixer, which now refuses other inputs than its own in one line.

    Raises `NotImplementedError` for all but `forward` where the mixer is not causal; `OptionError` unless x is a
    floating-point (B, L, D) with L ≥ 1, or (B, D) for a step, and the mask a bool (B, L).
    """
    rank = 2 if name == "step" else 3

    @functools.wraps(method)
    def checked(self: Mixer, *inputs: Any, **options: Any) -> Any:
        if name != "forward" and not self.causal:
            raise NotImplementedError(f"{type(self).__name__} runs step by step only with causal=true")
        x = inputs[0] if inputs else options.get("x")
        if isinstance(x, Tensor):
            width = getattr(self, "d_model", x.shape[-1] if x.ndim else "D")
            if x.ndim != rank or x.shape[-1] != width or x.shape[1] == 0 or not x.is_floating_point():
                shape = f"(B, {width})" if rank == 2 else f"(B, L ≥ 1, {width})"
                raise OptionError("x", f"{x.dtype} {tuple(x.shape)}", f"must be floating-point {shape}")
            mask = options.get("mask", inputs[1] if name == "forward" and len(inputs) > 1 else None)
            if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
                found = f"{mask.dtype} {tuple(mask.shape)}"
                raise OptionError("mask", found, f"must be bool {tuple(x.shape[:2])}, as x has it")
        return method(self, *inputs, **options)

    return checked


MixerFactory = Callable[[int], Mixer]
ChannelMixerFactory = Callable[[int], nn.Module]
M = TypeVar("M", bound=Mixer)


def reverse_twin(mixer: M) -> M:
    """A causal copy of `mixer` with parameters drawn again, by its `reset_parameters`: to run from the end."""
    drawn = {id(parameter): nn.Parameter(torch.empty_like(parameter)) for parameter in mixer.parameters()}
    twin: Any = copy.deepcopy(mixer, drawn)
    twin.causal = True
    twin.reset_parameters()
    return twin
