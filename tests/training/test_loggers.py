"""Weights & Biases: never a prompt, never the death of a run nor its delay, always its numbers somewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from stu.errors import OptionError
from stu.training import Run, WandbLog, wandb_log
from stu.training.loggers import read_metrics
from stu.training.wandb_log import close_wandb
from tests import runs
from tests.wandb_server import Server, serving

KEY = "0" * 40


class Experiment:
    """As much of a W&B run as our logger touches. `fails` is called in place of the method of that name."""

    def __init__(self, folder: str = "", **fails: Callable[..., None]) -> None:
        self.settings = SimpleNamespace(sync_dir=folder)
        self.config = SimpleNamespace(update=lambda params, **options: self.rows.append(params))
        self.rows: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.__dict__ |= fails

    def define_metric(self, name: str, **options: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no settings of a user, no wandb-core; wandb forgets what it knew before and after."""
    monkeypatch.setattr("wandb.sdk.wandb_setup._WandbSetup.ensure_service", lambda self: None)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()
    yield
    close_wandb()
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


def a_run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    run.manifest.write_text(json.dumps({"id": "cafe"}))
    return run


def start(tmp_path: Path, **options: Any) -> WandbLog:
    logger = WandbLog(**options)
    logger.start(a_run(tmp_path), ("lds", "stu"))
    return logger


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
        "project": "p",
        "entity": "me",
    }
    assert {key: call[key] for key in expected} == expected
    assert call["tags"] == ["lds", "stu", "mine"]
    assert call["resume"] == "allow"  # the same id continues the same run
    assert call["settings"].finish_timeout == 7.0


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
    close_wandb()
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
    close_wandb()
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
    close_wandb()
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
    logger = WandbLog(**options)
    wandb.Settings(run_tags=logger.tags, project=logger.project, entity=logger.entity)


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
    close_wandb()
    assert time.monotonic() - began < 5
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
    close_wandb()
    assert experiment.rows == [{"seed": 0}, {"loss": 1.0, "trainer/global_step": 1}]
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
    close_wandb()
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
            close_wandb()
    except (SystemExit, ZeroDivisionError):
        pass
    assert experiment.exit_codes == [exit_code]


COMMAND = runs.small("task=lds", "model=stu", "trainer.max_steps=2", "log_every=1", "logger=wandb")
# The keys that the log file of such a run has.
WRITTEN = (b"train/loss", b"lr/default", b"gradient_norm", b"val/mse", b"test/mse", b"model/mixer/num_filters")


def log_files(home: Path) -> list[Path]:
    """The offline W&B files under a folder."""
    return sorted(home.rglob("offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.e2e
def test_without_a_key_each_run_of_a_sweep_writes_an_offline_log_file(tmp_path: Path):
    done = runs.train(tmp_path, "-m", *COMMAND, "seed=0,1")
    assert (done.code, done.err) == (0, "")
    written = log_files(tmp_path / "runs")
    assert len(written) == 2
    for path in written:
        manifest = json.loads((path.parents[2] / "manifest.json").read_text())
        assert path.name == f"run-{manifest['id']}.wandb"
        content = path.read_bytes()
        assert [key for key in WRITTEN if key not in content and key.replace(b"/", b".") not in content] == []
        assert f"wandbleet{path.parents[1]}" in "".join(done.out.split())  # the table folds long lines


def online(server: Server, home: Path, *overrides: str, name: str = "run", **options: Any) -> runs.Finished:
    """Runs of that name, or of several, whose W&B goes to that server."""
    sweep = ("-m",) if "," in name else ()
    more = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY} | options
    return runs.train(home, *sweep, *COMMAND, f"name={name}", *overrides, **more)


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
        done = online(server, tmp_path, "logger.finish_timeout=1")
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
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "WANDB_BASE_URL": server.url}
        command = [sys.executable, "-m", *done.err.split("`")[1].split()]
        environment |= {"WANDB_API_KEY": KEY}
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
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
    ("number", "part", "name", "finish_timeout"),
    [
        (signal.SIGKILL, "failed: ", "run,next", 20),
        (signal.SIGSTOP, "was stopped before it had everything", "run", 1),
    ],
)
def test_a_wandb_core_that_dies_or_stops_ends_nothing(
    tmp_path: Path, number: int, part: str, name: str, finish_timeout: int
):
    """Nor does it reach the next run of a sweep."""
    with serving() as server:
        at = partial(strike, number, tmp_path / "pid")
        more = ("trainer.max_steps=8", f"logger.finish_timeout={finish_timeout}")
        done = online(server, tmp_path, *more, name=name, at=at)
    assert_result_and_one_line(done, tmp_path, part, steps=8)
    assert server.exit_codes == [0] * name.count(",")
    state = subprocess.run(["ps", "-o", "state=", "-p", (tmp_path / "pid").read_text()], capture_output=True, text=True)
    assert state.stdout.strip() in ("", "Z")


@pytest.mark.slow
@pytest.mark.e2e
def test_a_stopped_run_is_so_there_too_until_it_goes_on(tmp_path: Path):
    with serving() as server:
        stop = runs.signalled(signal.SIGTERM, "stu.training:MetricsLog.on_train_batch_end", 2)
        assert online(server, tmp_path, "trainer.max_steps=4", at=stop).code == 143
        done = online(server, tmp_path, "trainer.max_steps=4")
    assert (done.code, done.err) == (0, "")
    assert server.exit_codes == [143, 0]
    assert server.ids == {runs.run_of(tmp_path, "lds", "stu", "run").id}


@pytest.mark.slow
@pytest.mark.e2e
def test_disabled_is_disabled(tmp_path: Path):
    done = runs.train(tmp_path, *COMMAND, "logger.mode=disabled", "name=run", WANDB_API_KEY=KEY)
    assert (done.code, done.err) == (0, "")
    assert not list(tmp_path.rglob("*wandb*"))
    assert "wandb leet" not in done.out
