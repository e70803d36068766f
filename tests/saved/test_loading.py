"""What was trained is used: `stu.load` of runs, checkpoints and folders predicts what the run was tested with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stu
from stu.cli.composition import build
from stu.errors import OptionError
from stu.preprocessing import Classes, Preprocessing, Text
from stu.training import Run
from tests import runs
from tests.models import composed

# averages of weights, which the best checkpoint has, and statistics of batches
COMMAND = runs.small("task=lra_listops", "model=stu", "callbacks=ema", "name=one", "task.data.test=30")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    done = runs.train(home, *COMMAND)
    assert (done.code, done.err) == (0, "")
    return home


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    return runs.run_of(home, "lra_listops", "stu", "one")


@pytest.fixture(scope="module")
def tested(home: Path) -> tuple[list[str], list[int]]:
    """The texts and labels of the test split."""
    task = build(composed(*COMMAND, f"paths.data={home / 'data'}").task)
    examples = task.datasets().test
    pairs = [examples[number] for number in range(len(examples))]
    return [task.preprocessing.inputs.decode(tokens) for tokens, _ in pairs], [label for _, label in pairs]


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """A copy of the run, to be changed."""
    return Run(Path(shutil.copytree(run.path, tmp_path / "run")))


def rewrite(path: Path, **changes: object) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)


def test_predictions_have_the_accuracy_of_the_summary(run: Run, tested: tuple[list[str], list[int]]):
    texts, labels = tested
    predictions = stu.load(run.path).predict(texts)
    right = [prediction.value == label for prediction, label in zip(predictions, labels, strict=True)]
    assert np.mean(right) == pytest.approx(run.read_summary()["test"]["accuracy"], abs=1e-6)
    assert sum(predictions[0].probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert max(predictions[0].probabilities, key=predictions[0].probabilities.get) == predictions[0].value


def test_padding_changes_no_prediction(run: Run, tested: tuple[list[str], list[int]]):
    loaded = stu.load(run.path)
    texts = ["3", *tested[0][:4], "[MAX 1 2 ]"]
    together, alone = loaded.predict(texts), [loaded.predict([text])[0] for text in texts]
    for some, one in zip(together, alone, strict=True):
        assert list(some.probabilities.values()) == pytest.approx(list(one.probabilities.values()), abs=1e-6)


def test_without_hydra_lightning_and_data(run: Run, tmp_path: Path):
    """In another process, elsewhere, where `data` cannot be imported: a run, and what was exported of it."""
    code = f"""
