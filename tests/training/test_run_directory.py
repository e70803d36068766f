"""A run is a directory: claimed by one process, resumed by name, never redone, never mixed up with another."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stu import files
from stu.errors import OptionError
from stu.files import sealed, unsealed
from stu.training import Diverged, MetricsCSV, Run, Stopped, report
from stu.training import run as run_module
from stu.training.loggers import read_metrics
from stu.training.names import FREE_KEYS, is_free, known_as, run_name
from stu.training.records import flatten
from stu.training.run import MOVED, relocated
from tests import runs

CONFIG = {
    "seed": 0,
    "model": {"depth": 2, "mixer": {"k_u": 3}},
    "logger": {"mode": "auto"},
    "loader": {"num_workers": 0},
}


SUMMARY = {
    "test": {"loss": 1.0},
    "best": {"metric": "val/loss", "value": 0.5, "step": 7, "epoch": 1.0, "val": {"loss": 0.5}},
    "baselines": {"zero": 2.0},
    "steps": 7,
    "seconds": 1.5,
    "parameters": 2,
}


def changed(**flat: Any) -> dict[str, Any]:
    """CONFIG with other values at dotted keys (dots written as __)."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in flat.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


def started(path: Path, *, step: int = 7, finished: bool = False) -> Run:
    """A run that was started with CONFIG."""
    run = Run(path)
    run.open(CONFIG, overwrite=False)
    run.checkpoints.mkdir()
    kept = {"Checkpoints": {"best_value": None, "best_step": 0}}
    torch.save({"global_step": step, "callbacks": kept, "state_dict": {"w": torch.ones(2)}}, run.last)
    if finished:
        run.finish(SUMMARY)
    run.close()
    return run


