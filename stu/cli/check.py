"""Checks of a composed configuration: every root key exists, and every node fits the constructor that it calls.

A configuration node is a constructor call, so the constructors' signatures say what is allowed; nothing is declared
twice.
"""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf

from stu.cli.usage import CONF, PRESETS, options_of
from stu.errors import OptionError, brief

NODES = {  # what the nodes of the root make; the code gives the optimizer arguments of its own
    "task": "stu.Task",
    "model": "stu.Backbone",
    "precondition": "stu.preconditioning.Preconditioner",
    "loader": "stu.training.SequenceData",
    "checkpoints": "stu.training.Checkpoints",
    "figures": "stu.training.figures.Figures",
    "generate": "stu.generation.Sampling",
    "pretrain": "stu.training.Pretraining",
    "trainer": "lightning.Trainer",
}
HINTS: dict[str, Any] = {  # where we allow more or less than the constructor, and what has no constructor
    "trainer.max_epochs": float | None,
    "trainer.val_check_interval": int | float,
    "trainer.matmul_precision": Literal["highest", "high", "medium"],
    "trainer.accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"],
    "trainer.strategy": Literal["auto", "ddp"],
    "trainer.profiler": Literal["simple", "advanced"] | None,
    "trainer.precision": Literal["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", 32, 64, 16, "bf16"],
    "task.test_lengths": Sequence[int],
    "optimizer": Callable[..., Any],
    "callbacks": Mapping,
    "logger": Mapping,
    "mode": Literal["train", "test", "generate"],
    "name": str | int | None,
    "seed": range(2**32),
    "overwrite": bool,
    "checkpoint": str | None,
    "prompt": str,
    "log_every": int,
    "paths": Mapping,
    "paths.runs": str,
    "paths.data": str,
}
NAMED = {"callbacks": "lightning.Callback", "logger": "lightning.pytorch.loggers.Logger"}  # what their entries make
CALLS = {"trainer.strategy": ("stu.training.FullyShard", "trainer=fsdp")}  # also allowed, by these options
SPECIAL = ("_target_", "_partial_")  # keys of a call that are no arguments
# The only modes in which a key is read.
READ_BY = {"checkpoint": ("test", "generate"), "overwrite": ("train",), "prompt": ("generate",)}
# How many of their leading arguments these nodes get from the code.
PASSED = {"checkpoints": 5, "figures": 1, "loader": 4, "optimizer": 2, "mixer": 1, "channel_mixer": 1}
RENAMED = {  # earlier keys, and their names now
    "pictures": "figures",
    "model.mixer.step_rescale": "model.mixer.rate",
    **{
        f"logger.{key}": f"logger.wandb.{key}"
        for key in ("mode", "project", "entity", "tags", "group", "job_type", "init_timeout", "finish_timeout")
    },
}


class Refused(OptionError):
    """By `check`, which knows the full key and gives it as the name."""


def check(config: DictConfig) -> None:
    """Raise `Refused` for a key that nobody reads, one that is missing, or a value that a constructor does not take."""
    known = root_keys()
    for key in map(str, config):
        if key not in known - PRESETS:
            others = dict(nodes(OmegaConf.to_container(config, resolve=False)))
            raise Refused(key, brief(config[key]), missing(key, known, others))
    for key in sorted(known - PRESETS - set(map(str, config))):
        raise Refused(key, "absent", "is needed and cannot be removed")
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    hints = HINTS | {key: resolve_name(target) for key, target in NODES.items()}
    for key, value in nodes(plain):
        if isinstance(value, float) and math.isnan(value):
            raise Refused(key, value, "must be a number")
        if key in hints and not fits(value, hints[key]) and not is_allowed_call(key, value):
            option = f"; or choose {CALLS[key][1]}" if key in CALLS else ""
            raise Refused(key, brief(value), f"must be {described(hints[key])}{option}")
    for key, made in NAMED.items():
        for name, value in plain[key].items():
            if not fits(value, resolve_name(made)):
                renamed = f"{key}.{name}" in RENAMED
                allowed = missing(f"{key}.{name}", ()) if renamed else f"must be {described(resolve_name(made))}"
                raise Refused(f"{key}.{name}", brief(value), allowed)
    for name, value in plain["paths"].items():
        if f"paths.{name}" not in HINTS:
            raise Refused(f"paths.{name}", brief(value), missing(f"paths.{name}", plain["paths"]))
    for key, modes in READ_BY.items():
        if plain[key] and plain["mode"] not in modes:
            raise Refused(key, brief(plain[key]), f"is read with mode={' or '.join(modes)} alone")
    for key, node in calls(plain):
        check_call(key, node)
    for name, parameter in inspect.signature(resolve_name(NODES["generate"])).parameters.items():
        value = plain["generate"].get(name, parameter.default)
        if value != parameter.default and plain["mode"] != "generate":
            raise Refused(f"generate.{name}", brief(value), "is read with mode=generate alone")


def root_keys() -> set[str]:
    """The keys of conf/config.yaml and the groups that it chooses from."""
    root = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    groups = {group for entry in root["defaults"] if isinstance(entry, dict) for group in entry if " " not in group}
    return groups | set(root) - {"defaults", "hydra"}


