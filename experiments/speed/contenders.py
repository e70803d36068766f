"""What is compared: the mixer of every file in conf/model, found by itself, and the literal STU beside them."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from conf import cli
from conf.usage import CONF, options_of
from experiments.speed.literal import LiteralSTU
from stu.errors import OptionError, require

LITERAL = "literal"


class Size(NamedTuple):
    """One size of input: L, B, D, and K where it is asked for (None: as the model's file says)."""

    length: int
    batch: int
    width: int
    filters: int | None


@dataclass(frozen=True)
class Contender:
    """A mixer as it was asked for: `stu`, or `stu:two_sided=false,num_filters=12`.

    index: which one, of a model that cycles several. config: what `train.py` would compose, without the overrides.
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
        return node


def allowed() -> list[str]:
    """Names of all contenders."""
    return [LITERAL, *options_of("model")]


def find(names: Iterable[str], *, causal: bool, size: Size) -> list[Contender]:
    """The contenders of these names, in their order; `size` is any of those to be measured.

    Raises `OptionError` for an unknown model, an unknown key or a value of the wrong type.
    """
    found = []
    for name in dict.fromkeys(names):
        try:
            for contender in _contenders(name, causal):
                if contender.overrides:
                    cli.check(contender.configured(size))
                found.append(contender)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise OptionError("--models", name, f"cannot be understood: {' '.join(str(error).split())}") from error
    return found


def build(node: Mapping[str, Any], width: int) -> nn.Module:
    """The mixer of a constructor call, (B, L, D) → (B, L, D)."""
    mixer: nn.Module = instantiate(node)(width)
    return mixer


def _contenders(name: str, causal: bool) -> Iterator[Contender]:
    model, _, options = name.partition(":")
    require(model in allowed(), "--models", name, f"no such model; choose from {', '.join(allowed())}")
    overrides = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        require(bool(equals), "--models", name, f"{option} must be KEY=VALUE, an option of the mixer")
        overrides[key] = yaml.safe_load(value)
    config = _composed("stu" if model == LITERAL else model, causal)
    if model == LITERAL:
        # What only says how the fast layer computes the same is no option of the literal one.
        taken = {"_target_", "_partial_", *inspect.signature(LiteralSTU).parameters}
        mixer = OmegaConf.masked_copy(config.model.mixer, [key for key in config.model.mixer if key in taken])
        config.model.mixer = mixer
        config.model.mixer._target_ = f"{LiteralSTU.__module__}.{LiteralSTU.__name__}"
    if isinstance(config.model.mixer, ListConfig):
        for index in range(len(config.model.mixer)):
            yield Contender(f"{name}.{index}", config, index, overrides)
    else:
        yield Contender(name, config, None, overrides)


def _composed(model: str, causal: bool) -> DictConfig:
    # Of the task only the length and the direction reach a model.
    overrides = [f"model={model}", "task=lds", f"task.causal={str(causal).lower()}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides)


def _set_everywhere(node: DictConfig | ListConfig, name: str, value: int) -> None:
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if key == name:
            node[key] = value
        elif OmegaConf.is_config(node._get_node(key)):
            _set_everywhere(node[key], name, value)
