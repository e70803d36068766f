"""Jobs that a sampler of Optuna chooses in the light of those that have ended.

The study is a file that is derived: results are in the run directories. What is suggested depends on the number of the
trial and on the trials that have ended alone, so a search that was killed and goes on suggests what it would have.
"""

import hashlib
import json
import math
import os
import shlex
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.shared.ledgers import CHANGES
from experiments.sweep.jobs import Job, Jobs, apart
from experiments.sweep.spaces import SEARCHES, Given, Space, setting
from stu.cli.composition import build, composed
from stu.errors import DIVERGED, Busy, require
from stu.files import kept_name
from stu.training.lock import RunLock

PRUNERS = ("none", "median", "hyperband", "halving")
Direction = Literal["minimize", "maximize"]
STUDY = "optuna.jsonl"
REPEATS = 10  # suggestions in a row of what is known, after which what is left is listed
MOST_REPEATS = 50  # … after which the search ends, where it can't be listed
LOOK = 1.0  # seconds between looks at what other workers do
TO_CLAIM = 5.0  # seconds within which a worker has claimed the run of a trial that it asked for


def search_of(space: Space, jobs: Jobs, examples: Sequence[Job], folder: Path, **options: Any) -> "Search":
    """The search of a sweep with this ledger. A new one first checks the examples, and is told what began earlier."""

    def direction() -> Direction:
        jobs.check(examples)
        return direction_of(examples)

    asked = cache(partial(apart, direction))
    if not (folder / STUDY).exists():
        asked()  # what is refused leaves nothing behind
    return Search(space, jobs.make, folder, direction=asked, known=begun(folder / CHANGES), **options)


def direction_of(jobs: Sequence[Job]) -> Direction:
    """Of the metric by which the tasks of jobs select. Raises `OptionError` where one is to grow, another to fall."""
    monitored: dict[str, str] = {}  # mode → a task with it
    for task in {setting(job.overrides, "task"): job for job in jobs}.values():
        built = build(composed(task.overrides).task)
        monitored.setdefault(built.mode, f"{setting(task.overrides, 'task')} (its {built.monitor}, {built.mode})")
    both = " and ".join(monitored.values())
    require(len(monitored) == 1, "task", both, "cannot be searched together; search one, or hydra.sweeper.sampler=grid")
    return "minimize" if "min" in monitored else "maximize"


def begun(changes: Path) -> list[list[str]]:
    """The words of the jobs in a ledger, in the order in which they began."""
    jobs: dict[tuple[str, ...], None] = {}
    for line in changes.read_text(encoding="utf-8").splitlines() if changes.exists() else ():
        with suppress(
            ValueError, KeyError, TypeError, AttributeError
        ):  # a line that a killed process has left unfinished
            jobs[tuple(shlex.split(json.loads(line)["job"]))] = None
    return list(map(list, jobs))


