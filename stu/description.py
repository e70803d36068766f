"""A model as plain data: which classes were called with which keywords; and the same model from that again.

A description is a call as configurations have it: `_target_` names the class, the other keys are its keywords, and
`_partial_` says that it is a factory, called later with d_model. Nothing in it can name anything but what models are
made of, so descriptions may be read from strangers.
"""

import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from torch import nn

from stu.errors import OptionError, brief, require

TARGET, PARTIAL = "_target_", "_partial_"
PARTS = ("stu.backbone", "stu.encoders", "stu.heads", "stu.channel", "stu.mixers")  # where models have their parts from
# Modules that have moved: the names in configurations of earlier runs, and the names now.
MOVED = {
    **{f"data.lra_{name}": f"data.lra.{name}" for name in ("image", "listops", "pathfinder", "retrieval", "text")},
    **{f"data.{name}": f"data.memory.{name}" for name in ("adding", "associative_recall", "copying")},
    **{f"data.{name}": f"data.memory.{name}" for name in ("induction_heads", "mqar", "recall")},
    **{f"data.{name}": f"data.systems.{name}" for name in ("dynamics", "forecast", "lds")},
}
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # numbers that JSON does not have
NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)


class Described:
    """A module that knows how it was built: `description` is the call of its class, or says why it has none.

    It has none where an argument is neither a plain value nor a class or a `functools.partial` of one.
    """

    description: dict[str, Any] | str = "does not call Described.__init_subclass__"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _recording(vars(cls)["__init__"]))  # noqa: B010  # mypy would refuse the other


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def recording(self: Any, *args: Any, **keywords: Any) -> None:
        init(self, *args, **keywords)
        if type(self).__init__ is recording:  # not that of a base class
            cls: Callable[..., Any] = type(self)
            try:
                vars(self)["description"] = described(functools.partial(cls, *args, **keywords))
            except OptionError as error:
                vars(self)["description"] = str(error)

    return recording


def described(call: Any) -> dict[str, Any]:
    """The call of a class, given as a `functools.partial` or as the class alone. Raises `OptionError` for others."""
    given: functools.partial[Any] = call if isinstance(call, functools.partial) else functools.partial(call)
    cls = given.func
    known = isinstance(cls, type) and "<" not in cls.__qualname__
    require(known, "factory", brief(cls), "must be a class of a module, or a functools.partial of one")
    bound = inspect.signature(cls).bind_partial(*given.args, **given.keywords)
    values = {name: _plain(name, value) for name, value in bound.arguments.items()}
    return {TARGET: f"{cls.__module__}.{cls.__qualname__}", **values}


def _plain(name: str, value: Any) -> Any:
    """An argument as JSON has it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Sequence):
        return [_plain(name, item) for item in value]
    if isinstance(value, functools.partial | type):
        return {**described(value), PARTIAL: True}
    raise OptionError(name, brief(value), "must be a plain value, a class or a functools.partial of one, to be saved")


def strict(value: Any) -> Any:
    """Plain data with those numbers as texts that JSON does not have; `loose` is the inverse."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def loose(value: Any) -> Any:
    """Plain data with the numbers that `NOT_FINITE` names; what has them as numbers stays as it is."""
    if isinstance(value, Mapping):
        return {key: loose(item) for key, item in value.items()}
    if isinstance(value, list):
        return [loose(item) for item in value]
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def built(node: Any, trust: Sequence[str] = ()) -> Any:
    """What a description describes. trust: packages whose classes may be called besides the parts of models.

    Raises `OptionError` for a class that is no part of a model, for keywords that it does not have, and for values that
    it refuses.
    """
    require(isinstance(node, Mapping) and TARGET in node, "model", brief(node), f"must be a mapping with {TARGET}")
    target, later = node[TARGET], node.get(PARTIAL, False)
    require(isinstance(later, bool), f"{target}.{PARTIAL}", brief(later), "must be true or false")
    cls: Callable[..., Any] = part_named(target, trust)
    signature = inspect.signature(cls)
    keywords = {name: _value(value, trust) for name, value in node.items() if name not in (TARGET, PARTIAL)}
    try:
        (signature.bind_partial if later else signature.bind)(**keywords)
    except TypeError as error:
        raise OptionError("model", target, str(error)) from error
    return functools.partial(cls, **keywords) if later else cls(**keywords)


def _value(value: Any, trust: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return built(value, trust)
    return [_value(item, trust) for item in value] if isinstance(value, list) else loose(value)


def part_named(target: Any, trust: Sequence[str] = ()) -> type[Any]:
    """The class with this full name. Raises `OptionError` unless it is a part of models, or of a trusted package."""
    named = isinstance(target, str) and NAME.fullmatch(target) is not None and len(target) < 200
    module, _, name = target.rpartition(".") if named else ("", "", "")
    trusted = module.partition(".")[0] in trust
    cls = None
    if trusted or module == "stu" or _is_part(module):
        try:
            cls = getattr(import_module(module), name, None)
        except ImportError:
            require(not trusted, TARGET, brief(target), f"the package {module} cannot be imported here")
    own = isinstance(cls, type) and issubclass(cls, nn.Module) and _is_part(cls.__module__)
    foreign = named and module.partition(".")[0] != "stu"
    advice = "; trust=… may name its package, where you trust whoever wrote this" if foreign else ""
    allowed = f"must be a class of {', '.join(PARTS)}{advice}"
    require(own or (trusted and isinstance(cls, type)), TARGET, brief(target), allowed)
    assert isinstance(cls, type)
    return cls


def _is_part(module: str) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in PARTS)
