"""Sweeps: jobs from words, the loop with a fake executor, and `train.py -m` as a user runs it."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.sweep import OWN, loop, plain, run
from experiments.sweep.executors import Work
from experiments.sweep.jobs import Job, Jobs, apart, quoted, telling
from experiments.sweep.ledger import Ledger
from experiments.sweep.loop import Grid, Loop, cause
from experiments.sweep.table import Board
from stu.cli.check import Refused, check_call
from stu.cli.composition import composed as compose_with_hydra
from stu.errors import OptionError, require
from stu.files import sealed
from stu.training.lock import RunLock
from tests import runs
from tests.models import composed

TINY = runs.small("task=lds", "trainer.max_steps=4", "log_every=2")


def written(job: Job, value: float = 0.5, **manifest: Any) -> None:
    """The run directory of a finished run."""
    job.run.mkdir(parents=True, exist_ok=True)
    config: Any = OmegaConf.to_container(composed(*job.overrides), resolve=True)
    about = {"id": "first", "starts": [], "monitor": "mse", "mode": "min", "total_steps": 4, "settings": config}
    (job.run / "manifest.json").write_text(sealed(about | manifest))
    summary(job.run, value)


def summary(run: Path, value: float = 0.5) -> None:
    run.mkdir(parents=True, exist_ok=True)
    best = {"metric": "val/mse", "value": value, "epoch": 1.0, "step": 4}
    (run / "summary.json").write_text(sealed({"best": best, "test": {"mse": 1.0}, "baselines": {}, "seconds": 1.0}))


class Fake:
    """An executor whose jobs do what a function says when they are first looked at: it returns the exit code."""

    def __init__(self, act: Callable[[Path, list[str]], int | None], workers: int = 1) -> None:
        self.act, self.workers = act, workers
        self.started: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.stopped: list[str] = []
        self.slots: list[int] = []
        self.closed = False

    def submit(self, work: Work) -> Any:
        self.started.append(list(work.command[2:]))
        self.environments.append(dict(work.environment))
        self.slots.append(work.slot)
        handle = SimpleNamespace(queued=False, ended=None)

        def poll() -> int | None:
            if handle.ended is None:
                with work.log.open("a") as file:
                    handle.ended = self.act(file, list(work.command[2:]))
            return handle.ended

        def stop(code: int = 128 + signal.SIGTERM) -> None:
            self.stopped.append(f"{work.name} {code}")
            self.told_to_stop(work.name)
            handle.ended = code

        return SimpleNamespace(poll=poll, stop=stop, kill=lambda: stop(128 + signal.SIGKILL), queued=False)

    def told_to_stop(self, name: str) -> None:
        """For a test to look at what there is then."""

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a loop over jobs of seeds in `tmp_path`; returns its exit code, its executor and the states in the ledger."""
    monkeypatch.setattr(loop, "POLL", 0.001)
    monkeypatch.setattr(loop, "WATCH", 0.0)
    monkeypatch.setattr(loop, "PUT_OFF", 0.0)

    def run(act: Callable[..., int | None], jobs: Sequence[Job], workers: int = 1, source: Any = None, **policy: Any):
        executor, ledger = Fake(act, workers), Ledger(tmp_path / ".sweeps" / "s")
        board = Board("Sweep s", ledger, len(jobs))
        code = Loop(source or Grid(jobs), executor, ledger, board, **policy).run()
        board.close(code)
        assert executor.closed
        assert not list(tmp_path.rglob("*.claim"))
        lines = ledger.changes.read_text().splitlines() if ledger.changes.exists() else []
        return code, executor, [(json.loads(line)["title"], json.loads(line)["state"]) for line in lines]

    return run


def jobs_in(folder: Path, count: int = 3, **options: Any) -> list[Job]:
    return [
        Job((f"seed={n}",), folder / "lds" / "stu" / f"seed={n}", title=f"seed={n}", **options) for n in range(count)
    ]


def finishes(folder: Path) -> Callable[..., int]:
    """Each job finishes, with its seed as the result."""

    def act(log: Any, words: list[str]) -> int:
        summary(folder / "lds" / "stu" / words[0], float(words[0].partition("=")[2]))
        return 0

    return act


