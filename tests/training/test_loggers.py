"""Weights & Biases: never a prompt, never the death of a run, always its numbers somewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import wandb

from stu.errors import OptionError
from stu.training import Run, loggers
from stu.training.loggers import wandb_logger
from tests import runs

KEY = "0" * 40


class Experiment:
    """As much of a W&B run as our logger touches."""

    def define_metric(self, name: str, **options: Any) -> None: ...


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The arguments of every `wandb.init`, which starts nothing; no key is configured."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Experiment:
        calls.append(arguments)
        return Experiment()

    monkeypatch.setattr(wandb, "init", init)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return calls


def make(tmp_path: Path, **options: Any) -> Any:
    run = Run(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    run.manifest.write_text(json.dumps({"id": "cafe"}))
    return wandb_logger(run, ("lds", "stu"), **options)


def test_what_a_run_is_called(started: list[dict[str, Any]], tmp_path: Path):
    assert make(tmp_path, tags=["mine"], project="p", entity="me") is not None
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


@pytest.mark.parametrize(
    ("mode", "environment", "begins"),
    [
        ("auto", {}, ["offline"]),  # asking for a key is what only online can do
        ("auto", {"WANDB_API_KEY": ""}, ["offline"]),
        ("auto", {"WANDB_API_KEY": KEY}, ["online"]),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, ["offline"]),
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
    mode: str,
    environment: dict[str, str],
    begins: list[str],
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (make(tmp_path, mode=mode) is not None) == bool(begins)
    assert [call["mode"] for call in started] == begins


@pytest.mark.parametrize(
    ("netrc", "base_url", "begins"),
    [
        (f"machine api.wandb.ai login user password {KEY}\n", None, "online"),
        (f"machine api.wandb.ai login user password {KEY}\n", "https://wandb.example.org", "offline"),
        (f"machine wandb.example.org login user password {KEY}\n", "https://wandb.example.org/", "online"),
        ("machine\n", None, "offline"),  # no netrc at all
    ],
)
def test_a_key_in_netrc_counts_for_its_host(
    started: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    netrc: str,
    base_url: str | None,
    begins: str,
):
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    make(tmp_path)
    assert [call["mode"] for call in started] == [begins]


def test_where_nothing_starts_there_is_no_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    def init(**arguments: Any) -> None:
        started.append(arguments)
        raise wandb.errors.CommError("connection\nrefused")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    assert make(tmp_path, mode="online") is None
    assert [call["mode"] for call in started] == ["online", "offline"]
    assert [record.getMessage() for record in caplog.records] == [
        f"Weights & Biases did not start {mode}: connection refused" for mode in ("online", "offline")
    ]


def test_only_the_first_process_has_a_log_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, Any]]
):
    monkeypatch.setattr(loggers.rank_zero_only, "rank", 1)
    assert make(tmp_path, mode="offline") is None
    assert not started


def test_an_unknown_mode_is_named(tmp_path: Path):
    with pytest.raises(OptionError, match="mode=of: must be one of auto, online, offline, disabled"):
        make(tmp_path, mode="of")


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


def soon() -> None:
    """Do not wait for a server long."""
    loggers.SECONDS_TO_START = 1.0


@pytest.mark.slow
@pytest.mark.e2e
def test_an_unreachable_server_is_one_line_and_an_offline_log_file(tmp_path: Path):
    done = runs.train(
        tmp_path, *COMMAND, "name=run", at=soon, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY
    )  # fmt: skip
    assert done.code == 0, done.err
    [line] = done.err.splitlines()
    assert line.startswith("Weights & Biases did not start online: ")
    assert runs.run_of(tmp_path, "lds", "stu", "run").finished
    [path] = log_files(tmp_path / "runs")
    assert b"test/mse" in path.read_bytes()


@pytest.mark.slow
@pytest.mark.e2e
def test_disabled_is_disabled(tmp_path: Path):
    done = runs.train(tmp_path, *COMMAND, "logger.mode=disabled", "name=run", WANDB_API_KEY=KEY)
    assert (done.code, done.err) == (0, "")
    assert not list(tmp_path.rglob("*wandb*"))
    assert "wandb leet" not in done.out