class TestOpening:
    def test_a_new_run(self, tmp_path: Path):
        run = Run(tmp_path / "deep" / "down" / "run")
        assert (run.id, run.last_step, run.finished) == ("", 0, False)
        run.open(CONFIG, overwrite=False)
        assert yaml.safe_load(run.config.read_text()) == CONFIG
        assert re.fullmatch("[0-9a-f]{12}", run.id)
        run.close()
        assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml", "manifest.json"]
        assert list(run.path.parent.iterdir()) == [run.path]  # no lock is left

    def test_the_same_settings_go_on(self, tmp_path: Path):
        before = started(tmp_path / "run")
        run = Run(tmp_path / "run")
        run.open(CONFIG, overwrite=False)
        assert (run.id, run.last_step) == (before.id, 7)
        assert torch.equal(run.weights(run.last)["w"], torch.ones(2))
        run.close()

    def test_options_that_a_run_was_made_before_are_no_other_settings_at_their_defaults(self, tmp_path: Path):
        mixer = {"_target_": "stu.mixers.mamba2.Mamba2", "num_heads": 2}
        run = Run(tmp_path / "run")
        run.open({"model": {"mixer": mixer}}, overwrite=False)

        def changes(**options: Any) -> list[str]:
            return run.changes({"model": {"mixer": mixer | options}})

        assert changes(dt_limit=[0.0, math.inf], chunk_size=64) == []
        assert changes(dt_limit=[0.0, 0.5]) == ["model.mixer.dt_limit (absent → [0.0, 0.5])"]
        assert changes(no_option=None) == []  # what a configuration without it says, too
        assert changes(no_option=1) == ["model.mixer.no_option (absent → 1)"]

        def trainer(precision: str) -> list[str]:
            node = {"_target_": "lightning.Trainer", "matmul_precision": precision}  # none of Lightning's arguments
            return [
                change for change in run.changes({"trainer": node}, within=("trainer",)) if "_target_" not in change
            ]

        assert trainer("high") == trainer("highest") == []  # with either, as nothing says what it was made with
        run.close()

    @pytest.mark.parametrize("finished", [False, True])
    def test_other_settings_are_refused_by_their_keys(self, tmp_path: Path, finished: bool):
        started(tmp_path / "run", finished=finished)
        run = Run(tmp_path / "run")
        other = changed(seed=1, model__mixer__k_u=None, model__mixer__k_y=2)
        with pytest.raises(OptionError) as error:
            run.open(other, overwrite=False)
        assert error.value.name == "name"
        message = "model.mixer.k_u (3 → None), model.mixer.k_y (absent → 2), seed (0 → 1)"
        assert message in error.value.allowed
        assert "overwrite=true" in error.value.allowed
        run.open(CONFIG, overwrite=False)  # refusing has not kept the lock
        run.close()

    def test_a_run_without_a_checkpoint_may_still_change(self, tmp_path: Path):
        run = Run(tmp_path / "run")
        run.open(CONFIG, overwrite=False)
        run.open(changed(seed=1), overwrite=False)
        assert yaml.safe_load(run.config.read_text())["seed"] == 1
        run.close()

    def test_free_keys_may_change(self, tmp_path: Path):
        started(tmp_path / "run")
        run = Run(tmp_path / "run")
        run.open(changed(logger__mode="offline", loader__num_workers=3, paths__data="elsewhere"), overwrite=False)
        run.close()

    def test_which_keys_are_free(self):
        assert all(is_free(key) for key in FREE_KEYS)
        assert is_free("logger.tags")
        # … and what looks like them is not
        assert not any(map(is_free, ("loggers", "model", "loader.batch_size", "checkpoints.every_n_steps", "named")))

    def test_overwriting_deletes_all_of_it(self, tmp_path: Path):
        before = started(tmp_path / "run", finished=True)
        before_id = before.id
        before.metrics.write_text("step,epoch,metric,value\n")
        run = Run(tmp_path / "run")
        run.open(changed(seed=1), overwrite=True)
        assert not any(path.exists() for path in (run.summary, run.last, run.metrics))
        assert run.id != before_id
        run.close()

    def test_overwriting_spares_a_folder_that_is_no_run(self, tmp_path: Path):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "thesis.tex").touch()
        run = Run(tmp_path / "thesis")
        run.open(CONFIG, overwrite=True)
        assert (run.path / "thesis.tex").exists()
        run.close()

    def test_a_second_claim_is_refused_and_spoils_nothing(self, tmp_path: Path):
        first, second = Run(tmp_path / "run"), Run(tmp_path / "run")
        first.open(CONFIG, overwrite=False)
        with pytest.raises(OptionError, match="another process is training this run"):
            second.open(changed(seed=1), overwrite=True)
        second.close()  # what is not its own stays locked
        with pytest.raises(OptionError, match="another process"):
            second.open(CONFIG, overwrite=False)
        first.close()
        second.open(CONFIG, overwrite=False)
        second.close()

    def test_overwriting_what_a_link_points_to(self, tmp_path: Path):
        started(tmp_path / "disk" / "real")
        link = tmp_path / "runs" / "run"
        link.parent.mkdir()
        link.symlink_to(tmp_path / "disk" / "real")
        run, other = Run(link), Run(tmp_path / "disk" / "real")
        run.open(changed(seed=1), overwrite=True)
        with pytest.raises(OptionError, match="another process"):
            other.open(CONFIG, overwrite=False)  # one run, one lock
        assert link.is_symlink()
        assert not run.trained
        assert other.settings == changed(seed=1)
        run.close()
        assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["real"]

    def test_a_kill_while_deleting_leaves_no_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        started(tmp_path / "run", finished=True)
        run = Run(tmp_path / "run")
        with monkeypatch.context() as killed:
            killed.setattr(files, "sync", Mock(side_effect=KeyboardInterrupt))  # after the renaming
            with pytest.raises(KeyboardInterrupt):
                run.open(CONFIG, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == [".run.deleted"]
        run.open(changed(seed=1), overwrite=False)
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
        run.close()

    def test_one_command_does_not_delete_what_it_made(self, tmp_path: Path):
        """As jobs of a sweep would that are the same run."""
        first, second = Run(tmp_path / "run"), Run(tmp_path / "run")
        first.open(CONFIG, overwrite=True)
        first.close()
        with pytest.raises(OptionError, match=r"overwrite=True: an earlier job of this command made .*run"):
            second.open(CONFIG, overwrite=True)
        assert first.config.exists()
        second.open(CONFIG, overwrite=False)  # and has not kept the lock
        second.close()

    def test_other_data_are_refused(self, tmp_path: Path):
        run = started(tmp_path / "run")
        run.open(CONFIG, overwrite=False, data="aaa")  # not recorded by earlier versions
        run.record_start(device="cpu", data="aaa")
        run.open(CONFIG, overwrite=False, data="aaa")
        with pytest.raises(OptionError, match=r"was trained on other data \(fingerprint aaa → bbb\); bring back"):
            run.open(CONFIG, overwrite=False, data="bbb")
        run.open(CONFIG, overwrite=True, data="bbb")
        run.close()

    def test_other_processes_of_a_distributed_run_are_refused_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        run = started(tmp_path / "run")
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(run_module.rank_zero_only, "rank", 1)
        with pytest.raises(OptionError, match="other settings"):
            run.open(changed(seed=1), overwrite=False)
        for overwrite in (True, False):
            run.open(CONFIG, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before  # they only look

    def test_other_conditions_are_said_and_recorded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run = Run(tmp_path / "run")
        run.open(CONFIG, overwrite=False)
        run.record_start(device="A")
        run.close()
        started(tmp_path / "run")

        def resumed() -> Run:
            again = Run(tmp_path / "run")
            again.open(CONFIG, overwrite=False)
            again.record_start(device="B")
            again.close()
            return again

        monkeypatch.setattr(run_module, "git_state", lambda: {"commit": 40 * "c", "dirty": True})
        monkeypatch.setattr(run_module, "version_of", lambda name: "0")  # also of wandb, which does not matter
        for _ in range(2):  # compared with how it began, not with the last start
            [remark] = resumed().remarks
            assert remark.startswith("resumed under other conditions than the run began with: device A → B, commit ")
            assert f"torch {version('torch')} → 0" in remark
            assert "wandb" not in remark
        starts = json.loads(run.manifest.read_text())["starts"]
        assert [start.get("remarks") for start in starts] == [None, [remark], [remark]]

    def test_a_place_where_nothing_can_be_written(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(OptionError) as error:
            Run(tmp_path / "file" / "run").open(CONFIG, overwrite=False)
        assert error.value.name == "paths.runs"
        with pytest.raises(OptionError, match=r"and .*file is none"):
            Run(tmp_path / "file" / "run").require_writable()
        Run(tmp_path / "deep" / "down" / "run").require_writable()
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        (tmp_path / "link").symlink_to(tmp_path / "link")  # to itself
        with pytest.raises(OptionError, match="must be a folder to write to"):
            Run(tmp_path / "link").open(CONFIG, overwrite=True)


class TestLocks:
    @pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], autouse=True)
    @classmethod
    def file_system(cls, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """With locks, or with one of the answers of those without."""
        if request.param is not None:
            refused = OSError(request.param, "flock")
            monkeypatch.setattr(fcntl, "flock", Mock(side_effect=refused))

    def test_who_has_it_is_said(self, tmp_path: Path):
        first, second = Run(tmp_path / "run"), Run(tmp_path / "run")
        first.open(CONFIG, overwrite=False)
        lock, host = tmp_path / ".run.lock", re.escape(socket.gethostname())
        os.utime(lock, (0, time.time() - 7384))
        where = rf"process {os.getpid()} on {host}, for 2:03:0\d, by the lock file {re.escape(str(lock))}"
        expected = rf"another process is training this run \({where}\); choose another name, or delete that file if"
        for _ in range(2):  # asking changes nothing
            with pytest.raises(OptionError, match=expected):
                second.open(CONFIG, overwrite=True)
        first.close()
        assert not lock.exists()
        second.open(CONFIG, overwrite=False)
        second.close()
        assert not lock.exists()

    def test_a_killed_process_does_not_keep_it(self, tmp_path: Path):
        dead = subprocess.Popen(["true"])
        dead.wait()
        (tmp_path / ".run.lock").write_text(f"{dead.pid}\n{socket.gethostname()}\n")
        run = Run(tmp_path / "run")
        run.open(CONFIG, overwrite=False)
        run.close()

    def test_of_another_host_it_is_only_deleted_by_hand(self, tmp_path: Path, file_system: None):
        lock = tmp_path / ".run.lock"
        lock.write_text("1\nelsewhere\n")
        run = Run(tmp_path / "run")
        if not isinstance(fcntl.flock, Mock):
            run.open(CONFIG, overwrite=False)  # the kernel knows better
            run.close()
            return
        with pytest.raises(OptionError, match="process 1 on elsewhere, for 0:00:0"):
            run.open(CONFIG, overwrite=False)
        lock.unlink()
        run.open(CONFIG, overwrite=False)
        run.close()


class TestDamage:
    """`tests.training.test_damage` has what a user sees of it."""

    @staticmethod
    def opened(path: Path) -> Run:
        run = Run(path)
        run.open(CONFIG, overwrite=False)
        run.close()
        return run

    @pytest.mark.parametrize("content", [None, b"", b"\xff", b"seed: 1", b"[1]", b"{" * 500])
    def test_the_configuration_is_also_in_the_manifest(self, tmp_path: Path, content: bytes | None):
        run = started(tmp_path / "run")
        run.config.unlink() if content is None else run.config.write_bytes(content)
        assert run.settings == CONFIG
        with pytest.raises(OptionError, match=r"other settings: seed \(0 → 1\)"):
            Run(run.path).open(changed(seed=1), overwrite=False)
        [remark] = self.opened(run.path).remarks
        assert "the manifest has the same" in remark
        assert yaml.safe_load(run.config.read_text()) == CONFIG
        kept = run.path / "config.yaml.damaged"
        assert kept.read_bytes() == content if content else not kept.exists()
        assert self.opened(run.path).remarks == []

    @pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b'{"id": 1}', b'{"id": "a", "starts": [1]}', b"\0"])
    def test_without_a_manifest_the_configuration_counts(self, tmp_path: Path, content: bytes | None):
        run = started(tmp_path / "run")
        run.manifest.unlink() if content is None else run.manifest.write_bytes(content)
        with pytest.raises(OptionError, match="other settings"):
            Run(run.path).open(changed(seed=1), overwrite=False)
        [remark] = self.opened(run.path).remarks
        assert "manifest.json was" in remark
        assert json.loads(run.manifest.read_text())["settings"] == CONFIG

    def test_without_both_nothing_goes_on_unasked_or_is_to_be_deleted(self, tmp_path: Path):
        run = started(tmp_path / "run")
        for file in (run.config, run.manifest):
            file.write_bytes(b"")
        with pytest.raises(OptionError, match="nothing says what its settings were") as error:
            run.open(CONFIG, overwrite=False)
        assert "overwrite" not in str(error.value)
        assert f"--cfg job --resolve > '{run.config}'" in str(error.value)
        run.config.write_text(yaml.safe_dump(CONFIG))  # as advised
        self.opened(run.path)

    @pytest.mark.parametrize(
        "content", [b"", b"\xff", b"{}", b'{"test": {}}', json.dumps(SUMMARY | {"test": {"loss": "x"}}).encode()]
    )
    def test_a_damaged_summary_is_none(self, tmp_path: Path, content: bytes):
        run = started(tmp_path / "run", finished=True)
        whole = run.summary.read_bytes()
        for changed_summary in (content, whole.replace(b"0.5", b"0.7"), whole.replace(b"checksum", b"checksun", 1)):
            run.summary.write_bytes(changed_summary)
            assert not run.finished
            with pytest.raises(OptionError, match=r"summary\.json is absent or damaged"):
                run.read_summary()
        run.summary.write_text(json.dumps(SUMMARY))  # of an earlier version
        assert run.read_summary() == SUMMARY

    def test_a_checkpoint_of_any_name_is_work(self, tmp_path: Path):
        run = started(tmp_path / "run")
        run.last.rename(run.best)
        run.last.touch()  # of 0 bytes
        with pytest.raises(OptionError, match="other settings"):
            run.open(changed(seed=1), overwrite=False)


