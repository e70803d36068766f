"""The mixer contract: a map along time, (B, L, D) → (B, L, D), without residual, norm, dropout or transposition.

B batch, L length, D model width, K filters
"""

import copy
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stu.errors import OptionError, require, require_length

State = Any  # each mixer's own NamedTuple; opaque to everything else, but see `map_state`


class Mixer(nn.Module, ABC):
    """A map along time. Built by `Mixer(d_model, *, …)` with plain keywords.

    `causal` says whether y_t depends on x_1 … x_t alone. A causal mixer also runs in pieces: `forward`, `prefill` and
    `step` agree, wherever a sequence is cut. Others raise `NotImplementedError` from all methods that have a state.

    Called as `mixer(x, mask)`; in addition every mixer takes

        mixer(x, cu_seqlens=…)   packed sequences: x (1, total, D), sequence i is x[0, cu_seqlens[i] : cu_seqlens[i+1]]
        mixer(x, mask, state=…)  what follows the steps of a state: the output of `prefill` alone

    Inputs are checked in one place for all mixers, see `_checked`; D is checked where a mixer has a `d_model`.
    """

    causal: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "initial_state", "step", "step_", "prefill"):
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
        """One step: x_t (B, D) and the state before it → y_t (B, D) and the state after it, a new one."""

    @abstractmethod
    def prefill(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """`forward` over a piece (B, L, D), and the state from which `step`, or the next piece, continues.

        mask: (B, L); the real positions of a sequence stand side by side, and its state is that after the last of them,
        as if it had been alone. state: that before the first of them; None at the start of a sequence.
        """

    def resized(self, seq_len: int) -> AbstractContextManager[None]:
        """Inside, inputs may have up to `seq_len` steps, with the same parameters: to evaluate at other lengths.

        Raises `OptionError` where the mixer has a `seq_len` of its own and does not say how it goes on.
        """
        require_length(seq_len, getattr(self, "seq_len", math.inf))
        return nullcontext()

    def step_(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`step` in place: the new state's tensors, but for its `system`, are those of `state`. Without gradients.

        For decoding in a loop, or a CUDA graph. Raises `OptionError` where the state would grow: `reserve` first.
        """
        with torch.no_grad():
            y, after = self.step(x, state)
            return y, map_state(_overwritten, state, after)

    def reserve(self, state: State, max_steps: int) -> State:
        """A copy of the state with room for `max_steps` more steps: tensors that would grow have their final shape."""
        return map_state(torch.clone, state)

    def select(self, state: State, index: Tensor) -> State:
        """The state of some sequences of the batch, in any order, any number of times: index (B',), integers.

        How many steps it has taken stays the number of the longest sequence of the batch.
        """
        return select(state, index)


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """The state whose tensors are `function` of those of states of one kind.

    A state is a NamedTuple of states, of tensors with the batch first, and of what is no tensor, here taken from the
    last. What all sequences share, such as a discretised system, is a field `system`, and also taken from the last.
    """
    last = states[-1]
    if isinstance(last, Tensor):
        return function(*states)
    if not isinstance(last, tuple):
        return last
    names = getattr(last, "_fields", [""] * len(last))
    parts = [
        values[-1] if name == "system" else map_state(function, *values)
        for name, *values in zip(names, *states, strict=True)
    ]
    return type(last)(*parts) if hasattr(last, "_fields") else tuple(parts)


def select(state: State, index: Tensor) -> State:
    """What `Mixer.select` returns, for a state of any kind. Raises `OptionError` for an index that is no integers."""
    whole = index.ndim == 1 and not index.is_floating_point() and index.dtype != torch.bool
    require(whole, "index", f"{index.dtype} {tuple(index.shape)}", "must be integers (B',)")
    return map_state(lambda part: part.index_select(0, index.to(part.device)), state)


def _overwritten(before: Tensor, after: Tensor) -> Tensor:
    if before.shape != after.shape:
        raise OptionError("state", tuple(before.shape), "has no room for one more step; see `reserve`")
    return before.copy_(after)


def _checked(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The method `name` of a mixer, which now refuses other inputs than its own in one line.

    Raises `NotImplementedError` for all with a state where the mixer is not causal, or does not take one; `OptionError`
    unless x is a floating-point (B, L, D) with L ≥ 1, or (B, D) for a step, the mask a bool (B, L), in `prefill`
    without gaps, and the state one of B sequences.
    """
    known = list(inspect.signature(method).parameters)
    rank = 2 if name in ("step", "step_") else 3

    @functools.wraps(method)
    def checked(self: Mixer, *inputs: Any, **options: Any) -> Any:
        cu_seqlens = options.pop("cu_seqlens", None) if name == "forward" else None
        given = {**dict(zip(known[1:], inputs, strict=False)), **options}  # as PyTorch 2.7 compiles it
        x: Any = given.pop("x", None)
        mask, state = given.get("mask"), given.get("state")
        if not self.causal and (name != "forward" or state is not None):
            raise NotImplementedError(f"{type(self).__name__} runs step by step only with causal=true")
        if isinstance(x, Tensor):
            _check_input(x, rank, getattr(self, "d_model", None))
            _check_mask(x, mask, gaps=name == "forward" and state is None)
            _check_state(x, state)
        if cu_seqlens is not None:
            return packed(self, x, cu_seqlens, **given)
        if name == "forward" and state is not None:
            return self.prefill(x, **given)[0]
        for extra in ("mask", "state"):
            if extra not in known and options.pop(extra, None) is not None:
                raise NotImplementedError(f"{type(self).__name__}.{name} takes no {extra}")
        return method(self, *inputs, **options)

    return checked


def _check_input(x: Tensor, rank: int, width: int | None) -> None:
    if width is None:
        width = x.shape[-1] if x.ndim else 0
    if x.ndim != rank or x.shape[-1] != width or x.shape[1] == 0 or not x.is_floating_point():
        shape = f"(B, {width})" if rank == 2 else f"(B, L ≥ 1, {width})"
        raise OptionError("x", f"{x.dtype} {tuple(x.shape)}", f"must be floating-point {shape}")


def _check_mask(x: Tensor, mask: Tensor | None, *, gaps: bool) -> None:
    if mask is None:
        return
    found = f"{mask.dtype} {tuple(mask.shape)}"
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise OptionError("mask", found, f"must be bool {tuple(x.shape[:2])}, as x has it")
    if not gaps and (mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(1) > 1).any():
        raise OptionError("mask", found, "must have no padding between real positions where a state follows")


def _check_state(x: Tensor, state: State) -> None:
    part = state
    while isinstance(part, tuple) and part:  # every tensor of a state has the batch first: one is enough
        part = part[0]
    if isinstance(part, Tensor) and part.shape[0] != x.shape[0]:
        raise OptionError("state", f"of {part.shape[0]} sequences", f"must be of {x.shape[0]}, as x is")


def packed(module: nn.Module, x: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    """A module (x, mask) → y on packed sequences (1, total, D), each alone: padded to the longest, and packed again.

    Options (1, total, …) are padded as x is. Raises `OptionError` unless `cu_seqlens` ascends from 0 to total, and with
    a mask or a state.
    """
    allowed = f"must ascend from 0 to {x.shape[1]}, for x of batch 1 and without a mask or a state"
    alone = len(x) == 1 and options.pop("mask", None) is None and options.pop("state", None) is None
    edges = cu_seqlens[[0, -1]].tolist() if cu_seqlens.ndim == 1 and len(cu_seqlens) > 1 else None
    lengths = cu_seqlens.diff().to(x.device)
    fits = alone and edges == [0, x.shape[1]] and bool((lengths >= 0).all())
    require(fits, "cu_seqlens", cu_seqlens.tolist(), allowed)
    mask = torch.arange(int(lengths.max()), device=x.device) < lengths.unsqueeze(1)  # (sequences, longest)

    def padded(option: Any) -> Any:
        if not isinstance(option, Tensor) or option.shape[:2] != x.shape[:2]:
            return option
        places = mask.view(*mask.shape, *[1] * (option.ndim - 2))
        return option.new_zeros(*mask.shape, *option.shape[2:]).masked_scatter(places, option[0])

    y: Tensor = module(padded(x), mask=mask, **{name: padded(option) for name, option in options.items()})
    return y[mask].unsqueeze(0)


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
