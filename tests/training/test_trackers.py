"""Loggers beside metrics.csv other than Weights & Biases: what they write, that they go on, that they end no run."""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter

from stu.errors import OptionError
from stu.training import Run, TensorBoardLog, TrackioLog
from stu.training.trackers import RUNNING, Tracker, close_trackers, log_figure, log_summary
from tests.event_files import hyperparameters, images, scalars

CHOICES = {"task": "lds", "model": "stu", "optimizer": "adamw", "hydra/launcher": "local", "paths": "default"}
SUMMARY = {"steps": 4, "seconds": 1.5, "parameters": 7, "best": {}, "test": {"mse": 0.5}}


def a_run(tmp_path: Path, starts: int = 1, last_step: int = 0) -> Run:
    run = Run(tmp_path / "lds" / "stu" / "run")
    run.path.mkdir(parents=True, exist_ok=True)
    manifest = {"id": "cafe", "seed": 3, "monitor": "mse", "settings": {"optimizer": {"lr": 0.1, "betas": [0.9]}}}
    run.manifest.write_text(json.dumps(manifest | {"starts": [{"device": "a CPU"}] * starts}))
    if last_step:
        run.checkpoints.mkdir()
        run.last.write_text("a checkpoint")
        run.__class__ = type("At", (Run,), {"last_step": last_step})
    return run


def picture(tmp_path: Path) -> Path:
    file = tmp_path / "filters.png"
    Image.new("RGB", (3, 2)).save(file)
    return file


def use(logger: Tracker, run: Run, file: Path) -> None:
    """As a run does."""
    logger.start(run, CHOICES, {"zero": 1.0})
    logger.log_hyperparams({"optimizer": {"lr": 0.1}})
    logger.log_metrics({"train/loss": 1.5, "epoch": 0.5}, step=2)
    logger.save()
    logger.log_metrics({"train/loss": float("nan")}, step=4)
    log_figure(logger, "figures/filters", file, 4)
    log_summary(logger, SUMMARY)
    close_trackers()


def test_tensorboard_has_all_that_is_logged(tmp_path: Path):
    run, file = a_run(tmp_path), picture(tmp_path)
    use(TensorBoardLog(), run, file)
    folder = run.path / "tensorboard"
    rows = scalars(folder)
    assert rows[:2] == [(2, "train/loss", 1.5), (2, "epoch", 0.5)]
    assert [(step, name, str(value)) for step, name, value in rows[2:]] == [
        (4, "train/loss", "nan"), (4, "run/seconds", "1.5"), (4, "run/parameters", "7.0"),
    ]  # fmt: skip
    assert images(folder) == {"figures/filters": (4, file.read_bytes())}
    values, results = hyperparameters(folder)
    assert results == ["test/mse", "best/val/mse"]
    told = {"task": "lds", "model": "stu", "optimizer": "adamw", "seed": 3.0, "device": "a CPU", "baselines.zero": 1.0}
    told |= {"settings.optimizer.lr": 0.1, "settings.optimizer.betas": "[0.9]", "run": str(run.path), "monitor": "mse"}
    assert values == told


@pytest.mark.parametrize("last_step", [2, 0])
def test_a_start_that_goes_on_writes_no_row_twice(tmp_path: Path, last_step: int):
    """Also where the one before was killed before its first checkpoint."""
    first, again = TensorBoardLog(), TensorBoardLog()
    first.start(a_run(tmp_path), CHOICES, {})
    for step in range(1, 5):
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()  # and is killed
    again.start(a_run(tmp_path, starts=2, last_step=last_step), CHOICES, {})
    for step in range(last_step + 1, 4):
        again.log_metrics({"loss": float(step)}, step=step)
    close_trackers()
    folder = tmp_path / "lds/stu/run/tensorboard"
    assert scalars(folder) == [(step, "loss", float(step)) for step in range(1, 4)]
    assert len(list(folder.iterdir())) == 2  # also where both began in one second


