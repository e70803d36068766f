"""Weights & Biases: never a prompt, never the death of a run nor its delay, always its numbers somewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger

from experiments.compare.wandb import main as workspace
from stu.errors import OptionError
from stu.training import Run, WandbLog, wandb_log
from stu.training.loggers import read_metrics
from stu.training.signals import ANNOUNCED, PERSONAL
from stu.training.trackers import MEASURED, close_trackers, log_summary
from tests import runs
from tests.event_files import hyperparameters, scalars
from tests.wandb_files import Written
from tests.wandb_server import Kept, Server, serving

KEY = "0" * 40


class Experiment:
    """As much of a W&B run as our logger touches. `fails` is called in place of the method of that name."""

    def __init__(self, folder: str = "", **fails: Callable[..., None]) -> None:
        self.settings = SimpleNamespace(sync_dir=folder)
        self.described: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda params, **options: self.described.update(params))
        self.defined: dict[str, str | None] = {}
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []
        self.preempting = self.resumed = False
        self.__dict__ |= fails

    def define_metric(self, name: str, summary: str | None = None, **options: Any) -> None:
        self.defined[name] = summary

    def mark_preempting(self) -> None:
        self.preempting = True

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no settings of a user, no wandb-core; wandb forgets what it knew before and after."""
    monkeypatch.setattr("wandb.sdk.wandb_setup._WandbSetup.ensure_service", lambda self: None)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "STU_SWEEP"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()
    yield
    close_trackers()
    wandb.teardown()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, no_credentials: None) -> list[dict[str, Any]]:
    """The arguments of every `wandb.init`, which starts nothing."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Experiment:
        calls.append(arguments)
        return Experiment()

    monkeypatch.setattr(wandb, "init", init)
    return calls


CHOICES = {"task": "lds", "model": "stu", "experiment": None, "optimizer": "adamw", "paths": "default", "sweep": None}


def a_run(tmp_path: Path, starts: int = 1) -> Run:
    run = Run(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    begun = [{"time": "now", "device": "a CPU", "world_size": count, "packages": {}} for count in range(starts)]
    manifest = {"id": "cafe", "seed": 3, "data": "5ea1", "monitor": "accuracy", "mode": "max", "parameters": 7}
    run.manifest.write_text(json.dumps(manifest | {"settings": {"model": {}}, "starts": begun}))
    return run


def start(tmp_path: Path, starts: int = 1, **options: Any) -> WandbLog:
    logger = WandbLog(**options)
    logger.start(a_run(tmp_path, starts), CHOICES | {"hydra/launcher": "local"}, {"majority": 0.5})
    return logger


def end(exit_code: int) -> None:
    """As a run does that ends with this code."""
    with suppress(SystemExit):
        try:
            raise SystemExit(exit_code)
        finally:
            close_trackers()


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch, no_credentials: None) -> Experiment:
    """What every `wandb.init` gives."""
    made = Experiment()
    monkeypatch.setattr(wandb, "init", lambda **arguments: made)
    return made


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a user reads of us; wandb's own log goes to a file."""
    return [record.getMessage() for record in caplog.records if record.name == "stu.training.wandb_log"]


def test_what_a_run_is_called(started: list[dict[str, Any]], tmp_path: Path):
    start(tmp_path, tags=["mine", "lds"], project="p", entity="me", finish_timeout=7.0)
    [call] = started
    expected = {
        "dir": tmp_path / "run",
        "id": "cafe",
        "name": "stu/run",
        "group": "lds",
        "job_type": "train",
        "project": "p",
        "entity": "me",
    }
    assert {key: call[key] for key in expected} == expected
    assert call["tags"] == ["lds", "stu", "mine"]
    assert call["resume"] == "allow"  # the same id continues the same run
    assert call["settings"].finish_timeout == 7.0


