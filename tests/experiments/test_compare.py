"""The comparison of runs: what it reads from complete, unfinished and broken run directories, its order and files."""

import csv
import errno
import fcntl
import importlib
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from experiments.compare.__main__ import _parser, main
from experiments.compare.runs import Row, best_first, find, is_locked, read
from experiments.compare.sweeps import sweeps
from stu.training import MetricsCSV, Run

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"lds": "data.systems.lds.LDS", "lra_listops": "data.lra.listops.ListOps"}
MONITORS = {"lds": "mse", "lra_listops": "accuracy"}
STEPS_PER_EPOCH = 12  # of which neither 7 nor 10 steps are an exact fraction
SPOILT = ("config.yaml", "manifest.json", "summary.json", "metrics.csv")


def make_run(
    home: Path,
    where: str = "lds/stu/a",
    *,
    seed: int = 0,
    val: Mapping[int, float] | None = None,
    rates: Sequence[float] = (),
    tokens: Sequence[float] = (),
    peaks: Sequence[float] = (),
    test: float | None = None,
    best: float = 0.5,
    started: bool = True,
    trainer: Mapping[str, Any] | None = None,
) -> Run:
    """A run directory, written by the code that writes real ones; with `test` it is finished."""
    task = where.split("/")[0]
    run = Run(home / where)
    trainer = trainer or {"max_epochs": 3, "max_steps": -1}
    run.open({"seed": seed, "task": {"_target_": TARGETS[task]}, "trainer": dict(trainer)}, overwrite=False)
    if started:
        mode = {"mse": "min", "accuracy": "max"}[MONITORS[task]]
        facts = {"seed": seed, "data": "f00", "monitor": MONITORS[task], "mode": mode, "total_steps": 36}
        run.record_start(device="cpu", parameters=1234, **facts)
    log = MetricsCSV(run.metrics)
    for step, rate in enumerate(rates, start=1):
        log.log_metrics({"epoch": step / STEPS_PER_EPOCH, "time/sequences_per_second": rate}, step=step)
    for metric, values in (("time/tokens_per_second", tokens), ("memory/peak_bytes", peaks)):
        for step, value in enumerate(values, start=1):
            log.log_metrics({"epoch": step / STEPS_PER_EPOCH, metric: value}, step=step)
    for step, value in (val or {}).items():
        row = {"val/loss": -value, f"val/{MONITORS[task]}": value}
        log.log_metrics({"epoch": step / STEPS_PER_EPOCH, **row}, step=step)
    if test is not None:
        metric = MONITORS[task]
        summary = {
            "test": {"loss": 9.0, metric: test},
            "best": {"metric": f"val/{metric}", "value": best, "step": 12, "epoch": 1.0, "val": {metric: best}},
            "baselines": {},
            "steps": 36,
            "seconds": 3725.4,
            "parameters": 1234,
        }
        run.finish(summary)
    run.close()
    return run