def check_call(key: str, node: Mapping[str, Any]) -> None:
    """Compare a node with the signature of what it calls."""
    try:
        target = resolve_name(node["_target_"])
    except Exception as error:
        raise Refused(f"{key}._target_", node["_target_"], f"cannot be imported ({error})") from error
    passed = PASSED.get(key.rpartition(".")[2].partition("[")[0], 0)
    signature = list(inspect.signature(target).parameters.items())[passed:]
    parameters = [name for name, _ in signature]
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # of a library, whose types are there for checkers alone
        hints = {}
    for name, value in node.items():
        if name in SPECIAL:
            continue
        if name not in parameters and f"{key}.{name}" not in HINTS:
            raise Refused(f"{key}.{name}", brief(value), missing(f"{key}.{name}", parameters))
        hint = HINTS.get(f"{key}.{name}", hints.get(name, Any))
        if not (fits(value, hint) or is_allowed_call(f"{key}.{name}", value)):
            raise Refused(f"{key}.{name}", brief(value), f"must be {described(hint)}")
    if passed or not node.get("_partial_"):  # else the code may give more
        for name, parameter in signature:
            needed = parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY
            if needed and name not in node:
                raise Refused(f"{key}.{name}", "absent", "is needed")


def is_allowed_call(key: str, value: Any) -> bool:
    """Whether a value is the one call that a key may have besides what its hint says."""
    return key in CALLS and isinstance(value, Mapping) and value.get("_target_") == CALLS[key][0]


def fits(value: Any, hint: Any) -> bool:
    """Whether a configuration value can stand where `hint` is asked for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if isinstance(value, Mapping) and "_target_" in value:
        return _makes(value, hint)
    if origin is Literal:
        return any(value is one or (value == one and type(value) is type(one)) for one in arguments)
    if isinstance(hint, range):
        return fits(value, int) and value in hint
    if hint in (int, float, str, bool, type(None)) or hint is None:
        allowed = {float: (float, int), None: (type(None),)}.get(hint, (hint,))
        return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    return _fits_container(value, origin or hint, arguments)


def _makes(node: Mapping[str, Any], hint: Any) -> bool:
    """Whether a call makes what `hint` asks for: an object, or with `_partial_: true` a function that returns one."""
    factory = typing.get_origin(hint) is Callable
    wanted = typing.get_args(hint)[-1] if factory else typing.get_origin(hint) or hint
    try:
        target = resolve_name(node["_target_"])
    except Exception:  # what is wrong, the check of the call itself says
        return True
    if not callable(target) or node.get("_partial_", False) is not factory:
        return False
    if not inspect.isclass(wanted):
        return factory
    return not inspect.isclass(target) or issubclass(target, wanted)


def _fits_container(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if kind is tuple and ... not in arguments:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if inspect.isclass(kind) and issubclass(kind, Sequence):
        element = arguments[0] if arguments else Any
        return isinstance(value, list) and all(fits(item, element) for item in value)
    return False  # a class or a function: the yaml can only name it by a call


def described(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(hint, range):
        return f"an integer in {hint.start} … {hint.stop - 1}"
    if origin is Callable:
        made = "" if arguments[-1] is Any else f" that makes a {arguments[-1].__name__}"
        return f"a function{made}: _target_ and _partial_: true"
    if origin is tuple and ... not in arguments:
        return f"a list of {len(arguments)}: {', '.join(map(described, arguments))}"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        each = described(arguments[0])
        return f"a list of {each.split()[1]}s" if each.startswith(("a ", "an ")) else f"a list, each {each}"
    if inspect.isclass(hint) and hint.__module__ != "builtins" and not issubclass(hint, Mapping | Sequence):
        return f"a call that makes a {hint.__name__}: _target_ and its arguments"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, f"a {getattr(origin or hint, '__name__', hint)}".lower())


def calls(node: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a `_target_`, outermost first, with its key."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from calls(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from calls(child, f"{key}[{index}]")


def nodes(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in the configuration with its key, a mapping before its values, and a list before its mappings."""
    if key:
        yield key, node
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from nodes(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            if isinstance(child, Mapping):
                yield from nodes(child, f"{key}[{index}]")


def missing(key: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """That a key does not exist, and what was meant instead.

    known: the names that there are in its place. others: all keys, of which one may end in this name.
    """
    group, _, name = key.partition(".")
    if key in RENAMED:
        return f"no such key; it is {RENAMED[key]} now"
    if group in NAMED and name in options_of(group):
        return f"no such key; {group}={name} has it, or a list with {name}"
    names, last = sorted(known), key.rpartition(".")[2]
    if not names:
        return "no such key; to add a key, write + before it"
    same = [other for other in others if other.rpartition(".")[2] == last and other != key]
    same = [other for other in same if other.partition(".")[0] != "hydra"]
    same.sort(key=lambda other: (other.partition(".")[0] != group, other.count(".")))
    meant = same[: 2 * (last not in SPECIAL)] or difflib.get_close_matches(last, names, n=1)
    near = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"no such key; {near}allowed: {', '.join(n for n in names if n[0] != '_')}"