class Search:
    """A source of `trials` different jobs: of all workers, and of all times that the command was given, together.

    space: what they may be. job: overrides and number of a trial → the job. folder: where the study is, which workers
    share. direction: minimize or maximize; asked for a new study. sampler: tpe, random or cmaes. pruner: none, median,
    hyperband or halving, which compare runs validation by validation. seed: of the suggestions. known: overrides of
    jobs that began earlier, which a study without trials takes in first.

    The trial of a worker that was killed goes on in its run directory. One that failed is tried again by the next
    command; but one that diverged counts as pruned, as it would diverge again: it is worse than all that finished,
    without an invented value. A suggestion whose run is known gets the value that is known, and is no trial.

    Raises `OptionError` for options that cannot work, and for the study of another space.
    """

    def __init__(
        self,
        space: Space,
        job: Callable[[Sequence[str], int], Job],
        folder: Path,
        *,
        direction: Callable[[], Direction],
        trials: int | None,
        sampler: str = "tpe",
        pruner: str = "none",
        seed: int = 0,
        known: Sequence[Sequence[str]] = (),
    ) -> None:
        whole = isinstance(trials, int) and not isinstance(trials, bool) and trials > 0
        require(whole, "hydra.sweeper.trials", trials, "must be how many jobs a search tries, at least 1")
        self.space, self._make = space, job
        self.total: int | None = trials
        self._jobs: dict[int, Job] = {}  # by the number of their trial, also those of other workers
        self._trials: dict[int, Trial] = {}  # those of this worker
        self._waiting: deque[Job] = deque()
        self._before: deque[Job] = deque()  # that have ended elsewhere: to be seen, or done again if deleted
        self._seen: set[int] = set()  # numbers of trials whose end is known here
        self._repeats = 0
        self._looks_at = 0.0
        self._others = True  # whether other workers have trials under way
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        tools = sampler_of(sampler, seed, space), pruner_of(pruner)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _Lock(folder / "search")
        with self._lock.held():
            self.study = _study(folder, space, direction, *tools)
            self._take_in(known)
            for trial in self._counted():
                self._bring_back(trial)

    @property
    def empty(self) -> bool:
        """Whether nothing will come any more, neither from here nor from another worker that ends early."""
        return not self._before and not self._waiting and not self._others

    def next(self) -> Job | None:
        """A trial that ended or waits, one that was left by a worker that is gone, or a new one; None: none now."""
        if self._before:
            return self._before.popleft()
        if not self._waiting and time.monotonic() < self._looks_at:
            return None
        with self._lock.held():
            for _ in range(len(self._waiting)):
                waiting = self._waiting.popleft()
                if self._state(waiting).is_finished():  # another worker took it over
                    continue
                if not waiting.busy:
                    return waiting
                self._waiting.append(waiting)
            others = [trial for trial in self._all(TrialState.RUNNING) if trial.number not in self._trials]
            free = [trial for trial in others if not self._is_busy(trial)]
            old = [trial for trial in free if seconds_since(trial.datetime_start) > TO_CLAIM]
            job = self._taken(old[0]) if old else None if free else self._new()
            if job is None:
                self._others = bool(others)
                self._looks_at = time.monotonic() + LOOK
                for trial in () if others else self._counted():  # those of other workers, to be seen
                    if trial.number not in self._seen:
                        self._bring_in(trial)
            return job

    def again(self, job: Job) -> None:
        """Put a trial back."""
        (self._before if self._state(job).is_finished() else self._waiting).append(job)

    def watch(self, job: Job) -> None:
        """Report the validations of a running trial; give it up where the pruner says so."""
        if self._report(job) and self._trials[_number(job)].should_prune():
            rule = type(self.study.pruner).__name__
            job.state, job.reason = "pruned", f"by the {rule} after {len(job.monitored())} validations"

    def told(self, job: Job) -> None:
        """Tell the study what became of a trial. One that was finished before it could be stopped is finished."""
        self._seen.add(_number(job))
        if self._state(job).is_finished():
            return
        self._report(job)
        if job.finished:
            self._tell(job, job.result())
        elif job.state == "pruned" or job.code == DIVERGED:
            self._tell(job, TrialState.PRUNED)
        else:
            self._tell(job, TrialState.FAIL)

    def _tell(self, job: Job, outcome: float | TrialState) -> None:
        with self._lock.held():
            if self._state(job).is_finished():  # another worker saw the same
                return
            number = _number(job)
            if job.reason:
                self._trials[number].set_user_attr("reason", job.reason)
            finished = not isinstance(outcome, TrialState) and math.isfinite(outcome)
            state = outcome if isinstance(outcome, TrialState) else TrialState.FAIL
            self.study.tell(number, outcome if finished else None, state=None if finished else state)

    def _report(self, job: Job) -> bool:
        """Whether there were validations that the study did not know."""
        if self._state(job).is_finished():
            return False
        reported = self._all()[_number(job)].intermediate_values
        new = [(n, value) for n, (_, value) in enumerate(job.monitored(), start=1) if n not in reported]
        for n, value in new:
            self._trials[_number(job)].report(value, n)
        return bool(new)

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _state(self, job: Job) -> TrialState:
        return self._all()[_number(job)].state

    def _new(self) -> Job | None:
        """A trial of what is not known yet; None where there are enough, or nothing is left."""
        while (waits := bool(self._all(TrialState.WAITING))) or len(self._counted()) < (self.total or 0):
            counted = self._counted()
            if not waits and self.space.is_finite and self._left(counted) is None:
                self._ends("these are all there are")
                break
            trial = self.study.ask()
            job = self._taken(self._all()[trial.number])
            others = (one for one in counted if one.number != trial.number)
            known = next((one for one in others if one.user_attrs.get("run") == str(job.run)), None)
            if known is None:
                self._repeats = 0
                return job
            self._repeats += 1
            trial.set_user_attr("repeats", known.number)
            complete = known.state is TrialState.COMPLETE
            self.study.tell(trial, known.value if complete else None, state=None if complete else TrialState.FAIL)
            del self._trials[trial.number]
            if self.space.is_finite and self._repeats % REPEATS == 0:
                if left := self._left(counted):
                    self.study.enqueue_trial(self._params(left))
            elif self._repeats >= MOST_REPEATS:
                self._ends("the sampler suggests nothing else")
                break
        return None

    def _ends(self, reason: str) -> None:
        self.total = len(self._counted())
        print(f"{self.total} trials: {reason}", flush=True)

    def _counted(self) -> list[FrozenTrial]:
        """The trials that count: each different from the others, and without those that were tried again."""
        trials = self._all()
        again = {trial.user_attrs.get("retries") for trial in trials}
        return [trial for trial in trials if "repeats" not in trial.user_attrs and trial.number not in again]

    def _left(self, counted: Sequence[FrozenTrial]) -> tuple[str, ...] | None:
        """A job of a finite space that was not tried."""
        known = {tuple(trial.user_attrs.get("words", ())) for trial in counted}
        return next((words for words in self.space.every() if words not in known), None)

    def _params(self, words: Sequence[str]) -> dict[str, Any]:
        """What a sampler would have to suggest for these overrides. Raises `LookupError` where it can't."""
        given = Given(words, strict=True)
        if not set(self.space.job(given)) <= set(words):
            raise LookupError(words)
        return given.params

    def _taken(self, frozen: FrozenTrial) -> Job:
        """The job of a trial that is now this worker's; a killed one may have chosen a part of it."""
        trial = self._trials[frozen.number] = Trial(self.study, frozen._trial_id)
        words = self.space.job(trial)
        job = self._jobs[frozen.number] = self._make(words, frozen.number)
        job.trial = frozen.number
        if "run" not in frozen.user_attrs:
            trial.set_user_attr("words", words)
            trial.set_user_attr("run", str(job.run))
        return job

    def _is_busy(self, frozen: FrozenTrial) -> bool:
        """Whether some process works on the trial of another worker."""
        words = frozen.user_attrs.get("words")
        if frozen.number not in self._jobs and words:
            self._jobs[frozen.number] = self._make(words, frozen.number)
        return frozen.number in self._jobs and self._jobs[frozen.number].busy

    def _take_in(self, known: Sequence[Sequence[str]]) -> None:
        """Let a study without trials begin with jobs that are in the space; those that finished are told at once."""
        for words in known if not self._all() else ():
            with suppress(LookupError, ValueError):
                self.study.enqueue_trial(self._params(words), skip_if_exists=True)

    def _bring_back(self, trial: FrozenTrial) -> None:
        """Try a failed trial again; of one that has ended, the run directory is the truth."""
        if trial.state is TrialState.FAIL:
            self.study.enqueue_trial(trial.params, user_attrs={"retries": trial.number})
        else:
            self._bring_in(trial)

    def _bring_in(self, trial: FrozenTrial) -> None:
        """See what became of a trial that has ended elsewhere."""
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            self._seen.add(trial.number)
            job = self._make(trial.user_attrs["words"], trial.number)
            job.trial = trial.number
            if trial.state is TrialState.COMPLETE or job.pruned or job.finished:  # not one that diverged
                self._before.append(job)


