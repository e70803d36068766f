"""Progress: a bar on a terminal, elsewhere a line every few seconds, in training, validation and test."""

import os
import re
import sys
import threading
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from stu.training import report
from stu.training.report import EvaluationLines, ProgressLines, Speed
from tests import runs
from tests.training.test_training import Steps, model


class Clock(L.Callback):
    """Time passes at every batch, and at no other moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds, self.lines = 0.0, seconds, []
        monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(report, "print", self.printed, raising=False)

    def printed(self, line: str, **options: Any) -> None:
        self.lines.append((self.now, line))

    def passes(self, *arguments: Any) -> None:
        self.now += self.seconds

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = passes


def lines_of(folder: Path, clock: Clock, **options: Any) -> list[tuple[float, str]]:
    """What a run and the evaluations at its end print, and when."""
    training = runs.Training(folder / "run", Steps(), model(), callbacks=[clock], batch_size=4, **options)
    training.trainer.callbacks.insert(1, ProgressLines(training.plan, training.trainer.callbacks[0]))
    training.fit()
    training.trainer.validate(training.module, training.data, verbose=False)
    training.trainer.test(training.module, training.data, verbose=False)
    return clock.lines


def test_every_batch_is_said_where_batches_are_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = lines_of(tmp_path, Clock(monkeypatch, 20.0), max_steps=3, val_check_interval=2)
    short = [re.sub(r"\((.*)%\).*  ", r"(\1%) … ", line) for _, line in lines]
    assert short == [
        "trying the validation: batch 1 of 1",
        "step 1/3 (33%) … time left 0:00:40",
        "step 2/3 (67%) … time left 0:00:20",
        *(f"validating: batch {batch} of 3" for batch in (1, 2, 3)),
        "step 2/3 (67%) … validated",
        "step 3/3 (100%) … time left 0:00:00",
        *(f"validating: batch {batch} of 3" for batch in (1, 2, 3)),
        "step 3/3 (100%) … validated",
        *(f"validating the best weights: batch {batch} of 3" for batch in (1, 2, 3)),
        *(f"testing: batch {batch} of 2" for batch in (1, 2)),
    ]
    assert {speed for _, line in lines for speed in re.findall(r"seq/s (\S+)", line)} == {"0.2"}  # 4 in 20 s


def test_lines_are_seconds_apart_in_whatever_a_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = lines_of(tmp_path, Clock(monkeypatch, 4.0), max_epochs=10, val_check_interval=7)
    gaps = [after[0] - before[0] for before, after in pairwise(lines)]
    assert max(gaps) == 12.0
    others = [gap for gap, (_, line) in zip(gaps, lines[1:], strict=True) if not line.endswith("validated")]
    assert min(others) > report.SECONDS_BETWEEN_LINES
    assert sum(line.endswith("validated") for _, line in lines) == 6


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch):
    for first in (True, False):
        clock = Clock(monkeypatch, 0.0)
        trainer = SimpleNamespace(is_global_zero=first, num_test_batches=[3])
        lines = EvaluationLines()
        clock.now = 20.0
        lines.on_test_batch_end(trainer, None, None, None, 1)  # type: ignore[arg-type]
        assert [line for _, line in clock.lines] == ["testing: batch 2 of 3"] * first


class TestSpeed:
    def test_it_is_that_of_training_alone(self, monkeypatch: pytest.MonkeyPatch):
        clock, speed = Clock(monkeypatch, 0.5), Speed(8)
        assert speed.shown({}) == {}
        speed.start(10)
        for step in range(11, 500):
            clock.passes()
            speed.update(step)
            if step % 50 == 0:
                clock.now += 100.0  # a validation
                speed.start(step)
            assert speed.shown({})["seq/s"] == pytest.approx(16.0, rel=1e-12)

    def test_it_is_smooth_and_follows(self, monkeypatch: pytest.MonkeyPatch):
        """Steps that take turns being fast and slow have their mean; after a change half a minute counts most."""
        clock, speed = Clock(monkeypatch, 0.0), Speed(1)
        speed.start(0)
        step = 0
        for seconds, expected in ((0.1, 10.0), (1.0, 1.0)):
            began = clock.now
            while clock.now < began + 300:
                clock.now, step = clock.now + seconds * (0.5 + step % 2), step + 1
                speed.update(step)
                if clock.now > began + 200:
                    assert speed.shown({})["seq/s"] == pytest.approx(expected, rel=0.05)
        assert speed.shown({"train/loss": 1.0, "lr/default": 2.0}).keys() == {"train/loss", "seq/s"}


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]):
    """Not taken for styles, which brackets are in Rich, or emoji."""
    report.show_table("Run", [("run", "/runs/[bold]/[/]/:smile:")])
    assert "/runs/[bold]/[/]/:smile:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("terminal", "environment", "bar"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_a_bar_is_shown_where_it_moves(
    terminal: bool, environment: dict[str, str], bar: bool, monkeypatch: pytest.MonkeyPatch
):
    for name in ("TERM", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    controlling, other = os.openpty() if terminal else os.pipe()
    with open(controlling, "rb"), open(other, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(report, "console", Console())
        assert isinstance(report.evaluation_progress(), RichProgressBar) == bar


def impatient() -> None:
    """In a run: no line waits for another."""
    report.SECONDS_BETWEEN_LINES = -1.0


def on_a_terminal(shown: Path) -> None:
    """In a run: stdout is a terminal, and what it shows goes to a file."""
    controlling, terminal = os.openpty()
    os.dup2(terminal, sys.stdout.fileno())

    def copy() -> None:
        with shown.open("wb", buffering=0) as file:
            while part := os.read(controlling, 1 << 16):
                file.write(part)

    threading.Thread(target=copy, daemon=True).start()


@pytest.mark.slow
@pytest.mark.e2e
def test_a_test_alone_shows_its_progress_too(tmp_path: Path):
    command = runs.small("task=lds", "model=stu", "trainer.max_steps=1", "name=run")
    assert runs.train(tmp_path, *command).code == 0
    lines = runs.train(tmp_path, *command, "mode=test", at=impatient).out.splitlines()
    assert lines[:3] == [f"testing: batch {batch} of 3" for batch in (1, 2, 3)]
    shown = tmp_path / "shown"
    assert runs.train(tmp_path, *command, "mode=test", at=partial(on_a_terminal, shown)).code == 0
    assert re.search(r"Testing .* 3/3", shown.read_text())
    assert "testing" not in shown.read_text()
