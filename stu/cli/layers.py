"""Hybrids: `model.layers=[stu,attention]` names the mixers that are cycled over depth, each from its own file.

What a run then has is plain: `model.mixer` is a list of nodes, `optimizer.groups` has the groups of all of them, each
for the blocks of its own model, and neither `layers` nor `mixers` is left.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from itertools import groupby
from typing import Any, ClassVar

import hydra._internal.hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override

from stu.cli.check import SPECIAL, Refused, missing
from stu.cli.usage import CONF, options_of
from stu.errors import brief

ALIASES = {"attention": "transformer"}  # what the mixer of a model is called in a list of layers
OPTIONS = "model.mixers."  # what follows: the options of layers, by name

LONGEST, SHOWN = 100, 88  # characters of a name that layers make, and of one that ends in a hash
NAMES: list[str] = []  # of the nodes in `model.mixer` of the configuration that was laid out last

Model = Callable[[str], DictConfig]  # the configuration of a model's own file, before its layers are laid out


class Loader(ConfigLoaderImpl):
    """Hydra's loader, which also lays out layers: Hydra has no place for what is made of a whole configuration."""

    _known: ClassVar[dict[tuple[str | None, str, str], DictConfig]] = {}

    def _load_configuration_impl(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *rest: Any, **options: Any
    ) -> DictConfig:
        """The configuration of a command, or of the words of a sweep that are not swept.

        Every way to one leads through here: Hydra 1.4 has another than `load_configuration`.
        """
        opened = [f"++{word}" if word.startswith(OPTIONS) else word for word in overrides]
        config = super()._load_configuration_impl(config_name, opened, run_mode, *rest, **options)
        if isinstance(config.get("model"), DictConfig):
            with flag_override(config, ["struct", "readonly"], False):
                given: Any = OmegaConf.to_container(config.hydra.overrides.task)  # as the jobs of a sweep are called
                config.hydra.overrides.task = [re.sub(rf"^\+\+(?={OPTIONS})", "", word) for word in given]
                if run_mode == RunMode.MULTIRUN and config.model.get("layers") is None:
                    config.model.pop("mixers", None)  # of layers that may be swept
                lay_out(config, partial(self._model, config_name))
        return config

    def _model(self, config_name: str | None, name: str) -> DictConfig:
        """The configuration with a model of its own file, loaded once, as it takes a quarter of a second."""
        key = config_name, name, str(self.get_search_path())
        if key not in self._known:
            self._known[key] = super()._load_configuration_impl(config_name, [f"model={name}"], RunMode.RUN)
        return self._known[key]


def install() -> None:
    """Have Hydra load every configuration so: of runs, sweeps, `--cfg` and `compose`."""
    hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[attr-defined]


def lay_out(config: DictConfig, model: Model) -> None:
    """Replace `model.layers` and `model.mixers` by what they stand for. Raises `Refused` for what is no layer."""
    NAMES.clear()
    layers, options = config.model.pop("layers", None), config.model.pop("mixers", OmegaConf.create())
    choice = config.hydra.runtime.choices.model
    if layers is None and _is_hybrid(choice):
        raise Refused("model.layers", "null", f"must be a list of names, as model={choice} is a hybrid")
    if not isinstance(options, DictConfig) or (options and layers is None):
        raise Refused("model.mixers", brief(options), "must have options of model.layers, by their names")
    if layers is None:
        return
    files = {name: _file(name) for name in _names(layers)}
    chosen = model(choice)
    preset = chosen.model.get("mixers") or {}  # of layers that others may have replaced
    foreign = (name for name in map(str, options) if name not in files and options[name] != preset.get(name))
    if unknown := next(foreign, None):
        absent = f"is none of model.layers=[{','.join(layers)}]"
        known = unknown in ALIASES or unknown in options_of("model")
        told = absent if known else missing(f"{OPTIONS}{unknown}", files)
        raise Refused(f"{OPTIONS}{unknown}", brief(options[unknown]), told)
    owner = next((name for name in files if _written(model(files[name])) == _written(chosen)), None)
    if owner is None:
        _require_unchanged(_written(config), _written(chosen), files)
    sources = {name: config if name == owner else model(file) for name, file in files.items()}
    nodes = {name: _with(name, source.model.mixer, options.get(name) or {}) for name, source in sources.items()}
    config.model.mixer = [nodes[name] for name in layers]
    NAMES.extend(layers)
    current, inherited = _groups(config), _groups(chosen)
    given = {name: group for name, group in current.items() if name not in inherited}
    own = {name: _groups(source) for name, source in sources.items()}
    if owner is not None:
        own[owner] = {name: group for name, group in current.items() if name in inherited}
    groups = _confined(layers, config.model.depth, own, given)
    if groups or current:
        config.optimizer.groups = groups
    if layers != chosen.model.layers:
        config.hydra.runtime.choices.model = name_of(choice, layers)


