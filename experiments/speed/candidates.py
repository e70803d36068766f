"""The candidates: the mixer of every file in conf/model that has one, found automatically, and the literal STU."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from experiments.speed.literal import literal_stu
from stu.cli import composition
from stu.cli.check import check
from stu.cli.layers import of_one_mixer
from stu.errors import OptionError, require

LITERAL = "literal"
NOT_LITERAL = ("algorithm", "streaming")  # options of the STU that only say how it computes


class Size(NamedTuple):
    """One size of input: L, B, D, and K where it is given (None: as the model's file says)."""

    length: int
    batch: int
    width: int
    filters: int | None


@dataclass(frozen=True)
class Candidate:
    """A mixer as it was requested: `stu`, or `stu:two_sided=false,num_filters=12`.

    index: which one, for a model that cycles through several. config: what `train.py` would compose, without the
    overrides.
    """

    name: str
    config: DictConfig
    index: int | None
    overrides: Mapping[str, Any]

    def configured(self, size: Size) -> DictConfig:
        """The whole configuration at this size."""
        config = deepcopy(self.config)
        config.task.seq_len, config.model.d_model = size.length, size.width
        if size.filters is not None:
            _set_everywhere(config.model.mixer, "num_filters", size.filters)
        for key, value in self.overrides.items():
            OmegaConf.update(config, f"model.mixer.{key}", value, force_add=True)
        return config

    def node(self, size: Size) -> dict[str, Any]:
        """The mixer's constructor call at this size, plain and resolved."""
        model: Any = OmegaConf.to_container(self.configured(size).model, resolve=True)
        node: dict[str, Any] = model["mixer"] if self.index is None else model["mixer"][self.index]
        if is_literal(self.name):
            return {"_target_": f"{literal_stu.__module__}.literal_stu", "_partial_": True, "layer": node}
        return node


def is_literal(name: str) -> bool:
    """Whether a candidate of this name is the baseline: the literal STU, with whatever options."""
    return name.partition(":")[0] == LITERAL


def allowed() -> list[str]:
    """The names of all candidates."""
    return [LITERAL, *of_one_mixer()]


def find(names: Iterable[str], *, causal: bool, size: Size) -> list[Candidate]:
    """The candidates with these names, in their order; `size` is any of those to be measured.

    Raises `OptionError` for an unknown model, an unknown key or a value of the wrong type.
    """
    found = []
    for name in dict.fromkeys(names):
        try:
            for candidate in _candidates(name, causal):
                if candidate.overrides:
                    check(candidate.configured(size))
                found.append(candidate)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise OptionError("--models", name, f"cannot be understood: {' '.join(str(error).split())}") from error
    return found


def build(node: Mapping[str, Any], width: int) -> nn.Module:
    """The mixer of a constructor call, (B, L, D) → (B, L, D)."""
    return composition.build(node)(width)


def _candidates(name: str, causal: bool) -> Iterator[Candidate]:
    model, _, options = name.partition(":")
    require(model in allowed(), "--models", name, f"no such model; choose from {', '.join(allowed())}")
    overrides = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        require(bool(equals), "--models", name, f"{option} must be KEY=VALUE, an option of the mixer")
        require(model != LITERAL or key not in NOT_LITERAL, "--models", name, f"{key} is no option of the literal STU")
        overrides[key] = yaml.safe_load(value)
    config = _composed("stu" if model == LITERAL else model, causal)
    if isinstance(config.model.mixer, ListConfig):
        for index in range(len(config.model.mixer)):
            yield Candidate(f"{name}.{index}", config, index, overrides)
    else:
        yield Candidate(name, config, None, overrides)


def _composed(model: str, causal: bool) -> DictConfig:
    # All that a model reads of its task is the length and the direction.
    overrides = [f"model={model}", "task=lds", f"task.causal={str(causal).lower()}"]
    return composition.composed(overrides)


def _set_everywhere(node: DictConfig | ListConfig, name: str, value: int) -> None:
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if key == name:
            node[key] = value
        elif OmegaConf.is_config(node._get_node(key)):
            _set_everywhere(node[key], name, value)