@pytest.mark.parametrize(
    ("options", "environment", "group", "job_type"),
    [
        ({}, {"STU_SWEEP": "lr"}, "lr", "sweep"),
        ({}, {"STU_SWEEP": ""}, "lds", "train"),
        ({}, {"STU_SWEEP": "s" * 200}, "s" * 128, "sweep"),
        ({}, {"STU_SWEEP": "lr", "WANDB_RUN_GROUP": "mine", "WANDB_JOB_TYPE": "eval"}, "mine", "eval"),
        ({"group": "g", "job_type": "j"}, {"STU_SWEEP": "lr", "WANDB_RUN_GROUP": "mine"}, "g", "j"),
        ({}, {"WANDB_SWEEP_ID": "abc"}, "lds", "sweep"),
    ],
)
def test_the_runs_of_a_sweep_are_a_group(
    started: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    environment: dict[str, str],
    group: str,
    job_type: str,
):
    monkeypatch.setenv("WANDB_RUN_ID", "trial")  # also that it is put back
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start(tmp_path, **options)
    assert [(call["group"], call["job_type"]) for call in started] == [(group, job_type)]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "trial"}, "trial"),  # as `wandb agent` says it
        ({"WANDB_SWEEP_ID": "abc"}, "cafe"),
        ({"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "trial", "STU_SWEEP": "lr"}, "cafe"),  # one of several in the trial
    ],
)
def test_under_an_agent_of_wandb_the_run_is_the_one_that_it_has_named(
    started: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    found: str | None,
):
    monkeypatch.setenv("WANDB_RUN_ID", "")
    monkeypatch.delenv("WANDB_RUN_ID")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start(tmp_path)
    assert os.environ.get("WANDB_RUN_ID") == found


def test_what_a_table_of_runs_can_be_grouped_by(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STU_SWEEP", "lr")
    start(tmp_path, starts=2, mode="offline").log_hyperparams({"model": {"d_model": 8}, "seed": 3})
    close_trackers()
    assert experiment.described == {
        **{"task": "lds", "model": "stu", "experiment": None, "optimizer": "adamw"},
        **{"seed": 3, "data": "5ea1", "monitor": "accuracy", "mode": "max", "parameters": 7},
        **{"device": "a CPU", "world_size": 1, "packages": {}},  # of this start
        **{"baselines": {"majority": 0.5}, "run": str(tmp_path / "run"), "sweep": "lr"},
        "settings": {"model": {"d_model": 8}, "seed": 3},
    }


def test_of_which_metrics_the_best_value_counts(experiment: Experiment, tmp_path: Path):
    start(tmp_path, mode="offline")
    close_trackers()
    assert experiment.defined == {
        **{"trainer/global_step": None, "*": None},
        **{"train/loss": "min", "val/loss": "min", "train/accuracy": "max", "val/accuracy": "max"},
    }
    assert experiment.summary == {}  # W&B counts itself


def test_the_summary_is_over_all_starts(experiment: Experiment, tmp_path: Path):
    rows = ["step,epoch,metric,value", "1,0.1,train/loss,nan", "2,0.2,train/loss,1.0", "2,0.2,val/accuracy,0.75"]
    rows += ["3,0.3,train/loss,2.0", "4,0.4,val/accuracy,0.5", "4,0.4,val/f1,0.25", "4,0.4,test/accuracy,0.5", ""]
    logger = start(tmp_path, starts=2, mode="offline")
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(rows))
    best = {"metric": "val/accuracy", "value": 0.75, "step": 2, "val": {"accuracy": 0.7500001, "loss": 3.0}}
    summary = {"test": {"accuracy": 0.5}, "best": best, "baselines": {"majority": 0.4}, "seconds": 1.5}
    log_summary(logger, summary)
    log_summary(CSVLogger(tmp_path), summary)  # others don't take it
    close_trackers()
    assert experiment.summary == {
        **{"train/loss": {"min": 1.0}, "val/accuracy": {"max": 0.75}, "val/f1": 0.25, "test/accuracy": 0.5},
        **{"best/metric": "val/accuracy", "best/value": 0.75, "best/step": 2},
        **{"best/val/accuracy": 0.75, "best/val/loss": 3.0, "baselines/majority": 0.4, "seconds": 1.5},
    }


