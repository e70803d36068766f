"""Small mixers and models: every one of conf/model, and variants of our own mixers that no file of conf/model has."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from stu.backbone import Backbone
from stu.cli import composition
from stu.cli.composition import build
from stu.cli.usage import CONF, options_of
from stu.mixer import Mixer
from stu.mixers.attention import Attention
from stu.mixers.stu import STU

M = TypeVar("M", bound=nn.Module)

# What makes a model small, wherever it has an option of that name.
SMALL: dict[str, Any] = {"d_model": 8, "depth": 2, "num_filters": 6, "num_heads": 2, "d_state": 8, "num_blocks": 2}

MODELS, TASKS = options_of("model"), options_of("task")

# Flash STU is purely spectral: no lags, no delay.
STU_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"k_y": 0},
    "fixed": {"k_y": 2, "recurrence": "fixed"},
    "learned": {"k_y": 3, "recurrence": "learned"},
    "one_branch": {"two_sided": False, "k_u": 1, "k_y": 1, "recurrence": "learned"},
    "flash": {"k_u": 0, "k_y": 0, "delay": 0},
    "hankel_l": {"hankel": "L", "two_sided": False, "delay": 1},
}
ATTENTION_VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "causal_rotary": {"causal": True, "positions": "rotary"},
    "bidirectional_rotary": {"causal": False, "positions": "rotary"},
    "causal_window": {"causal": True, "window": 5},
    "causal_rotary_window": {"causal": True, "positions": "rotary", "window": 4},
    "bidirectional_window": {"causal": False, "window": 6},
}


class Case(NamedTuple):
    """One mixer to test: `build(seq_len=…)`, with options that overrule `SMALL`, makes a fresh one."""

    name: str
    build: Callable[..., Mixer]

    def random(self, *, seq_len: int, dtype: torch.dtype = torch.float64, **options: Any) -> Mixer:
        """In eval mode, its parameters far from what they are initialised to."""
        return randomized(self.build(seq_len=seq_len, **options)).to(dtype).eval()

    def __str__(self) -> str:
        return self.name


@cache
def composed(*overrides: str) -> DictConfig:
    """The configuration of `python train.py …` with these overrides; not to be changed."""
    return composition.composed(overrides)


def kinds_of_tasks() -> list[str]:
    """One task of each kind: those of one class with data of one class differ in options alone."""
    first: dict[tuple[str, str], str] = {}
    for task in TASKS:
        node = composed(f"task={task}").task
        first.setdefault((node._target_, node.data._target_), task)
    return list(first.values())


def model_config(model: str, *, seq_len: int, causal: bool = True, **options: Any) -> DictConfig:
    """The model node of a small model; `options` overrule `SMALL`."""
    config = composed(f"model={model}", "task=lds").copy()  # one for all: composing takes longer than a test
    config.task.seq_len, config.task.causal = seq_len, causal
    _set_everywhere(config.model, SMALL | options)
    if "depth" not in options and isinstance(config.model.mixer, ListConfig):
        config.model.depth = len(config.model.mixer)  # one block of each layer
    return config.model


@cache
def factory(model: str, *, seq_len: int, causal: bool = True, **options: Any) -> partial[Backbone]:
    """The constructor call of a small backbone: instantiating it takes longer than the call."""
    return build(model_config(model, seq_len=seq_len, causal=causal, **options), _partial_=True)


def small_backbone(model: str, *, seq_len: int, causal: bool = True, **options: Any) -> Backbone:
    """A small backbone of conf/model, its parameters far from what they are initialised to."""
    return randomized(factory(model, seq_len=seq_len, causal=causal, **options)())


def randomized(module: M, scale: float = 0.1) -> M:
    """Move all parameters by noise, since some are initialised as zero and would hide what they do."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return module


def mixer_cases() -> list[Case]:
    """Every mixer of every model of conf/model, for causal and other tasks, and the variants above."""
    cases = []
    for model in MODELS:
        for index in _own_mixers(model):
            for causal in (True, False):
                name = f"{model}-{index}-{'causal' if causal else 'free'}"
                cases.append(Case(name, partial(_configured, model, index, causal)))
    cases += [*stu_cases(), Case("STU-slepian", partial(_stu, hankel="slepian"))]  # it has no states
    return cases + [Case(f"Attention-{name}", partial(_attention, **v)) for name, v in ATTENTION_VARIANTS.items()]


def stu_cases() -> list[Case]:
    """The variants of the STU."""
    return [Case(f"STU-{name}", partial(_stu, **variant)) for name, variant in STU_VARIANTS.items()]


def _configured(model: str, index: int, causal: bool, *, seq_len: int, **options: Any) -> Mixer:
    backbone = factory(model, seq_len=seq_len, causal=causal, **options).keywords
    mixer = backbone["mixer"]
    return (mixer if callable(mixer) else mixer[index])(backbone["d_model"])


def _stu(*, seq_len: int, d_model: int = 8, num_filters: int = 6, num_heads: int = 0, **variant: Any) -> Mixer:
    return STU(d_model, seq_len=seq_len, num_filters=num_filters, **variant)


def _attention(*, seq_len: int, d_model: int = 8, num_filters: int = 0, num_heads: int = 2, **variant: Any) -> Mixer:
    return Attention(d_model, num_heads=num_heads, **variant)


def _own_mixers(model: str) -> list[int]:
    """Those mixers of a model that no other one has, as far as its own file says; read without composing, which takes
    longer. Hybrids have none: theirs are of other models, and attention, whose options are variants above."""
    node = OmegaConf.load(CONF / "model" / f"{model}.yaml")
    node = node.get("model", node)
    if node.get("layers"):
        return []
    return list(range(len(node.mixer))) if isinstance(node.get("mixer"), ListConfig) else [0]


def _set_everywhere(node: DictConfig | ListConfig, options: dict[str, Any]) -> None:
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if key in options:
            node[key] = options[key]
        elif OmegaConf.is_config(node._get_node(key)):
            _set_everywhere(node[key], options)
