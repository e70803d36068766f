"""`python train.py -m …`: jobs in processes of their own. The run directories are the truth: the same command goes on.

jobs.py        words → jobs, and what their run directories say
spaces.py      what is varied: Hydra's grammar, and keys under conditions
loop.py        slots, retries, signals; the grid of all combinations
search.py      jobs that Optuna suggests
executors/     where jobs run
ledger.py      notes, derived from the run directories
table.py       what is shown
plugin/        what Hydra finds
"""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from experiments.sweep.executors import Executor
from experiments.sweep.jobs import Job, Jobs, apart
from experiments.sweep.ledger import Ledger
from experiments.sweep.loop import Grid, Loop, Source
from experiments.sweep.spaces import SEARCHES, Space
from experiments.sweep.table import Board
from stu.cli import errors
from stu.cli.check import check_call, described, fits
from stu.cli.composition import build
from stu.errors import OptionError, require
from stu.training import names
from stu.training.records import git_state, version_of

OWN = ("hydra.sweep", "hydra.launcher", "hydra/sweeper", "hydra/launcher", "hydra.mode")  # words that no job gets
POLICIES = ("continue", "stop")
PACKAGES = ("hydra-core", "torch", "lightning", "optuna", "submitit", "ray")


def plain(node: DictConfig) -> dict[str, Any]:
    """The values of a node."""
    values: Any = OmegaConf.to_container(node, resolve=True)
    return values


def run(
    config: DictConfig,
    words: Sequence[str],
    *,
    name: str | None = None,
    params: Mapping[str, Any] | None = None,
    when: Mapping[str, Any] | None = None,
    retries: int = 1,
    on_failure: Literal["continue", "stop"] = "continue",
    sampler: str | None = None,
    trials: int | None = None,
    pruner: str = "none",
    seed: int = 0,
) -> int:
    """Run a sweep; returns its exit code. config: composed without the words that are swept.

    The keywords are the options of conf/hydra/sweeper/fresh.yaml. Raises `OptionError`, and what composing raises,
    before anything starts.
    """
    _require_options(retries, on_failure, sampler, trials, pruner, seed)
    executor = _executor(config)
    space = Space.of(words, params, when)
    jobs = Jobs(space.swept, [word for word in config.hydra.overrides.hydra if not names.key_of(word).startswith(OWN)])
    searched = sampler in SEARCHES
    made = [jobs.make(combination) for combination in (space.examples() if searched else islice(space.jobs(), trials))]
    name = space.name([job.run for job in made]) if name is None else str(name)
    try:
        names.require_plain(name)
    except OptionError as error:
        raise OptionError("hydra.sweeper.name", error.value, error.allowed) from None
    ledger = Ledger(Path(os.path.abspath(str(config.paths.runs)), ".sweeps", name))
    if searched:
        options = {"trials": trials, "sampler": sampler, "pruner": pruner, "seed": seed}
        source = _search(space, jobs, made, ledger.folder, **options)
    else:
        source = Grid(made)
        if new := [job for job in made if not (job.finished or job.pruned)]:
            apart(lambda: jobs.check(new))
    board = Board(f"Sweep {name}", ledger, source.total)
    environment = {"STU_SWEEP": name}
    about = partial(_about, name, source, space, config.hydra.launcher)
    policy: dict[str, Any] = {"retries": retries, "on_failure": on_failure}
    errors.STARTED.append(config)  # what fails from here on, no word of the command has caused
    try:
        code = Loop(source, executor, ledger, board, environment=environment, about=about, **policy).run()
    finally:
        board.stop()
    board.close(code)
    return code


def _require_options(
    retries: object, on_failure: object, sampler: object, trials: object, pruner: object, seed: object
) -> None:
    """Raise `OptionError` for an option of the sweeper that cannot work."""
    whole = isinstance(retries, int) and not isinstance(retries, bool) and retries >= 0
    require(whole, "hydra.sweeper.retries", retries, "must be a whole number, 0 or more")
    require(on_failure in POLICIES, "hydra.sweeper.on_failure", on_failure, f"choose one of {', '.join(POLICIES)}")
    counted = trials is None or fits(trials, range(1, 2**31))
    require(counted, "hydra.sweeper.trials", trials, "must be null or at least 1")
    require(fits(seed, range(2**32)), "hydra.sweeper.seed", seed, f"must be {described(range(2**32))}")
    known = (None, "grid", *SEARCHES)
    require(sampler in known, "hydra.sweeper.sampler", sampler, f"choose one of grid, {', '.join(SEARCHES)}")
    idle = sampler not in SEARCHES and pruner not in (None, "none")
    allowed = f"is for a search: add hydra.sweeper.sampler={'|'.join(SEARCHES)}"
    require(not idle, "hydra.sweeper.pruner", pruner, allowed)


def _executor(config: DictConfig) -> Executor:
    """What the launcher node makes. Raises `OptionError` for one that is none, or has options that cannot work."""
    launcher = config.hydra.launcher
    called = OmegaConf.is_dict(launcher) and "_target_" in launcher
    require(called, "hydra.launcher", launcher, "is no launcher: choose one by hydra/launcher=…")
    hydras = str(launcher.get("_target_")).startswith("hydra")
    allowed = "is driven by Hydra's own sweepers: add hydra/sweeper=basic"
    require(not hydras, "hydra/launcher", config.hydra.runtime.choices.get("hydra/launcher"), allowed)
    check_call("hydra.launcher", plain(launcher))
    executor: Executor = build(launcher)
    return executor


def _search(space: Space, jobs: Jobs, examples: Sequence[Job], folder: Path, **options: Any) -> Source:
    """What Optuna suggests. Raises `OptionError` where it is not installed, or the folder cannot be written to."""
    try:
        from experiments.sweep.search import search_of
    except ImportError:
        allowed = 'needs Optuna, 4.9 or newer: pip install ".[search]"'
        raise OptionError("hydra.sweeper.sampler", options["sampler"], allowed) from None
    try:
        return search_of(space, jobs, examples, folder, **options)
    except OSError as error:
        raise OptionError("paths.runs", folder, f"must be a folder to write to: {error.strerror}") from error


def _about(name: str, source: Source, space: Space, launcher: DictConfig) -> dict[str, Any]:
    """What the ledger says of a sweep."""
    return {
        "name": name,
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "jobs": source.total,
        "fixed": list(space.constants),
        "swept": {one.name: str(one).partition("=")[2] for one in space.parameters},
        "launcher": plain(launcher),
        "packages": {package: version for package in PACKAGES if (version := version_of(package))},
        "git": git_state(),
    }
