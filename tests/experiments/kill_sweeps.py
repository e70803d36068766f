"""Sweeps are killed at random moments and repeated: python -m tests.experiments.kill_sweeps FOLDER --times 10.

What counts is what a user sees in the end: the same command, repeated, has every job finished once, with the results,
to the last bit, of a sweep that nothing happened to. --search does so to two workers of one search with pruning: every
trial of the study is in it once, with the value of its run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from stu.training import Run
from tests import runs

Victim = Literal["sweep", "job", "all"]
SIZES = (
    *("task.data.train=64", "task.data.val=16", "task.data.test=16", "task.seq_len=64", "loader.batch_size=8"),
    *("model.d_model=8", "model.depth=1", "trainer=cpu", "trainer.max_epochs=null", "trainer.max_steps=400"),
    *("trainer.val_check_interval=50", "log_every=10", "checkpoints.every_n_steps=10"),
    *("logger=csv", "figures.when=never", "hydra.sweeper.retries=20"),
)
GRID = ("task=lds", "model=stu,lru,gru", "seed=range(4)")
SEARCH = (
    *("task=lds", "model=lru", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.mixer.d_state=choice(4,8,16)"),
    *("hydra.sweeper.sampler=tpe", "hydra.sweeper.pruner=median"),
)


class Sweep:
    """`python train.py -m …` in a folder of its own, by several workers at once."""

    def __init__(self, home: Path, *overrides: str, slots: int = 2) -> None:
        self.home, self.overrides = home, ("-m", *overrides, *SIZES, f"hydra.launcher.workers={slots}")
        self.workers: list[subprocess.Popen[bytes]] = []
        home.mkdir(parents=True, exist_ok=True)

    def start(self, workers: int) -> None:
        """Until as many workers are there."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "STU_RUNS": "runs", "STU_DATA": "data"}
        while len(self.workers) < workers:
            with (self.home / "output.txt").open("ab") as output:
                command = [sys.executable, str(runs.SCRIPT), *self.overrides]
                self.workers.append(
                    subprocess.Popen(command, cwd=self.home, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )

    def wait(self, timeout: float = 1200) -> list[int]:
        """The exit codes of all workers."""
        return [worker.wait(timeout) for worker in self.workers]

    def kill(self, victim: Victim, number: int, chance: random.Random) -> None:
        """Send a signal to a worker, to a job, or to all of them."""
        jobs, workers = list(self.jobs()), [worker.pid for worker in self.workers if worker.poll() is None]
        candidates = {"sweep": workers, "job": jobs, "all": [*workers, *jobs]}[victim]
        for pid in candidates if victim == "all" else chance.sample(candidates, min(1, len(candidates))):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def jobs(self) -> Iterator[int]:
        """The processes of train.py that work in this folder and are no workers, also those that lost their sweep."""
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                here = os.path.samefile(folder / "cwd", self.home)
            except OSError:  # no process, or one that has ended
                continue
            if here and os.fsencode(runs.SCRIPT) in words and b"-m" not in words:
                yield int(folder.name)

    def finished(self) -> dict[str, Run]:
        """The finished runs, by their place."""
        found = sorted((self.home / "runs").glob("*/*/*/summary.json"))
        return {str(file.parent.relative_to(self.home)): Run(file.parent) for file in found}

    def faults(self) -> list[str]:
        """What is left behind that nobody needs, and jobs that were run again after they had finished."""
        left = [str(file) for file in (self.home / "runs").glob("*/*/.*") if file.suffix in (".lock", ".claim")]
        faults = [f"left: {', '.join(left)}"] if left else []
        faults += [f"process {pid} still runs" for pid in self.jobs()]
        lines = [line for file in (self.home / "runs/.sweeps").glob("*/jobs.jsonl") for line in entries(file)]
        counted = Counter(line["run"] for line in lines if line["state"] == "finished" and line["attempt"])
        return faults + [f"{run} was finished {times} times" for run, times in counted.items() if times > 1]


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger, but for one that was cut off."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def disturb(sweep: Sweep, workers: int, times: int, seconds: tuple[float, float], seed: int) -> list[list[int]]:
    """Kill `times` times, repeat at once what was killed, and go on until nothing is left; the exit codes of the end.

    Of the last start: one that was only killed, not beaten by its own jobs, is repeated by its user.
    """
    chance = random.Random(seed)
    for number in range(times):
        sweep.start(workers)
        time.sleep(chance.uniform(*seconds))
        victim: Victim = chance.choice(("sweep", "job", "all"))
        sent = chance.choice((signal.SIGTERM, signal.SIGKILL))
        sweep.kill(victim, sent, chance)
        print(f"{number + 1:3} of {times}: {sent.name} to {victim}; {len(sweep.finished())} finished", flush=True)
        if victim != "job" and sent == signal.SIGTERM and chance.random() < 0.5:
            sweep.wait()  # a patient user; the others repeat the command while the first still saves
    codes = []
    for _ in range(5):
        sweep.start(workers)
        codes.append(sweep.wait())
        if codes[-1] == [0] * workers:
            break
    return codes


def check_grid(home: Path, times: int, seed: int, grid: Sequence[str] = GRID) -> list[str]:
    """The faults of a disturbed grid."""
    quiet, killed = Sweep(home / "quiet", *grid), Sweep(home / "killed", *grid)
    quiet.start(1)
    faults = [f"the undisturbed sweep ended with {code}" for code in quiet.wait() if code]
    codes = disturb(killed, 1, times, (3.0, 25.0), seed)
    faults += [] if codes[-1] == [0] else [f"the repeated sweep ended with {codes}"]
    expected, actual = quiet.finished(), killed.finished()
    faults += [f"lost: {name}" for name in expected.keys() - actual.keys()]
    faults += [f"more: {name}" for name in actual.keys() - expected.keys()]
    for name in expected.keys() & actual.keys():
        try:
            runs.assert_identical(runs.results(actual[name]), runs.results(expected[name]))
        except AssertionError as error:
            faults.append(f"{name} differs: {' '.join(str(error).split())[:200]}")
    return faults + killed.faults()


def check_search(home: Path, times: int, seed: int, trials: int) -> list[str]:
    """The faults of a disturbed search by two workers."""
    from optuna import load_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    sweep = Sweep(home / "search", *SEARCH, f"hydra.sweeper.trials={trials}", slots=1)
    codes = disturb(sweep, 2, times, (1.0, 12.0), seed)
    faults = [] if codes[-1] == [0, 0] else [f"the repeated search ended with {codes}"]
    [file] = (sweep.home / "runs/.sweeps").glob("*/optuna.jsonl")
    study = load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(file))))
    states = Counter(trial.state.name for trial in study.trials)
    print(f"trials: {dict(states)}", flush=True)
    faults += [] if len(study.trials) == trials else [f"{len(study.trials)} trials, not {trials}"]
    faults += [] if states.keys() <= {"COMPLETE", "PRUNED"} else [f"trials are {dict(states)}"]
    values = {name: run.read_summary()["best"]["value"] for name, run in sweep.finished().items()}
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    faults += [f"trial {t.number} has a value of no run" for t in complete if t.value not in values.values()]
    told = {trial.value for trial in complete}
    faults += [f"{name} is in no trial" for name, value in values.items() if value not in told]
    directories = [path for path in (sweep.home / "runs/lds/lru").iterdir() if path.name[0] != "."]
    proposed = {json.dumps(trial.params, sort_keys=True) for trial in study.trials}
    faults += [] if len(directories) == len(proposed) else [f"{len(directories)} runs of {len(proposed)} proposals"]
    return faults + sweep.faults()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.kill_sweeps", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the runs; must not exist")
    parser.add_argument("--times", type=int, default=10, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--search", type=int, default=0, metavar="TRIALS", help="two workers search, with pruning")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    if options.search:
        faults = check_search(options.folder, options.times, options.seed, options.search)
    else:
        faults = check_grid(options.folder, options.times, options.seed)
    for fault in faults:
        print(f"fault: {fault}")
    print(f"{len(faults)} faults after {options.times} kills")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
