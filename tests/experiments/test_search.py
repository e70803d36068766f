"""Spaces of sweeps, and the search in them: without training, the runs being written by the tests."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments import sweep
from experiments.sweep import wandb_yaml
from experiments.sweep.jobs import Job, Jobs
from experiments.sweep.ledger import Ledger
from experiments.sweep.search import STUDY, Search, begun, direction_of
from experiments.sweep.spaces import Given, Space, parsed
from stu.cli import arguments, usage
from stu.cli.composition import composed
from stu.cli.usage import CONF, options_of
from stu.errors import DIVERGED, OptionError
from stu.files import sealed

LR = {"optimizer.lr": "tag(log,interval(1e-4,1e-1))"}
Objective = Callable[[dict[str, str]], float]


def values_of(job: Job) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in job.overrides)


def distance(values: dict[str, str]) -> float:
    """Best at a rate of 3e-3."""
    return abs(math.log10(float(values["optimizer.lr"])) + 2.5)


class Runs:
    """Makes jobs whose runs the tests write, in place of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, 0

    def job(self, words: Sequence[str], trial: int) -> Job:
        name = sha256(" ".join(sorted(words)).encode()).hexdigest()[:12]
        return Job(tuple(words), self.folder / name, trial=trial)

    def log(self, job: Job, *values: float) -> None:
        job.run.mkdir(parents=True, exist_ok=True)
        (job.run / "manifest.json").write_text(json.dumps({"monitor": "val/mse"}))
        rows = "".join(f"{100 * n},{n},val/mse,{value!r}\n" for n, value in enumerate(values, start=1))
        (job.run / "metrics.csv").write_text("step,epoch,metric,value\n" + rows)

    def finish(self, job: Job, value: float) -> None:
        self.ran += 1
        job.run.mkdir(parents=True, exist_ok=True)
        best = {"metric": "val/mse", "value": value, "epoch": 1.0, "step": 1}
        summary = {"best": best, "test": {"mse": value}, "baselines": {}, "seconds": 1.0}
        (job.run / "summary.json").write_text(sealed(summary))

    def search(self, space: Space, trials: int | None = 8, **options: Any) -> Search:
        options = {"direction": lambda: "minimize", "sampler": "random"} | options
        return Search(space, self.job, self.folder / ".sweeps", trials=trials, **options)

    def work(self, search: Search, objective: Objective = distance, most: int = 1000) -> list[Job]:
        """What the loop does, one job after another; returns those that ran."""
        done: list[Job] = []
        while len(done) < most and (job := search.next()) is not None:
            if job.finished or job.pruned:
                job.state = "finished" if job.finished else "pruned"
            else:
                assert job.claim()
                self.finish(job, objective(values_of(job)))
                job.state = "finished"
                job.release()
                done.append(job)
            search.told(job)
        return done


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def states(search: Search) -> list[str]:
    return [trial.state.name for trial in search.study.get_trials()]


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_a_search_that_was_interrupted_suggests_what_it_would_have(tmp_path: Path, sampler: str):
    space = Space.of([], LR | {"model.depth": "int(interval(1,4))", "model.dropout": "interval(0,0.5)"})
    whole, parts = Runs(tmp_path / "whole"), Runs(tmp_path / "parts")
    expected = [job.overrides for job in whole.work(whole.search(space, 14, sampler=sampler))]
    found: list[tuple[str, ...]] = []
    while more := parts.work(parts.search(space, 14, sampler=sampler), most=3):
        found += [job.overrides for job in more]
    assert found == expected
    assert len(set(found)) == 14
    assert parts.work(parts.search(space, 14, sampler=sampler)) == []


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_samplers_get_better(runs: Runs, sampler: str):
    space = Space.of([], LR | {"model.dropout": "interval(0,1)"})

    def objective(values: dict[str, str]) -> float:
        return distance(values) + abs(float(values["model.dropout"]) - 0.25)

    done = runs.work(runs.search(space, 30, sampler=sampler, seed=2), objective)
    late = [objective(values_of(job)) for job in done[15:]]
    assert sum(late) / len(late) < 0.75, "random ones have 1.1"


