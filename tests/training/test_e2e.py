"""Everything as a user does it: train, stop, kill, resume, test, sweep, two devices."""

import functools
import json
import math
import re
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.testing import assert_close

from data.systems.lds import LDS
from stu import training
from stu.training import Run
from stu.training.loggers import read_metrics
from tests import runs, sources
from tests.models import TASKS
from tests.training.devices import on_two_nodes

pytestmark = pytest.mark.e2e

MODULE = "stu.training.module:SequenceModule."
SAVE = "lightning.pytorch.trainer.trainer:Trainer.save_checkpoint"
TRANSFORMERS = (("lra_listops", "transformer"), ("lds", "transformer"))
RATES = ("time/tokens_per_second", "memory/peak_bytes")
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def returned() -> None:
    """Show what the job returns to Hydra and its sweepers."""
    from hydra._internal.hydra import Hydra

    run = Hydra.run

    @functools.wraps(run)
    def shown(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        print("returned", repr(result.return_value))
        return result

    Hydra.run = shown  # type: ignore[method-assign]


def slow_around_training() -> None:
    """Preparing data, a logger's start, its end and the test take ten seconds each, by the clock of the run."""
    ahead, monotonic = [0.0], time.monotonic
    time.monotonic = lambda: monotonic() + ahead[0]

    def late(cls: type, name: str) -> None:
        method = getattr(cls, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            ahead[0] += 10.0
            return method(*args, **kwargs)

        setattr(cls, name, slow)

    for cls, name in ((training.WandbLog, "start"), (LDS, "prepare"), (L.Trainer, "test"), (L.Trainer, "validate")):
        late(cls, name)


def test_seconds_are_those_of_training(home: Path):
    """Also of a run that ends before the first row of its log, which alone says how fast it was."""
    command = runs.small("task=lds", "model=stu", "name=slow", "log_every=7", "trainer.max_steps=6")
    done = runs.train(home, *command, at=slow_around_training)
    assert (done.code, done.err) == (0, "")
    summary = runs.run_of(home, "lds", "stu", "slow").read_summary()
    assert 0 < summary["seconds"] < 10
    assert summary.keys() & {"tokens_per_second", "peak_memory"} == {"peak_memory"}
    assert "tokens/s" not in done.out


def unfolded(text: str) -> str:
    """Without white space, for tables fold long lines."""
    return "".join(text.split())


# Tokens and reals, of one length and padded; one label and one for every step; built, fetched and made on demand.
SHOWN = ("cifar_color", "double_pendulum", "language", "lds", "lra_listops", "lra_retrieval", "mqar", "own")


def _mark(task: str, model: str) -> Any:
    """Of the run of a pair: quick, slow, or thorough."""
    if (task, model) == ("lds", "stu"):
        return ()
    return pytest.mark.slow if task in SHOWN else pytest.mark.thorough


class TestARun:
    """From nothing to the table at its end."""

    @staticmethod
    def command(run: Run) -> list[str]:
        task, model, name = run.path.parts[-3:]
        source = sources.overrides(task, run.path.parents[3])
        return runs.small(f"task={task}", f"model={model}", f"name={name}", "log_every=3", *source)

    @pytest.fixture(
        scope="class",
        params=[
            pytest.param(pair, marks=_mark(*pair), id=str(pair))
            for pair in (*((task, "stu") for task in TASKS), *TRANSFORMERS)
        ],
    )
    @classmethod
    def run(cls, request: pytest.FixtureRequest, home: Path) -> tuple[Run, runs.Finished]:
        task, model = request.param
        of = runs.run_of(home, task, model, "whole")
        command = cls.command(of)
        if request.param == ("lra_listops", "stu"):
            done = runs.train_in_subprocess(home, *command)  # with nothing prepared
        else:
            done = runs.train(home, *command, at=returned)
        assert done.code == 0, done.err
        return of, done

    def test_the_summary(self, run: tuple[Run, runs.Finished]):
        of, _ = run
        summary = of.read_summary()
        told = {"trivial"} & summary.keys()  # where the task says which baselines are
        assert summary.keys() == {"test", "best", "baselines", "steps", "parameters", *runs.MEASURED, *told}
        assert set(summary.get("trivial", summary["baselines"])) <= summary["baselines"].keys()
        assert summary["steps"] == 20
        assert 0 < summary["seconds"] < 60
        rows = {name: [row[3] for row in read_metrics(of.metrics) if row[2] == name] for name in RATES}
        assert summary["tokens_per_second"] == round(statistics.median(rows["time/tokens_per_second"])) > 0
        assert 2**20 < max(rows["memory/peak_bytes"]) <= summary["peak_memory"] < 2**40
        assert summary["parameters"] == json.loads(of.manifest.read_text())["parameters"] > 0
        best = summary["best"]
        monitor = best["metric"].removeprefix("val/")
        assert {"loss", monitor} <= best["val"].keys() <= summary["test"].keys()
        assert all(name.startswith("rollout_") for name in summary["test"].keys() - best["val"].keys())
        assert all(
            map(math.isfinite, [*summary["test"].values(), *best["val"].values(), *summary["baselines"].values()])
        )
        assert summary["baselines"]
        assert best["val"][monitor] == pytest.approx(best["value"], rel=1e-6)
        assert best["epoch"] == best["step"] / 10

    def test_the_checkpoints(self, run: tuple[Run, runs.Finished]):
        of, _ = run
        best, last = (torch.load(path, weights_only=True) for path in (of.best, of.last))
        assert best["global_step"] == of.read_summary()["best"]["step"]
        assert last["global_step"] == of.last_step == 20
        assert sorted(path.name for path in of.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
        assert best["state_dict"].keys() == last["state_dict"].keys()

    def test_the_metrics(self, run: tuple[Run, runs.Finished]):
        of, _ = run
        summary, rows = of.read_summary(), read_metrics(of.metrics)
        measured = summary["best"]["val"].keys()  # rollouts are made in the test alone
        training = {f"train/{name}" for name in measured}
        training |= {"gradient_norm", "time/sequences_per_second", "time/data_share", *RATES, "lr/default"}
        steps: dict[str, list[int]] = {}
        for step, epoch, name, value in rows:
            assert epoch == step / 10
            assert math.isfinite(value)
            steps.setdefault(name, []).append(step)
        assert {name for name, at in steps.items() if at == [3, 6, 9, 12, 15, 18]} == training
        assert {name for name, at in steps.items() if at == [10, 20]} == {f"val/{name}" for name in measured}
        monitor = summary["best"]["metric"]
        assert {name for name, at in steps.items() if at == [20]} == {
            f"best/{monitor}",
            *(f"test/{n}" for n in summary["test"]),
        }
        assert sum(map(len, steps.values())) == len(rows)
        values = {(step, name): value for step, _, name, value in rows}
        assert {name: values[20, f"test/{name}"] for name in summary["test"]} == summary["test"]
        assert summary["best"]["value"] == values[summary["best"]["step"], monitor] == values[20, f"best/{monitor}"]
        choose = min if monitor in ("val/mse", "val/loss", "val/bits_per_byte") else max
        assert summary["best"]["value"] == choose(values[10, monitor], values[20, monitor])

    def test_what_is_shown(self, run: tuple[Run, runs.Finished]):
        of, done = run
        progress = re.compile(r".+: [\d,]+ of [\d,]+")  # of building data, where that takes long
        taken_for = re.compile(r"note: .+: inputs are .+; predicted is .+ sequences")  # of a user's table
        said = [line for line in done.err.splitlines() if not taken_for.fullmatch(line)]
        assert [line for line in said if not progress.fullmatch(line)] == []
        summary = of.read_summary()
        start, _, result = done.out.partition("Result")
        for name, value in summary["test"].items():
            assert f"test {name} {value:.4g}" in " ".join(result.split())
        for name, value in summary["baselines"].items():
            assert f"{name} {value:.4g}" in " ".join(result.split())
        assert unfolded(str(of.path)) in unfolded(start)
        assert unfolded(str(of.path)) in unfolded(result)
        assert "mode=test tests again" in " ".join(result.split())
        assert f"{summary['parameters']:,}" in start
        assert "group default" in start
        assert "step 10/20" in start
        assert "step 20/20" in start

    def test_what_is_returned_is_the_validation_value(self, run: tuple[Run, runs.Finished], home: Path):
        """No sweeper can select on the test set."""
        of, done = run
        if "returned" not in done.out:  # started from outside; a finished run returns the same
            done = runs.train(home, *self.command(of), at=returned)
        assert float(done.out.split("returned ")[1]) == of.read_summary()["best"]["value"]

    def test_testing_again_gives_the_same_and_writes_nothing(self, run: tuple[Run, runs.Finished], home: Path):
        of, _ = run
        before = {path: path.read_bytes() for path in of.path.rglob("*") if path.is_file()}
        done = runs.train(home, *self.command(of), "mode=test", "seed=5", "checkpoint=")
        assert (done.code, done.err) == (0, "")
        for name, value in of.read_summary()["test"].items():
            assert f"test {name} {value:.4g}" in " ".join(done.out.split())
        assert {path: path.read_bytes() for path in of.path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_in_one_line(home: Path):
    command = runs.small("task=lds", "model=stu", "trainer.max_steps=1", "name=small")
    assert runs.train(home, *command).code == 0
    checkpoint = runs.run_of(home, "lds", "stu", "small").last
    named = ("mode=test", f"checkpoint={checkpoint}")
    assert runs.train(home, *command, *named).code == 0
    done = runs.train(home, *command, *named, "model.d_model=6")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert f"checkpoint={checkpoint}: belongs to another model or task" in done.err


# A stop is a signal that the process sends itself before some call: 1, 2, … of a method.
# Twenty steps; a row of the log every third; checkpoints at every fourth and after the validations at 10 and 20, each
# of three batches. The sanity check before training takes one validation step.
PLAIN = ("model=stu", "task=lds", "model.dropout=0.1", "log_every=3", "checkpoints.every_n_steps=4")
TWICE = (*PLAIN, "trainer.accumulate_grad_batches=2")
OTHER = (
    "model=transformer", "task=lra_listops", "model.dropout=0.1", "log_every=3", "checkpoints.every_n_steps=4",
    "loader.num_workers=1", "loader.bucket=4", "model.mixer.dropout=0.1",
)  # fmt: skip

Stop = tuple[signal.Signals, str, int]


@pytest.fixture(scope="module")
def uninterrupted(home: Path) -> Any:
    """The results of a command that nobody stops."""

    @functools.cache
    def results(command: tuple[str, ...]) -> dict[str, Any]:
        name = f"whole{len(list(home.glob('runs/*/*/whole?')))}"
        done = runs.train(home, *runs.small(*command, f"name={name}"))
        assert done.code == 0, done.err
        [path] = home.glob(f"runs/*/*/{name}")
        return runs.results(Run(path))

    return results


@pytest.mark.slow
class TestStopping:
    """A run that was stopped resumes as if it had not been, to the last bit."""

    @pytest.mark.parametrize(
        ("command", "stop", "step", "superseded"),
        [
            pytest.param(PLAIN, (KILL, MODULE + "training_step", 7), 4, {6}, marks=pytest.mark.thorough),
            pytest.param(PLAIN, (KILL, MODULE + "training_step", 1), 0, set(), marks=pytest.mark.thorough),
            (PLAIN, (KILL, MODULE + "validation_step", 3), 8, {9}),  # in mid-validation
            (PLAIN, (KILL, SAVE, 4), 10, set()),  # when the best is written, the last not yet: it goes on from the best
            (PLAIN, (KILL, MODULE + "on_test_epoch_start", 1), 20, set()),
            (TWICE, (KILL, MODULE + "training_step", 14), 4, {6}),  # between the halves of a step
            (OTHER, (KILL, MODULE + "training_step", 16), 12, {15}),
        ],
        ids=["training", "first-step", "validation", "saving", "test", "accumulating", "workers-buckets"],
    )
    def test_killed(
        self,
        tmp_path: Path,
        uninterrupted: Any,
        command: tuple[str, ...],
        stop: Stop,
        step: int,
        superseded: set[int],
    ):
        done, run = self.stopped(tmp_path, command, stop)
        assert done.code == 128 + KILL
        assert run.last_step == step
        assert not run.finished
        self.go_on(tmp_path, command)
        runs.assert_identical(runs.results(run), uninterrupted(command))
        moved = run.metrics.with_suffix(".superseded.csv")  # rows after the checkpoint
        lines = moved.read_text().splitlines() if moved.exists() else []
        assert {int(line.split(",")[0]) for line in lines} == superseded

    @pytest.mark.parametrize(
        ("command", "stop", "step"),
        [
            pytest.param(PLAIN, (TERM, MODULE + "training_step", 7), 7, marks=pytest.mark.thorough),  # at its end
            (PLAIN, (INT, MODULE + "training_step", 20), 20),
            pytest.param(PLAIN, (INT, MODULE + "validation_step", 3), 10, marks=pytest.mark.thorough),
            (PLAIN, (TERM, MODULE + "on_validation_epoch_end", 2), 10),
            pytest.param(TWICE, (TERM, MODULE + "training_step", 13), 7, marks=pytest.mark.thorough),
            (OTHER, (INT, MODULE + "training_step", 15), 15),
        ],
        ids=["training", "last-step", "validation", "validated", "accumulating", "workers-buckets"],
    )
    def test_asked_to_stop(self, tmp_path: Path, uninterrupted: Any, command: tuple[str, ...], stop: Stop, step: int):
        done, run = self.stopped(tmp_path, command, stop)
        assert done.code == 128 + stop[0]
        assert done.err == ""
        assert unfolded(f"stopped by {stop[0].name} after step {step}; saved in {run.last}") in unfolded(done.out)
        assert "The same command resumes the run." in done.out
        assert run.last_step == step
        assert not run.finished
        self.go_on(tmp_path, command)
        runs.assert_identical(runs.results(run), uninterrupted(command))

    def test_stopped_with_its_examples_on_the_device_and_resumed_without(self, tmp_path: Path, uninterrupted: Any):
        kept = (*OTHER, "loader.device_resident=true")
        done, run = self.stopped(tmp_path, kept, (INT, MODULE + "training_step", 15))
        assert done.code == 128 + INT
        assert run.last_step == 15
        self.go_on(tmp_path, OTHER)
        runs.assert_identical(runs.results(run), uninterrupted(OTHER))

    @pytest.mark.thorough
    def test_again_and_again(self, tmp_path: Path, uninterrupted: Any):
        stops: list[Stop] = [
            (TERM, MODULE + "validation_step", 3),  # in the validation at step 10 …
            (INT, MODULE + "validation_step", 2),  # … and in the one that takes its place, …
            (TERM, MODULE + "validation_step", 3),  # … in the last batch of it: it ends first
            (KILL, MODULE + "training_step", 1),
            (TERM, MODULE + "training_step", 1),
            (INT, MODULE + "validation_step", 1),
        ]
        steps = []
        for stop in stops:
            done, run = self.stopped(tmp_path, PLAIN, stop)
            assert done.code == 128 + stop[0]
            steps.append(run.last_step)
        assert steps == [10, 10, 10, 10, 11, 20]
        self.go_on(tmp_path, PLAIN)
        runs.assert_identical(runs.results(run), uninterrupted(PLAIN))
        starts = json.loads(run.manifest.read_text())["starts"]
        assert [start["resumed"] for start in starts] == [False, *[True] * len(stops)]

    def test_killed_from_outside(self, tmp_path: Path):
        """At whatever moment that is: as soon as there is a checkpoint."""
        command = runs.small(*PLAIN, "task.data.train=240", "trainer.val_check_interval=0.5", "trainer.max_epochs=1")
        started = runs.start(tmp_path, *command, "name=run")
        run = runs.run_of(tmp_path, "lds", "stu", "run")
        deadline = time.monotonic() + 60
        while not run.last.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        started.process.kill()
        assert started.wait().code == 128 + KILL
        assert 0 < run.last_step < 60
        for name in ("run", "other"):
            assert runs.train(tmp_path, *command, f"name={name}").code == 0
        runs.assert_identical(
            runs.results(run), runs.results(runs.run_of(tmp_path, "lds", "stu", "other"))
        )  # fmt: skip

    @pytest.mark.parametrize(("method", "step"), [("on_validation_epoch_start", 0), ("on_test_epoch_start", 20)])
    def test_interrupted_before_and_after_training(self, tmp_path: Path, uninterrupted: Any, method: str, step: int):
        """Where there is nothing to save."""
        done, run = self.stopped(tmp_path, PLAIN, (INT, MODULE + method, 1))
        assert (done.code, done.err) == (128 + INT, "")
        assert run.last_step == step
        self.go_on(tmp_path, PLAIN)
        runs.assert_identical(runs.results(run), uninterrupted(PLAIN))

    def test_a_second_signal_does_not_wait(self, tmp_path: Path):
        done, run = self.stopped(tmp_path, PLAIN, (INT, MODULE + "training_step", 7), twice=True)
        assert done.code == 128 + INT
        assert "Traceback" not in done.err
        assert run.last_step == 4

    @staticmethod
    def stopped(home: Path, command: tuple[str, ...], stop: Stop, *, twice: bool = False) -> tuple[runs.Finished, Run]:
        done = runs.train(home, *runs.small(*command, "name=run"), at=runs.signalled(*stop, times=1 + twice))
        [path] = home.glob("runs/*/*/run")
        return done, Run(path)

    @staticmethod
    def go_on(home: Path, command: tuple[str, ...]) -> None:
        done = runs.train(home, *runs.small(*command, "name=run"))
        assert done.code == 0, done.err


@pytest.mark.slow
def test_a_diverged_run_says_so_in_one_line(tmp_path: Path):
    command = runs.small("task=lds", "model=stu", "optimizer.lr=1e30", "optimizer.warmup=0")
    command = [*command, "checkpoints.every_n_steps=1", "name=run"]
    done = runs.train(tmp_path, *command)
    assert done.code == 3
    [line] = done.err.splitlines()
    assert line.startswith("error: the loss is not finite at step ")
    run = runs.run_of(tmp_path, "lds", "stu", "run")
    step = int(line.split("at step ")[1].split(";")[0])
    assert 1 < step <= 20
    assert run.last_step < step
    assert f"the last good checkpoint is {run.last} (step {run.last_step})" in line
    assert "optimizer.lr" in line
    assert not run.finished


BASIC = "hydra/sweeper=basic"


@pytest.mark.slow
class TestSweepsOfHydra:
    """hydra/sweeper=basic: one job after another in one process."""

    def test_a_sweep_is_a_directory_of_runs_and_the_same_command_redoes_none(self, tmp_path: Path):
        command = runs.small("task=lds", "model=stu", "trainer.max_steps=2")
        done = runs.train(tmp_path, "-m", BASIC, *command, "seed=0,1")
        assert (done.code, done.err) == (0, "")
        announced = [line.split(":")[0] for line in done.out.splitlines() if line.endswith(("seed=0", "seed=1"))]
        assert announced == ["job 1 of 2", "job 2 of 2"]
        made = sorted((tmp_path / "runs" / "lds" / "stu").iterdir())
        assert len(made) == 2
        assert sorted(yaml.safe_load(Run(path).config.read_text())["seed"] for path in made) == [0, 1]
        summaries = [Run(path).read_summary() for path in made]
        assert summaries[0]["test"] != summaries[1]["test"]
        written = {path: path.stat().st_mtime_ns for run in made for path in run.rglob("*.ckpt")}
        again = runs.train(tmp_path, "-m", BASIC, *command, "seed=0,1")
        assert (again.code, again.err) == (0, "")
        assert again.out.count("Result") == 2
        assert "validated" not in again.out
        assert {path: path.stat().st_mtime_ns for run in made for path in run.rglob("*.ckpt")} == written

    def test_a_diverged_run_does_not_end_a_sweep(self, tmp_path: Path):
        command = runs.small("task=lds", "model=stu", "optimizer.warmup=0", "trainer.max_steps=8")
        done = runs.train(tmp_path, "-m", BASIC, *command, "optimizer.lr=1e30,1e-3")
        assert done.code == 1
        reason, count, *failed = done.err.splitlines()
        assert re.match("error: the (validation )?loss is not finite (at|after) step ", reason)
        assert count == "error: 1 jobs of the sweep failed:"
        assert len(failed) == 1
        assert "optimizer.lr=1e+30" in failed[0]
        finished = [path for path in (tmp_path / "runs" / "lds" / "stu").iterdir() if Run(path).finished]
        assert [yaml.safe_load(Run(path).config.read_text())["optimizer"]["lr"] for path in finished] == [1e-3]


TUNED = ("callbacks=[ema,early_stopping]", "callbacks.ema.decay=0.8", "callbacks.early_stopping.divergence_threshold=2")


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", [(), pytest.param(TUNED, marks=pytest.mark.thorough)], ids=["plain", "tuned"])
def test_two_devices_are_one(tmp_path: Path, callbacks: tuple[str, ...]):
    """With unlike shares of the evaluation, padding, and batch norm over both."""
    command = runs.small(
        *callbacks,
        "task=lra_listops",
        "model=stu",
        "model.norm=batch",
        "task.data.val=9",
        "task.data.test=7",
        "log_every=5",
    )
    if callbacks:  # in processes that are forked
        both = on_two_nodes(tmp_path, *command, "trainer=ddp", "name=both")
    else:  # as a user starts it
        words = [word for word in command if word != "trainer=cpu"]
        words += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "name=both"]
        both = [runs.train_in_subprocess(tmp_path, *words, timeout=120)]
    assert [(each.code, each.err) for each in both] == [(0, "")] * len(both)
    assert "".join(each.out for each in both).count("Result") == 1
    assert runs.train(tmp_path, *command, "name=one").code == 0
    two, one = (runs.results(runs.run_of(tmp_path, "lra_listops", "stu", name)) for name in ("both", "one"))
    early = "val/accuracy is worse than 2" if callbacks else None
    assert two["summary"].get("stopped_early") == one["summary"].get("stopped_early") == early
    assert [row[:3] for row in two["rows"]] == [row[:3] for row in one["rows"]]
    assert [row[3] for row in two["rows"]] == pytest.approx([row[3] for row in one["rows"]], rel=1e-4, abs=1e-6)
    assert two["summary"]["test"] == pytest.approx(one["summary"]["test"], rel=1e-4)
    for name, weight in one["best"].items():
        if name.startswith("model."):
            assert_close(two["best"][name], weight, rtol=1e-3, atol=1e-4)
