"""Between the command line and the code: help, checks of a composed configuration, and errors in one line.

A configuration node is a constructor call, so the constructors' signatures say what is allowed; nothing is declared
twice. `HYDRA_FULL_ERROR=1` shows tracebacks instead of lines.
"""

import difflib
import functools
import inspect
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, Literal, NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.usage import CONF, folded, options_of
from stu.errors import OptionError

USAGE = 2  # exit code of a command that asks for something impossible
STOPPED = 128  # and more: stopped by a signal
# The second variable: set by `run`, whose HYDRA_FULL_ERROR the processes of a distributed run inherit.
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1" and "STU_ERROR_LINES" not in os.environ
HINTS: dict[str, Any] = {  # where we allow more or less than the constructor, and what has no constructor
    "trainer.max_epochs": float | None,
    "trainer.accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"],
    "trainer.strategy": Literal["auto", "ddp", "fsdp"],
    "mode": Literal["train", "test"],
    "name": str | int | None,
    "seed": int,
    "overwrite": bool,
    "checkpoint": str | None,
    "log_every": int,
    "paths.runs": str,
    "paths.data": str,
}
# Arguments of the Trainer that would end or shorten a run behind the back of its `StepPlan`.
NOT_OURS = ("min_epochs", "min_steps", "max_time", "limit_train_batches", "overfit_batches", "fast_dev_run",
            "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs")  # fmt: skip
# Arguments of the Trainer that train.py gives itself.
GIVEN = ("logger", "callbacks", "default_root_dir", "log_every_n_steps", "barebones", "enable_progress_bar",
         "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")  # fmt: skip


class Refused(OptionError):
    """By `check`, which knows the full key and gives it as the name."""


FAILED: list[str] = []  # jobs of a sweep that did not end well, by their overrides


def check(config: DictConfig) -> None:
    """Raise `Refused` for a root key that does not exist, or a value that a constructor does not take."""
    root = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    groups = {group for entry in root["defaults"] if isinstance(entry, dict) for group in entry}
    known = {key for key in root if key not in ("defaults", "hydra")} | {g for g in groups if " " not in g}
    for key in map(str, config):
        if key not in known:
            raise Refused(key, _brief(config[key]), f"no such key; {_suggest(key, known)}")
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for key, value in _nodes(plain, ""):
        if key in HINTS and not _fits(value, HINTS[key]):
            raise Refused(key, _brief(value), f"must be {_describe(HINTS[key])}")
    for key, node in _calls(plain, ""):
        _check_call(key, node)
    if not 0 <= config.seed < 2**32:
        raise Refused("seed", config.seed, f"must be in 0 … {2**32 - 1}")
    for key in NOT_OURS:
        if key in config.trainer:
            raise Refused(f"trainer.{key}", config.trainer[key], "not supported; set max_epochs or max_steps")
    for key in GIVEN:
        if key in config.trainer:
            raise Refused(f"trainer.{key}", config.trainer[key], "not supported; train.py sets it itself")
    if config.trainer.gradient_clip_val is not None and not config.trainer.gradient_clip_val > 0:
        raise Refused("trainer.gradient_clip_val", config.trainer.gradient_clip_val, "must be above 0, or null")
    if config.name is not None and (str(config.name).strip() in ("", ".", "..") or set(str(config.name)) & set("/\\")):
        raise Refused("name", repr(str(config.name)), "must be a plain folder name")
    for key in ("limit_val_batches", "limit_test_batches"):
        if config.trainer[key] is not None and not config.trainer[key] > 0:
            raise Refused(f"trainer.{key}", config.trainer[key], "must be above 0: a checkpoint is chosen and tested")
    import torch

    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise Refused("trainer.accelerator", config.trainer.accelerator, "there is no GPU here; use trainer=cpu")