def refused_by_the_file_system(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def shown(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The cells of the lines below the rule."""
    lines = capsys.readouterr().out.splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines[2:] if line.strip()]


class TestARow:
    def test_of_a_finished_run(self, tmp_path: Path):
        run = make_run(tmp_path, seed=5, val={12: 0.7, 24: 0.5, 36: 0.6}, rates=[10, 400, 30], test=0.25)
        row = read(run.path)
        assert row == Row(
            task="lds", model="stu", name="a", seed=5, metric="mse", mode="min", test=0.25, best_val=0.5,
            parameters=1234, sequences_per_second=30.0, tokens_per_second=None, peak_memory=None, seconds=3725.4,
            status="finished", step=36, total_steps=36, unreadable=(), path=str(run.path), device="cpu",
            started=row.started, command=row.command, best_step=12, best_epoch=1.0, tests={"loss": 9.0, "mse": 0.25},
            config=row.config,
        )  # fmt: skip
        assert row.config["trainer"] == {"max_epochs": 3, "max_steps": -1}
        assert (row.started or "").startswith("20")
        assert row.command

    @pytest.mark.parametrize(("task", "best"), [("lds", 0.2), ("lra_listops", 0.6)])
    def test_of_a_stopped_one_has_the_best_so_far(self, tmp_path: Path, task: str, best: float):
        row = read(make_run(tmp_path, f"{task}/stu/a", val={7: 0.3, 10: 0.2, 12: 0.6, 13: math.nan, 14: 0.4}).path)
        assert (row.metric, row.best_val, row.test, row.parameters) == (MONITORS[task], best, None, 1234)
        assert (row.status, row.state) == ("stopped", "stopped at step 14 of 36")
        (tmp_path / row.path / "pruned.json").write_text("{}")  # by a search
        assert read(tmp_path / row.path).state == "pruned at step 14 of 36"

    def test_of_what_did_not_get_far(self, tmp_path: Path):
        never, failed = make_run(tmp_path, "lds/stu/never", started=False), make_run(tmp_path, "lds/stu/failed")
        early = make_run(tmp_path, "lds/stu/early")
        early.checkpoints.mkdir()
        early.last.touch()
        pretrained = make_run(tmp_path, "lds/stu/pretrained")
        pretrained.pretraining.mkdir(parents=True)
        (pretrained.pretraining / "last.ckpt").touch()
        states = [read(run.path).state for run in (never, failed, early, pretrained)]
        stopped = "stopped before a step was logged"
        assert states == ["never trained", "failed before a step was logged", stopped, stopped]

    def test_running_is_who_holds_the_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run = make_run(tmp_path, val={7: 0.3})
        lock = run.path.with_name(".a.lock")
        run.open(yaml.safe_load(run.config.read_text()), overwrite=False)
        assert [read(run.path).state for _ in range(2)] == ["running at step 7 of 36"] * 2
        assert lock.exists()
        other = Run(run.path)
        with pytest.raises(Exception, match="another process"):  # still locked: nothing was stolen
            other.open({}, overwrite=False)
        run.close()
        assert read(run.path).status == "stopped"
        assert not lock.exists()  # asking creates none
        lock.write_text("left by kill -9")
        assert not is_locked(lock)
        assert read(run.path).status == "stopped"
        assert lock.read_text() == "left by kill -9"
        with monkeypatch.context() as patch:  # without flock, where the file itself is the lock
            patch.setattr(fcntl, "flock", refused_by_the_file_system)
            assert is_locked(lock)
            for pid, running in ((os.getpid(), True), (2**22 + 1, False)):
                lock.write_text(f"{pid}\n{socket.gethostname()}\n")
                assert is_locked(lock) == running
            lock.write_text(f"{2**22 + 1}\nanother-host\n")
            assert is_locked(lock)
        run.open(yaml.safe_load(run.config.read_text()), overwrite=False)  # and asking does not keep it
        run.close()

    def test_more_accuracy_is_better_also_where_the_manifest_is_damaged(self, tmp_path: Path):
        runs = [make_run(tmp_path, f"{task}/stu/a", test=0.1) for task in TARGETS]
        for run in runs:
            run.manifest.write_text("{")
        assert [read(run.path).mode for run in runs] == ["min", "max"]

    def test_of_a_folder_that_was_moved_up(self):
        row = read(Path("/moved"))
        assert (row.task, row.model, row.name) == ("-", "-", "moved")
        assert [sweep.task for sweep in sweeps([replace(row, sweep="s")])] == ["-"]

    def test_a_failure_is_no_stop(self, tmp_path: Path):
        run = make_run(tmp_path, val={7: 0.3})
        run.record_failure("the loss is not finite at step 8")
        assert (read(run.path).status, read(run.path).state) == ("failed", "failed at step 7 of 36")
        run.record_start(device="cpu")  # it is tried again
        assert read(run.path).status == "stopped"

    def test_of_an_earlier_version_is_the_same(self, tmp_path: Path):
        """Its modules, the folder of its figures and its baselines had other names."""
        run = make_run(tmp_path, seed=5, val={12: 0.7}, test=0.25)
        row, config = read(run.path), yaml.safe_load(run.config.read_text())
        config |= {"task": {"_target_": "data.lds.LDS"}, "pictures": {"when": "end"}}
        run.config.write_text(yaml.safe_dump(config))
        baselines = {"zero": 1.0, "truth": 1e-9, "free run: persistence": 1.5}  # which it did not tell from another
        run.finish(run.read_summary() | {"baselines": baselines})
        (run.path / "pictures").mkdir()
        assert read(run.path) == replace(row, baselines=baselines, trivial_names=("zero",))
        assert read(run.path).trivial == 1.0


@pytest.mark.slow
class TestBrokenFiles:
    @pytest.mark.parametrize("file", SPOILT)
    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"{[", b"[1, 2]", b'{"a": "b', b"[" * 500], ids=range(6))
    def test_are_named_and_the_rest_is_read(self, tmp_path: Path, file: str, content: bytes, capsys: Any):
        make_run(tmp_path, "lds/stu/whole", test=0.2)
        run = make_run(tmp_path, "lds/stu/a", val={7: 0.3}, test=0.1)
        (run.path / file).write_bytes(content)
        row = read(run.path)
        assert row.unreadable or (file, content) == ("metrics.csv", b"")  # an empty one is no more broken than none
        assert all(file in remark for remark in row.unreadable)
        assert (row.test, row.best_val, row.parameters) == (None if file == "summary.json" else 0.1, row.best_val, 1234)
        assert row.best_val == (0.3 if file == "summary.json" else 0.5)
        assert main([str(tmp_path)]) == 0
        assert all(remark in capsys.readouterr().out for remark in row.unreadable[:1])

    @pytest.mark.parametrize("file", SPOILT)
    def test_cut_off_anywhere(self, tmp_path: Path, file: str):
        run = make_run(tmp_path, val={7: 0.3, 12: 0.25}, rates=[3, 4], test=0.1)
        whole, row = (run.path / file).read_bytes(), read(run.path)
        for end in range(0, len(whole), 11):
            (run.path / file).write_bytes(whole[:end])
            cut = read(run.path)
            assert cut.status == "finished"
            assert cut.test in (row.test, None)
            assert cut.step in (1, 2, 7, 12, None)
            assert cut.sequences_per_second in (3.0, 3.5, None)  # no half number is taken for a whole one

    def test_rows_are_counted(self, tmp_path: Path):
        run = make_run(tmp_path, val={7: 0.3})
        with run.metrics.open("a") as file:
            file.write("no,row\n8,0.5,val/mse,0.2\n9,,,\n10,0.8,val/mse,0.1")  # the last may have had more digits
        row = read(run.path)
        assert (row.best_val, row.step) == (0.2, 8)
        assert row.unreadable == ("metrics.csv has 2 unreadable rows", "metrics.csv ends in half a row")

    def test_names_of_parameter_groups_may_have_commas(self, tmp_path: Path):
        run = make_run(tmp_path, val={7: 0.3})
        log = MetricsCSV(run.metrics)
        log.log_metrics({"epoch": 1.0, 'lr/a, "b"': 0.1}, step=8)
        log.save()
        assert (read(run.path).step, read(run.path).unreadable) == (8, ())

    def test_a_folder_in_place_of_a_file(self, tmp_path: Path):
        run = make_run(tmp_path, test=0.1)
        for file in (run.summary, run.metrics):
            file.unlink(missing_ok=True)
            file.mkdir()
        assert read(run.path).state == "finished; summary.json is unreadable; metrics.csv is unreadable"

    @pytest.mark.parametrize("file", ["summary.json", "manifest.json"])
    def test_no_flipped_bit_passes_for_a_result(self, tmp_path: Path, file: str):
        run = make_run(tmp_path, seed=5, val={7: 0.3}, test=0.125)
        whole, row = (run.path / file).read_bytes(), read(run.path)
        for at in range(0, 8 * len(whole), 13):
            flipped = bytearray(whole)
            flipped[at // 8] ^= 1 << at % 8
            (run.path / file).write_bytes(flipped)
            found = read(run.path)
            assert found == row or found.unreadable == (f"{file} is unreadable",)

    def test_no_flipped_bit_of_the_metrics_passes(self, tmp_path: Path):
        run = make_run(tmp_path, val={7: 0.3, 10: 0.25})
        MetricsCSV(run.metrics).save()
        MetricsCSV(run.metrics).log_metrics({"epoch": 2.0, "val/mse": 0.2}, step=24)  # after the last checkpoint
        assert read(run.path).unreadable == ()
        content = bytearray(run.metrics.read_bytes())
        content[content.index(b"0.25") + 2] ^= 1
        run.metrics.write_bytes(content)
        assert read(run.path).unreadable == ("metrics.csv does not agree with its checksum",)
        run.metrics.unlink()
        assert read(run.path).unreadable == ("metrics.csv is missing",)

    @pytest.mark.parametrize("value", ["high", True, None, [1], {}, 10**400, "\ud800"])
    def test_values_of_other_kinds(self, tmp_path: Path, value: Any, capsys: Any):
        run = make_run(tmp_path, test=0.1)
        run.config.write_text(json.dumps({"seed": value, "task": value, "trainer": {"max_epochs": value}}))
        run.manifest.write_text(json.dumps({"seed": value, "parameters": value, "starts": value}))
        keys = ("steps", "seconds", "parameters")
        best = {"metric": value, "value": value}
        run.finish({"test": {"mse": value}, "best": best, "peak_memory": value, **dict.fromkeys(keys, value)})
        row = read(run.path)
        assert (row.seed, row.test, row.best_val, row.seconds, row.parameters, row.total_steps) == (None,) * 6
        assert main([str(tmp_path), "--json", str(tmp_path / "j"), "--csv", str(tmp_path / "c")]) == 0
        assert "summary.json has no test" in capsys.readouterr().out

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
    def test_numbers_without_end(self, tmp_path: Path, value: float):
        run = make_run(tmp_path, test=value, best=value, val={1: value})
        summary = run.read_summary() | {"steps": value, "seconds": value, "parameters": value, "peak_memory": value}
        run.finish(summary)
        run.config.write_text(yaml.safe_dump({"trainer": {"max_epochs": value, "max_steps": value}}))
        assert main([str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 0
        [row] = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)["runs"]
        assert row["test"] == (value if math.isfinite(value) else None)


class TestOrder:
    def test_best_first_within_a_task(self, tmp_path: Path, capsys: Any):
        for name, test, val in [("b", 0.9, {}), ("c", 0.1, {}), ("n", math.nan, {12: 0.01}), ("a", None, {12: 0.05})]:
            for task in TARGETS:
                make_run(tmp_path, f"{task}/stu/{name}", test=test, val=val)
        make_run(tmp_path, "lds/transformer/z", val={12: 0.04})
        assert main([str(tmp_path), "--runs"]) == 0
        order = [(row[0], row[2]) for row in shown(capsys)]
        assert order[:5] == [("lds", name) for name in "cbzan"]  # without a test result by the validation
        assert order[5:7] == [("lra_listops", name) for name in "bc"]

    def test_does_not_depend_on_where_it_starts(self, tmp_path: Path):
        rows = [read(make_run(tmp_path, f"lds/stu/{name}", test=0.5).path) for name in "bac"]
        assert [row.name for row in best_first(rows)] == list("abc")


class TestFinding:
    def test_at_any_depth_and_once(self, tmp_path: Path):
        paths = {
            make_run(tmp_path / deep, where).path for deep in ("", "x/y") for where in ("lds/stu/a", "lds/stu_ar/b")
        }
        inner = tmp_path / "lds/stu/a/wandb/files"
        inner.mkdir(parents=True)
        for name in ("config.yaml", "manifest.json"):
            (inner / name).touch()  # a folder inside a run is not a run
        (tmp_path / "lds" / "loop").symlink_to(tmp_path)
        half = tmp_path / "lds/stu/half"
        half.mkdir()
        (half / "manifest.json").touch()
        assert set(find([tmp_path])) == paths
        damaged = make_run(tmp_path, "lds/stu/damaged")
        damaged.checkpoints.mkdir()
        damaged.config.unlink()  # trained, so it is not passed over
        deleted = make_run(tmp_path, "lds/stu/deleted").path
        deleted.rename(deleted.with_name(".deleted.deleted"))  # as a killed deletion leaves it
        paths.add(damaged.path)
        assert set(find([tmp_path])) == paths
        assert len(list(find([tmp_path, tmp_path / "x", tmp_path]))) == len(paths)

    def test_a_folder_that_cannot_be_read_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
        for error, says in (
            (PermissionError(13, "Permission denied", "runs/x"), "warning: left out: runs/x: Permission denied\n"),
            (FileNotFoundError(2, "No such file", "runs/x"), ""),  # deleted meanwhile
        ):
            monkeypatch.setattr(os, "scandir", Mock(side_effect=error))
            assert list(find([tmp_path])) == []
            assert _err(capsys) == says

    def test_a_link_and_a_run_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run = make_run(tmp_path / "scratch")
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "lds").symlink_to(tmp_path / "scratch" / "lds")
        assert [read(path).path for path in find([tmp_path / "runs"])] == [str(tmp_path / "runs/lds/stu/a")]
        monkeypatch.chdir(run.path)
        [row] = [read(path) for path in find([Path()])]
        assert (row.task, row.model, row.name) == ("lds", "stu", "a")


class TestTheCommand:
    def test_the_table(self, tmp_path: Path, capsys: Any):
        name = "[bold]" + "long_" * 30 + ":smile:"  # neither markup nor cut
        measured: Any = {"rates": [1234.6], "tokens": [9e4, 1e5, 3e5], "peaks": [2**29, 2**30, 2**29]}  # of two starts
        make_run(tmp_path, f"lds/stu/{name}", seed=3, **measured, test=0.123456, best=0.5)
        assert main([str(tmp_path), "--runs"]) == 0
        [row] = shown(capsys)
        assert row[:7] == ["lds", "stu", name, "3", "mse", "0.1235", "0.5"]
        assert row[7:] == ["1,234", "1,235", "100,000", "1.00", "1:02:05", "finished"]
        make_run(tmp_path / "b", test=0.1)  # as earlier versions wrote it
        assert main([str(tmp_path / "b"), "--runs"]) == 0
        assert shown(capsys)[0][8:] == ["-", "-", "-", "1:02:05", "finished"]

    def test_names_cannot_command_a_terminal_or_a_spreadsheet(self, tmp_path: Path, capsys: Any):
        names = {
            "\x1b]0;title\x07": "\\x1b]0;title\\x07",
            "=1+1": "'=1+1",
            " @x": "' @x",
            "-2": "'-2",
            "plain": "plain",
        }
        for name in names:
            make_run(tmp_path, f"lds/stu/{name}", test=-0.5)
        file = tmp_path / "rows.csv"
        assert main([str(tmp_path), "--csv", str(file)]) == 0
        assert "\x1b" not in capsys.readouterr().out
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert {row["name"] for row in rows} == set(names.values())
        assert {row["test"] for row in rows} == {"-0.5"}

    def test_the_files(self, tmp_path: Path):
        make_run(tmp_path, test=0.1)
        with make_run(tmp_path, "lds/stu/b", val={7: 0.3}).metrics.open("a") as file:
            file.write("half")
        files = [tmp_path / "rows.csv", tmp_path / "rows.json"]
        assert main([str(tmp_path), "--csv", str(files[0]), "--json", str(files[1])]) == 0
        done, stopped = json.loads(files[1].read_text())["runs"]
        assert (done["test"], done["total_steps"], done["seconds"], done["unreadable"]) == (0.1, 36, 3725.4, [])
        assert (stopped["test"], stopped["status"], stopped["step"]) == (None, "stopped", 7)
        assert stopped["unreadable"] == ["metrics.csv ends in half a row"]
        with files[0].open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [(row["name"], row["test"], row["step"]) for row in rows] == [("a", "0.1", ""), ("b", "", "7")]
        assert list(rows[0]) == list(done)

    def test_no_runs(self, tmp_path: Path, capsys: Any):
        assert main([str(tmp_path), "--csv", str(tmp_path / "rows.csv")]) == 1
        assert re.fullmatch(r"no runs in .*: a run is a folder with manifest.json and config.yaml\n", _err(capsys))
        assert not (tmp_path / "rows.csv").exists()

    @pytest.mark.parametrize(
        ("argument", "says"),
        [("nowhere", "no such folder"), ("a" * 300, "no such folder"), ("file", "is not a folder")],
    )
    def test_a_wrong_path(self, tmp_path: Path, argument: str, says: str, capsys: Any):
        (tmp_path / "file").touch()
        make_run(tmp_path)
        assert main([str(tmp_path), str(tmp_path / argument)]) == 2
        assert _err(capsys) == f"error: {tmp_path / argument}: {says}\n"

    def test_a_file_that_cannot_be_written(self, tmp_path: Path, capsys: Any):
        make_run(tmp_path)
        assert main([str(tmp_path), "--json", str(tmp_path / "no" / "rows.json")]) == 2
        assert _err(capsys) == f"error: {tmp_path / 'no' / 'rows.json'}: No such file or directory\n"

    def test_one_file_for_two_contents(self, tmp_path: Path, capsys: Any):
        make_run(tmp_path)
        assert main([str(tmp_path), "--csv", f"{tmp_path}/x", "--json", f"{tmp_path}/lds/../x"]) == 2
        assert _err(capsys) == f"error: {tmp_path / 'x'}: is asked for twice, with different content\n"
        assert not (tmp_path / "x").exists()

    def test_as_a_user_calls_it(self, tmp_path: Path):
        make_run(tmp_path / "runs", test=0.1)
        command = [sys.executable, "-X", "importtime", "-m", "experiments.compare", "--runs"]
        environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "20"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert "finished" in done.stdout  # not cut to the 20 columns of no terminal
        imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
        assert imported >= {"experiments", "rich", "yaml"}
        assert not imported & {"torch", "lightning", "numpy", "scipy", "hydra", "data"}  # which take seconds

    def test_what_the_documents_say_is_understood(self):
        pages = ("docs/comparing.md", "experiments/README.md", "experiments/compare/__main__.py")
        said = [
            re.findall(r"^ *python -m experiments\.compare(?= |\n)(.*)", (ROOT / page).read_text(), re.M)
            for page in pages
        ]
        assert [len(commands) > 4 for commands in said] == [True] * 3
        for words in (word for commands in said for word in commands):
            arguments = re.split(r" {3,}", words)[0]  # without what the help says of it
            _parser().parse_args(shlex.split(arguments, comments=True))

    def test_help_has_examples(self, capsys: Any):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        assert capsys.readouterr().out.count("python -m experiments.compare ") >= 3


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("three")
    for name, seed, test in (("a", 0, 0.25), ("b", 1, 0.75), ("c", 2, None)):
        make_run(home, f"lds/stu/{name}", seed=seed, test=test, trainer={"max_epochs": seed})
    return home


class TestChoosing:
    def test_where_and_columns(self, three: Path, capsys: Any):
        arguments = [str(three), "--runs", "--where", "seed<2", "status=finished", "--columns", "trainer.max_epochs"]
        assert main([*arguments, "--where", "name!=b"]) == 0
        [row] = shown(capsys)
        assert (row[2], row[-2:]) == ("a", ["0", "finished"])
        assert main([str(three), "--columns", "seed", "trainer.max_epochs"]) == 0
        assert "seed  trainer.max_epochs" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--where", "sed=0"], "--where=sed: no run has such a key; did you mean seed?"),
            (
                ["--where", "max_epochs=0"],
                "--where=max_epochs: no run has such a key; did you mean trainer.max_epochs?",
            ),
            (["--where", "seed"], "--where=seed: must be KEY=VALUE"),
            (["--where", "seed=0", "{runs}"], "--where={runs}: must be KEY=VALUE; folders stand before the options"),
            (["--where", "=0"], "--where==0: must be KEY=VALUE, or with !=, <, <=, > or >="),
            (["--format", "png"], "--format=png: needs --figures FOLDER"),
            (["--where", "trainer=x"], "--where=trainer: is a group of options: trainer.max_epochs"),
            (["--where", "seed<x"], "--where=seed<x: < compares with a number"),
            (["--where", "seed=7", "name=a"], "--where=seed=7 name=a: none of 3 runs is so"),
            (
                ["--columns", "optimisr.lr"],
                "--columns=optimisr.lr: no run has such a key; a run has task, model, name, seed, …",
            ),
        ],
    )
    def test_what_cannot_be_chosen(self, three: Path, arguments: Sequence[str], says: str, capsys: Any):
        given = [argument.format(runs=three) for argument in arguments]
        assert main([str(three), *given, "--csv", str(three / "rows.csv")]) == 2
        assert _err(capsys) == f"error: {says.format(runs=three)}\n"
        assert not (three / "rows.csv").exists()

    @pytest.mark.parametrize("arguments", [["--format", "gif"], ["--watch", "0"], ["--watch", "soon"]])
    def test_options_that_cannot_be(self, three: Path, arguments: Sequence[str], capsys: Any):
        with pytest.raises(SystemExit, match="2"):
            main([str(three), *arguments])
        assert f"argument {arguments[0]}: {arguments[1]}: must be " in _err(capsys)


class TestFiles:
    def test_groups_are_in_the_json(self, tmp_path: Path):
        for seed, test in ((0, 0.25), (1, 0.75)):
            make_run(tmp_path, f"lds/stu/{seed}", seed=seed, test=test, best=seed)
        make_run(tmp_path, "lds/stu/other", test=math.inf, trainer={"max_steps": 5})
        assert main([str(tmp_path), "--significance", "--json", str(tmp_path / "f.json")]) == 0
        content = json.loads((tmp_path / "f.json").read_text())
        assert list(content) == ["runs", "groups", "significance"]
        first, other = content["groups"]
        assert (first["task"], first["model"], first["n"], first["mean"]) == ("lds", "stu", 2, 0.5)
        assert first["std"] == pytest.approx(0.125**0.5)
        assert (first["tests"], first["seeds"], first["chosen"], first["published"]) == (
            [0.25, 0.75],
            [0, 1],
            True,
            None,
        )
        assert (other["settings"], other["mean"], other["chosen"]) == ({"trainer.max_steps": 5}, None, False)
        assert first["runs"] == [row["path"] for row in content["runs"][:2]]
        assert content["runs"][0]["config"]["trainer.max_epochs"] == 3
        assert content["runs"][2]["group"] == other["label"] == "max_steps=5"

    def test_what_yaml_can_hold(self, tmp_path: Path):
        run = make_run(tmp_path, test=0.1)
        run.manifest.write_text(json.dumps({"seed": 0}))  # without the settings
        run.config.write_text("{day: 2026-01-02, 3: {null: 1}, set: !!set {a, b}, bytes: !!binary aGk=, nan: .nan}")
        for other in "bc":
            make_run(tmp_path, f"lds/stu/{other}", test=0.1)
        assert main([str(tmp_path), "--json", str(tmp_path / "f"), "--csv", str(tmp_path / "c")]) == 0
        config = json.loads((tmp_path / "f").read_text(), parse_constant=pytest.fail)["runs"][0]["config"]
        assert (config["day"], config["3.None"], config["nan"]) == ("2026-01-02", 1, None)
        run.config.write_text("a: &a {b: *a}")  # contains itself
        assert read(run.path).unreadable == ("config.yaml is unreadable",)

    def test_the_leaderboard_as_markdown_and_latex(self, tmp_path: Path):
        make_run(tmp_path, "lds/a|b_c/x", test=0.1)
        make_run(tmp_path, "lds/stu/y")
        files = [tmp_path / "b.md", tmp_path / "b.tex"]
        files[0].write_text("before")
        files[1].symlink_to(tmp_path / "real.tex")
        assert main([str(tmp_path), "--significance", "--markdown", str(files[0]), "--latex", str(files[1])]) == 0
        assert "### lds: differences over seeds" in files[0].read_text()
        assert "| a\\|b\\_c | 0.1000 | 1 |" in files[0].read_text()
        assert r"a\textbar{}b\_c & 0.1000 & 1 &" in (tmp_path / "real.tex").read_text()
        assert files[1].is_symlink()
        assert "before" not in files[0].read_text()

    def test_on_the_standard_output(self, tmp_path: Path):
        make_run(tmp_path / "runs", test=0.1)
        command = f"{sys.executable} -m experiments.compare --csv /dev/stdout > out"
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=60)
        lines = (tmp_path / "out").read_text().splitlines()
        assert lines[0] == "lds"
        assert lines[-2].startswith("task,model,name,seed,metric")
        assert lines[-1].startswith("lds,stu,a,0,mse")

    def test_figures_and_report_are_asked_for_as_agreed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        made: list[Any] = []
        for name in ("figures", "report"):
            module: Any = ModuleType(name)
            module.write = lambda *arguments, **_: made.append(arguments)
            monkeypatch.setitem(sys.modules, f"experiments.compare.{name}", module)
        make_run(tmp_path, test=0.1)
        assert main([str(tmp_path), "--figures", "pics", "--format", "png,pdf", "--html", "x.html"]) == 0
        (groups, rows, folder, formats), (rows_again, groups_again, file) = made
        assert (folder, formats, file) == (Path("pics"), ("png", "pdf"), Path("x.html"))
        assert groups[0].rows == tuple(rows) == tuple(rows_again)
        assert groups == groups_again

    @pytest.mark.parametrize(("option", "extra"), [("figures", "plot"), ("html", "report")])
    def test_what_is_not_installed(self, tmp_path: Path, option: str, extra: str, monkeypatch: Any, capsys: Any):
        def missing(name: str) -> None:
            raise ModuleNotFoundError("No module", name="somelib.part")

        monkeypatch.setattr(importlib, "import_module", missing)
        make_run(tmp_path, test=0.1)
        assert main([str(tmp_path), f"--{option}", "x"]) == 2
        assert _err(capsys) == f'error: --{option} needs somelib: pip install -e ".[{extra}]"\n'


class TestWatching:
    def test_again_until_ctrl_c(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
        """It waits for runs, shows them again where they change, and writes the files each time."""
        file, seen, slept = tmp_path / "rows.csv", [], []

        def sleep(seconds: float) -> None:
            seen.append(file.read_text().count("\n") - 1 if file.exists() else None)
            slept.append(seconds)
            if len(seen) == 4:
                raise KeyboardInterrupt
            if len(seen) != 2:
                make_run(tmp_path, f"lds/stu/{len(seen)}", test=0.5)

        monkeypatch.setattr("experiments.compare.watch.time.sleep", sleep)
        assert main([str(tmp_path), "--watch", "7", "--runs", "--csv", str(file)]) == 0
        assert (seen, slept) == ([None, 1, 1, 2], [7.0] * 4)
        out = capsys.readouterr().out
        assert "no runs yet" in out
        assert out.count("finished") == 1 + 2  # nothing is printed where nothing has changed

    def test_it_waits_for_runs_that_are_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
        make_run(tmp_path)
        monkeypatch.setattr("experiments.compare.watch.time.sleep", Mock(side_effect=KeyboardInterrupt))
        assert main([str(tmp_path), "--watch", "1e300", "--where", "status=running"]) == 0
        assert "no runs yet" in capsys.readouterr().out

    def test_finished_runs_are_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from experiments.compare import watch

        done, on = make_run(tmp_path, "lds/stu/a", test=0.5), make_run(tmp_path, "lds/stu/b", val={7: 0.3})
        reads: list[Path] = []
        monkeypatch.setattr(watch, "read", lambda path: reads.append(path) or read(path))
        reader = watch.Reader()
        assert [reader(run.path).status for run in (done, on) * 2] == ["finished", "stopped"] * 2
        assert reads == [done.path, on.path, on.path]
        done.finish(done.read_summary() | {"seconds": 1.5})
        assert reader(done.path).seconds == 1.5

    def test_errors_end_it(self, tmp_path: Path, capsys: Any):
        make_run(tmp_path)
        assert main([str(tmp_path), "--watch", "--where", "sed=0"]) == 2
        assert "did you mean seed?" in _err(capsys)
        assert main([str(tmp_path), "--watch", "--csv", str(tmp_path / "no" / "x")]) == 2


def _err(capsys: Any) -> str:
    return str(capsys.readouterr().err)