def test_trials_are_a_total(runs: Runs):
    space = Space.of([], LR)
    first = runs.work(runs.search(space, 3))
    assert len(first) == 3
    assert runs.work(runs.search(space, 3)) == []
    shutil.rmtree(first[1].run)
    assert [job.run for job in runs.work(runs.search(space, 3))] == [first[1].run], "the run directory is the truth"
    assert runs.work(runs.search(space, 2)) == []
    assert len(runs.work(runs.search(space, 5))) == 2
    for wrong in (None, 0, True):
        with pytest.raises(OptionError, match=r"hydra.sweeper.trials"):
            runs.search(space, wrong)


def test_what_is_known_is_not_run_again_and_a_small_space_ends(runs: Runs, capsys: pytest.CaptureFixture[str]):
    space = Space.of([], {"seed": "0,1,2", "model.depth": "int(interval(1,2))", "optimizer.lr": "1e-3,1e-2"})
    elsewhere = runs.job(("seed=1", "model.depth=2", "optimizer.lr=0.001"), 0)
    runs.finish(elsewhere, 0.5)
    search = runs.search(space, 20, sampler="tpe")
    assert len(runs.work(search)) == 11
    assert search.next() is None
    assert search.empty
    assert capsys.readouterr().out == "12 trials: these are all there are\n"
    assert search.total == 12
    counted = [trial for trial in search.study.get_trials() if "repeats" not in trial.user_attrs]
    assert len({trial.user_attrs["run"] for trial in counted}) == len(counted) == 12
    repeats = [trial for trial in search.study.get_trials() if "repeats" in trial.user_attrs]
    assert repeats, "a suggestion was known"
    for trial in repeats:
        assert trial.value == search.study.get_trials()[trial.user_attrs["repeats"]].value
    before = len(search.study.get_trials())
    assert runs.work(runs.search(space, 20, sampler="tpe")) == []
    assert len(search.study.get_trials()) == before


def test_a_space_of_few_numbers_that_cannot_be_listed_ends(runs: Runs, capsys: pytest.CaptureFixture[str]):
    search = runs.search(Space.of([], {"optimizer.lr": "interval(1e-3,1.0000000000000002e-3)"}), 5)
    assert 1 <= len(runs.work(search)) <= 2
    assert "the sampler suggests nothing else" in capsys.readouterr().out
    assert search.empty


def test_a_trial_of_a_killed_worker_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    space = Space.of([], LR)
    killed = runs.search(space, 3)
    left = killed.next()
    assert left is not None
    other = runs.search(space, 3)
    assert other.next() is None, "who asked a moment ago may be about to claim"
    assert not other.empty
    monkeypatch.setattr("experiments.sweep.search.TO_CLAIM", 0.0)
    assert left.claim()
    other = runs.search(space, 3)
    others = [other.next(), other.next()]
    assert None not in others
    assert other.next() is None, "the worker is at it"
    assert not other.empty
    left.release()
    other._looks_at = 0.0
    taken = other.next()
    assert taken is not None
    assert (taken.run, taken.trial) == (left.run, left.trial)
    for job in (*others, taken):
        assert job is not None
        runs.finish(job, 1.0)
        job.state = "finished"
        other.told(job)
    killed.told(left)  # it was only slow: nothing is told twice
    assert states(other) == ["COMPLETE"] * 3
    assert other.next() is None
    assert other.empty


def test_what_other_workers_have_found_is_seen_at_the_end(runs: Runs):
    space = Space.of([], LR)
    one, two = runs.search(space, 3), runs.search(space, 3)
    taken = []
    for search in (one, two, one):
        job = search.next()
        assert job is not None
        assert job.claim()
        taken.append(job)
    assert one.next() is None
    assert not one.empty, "the other worker may end early"
    for search, job in zip((one, two, one), taken, strict=True):
        runs.finish(job, 1.0)
        search.told(job)
        job.release()
    assert two.next() is None
    two._looks_at = one._looks_at = 0.0
    assert one.next() is None
    seen = one.next()
    assert seen is not None
    assert seen.run == taken[1].run
    one.told(seen)
    assert one.next() is None
    assert one.empty
    assert states(one) == ["COMPLETE"] * 3