@pytest.mark.parametrize(("checkpoints", "uploaded"), [("none", []), ("best", ["best"]), ("all", ["best", "last"])])
def test_checkpoints_are_artifacts_by_option(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture, checkpoints: Any, uploaded: list[str]
):
    sent: list[tuple[Any, list[str]]] = []
    experiment.log_artifact = lambda artifact, aliases: sent.append((artifact, aliases))  # type: ignore[attr-defined]
    logger = start(tmp_path, mode="offline", checkpoints=checkpoints)
    files = [tmp_path / "run" / "checkpoints" / f"{name}.ckpt" for name in uploaded]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(file.stem)
    best = {"metric": "val/accuracy", "value": 0.75, "step": 2, "epoch": 0.5}
    log_summary(logger, {"best": best, "steps": 4})
    close_trackers()
    assert [artifact.name for artifact, _ in sent] == [f"cafe-{name}" for name in uploaded]
    assert [aliases for _, aliases in sent] == [[name, "latest"] for name in uploaded]
    metadata = {"best": {"step": 2, "epoch": 0.5, "val/accuracy": 0.75}, "last": {"step": 4}}
    assert [artifact.metadata for artifact, _ in sent] == [metadata[name] for name in uploaded]
    entries = [entry for artifact, _ in sent for entry in artifact.manifest.entries.values()]
    assert [entry.local_path for entry in entries] == list(map(str, files))  # no copy
    assert (experiment.exit_codes, said(caplog)) == ([0], [])