LOST = {"failed": "another process of this run has ended or cannot be reached"}
ENDS = {"failed", "stopped"}


def while_handling(first: BaseException, then: BaseException) -> BaseException:
    then.__context__ = first
    return then


class TestEnds:
    """What `exit_codes` makes of the ways in which a run ends."""

    @staticmethod
    def ended(path: Path, error: BaseException, *, known: bool = True, overwrite: bool = False) -> Run:
        run = Run(path)

        def end() -> None:
            run.open(CONFIG, overwrite=overwrite)
            if known:
                run.record_start(device="cpu")
            raise error

        with pytest.raises((type(error), SystemExit, OptionError)), report.exit_codes(run):
            end()
        return run

    @pytest.mark.parametrize(
        ("error", "how"),
        [
            (torch.OutOfMemoryError("CUDA:\nfull"), {"failed": "OutOfMemoryError: CUDA: full"}),
            (KeyError("x"), {"failed": "KeyError: 'x'"}),
            (OSError(errno.ENOSPC, "No space left"), {"failed": "OSError: [Errno 28] No space left"}),
            (Diverged("not finite"), {"failed": "not finite"}),
            (Stopped(signal.SIGTERM, 3), {"stopped": "stopped by SIGTERM after step 3"}),
            (KeyboardInterrupt(), {"stopped": "stopped by SIGINT after step 0"}),
            (SystemExit(143), {"stopped": "stopped by SIGTERM after step 0"}),
            (SystemExit(1), {"failed": "SystemExit: 1"}),  # of a callback, say
            (SystemExit(255), {"failed": "SystemExit: 255"}),
            (RuntimeError("[a/gloo/transport/pair.cc:5] Closed. This is typically"), LOST),
        ],
    )  # fmt: skip
    def test_the_manifest_says_how(self, tmp_path: Path, error: BaseException, how: dict[str, str]):
        run = self.ended(tmp_path / "run", error)
        [start] = json.loads(run.manifest.read_text())["starts"]
        found = {key: str(start[key]).partition(": ")[0] if how == LOST else start[key] for key in ENDS & start.keys()}
        assert found == how
        assert not (tmp_path / ".run.lock").exists()

    @pytest.mark.parametrize("elastic", [True, False])
    def test_a_signal_after_a_loss(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elastic: bool):
        """Which torchrun sends to those that are left, and others to all."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        if not elastic:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        run = self.ended(tmp_path / "run", while_handling(RuntimeError("gloo/transport"), SystemExit(143)))
        expected = LOST["failed"] if elastic else "stopped by SIGTERM after step 0"
        assert run.ended.startswith(expected)

    @pytest.mark.parametrize("place", [0, 1])
    def test_a_loss_during_a_test_is_one_line_of_the_first_process_and_writes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: int
    ):
        monkeypatch.setattr(run_module.rank_zero_only, "rank", place)
        with pytest.raises(SystemExit) as end, report.losses(Run(tmp_path / "run")):
            raise RuntimeError("[a/gloo/transport/pair.cc:5] Closed. This is typically")
        assert end.value.code == 1
        line = f"error: {LOST['failed']}: Closed. The same command starts again\n"
        assert capsys.readouterr().err == (line if place == 0 else "")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("known", [True, False])
    def test_what_is_refused_leaves_no_trace(self, tmp_path: Path, known: bool):
        self.ended(tmp_path / "runs" / "lds" / "run", OptionError("a", 1, "must be 2"), known=known)
        assert list(tmp_path.iterdir()) == []
        run = started(tmp_path / "run")
        self.ended(run.path, OptionError("a", 1, "must be 2"), known=known)
        assert run.trained

    def test_an_error_before_it_is_recorded_is_not_that_of_an_earlier_start(self, tmp_path: Path):
        run = self.ended(tmp_path / "run", Stopped(signal.SIGTERM, 3))
        self.ended(tmp_path / "run", ValueError(), known=False)
        assert [start.get("failed") for start in json.loads(run.manifest.read_text())["starts"]] == [None]

    def test_a_full_disk_is_one_line(self, tmp_path: Path):
        run = started(tmp_path / "run")
        line = "No space left; when there is room again, the run goes on from step 7"
        with pytest.raises(OptionError, match=line), report.exit_codes(run):
            raise OSError(errno.ENOSPC, "No space left")

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_the_advice_deletes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], overwrite: bool):
        self.ended(tmp_path / "run", Stopped(signal.SIGTERM, 3), overwrite=overwrite)
        out = capsys.readouterr().out
        assert ("The same command without overwrite=true resumes the run; with it" in out) == overwrite
        assert ("The same command resumes the run." in out) != overwrite


class TestAtomicity:
    def test_a_summary_is_whole_or_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run = started(tmp_path / "run")

        def half(path: Path, content: bytes) -> int:
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", half)
            with pytest.raises(OSError, match="No space"):
                run.finish(SUMMARY)
        assert not run.finished
        run.finish(SUMMARY)
        assert run.read_summary() == SUMMARY


OVERRIDES = st.lists(
    st.builds(
        "{}={}".format,
        st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,6})?", fullmatch=True),
        st.text(st.characters(blacklist_characters=",", blacklist_categories=("Cs",)), max_size=150),
    ),
    max_size=4,
    unique_by=lambda override: override.split("=")[0],
)


class TestNames:
    @pytest.mark.parametrize(
        ("overrides", "name"),
        [
            ([], "default"),
            (["model=stu", "task=lds"], "default"),  # they name the folders above
            (["seed=1", "model=stu", "optimizer.lr=1e-3"], "optimizer.lr=1e-3,seed=1"),
            (["+trainer.profiler=simple", "optimizer=adamw"], "optimizer=adamw,trainer.profiler=simple"),
            (["logger=csv", "paths.runs=/tmp", "loader.num_workers=4", "overwrite=true", "mode=test"], "default"),
            (["hydra.verbose=true", "checkpoints.every_minutes=1"], "default"),
            (["checkpoints.every_n_steps=1"], "checkpoints.every_n_steps=1"),
            (["model.depth=2"], "model.depth=2"),  # not the choice of the model
            (["++optimizer.lr=1e+30"], "optimizer.lr=1e+30"),  # as a sweep writes numbers
        ],
    )
    def test_by_hand(self, overrides: list[str], name: str):
        assert run_name(overrides) == name

    @given(OVERRIDES, st.randoms())
    def test_safe_short_and_the_same_in_any_order(self, overrides: list[str], random: Any):
        name = run_name(overrides)
        assert re.fullmatch(r"[A-Za-z0-9=,._+-]{1,100}", name)
        random.shuffle(overrides)
        assert run_name(overrides) == name

    def test_what_is_swept_stands_first_and_does_not_change_the_run(self, tmp_path: Path):
        constants = [f"model.mixer.option_{i}=value" for i in range(9)]
        name, plain = run_name([*constants, "seed=1"], {"seed"}), run_name([*constants, "seed=1"])
        assert name.startswith("seed=1,option_0=value,option_1=value")
        assert plain.startswith("option_0=value,option_1=value")
        assert name[-11:] == plain[-11:] != run_name([*constants, "seed=2"], {"seed"})[-11:]
        assert known_as(tmp_path / "none", plain) == known_as(tmp_path, plain) == plain
        (tmp_path / f".{name}.lock").touch()
        (tmp_path / name).mkdir()
        assert known_as(tmp_path, plain) == name
        (tmp_path / plain).mkdir()
        assert known_as(tmp_path, plain) == plain
        assert known_as(tmp_path, "seed=1") == "seed=1"

    @given(OVERRIDES, OVERRIDES)
    def test_distinct_for_distinct_overrides(self, one: list[str], other: list[str]):
        telling = [sorted(o for o in some if not is_free(o.split("=")[0])) for some in (one, other)]
        assert (run_name(one) == run_name(other)) == (telling[0] == telling[1])

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("optimizer.betas=[0.9,0.99]", "optimizer.betas={0.9,0.99}"),  # unsafe characters
            ("model.name=a b", "model.name=a-b"),
            ("model.name=ä", "model.name=ö"),
            ("model.name=" + 200 * "a", "model.name=" + 199 * "a" + "b"),  # too long
        ],
    )
    def test_what_looks_alike_is_told_apart(self, one: str, other: str):
        assert run_name([one]) != run_name([other])


@pytest.mark.parametrize("content", [b"", b"step,epoch,metric,value\n1,0.1,loss,2\n", b"PK\x03\x04", b"\x80\x02N."])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes):
    file = tmp_path / "file.ckpt"
    file.write_bytes(content)
    with pytest.raises(OptionError, match=r"checkpoint=.*file\.ckpt: is not a checkpoint of a run"):
        Run.weights(file)


def test_flatten():
    assert flatten(CONFIG)["model.mixer.k_u"] == 3
    assert flatten({"a": {}, "b": {"c": [1, {"d": 2}]}}) == {"a": {}, "b.c": [1, {"d": 2}]}
    assert flatten({}) == {}


class TestEarlierRuns:
    def test_their_modules_are_known_by_the_present_names(self):
        flat = {
            "task._target_": "data.lds.LDS",
            "task.data._target_": "data.lds.LDSData",
            "task.data.note": "data.lds.X",
            "model.mixer.step_rescale": 1.0,
        }
        assert relocated(flat) == {
            "task._target_": "data.systems.lds.LDS",
            "task.data._target_": "data.systems.lds.LDSData",
            "task.data.note": "data.lds.X",  # a text, not a target
            "model.mixer.rate": 1.0,
        }
        assert relocated(relocated(flat)) == relocated(flat)

    @pytest.mark.parametrize("present", MOVED.values())
    def test_the_present_names_exist(self, present: str):
        assert find_spec(present)


class TestMetricsCSV:
    def test_rows_are_appended_under_one_header(self, tmp_path: Path):
        path = tmp_path / "metrics.csv"
        MetricsCSV(path).log_metrics({"epoch": 0.5, "train/loss": 1.5, "lr/default": 0.1}, step=3)
        MetricsCSV(path).log_metrics({"epoch": 1.0, "val/loss": 2.0}, step=6)
        assert path.read_text().splitlines() == [
            "step,epoch,metric,value",
            "3,0.5,train/loss,1.5",
            "3,0.5,lr/default,0.1",
            "6,1.0,val/loss,2.0",
        ]
        assert read_metrics(path) == [
            (3, 0.5, "train/loss", 1.5),
            (3, 0.5, "lr/default", 0.1),
            (6, 1.0, "val/loss", 2.0),
        ]

    def test_an_empty_file_gets_its_header(self, tmp_path: Path):
        """Whoever created it was killed before the first row."""
        path = tmp_path / "metrics.csv"
        path.touch()
        MetricsCSV(path).rewind(0)
        MetricsCSV(path).log_metrics({"epoch": 0.5, "train/loss": 1.5}, step=3)
        assert read_metrics(path) == [(3, 0.5, "train/loss", 1.5)]

    @given(st.floats(allow_nan=True, allow_infinity=True))
    def test_every_float_comes_back_as_it_was(self, value: float):
        from tempfile import TemporaryDirectory  # a fresh one for each example

        with TemporaryDirectory() as folder:
            path = Path(folder) / "metrics.csv"
            MetricsCSV(path).log_metrics({"epoch": value, "x": value}, step=1)
            [(_, epoch, _, back)] = read_metrics(path)
        assert back == epoch == value or (math.isnan(back) and math.isnan(value))

    def test_float32_tensors_and_numpy_numbers_too(self, tmp_path: Path):
        path, value = tmp_path / "metrics.csv", torch.tensor(0.1)
        MetricsCSV(path).log_metrics({"epoch": 0.0, "tensor": value, "number": value.numpy()[()]}, step=1)
        assert {row[3] for row in read_metrics(path)} == {float(value)}

    def test_rewinding_sets_aside_what_will_come_again(self, tmp_path: Path):
        path = tmp_path / "metrics.csv"
        log = MetricsCSV(path)
        for step in (2, 4, 5, 6):
            log.log_metrics({"epoch": step / 2, "train/loss": step / 10}, step=step)
        log.log_metrics({"epoch": 2.0, "test/loss": 9.0, "best/val/loss": 8.0}, step=4)
        log.rewind(4)
        assert path.read_text().splitlines() == [
            "step,epoch,metric,value", "2,1.0,train/loss,0.2", "4,2.0,train/loss,0.4",
        ]  # fmt: skip
        superseded = tmp_path / "metrics.superseded.csv"
        gone = ["5,2.5,train/loss,0.5", "6,3.0,train/loss,0.6", "4,2.0,test/loss,9.0", "4,2.0,best/val/loss,8.0"]
        assert superseded.read_text().splitlines() == gone
        log.rewind(2)  # what is set aside later is appended
        assert superseded.read_text().splitlines() == [*gone, "4,2.0,train/loss,0.4"]

    def test_a_row_that_was_cut_off_is_dropped(self, tmp_path: Path):
        path = tmp_path / "metrics.csv"
        log = MetricsCSV(path)
        log.log_metrics({"epoch": 1.0, "train/loss": 0.25}, step=2)
        with path.open("a") as file:
            file.write("3,1.5,train/lo")
        log.rewind(9)
        log.log_metrics({"epoch": 1.5, "train/loss": 0.5}, step=3)
        assert read_metrics(path) == [(2, 1.0, "train/loss", 0.25), (3, 1.5, "train/loss", 0.5)]
        assert not (tmp_path / "metrics.superseded.csv").exists()

    def test_damaged_rows_are_dropped_kept_and_said(self, tmp_path: Path):
        path = tmp_path / "metrics.csv"
        log = MetricsCSV(path)
        for step in (1, 2, 3):
            log.log_metrics({"epoch": step / 2, "loss": step / 4}, step=step)
        log.save()
        whole = path.read_bytes()
        kept = [f"metrics.csv.damaged{number}" for number in ("", "-2", "-3", "-4")]
        cases = (
            (whole.replace(b"2,1.0,loss", b"2,1.0\xffloss"), [1, 3]),
            (whole.replace(b"0.5\n", b"0.7\n"), [1, 2, 3]),  # only the checksum tells
            (whole.replace(b"\n1", b"\0" + b"1"), [2, 3]),
            (whole[:-9], [1, 2]),
        )
        for (damaged, rows), name in zip(cases, kept, strict=True):
            path.write_bytes(damaged)
            [remark] = log.rewind(3)
            assert f"metrics.csv was damaged, and is now {name}:" in remark
            assert [row[0] for row in read_metrics(path)] == rows
            assert (tmp_path / name).read_bytes() == damaged
            assert log.rewind(3) == []
            path.write_bytes(whole)
            log.save()
        for gone in (True, False):
            path.unlink() if gone else path.write_bytes(b"")
            [remark] = log.rewind(3)
            assert remark.endswith("metrics.csv was empty or missing: the rows up to step 3 are lost")
        path.unlink()
        path.mkdir()
        with pytest.raises(OptionError, match="cannot be read: Is a directory; move it away"):
            log.rewind(3)
        path.rmdir()
        path.write_text("step,epoch,metric,value\nhalf,a row")
        with pytest.raises(OptionError, match="1 rows are damaged"):
            read_metrics(path)

    def test_rows_are_on_the_disk_before_a_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Whatever comes after them."""
        path = tmp_path / "metrics.csv"
        MetricsCSV(path).save()
        assert not list(tmp_path.iterdir())
        synced: list[Path] = []
        monkeypatch.setattr(files, "sync", synced.append)
        MetricsCSV(path).log_metrics({"epoch": 0.5, "loss": 1.0}, step=1)
        assert synced == []
        MetricsCSV(path).save()
        assert synced[:2] == [path, tmp_path]

    def test_nothing_to_rewind(self, tmp_path: Path):
        MetricsCSV(tmp_path / "metrics.csv").rewind(3)
        assert not list(tmp_path.iterdir())