def _number(job: Job) -> int:
    assert job.trial is not None
    return job.trial


def _study(
    folder: Path, space: Space, direction: Callable[[], Direction], sampler: BaseSampler, pruner: BasePruner
) -> Study:
    """The study of a folder, made where there is none. What is damaged is kept under another name."""
    file = folder / STUDY
    if not _is_whole(file):
        kept = kept_name(file)
        file.rename(kept)
        print(f"{file} is damaged: kept as {kept.name}, and made again from the runs", flush=True)
    lock: Any = _Lock(file, mends=file)  # of the kind that Optuna asks for, whose type it keeps to itself
    storage = JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
    tools: Any = {"study_name": "sweep", "storage": storage, "sampler": sampler, "pruner": pruner}
    varied = [*space.constants, *(f"{parameter.name}: {parameter}" for parameter in space.parameters)]
    if storage.get_all_studies():
        study = optuna.load_study(**tools)
        same = study.user_attrs.get("space") in (varied, None)
        require(same, "hydra.sweeper.name", folder.name, "is a search of another space; choose another name")
    else:
        study = optuna.create_study(direction=direction(), **tools)
    study.set_user_attr("space", varied)
    return study


def _is_whole(file: Path) -> bool:
    """Whether all lines of a journal can be read, but for a last one that a killed process has begun."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
        return all(isinstance(json.loads(line), dict) for line in lines)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


class _Lock:
    """A lock of the kernel, which a killed process gives back at once.

    mends: a file of lines, of which what a killed process has begun to write is cut off.
    """

    def __init__(self, place: Path, mends: Path | None = None) -> None:
        self._lock, self._mends = RunLock(place), mends

    def acquire(self) -> bool:
        """Wait for the lock."""
        while not self._is_acquired():
            time.sleep(0.005)
        if self._mends is not None and self._mends.exists():
            cut_unfinished_line(self._mends)
        return True

    def _is_acquired(self) -> bool:
        try:
            self._lock.acquire()
        except Busy:
            return False
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the time of a block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


def cut_unfinished_line(file: Path) -> None:
    """Cut off what follows the last newline: others would append to it."""
    with file.open("rb+") as lines:
        if lines.seek(0, os.SEEK_END) == 0:
            return
        lines.seek(-1, os.SEEK_END)
        if lines.read() != b"\n":
            lines.seek(0)
            lines.truncate(lines.read().rfind(b"\n") + 1)


class _Numbered(BaseSampler):
    """A sampler that is made anew for each trial, with a seed of its own, so that no two workers suggest the same.

    Optuna's own continue one stream of random numbers for a process, and begin it again in the next one.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._number, self._sampler = -1, make(seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            digest = hashlib.sha256(f"{self._seed} {trial.number}".encode()).digest()
            self._number, self._sampler = trial.number, self._make(int.from_bytes(digest[:4], "big"))
        return self._sampler

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._of(trial).after_trial(study, trial, state, values)


