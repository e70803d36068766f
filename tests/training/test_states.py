"""Checkpoint files: whatever is damaged, wherever a run is killed, a run goes on from whole ones and loses nothing."""

import errno
import math
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torchmetrics import Metric

from stu.errors import OptionError
from stu.training import Run, Stopped, evaluate, states
from tests.runs import Training, assert_identical
from tests.training.test_training import Nth, Steps, model

LAST, BEST, PREVIOUS, COPY = states.NAMES


class Scripted(Steps):
    """The second of four validations is the best, and with it the value of the best weights after training."""

    def __init__(self, *, after: float = 1.0) -> None:
        super().__init__()
        self.values = [3.0, 1.0, 2.0, 4.0, after, 5.0]

    def metrics(self) -> dict[str, Metric]:
        return {"mse": Nth(self.values)}


class StopAfter(L.Callback):
    """Ask for a stop in this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.step:
            trainer.checkpoint_callback.signal_number = signal.SIGTERM


def training(folder: Path, *callbacks: L.Callback, after: float = 1.0, steps: int = 8) -> Training:
    """Validated after every second step, with a checkpoint after each."""
    task = Scripted(after=after)
    options: Any = {
        "max_steps": steps,
        "max_epochs": None,
        "val_check_interval": 2,
        "checkpoints": {"every_n_steps": 1},
    }
    return Training(folder, task, model(dropout=0.1), callbacks=callbacks, **options)


def resumed(folder: Path) -> Training:
    """The same run, from its last checkpoint to its end; what the validations before gave is known."""
    again = training(folder)
    done = states.latest_step(folder / "checkpoints")
    again.module.eval_metrics["mse"].values = iter(again.module.task.values[done // 2 :])  # type: ignore
    again.csv.rewind(done)
    return again.fit(folder / "checkpoints" / LAST)


def content(path: Path) -> dict[str, Any]:
    """A checkpoint without its times."""
    state = torch.load(path, weights_only=True)
    state["callbacks"]["Checkpoints"].pop("seconds")
    return state


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its seventh step; the best are those after the fourth."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    with pytest.raises(Stopped):
        training(folder, StopAfter(7)).fit()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    training(folder).fit()
    return folder


def steps(folder: Path) -> dict[str, tuple[int, int]]:
    """Steps, and steps of the best, of every file."""
    found = [states.checked(path) for path in (folder / "checkpoints").iterdir()]
    return {state.path.name: (state.step, state.best.step) for state in found}


def test_of_the_best_there_are_two_files_and_one_before_the_last(interrupted: Path):
    assert steps(interrupted) == {LAST: (7, 4), BEST: (4, 4), COPY: (4, 4), PREVIOUS: (6, 4)}
    folder = interrupted / "checkpoints"
    assert_identical(content(folder / BEST), content(folder / COPY))
    inodes = {path.stat().st_ino for path in folder.iterdir()}
    assert len(inodes) == 4  # what happens to one file happens to no other
    assert states.mend(folder) == []
    assert len(list(folder.iterdir())) == 4


def damages(data: bytes, seed: int) -> bytes:
    """Emptied, cut somewhere, or with one to three bits flipped, a third of them in the table of contents."""
    draw = random.Random(seed)
    kind = draw.choice(["empty", "cut", "flip", "flip", "flip"])
    if kind == "empty":
        return b""
    if kind == "cut":
        return data[: draw.randrange(1, len(data))]
    damaged = bytearray(data)
    start = draw.choice([0, 0, len(data) - 4000])
    for _ in range(draw.randint(1, 3)):
        damaged[draw.randrange(start, len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("name", states.NAMES)
def test_whichever_file_is_damaged_another_takes_its_place(interrupted: Path, tmp_path: Path, name: str):
    original = {path.name: (path.read_bytes(), content(path)) for path in (interrupted / "checkpoints").iterdir()}
    for seed in range(5):
        folder = tmp_path / str(seed) / "checkpoints"
        shutil.copytree(interrupted / "checkpoints", folder)
        file = folder / name
        file.write_bytes(damages(original[name][0], seed))
        noticed = not states.is_whole(file)
        remarks = states.mend(folder)
        assert_identical(content(folder / BEST), original[BEST][1])
        last = PREVIOUS if noticed and name == LAST else LAST
        assert_identical(content(folder / LAST), original[last][1])
        if not noticed:  # a bit between the parts of the file
            assert_identical(content(file), original[name][1])
        assert len(remarks) == (noticed and name in (LAST, BEST))
        assert all(f"{file} is damaged" in remark for remark in remarks)
        assert states.mend(folder) == []  # once is enough


def test_every_bit_of_a_small_checkpoint(tmp_path: Path):
    """A sample of them; all 18,624 gave the same."""
    file = tmp_path / "file.ckpt"
    kept = {"best_value": 0.5, "best_step": 7, "seconds": 1.0}
    state = {"global_step": 7, "callbacks": {"Checkpoints": kept}, "state_dict": {"w": torch.randn(4)}}
    torch.save(state, file)
    data = file.read_bytes()
    contents = data.index(b"PK\x01\x02")  # where the table of contents begins
    damaged = 0
    for place in [*range(0, contents, 97), *range(contents, len(data), 3)]:
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        try:
            assert_identical(states.read(file), state)
        except states.Damaged:
            damaged += 1
    assert damaged > 100


def test_what_pytorch_would_take_for_a_folder_is_damaged(tmp_path: Path):
    """It then gives weights that are nobody's, and zip has no objection."""
    file = tmp_path / "file.ckpt"
    torch.save({"state_dict": {"w": torch.ones(4)}}, file)
    data = bytearray(file.read_bytes())
    header = data.rindex(b"file/data/0") - 46
    assert data[header : header + 4] == b"PK\x01\x02"
    data[header + 38] ^= 16  # in the attributes of the part
    file.write_bytes(data)
    with pytest.raises(states.Damaged, match="table of contents"):
        states.read(file)