class TestLoop:
    def test_all_finish_and_repeated_none_starts(self, sweep: Any, tmp_path: Path, capsys: Any):
        code, executor, states = sweep(finishes(tmp_path), jobs_in(tmp_path))
        assert code == 0
        assert executor.started == [["seed=0"], ["seed=1"], ["seed=2"]]
        assert states == [(f"seed={n}", state) for n in range(3) for state in ("running", "finished")]
        out = capsys.readouterr().out
        assert [f"job {n + 1} of 3: seed={n}" in out for n in range(3)] == [True] * 3
        assert "Sweep s: 3 finished" in out
        again, executor, _ = sweep(finishes(tmp_path), jobs_in(tmp_path))
        assert (again, executor.started) == (0, [])

    def test_workers_have_slots(self, sweep: Any, tmp_path: Path):
        _, executor, states = sweep(finishes(tmp_path), jobs_in(tmp_path, 4), workers=2)
        assert executor.slots[:2] == [0, 1]
        assert set(executor.slots) == {0, 1}
        assert [state for _, state in states[:2]] == ["running"] * 2

    @pytest.mark.parametrize(("code", "attempts"), [(2, 1), (3, 1), (1, 3), (137, 3)])
    def test_what_may_not_come_again_is_tried_again(
        self, sweep: Any, tmp_path: Path, capsys: Any, code: int, attempts: int
    ):
        def act(log: Any, words: list[str]) -> int:
            log.write(f"Traceback\nerror: no luck with {words[0]}\n")
            return code if words == ["seed=1"] else finishes(tmp_path)(log, words)

        ended, executor, states = sweep(act, jobs_in(tmp_path), retries=2)
        assert ended == 1
        assert executor.started.count(["seed=1"]) == attempts
        assert states[-1] == ("seed=1", "failed") if attempts > 1 else ("seed=2", "finished")
        err = capsys.readouterr().err.splitlines()
        assert err[0] == "error: 1 of 3 jobs of the sweep failed:"
        assert f"  seed=1: {'signal 9' if code == 137 else f'exit code {code}'}: no luck with seed=1 (" in err[1]

    def test_a_crash_that_does_not_come_again_is_no_failure(self, sweep: Any, tmp_path: Path):
        codes = iter([1, 0])

        def act(log: Any, words: list[str]) -> int:
            code = next(codes)
            return code or finishes(tmp_path)(log, words)

        assert sweep(act, jobs_in(tmp_path, 1))[0] == 0

    def test_an_end_without_a_result_is_a_failure(self, sweep: Any, tmp_path: Path):
        code, executor, _ = sweep(lambda log, words: 0, jobs_in(tmp_path, 1), retries=0)
        assert (code, len(executor.started)) == (1, 1)

    def test_the_first_failure_may_stop_the_others(self, sweep: Any, tmp_path: Path):
        def act(log: Any, words: list[str]) -> int | None:
            return 2 if words == ["seed=0"] else None

        code, executor, states = sweep(act, jobs_in(tmp_path), workers=2, on_failure="stop")
        assert code == 1
        assert executor.started == [["seed=0"], ["seed=1"]]
        assert executor.stopped == ["seed=1 143"]
        assert states[-1] == ("seed=1", "stopped")

    @pytest.mark.parametrize(
        ("signals", "ended"),
        [
            ([signal.SIGTERM], 143),
            ([signal.SIGTERM, signal.SIGTERM], 137),
            ([signal.SIGINT, signal.SIGTERM], 137),
            ([signal.SIGHUP, signal.SIGHUP], 143),  # of a terminal that closes
            ([signal.SIGUSR1, signal.SIGTERM], 143),  # of SLURM, a minute later
        ],
    )
    def test_a_signal_is_passed_on_and_a_second_one_may_hurry(
        self, sweep: Any, tmp_path: Path, capsys: Any, signals: list[signal.Signals], ended: int
    ):
        (tmp_path / "lds" / "stu" / "seed=0" / "checkpoints").mkdir(parents=True)

        def act(log: Any, words: list[str]) -> None:
            for number in signals:
                os.kill(os.getpid(), number)

        code, executor, states = sweep(act, jobs_in(tmp_path))
        assert code == 128 + signals[0]
        assert executor.stopped == [f"seed=0 {ended}"]
        out = capsys.readouterr().out
        assert f"stopped: seed=0: {'killed' if ended == 137 else 'saved'}\n" in out
        assert out.count("stopping: 1 of the jobs") == (ended == 143)
        assert states == [("seed=0", "running"), ("seed=0", "stopped")]

    def test_what_another_process_works_on_is_put_off_and_counts_when_it_is_finished(self, sweep: Any, tmp_path: Path):
        first, second, third = jobs_in(tmp_path)
        first.run.parent.mkdir(parents=True)
        lock = FileLock(first.run.parent / ".seed=0.claim")
        lock.acquire()
        assert first.busy
        assert not first.claim()

        def act(log: Any, words: list[str]) -> int:
            if words == ["seed=2"]:  # meanwhile, the other one finishes
                summary(first.run, 7.0)
                lock.release()
            return finishes(tmp_path)(log, words)

        code, executor, _ = sweep(act, [first, second, third])
        assert code == 0
        assert executor.started == [["seed=1"], ["seed=2"]]
        assert (first.state, first.value) == ("finished", 7.0)

    def test_a_job_that_finds_its_run_locked_is_put_off_too(self, sweep: Any, tmp_path: Path):
        codes = iter([75, 75, 75, 0])

        def act(log: Any, words: list[str]) -> int:
            return next(codes) or finishes(tmp_path)(log, words)

        [job] = jobs_in(tmp_path, 1)
        assert sweep(act, [job], retries=0)[0] == 0
        assert job.attempts == 1

    def test_pruned_ones_stay_pruned(self, sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        class Pruning(Grid):
            def watch(self, job: Job) -> None:
                job.state, job.reason = "pruned", "hopeless"

        stopped_when: list[bool] = []

        def stop(self: Any, name: str) -> None:
            stopped_when.append(jobs[0].pruned)

        jobs = jobs_in(tmp_path, 1)
        monkeypatch.setattr(Fake, "told_to_stop", stop, raising=False)
        code, executor, states = sweep(lambda log, words: None, jobs, source=Pruning(jobs))
        assert (code, states[-1]) == (0, ("seed=0", "pruned"))
        assert jobs[0].pruned
        assert stopped_when == [True]  # its process must know that it will not go on
        [again] = jobs_in(tmp_path, 1)
        code, executor, _ = sweep(finishes(tmp_path), [again])
        assert (code, executor.started, again.state) == (0, [], "pruned")
        summary(again.run)  # a command of its own has finished it
        assert again.finished
        assert not again.pruned

    def test_overwriting_deletes_once(self, sweep: Any, tmp_path: Path):
        """Also where the first attempt ends before it has deleted; and never takes the old result for the new one."""
        [job] = jobs_in(tmp_path, 1, replaces="old")
        summary(job.run, 1.0)
        (job.run / "manifest.json").write_text(sealed({"id": "old"}))
        assert not job.finished

        def act(log: Any, words: list[str]) -> int:
            attempt = job.attempts
            if attempt == 2:
                (job.run / "summary.json").unlink()
                (job.run / "manifest.json").write_text(sealed({"id": "new"}))
            if attempt == 3:
                summary(job.run, 2.0)
            return 0 if attempt == 3 else 1

        code, executor, _ = sweep(act, [job], retries=2)
        assert (code, job.value) == (0, 2.0)
        assert executor.started == [["seed=0"], ["seed=0"], ["seed=0", "overwrite=false"]]

    def test_tests_are_always_run_and_shown(self, sweep: Any, tmp_path: Path, capsys: Any):
        jobs = jobs_in(tmp_path, 2, mode="test")
        summary(jobs[0].run)

        def act(log: Any, words: list[str]) -> int:
            log.write(f"result of {words[0]}\n")
            return 0

        code, executor, _ = sweep(act, jobs)
        assert (code, len(executor.started)) == (0, 2)
        assert "result of seed=0\n" in capsys.readouterr().out

    def test_a_claim_that_was_left_behind_is_removed(self, sweep: Any, tmp_path: Path):
        [job] = jobs_in(tmp_path, 1)
        summary(job.run)
        (job.run.parent / ".seed=0.claim").write_text("")
        assert sweep(finishes(tmp_path), [job])[0] == 0  # looks for claims itself

    def test_a_damaged_ledger_changes_nothing(self, sweep: Any, tmp_path: Path):
        sweep(finishes(tmp_path), jobs_in(tmp_path, 2))
        (tmp_path / ".sweeps" / "s" / "jobs.jsonl").unlink()
        (tmp_path / ".sweeps" / "s" / "sweep.yaml").write_text("\0")
        code, executor, _ = sweep(finishes(tmp_path), jobs_in(tmp_path, 3))
        assert (code, executor.started) == (0, [["seed=2"]])

    def test_a_ledger_that_cannot_be_written_ends_nothing(
        self, sweep: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ):
        def full(self: Ledger, job: Job) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Ledger, "write", full)
        assert sweep(finishes(tmp_path), jobs_in(tmp_path))[0] == 0
        [line] = capsys.readouterr().err.splitlines()
        assert "cannot be written to: No space left on device; the sweep goes on" in line

    def test_a_ledger_that_cannot_be_made_is_one_line_and_no_claim_stays(self, sweep: Any, tmp_path: Path):
        (tmp_path / ".sweeps").write_text("")
        [job] = jobs_in(tmp_path, 1)
        with pytest.raises(OptionError, match=r"paths\.runs=.*\.sweeps.*: no job can start: Not a directory"):
            sweep(finishes(tmp_path), [job])
        assert not list(tmp_path.rglob("*.claim"))

    def test_a_run_goes_on_with_the_threads_that_it_began_with(
        self, sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        first, second = jobs_in(tmp_path, 2)
        first.run.mkdir(parents=True)
        (first.run / "manifest.json").write_text(sealed({"id": "x", "starts": [{"threads": 3}, {"threads": 1}]}))
        _, executor, _ = sweep(finishes(tmp_path), [first, second], environment={"STU_SWEEP": "s"})
        assert executor.environments == [{"STU_SWEEP": "s", "OMP_NUM_THREADS": "3"}, {"STU_SWEEP": "s"}]
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # its user says how many
        assert first.environment == {}

    def test_who_works_on_a_run_is_said(self, sweep: Any, tmp_path: Path, capsys: Any):
        [job, other] = jobs_in(tmp_path, 2)
        job.run.parent.mkdir(parents=True)
        lock = RunLock(job.run, "claim")
        lock.acquire()

        def act(log: Any, words: list[str]) -> int:
            lock.release()
            return finishes(tmp_path)(log, words)

        assert sweep(act, [job, other])[0] == 0
        said = f"waiting: seed=0: another process works on it: process {os.getpid()} on "
        assert said in capsys.readouterr().out

    def test_no_claim_is_left_where_there_is_no_room_for_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def full(*arguments: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        [job] = jobs_in(tmp_path, 1)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_text", full)
            with pytest.raises(OptionError, match=r"paths\.runs=.*: must be a folder to write to: No space left"):
                job.claim()
        assert not list(tmp_path.rglob("*.claim"))
        assert job.claim()
        job.release()

    def test_no_folder_is_left_of_what_was_refused(self, sweep: Any, tmp_path: Path):
        sweep(lambda log, words: 2, jobs_in(tmp_path, 2))
        assert [path.name for path in tmp_path.iterdir()] == [".sweeps"]


def test_what_weights_and_biases_writes_is_linked(tmp_path: Path):
    [job] = jobs_in(tmp_path, 1)
    ledger = Ledger(tmp_path / ".sweeps" / "s")

    def linked() -> list[str]:
        ledger.link(job), ledger.link(job)
        links = sorted((tmp_path / ".sweeps" / "s" / "wandb").iterdir())
        assert all(link.is_symlink() and not os.path.isabs(os.readlink(link)) and link.is_dir() for link in links)
        return [link.name for link in links]

    for name, size in (("offline-run-1-a", 8), ("run-2-a", 8), ("offline-run-3-a", 7), ("killed-offline-run-0-a", 8)):
        (job.run / "wandb" / name).mkdir(parents=True)
        (job.run / "wandb" / name / "run-a.wandb").write_bytes(bytes(size))
    ledger.open({"name": "s"})
    assert linked() == ["offline-run-1-a", "run-2-a"]
    (job.run / "wandb" / "offline-run-1-a").rename(job.run / "wandb" / "killed-offline-run-1-a")  # by the next start
    assert linked() == ["run-2-a"]


@pytest.mark.parametrize(
    ("code", "output", "line"),
    [
        (2, "error: first\nerror: seed=x: no\nmore\n", "exit code 2: seed=x: no"),
        (1, "Traceback\n  File\ntorch.OutOfMemoryError: no room\n", "exit code 1: torch.OutOfMemoryError: no room"),
        (1, "only this [bold]\n\n", "exit code 1: only this [bold]"),
        (137, "", "signal 9"),
    ],
)
def test_the_cause_of_a_failure(code: int, output: str, line: str):
    assert cause(code, output) == line


def test_a_grid_refuses_two_jobs_of_one_run(tmp_path: Path):
    one, two = jobs_in(tmp_path, 1), jobs_in(tmp_path, 1)
    with pytest.raises(OptionError, match=r"is the run of two jobs, seed=0 and seed=0"):
        Grid([*one, *two])


def test_several_tests_of_one_run_are_jobs(tmp_path: Path):
    jobs = [Job((f"checkpoint={n}",), tmp_path / "run", mode="test") for n in range(2)]
    assert Grid(jobs).total == 2
    assert len({Ledger(tmp_path).log(job) for job in jobs}) == 2


class TestJobs:
    @pytest.fixture(autouse=True)
    def runs_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STU_RUNS", str(tmp_path))

    def test_a_job_is_the_run_of_the_same_command(self, tmp_path: Path):
        job = Jobs({"seed", "model"}).make(["model=s4", "seed=1", "task=lds"])
        assert job.overrides == ("model=s4", "seed=1", "task=lds")
        assert job.run == tmp_path / "lds" / "s4" / "seed=1"
        assert job.command[1:] == [str(runs.SCRIPT), *job.overrides]
        assert (job.title, job.devices, job.nodes, job.mode) == ("model=s4 seed=1", 1, 1, "train")

    def test_jobs_of_layers_differ_in_what_is_swept(self, tmp_path: Path):
        """Where the layers of a model are lists, an option of theirs is no longer where its word has it."""
        jobs = Jobs({"model.mixer.num_filters", "model.mixers.attention.window"})
        words = ["task=lds", "model=stu", "model.layers=[stu,attention]", "model.mixers.attention.window=6"]
        first, second = (jobs.make([*words, f"model.mixer.num_filters={value}"]) for value in ("5", "x"))
        assert first.run.parent == second.run.parent == tmp_path / "lds" / "stu-stu+attention"
        assert first.run != second.run
        jobs.check([first])
        with pytest.raises(OptionError, match=r"model.mixer\[0\].num_filters=x: must be an integer"):
            jobs.check([second])

    def test_a_long_name_shows_what_is_swept_and_is_handed_on(self, tmp_path: Path):
        job = Jobs({"seed"}).make([*TINY, "model=stu", "seed=1"])
        assert job.run.name.startswith("seed=1,")
        assert job.overrides[-1] == f"name='{job.run.name}'"
        job.run.mkdir(parents=True)
        assert Jobs({"log_every"}).make([*TINY, "model=stu", "seed=1"]).run == job.run

    @pytest.mark.parametrize(
        ("words", "run"),
        [
            (("name=run-${seed}",), "runs/lds/stu/run-1"),
            (("name=run-${seed}-${trainer.max_steps}", "trainer.max_steps=7"), "runs/lds/stu/run-1-7"),
            (("name=run-${hydra:job.num}",), "runs/lds/stu/run-1"),
            (("name=run-${hydra:runtime.choices.task}-${seed}",), "runs/lds/stu/run-lds-1"),
            (("paths.runs=${oc.env:STU_RUNS}/of-${seed}", "name=x"), "runs/of-1/lds/stu/x"),
        ],
    )
    def test_places_that_depend_on_other_keys(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], run: str
    ):
        monkeypatch.setenv("STU_RUNS", str(tmp_path / "runs"))
        jobs = Jobs({"seed"})
        first, second = (jobs.make(["task=lds", f"seed={n}", *words]) for n in range(2))
        assert second.run == tmp_path / run
        assert first.run != second.run
        for job in (first, second):
            config = composed(*job.overrides)
            place = Path(os.path.abspath(config.paths.runs), "lds", "stu", str(config.name))
            assert place == job.run

    def test_few_are_composed(self, monkeypatch: pytest.MonkeyPatch):
        from experiments.sweep import jobs as module

        calls: list[Any] = []
        compose = module.composed
        monkeypatch.setattr(module, "composed", lambda *a, **k: (calls.append(a), compose(*a, **k))[1])
        jobs = Jobs({"model", "seed", "trainer.max_steps"})
        made = [
            jobs.make([f"model={model}", f"seed={seed}", f"trainer.max_steps={steps}", "task=lds"])
            for model in ("s4", "stu") for seed in range(3) for steps in (1, 2)
        ]  # fmt: skip
        assert len(calls) == 2
        assert len({job.run for job in made}) == 12

    def test_devices(self):
        job = Jobs({"seed"}).make(["task=lds", "seed=0", "trainer=ddp", "trainer.devices=4", "+trainer.num_nodes=2"])
        assert (job.devices, job.nodes) == (4, 2)
        assert Jobs({"seed"}).make(["task=lds", "seed=0", "trainer=ddp"]).devices == 1

    def test_a_run_of_other_settings_is_not_taken_for_finished(self):
        jobs = Jobs({"seed"})
        words = ["task=lds", "seed=0", "name=run"]
        written(jobs.make(words))
        assert jobs.make(words).finished
        assert jobs.make([*words, "logger=csv"]).finished
        assert not jobs.make([*words, "log_every=3"]).finished

    def test_overwriting_asks_for_another_run(self):
        jobs = Jobs({"seed"})
        written(jobs.make(["task=lds", "seed=0"]))
        job = jobs.make(["task=lds", "seed=0", "overwrite=true"])
        assert job.replaces == "first"
        assert not job.finished
        assert jobs.make(["task=lds", "seed=1", "overwrite=true"]).replaces == ""

    def test_each_swept_value_is_checked(self):
        jobs = Jobs({"seed", "log_every"})
        jobs.check([jobs.make(["task=lds", "seed=0", "log_every=1"])])
        with pytest.raises(Refused, match="log_every"):
            jobs.check([jobs.make(["task=lds", "seed=0", "log_every=x"])])

    def test_rows_are_read_as_they_come(self, tmp_path: Path):
        job = Jobs({"seed"}).make(["task=lds", "seed=0"])
        assert (job.rows, job.monitored()) == ([], [])
        written(job)
        file = job.run / "metrics.csv"
        file.write_text("step,epoch,metric,value\n2,0.5,val/mse,0.25\n2,0.5,val/loss,3\n4,1.0,val/m")
        assert job.monitored() == [(2, 0.25)]
        with file.open("a") as more:
            more.write("se,0.125\n")
        assert job.monitored() == [(2, 0.25), (4, 0.125)]
        other = file.with_suffix(".new")
        other.write_text("step,epoch,metric,value\n2,0.5,val/mse,0.5\n" + "2,0.5,val/loss,3\n" * 9)
        other.replace(file)  # a run that goes on from an earlier checkpoint
        assert job.monitored() == [(2, 0.5)]


def refuse() -> None:
    try:
        require(False, "key", 1, "no")
    except OptionError as error:
        raise ValueError("outer") from error


def test_what_is_asked_apart_is_answered_and_leaves_nothing_behind():
    def answer() -> int:
        os.environ["LEFT"] = "behind"
        return os.getpid()

    assert apart(answer) != os.getpid()
    assert "LEFT" not in os.environ
    with pytest.raises(ValueError, match="outer") as raised:
        apart(refuse)
    assert isinstance(raised.value.__cause__, OptionError)
    with pytest.raises(MemoryError):
        apart(lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("text", ["seed=1,a=2", "it's", "back\\slash's", "a b"])
def test_a_quoted_text_is_itself(text: str):
    assert OverridesParser.create().parse_override(f"name={quoted(text)}").value() == text


def test_settings_that_tell():
    assert telling({"seed": 1, "name": "x", "paths": {"runs": "y"}, "a": {"b": []}, "c": {}}) == {
        "seed": 1, "a.b": [], "c": {}
    }  # fmt: skip


def test_a_search_without_optuna_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STU_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(sys.modules, "experiments.sweep.search", None)
    config = compose_with_hydra(TINY, with_hydra=True)
    with pytest.raises(OptionError, match=r'sampler=tpe: needs Optuna.*pip install "\.\[search\]"'):
        run(config, [*TINY, "seed=0,1"], sampler="tpe", trials=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("hydra.launcher.grace=abc", "hydra.launcher.grace=abc: must be a number or null"),
        ("hydra.launcher.gpus=0", "hydra.launcher.gpus=0: must be a list"),
        ("+hydra.launcher.worker=2", "hydra.launcher.worker=2: no such key; did you mean workers"),
        ("hydra.launcher=5", "hydra.launcher=5: is no launcher"),
    ],
)
def test_a_wrong_launcher_is_refused(tmp_path: Path, word: str, line: str):
    config = compose_with_hydra([*TINY, word], with_hydra=True)
    with pytest.raises(OptionError, match=re.escape(line)):
        run(config, [*TINY, "seed=0,1"])


@pytest.mark.parametrize(
    "words",
    [
        ["hydra/launcher=local", "hydra.launcher.gpus=[0,GPU-1]", "hydra.launcher.grace=null"],
        ["hydra/launcher=slurm", "hydra.launcher.additional={mail-type: FAIL}", "hydra.launcher.setup=[module load x]"],
        ["hydra/launcher=ray", "hydra.launcher.options={resources: {fast: 1}}"],
    ],
)
def test_options_of_launchers_can_be_given(words: list[str]):
    check_call("hydra.launcher", plain(compose_with_hydra(words, with_hydra=True).hydra.launcher))


def test_words_for_the_sweep_alone():
    assert all(word.startswith(OWN) for word in ("hydra.sweeper.retries=2", "hydra/launcher=ray", "hydra.sweep.dir=x"))
    assert not "hydra.verbose=true".startswith(OWN)


class TestBoard:
    def board(self, total: int | None = 3) -> Board:
        return Board("Sweep [x]", Ledger(Path("/nowhere")), total)

    def test_its_table_has_what_runs_and_no_markup(self, tmp_path: Path):
        [job] = jobs_in(tmp_path, 1)
        summary(job.run)
        (job.run / "manifest.json").write_text(sealed({"monitor": "mse", "total_steps": 8}))
        (job.run / "metrics.csv").write_text("step,epoch,metric,value\n4,1,val/mse,0.25\n")
        job.title, job.state, job.seconds = "name=[red]", "running", 61.0
        board = self.board()
        board.jobs[str(job.run)] = job
        with board.console.capture() as captured:
            board.console.print(board.table([job]))
        shown = captured.get()
        assert "Sweep [x]: 1 running, 2 waiting" in shown
        [row] = [line.split() for line in shown.splitlines() if "red" in line]
        assert row == ["name=[red]", "step", "4/8", "val/mse", "0.25", "0:01:01"]

    def test_what_is_known_last_of_a_run_counts(self, tmp_path: Path):
        """Another worker has done what this one has put off."""
        board = self.board(1)
        for state in ("waiting", "finished"):
            [job] = jobs_in(tmp_path, 1)
            job.state = state
            board.changed(job)
        assert board.counts() == "1 finished"

    def test_it_is_no_longer_than_the_screen(self, tmp_path: Path):
        board = self.board(1000)
        jobs = jobs_in(tmp_path, 1000)
        for width in (100, 30):
            board.console.size = (width, 20)
            with board.console.capture() as captured:
                board.console.print(board.table(jobs))
            lines = captured.get().splitlines()
            assert len(lines) <= 20
            assert all(len(line) <= width for line in lines)
            assert lines[3].startswith("seed")
            assert lines[4].startswith("seed")

    def test_the_best_of_each_task_is_named(self, tmp_path: Path, capsys: Any):
        board = self.board()
        for job, value, mode in zip(jobs_in(tmp_path), (0.5, 0.25, float("nan")), ("max",) * 3, strict=True):
            job.run.mkdir(parents=True)
            (job.run / "manifest.json").write_text(sealed({"monitor": "accuracy", "mode": mode}))
            job.state, job.value = "finished", value
            board.changed(job)
        board.close(0)
        out = capsys.readouterr().out
        assert f"best: seed=0: val/accuracy 0.5, {tmp_path}/lds/stu/seed=0" in out
        assert [line.split()[0] for line in out.splitlines() if line.startswith("seed")] == [
            "seed=0", "seed=1", "seed=2"
        ]  # fmt: skip


def ledger_of(home: Path) -> Path:
    [folder] = (home / "runs" / ".sweeps").iterdir()
    return folder


def processor_seconds() -> float:
    """Of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.e2e
def test_a_hundred_finished_jobs_are_repeated_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without PyTorch and Lightning, and with nothing written."""
    monkeypatch.setenv("STU_RUNS", str(tmp_path / "runs"))
    jobs = Jobs({"seed"})
    settings: Any = OmegaConf.to_container(composed(*TINY), resolve=True)
    for seed in range(100):
        job = jobs.make([*TINY, f"seed={seed}"])
        summary(job.run, seed)
        about = {"id": "x", "starts": [], "monitor": "mse", "mode": "min", "settings": settings | {"seed": seed}}
        (job.run / "manifest.json").write_text(sealed(about))
    before = sorted(path for path in tmp_path.rglob("*"))
    slow = "raise ImportError\n"
    for name in ("torch", "lightning"):
        (tmp_path / "slow" / name).mkdir(parents=True)
        (tmp_path / "slow" / name / "__init__.py").write_text(slow)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "slow")}
    command = [sys.executable, str(runs.SCRIPT), "-m", *TINY, "seed=range(100)"]
    used = processor_seconds()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert processor_seconds() - used < 4  # on a core that does nothing else: 1.5
    assert "100 finished" in done.stdout
    assert len(done.stdout.splitlines()) < 30
    assert [path for path in sorted(tmp_path.rglob("*")) if "slow" not in path.parts] == before


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("sed=0,1",), "sed=0,1: no such key; did you mean seed?"),
        (("seed=interval(0,1)",), "is an interval: choose hydra.sweeper.sampler="),
        (("seed=0,1", "name=x"), "is the run of two jobs, seed=0 and seed=1"),
        (("seed=0,1", "hydra.sweeper.retries=-1"), "hydra.sweeper.retries=-1: must be a whole number"),
        (("seed=0,1", "hydra.sweeper.on_failure=no"), "hydra.sweeper.on_failure=no: choose one of continue, stop"),
        (("seed=0,1", "hydra/launcher=basic"), "hydra/launcher=basic: is driven by Hydra's own sweepers"),
        (
            ("seed=0,1", "hydra/sweeper=basic", "hydra/launcher=local"),
            "hydra/launcher=local: is of hydra/sweeper=fresh",
        ),
        (("seed=0,1", "paths.runs=/proc/nope"), "paths.runs=/proc/nope/lds/"),
        (("log_every=1,x",), "log_every=x: must be an integer"),
        (("seed=0,1", "hydra.sweeper.name=a/b"), "must be a plain folder name"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_starts(tmp_path: Path, words: tuple[str, ...], line: str):
    done = runs.train(tmp_path, "-m", *TINY, *words)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1
    assert line in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.thorough
@pytest.mark.e2e
def test_a_failure_is_reported_at_once_and_ends_nothing_else(tmp_path: Path):
    words = [*runs.small("task=lds", "model=lru", "trainer.max_steps=4"), "optimizer.warmup=0"]
    words += ["optimizer.lr=1e30,1e-3"]
    done = runs.train(tmp_path, "-m", *words)
    assert done.code == 1
    first, second = (line for line in done.out.splitlines() if "optimizer.lr=1e+30" in line)
    assert first == "job 1 of 2: optimizer.lr=1e+30"
    assert second.startswith("failed: optimizer.lr=1e+30: exit code 3: the ")
    assert done.out.index(second) < done.out.index("job 2 of 2: optimizer.lr=0.001")
    assert done.err.splitlines()[0] == "error: 1 of 2 jobs of the sweep failed:"
    ledger = ledger_of(tmp_path)
    assert ledger.name.startswith("lds-lru-")
    states = [json.loads(line)["state"] for line in (ledger / "jobs.jsonl").read_text().splitlines()]
    assert states == ["running", "failed", "running", "finished"]
    assert len(list((ledger / "logs").iterdir())) == 2
    assert yaml.safe_load((ledger / "sweep.yaml").read_text())["swept"] == {"optimizer.lr": "1e+30,0.001"}
    [finished] = (tmp_path / "runs").rglob("summary.json")
    assert finished.parent.name.startswith("optimizer.lr=0.001")


@pytest.mark.thorough
@pytest.mark.e2e
def test_killed_and_repeated_by_two_it_finishes_once(tmp_path: Path):
    """kill -9 of the sweep: its job saves and ends; two commands then share what is left."""
    words = [*runs.small("task=lds", "model=lru", "log_every=1", "trainer.max_epochs=20"), "seed=0,1"]
    command = [sys.executable, str(runs.SCRIPT), "-m", *words]
    environment = {"PATH": os.environ["PATH"], "STU_RUNS": str(tmp_path / "runs"), "STU_DATA": str(tmp_path / "data")}
    environment |= runs.ENVIRONMENT | {"HOME": str(tmp_path)}
    with (tmp_path / "out").open("w") as out:
        options: dict[str, Any] = {"env": environment, "cwd": tmp_path, "stdout": out, "stderr": out}
        started = [subprocess.Popen(command, **options)]
        try:
            until(
                lambda: any(len(file.read_text().splitlines()) > 20 for file in tmp_path.rglob("metrics.csv")), *started
            )
            started[0].kill()
            started += [subprocess.Popen(command, **options) for _ in range(2)]
            codes = [process.wait(300) for process in started[1:]]
        finally:
            for process in started:  # with their jobs
                process.kill()
                process.wait()
    printed = (tmp_path / "out").read_text()
    assert codes == [0, 0], printed
    manifests = [json.loads(file.read_text()) for file in (tmp_path / "runs").rglob("manifest.json")]
    starts = sorted((manifest["starts"] for manifest in manifests), key=len)
    assert [len(each) for each in starts] == [1, 2]
    assert "stopped" in starts[1][0]  # it has saved
    assert starts[1][1]["resumed"]
    assert len(list((tmp_path / "runs").rglob("summary.json"))) == 2
    assert not list((tmp_path / "runs").rglob(".*.claim"))
    assert printed.count("2 finished") == 2


def until(condition: Callable[[], bool], process: "subprocess.Popen[Any]", seconds: float = 240) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.e2e
def test_each_job_starts_processes_of_its_own(tmp_path: Path):
    words = [word for word in runs.small("task=lds", "model=lru", "trainer.max_steps=2") if word != "trainer=cpu"]
    words += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = runs.train(tmp_path, "-m", *words)
    assert done.code == 0, done.out + done.err
    assert len(list((tmp_path / "runs").rglob("summary.json"))) == 1
    [log] = (ledger_of(tmp_path) / "logs").iterdir()
    assert "unrecognized" not in log.read_text()
    assert log.read_text().count("Result") == 1
