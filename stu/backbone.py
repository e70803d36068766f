"""A backbone stacks residual blocks of mixers; a sequence model adds an encoder before it and a head after it.

B batch, L length, D model width
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stu.compilation import compilable, compiled, require_compilable
from stu.encoders import LearnedPositions, Positions, RotaryPositions, SinusoidalPositions
from stu.errors import require, require_length
from stu.mixer import ChannelMixerFactory, MixerFactory, State, packed, select
from stu.norm import Norm, make_norm
from stu.recomputation import recomputable, recomputed
from stu.structure import Structured

DEEPEST = 1000  # blocks


class Block(Structured):
    """One residual block: a mixer over time, a mixer over channels, norms and dropout around them.

    With `channel_residual=False` both stand in one residual branch, as in S4 and the STU:
    x + dropout(channel(mixer(norm(x)))). With True each has its own norm and branch, as in a Transformer.
    `prenorm=False` normalises after the addition instead of before the mixer.
    """

    structure = ("prenorm", "channel_residual")

    def __init__(
        self,
        d_model: int,
        *,
        mixer: MixerFactory,
        channel_mixer: ChannelMixerFactory | None,
        norm: Norm,
        prenorm: bool,
        channel_residual: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.prenorm, self.channel_residual = prenorm, channel_residual
        self.mixer = mixer(d_model)
        self.channel_mixer = nn.Identity() if channel_mixer is None else channel_mixer(d_model)
        self.norm = make_norm(norm, d_model)
        self.channel_norm = make_norm(norm, d_model) if channel_residual else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self._after(x, self.mixer(self._before(x, mask), mask), mask)

    def prefill(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """(B, L, D), state → (B, L, D), state."""
        mixed, state = self.mixer.prefill(self._before(x, mask), mask=mask, state=state)
        return self._after(x, mixed, mask), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, D), state → y_t (B, D), state."""
        mixed, state = self.mixer.step(self._before(x), state)
        return self._after(x, mixed), state

    def step_(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`step` in place."""
        mixed, state = self.mixer.step_(self._before(x), state)
        return self._after(x, mixed), state

    def _before(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(x, mask) if self.prenorm else x

    def _after(self, x: Tensor, mixed: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.channel_norm is None:
            x = x + self.dropout(self.channel_mixer(mixed))
            return x if self.prenorm else self.norm(x, mask)
        x = x + self.dropout(mixed)
        if self.prenorm:
            return x + self.dropout(self.channel_mixer(self.channel_norm(x, mask)))
        x = self.norm(x, mask)
        return self.channel_norm(x + self.dropout(self.channel_mixer(x)), mask)


class BackboneState(NamedTuple):
    """The positions (B,) of the next inputs, the largest of them as a number, and the state of each mixer."""

    position: int
    positions: Tensor
    mixers: tuple[State, ...]


class Backbone(Structured):
    """`depth` blocks over sequences of width `d_model`; the same code whichever mixer it holds.

    mixer: one factory `mixer(d_model)`, or several, cycled over depth, which each must reach (hybrids need no class of
    their own).
    channel_mixer: None where the mixer is a complete block of its own, as in Mamba.
    positions: absolute positions added to the input; "rotary" ones are applied inside attention. They count padding:
    those of a padded piece are its indices, and each sequence continues from the index after its last real position.
    final_norm: one more norm after the last block, as in pre-norm Transformers.
    compile: `forward` of the blocks by `torch.compile`, with the same results but for rounding, and first derivatives
    alone; not under function transforms, nor what has a state. Raises `OptionError` for PyTorch's LSTM and GRU, and
    where there is neither a C++ compiler nor a GPU.
    checkpoint_blocks: in training, a block keeps its input alone for the backward pass, which computes the rest again
    (gradient checkpointing): less memory, a quarter to a half more time; the same results, dropout and statistics
    included.
    """

    structure = ("position_kind",)

    def __init__(
        self,
        d_model: int,
        *,
        depth: int,
        mixer: MixerFactory | Sequence[MixerFactory],
        channel_mixer: ChannelMixerFactory | None,
        norm: Norm = "batch",
        prenorm: bool = True,
        final_norm: bool = False,
        channel_residual: bool = False,
        dropout: float = 0.0,
        positions: Positions = "none",
        seq_len: int = 0,
        compile: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        require(1 <= depth <= DEEPEST, "depth", depth, f"must be in 1 … {DEEPEST}")
        require(0 <= dropout < 1, "dropout", dropout, "must be in [0, 1)")
        mixers = [mixer] if callable(mixer) or mixer is None else list(mixer)
        require(len(mixers) > 0 and all(map(callable, mixers)), "mixer", mixer, "must name at least one mixer")
        enough = f"must be at least {len(mixers)}, so that each of the {len(mixers)} layers has a block"
        require(depth >= len(mixers), "depth", depth, enough)
        named = callable(channel_mixer) or channel_mixer is None
        require(named, "channel_mixer", channel_mixer, "must name a channel mixer, such as GLU, or be null")
        alone = channel_mixer is None and channel_residual
        require(not alone, "channel_residual", channel_residual, "must be false without a channel mixer")
        self.d_model = d_model
        self.positions, self.position_kind = _make_positions(positions, d_model, seq_len), positions
        self.longest = seq_len if positions == "learned" else math.inf
        # nn.ModuleList does not type its elements
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(
                d_model,
                mixer=mixers[i % len(mixers)],
                channel_mixer=channel_mixer,
                norm=norm,
                prenorm=prenorm,
                channel_residual=channel_residual,
                dropout=dropout,
            )
            for i in range(depth)
        )
        rotary = any(isinstance(module, RotaryPositions) for module in self.modules())
        require(rotary or positions != "rotary", "positions", positions, "no mixer of this model has rotary positions")
        self.norm = make_norm(norm if final_norm else "none", d_model)
        self.compiled, self.checkpoint_blocks = compile, checkpoint_blocks
        if compile:
            require_compilable(self)

    @property
    def causal(self) -> bool:
        """Whether output t depends on inputs 1 … t alone."""
        return all(block.mixer.causal for block in self.blocks)

    @property
    def limit(self) -> float:
        """The most steps that it takes: of learned positions, and of mixers that are built for a length."""
        return min(self.longest, *(getattr(block.mixer, "seq_len", math.inf) for block in self.blocks))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: BackboneState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) → (B, L, D); after the steps of a state, the output of `prefill`.

        cu_seqlens: x (1, total, D) is of packed sequences, as for a mixer.
        """
        if cu_seqlens is not None:
            return packed(self, x, cu_seqlens, mask=mask, state=state)
        if state is not None:
            return self.prefill(x, mask, state)[0]
        x = self._place(x, None)
        compile_blocks = self.compiled and compilable(x, self.parameters())
        recompute = self.checkpoint_blocks and self.training and recomputable(x, self.parameters())
        for block in self.blocks:
            run = partial(compiled, block) if compile_blocks else block
            x = recomputed(run, block, x, mask) if recompute else run(x, mask)
        return self.norm(x, mask)

    @contextmanager
    def resized(self, seq_len: int) -> Iterator[None]:
        """Inside, inputs may have up to `seq_len` steps, as `Mixer.resized` says. Raises `OptionError` where not."""
        learned = f"there are none beyond {self.longest} steps"
        require(seq_len <= self.longest, "positions", self.position_kind, learned)
        with ExitStack() as resized:
            for block in self.blocks:
                resized.enter_context(block.mixer.resized(seq_len))
            yield

    def initial_state(self, batch_size: int) -> BackboneState:
        """The state before the first step."""
        positions = torch.zeros(batch_size, dtype=torch.long, device=next(self.parameters()).device)
        return BackboneState(0, positions, tuple(block.mixer.initial_state(batch_size) for block in self.blocks))

    def step(self, x: Tensor, state: BackboneState) -> tuple[Tensor, BackboneState]:
        """x_t (B, D), state → y_t (B, D), state; causal backbones in eval mode only."""
        y, mixers = self._through(self._place(x.unsqueeze(1), state).squeeze(1), state.mixers, Block.step)
        return self.norm(y), BackboneState(state.position + 1, state.positions + 1, mixers)

    def step_(self, x: Tensor, state: BackboneState) -> tuple[Tensor, BackboneState]:
        """`step` in place, see `Mixer.step_`; a CUDA graph of it advances `positions`, but not `position`."""
        with torch.no_grad():
            y, mixers = self._through(self._place(x.unsqueeze(1), state).squeeze(1), state.mixers, Block.step_)
            return self.norm(y), BackboneState(state.position + 1, state.positions.add_(1), mixers)

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, state: BackboneState | None = None
    ) -> tuple[Tensor, BackboneState]:
        """(B, L, D), after the steps of a state → (B, L, D) and the state from which `step` continues."""

        def run(block: Block, x: Tensor, state: State) -> tuple[Tensor, State]:
            return block.prefill(x, mask, state)

        length = x.shape[1]
        y = self._place(x, state)
        if state is None:
            state = BackboneState(0, x.new_zeros(len(x), dtype=torch.long), (None,) * len(self.blocks))
        y, mixers = self._through(y, state.mixers, run)
        if mask is None:
            return self.norm(y), BackboneState(state.position + length, state.positions + length, mixers)
        positions = state.positions + (mask * torch.arange(1, length + 1, device=x.device)).amax(1)
        return self.norm(y, mask), BackboneState(max(positions.tolist(), default=0), positions, mixers)

    def reserve(self, state: BackboneState, max_steps: int) -> BackboneState:
        """A copy of the state with room for `max_steps` more steps in place."""
        mixers = (block.mixer.reserve(part, max_steps) for block, part in zip(self.blocks, state.mixers, strict=True))
        return BackboneState(state.position, state.positions.clone(), tuple(mixers))

    def select(self, state: BackboneState, index: Tensor) -> BackboneState:
        """The state of some sequences of the batch, as `Mixer.select` gives it."""
        selected: BackboneState = select(state, index)
        return selected

    def _through(
        self, x: Tensor, states: Sequence[State], run: Callable[[Block, Tensor, State], tuple[Tensor, State]]
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Through all blocks, each with its state."""
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = run(block, x, state)
            after.append(state)
        return x, tuple(after)

    def _place(self, x: Tensor, state: BackboneState | None) -> Tensor:
        """Add the absolute positions from those of a state on, or from 0, to (B, L, D)."""
        if self.positions is None:
            return x
        require_length(x.shape[1] + (0 if state is None else state.position), self.longest)
        positions = torch.arange(x.shape[1], device=x.device)
        if state is not None:
            positions = positions + state.positions.unsqueeze(1)  # (B, L)
        return x + self.positions(positions).to(x.dtype)


class SequenceModel(nn.Module):
    """encoder → backbone → head."""

    def __init__(self, encoder: nn.Module, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.backbone, self.head = encoder, backbone, head

    @property
    def description(self) -> dict[str, Any] | str:
        """The calls that make encoder, backbone and head, as plain data; or in words, why there are none."""
        parts: dict[str, Any] = {}
        for name, part in self.named_children():
            call = getattr(part, "description", f"{type(part).__name__} is no Described module")
            if isinstance(call, str):
                return f"{name}: {call}"
            parts[name] = call
        return parts

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Inputs as the encoder takes them, (B, L) or (B, L, C), and the mask of real positions → prediction."""
        return self.head(self.backbone(self.encoder(inputs), mask), mask)


def _make_positions(name: Positions, d_model: int, seq_len: int) -> nn.Module | None:
    match name:
        case "learned":
            require(seq_len >= 1, "seq_len", seq_len, "must be given for learned positions")
            return LearnedPositions(d_model, seq_len=seq_len)
        case "sinusoidal":
            return SinusoidalPositions(d_model)
        case _:
            require(name in ("none", "rotary"), "positions", name, "must be none, learned, sinusoidal or rotary")
            return None