def reports_errors(job: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """Make a Hydra job report what its user can mend in one line and exit with `USAGE`; a sweep goes on to the next."""

    @functools.wraps(job)
    def wrapped(config: DictConfig) -> float | None:
        try:
            return job(config)
        except Exception as error:
            line = None if TRACEBACKS else _line(error, config)
            if not _sweeping():
                if line is None:
                    raise
                _fail(line)
            _report(line or traceback.format_exc())
        except SystemExit as end:
            if not _sweeping() or (isinstance(end.code, int) and end.code >= STOPPED):
                raise
        FAILED.append(" ".join(HydraConfig.get().overrides.task))
        return math.nan

    return wrapped


def _sweeping() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run(main: Callable[[], object]) -> None:
    """Run a `hydra.main`; what goes wrong while the configuration is composed is reported in one line too."""
    if not TRACEBACKS:
        os.environ |= {"HYDRA_FULL_ERROR": "1", "STU_ERROR_LINES": "1"}  # Hydra hands its exceptions on
    try:
        main()
        if FAILED:
            failed = "".join(f"\n  {overrides}" for overrides in FAILED)
            print(f"error: {len(FAILED)} jobs of the sweep failed:{failed}", file=sys.stderr)
            raise SystemExit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning makes a plain 1 of the first
        if isinstance(end, KeyboardInterrupt) or isinstance(end.__context__, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
    except (HydraException, OmegaConfBaseException) as error:
        if TRACEBACKS:
            raise
        _fail(_line(error, None) or _flat(str(error)))
    except ValueError as error:
        if TRACEBACKS or "Config group override must be" not in str(error):  # `model=null`
            raise
        _fail(f"{_flat(str(error))}; a group takes the name of an option")


def _fail(line: str) -> NoReturn:
    _report(line)
    raise SystemExit(USAGE) from None


def _report(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def _line(error: BaseException, config: DictConfig | None) -> str | None:
    """An error in one line, naming the full key; None for what is no user's fault."""
    match error:
        case OptionError():
            return f"{_full_key(error, config)}={error.value}: {error.allowed}"
        case InstantiationException():
            cause = error.__cause__
            if isinstance(cause, OptionError):
                return _line(cause, config)
            node = match.group(1) if (match := re.search(r"full_key: (\S+)", str(error))) else "configuration"
            return f"{node}: {_flat(str(cause or error))}"
        case MissingConfigException(options=options) if options is not None:
            group, _, choice = str(error.missing_cfg_file).partition("/")
            choices = folded(options_of(group))
            return f"{group}={choice}: no such option; choose one of {', '.join(choices)}"
        case ConfigCompositionException() | OmegaConfBaseException():
            return _composition_line(error)
        case HydraException():
            return _flat(str(error))
        case Exception() if type(error).__name__ == "MisconfigurationException":  # Lightning's, slow to import
            return f"trainer: {_flat(str(error))}"
    return None


def _composition_line(error: BaseException) -> str:
    """Name the key and what stands beside it, where an override does not fit the configuration."""
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", "") or "")
    override = match.group(1) if (match := re.search(r"Could not override '([^']+)'", str(error))) else key
    parent = getattr(cause, "parent_node", None)
    given = next((a for a in sys.argv[1:] if a.split("=", 1)[0].lstrip("+~") == override), override)
    if override and isinstance(parent, DictConfig):
        return f"{given}: no such key; {_suggest(override.split('.')[-1], map(str, parent))}"
    return _flat(f"{key}: {cause}" if key else str(error))


def _full_key(error: OptionError, config: DictConfig | None) -> str:
    """Where the refused option stands in the configuration: the same keyword with the same value."""
    if (
        config is None
        or isinstance(error, Refused)
        or ("." in error.name and OmegaConf.select(config, error.name) is not None)
    ):
        return error.name
    nodes = dict(_nodes(OmegaConf.to_container(config, resolve=True), ""))
    named = [key for key in nodes if key == error.name or key.endswith(f".{error.name}")]
    exact = [key for key in named if nodes[key] == error.value]
    written = dict(_nodes(OmegaConf.to_container(config, resolve=False), ""))  # what refers to another key comes last
    return min(exact or named or [error.name], key=lambda key: str(written.get(key)).startswith("${"))


def _check_call(key: str, node: Mapping[str, Any]) -> None:
    """Compare a node with the signature of what it calls."""
    try:
        target = resolve_name(node["_target_"])
    except Exception as error:
        raise Refused(f"{key}._target_", node["_target_"], f"cannot be imported ({_flat(str(error))})") from error
    parameters = inspect.signature(target).parameters
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if name not in parameters:
            raise Refused(f"{key}.{name}", _brief(value), f"no such key; {_suggest(name, parameters)}")
        hint = HINTS.get(f"{key}.{name}", hints.get(name, Any))
        if not _fits(value, hint):
            raise Refused(f"{key}.{name}", _brief(value), f"must be {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a configuration value can stand where `hint` is asked for; nodes that are calls fit anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (isinstance(value, Mapping) and "_target_" in value):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (int, float, str, bool, type(None)) or hint is None:
        allowed = {float: (float, int), None: (type(None),)}.get(hint, (hint,))
        return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    if inspect.isclass(origin or hint) and issubclass(origin or hint, Mapping):
        return isinstance(value, Mapping)
    if origin is tuple and ... not in arguments:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if inspect.isclass(origin or hint) and issubclass(origin or hint, Sequence):
        element = arguments[0] if arguments else Any
        return isinstance(value, list) and all(_fits(item, element) for item in value)
    # a class: the yaml can only name it by a call, or leave it out
    return not isinstance(value, bool | int | float | str | list)


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and ... not in arguments:
        return f"a list of {len(arguments)}: {', '.join(map(_describe, arguments))}"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))


def _calls(node: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a `_target_`, outermost first, with its key."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from _calls(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _calls(child, f"{key}[{index}]")


def _nodes(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Everything in the configuration with its key, a mapping before what is in it."""
    if key:
        yield key, node
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _nodes(child, f"{key}.{name}" if key else str(name))


def _suggest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = "".join(f"did you mean {match}? " for match in difflib.get_close_matches(name, names, n=1))
    if not names:
        return "to add a key, write + before it"
    return near + f"allowed: {', '.join(n for n in names if n[0] != '_')}"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(text: str) -> str:
    return " ".join(text.split())