@pytest.mark.parametrize("names", [(LAST,), (LAST, PREVIOUS), (LAST, PREVIOUS, BEST)])
def test_a_run_with_damaged_files_ends_as_if_they_were_whole(
    interrupted: Path, whole: Path, tmp_path: Path, names: tuple[str, ...]
):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    for name in names:
        file = folder / "checkpoints" / name
        file.write_bytes(file.read_bytes()[:5000])
    remarks = states.mend(folder / "checkpoints")
    assert any("previous.ckpt, of step 6" in r or "ckpt, of step 4" in r for r in remarks)
    assert (folder / "checkpoints" / f"{LAST}.damaged").stat().st_size == 5000
    again = resumed(folder)
    for name in (LAST, BEST):
        assert_identical(content(folder / "checkpoints" / name), content(whole / "checkpoints" / name))
    assert again.rows("train/loss") == rows(whole, "train/loss")
    assert again.rows("val/loss") == rows(whole, "val/loss")


def rows(folder: Path, metric: str) -> dict[int, float]:
    return training(folder).rows(metric)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (states.NAMES, "last.ckpt is damaged (.*), best.ckpt is .*; no other checkpoint is there; overwrite=true"),
        ((BEST, COPY), "no file has the weights of the best validation, of step 4; .*last.ckpt tests those of step 7"),
    ],
)
def test_what_nothing_can_replace_is_named_before_training_goes_on(
    interrupted: Path, tmp_path: Path, names: tuple[str, ...], why: str
):
    folder = shutil.copytree(interrupted / "checkpoints", tmp_path / "run" / "checkpoints")
    for name in names:
        (folder / name).write_bytes(b"no checkpoint")
    with pytest.raises(OptionError, match=why) as error:
        states.mend(folder)
    assert (error.value.name, error.value.value) == ("name", folder.parent)


def test_what_is_newer_and_yet_of_no_use_is_kept(interrupted: Path, tmp_path: Path):
    """Where a lost best one takes the last one with it, an earlier pair goes on."""
    folder = shutil.copytree(interrupted / "checkpoints", tmp_path / "checkpoints")
    for name in (BEST, COPY):
        (folder / name).write_bytes(b"damaged")
    state = torch.load(folder / PREVIOUS, weights_only=True)
    state["callbacks"]["Checkpoints"] |= {"best_step": 6, "best_value": 0.5}
    torch.save(state, folder / PREVIOUS)
    last, best = states.mend(folder)
    assert f"{LAST} is whole, but the weights of its best validation are lost; {PREVIOUS}, of step 6," in last
    assert f"{BEST} is damaged (File is not a zip file); {PREVIOUS}, of step 6," in best
    assert states.checked(folder / f"{LAST}.damaged").step == 7
    assert [states.checked(folder / name).step for name in (LAST, BEST)] == [6, 6]


def test_files_of_0_bytes_are_none(tmp_path: Path):
    (tmp_path / LAST).touch()
    assert states.mend(tmp_path) == [f"{tmp_path / LAST} is empty: the run starts again"]
    assert states.latest_step(tmp_path) == 0
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    run.last.touch()
    assert not run.trained
    run.last.write_bytes(b"damaged")
    assert run.trained