COMMAND = runs.small("task=lds", "model=stu", "trainer.max_epochs=1", "log_every=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one finished run, named `run`."""
    folder = tmp_path_factory.mktemp("home")
    done = runs.train(folder, *COMMAND, "name=run")
    assert done.code == 0, done.err
    return folder


@pytest.mark.slow
@pytest.mark.e2e
class TestTrainPy:
    """What a user sees of all this."""

    @staticmethod
    def contents(path: Path) -> dict[str, bytes]:
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def test_the_manifest_tells_how_it_came_about(self, home: Path):
        run = runs.run_of(home, "lds", "stu", "run")
        manifest = json.loads(run.manifest.read_text())
        facts = {"id", "seed", "data", "monitor", "mode", "total_steps", "parameters", "starts"}
        assert manifest.keys() == {*facts, "settings", "checksum"}
        assert manifest["settings"] == yaml.safe_load(run.config.read_text())
        assert manifest["seed"] == 0
        weights = run.weights(run.best)
        learned = [w for name, w in weights.items() if name.startswith("model.") and w.is_floating_point()]
        buffers = sum(w.numel() for name, w in weights.items() if "hidden_" in name)
        assert manifest["parameters"] == sum(w.numel() for w in learned) - buffers
        [start] = manifest["starts"]
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=runs.ROOT, capture_output=True, text=True
        ).stdout.strip()
        assert start["git"]["commit"] == commit
        assert isinstance(start["git"]["dirty"], bool)
        assert start["packages"]["torch"] == version("torch")
        assert start["packages"].keys() >= {"lightning", "torchmetrics", "hydra-core", "numpy"}
        assert start["command"].endswith(" ".join([*COMMAND, "name=run"]))
        assert (start["resumed"], "CPU" in start["device"]) == (False, True)
        assert start.keys() >= {"time", "host", "python"}

    def test_the_configuration_is_written_out_in_full(self, home: Path):
        config = yaml.safe_load(runs.run_of(home, "lds", "stu", "run").config.read_text())
        assert config["model"]["seq_len"] == config["task"]["seq_len"] == 64
        assert config["optimizer"]["lr"] == 1e-3
        assert "${" not in str(config)
        assert "hydra" not in config

    def test_a_finished_run_is_shown_and_not_redone(self, home: Path):
        path = runs.run_of(home, "lds", "stu", "run").path
        before = self.contents(path)
        done = runs.train(home, *COMMAND, "name=run", "loader.num_workers=1")
        assert done.code == 0
        assert "Result" in done.out
        assert "step 10/10" not in done.out
        assert self.contents(path) == before  # a disk that cannot be written to would do
        assert not path.with_name(".run.lock").exists()

    def test_other_settings_under_its_name_are_refused(self, home: Path):
        path = runs.run_of(home, "lds", "stu", "run").path
        before = self.contents(path)
        done = runs.train(home, *COMMAND, "name=run", "optimizer.lr=0.1", "seed=3")
        assert done.code == 2
        assert len(done.err.splitlines()) == 1
        assert "optimizer.lr (0.001 → 0.1), seed (0 → 3)" in done.err
        assert self.contents(path) == before

    def test_what_is_refused_late_deletes_and_leaves_nothing(self, home: Path):
        """Lightning's trainer is the last to look at its arguments."""
        run = runs.run_of(home, "lds", "stu", "run")
        before, beside = self.contents(run.path), sorted(run.path.parent.iterdir())
        for name in ("run", "new"):
            done = runs.train(home, *COMMAND, f"name={name}", "overwrite=true", "trainer.strategy=fsdp")
            assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert self.contents(run.path) == before
        assert sorted(run.path.parent.iterdir()) == beside

    def test_settings_that_nothing_says_any_more(self, home: Path):
        run = runs.run_of(home, "lds", "stu", "unknown")
        shutil.copytree(runs.run_of(home, "lds", "stu", "run").path, run.path)
        for file in (run.config, run.manifest, run.summary):
            file.write_bytes(b"")
        command = [*COMMAND, "name=unknown"]
        refused = runs.train(home, *command, "mode=test")
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert "config.yaml and manifest.json are absent or damaged" in refused.err
        run.config.write_text(runs.train(home, *command, "--cfg", "job", "--resolve").out)
        done = runs.train(home, *command)
        assert done.code == 0, done.err
        assert run.read_summary()["test"] == runs.run_of(home, "lds", "stu", "run").read_summary()["test"]

    def test_a_test_under_other_conditions_says_so(self, home: Path):
        run = runs.run_of(home, "lds", "stu", "elsewhere")
        shutil.copytree(runs.run_of(home, "lds", "stu", "run").path, run.path)
        manifest = unsealed(run.manifest.read_text())
        manifest["starts"][0]["packages"]["torch"] = "0"
        run.manifest.write_text(sealed(manifest | {"data": "f00"}))
        refused = runs.train(home, *COMMAND, "name=elsewhere", "mode=test")
        assert refused.code == 2
        assert "was trained on other data (fingerprint f00 → " in refused.err
        done = runs.train(home, *COMMAND, "name=elsewhere", "mode=test", f"checkpoint={run.best}")
        assert done.code == 0
        notes = done.err.splitlines()
        assert [line.startswith(f"note: {run.best} was trained ") for line in notes] == [True, True]
        assert f"under other conditions: torch 0 → {version('torch')}" in notes[1]

    def test_a_run_made_before_the_modules_moved_is_the_same_run(self, home: Path):
        run = runs.run_of(home, "lds", "stu", "earlier")
        shutil.copytree(runs.run_of(home, "lds", "stu", "run").path, run.path)
        config = yaml.safe_load(run.config.read_text())
        config["task"]["_target_"] = "data.lds.LDS"
        config["task"]["data"]["_target_"] = "data.lds.LDSData"
        config["pictures"] = config.pop("figures") | {"_target_": "stu.training.Pictures"}
        earlier = yaml.safe_dump(config, sort_keys=False)
        for command in (["mode=test"], ["mode=test", f"checkpoint={run.best}", "name=null"], []):
            run.config.write_text(earlier)
            done = runs.train(home, *COMMAND, "name=earlier", *command)
            assert (done.code, done.err) == (0, "")
            assert "test loss" in done.out
        run.config.write_text(earlier)
        refused = runs.train(home, *COMMAND, "name=earlier", "optimizer.lr=0.1")
        assert "other settings: optimizer.lr (0.001 → 0.1); choose" in refused.err

    def test_checkpoints_that_are_damaged_or_elsewhere(self, home: Path):
        run = runs.run_of(home, "lds", "stu", "damaged")
        shutil.copytree(runs.run_of(home, "lds", "stu", "run").path, run.path)
        elsewhere = shutil.copy(run.best, home / "elsewhere.ckpt")
        best = run.best.read_bytes()
        run.best.write_bytes(best[: len(best) // 2])
        command = (*COMMAND, "name=damaged", "mode=test")
        tested, other = runs.train(home, *command), runs.train(home, *command, f"checkpoint={elsewhere}")
        assert (tested.code, other.code, other.err) == (0, 0, "")
        same = r"note: \S+: best.ckpt is damaged \(.*\); last.ckpt has the best weights, too, and is read\n"
        assert re.fullmatch(same, tested.err)
        values = [re.findall(r"test (\w+) +([\d.]+)", done.out) for done in (tested, other)]
        assert values[0] == values[1] != []
        run.last.write_bytes(b"damaged")
        refused = runs.train(home, *command)
        assert refused.code == 2
        assert re.fullmatch(r"error: checkpoint=\S+: last.ckpt is damaged .*, best.ckpt is .*\n", refused.err)

    def test_two_at_once_are_refused(self, home: Path):
        with_lock = runs.run_of(home, "lds", "stu", "locked")
        with_lock.open({}, overwrite=False)
        try:
            done = runs.train(home, *COMMAND, "name=locked", "overwrite=true")
        finally:
            with_lock.close()
        assert done.code == 75
        assert len(done.err.splitlines()) == 1
        assert "another process is training this run" in done.err
        assert with_lock.config.exists()

    def test_without_a_name_the_command_finds_its_run_again(self, home: Path):
        overrides = [*COMMAND, "trainer.max_steps=1", "optimizer.betas=[0.8,0.9]"]
        first = runs.train(home, *overrides)
        assert first.code == 0, first.err
        parent = home / "runs" / "lds" / "stu"
        made = sorted(p.name for p in parent.iterdir())
        again = runs.train(home, *reversed(overrides))
        assert again.code == 0, again.err
        assert "step 1/1" not in again.out
        assert sorted(p.name for p in parent.iterdir()) == made


def test_what_is_tested_may_change_until_there_is_a_result(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.open({"trainer": {"limit_test_batches": 0.5, "num_sanity_val_steps": 1}, "seed": 0}, overwrite=False)
    run.close()
    run.checkpoints.mkdir()
    run.last.write_bytes(b"trained")
    other = {"trainer": {"limit_test_batches": 1.0, "num_sanity_val_steps": 0}, "seed": 0}
    run.check(other)
    with pytest.raises(OptionError, match=r"seed \(0 → 1\);"):
        run.check(other | {"seed": 1})
    run.finish(SUMMARY)
    with pytest.raises(
        OptionError, match=r"holds a run with other settings: trainer.limit_test_batches \(0.5 → 1.0\);"
    ):
        run.check(other)
