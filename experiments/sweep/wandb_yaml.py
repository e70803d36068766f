"""A space of conf/sweep as the configuration of a sweep by W&B: python -m experiments.sweep.wandb_yaml lr task=lds.

Prints what `wandb sweep FILE` takes; its agents then run train.py. Further words are overrides, as of train.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from experiments.sweep.spaces import Given, Parameter, Space, parsed
from stu.cli import arguments, errors
from stu.cli.composition import build, composed
from stu.errors import require

METHODS = {None: "grid", "grid": "grid", "random": "random", "tpe": "bayes", "cmaes": "bayes"}


def configuration(name: str, words: Sequence[str]) -> dict[str, Any]:
    """The configuration for a file of conf/sweep and overrides.

    Raises `OptionError` for keys under conditions that the words do not decide: W&B has no such keys.
    """
    arguments.require_sweep(name)
    plain = [word for word in words if not parsed(word).is_sweep_override()]
    config = composed([f"sweep={name}", *plain], with_hydra=True)
    options: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    space = Space.of(words, options["params"], options["when"])
    parameters = {parameter.key: parameter for parameter in decided(space)}
    other = next((key for key in parameters if set(key) & set("+~@/")), None)
    require(
        other is None, "override", other, "cannot be the name of a parameter of W&B, which is letters, _, - and dots"
    )
    task = build(composed(next(space.examples())).task)
    method = METHODS.get(options["sampler"], "bayes")
    made: dict[str, Any] = {
        "program": "train.py",
        "method": method,
        "metric": {
            "name": task.monitor if "/" in task.monitor else f"val/{task.monitor}",
            "goal": {"min": "minimize", "max": "maximize"}[task.mode],
        },
        "parameters": {key: entry(parameter) for key, parameter in parameters.items()},
        "command": ["${env}", "${interpreter}", "${program}", *space.constants, "${args_no_hyphens}"],
    }
    if options["trials"] is not None:
        made["run_cap"] = options["trials"]
    if options["pruner"] in ("hyperband", "halving"):
        made["early_terminate"] = {"type": "hyperband", "min_iter": 1, "eta": 3}
    return made


def decided(space: Space) -> list[Parameter]:
    """The parameters that every job has. Raises `OptionError` where some jobs have others."""
    names = []
    for words in space.examples():
        given = Given(words, strict=True)
        space.job(given)
        names.append(given.params.keys())
    other = next((name for one in names for name in one if not all(name in others for others in names)), "")
    allowed = (
        "some jobs have this key, others not, which W&B cannot say: decide its condition by words such as model=stu"
    )
    require(not other, "override", other, allowed)
    return [parameter for parameter in space.parameters if parameter.name in names[0]]


def entry(parameter: Parameter) -> dict[str, Any]:
    """A parameter in W&B's words."""
    if parameter.values:
        values = {text: parsed(f"{parameter.key}={text}").value() for text in parameter.values}
        # others than numbers as they are written: of null, agents would make None, of '16' a number
        return {"values": [value if isinstance(value, bool | int | float) else text for text, value in values.items()]}
    low, high = (int(one) if parameter.whole else float(one) for one in (parameter.low, parameter.high))
    kind = {
        (False, False): "uniform",
        (False, True): "log_uniform_values",
        (True, False): "int_uniform",
        (True, True): "q_log_uniform_values",
    }[parameter.whole, parameter.log]
    return {"distribution": kind, "min": low, "max": high} | ({"q": 1} if kind.startswith("q_") else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the configuration; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else errors.USAGE
    try:
        made = configuration(Path(words[0]).stem, words[1:])
    except Exception as error:
        if (line := errors._line(error, None)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return errors.USAGE
    print(f"# {' '.join(['python -m experiments.sweep.wandb_yaml', *words])}")
    print(yaml.safe_dump(made, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
