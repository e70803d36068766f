"""The words of a command line, checked one by one before Hydra composes a configuration from them."""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException

from stu.cli.usage import BY_OTHERS, CONF, GROUPS, folded, options_of
from stu.errors import OptionError, require

SEVERAL = ("callbacks", "logger")  # groups of which a list of options may be chosen
CHOSEN = [group for group in GROUPS if group not in ("tuned", "sweep")]  # one option of each is in every configuration
FOLDERS = {"paths.runs": "STU_RUNS", "paths.data": "STU_DATA"}  # keys, and what their defaults are read from
FLAGS = "-m, --cfg job|hydra|all (with --resolve), --info, --version, --help, --hydra-help"


class Flags(ArgumentParser):
    """The flags of Hydra that make sense here; raises `OptionError` for others."""

    def __init__(self) -> None:
        super().__init__("train.py", add_help=False, allow_abbrev=False)
        what = self.add_mutually_exclusive_group()
        what.add_argument("--multirun", "-m", action="store_true")
        what.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
        infos = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
        what.add_argument("--info", "-i", nargs="?", const="all", choices=infos)
        for flag in ("--version", "--hydra-help", "--resolve"):
            self.add_argument(flag, action="store_true")

    def error(self, message: str) -> NoReturn:
        """What argparse objects to."""
        raise OptionError("flags", message, f"allowed: {FLAGS}")


def checked(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra understands them: flags last, and the names that a `glob` stands for.

    Raises `OptionError` for what Hydra would ignore, misread, or refuse with more than a line.
    """
    for key, variable in FOLDERS.items():
        require(bool(os.environ.get(variable, key).strip()), variable, "''", "is empty: unset it, or name a folder")
    parser = Flags()
    flags, words = parser.parse_known_args(list(arguments))
    if unknown := [word for word in words if word.startswith("-")]:
        parser.error(f"{unknown[0]}: no such flag")
    shown = flags.cfg is not None or not flags.resolve
    require(shown, "flags", "--resolve", f"only with --cfg job|hydra|all; allowed: {FLAGS}")
    for word in words:
        if word.startswith("sweep=") and word != "sweep=null":
            single = flags.multirun or flags.cfg is not None or flags.info is not None
            require(single, "sweep", word.partition("=")[2], "is a sweep: write train.py -m")
            require_sweep(word.partition("=")[2])
    overrides = {word: expanded(word, swept=flags.multirun) for word in words}
    launcher = launcher_for(words)
    return [*(overrides[word] for word in words), *launcher] + [word for word in arguments if word not in overrides]


def launcher_for(words: Sequence[str]) -> list[str]:
    """The launcher that another sweeper than ours needs, one of Hydra's, where none is given.

    Raises `OptionError` for one of ours, which start commands instead of calling functions.
    """
    chosen = {key: value for key, _, value in (word.partition("=") for word in words)}
    if chosen.get("hydra/sweeper", "fresh") == "fresh":
        return []
    given, ours = chosen.get("hydra/launcher"), options_of("hydra/launcher")
    allowed = f"is of hydra/sweeper=fresh, as are {', '.join(ours)}; other sweepers take hydra/launcher=basic"
    require(given not in ours, "hydra/launcher", given, allowed)
    return [] if given else ["hydra/launcher=basic"]


def expanded(word: str, *, swept: bool) -> str:
    """One override, checked; where it sweeps over `glob(…)`, over the options by their names. Raises `OptionError`."""
    require(bool(word.strip()), "override", repr(word), "is empty: write KEY=VALUE")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        shown = " ".join(str(error).split(" See https", 1)[0].split())
        reason = shown.removeprefix(f"Error parsing override '{word}' ")
        raise OptionError("override", word, f"cannot be read ({reason}); write KEY=VALUE, quote values") from None
    key = override.key_or_group
    require(bool(key), "override", word, "has no key: write KEY=VALUE")
    require(key not in BY_OTHERS, key, word.partition("=")[2], "cannot be chosen: experiment and model choose it")
    require(key != "hydra.mode", "override", word, "write -m for a sweep, and nothing for one run")
    removed = key == "experiment" and override.is_delete()
    require(not removed, "override", word, "cannot be removed; experiment=none is no preset")
    if swept and override.is_sweep_override():
        return _swept(word, override)
    value: Any = override.value()
    empty = key in FOLDERS and isinstance(value, str) and not value.strip()
    require(not empty, key, repr(value), "is empty: name a folder")
    if key in CHOSEN and not override.is_delete() and not override.is_sweep_override():
        require_option(key, value)
    return word


def require_sweep(name: str) -> None:
    """Raise `OptionError` unless `name` is one file of conf/sweep, which sets nothing but options of the sweeper."""
    options = options_of("sweep")
    require(name in options, "sweep", name, f"no such option; choose one of {', '.join(options)}")
    text = (CONF / "sweep" / f"{name}.yaml").read_text(encoding="utf-8")
    require("# @package _global_" in text.splitlines(), "sweep", name, "needs the line # @package _global_")
    known = _loaded(CONF / "hydra" / "sweeper" / "fresh.yaml")
    content = _loaded(CONF / "sweep" / f"{name}.yaml")
    for entry in content.pop("defaults", []):
        if entry != "_self_":
            require_sweep(str(entry))
    hydra = content.pop("hydra", None) or {}
    sweeper = hydra.pop("sweeper", None) or {}
    others = [
        *content,
        *(f"hydra.{key}" for key in hydra),
        *(f"hydra.sweeper.{key}" for key in set(sweeper) - set(known)),
    ]
    allowed = f"hydra.sweeper.{{{','.join(key for key in known if key != '_target_')}}}"
    require(not others, "sweep", name, f"sets {', '.join(others)}; a file of conf/sweep may set {allowed}")


def _loaded(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _swept(word: str, override: Override) -> str:
    key, value = override.key_or_group, override._value
    if isinstance(value, Glob):
        names = value.filter(options_of(key))
        choices = f"choose from {', '.join(folded(options_of(key)))}" if options_of(key) else f"{key} is no group"
        require(bool(names), key, word.partition("=")[2], f"matches no option; {choices}")
        return f"{word.partition('=')[0]}={','.join(names)}"
    if isinstance(value, RangeSweep):
        require(any(True for _ in value.range()), key, word.partition("=")[2], "is an empty range")
    elif key in CHOSEN:
        for choice in override.sweep_iterator():
            require_option(key, choice)
    return word


def require_option(group: str, choice: Any) -> None:
    """Raise `OptionError` unless `choice` is an option of a group: no null, no path to elsewhere, a list only there."""
    if group in SEVERAL and isinstance(choice, list) and choice:
        for one in choice:
            require_option(group, one)
        return
    options = options_of(group)
    near = "".join(f"did you mean {match}? " for match in get_close_matches(str(choice), options, n=1))
    allowed = f"no such option; {near}choose one of {', '.join(folded(options))}"
    require(isinstance(choice, str) and choice in options, group, "null" if choice is None else choice, allowed)