def test_a_checkpoint_that_cannot_be_read_costs_a_line(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    logger = start(tmp_path, mode="offline", checkpoints="best")
    log_summary(logger, {"best": {"metric": "val/mse", "value": 0.75, "step": 2, "epoch": 0.5}, "steps": 4})
    close_trackers()
    [line] = said(caplog)
    assert line.startswith("Weights & Biases failed: ")
    assert str(tmp_path / "run/checkpoints/best.ckpt") in line


CSV = """step,epoch,metric,value
1,0.1,train/loss,1.0
1,0.1,lr/default,0.5
2,0.2,train/loss,1.5
2,0.2,lr/default,0.25
2,0.2,val/loss,1.25
3,0.3,train/loss,0.5
"""
TRAINED = {
    1: {"train/loss": 1.0, "lr/default": 0.5},
    2: {"train/loss": 1.5, "lr/default": 0.25},
    3: {"train/loss": 0.5},
}
ROWS = [{**values, "epoch": step / 10, "trainer/global_step": step} for step, values in TRAINED.items()]
ROWS.insert(2, {"val/loss": 1.25, "epoch": 0.2, "trainer/global_step": 2})


@pytest.mark.parametrize(
    ("sent", "missing"),
    [
        ({}, ROWS),
        ({"trainer/global_step": 1, "train/loss": {"min": 1.0}, "lr/default": 0.5}, ROWS[1:]),
        ({"trainer/global_step": 2, "train/loss": {"min": 1.0}, "lr/default": 0.25}, ROWS[2:]),
        ({"trainer/global_step": 2, "train/loss": {"min": 1.0}, "lr/default": 0.25, "val/loss": 1.25}, ROWS[3:]),
        ({"trainer/global_step": 9, "train/loss": {"min": 0.1}}, []),  # it was killed after this checkpoint
    ],
)
def test_what_a_killed_start_did_not_send_is_sent(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent: dict[str, Any],
    missing: list[dict[str, float]],
):
    monkeypatch.setattr(Run, "last_step", 3)
    experiment.resumed, experiment.summary = True, sent
    run = a_run(tmp_path)
    run.metrics.write_text(CSV + "4,0.4,train/loss,0.5\n5,0.5,tra")  # this start has already begun to write
    start(tmp_path, starts=2, mode="online")
    close_trackers()
    assert experiment.rows == missing


def test_offline_what_a_killed_start_has_written_is_written_again(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And its folder, at which `wandb sync` would end, is set aside."""
    monkeypatch.setattr(Run, "last_step", 3)
    run = a_run(tmp_path)
    run.metrics.write_text(CSV)
    closed, killed, this, other = (
        run.path / "wandb" / f"offline-run-{name}" for name in ("1-cafe", "2-cafe", "3-cafe", "2-f")
    )
    for folder in (closed, killed, this, other):
        folder.mkdir(parents=True)
    (closed / "rows").write_text("2")
    experiment.settings.sync_dir = str(this)
    start(tmp_path, starts=3, mode="offline")
    close_trackers()
    assert experiment.rows == ROWS[1:]
    assert (this / "rows").read_text() == "6"
    names = {"offline-run-1-cafe", "killed-offline-run-2-cafe", "offline-run-3-cafe", "offline-run-2-f"}
    assert {folder.name for folder in this.parent.iterdir()} == names
    start(tmp_path, starts=4, mode="offline")  # nothing is missing now
    close_trackers()
    assert experiment.rows == ROWS[1:]


@pytest.mark.parametrize("number", [*PERSONAL, *ANNOUNCED])
def test_what_goes_on_later_is_preempted(experiment: Experiment, tmp_path: Path, number: int):
    """What a cluster stops; not what its user has interrupted."""
    start(tmp_path, mode="offline")
    end(128 + number)
    assert experiment.exit_codes == [128 + number]
    assert experiment.preempting == (number != signal.SIGINT)


def test_what_is_pruned_or_diverges_does_not_go_on(experiment: Experiment, tmp_path: Path):
    for exit_code in (143, 3):
        start(tmp_path, mode="offline")
        (tmp_path / "run" / "pruned.json").touch()
        end(exit_code)
    assert (experiment.exit_codes, experiment.preempting) == ([143, 3], False)


@pytest.mark.parametrize(
    ("mode", "environment", "begins"),
    [
        ("auto", {}, ["offline"]),  # asking for a key is what only online can do
        ("auto", {"WANDB_API_KEY": ""}, ["offline"]),
        ("auto", {"WANDB_API_KEY": KEY}, ["online"]),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, ["offline"]),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, ["offline"]),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, []),
        ("online", {}, ["online"]),
        ("offline", {"WANDB_API_KEY": KEY}, ["offline"]),
        ("disabled", {"WANDB_API_KEY": KEY}, []),
    ],
)
def test_where_it_begins(
    started: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
    environment: dict[str, str],
    begins: list[str],
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start(tmp_path, mode=mode)
    assert [call["mode"] for call in started] == begins


@pytest.mark.parametrize(
    ("netrc", "base_url", "begins"),
    [
        (f"machine api.wandb.ai login user password {KEY}\n", None, "online"),  # whatever host is wandb's default
        (f"machine api.wandb.ai login user password {KEY}\n", "https://wandb.example.org", "offline"),
        (f"machine wandb.example.org login user password {KEY}\n", "https://wandb.example.org/", "online"),
        ("machine\n", None, "offline"),  # no netrc at all
    ],
)
@pytest.mark.parametrize("from_settings", [False, True])
def test_a_key_in_netrc_counts_for_the_host_that_wandb_uses(
    started: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    netrc: str,
    base_url: str | None,
    begins: str,
    from_settings: bool,
):
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    if base_url and from_settings:
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "settings").write_text(f"[default]\nbase_url = {base_url}\n")
    elif base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    start(tmp_path)
    assert [call["mode"] for call in started] == [begins]


def test_disabled_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_credentials: None):
    """It neither imports anything nor leaves a file."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(tmp_path, mode="disabled").log_metrics({"loss": 1.0}, step=1)
    close_trackers()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "manifest.json"]


def test_a_key_that_is_none_is_said(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    start(tmp_path)
    assert [call["mode"] for call in started] == ["offline"]
    [line] = said(caplog)
    assert line.startswith("Weights & Biases did not start online: WANDB_API_KEY invalid: API key must have 40+ ")


def test_nobody_is_asked(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On a terminal either."""
    monkeypatch.setattr("wandb.errors.term._sys_stderr_isatty", lambda: True)
    monkeypatch.setattr("wandb.errors.term._sys_stdin_isatty", lambda: True)
    monkeypatch.setattr("click.prompt", lambda *arguments, **options: pytest.fail("asked"))
    start(tmp_path)
    assert [call["mode"] for call in started] == ["offline"]
    assert capsys.readouterr() == ("", "")


def test_where_nothing_starts_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    def init(**arguments: Any) -> None:
        started.append(arguments)
        raise wandb.errors.CommError("connection\nrefused.")

    monkeypatch.setattr(wandb, "init", init)
    logger = start(tmp_path, mode="online")
    logger.log_metrics({"loss": 1.0}, step=1)
    close_trackers()
    assert [call["mode"] for call in started] == ["online", "offline"]
    assert said(caplog) == ["Weights & Biases failed: connection refused; metrics.csv has everything"]


def test_where_online_does_not_start_offline_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_credentials: None, caplog: pytest.LogCaptureFixture
):
    experiment = Experiment("there")

    def init(mode: str, **arguments: Any) -> Experiment:
        if mode == "online":
            raise wandb.errors.CommError("returned error 401")
        return experiment

    monkeypatch.setattr(wandb, "init", init)
    start(tmp_path, mode="online").log_metrics({"loss": 1.0}, step=1)
    close_trackers()
    assert (experiment.rows, experiment.exit_codes) == ([{"loss": 1.0, "trainer/global_step": 1}], [0])
    assert said(caplog) == [
        "Weights & Biases did not start online: returned error 401; metrics.csv has everything, "
        "and `wandb sync --include-online there` uploads what is missing"
    ]


def test_only_the_first_process_has_a_log_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, Any]]
):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    logger = start(tmp_path, mode="offline")
    logger.log_metrics({"loss": 1.0}, step=1)
    close_trackers()
    assert not started


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mode": "of"}, "mode=of: must be one of auto, online, offline, disabled"),
        ({"tags": ["good", "t" * 65]}, f"tags='{'t' * 65}': a tag has 1 … 64 characters; this one has 65"),
        ({"tags": [""]}, "tags='': a tag has 1 … 64 characters; this one has 0"),
        ({"project": ""}, "project='': must have 1 … 128 characters"),
        ({"project": "p" * 129}, f"project='{'p' * 129}': must have 1 … 128 characters"),
        ({"project": "a/b"}, r"project='a/b': must have 1 … 128 characters, none of them / \ # ? % :"),
        ({"group": ""}, "group='': must have 1 … 128 characters, or be null"),
        ({"job_type": "j" * 129}, f"job_type='{'j' * 129}': must have 1 … 128 characters, or be null"),
        ({"checkpoints": "last"}, "checkpoints=last: must be one of none, best, all"),
        ({"entity": "me/p"}, "entity='me/p': must be a user or a team"),
        ({"entity": ""}, "entity='': must be a user or a team"),
        ({"init_timeout": 0.0}, "init_timeout=0.0: must be seconds, above 0"),
        ({"finish_timeout": float("nan")}, "finish_timeout=nan: must be seconds"),
        ({"finish_timeout": float("inf")}, "finish_timeout=inf: must be seconds, above 0 and at most a day"),
    ],
)
def test_what_wandb_would_refuse_is_refused_before(options: dict[str, Any], line: str):
    with pytest.raises(OptionError) as error:
        WandbLog(**options)
    assert str(error.value).startswith(line)


def test_what_wandb_takes_is_taken():
    """Its own checks are the stricter ones nowhere."""
    options: dict[str, Any] = {"tags": ["t" * 64, "é ü"], "project": "p" * 128, "entity": "my-team_1.x"}
    options |= {"group": "g" * 128, "job_type": "j" * 128}
    logger = WandbLog(**options)
    named = {"run_group": logger.group, "run_job_type": logger.job_type}
    wandb.Settings(run_tags=logger.tags, project=logger.project, entity=logger.entity, **named)


def stuck(*arguments: Any, **options: Any) -> None:
    Event().wait()


def broken(*arguments: Any, **options: Any) -> None:
    raise ConnectionResetError("Connection lost")


@pytest.mark.parametrize(
    ("fails", "rows", "line"),
    [
        ({"log": broken}, 0, "failed: Connection lost"),
        ({"define_metric": broken}, 0, "failed: Connection lost"),
        ({"finish": broken}, 3, "failed: Connection lost"),
        ({"log": stuck}, 0, "was stopped before it had everything"),
        ({"define_metric": stuck}, 0, "was stopped before it had everything"),
        ({"finish": stuck}, 3, "was stopped before it had everything"),
    ],
)
def test_a_failure_is_one_line_and_holds_nothing_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_credentials: None,
    caplog: pytest.LogCaptureFixture,
    fails: dict[str, Any],
    rows: int,
    line: str,
):
    monkeypatch.setattr(wandb_log, "GRACE", 0.1)
    experiment = Experiment("my run/wandb", **fails)
    monkeypatch.setattr(wandb, "init", lambda **arguments: experiment)
    began = time.monotonic()
    logger = start(tmp_path, mode="offline", init_timeout=0.3, finish_timeout=0.2)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step=step)
    close_trackers()
    assert time.monotonic() - began < 30
    assert len(experiment.rows) == rows
    command = "wandb sync --include-online 'my run/wandb'"
    [message] = said(caplog)
    assert message == f"Weights & Biases {line}; metrics.csv has everything, and `{command}` uploads what is missing"


def test_rows_wait_for_a_slow_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_credentials: None):
    """Training doesn't; what it logs meanwhile isn't lost."""
    ready, experiment = Event(), Experiment()

    def init(**arguments: Any) -> Experiment:
        ready.wait(60)
        return experiment

    monkeypatch.setattr(wandb, "init", init)
    logger = start(tmp_path, mode="offline", init_timeout=0.1)
    logger.log_hyperparams({"seed": 0})
    logger.log_metrics({"loss": 1.0}, step=1)
    assert experiment.rows == []
    ready.set()
    close_trackers()
    assert experiment.described["settings"] == {"seed": 0}
    assert experiment.rows == [{"loss": 1.0, "trainer/global_step": 1}]
    assert experiment.exit_codes == [0]


def test_what_waits_for_a_stuck_one_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_credentials: None, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(wandb_log, "WAITING", 5)
    monkeypatch.setattr(wandb_log, "GRACE", 0.1)
    monkeypatch.setattr(wandb, "init", lambda **arguments: Experiment(log=stuck))
    logger = start(tmp_path, mode="offline", finish_timeout=0.1)
    for step in range(20):
        logger.log_metrics({"loss": 1.0}, step=step)
    close_trackers()
    assert said(caplog) == ["Weights & Biases does not answer: 5 calls wait for it; metrics.csv has everything"]


@pytest.mark.parametrize(
    ("end", "exit_code"),
    [(None, 0), (SystemExit(143), 143), (SystemExit(), 0), (SystemExit("no"), 1), (ZeroDivisionError(), 1)],
)
def test_a_run_is_finished_there_only_where_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_credentials: None, end: BaseException | None, exit_code: int
):
    experiment = Experiment()
    monkeypatch.setattr(wandb, "init", lambda **arguments: experiment)
    start(tmp_path, mode="offline")
    try:
        try:
            if end:
                raise end
        finally:
            close_trackers()
    except (SystemExit, ZeroDivisionError):
        pass
    assert experiment.exit_codes == [exit_code]


COMMAND = runs.small("task=lds", "model=stu", "trainer.max_steps=2", "log_every=1", "logger=wandb")


def upload(server: Server, home: Path, *arguments: str | Path) -> None:
    """`wandb sync` to that server."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    command = [sys.executable, "-m", "wandb", "sync", *map(str, arguments)]
    subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True, timeout=120)


def assert_complete(kept: Kept, run: Run) -> None:
    """W&B has the rows of the run, each once, its summary, and what it can be found by."""
    rows = read_metrics(run.metrics)
    assert sorted(kept.points()) == sorted((step, name, value) for step, _, name, value in rows)
    for loss in ("train/loss", "val/loss"):
        assert kept.summary[loss] == {"min": min(value for _, _, name, value in rows if name == loss)}
    summary = run.read_summary()
    assert kept.summary["val/mse"] == {"min": summary["best"]["value"]}
    assert kept.summary["best/step"] == summary["best"]["step"]
    assert kept.summary["test/mse"] == summary["test"]["mse"]
    assert kept.summary["baselines/zero"] == summary["baselines"]["zero"]
    assert (kept.config["task"], kept.config["model"], kept.config["experiment"]) == ("lds", "stu", "none")
    assert kept.config["settings"]["model"]["mixer"]["num_filters"] == 4
    assert kept.config["data"] == run.read_manifest()["data"]


# In the third step, after that with the least loss; in the second from there on, after a validation.
STOP = runs.signalled(signal.SIGTERM, "stu.training:MetricsLog.on_train_batch_end", 3)
KILL = runs.signalled(signal.SIGKILL, "stu.training:MetricsLog.on_train_batch_end", 2)
LONGER = ("trainer.max_steps=5", "trainer.val_check_interval=2")


def assert_rows_in_tensorboard(run: Run) -> None:
    """Each once, also those that a killed start has written after its checkpoint."""
    rows = [(step, name, value) for step, name, value in scalars(run.path / "tensorboard") if name != "epoch"]
    expected = [(step, name, float(np.float32(value))) for step, _, name, value in read_metrics(run.metrics)]
    assert sorted(row for row in rows if not row[1].startswith("run/")) == sorted(expected)
    assert {name for _, name, _ in rows if name.startswith("run/")} == {f"run/{name}" for name in MEASURED}
    options, _ = hyperparameters(run.path / "tensorboard")
    assert (options["model"], options["settings.model.mixer.num_filters"], options["sweep"]) == ("stu", 4.0, "lr")


def assert_a_workspace_names_what_is_logged(written: Written, home: Path) -> None:
    """Every name in it: of options, of results, and of curves."""
    assert workspace(["--json", str(home / "spec.json"), str(home / "runs")]) == 0
    [spec] = json.loads((home / "spec.json").read_text())
    section = spec["spec"]["section"]
    [runs_shown] = section["runSets"]
    panels = [panel["config"] for panel in section["panelBankConfig"]["sections"][0]["panels"]]
    named = [f"{key['section']}:{key['name']}" for key in runs_shown["grouping"]]
    named += [f"config:{one['key']['name']}.value" for one in runs_shown["filters"]["filters"]]
    named += [f"summary:{key['key']['name']}" for key in runs_shown["sort"]["keys"]]
    named += [name for name in runs_shown["runFeed"]["columnPinned"] if name != "run:displayName"]
    named += [panel[axis] for panel in panels for axis in ("xAxis", "yAxis") if axis in panel]
    named += [column["accessor"] for panel in panels for column in panel.get("columns", [])]
    named += [f"config:{panel['groupBy']}" for panel in panels if "groupBy" in panel]
    named += [metric for panel in panels for metric in panel.get("metrics", [])]
    named += [panel["targetKey"] for panel in panels if "targetKey" in panel]
    curves = {name for row in written.rows for name in row}
    known = {f"config:{key}.value" for key in written.config} | {f"summary:{key}" for key in written.summary}
    known |= {f"summary:{key}" for key in curves} | curves | written.summary.keys()
    assert len(named) > 25
    assert set(named) - known == set()


@pytest.mark.thorough
@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:(Pydantic V1 style|.*is deprecated).*:DeprecationWarning")  # of wandb-workspaces
def test_without_a_key_each_start_writes_a_file_and_all_are_one_run_where_they_are_uploaded(tmp_path: Path):
    """With its best weights; and beside it the files of TensorBoard."""
    command = [*(word for word in COMMAND if word != "logger=wandb"), "logger=[wandb,tensorboard]"]
    command += ["logger.wandb.checkpoints=best", *LONGER, "name=run"]
    for at, code in ((STOP, 143), (KILL, 137), (None, 0)):
        done = runs.train(tmp_path, *command, at=at, STU_SWEEP="lr")
        assert (done.code, done.err) == (code, "")
    run = runs.run_of(tmp_path, "lds", "stu", "run")
    assert f"wandbleet{run.path / 'wandb'}" in "".join(done.out.split())  # the table folds long lines
    assert len(list(run.path.glob("wandb/killed-offline-run-*"))) == 1
    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    first, last = (Written(file) for file in files)
    for written in (first, last):
        named = written.run.run_id, written.run.run_group, written.run.job_type, written.run.display_name
        assert named == (run.id, "lr", "sweep", "stu/run")
        assert list(written.run.tags) == ["lds", "stu"]
        assert (written.config["model"], written.config["sweep"]) == ("stu", "lr")
    assert (first.exit_code, first.preempting, len(first.rows)) == (143, True, 4)  # the last is that of a validation
    assert (last.exit_code, last.preempting) == (0, False)
    assert last.summary["val/mse"] == {"min": run.read_summary()["best"]["value"]}
    assert_rows_in_tensorboard(run)
    assert_a_workspace_names_what_is_logged(last, tmp_path)
    with serving() as server:
        upload(server, tmp_path, *(file.parent for file in files))
    assert server.exit_codes == [143, 0]
    [(name, kept)] = server.runs.items()
    assert (name, kept.attributes["groupName"], kept.attributes["jobType"]) == (run.id, "lr", "sweep")
    assert_complete(kept, run)
    [(artifact, given)] = kept.artifacts.items()
    assert (artifact, given["artifactTypeName"]) == (f"{run.id}-best", "model")
    assert {one["alias"] for one in given["aliases"]} == {"best", "latest"}
    best = run.read_summary()["best"]
    assert json.loads(given["metadata"]) == {"step": best["step"], "epoch": best["epoch"], "val/mse": best["value"]}
    sizes = [body["bytes"] for path, body in server.requests if path.endswith("/best.ckpt")]
    assert sizes == [run.best.stat().st_size]


def online(server: Server, home: Path, *overrides: str, **options: Any) -> runs.Finished:
    """A run whose W&B goes to that server."""
    more = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY} | options
    return runs.train(home, *COMMAND, "name=run", *overrides, **more)


def assert_result_and_one_line(done: runs.Finished, home: Path, *parts: str, steps: int = 2) -> None:
    assert done.code == 0, done.err
    assert "Result" in done.out
    [line] = done.err.splitlines()
    for part in ("Weights & Biases ", "; metrics.csv has everything, and `wandb sync --include-online ", *parts):
        assert part in line
    run = runs.run_of(home, "lds", "stu", "run")
    assert run.finished
    assert sum(row[2] == "train/loss" for row in read_metrics(run.metrics)) == steps
    assert Path(line.split("`")[1].split()[-1]).is_dir()


@pytest.mark.e2e
def test_a_server_that_hangs_costs_its_timeout(tmp_path: Path):
    with serving("hang", "middle") as server:
        done = online(server, tmp_path, "logger.wandb.finish_timeout=1")
    assert_result_and_one_line(done, tmp_path, "failed: Timed out finishing run", "/run-2")
    assert server.ids == {runs.run_of(tmp_path, "lds", "stu", "run").id}


@pytest.mark.slow
@pytest.mark.e2e
def test_a_server_that_takes_no_more_is_one_line(tmp_path: Path):
    """A permission or a quota that is missing: W&B raises nothing then. What it says for later works later."""
    with serving("403", "middle") as server:
        done = online(server, tmp_path)
    assert_result_and_one_line(done, tmp_path, "gave up: Fatal error while uploading data;", "/run-2")
    with serving() as server:
        upload(server, tmp_path, *done.err.split("`")[1].split()[2:])
    assert {"train/loss", "val/mse", "test/mse"} <= server.history


def strike(number: int, pid: Path) -> None:
    """Send wandb-core a signal before the third row."""
    log = WandbLog.log_metrics
    calls = iter(range(1000))

    def struck(self: WandbLog, *arguments: Any, **options: Any) -> None:
        if next(calls) == 2:
            assert self._core is not None
            pid.write_text(str(self._core.pid))
            wandb_log.GRACE = 0.5
            self._core.send_signal(number)
        log(self, *arguments, **options)

    WandbLog.log_metrics = struck  # type: ignore[method-assign, assignment]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("number", "part", "finish_timeout"),
    [(signal.SIGKILL, "failed: ", 20), (signal.SIGSTOP, "was stopped before it had everything", 1)],
)
def test_a_wandb_core_that_dies_or_stops_ends_nothing(tmp_path: Path, number: int, part: str, finish_timeout: int):
    with serving() as server:
        at = partial(strike, number, tmp_path / "pid")
        more = ("trainer.max_steps=8", f"logger.wandb.finish_timeout={finish_timeout}")
        done = online(server, tmp_path, *more, at=at)
    assert_result_and_one_line(done, tmp_path, part, steps=8)
    assert server.exit_codes == []
    state = subprocess.run(["ps", "-o", "state=", "-p", (tmp_path / "pid").read_text()], capture_output=True, text=True)
    assert state.stdout.strip() in ("", "Z")