@pytest.mark.parametrize("fails", ["__init__", "write_event", "flush", "close"])
def test_a_disk_that_is_full_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
):
    logger, works = TensorBoardLog(), getattr(EventsWriter, fails)

    def full(*arguments: Any) -> Any:
        if fails == "write_event" and not hasattr(logger, "writer"):  # the file is being opened
            return works(*arguments)
        raise OSError("No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, fails, full)
        use(logger, a_run(tmp_path), picture(tmp_path))
    if hasattr(logger, "writer"):
        logger.writer.close()
    [record] = caplog.records
    line = "tensorboard failed: OSError: No space left on device; metrics.csv has everything"
    assert record.getMessage() == line
    assert RUNNING == []


@pytest.mark.parametrize(("logger", "package"), [(TensorBoardLog, "tensorboardX"), (TrackioLog, "trackio")])
def test_a_package_that_is_missing_is_said_before_anything_starts(
    logger: Any, package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"{logger.__module__}.find_spec", lambda name: None if name == package else find_spec(name))
    extra = logger.title
    with pytest.raises(OptionError) as error:
        logger()
    assert str(error.value) == f'logger={extra}: needs {package}: pip install -e ".[{extra}]"'


def test_the_other_processes_of_a_run_log_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    run = a_run(tmp_path)
    use(TensorBoardLog(), run, picture(tmp_path))
    assert [file.name for file in run.path.iterdir()] == ["manifest.json"]


class Recorded(ModuleType):
    """As much of trackio as our logger touches, by the signatures of 0.43."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.given: dict[str, Any] = {}
        self.rows: list[tuple[dict[str, Any], int | None]] = []
        self.finished = 0

    def init(
        self, project: str, name: str | None = None, group: str | None = None, config: dict[str, Any] | None = None,
        resume: str = "never", embed: bool = True, auto_log_gpu: bool | None = None, auto_log_cpu: bool | None = None,
    ) -> Any:  # fmt: skip
        print("* Trackio project initialized")
        self.given = {"project": project, "name": name, "group": group, "config": config, "resume": resume}
        assert (embed, auto_log_gpu, auto_log_cpu) == (False, False, False)
        return SimpleNamespace(log=self.log)

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append((metrics, step))

    def finish(self) -> None:
        print("* Run finished")
        self.finished += 1

    @staticmethod
    def Image(value: str, caption: str | None = None) -> tuple[str, str]:
        return "image", value


def test_what_trackio_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    trackio = Recorded()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setenv("TRACKIO_DIR", "")  # also that it is put back
    monkeypatch.delenv("TRACKIO_DIR")
    monkeypatch.setenv("STU_SWEEP", "lr")
    run, file = a_run(tmp_path), picture(tmp_path)
    use(TrackioLog(project="p"), run, file)
    assert os.environ["TRACKIO_DIR"] == str(run.path / "trackio")
    config = trackio.given.pop("config")
    assert trackio.given == {"project": "p", "name": "lds-stu-run-cafe", "group": "lr", "resume": "allow"}
    told = {"task": "lds", "model": "stu", "seed": 3, "settings.optimizer.lr": 0.1, "baselines.zero": 1.0}
    assert config.items() >= (told | {"sweep": "lr"}).items()
    assert trackio.rows[0] == ({"train/loss": 1.5, "epoch": 0.5}, 2)
    assert trackio.rows[2:] == [
        ({"figures/filters": ("image", str(file))}, 4),
        ({"run/seconds": 1.5, "run/parameters": 7.0}, 4),
    ]
    assert trackio.finished == 1
    assert capsys.readouterr() == ("", "")


REAL = """
import sqlite3, sys
from pathlib import Path
from tests.training.test_trackers import a_run, picture, use
from stu.training import TrackioLog
home = Path(sys.argv[1])
for starts in (1, 2):
    use(TrackioLog(), a_run(home, starts), picture(home))
[file] = (home / "lds/stu/run/trackio").glob("*.db")
rows = sqlite3.connect(file).execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
print(*(" ".join(map(str, row)) for row in rows), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason='needs trackio: pip install -e ".[trackio]"')
def test_trackio_keeps_it_in_the_run(tmp_path: Path):
    """In a process of its own: trackio reads its folder once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    command = [sys.executable, "-c", REAL, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = done.stdout.splitlines()
    assert len({row.split()[0] for row in rows}) == 1  # one run
    assert {row.split()[1] for row in rows} == {"lds-stu-run-cafe"}
    assert sum("train/loss" in row for row in rows) == 4
    assert sum("figures/filters" in row for row in rows) == 2