import json, sys
import stu
loaded = stu.load({str(run.path)!r})
loaded.save("exported")
again = stu.load("exported")
words = ["[MAX 2 9 [MIN 4 7 ] 0 ]", "3"]
assert loaded.predict(words) == again.predict(words)
import importlib.util
assert importlib.util.find_spec("data") is None
heavy = "hydra omegaconf lightning torchmetrics datasets pyarrow yaml data".split()
print(json.dumps([[name for name in heavy if name in sys.modules], loaded.predict(words)[1].probabilities]))
"""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "stu").symlink_to(Path(stu.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "package"), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    heavy, probabilities = json.loads(done.stdout)
    assert heavy == []
    here = stu.load(tmp_path / "exported")
    assert list(probabilities.values()) == pytest.approx(list(here.predict(["3"])[0].probabilities.values()), abs=1e-5)
    assert here.about["test"] == run.read_summary()["test"]
    assert "| test accuracy |" in (tmp_path / "exported" / "README.md").read_text()


def test_a_checkpoint_a_run_or_the_folder_of_one(run: Run, home: Path):
    weights = [stu.load(path).model.state_dict() for path in (run.path, run.best, home / "runs")]
    runs.assert_identical(weights[1], weights[0])
    runs.assert_identical(weights[2], weights[0])


def test_checkpoints_that_do_not_describe_their_model_are_made_by_their_settings(copy: Run):
    before = stu.load(copy.path).predict(["[SM 1 2 ]"])
    checkpoint = torch.load(copy.best, weights_only=True)
    del checkpoint["trained"]
    torch.save(checkpoint, copy.best)
    copy.last.unlink()
    assert stu.load(copy.path).predict(["[SM 1 2 ]"]) == before
    copy.manifest.write_text("{}")
    with pytest.raises(OptionError, match=r"does not describe its model, and manifest\.json of its run"):
        stu.load(copy.path)


def test_another_file_of_the_best_weights_serves(copy: Run):
    before = stu.load(copy.path).model.state_dict()
    shutil.copyfile(copy.best, copy.checkpoints / "best-copy.ckpt")
    copy.best.write_bytes(copy.best.read_bytes()[:-100])
    runs.assert_identical(stu.load(copy.path).model.state_dict(), before)
    for path in copy.checkpoints.iterdir():
        path.write_bytes(b"x" * 100)
    with pytest.raises(OptionError, match=r"has no best checkpoint: last\.ckpt is damaged"):
        stu.load(copy.path)
    with pytest.raises(OptionError, match=r"best\.ckpt: cannot be read"):
        stu.load(copy.best)


def test_what_holds_no_model_is_one_line(home: Path, run: Run, copy: Run, tmp_path: Path):
    shutil.copytree(copy.path, tmp_path / "sweep" / "other")
    shutil.copytree(copy.path, tmp_path / "sweep" / "one")
    (tmp_path / "empty").mkdir()
    for path, line in {
        tmp_path / "nothing": "no such run or folder",
        tmp_path / "empty": "holds no run, and no model",
        tmp_path / "sweep": "holds 2 runs, name one of them: one, other",
        run.config: "must be a run directory, a checkpoint, or a folder",
    }.items():
        with pytest.raises(OptionError, match=line):
            stu.load(path)
    with pytest.raises(OptionError, match="device=tpu"):
        stu.load(run.path, device="tpu")


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (["3", "[MAX 4 x ]"], r"inputs\[1\]=x: must be of the words"),
        (["3 " * 65], r"inputs\[0\]=65 steps: must have 1 to 64"),
        ([""], r"inputs\[0\]=0 steps"),
        ([3], r"inputs\[0\]=3: must be a text"),
        ("3", "must be a list of inputs"),
    ],
)
def test_wrong_inputs_are_one_line(run: Run, inputs: list, line: str):
    with pytest.raises(OptionError, match=line):
        stu.load(run.path).predict(inputs)


def test_other_data_are_noticed(home: Path, run: Run, copy: Run):
    """A run that was trained with another preprocessing is neither resumed nor, unless it is named, tested."""
    other = Preprocessing(Text(), Classes((0, 1))).as_dict()
    trained = torch.load(copy.best, weights_only=True)["trained"] | {"preprocessing": other}
    place = run.path.parent / "two"
    shutil.copytree(copy.path, place)
    for name in ("best.ckpt", "last.ckpt"):
        rewrite(place / "checkpoints" / name, trained=trained)
    (place / "summary.json").unlink()
    line = "was trained on other data: their inputs or targets were read in another way; "
    resumed = runs.train(home, *COMMAND[:-2], COMMAND[-1], "name=two")
    tested = runs.train(home, *COMMAND[:-2], COMMAND[-1], "name=two", "mode=test")
    shutil.rmtree(place)
    assert (resumed.code, tested.code) == (2, 2), resumed.err + tested.err
    assert line + "choose another name" in resumed.err
    assert line + "name it to test it anyway" in tested.err


# a small one of each kind: tokens, texts, numbers with and without units
@pytest.mark.parametrize(
    "name",
    [
        "lra_listops",
        "digits",
        "lds",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("copying", "adding", "pendulum")),
    ],
)
def test_tasks_read_inputs_as_their_preprocessing_does(home: Path, name: str):
    task = build(composed(*runs.small(f"task={name}", "model=lru"), f"paths.data={home / 'data'}").task)
    task.prepare()
    inputs = task.collate([task.datasets().test[0]]).inputs[0].numpy()
    encoded = task.preprocessing.inputs.encode(task.preprocessing.inputs.decode(inputs))
    assert encoded.dtype == inputs.dtype
    assert encoded == pytest.approx(inputs, abs=1e-6)
    assert Preprocessing.read(json.loads(json.dumps(task.preprocessing.as_dict()))) == task.preprocessing