def as_written(key: str) -> str:
    """A key of a laid-out configuration as commands have it: model.mixer[1].window → model.mixers.attention.window."""
    found = re.match(r"model\.mixer\[(\d+)\]", key)
    return f"{OPTIONS}{NAMES[int(found[1])]}{key[found.end() :]}" if found and NAMES else key


def name_of(model: str, layers: Sequence[str]) -> str:
    """What a model with other layers than its own is called, in folders and tables: stu-stux2+attention."""
    counted = ((name, len(list(same))) for name, same in groupby(layers))
    name = f"{model}-{'+'.join(name + f'x{count}' * (count > 1) for name, count in counted)}"
    return name if len(name) <= LONGEST else f"{name[:SHOWN]}-{sha256(name.encode()).hexdigest()[:10]}"


def _names(layers: Any) -> list[str]:
    """The names in `model.layers`, each once."""
    named = isinstance(layers, ListConfig) and len(layers) > 0 and all(isinstance(name, str) for name in layers)
    if not named:
        raise Refused("model.layers", brief(layers), "must be a list of names, such as [stu,attention], or null")
    return list(dict.fromkeys(layers))


def of_one_mixer() -> list[str]:
    """The models that have one mixer, which can be a layer of others."""
    return [name for name in options_of("model") if not _is_hybrid(name)]


def _is_hybrid(name: str) -> bool:
    """Whether the file of a model has layers."""
    content = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text("utf-8"))
    return bool(content.get("model", content).get("layers"))


def _file(name: str) -> str:
    """The model whose mixer a layer has."""
    file = ALIASES.get(name, name)
    if file not in options_of("model") or _is_hybrid(file):
        known = [*of_one_mixer(), *ALIASES]
        near = "".join(f"did you mean {match}? " for match in get_close_matches(name, known, n=1))
        raise Refused("model.layers", name, f"no such layer; {near}choose from {', '.join(known)}")
    return file


def _written(config: DictConfig) -> dict[str, Any]:
    """The mixer of a model as it is written, its interpolations too."""
    node: Any = OmegaConf.to_container(config.model.mixer)
    return node


def _require_unchanged(mixer: Mapping[str, Any], chosen: Mapping[str, Any], layers: Mapping[str, str]) -> None:
    """Raise `Refused` where options of the model's own mixer were given, which no layer has."""
    for key in mixer:
        if mixer[key] != chosen.get(key):
            allowed = f"is of a mixer that is none of the layers {', '.join(layers)}; see {OPTIONS}NAME"
            raise Refused(f"model.mixer.{key}", brief(mixer[key]), allowed)


def _with(name: str, mixer: DictConfig, options: Any) -> DictConfig:
    """The node of a mixer with some options of its own."""
    if not isinstance(options, Mapping):
        raise Refused(f"{OPTIONS}{name}", brief(options), f"must have options: {', '.join(_options(mixer))}")
    for key in options:
        if key not in mixer:
            allowed = missing(f"{OPTIONS}{name}.{key}", _options(mixer))
            raise Refused(f"{OPTIONS}{name}.{key}", brief(options[key]), allowed)
    merged = OmegaConf.merge(mixer, options)
    assert isinstance(merged, DictConfig)
    return merged


def _options(mixer: DictConfig) -> list[str]:
    return [key for key in map(str, mixer) if key not in SPECIAL]


def _groups(config: DictConfig) -> Mapping[str, Any]:
    """The groups of the optimiser."""
    groups: Any = OmegaConf.select(config, "optimizer.groups")
    groups = groups if isinstance(groups, Mapping) else {}
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise Refused(f"optimizer.groups.{name}", brief(group), "must have options, such as match and lr")
    return groups


def _confined(
    layers: Sequence[str], depth: Any, own: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The optimiser's groups: of every layer those of its model, for its blocks alone, and those that were `given`.

    Two models may call theirs the same: that of the later layer is then <layer>_<group>. What is given under the name
    of one of them changes it.
    """
    groups: dict[str, Any] = {}
    for layer, of_layer in own.items():
        blocks = [i for i in range(depth if isinstance(depth, int) else 0) if layers[i % len(layers)] == layer]
        for name, options in of_layer.items() if blocks else ():
            match = rf"blocks\.({'|'.join(map(str, blocks))})\..*(?:{options['match']})"
            unique = f"{layer}_{name}" if name in groups else name
            groups[unique] = OmegaConf.merge(options, {"match": match}, given.get(unique, {}))
    return groups | {name: options for name, options in given.items() if name not in groups}
