"""Parameter groups by name pattern, AdamW, warm-up and decay: a recipe that knows parameters and step budget."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, final, get_args

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from stu.errors import OptionError, require

Schedule = Literal["cosine", "linear", "rsqrt", "constant"]
NamedParameters = Iterable[tuple[str, nn.Parameter]]
WRAPPED = re.compile(r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # by PyTorch, inside names
GROUP_KEYS = ("match", "lr", "lr_scale", "weight_decay")


class ParameterGroup(NamedTuple):
    """Parameters with the same peak rate and weight decay: their names, and their number of entries in all."""

    name: str
    lr: float
    weight_decay: float
    parameters: frozenset[str]
    size: int


@final
@dataclass(frozen=True)
class AdamWRecipe:
    """AdamW over named groups with warm-up and decay, checked and ready to be built. `warmup` is in steps."""

    groups: tuple[ParameterGroup, ...]
    total_steps: int
    betas: tuple[float, float]
    eps: float
    schedule: Schedule
    warmup: int
    min_lr: float

    def build(self, named_parameters: NamedParameters) -> tuple[AdamW, LambdaLR]:
        """The optimiser of these parameters, and its schedule, stepped once per optimiser step.

        Raises `ValueError` unless their names are those for which the recipe was made.
        """
        named = [(WRAPPED.sub("", name), parameter) for name, parameter in named_parameters]
        if changed := {name for name, _ in named} ^ frozenset().union(*(group.parameters for group in self.groups)):
            raise ValueError(f"the recipe is for parameters of other names: {', '.join(sorted(changed)[:4])}")
        members = [
            {
                "name": group.name,
                "params": [parameter for name, parameter in named if name in group.parameters],
                "lr": group.lr,
                "weight_decay": group.weight_decay,
            }
            for group in self.groups
        ]
        optimizer = AdamW(members, betas=self.betas, eps=self.eps)
        factors: list[Callable[[int], float]] = [partial(self.factor, group.lr) for group in self.groups]
        return optimizer, LambdaLR(optimizer, factors)

    def factor(self, peak: float, step: int) -> float:
        """The rate of optimiser step `step` = 0, 1, … as a share of the group's peak."""
        floor = min(self.min_lr, peak)
        return learning_rate(step, self.total_steps, self.warmup, peak, floor, self.schedule) / peak if peak else 0.0


def adamw(
    named_parameters: NamedParameters,
    total_steps: int,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    schedule: Schedule = "cosine",
    warmup: float = 0.1,
    min_lr: float = 1e-7,
) -> AdamWRecipe:
    """AdamW for these parameters and this step budget.

    groups: name → {match: regular expression, lr or lr_scale, weight_decay}; a parameter belongs to the first
    group whose expression is found in its name, or to "default". warmup: linear from `min_lr`, over that share of
    the budget if below 1, else that many steps. Then `schedule` leads to `min_lr` at the end of the budget; rsqrt,
    Vaswani et al. (1706.03762), section 5.3, falls with the root of the step, wherever that leads.

    Raises `OptionError` for a value out of range, and for a group that matches nothing.
    """
    require(0 < lr < math.inf, "lr", lr, "must be above 0 and finite")
    require(all(0 <= beta < 1 for beta in betas), "betas", betas, "must be in [0, 1)")
    require(0 <= eps < math.inf, "eps", eps, "must be at least 0 and finite")
    require(0 <= weight_decay < math.inf, "weight_decay", weight_decay, "must be at least 0 and finite")
    require(0 <= min_lr <= lr, "min_lr", min_lr, f"must be in 0 … lr ({lr})")
    allowed = get_args(Schedule)
    require(schedule in allowed, "schedule", schedule, f"must be one of {', '.join(allowed)}")
    assigned = tuple(
        ParameterGroup(
            name,
            options.get("lr", lr * options.get("lr_scale", 1.0)),
            options.get("weight_decay", weight_decay),
            frozenset(parameters),
            sum(parameter.numel() for parameter in parameters.values()),
        )
        for name, options, parameters in _assign(named_parameters, groups or {})
    )
    for group in assigned:
        _require_group(group, (groups or {}).get(group.name, {}))
    steps = warmup_steps(warmup, total_steps)
    return AdamWRecipe(assigned, total_steps, (betas[0], betas[1]), eps, schedule, steps, min_lr)


def _require_group(group: ParameterGroup, options: Mapping[str, Any]) -> None:
    for option, value in (("lr", group.lr), ("weight_decay", group.weight_decay)):
        given = next((name for name in (f"{option}_scale", option) if name in options), None)
        if given is not None:
            allowed = f"makes {option} {value:g}, which must be finite and at least 0"
            require(0 <= value < math.inf, f"groups.{group.name}.{given}", options[given], allowed)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """A share of the budget below 1, a number of steps from 1 on."""
    require(0 <= warmup < total_steps, "warmup", warmup, f"must be in 0 … the step budget ({total_steps})")
    require(warmup < 1 or warmup == int(warmup), "warmup", warmup, "must be a share below 1, or whole steps")
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def learning_rate(step: int, total: int, warmup: int, peak: float, floor: float, schedule: Schedule) -> float:
    """The rate of optimiser step `step` = 0, 1, … of `total`."""
    if step < warmup:
        return floor + (peak - floor) * step / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    match schedule:
        case "cosine":
            return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return floor + (peak - floor) * (1 - done)
        case "rsqrt":
            return max(floor, peak * math.sqrt(max(1, warmup) / max(1, step)))
        case "constant":
            return peak


def _assign(
    named_parameters: NamedParameters, groups: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any], dict[str, nn.Parameter]]]:
    """(name, options, parameters) of every group; "default" has the rest and is left out where there is none."""
    for name, options in groups.items():
        _check_group(f"groups.{name}", options)
    members: dict[str, dict[str, nn.Parameter]] = {name: {} for name in (*groups, "default")}
    parameters = dict(named_parameters)
    for name, parameter in parameters.items():
        matching = (group for group, options in groups.items() if re.search(options["match"], name))
        members[next(matching, "default")][name] = parameter
    for group, options in groups.items():
        if not members[group]:
            examples = ", ".join(list(parameters)[:3])
            allowed = f"matches no parameter left by the groups before it; names are like {examples}"
            raise OptionError(f"groups.{group}.match", options["match"], allowed)
    return [(name, groups.get(name, {}), found) for name, found in members.items() if found]


def _check_group(key: str, options: Any) -> None:
    require(key != "groups.default", key, options, "this name is for the parameters that no group matches")
    require(isinstance(options, Mapping), key, options, f"must have some of the keys {', '.join(GROUP_KEYS)}")
    for name, value in options.items():
        require(name in GROUP_KEYS, f"{key}.{name}", value, f"no such key; allowed: {', '.join(GROUP_KEYS)}")
        if name != "match":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(number and value >= 0, f"{key}.{name}", value, "must be a number, at least 0")
    require("match" in options, key, dict(options), "needs match, a regular expression")
    require(not {"lr", "lr_scale"} <= set(options), key, dict(options), "must have lr or lr_scale, not both")
    try:
        re.compile(options["match"])
    except (TypeError, re.error) as error:
        raise OptionError(f"{key}.match", options["match"], f"must be a regular expression: {error}") from error
