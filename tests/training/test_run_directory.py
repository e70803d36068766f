"""A run is a directory: claimed by one process, resumed by name, never redone, never mixed up with another."""

import json
import math
import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stu.errors import OptionError
from stu.training import MetricsCSV, Run
from stu.training.loggers import read_metrics
from stu.training.run import FREE_KEYS, MOVED, flatten, is_free, relocated, run_name
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
    torch.save({"global_step": step, "state_dict": {"w": torch.ones(2)}}, run.last)
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

    def test_a_place_where_nothing_can_be_written(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(OptionError) as error:
            Run(tmp_path / "file" / "run").open(CONFIG, overwrite=False)
        assert error.value.name == "paths.runs"


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


class TestEarlierRuns:
    def test_their_modules_are_known_by_the_present_names(self):
        flat = {
            "task._target_": "data.lds.LDS",
            "task.data._target_": "data.lds.LDSData",
            "task.data.note": "data.lds.X",
        }
        assert relocated(flat) == {
            "task._target_": "data.systems.lds.LDS",
            "task.data._target_": "data.systems.lds.LDSData",
            "task.data.note": "data.lds.X",  # a text, not a target
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
        before.pop("config.yaml")  # says what was asked for last
        after = self.contents(path)
        after.pop("config.yaml")
        assert after == before

    def test_other_settings_under_its_name_are_refused(self, home: Path):
        path = runs.run_of(home, "lds", "stu", "run").path
        before = self.contents(path)
        done = runs.train(home, *COMMAND, "name=run", "optimizer.lr=0.1", "seed=3")
        assert done.code == 2
        assert len(done.err.splitlines()) == 1
        assert "optimizer.lr (0.001 → 0.1), seed (0 → 3)" in done.err
        assert self.contents(path) == before

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

    def test_two_at_once_are_refused(self, home: Path):
        with_lock = runs.run_of(home, "lds", "stu", "locked")
        with_lock.open({}, overwrite=False)
        try:
            done = runs.train(home, *COMMAND, "name=locked", "overwrite=true")
        finally:
            with_lock.close()
        assert done.code == 2
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
