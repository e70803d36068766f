"""Errors of the command line in one line: which key, which value, what is allowed.

`HYDRA_FULL_ERROR=1` shows tracebacks instead of lines.
"""

import atexit
import functools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from stu.cli import arguments
from stu.cli.check import Refused, missing, nodes, root_keys
from stu.cli.layers import as_written
from stu.cli.usage import BY_OTHERS, CONF, GROUPS, at_home, folded, options_of
from stu.errors import CommandError, OptionError

USAGE = 2  # exit code of a command that asks for something impossible
STOPPED = 128  # exit codes from here on: stopped by a signal
# The second variable: set by `run`, whose HYDRA_FULL_ERROR the processes of a distributed run inherit.
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1" and "STU_ERROR_LINES" not in os.environ
FAILED: list[str] = []  # overrides of the jobs of a sweep that failed
# What NumPy and PyTorch say of sizes that no memory has.
TOO_LARGE = re.compile(
    "can't allocate memory|Storage size calculation overflowed|integer multiplication overflow|Overflow when unpacking"
    "|Maximum allowed dimension exceeded|array is too big|too large to convert|Unable to allocate"
)
STARTED: list[DictConfig] = []  # configurations of jobs: what fails before the first, the command has caused


def reports_errors(job: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """Make a Hydra job report what its user can correct in one line and exit with `USAGE`; a sweep continues."""

    @functools.wraps(job)
    def wrapped(config: DictConfig) -> float | None:
        STARTED.append(config)
        try:
            return job(config)
        except Exception as error:
            line = None if TRACEBACKS else _line(error, config)
            # the first process of a run says why another one has ended: it has recorded it
            recorded = bool(_place()) and not TRACEBACKS and config.get("mode") == "train"
            if not sweeping() or isinstance(error, CommandError):
                if recorded:
                    raise SystemExit(getattr(error, "exit_code", 1)) from None
                if line is None:
                    raise
                _fail(line, code=getattr(error, "exit_code", USAGE), told=_told_by_another(error))
            _report(line or traceback.format_exc())
        except SystemExit as end:
            if not sweeping() or (isinstance(end.code, int) and end.code >= STOPPED):
                raise
        FAILED.append(" ".join(HydraConfig.get().overrides.task))
        return math.nan

    return wrapped


def run(main: Callable[[], object], checked: Callable[[list[str]], list[str]] = arguments.checked) -> None:
    """Run a `hydra.main`; errors in the command, and while it is composed, are reported in one line, too.

    checked: the words of the command → those that `main` gets; raises `OptionError` for what it refuses.
    """
    try:
        _run(main, checked)
    except BaseException as end:
        if _place() is not None:
            _leave(end)
        raise


def _leave(end: BaseException) -> NoReturn:
    """End a process that others are connected to: it takes the interpreter seconds, in which they would wait for it."""
    if not isinstance(end, SystemExit):
        sys.excepthook(type(end), end, end.__traceback__)
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # of an output that nobody reads
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 1)