def sampler_of(name: str, seed: int, space: Space) -> BaseSampler:
    """The sampler of a name. Its options are written out: the defaults of Optuna 4 and 5 differ.

    Raises `OptionError` for another name, and for a space that it cannot sample.
    """
    require(name in SEARCHES, "hydra.sweeper.sampler", name, f"must be one of grid, {', '.join(SEARCHES)}")
    absent = name == "cmaes" and find_spec("cmaes") is None
    require(not absent, "hydra.sweeper.sampler", name, 'needs the package cmaes: pip install ".[search]"')
    numbers = [parameter for parameter in space.blocks[0].parameters if parameter.is_number]
    enough = name != "cmaes" or len(numbers) >= 2
    require(
        enough, "hydra.sweeper.sampler", name, "needs two intervals or ranges without conditions; choose tpe or random"
    )
    # of several parameters together, apart for each set of conditions; trials that run count as bad ones
    tpe: Any = {
        "n_startup_trials": 10,
        "n_ei_candidates": 24,
        "multivariate": True,
        "group": True,
        "constant_liar": True,
    }
    cmaes: Any = {
        "n_startup_trials": 1,
        "consider_pruned_trials": False,
        "use_separable_cma": False,
        "with_margin": True,
    }
    cmaes |= {"popsize": None, "lr_adapt": False, "warn_independent_sampling": False}
    make: dict[str, Callable[[int], BaseSampler]] = {
        "random": lambda seed: RandomSampler(seed=seed),
        "tpe": lambda seed: TPESampler(seed=seed, **tpe),
        "cmaes": lambda seed: CmaEsSampler(seed=seed, independent_sampler=RandomSampler(seed=seed), **cmaes),
    }
    return _Numbered(_without_warnings(make[name]), seed)


def pruner_of(name: str) -> BasePruner:
    """The pruner of a name, its options written out; steps are validations, the first one is 1.

    Raises `OptionError` for another name.
    """
    require(name in PRUNERS, "hydra.sweeper.pruner", name, f"must be one of {', '.join(PRUNERS)}")
    match name:
        case "median":  # worse than half of five finished runs; never at the first validation
            return MedianPruner(n_startup_trials=5, n_warmup_steps=2, interval_steps=1, n_min_trials=1)
        case "hyperband":
            return HyperbandPruner(min_resource=1, max_resource="auto", reduction_factor=3, bootstrap_count=0)
        case "halving":  # of three runs, the best one goes on after 1, 3, 9, … validations
            rule: Any = {"min_resource": 1, "reduction_factor": 3, "min_early_stopping_rate": 0, "bootstrap_count": 0}
            return SuccessiveHalvingPruner(**rule)
    return NopPruner()


def _without_warnings(make: Callable[[int], BaseSampler]) -> Callable[[int], BaseSampler]:
    """Optuna warns of options that may change between versions: these are written out for that."""

    def made(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return make(seed)

    return made


def seconds_since(moment: datetime | None) -> float:
    """Of the local time, as Optuna writes it; infinite where it is unknown."""
    return math.inf if moment is None else (datetime.now() - moment).total_seconds()
