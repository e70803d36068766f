"""What a sweep varies: words of Hydra's sweep grammar, and keys that exist under conditions, as a space of jobs."""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf

from stu.cli.arguments import expanded
from stu.cli.composition import composed
from stu.cli.usage import GROUPS
from stu.errors import require
from stu.training.names import is_telling, key_of

SEARCHES = ("tpe", "random", "cmaes")  # samplers that choose from intervals
DIGITS = 4  # of a suggested number, where they suffice to tell a thousand numbers of its interval apart
T = TypeVar("T")
Jobs = Iterator[tuple[str, ...]]


class Suggests(Protocol):
    """What chooses values: a trial of Optuna, or whatever answers like one."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        """One of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number in low … high."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number in low … high."""


@dataclass(frozen=True)
class Parameter:
    """A key and what it may be: one of `values`, in the words of an override, or without them any of low … high.

    key: as an override has it, with its + and @; name: unique in a space, where a key may stand under several
    conditions. step: between values that are equally spaced numbers, else 0.
    """

    key: str
    name: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    whole: bool = False
    log: bool = False

    @classmethod
    def of(cls, override: Override, condition: str = "") -> "Parameter":
        """What an override varies, or the one value that it gives. Raises `OptionError` where that is nothing."""
        key, written = override.get_key_element(), str(override.input_line).partition("=")[2]
        name = f"{key} | {condition}" if condition else key
        if not override.is_sweep_override():
            return cls(key, name, (override.get_value_element_as_str(),))
        swept: Any = override.value()
        log = bool(swept.tags)
        require(swept.tags <= {"log"}, key, written, "log is the only tag: tag(log,interval(LOW,HIGH))")
        if isinstance(swept, IntervalSweep):
            low, high = swept.start, swept.end
            assert low is not None
            assert high is not None
            require(low < high, key, written, "is an empty interval: write interval(LOW,HIGH)")
            require(low > 0 or not log, key, written, "must be above 0 on a log scale")
            return cls(key, name, low=low, high=high, log=log, whole=isinstance(low, int) and isinstance(high, int))
        require(not log, key, written, "only an interval has a log scale: tag(log,interval(LOW,HIGH))")
        if not isinstance(swept, RangeSweep):
            return cls(key, name, tuple(dict.fromkeys(override.sweep_string_iterator())))
        whole = all(isinstance(number, int) for number in swept.range())
        values = tuple(
            text if whole else repr(float(f"{float(text):.12g}")) for text in override.sweep_string_iterator()
        )
        numbers = sorted(map(float, values))
        require(len(numbers) > 0, key, written, "is an empty range")
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 0.0
        return cls(key, name, values, numbers[0], numbers[-1], step, whole)

    def __str__(self) -> str:
        """In the words of an override."""
        interval = f"interval({self.low},{self.high})"
        kind = f"int({interval})" if self.whole else interval
        return f"{self.key}={','.join(self.values) or (f'tag(log,{kind})' if self.log else kind)}"

    @property
    def is_number(self) -> bool:
        """Whether its values are points on an axis."""
        return bool(self.step) or not self.values

    @property
    def listed(self) -> Sequence[str] | None:
        """All values; None where there are too many."""
        if self.values or not self.whole:
            return self.values or None
        return [str(number) for number in range(int(self.low), int(self.high) + 1)]

    def chosen(self, by: Suggests) -> str:
        """A value of it, in the words of an override."""
        if self.step and self.whole:
            return str(by.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step)))
        if self.step:
            number = by.suggest_float(self.name, self.low, self.high, step=self.step)
            return min(self.values, key=lambda value: abs(float(value) - number))
        if self.values:
            return str(by.suggest_categorical(self.name, self.values))
        if self.whole:
            return str(by.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return repr(self.shortened(by.suggest_float(self.name, self.low, self.high, log=self.log)))

    def shortened(self, number: float) -> float:
        """The number with few digits, inside the interval, moved by less than a thousandth of it; once more: itself."""
        unit = math.floor(math.log10(1e-3 * (self.high - self.low)))  # of the last digit that is needed
        digits = max(DIGITS, math.floor(math.log10(abs(number))) - unit + 1) if number else DIGITS
        return min(max(float(f"{number:.{min(digits, 17)}g}"), self.low), self.high)


@dataclass(frozen=True)
class Block:
    """Parameters that a job has if, for each of the keys in `conditions`, it has one of the values."""

    conditions: tuple[tuple[str, tuple[str, ...]], ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Space:
    """Everything that the jobs of a sweep may be: overrides that all have, and blocks of parameters."""

    constants: tuple[str, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(
        cls,
        words: Sequence[str],
        params: Mapping[str, Any] | None = None,
        when: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "Space":
        """The space of a command.

        words: its overrides, which count more than others of the same keys; those of `sweep` and of hydra are no part
        of a job. params: key → what it may be. when: conditions as overrides, `model=stu,s4 seed=0`, → key → what it
        may be where all of them hold; of two that hold and have the same key, the first counts.

        Raises `OptionError` for what cannot be read.
        """
        given = {key_of(word): parsed(word) for word in words}
        given = {key: override for key, override in given.items() if key != "sweep" and not key.startswith("hydra")}
        free = {key_of(str(key)): parsed(_word(key, value)) for key, value in _items("params", params)}
        overrides = [override for key, override in (free | given).items()]
        varied = [override for override in overrides if override.is_sweep_override()]
        constants = tuple(str(override.input_line) for override in overrides if not override.is_sweep_override())
        blocks = [Block((), tuple(map(Parameter.of, varied)))]
        for condition, keys in _items("when", when):
            under = {key_of(str(key)): _word(key, value) for key, value in _items(f"when.{condition}", keys)}
            twice = next((key for key in under if key in free and key not in given), None)
            require(twice is None, f"when.{condition}", twice, "is in params, too: give it under conditions alone")
            parameters = tuple(Parameter.of(parsed(under[key]), condition) for key in under if key not in given)
            blocks.append(Block(_conditions(condition), parameters))
        return cls(constants, tuple(blocks))

    @property
    def is_finite(self) -> bool:
        """Whether all jobs can be listed."""
        return all(parameter.listed is not None for parameter in self.parameters)

    @property
    def parameters(self) -> list[Parameter]:
        """All of them, whatever their conditions."""
        return [parameter for block in self.blocks for parameter in block.parameters]

    @property
    def swept(self) -> set[str]:
        """The keys that are varied."""
        return {key_of(parameter.key) for parameter in self.parameters}

    def name(self, runs: Iterable[Path]) -> str:
        """A readable name for jobs with these run directories; of the same space whatever the order of the words."""
        asked = [word for word in self.constants if is_telling(key := key_of(word)) or key in ("mode", "checkpoint")]
        asked += [f"{parameter.name}: {parameter}" for parameter in self.parameters]
        digest = hashlib.sha256("\0".join(sorted(asked)).encode()).hexdigest()[:10]
        folders = [run.parts[-3:-1] for run in runs]
        found = [("tasks", {task for task, _ in folders}), ("models", {model for _, model in folders})]
        parts = ["+".join(sorted(one)) if len(one) <= 3 else f"{len(one)}-{what}" for what, one in found]
        return "-".join([*parts, digest])

    def job(self, by: Suggests) -> tuple[str, ...]:
        """The overrides of the job that `by` chooses."""
        chosen: dict[str, str] = {}
        while parameter := self._next(chosen):
            chosen[parameter.key] = parameter.chosen(by)
        return self._overrides(chosen)

    def jobs(self) -> Jobs:
        """All jobs, the last parameter varied first. Raises `OptionError` for an interval."""
        for parameter in self.parameters:
            samplers = "|".join(SEARCHES)
            allowed = f"is an interval: choose hydra.sweeper.sampler={samplers}, or list values"
            require(bool(parameter.values), parameter.key, str(parameter).partition("=")[2], allowed)
        return self.every()

    def every(self) -> Jobs:
        """All jobs of a finite space."""
        return self._every({})

    def _every(self, chosen: dict[str, str]) -> Jobs:
        parameter = self._next(chosen)
        if parameter is None:
            yield self._overrides(chosen)
            return
        for value in parameter.listed or ():
            yield from self._every({**chosen, parameter.key: value})

    def examples(self) -> Jobs:
        """A few jobs that together have each value that decides which keys there are, and each key."""
        deciding = {key for block in self.blocks for key, _ in block.conditions} | set(GROUPS)
        wanted = [
            {parameter.key: value}
            for parameter in self.parameters
            if key_of(parameter.key) in deciding
            for value in parameter.values
        ]
        wanted += [{key: value for key, (value, *_) in block.conditions} for block in self.blocks]
        yield from dict.fromkeys(self.job(Given(values)) for values in wanted)

    def _next(self, chosen: Mapping[str, str]) -> Parameter | None:
        """The first parameter that a job with these choices still needs."""
        for block in self.blocks:
            missing = [parameter for parameter in block.parameters if parameter.key not in chosen]
            if missing and all(self._has(chosen, key, values) for key, values in block.conditions):
                return missing[0]
        return None

    def _has(self, chosen: Mapping[str, str], key: str, values: Collection[str]) -> bool:
        overrides = self._overrides(chosen)
        given = next((_value(word) for word in overrides if key_of(word) == key), None)
        return (setting(overrides, key) if given is None else given) in values

    def _overrides(self, chosen: Mapping[str, str]) -> tuple[str, ...]:
        return (*self.constants, *(f"{key}={value}" for key, value in chosen.items()))


class Given:
    """Chooses the values of overrides, and what comes first where there are none.

    strict: raises `LookupError` instead, and for a value that the space does not have. params: what was chosen, by
    the names of the parameters.
    """

    def __init__(self, overrides: Iterable[str] | Mapping[str, str], *, strict: bool = False) -> None:
        pairs = overrides if isinstance(overrides, Mapping) else dict(word.partition("=")[::2] for word in overrides)
        self.values, self.strict = {key_of(key): value for key, value in pairs.items()}, strict
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """The value, if it is one of the choices."""
        value = self._value(name, choices[0])
        return self._told(name, value, choices[0], value in choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """The value, if it is in low … high."""
        value = int(self._value(name, str(low)))
        return self._told(name, value, low, low <= value <= high and (value - low) % step == 0)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """The value, if it is in low … high."""
        value = float(self._value(name, str(low)))
        return self._told(name, value, low, low <= value <= high)

    def _value(self, name: str, first: str) -> str:
        key = key_of(name.partition(" | ")[0])
        if self.strict:
            return self.values[key]
        return self.values.get(key, first)

    def _told(self, name: str, value: T, first: T, known: bool) -> T:
        if self.strict and not known:
            raise LookupError(name)
        self.params[name] = value if known else first
        return self.params[name]


@cache
def setting(overrides: tuple[str, ...], key: str) -> str:
    """What the command with these overrides has at a key: the choice of a group, or a value, in words of an override.

    Raises what Hydra raises for overrides that can't be composed.
    """
    config = composed(overrides, with_hydra=True)
    choices = config.hydra.runtime.choices
    if key in choices:
        return str(choices[key])
    value: Any = OmegaConf.select(config, key)
    return _text(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)


def parsed(word: str) -> Override:
    """A word, with the options that `glob` stands for. Raises `OptionError` where it cannot be read."""
    return OverridesParser.create().parse_override(expanded(word, swept=True))


@cache
def _value(word: str) -> str:
    """What an override gives its key, written in one way."""
    return str(parsed(word).get_value_element_as_str())


def _text(value: Any) -> str:
    return str(Override._get_value_element_as_str(value))


def _word(key: object, value: Any) -> str:
    """`key=value`, where the value comes from a file: a string is in the grammar, other things are values."""
    return f"{key}={value if isinstance(value, str) else _text(value)}"


def _items(name: str, node: Any) -> Iterable[tuple[str, Any]]:
    mapping = node is None or isinstance(node, Mapping)
    require(mapping, f"hydra.sweeper.{name}", node, "must be a mapping from keys to what they may be")
    return ((str(key), value) for key, value in (node or {}).items())


def _conditions(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`model=stu,s4 seed=0` → each key with its values."""
    overrides = [parsed(word) for word in text.split()]
    listed = bool(overrides) and all(Parameter.of(override).values for override in overrides)
    require(listed, "hydra.sweeper.when", repr(text), "must be KEY=VALUE or KEY=VALUE,VALUE …")
    return tuple((override.key_or_group, Parameter.of(override).values) for override in overrides)