def _run(main: Callable[[], object], checked: Callable[[list[str]], list[str]]) -> None:
    if not TRACEBACKS:
        os.environ |= {"HYDRA_FULL_ERROR": "1", "STU_ERROR_LINES": "1"}  # Hydra then raises instead of printing
    try:
        sys.argv[1:] = checked([at_home(argument) for argument in sys.argv[1:]])
        main()
        if FAILED:
            failed = "".join(f"\n  {overrides}" for overrides in FAILED)
            print(f"error: {len(FAILED)} jobs of the sweep failed:{failed}", file=sys.stderr)
            raise SystemExit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning turns an interrupt into a plain exit code 1
        if isinstance(end, KeyboardInterrupt) or isinstance(end.__context__, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
    except Exception as error:
        composing = not STARTED or isinstance(error, HydraException | OmegaConfBaseException | OptionError)
        if TRACEBACKS or not composing:
            raise
        _fail(_line(error, None) or f"{type(error).__name__}: {_flat(str(error))}", told=_told_by_another(error))


def sweeping() -> bool:
    """Whether this is one job of several of the same command."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _fail(line: str, *, code: int = USAGE, told: bool = False) -> NoReturn:
    if not told:
        _report(line)
    raise SystemExit(code) from None


def _place() -> int | None:
    """Which of several processes that have met this is; None elsewhere."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)  # not imported for this
    if distributed and distributed.is_available() and distributed.is_initialized():
        rank: int = distributed.get_rank()
        return rank
    return None


def _told_by_another(error: BaseException) -> bool:
    """Whether another process on this machine, started for the same command by torchrun or srun, refuses it, too.

    Not where this process alone may be wrong: after all have met, or where only variables say that there are others.
    """
    if _place() is not None:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.environ.get("LOCAL_RANK", "0") != "0"
    certain = "SLURM_STEP_ID" in os.environ or not isinstance(error, CommandError)
    several = os.environ.get("SLURM_NTASKS", "1") != "1"
    return certain and several and os.environ.get("SLURM_LOCALID", "0") != "0"


def _report(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def _line(error: BaseException, config: DictConfig | None) -> str | None:
    """An error in one line, naming the full key; None for errors that are not the user's."""
    match error:
        case OptionError():
            key = as_written(_full_key(error, config))
            return f"{_preset(key)}{key}={error.value}: {_flat(error.allowed)}"
        case Exception() if isinstance(error, MemoryError) or TOO_LARGE.search(str(error)):
            reason = _flat(str(error)) if type(error) is MemoryError and str(error) else "memory does not suffice"
            return f"{_largest(config)}: is too large: {reason}"
        case InstantiationException():
            cause = error.__cause__
            if cause is not None and (line := _line(cause, config)):
                return line
            node = match.group(1) if (match := re.search(r"full_key: (\S+)", str(error))) else "configuration"
            return f"{node}: {_flat(str(cause or error))}"
        case MissingConfigException(options=options) if options is not None:
            group, _, choice = str(error.missing_cfg_file).removeprefix("hydra/").partition("/")
            if group in GROUPS:
                return f"{group}={choice}: no such option; choose one of {', '.join(folded(options_of(group)))}"
            known = f"choose one of {', '.join(options)}; others come with packages, such as hydra-joblib-launcher"
            return f"hydra/{group}={choice}: not installed; {known}"
        case ConfigCompositionException() | OmegaConfBaseException():
            return _composition_line(error)
        case HydraException():
            return _flat(str(error))
        case Exception() if type(error).__name__ == "MisconfigurationException":  # Lightning's, slow to import
            return f"trainer: {_flat(str(error))}"
    return None


def _composition_line(error: BaseException) -> str:
    """Name the key and what is wrong with it: it does not exist, has no value, or refers to what has none."""
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", "") or "")
    override = match.group(1) if (match := re.search(r"Could not override '([^']+)'", str(error))) else key
    given = _given(override)
    parent = getattr(cause, "parent_node", None)
    if given is not None and given.startswith("~"):
        return f"{given}: is needed and cannot be removed"
    written = given or override
    match cause:
        case MissingMandatoryValue():
            return f"{written or _flat(str(cause))}: has no value yet; give one: {override}=…"
        case InterpolationResolutionError() | GrammarParseError():
            reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(cause).partition("\n")[0]).strip(
                '"'
            )
            return f"{written}: {_flat(reason)}" if written else _flat(reason)
        case ConfigKeyError() | ConfigAttributeError() if override and isinstance(parent, DictConfig):
            whole = OmegaConf.to_container(parent._get_root(), resolve=False)
            known = {*map(str, parent)} if "." in override else root_keys() - BY_OTHERS
            return f"{written}: {missing(key or override, known, dict(nodes(whole)))}"
    first = str(cause).partition("\n")[0]  # then follows the key again
    return f"{written}: {first}" if written else _flat(str(error))


def _preset(key: str) -> str:
    """The preset that sets a key, where the command does not: it has the blame."""
    name = next((word.partition("=")[2] for word in sys.argv[1:] if word.lstrip("+").startswith("experiment=")), "")
    if name not in options_of("experiment") or _given(key) is not None:
        return ""
    preset = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    return "" if OmegaConf.select(preset, key) is None else f"experiment={name}, for its own task and model, sets "


def _largest(config: DictConfig | None) -> str:
    """The largest number of the task, the model or the loader, with its key: what probably does not fit in memory."""
    if config is None:
        return "configuration"
    numbers = {
        key: value
        for key, value in nodes(OmegaConf.to_container(config, resolve=True))
        if key.split(".")[0] in ("task", "model", "loader") and type(value) in (int, float)
    }
    written: dict[str, Any] = dict(nodes(OmegaConf.to_container(config, resolve=False)))
    key = max(numbers, key=lambda key: (numbers[key], not str(written[key]).startswith("${")))
    return f"{key}={numbers[key]}"


def _given(key: str) -> str | None:
    """The last argument about a key."""
    return next((a for a in reversed(sys.argv[1:]) if key and a.split("=", 1)[0].lstrip("+~") == key), None)


def _full_key(error: OptionError, config: DictConfig | None) -> str:
    """Where the refused option stands in the configuration: the same keyword with the same value."""
    if config is None or isinstance(error, Refused):
        return error.name
    if "." in error.name and OmegaConf.select(config, error.name) is not None:
        return error.name
    values = dict(nodes(OmegaConf.to_container(config, resolve=True)))
    named = [key for key in values if key == error.name or key.endswith(f".{error.name}")]
    exact = [key for key in named if values[key] == error.value]
    # a key that refers to another one comes last: the other is where the value was given
    written: dict[str, Any] = dict(nodes(OmegaConf.to_container(config, resolve=False)))
    return min(exact or named or [error.name], key=lambda key: str(written.get(key)).startswith("${"))


def _flat(text: str) -> str:
    return " ".join(text.split())
