"""The collected results: their numbers are those of the runs, and those of the README are theirs."""

import json
import shutil
from pathlib import Path

import pytest

from experiments.lra.__main__ import main
from stu.files import unsealed
from stu.training.loggers import read_metrics
from tests import runs

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "lra"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    done = runs.train(home, *runs.small("task=lra_listops", "model=stu", "name=one", "log_every=5"))
    assert done.code == 0, done.err
    return home / "runs" / "lra_listops" / "stu" / "one"


def test_results_are_those_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(run), "--out", str(tmp_path / "new")]) == 0
    [result] = json.loads((tmp_path / "new" / "results.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert result["test"] == summary["test"]
    assert result["run"] == ["lra_listops", "stu", "one"]
    assert "train.py" in result["starts"][0]["command"]
    rows = {(step, name): value for step, _, name, value in read_metrics(run / "metrics.csv")}
    for name in ("train/accuracy", "val/accuracy"):
        assert result["curves"][name] == [[step, value] for (step, key), value in rows.items() if key == name]
        assert result["curves"][name]
    assert (tmp_path / "new" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert f"accuracy={summary['test']['accuracy']}" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_is_read(run: Path, tmp_path: Path):
    """Its modules, the folder of its figures and its baselines had other names."""
    old = Path(shutil.copytree(run, tmp_path / "runs" / "lra_listops" / "stu" / "one"))
    config = (old / "config.yaml").read_text().replace("data.lra.listops", "data.lra_listops")
    (old / "config.yaml").write_text(f"{config}pictures: {{when: end}}\n")
    (old / "pictures").mkdir()
    summary = unsealed((run / "summary.json").read_text()) | {"baselines": {"free run: persistence": 0.5}}
    (old / "summary.json").write_text(json.dumps(summary))
    for path, out in ((run, tmp_path / "new"), (old, tmp_path / "old")):
        assert main([str(path), "--out", str(out)]) == 0
    new, earlier = (json.loads((tmp_path / out / "results.json").read_text())[0] for out in ("new", "old"))
    assert earlier == new | {"baselines": {"free run: persistence": 0.5}}


def test_nothing_is_replaced_unasked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "results.json").write_text("mine")
    assert main([str(run), "--out", str(tmp_path)]) == 2
    assert (tmp_path / "results.json").read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "results.json").read_text() != "mine"


def test_an_unfinished_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no finished run: summary.json is missing or damaged\n"


@pytest.mark.parametrize("file", ["manifest.json", "metrics.csv", "summary.json"])
def test_a_damaged_file_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str):
    damaged = Path(shutil.copytree(run, tmp_path / "runs" / "lra_listops" / "stu" / "one"))
    (damaged / file).write_text("step,epoch,metric,value\n{")
    assert main([str(damaged), "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert file in line
    assert not (tmp_path / "out").exists()


def test_the_readme_quotes_its_results():
    """Every accuracy in its table, in percent, is that of the file which it names."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for file in sorted(FOLDER.glob("results/*/results.json")):
        for result in json.loads(file.read_text()):
            task, model, name = result["run"]
            [line] = [line for line in readme.splitlines() if f"`{model}`, {name}" in line and f"`{task}`" in line]
            assert f"{100 * result['test']['accuracy']:.1f} %" in line
            assert f"{100 * result['best']['value']:.1f} %" in line
            assert f"{result['parameters']:,}" in line