def test_killed_anywhere_in_a_save(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As it is on the disk before every call that changes something there, and in the middle of a file."""
    moments = tmp_path / "moments"
    folder = tmp_path / "run" / "checkpoints"
    written: dict[int, dict[str, Any]] = {}
    seen, saving = set(), [0]

    def moment() -> None:
        files = sorted((p.name, p.stat().st_ino, p.stat().st_size) for p in folder.glob("*") if p.exists())
        if files and str(files) not in seen:
            seen.add(str(files))
            completed = max((step for step in written if step < saving[-1]), default=0)
            shutil.copytree(folder, moments / f"{len(seen):03}-{completed}")

    def watched(owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            moment()
            return None if owner is os else call(*arguments, **options)  # this disk need not be waited for

        monkeypatch.setattr(owner, name, wrapped)

    class Half(L.Callback):
        """A file of which half is written; and what the states are."""

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
            saving.append(trainer.global_step)
            for name in (LAST, BEST):
                (folder / f".{name}.tmp").write_bytes(b"PK")
            moment()
            written[trainer.global_step] = {k: v.clone() for k, v in checkpoint["state_dict"].items()}

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "hardlink_to")):
        watched(owner, name)
    training(tmp_path / "run", Half(), steps=5).fit()
    moment()
    monkeypatch.undo()
    found = sorted(moments.iterdir())
    assert len(found) > 25
    for where in found:
        completed = int(where.name.split("-")[1])
        assert states.mend(where) == []
        survey = states.Survey(where)  # of what was mended
        assert (0 if survey.latest is None else survey.latest.step) >= completed
        assert survey.damaged == {}
        for state in survey.whole:
            assert_identical(dict(torch.load(state.path, weights_only=True)["state_dict"]), written[state.step])


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file can be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestNoRoom:
    def test_while_it_is_saved(self, whole: Path, tmp_path: Path):
        """The earlier checkpoint stays as it was, and the run goes on from it."""
        size = (whole / "checkpoints" / LAST).stat().st_size

        class Filled(L.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx == 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

        folder = tmp_path / "run"
        with small_files(resource.RLIM_INFINITY), pytest.raises(OptionError) as error:
            training(folder, Filled()).fit()
        assert (error.value.name, error.value.value) == ("paths.runs", folder / "checkpoints" / LAST)
        needed = re.match(r"cannot be written, which takes (\d+) KiB: File too large; earlier", error.value.allowed)
        assert needed
        assert int(needed[1]) == pytest.approx(size / 2**10, abs=1)
        assert steps(folder) == {LAST: (4, 4), BEST: (4, 4), PREVIOUS: (3, 2), COPY: (2, 2)}  # and nothing half
        resumed(folder)
        for name in (LAST, BEST):
            assert_identical(content(folder / "checkpoints" / name), content(whole / "checkpoints" / name))

    def test_spare_files_make_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """With room for three files and no more, training goes on, as it would without spare ones."""
        save, refused = torch.save, 0

        def full(state: Any, file: Any) -> None:
            nonlocal refused
            folder = tmp_path / "run" / "checkpoints"
            if hasattr(file, "name") and len(list(folder.glob("[!.]*"))) > 2:
                refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(state, file)

        monkeypatch.setattr(torch, "save", full)
        training(tmp_path / "run").fit()
        assert refused > 3
        assert {LAST, BEST} < steps(tmp_path / "run").keys()

    def test_before_the_first_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("stu.training.callbacks.shutil.disk_usage", lambda path: usage)
        run = training(tmp_path / "run")
        with pytest.raises(OptionError, match=r"cannot be written, which takes .* No space left on device"):
            run.fit()
        assert run.trainer.global_step == 0

    def test_where_nothing_can_be_written(self, tmp_path: Path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").touch()  # where the folder should be
        run = training(tmp_path / "run")
        with pytest.raises(OptionError, match=r"paths.runs=.*checkpoints: cannot be written.*: File exists"):
            run.fit()
        assert run.trainer.global_step == 0

    def test_nothing_passes_through_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
        training(tmp_path / "run").fit()


class TestTheEnd:
    def test_another_value_of_the_best_weights_is_noted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        """Not an end: another machine rounds in another way."""
        summaries = []
        for after in (1.0 + 5e-7, 1.0 + 6e-6):
            folder = tmp_path / str(after)
            done = training(folder, after=after).fit()
            (folder / "checkpoints" / ".best.ckpt.tmp").touch()  # left by a killed process
            evaluate.finish(Run(folder), done.trainer, done.module, done.data, done.checkpoints, {"zero": 9.0}, {})
            summaries.append(Run(folder).read_summary())
            assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [BEST, LAST]
        assert [summary["best"]["value"] for summary in summaries] == [1.0, 1.0]
        assert summaries[0]["baselines"] == {"zero": 9.0}
        assert ["note" in summary for summary in summaries] == [False, True]
        note = summaries[1]["note"]
        now = summaries[1]["best"]["val"]["mse"]
        assert now == pytest.approx(1.0 + 6e-6, abs=1e-7)
        assert note.startswith(f"val/mse of the best weights is {now} now and was 1.0 in training: ")
        assert capsys.readouterr().err == f"note: {note}\n"

    def test_the_best_weights_come_from_the_file_that_has_them(self, tmp_path: Path):
        folder = tmp_path / "run"
        done = training(folder).fit()
        (folder / "checkpoints" / BEST).write_bytes(b"damaged")
        evaluate.finish(Run(folder), done.trainer, done.module, done.data, done.checkpoints, {}, {})
        summary = Run(folder).read_summary()
        assert (summary["best"]["step"], summary["best"]["val"]["mse"]) == (4, 1.0)
        assert math.isfinite(summary["test"]["loss"])

    def test_without_any_it_ends_in_one_line(self, tmp_path: Path):
        folder = tmp_path / "run"
        done = training(folder).fit()
        for name in (BEST, COPY):
            shutil.copy(folder / "checkpoints" / LAST, folder / "checkpoints" / name)  # whole, but of other weights
        with pytest.raises(OptionError, match="no file has the weights of the best validation, of step 4"):
            evaluate.finish(Run(folder), done.trainer, done.module, done.data, done.checkpoints, {}, {})
        assert not Run(folder).finished