def test_a_worker_killed_while_it_asks_leaves_nothing_behind(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    space = Space.of([], LR | {"model.depth": "int(interval(1,4))"})
    search = runs.search(space, 2)
    trial = search.study.ask()
    trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
    with (runs.folder / ".sweeps" / STUDY).open("ab") as file:
        file.write(b'{"op_code": 6, "worker')  # killed while it wrote
    monkeypatch.setattr("experiments.sweep.search.TO_CLAIM", 0.0)
    done = runs.work(runs.search(space, 2))
    assert len(done) == 2
    assert float(values_of(done[0])["optimizer.lr"]) == pytest.approx(trial.params["optimizer.lr"], rel=1e-3)
    assert states(runs.search(space, 2)) == ["COMPLETE"] * 2


def test_failed_trials_are_tried_again_and_diverged_ones_are_not(runs: Runs):
    space = Space.of([], LR)
    search = runs.search(space, 3)
    jobs = []
    for code, reason in ((1, "MemoryError"), (DIVERGED, "the loss is not finite at step 9"), (0, "")):
        job = search.next()
        assert job is not None
        job.code, job.reason, job.state = code, reason, "failed" if reason else "finished"
        if not reason:
            runs.finish(job, 1.0)
        search.told(job)
        jobs.append(job)
    assert search.next() is None
    assert search.empty
    assert states(search) == ["FAIL", "PRUNED", "COMPLETE"]
    assert search.study.get_trials()[1].user_attrs["reason"] == jobs[1].reason
    again = runs.search(space, 3)
    assert [job.run for job in runs.work(again)] == [jobs[0].run]
    assert states(again) == ["FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
    assert runs.work(runs.search(space, 3)) == []


@pytest.mark.parametrize("pruner", ["median", "hyperband", "halving"])
def test_bad_trials_are_pruned(runs: Runs, pruner: str):
    search = runs.search(Space.of([], LR), 20, pruner=pruner)
    ended = {"finished": 0, "pruned": 0}
    for count in range(20):
        job = search.next()
        assert job is not None
        assert job.claim()
        level = float(count % 5) if count > 5 else 1.0
        values: list[float] = []
        while len(values) < 9 and job.state != "pruned":
            values.append(level + 1 / (len(values) + 1))
            runs.log(job, *values)
            search.watch(job)
            search.watch(job)  # nothing is reported twice
        if job.state == "pruned":
            assert level >= 1.0
            assert len(values) > (pruner == "median")
            job.prune(job.reason)
        else:
            runs.finish(job, min(values))
            job.state = "finished"
        ended[job.state] += 1
        job.release()
        search.told(job)
        trial = search.study.get_trials()[count]
        assert list(trial.intermediate_values) == list(range(1, len(values) + 1))
        assert trial.state.name == {"finished": "COMPLETE", "pruned": "PRUNED"}[job.state]
    assert ended["pruned"] >= 4
    assert ended["finished"] >= 6
    assert runs.work(runs.search(Space.of([], LR), 20, pruner=pruner)) == [], "what was pruned stays so"


def test_a_run_that_finished_before_it_was_stopped_is_finished(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    search = runs.search(Space.of([], LR), 2, pruner="median")
    job = search.next()
    assert job is not None
    runs.log(job, 1.0, 2.0)
    runs.finish(job, 1.0)
    job.state = "pruned"
    search.told(job)
    assert states(search) == ["COMPLETE"]
    job = search.next()
    assert job is not None
    runs.log(job, 3.0)
    job.prune("by hand")  # and killed before it was told
    monkeypatch.setattr("experiments.sweep.search.TO_CLAIM", 0.0)
    again = runs.search(Space.of([], LR), 2, pruner="median")
    assert runs.work(again) == []
    assert states(again) == ["COMPLETE", "PRUNED"]
    assert again.study.get_trials()[1].intermediate_values == {1: 3.0}


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_study_is_made_again_from_the_runs(runs: Runs, capsys: pytest.CaptureFixture[str], how: str):
    space = Space.of(["task=lds"], LR | {"model": "stu,s4"}, {"model=stu": {"model.mixer.k_u": "int(interval(0,9))"}})
    done = runs.work(runs.search(space, 6))
    file = runs.folder / ".sweeps" / STUDY
    if how == "lost":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes().replace(b"}\n", b"\n", 3))
    known = [*(job.overrides for job in done), ("model=other",)]
    again = runs.search(space, 7, known=known)
    assert ("is damaged: kept as optuna.jsonl.damaged" in capsys.readouterr().out) == (how == "damaged")
    assert len(runs.work(again)) == 1
    assert [trial.value for trial in again.study.get_trials()][:6] == [
        json.loads((job.run / "summary.json").read_text())["best"]["value"] for job in done
    ]


def test_what_a_search_cannot_do_is_refused(runs: Runs):
    space = Space.of([], LR)
    runs.search(space)
    with pytest.raises(OptionError, match=r"hydra.sweeper.name=.sweeps: is a search of another space"):
        runs.search(Space.of([], {"optimizer.lr": "interval(1e-4,1e-1)"}))
    with pytest.raises(OptionError, match=r"hydra.sweeper.sampler=bayes: must be one of grid, tpe, random, cmaes"):
        runs.search(space, sampler="bayes")
    with pytest.raises(OptionError, match=r"hydra.sweeper.pruner=soft: must be one of none, median"):
        runs.search(space, pruner="soft")
    with pytest.raises(OptionError, match=r"hydra.sweeper.sampler=cmaes: needs two intervals or ranges"):
        runs.search(space, sampler="cmaes")


WORKER = """
import sys, time, random
from pathlib import Path
from experiments.sweep.spaces import Space
from tests.experiments.test_search import Runs, LR, distance, values_of
runs = Runs(Path(sys.argv[1]))
search = runs.search(Space.of([], LR), 12)
while not search.empty:
    job = search.next()
    if job is None or job.busy or not job.claim():
        if job is not None:
            search.again(job)
        time.sleep(0.02)
        continue
    if not job.finished:
        with (job.run.with_suffix(".started")).open("a") as file:
            file.write("x")
        time.sleep(0.05)
        runs.finish(job, distance(values_of(job)))
    job.state = "finished"
    job.release()
    search.told(job)
print(runs.ran, *sorted(name for name in ("torch", "sqlalchemy", "lightning") if name in sys.modules))
"""


def test_two_processes_share_the_trials(runs: Runs):
    command = [sys.executable, "-c", WORKER, str(runs.folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    shares = [worker.communicate(timeout=100)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sum(int(share[0]) for share in shares) == 12
    assert all(int(share[0]) for share in shares)
    assert [share[1:] for share in shares] == [[], []], "neither PyTorch nor SQLAlchemy is needed"
    assert all(file.read_text() == "x" for file in runs.folder.glob("*.started"))
    assert states(runs.search(Space.of([], LR), 12)) == ["COMPLETE"] * 12


SWEEPS = options_of("sweep")
Word = tuple[str, Callable[[str], bool]]


@st.composite
def grammar(draw: st.DrawFn) -> Word:
    """What a key may be, and whether a value is that."""
    kind = draw(st.sampled_from(["float", "log", "int", "log int", "range", "float range", "choice"]))
    if kind == "choice":
        words = draw(
            st.lists(st.sampled_from(["a", "1", "0.5", "true", "null", "[1,2]", "x y"]), min_size=2, unique=True)
        )
        quoted = [f"'{word}'" if " " in word else word for word in words]
        return f"{','.join(quoted)}", lambda value: value.lower().replace("'", "") in words
    if kind in ("float", "log"):
        low, high = sorted(draw(st.tuples(*[st.floats(1e-9, 1e6)] * 2).filter(lambda ends: ends[0] != ends[1])))
        interval = f"interval({low!r},{high!r})"
        return f"tag(log,{interval})" if kind == "log" else interval, lambda value: low <= float(value) <= high
    first, steps = draw(st.integers(1, 50)), draw(st.integers(1, 20))
    if kind in ("int", "log int"):
        interval = f"int(interval({first},{first + steps}))"
        return f"tag(log,{interval})" if kind == "log int" else interval, lambda v: first <= int(v) <= first + steps
    size = draw(st.integers(1, 4))
    if kind == "range":
        return f"range({first},{first + steps + 1},{size})", lambda v: int(v) in range(first, first + steps + 1, size)
    return f"range({first / 10},{(first + steps + 1) / 10},{size / 10})", lambda v: _on_grid(
        float(v), first, steps, size
    )


def _on_grid(value: float, first: int, steps: int, size: int) -> bool:
    return any(math.isclose(value, tenth / 10, abs_tol=1e-9) for tenth in range(first, first + steps + 2, size))


class Drawn:
    """Chooses as hypothesis draws."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        return self.draw(st.sampled_from(choices))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return self.draw(st.sampled_from(range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self.draw(st.floats(low, high))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_chosen_is_in_the_space(data: st.DataObject):
    written = {f"model.k{n}": data.draw(grammar()) for n in range(data.draw(st.integers(1, 3)))}
    under = data.draw(grammar())
    when = {"model=s4,lru": {"model.u": under[0]}, "model=lru seed=1,2": {"model.v": "1,2"}}
    params = {"model": "stu,s4,lru", "seed": "range(0,3)", **{key: word for key, (word, _) in written.items()}}
    space = Space.of(["task=lds"], params, when)
    words = space.job(Drawn(data.draw))
    values = dict(word.partition("=")[::2] for word in words)
    assert values["task"] == "lds"
    for key, (_, is_in) in written.items():
        assert is_in(values[key]), (key, values[key])
    assert ("model.u" in values) == (values["model"] in ("s4", "lru"))
    assert ("model.v" in values) == (values["model"] == "lru" and values["seed"] in ("1", "2"))
    assert under[1](values.get("model.u", "")) if "model.u" in values else True
    assert [parsed(word).get_value_element_as_str() for word in words] == list(values.values()), (
        "they can be read again"
    )
    known = Given(words, strict=True)
    assert space.job(known) == words, "and are the same job again"
    assert len(known.params) == len(words) - 1


def test_grids_are_those_of_hydra_and_with_conditions():
    words = ["model=stu,s4", "seed=0,1", "optimizer.lr=1e-3", "~optimizer.eps"]
    assert list(Space.of(words).jobs()) == [
        ("optimizer.lr=1e-3", "~optimizer.eps", f"model={model}", f"seed={seed}")
        for model in ("stu", "s4")
        for seed in (0, 1)
    ]
    when = {"model=s4": {"model.mixer.d_state": "16,32"}, "model=stu task=lds": {"model.mixer.k_u": "1"}}
    space = Space.of(["task=lds"], {"model": "stu,s4,lru"}, when)
    assert list(space.jobs()) == [
        ("task=lds", "model=stu", "model.mixer.k_u=1"),
        ("task=lds", "model=s4", "model.mixer.d_state=16"),
        ("task=lds", "model=s4", "model.mixer.d_state=32"),
        ("task=lds", "model=lru"),
    ]
    # the command counts more than a file, and what is not said is looked up
    assert list(Space.of(["model=s4", "model.mixer.d_state=8"], {"model": "stu,s4"}, when).jobs()) == [
        ("model=s4", "model.mixer.d_state=8")
    ]
    default = {"model=stu task=lra_listops model.mixer.delay=2": {"seed": "3,4"}}
    assert list(Space.of([], {}, default).jobs()) == [("seed=3",), ("seed=4",)]
    assert list(Space.of(["experiment=lra/image/s4"], {}, default).jobs()) == [("experiment=lra/image/s4",)]
    assert Space.of([], {"a": "1,2", "b": 3}).name([]) == Space.of(["b=3", "a=1,2"], {"a": "3"}).name([]) != ""


@pytest.mark.parametrize(
    ("params", "when", "line"),
    [
        (
            {"seed": "interval(0,1)"},
            None,
            r"seed=interval\(0.0,1.0\): is an interval: choose hydra.sweeper.sampler=tpe",
        ),
        ({"seed": "interval(1,0)"}, None, r"seed=interval\(1,0\): is an empty interval"),
        ({"seed": "tag(log,interval(0,1))"}, None, "must be above 0 on a log scale"),
        ({"seed": "tag(log,choice(0,1))"}, None, "only an interval has a log scale"),
        ({"seed": "tag(q,interval(0,1))"}, None, "log is the only tag"),
        ({"seed": "range(3,1)"}, None, "is an empty range"),
        ({"seed": "[1"}, None, "cannot be read"),
        ({"model": "stu,nope"}, None, "model=nope: no such option"),
        (["seed"], None, r"hydra.sweeper.params=.*: must be a mapping"),
        ({}, ["seed"], r"hydra.sweeper.when=.*: must be a mapping"),
        ({}, {"model": {"seed": 1}}, "cannot be read"),
        ({}, {"seed=interval(0,1)": {"model": "stu"}}, r"hydra.sweeper.when='seed=interval\(0,1\)': must be KEY=VALUE"),
        ({"seed": "0,1"}, {"model=stu": {"seed": 1}}, "when.model=stu=seed: is in params, too"),
    ],
)
def test_the_line_about_a_space(params: Any, when: Any, line: str):
    with pytest.raises(OptionError, match=line) as error:
        list(Space.of([], params, when).jobs())
    assert "\n" not in str(error.value)


def test_no_two_numbers_that_matter_become_one():
    [rate] = Space.of([], {"a": "tag(log,interval(1e-4,1e-2))"}).parameters
    [near] = Space.of([], {"a": "interval(0.9999,1)"}).parameters
    assert rate.shortened(0.000123456789) == 0.0001235
    assert near.shortened(0.999912345678) == 0.99991235
    assert (rate.shortened(1e-4), rate.shortened(0.00999999)) == (1e-4, 0.01)
    assert [rate.shortened(rate.shortened(x)) for x in (0.0099996, 0.000999951)] == [0.01, 0.001]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name.startswith("mini") else name for name in SWEEPS]
)
@pytest.mark.slow
def test_every_kind_of_job_of_a_ready_space_is_accepted(name: str):
    """Each composes, and fits the constructors."""
    options: Any = OmegaConf.to_container(composed([f"sweep={name}", "task=lds"], with_hydra=True).hydra.sweeper)
    of_presets = name.startswith(("lra", "mini"))
    space = Space.of([] if of_presets else ["task=lds"], options["params"], options["when"])
    jobs = Jobs(space.swept)
    made = [jobs.make(words) for words in space.examples()]
    for job in made:
        jobs.check([job])
    searched = options["sampler"] is not None
    assert searched == (options["trials"] is not None) == (name in ("ssm", "stu"))
    if not searched:
        text = (CONF / "sweep" / f"{name}.yaml").read_text()
        assert f"Cost: {len(list(space.jobs()))} runs" in text
    models, tasks = ({job.run.parts[part] for job in made} for part in (-2, -3))
    every, tuned = set(options_of("model")), {name.rpartition("/")[2] for name in options_of("tuned")}
    assert models == {
        "lr": {"stu"}, "stu": {"stu"}, "baselines": every, "mini": tuned, "mini_lr": tuned,
        "ssm": {"s4", "s4d", "s5", "lru", "mamba2"},
        "lra": {preset.split("/")[2] for preset in options_of("experiment") if preset.startswith("lra/")},
    }[name]  # fmt: skip
    assert len(tasks) == (6 if of_presets else 1)
    assert not any(word.startswith("sweep=") for job in made for word in job.overrides)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("seed: 3", "sets seed; a file of conf/sweep may set hydra.sweeper"),
        ("defaults: [{override /task: lds}]", "no such option"),
        ("hydra: {sweeper: {params: {}, trial: 3}, job: {chdir: true}}", "sets hydra.job, hydra.sweeper.trial; "),
        (None, "needs the line # @package _global_"),
    ],
)
def test_a_file_of_spaces_sets_nothing_else(
    content: str | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    conf = tmp_path / "conf"
    shutil.copytree(CONF / "sweep", conf / "sweep")
    shutil.copytree(CONF / "hydra", conf / "hydra")
    (conf / "sweep" / "mine.yaml").write_text(f"# @package _global_\n{content}\n" if content else "hydra: {}\n")
    monkeypatch.setattr(arguments, "CONF", conf)
    monkeypatch.setattr(usage, "CONF", conf)
    with pytest.raises(OptionError, match=line):
        arguments.checked(["-m", "sweep=mine"])
    assert arguments.checked(["-m", "sweep=lr"]) == ["sweep=lr", "-m"]


@pytest.mark.parametrize("words", [["sweep=lr"], ["-m", "sweep=nope"], ["-m", "sweep=lr,stu"]])
def test_a_space_is_chosen_by_one_name_and_for_a_sweep(words: list[str]):
    with pytest.raises(OptionError, match=r"^sweep="):
        arguments.checked(words)


@pytest.mark.parametrize(
    ("words", "options", "line"),
    [
        (["seed=0,1"], {"pruner": "median"}, "hydra.sweeper.pruner=median: is for a search"),
        (["optimizer.lrr=interval(1,2)"], {"sampler": "tpe", "trials": 3}, "lrr"),
        (["model.depth=interval(1,2)"], {"sampler": "random", "trials": 3}, "model.depth=1.0: must be an integer"),
        (["seed=0,1", "task.seq_len=-1"], {"sampler": "tpe", "trials": 3}, "seq_len=-1"),
        (["seed=0,1"], {"sampler": "random"}, "hydra.sweeper.trials=None: must be how many"),
        (["seed=0,1"], {"sampler": "bohb"}, "hydra.sweeper.sampler=bohb: choose one of grid, tpe"),
        (["seed=0,1"], {"sampler": "tpe", "trials": 3, "seed": "x"}, "hydra.sweeper.seed=x: must be an integer"),
        (["seed=0,1"], {"name": ".."}, "hydra.sweeper.name='..': must be a plain folder"),
    ],
)
def test_nothing_starts_where_a_search_cannot_work(
    words: list[str], options: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STU_RUNS", str(tmp_path))
    words = ["task=lds", *words]
    with pytest.raises(Exception, match=line):
        sweep.run(composed(["task=lds"], with_hydra=True), words, **options)
    assert not list(tmp_path.iterdir())


def test_a_search_has_one_direction():
    jobs = Jobs({"task"})
    one = [jobs.make(["task=lds", "seed=0"]), jobs.make(["task=lorenz63"])]
    assert direction_of(one) == "minimize"
    other = jobs.make(["task=copying"])
    assert direction_of([other]) == "maximize"
    with pytest.raises(OptionError, match=r"task=lds \(its mse, min\) and copying \(its accuracy, max\): cannot be"):
        direction_of([*one, other])


def test_the_ledger_knows_what_began(tmp_path: Path):
    words = ["model=s4", r"name='it\'s a'", "optimizer.betas=[0.9,0.99]", 'logger.tags=["x y",z]']
    ledger = Ledger(tmp_path)
    for state in ("running", "finished"):
        ledger.write(Job(tuple(words), tmp_path / "run", state=state))
    with ledger.changes.open("a") as file:
        file.write('{"job": "mod')
    assert begun(tmp_path / "jobs.jsonl") == [words]
    assert begun(tmp_path / "none") == []


def test_a_space_as_a_sweep_of_wandb(capsys: pytest.CaptureFixture[str]):
    assert (
        wandb_yaml.main(["conf/sweep/stu.yaml", "task=lds", "model.mixer.k_y=2", "hydra.sweeper.pruner=halving"]) == 0
    )
    made = yaml.safe_load(capsys.readouterr().out)
    parameters = made.pop("parameters")
    assert made == {
        "program": "train.py",
        "method": "bayes",
        "metric": {"name": "val/mse", "goal": "minimize"},
        "command": [
            "${env}", "${interpreter}", "${program}",
            "model=stu", "model.mixer.k_y=2", "task=lds", "${args_no_hyphens}",
        ],
        "run_cap": 40,
        "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 3},
    }  # fmt: skip
    assert parameters["optimizer.lr"] == {"distribution": "log_uniform_values", "min": 3e-4, "max": 0.03}
    assert parameters["model.mixer.num_filters"] == {"distribution": "int_uniform", "min": 8, "max": 24}
    assert parameters["model.mixer.two_sided"] == {"values": [True, False]}
    assert parameters["model.mixer.k_u"] == {"values": [0, 1, 2, 3, 4]}
    assert wandb_yaml.main(["baselines", "task=copying", "loader.batch_size=tag(log,int(interval(4,64)))"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    batches = {"distribution": "q_log_uniform_values", "min": 4, "max": 64, "q": 1}
    assert made["parameters"]["loader.batch_size"] == batches
    betas, clips = ["optimizer.betas=[0.9,0.99],[0.9,0.999]"], ["trainer.gradient_clip_val=null,1.0"]
    assert wandb_yaml.main(["lr", "task=lds", *betas, *clips]) == 0
    parameters = yaml.safe_load(capsys.readouterr().out)["parameters"]
    assert parameters["optimizer.betas"] == {"values": ["[0.9,0.99]", "[0.9,0.999]"]}
    assert parameters["trainer.gradient_clip_val"] == {"values": ["null", 1.0]}
    assert wandb_yaml.main(["ssm", "task=lds"]) == 2
    assert "model.mixer.d_state | model=s4,s4d: some jobs have this key" in capsys.readouterr().err