@pytest.mark.slow
@pytest.mark.e2e
def test_a_stopped_run_is_so_there_too_until_it_goes_on(tmp_path: Path):
    with serving() as server:
        assert online(server, tmp_path, *LONGER, at=STOP).code == 143
        done = online(server, tmp_path, *LONGER)
    assert (done.code, done.err) == (0, "")
    assert server.exit_codes == [143, 0]
    run = runs.run_of(tmp_path, "lds", "stu", "run")
    [(name, kept)] = server.runs.items()
    assert (name, kept.attributes["groupName"], kept.attributes["jobType"]) == (run.id, "lds", "train")
    assert kept.preempted
    assert_complete(kept, run)


@pytest.mark.thorough
@pytest.mark.e2e
def test_two_processes_are_one_run_which_the_first_one_logs(tmp_path: Path):
    """Also under an agent of `wandb sweep`, whose trial it then is."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('LOCAL_RANK', '0') != '0': sys.modules['wandb'] = open('refused', 'w').close()\n"
    )
    path = f"{tmp_path}:{runs.ENVIRONMENT['PYTHONPATH']}"
    agent = {"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "trial"}
    with serving() as server:
        more = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
        done = online(server, tmp_path, *more, PYTHONPATH=path, **agent)
    assert done.code == 0, done.err
    assert (tmp_path / "refused").exists()  # to the second process
    [(name, kept)] = server.runs.items()
    assert (name, kept.attributes["sweep"], kept.attributes["jobType"]) == ("trial", "abc", "sweep")
    assert kept.exit_codes == [0]
    assert_complete(kept, runs.run_of(tmp_path, "lds", "stu", "run"))
