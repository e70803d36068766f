"""Digits: the pictures, their splits, the order of their pixels, and the package that they come from."""

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data.images.digits import Digits, DigitsData, published
from stu.errors import OptionError
from stu.task import Splits
from tests import runs
from tests.models import composed

ROOT = Path(__file__).parents[2]
SPLITS = Splits._fields


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    return tmp_path_factory.mktemp("digits")


def make_task(folder: Path, data: dict[str, int] | None = None, **options: Any) -> Digits:
    made = DigitsData(dir=str(folder), **(data or {}))
    return Digits(**{"seq_len": 64, "causal": False, "pool": "mean", "permuted": False, "data": made, **options})


def batch_of(task: Digits, count: int = 20) -> Any:
    test = task.data.examples("test")
    return task.collate([test[row] for row in range(count)])


def test_the_splits_share_no_picture_and_have_as_many_of_each_digit(folder: Path):
    data = make_task(folder).data
    pixels, labels = published()
    assert pixels.shape == (1797, 64)
    assert (pixels.min(), pixels.max()) == (0, 16)
    shown = [(tuple(picture.tolist()), label) for split in SPLITS for picture, label in data.examples(split)]
    assert sorted(shown) == sorted(zip(map(tuple, pixels.tolist()), labels.tolist(), strict=True))
    for split in SPLITS:
        counts = np.bincount(data.examples(split).labels, minlength=10) / len(data.examples(split))
        assert abs(counts - np.bincount(labels) / 1797).max() < 0.01


def test_the_seed_and_the_sizes_say_which_pictures_a_split_has(folder: Path):
    first = make_task(folder).data
    fewer, other = (make_task(folder, options).data for options in ({"train": 50, "val": 20}, {"seed": 1}))
    np.testing.assert_array_equal(fewer.examples("test").pixels, first.examples("test").pixels)
    assert not np.array_equal(other.examples("test").labels, first.examples("test").labels)
    assert len({data.fingerprint() for data in (first, fewer, other)}) == 3


def test_pixels_are_normalised_row_by_row(folder: Path):
    task = make_task(folder)
    batch = batch_of(task, 500)
    pixels = torch.from_numpy(np.array(task.data.examples("test").pixels)).float()
    scale = (pixels[0, 10] - pixels[0, 0]) / (batch.inputs[0, 10, 0] - batch.inputs[0, 0, 0])
    torch.testing.assert_close(batch.inputs[..., 0] * scale, pixels - 4.884, atol=1e-4, rtol=0)
    assert batch.mask is None
    assert batch.targets.tolist() == task.data.examples("test").labels.tolist()
    assert abs(batch.inputs.mean()) < 0.02
    assert abs(batch.inputs.std() - 1) < 0.02


def test_the_permutation_is_one_of_all_pixels_the_same_for_all_pictures_and_seeds(folder: Path):
    plain, permuted = (batch_of(make_task(folder, permuted=order)) for order in (False, True))
    order = make_task(folder, {"seed": 1}, permuted=True).order
    assert sorted(order.tolist()) == list(range(64))
    assert (order.diff() == 1).sum() < 5
    torch.testing.assert_close(permuted.inputs, plain.inputs[:, order])
    assert torch.equal(permuted.targets, plain.targets)


@pytest.mark.parametrize("permuted", [False, True])
def test_fewer_pixels_are_means_of_blocks(permuted: bool, folder: Path):
    small, whole = make_task(folder, seq_len=16, permuted=permuted), make_task(folder)
    means = batch_of(whole).inputs.reshape(20, 4, 2, 4, 2).mean((2, 4)).reshape(20, 16, 1)
    torch.testing.assert_close(batch_of(small).inputs, means[:, small.order], atol=1e-5, rtol=0)


def test_baselines(folder: Path):
    """Of the most frequent digit, and of the nearest mean picture, counted one by one."""
    task = make_task(folder, {"train": 200, "test": 100})
    train, test = task.data.examples("train"), task.data.examples("test")
    means = {digit: train.pixels[train.labels == digit].mean(0) for digit in range(10)}
    right = [min(means, key=lambda digit: float(abs(x - means[digit]) @ abs(x - means[digit]))) == y for x, y in test]
    found = task.baselines()
    assert found["nearest mean"] == pytest.approx(np.mean(right))
    assert found["majority"] == pytest.approx(0.1, abs=0.01)
    assert 0.7 < found["nearest mean"] < 1


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(OptionError, match=r'^task=digits: needs scikit-learn: pip install "\.\[digits\]"$'):
        make_task(tmp_path).prepare()


def test_what_is_stored_needs_no_package(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = batch_of(make_task(folder))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert torch.equal(batch_of(make_task(folder)).inputs, before.inputs)


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("val", 0), ("test", 0), ("seed", -1)])
def test_bad_data_options_are_named(name: str, value: int):
    with pytest.raises(OptionError, match=f"^{name}={value}: must be"):
        DigitsData(dir="unused", **{name: value})


def test_more_pictures_than_there_are_are_refused(tmp_path: Path):
    pytest.importorskip("sklearn")
    with pytest.raises(OptionError, match="train=1001: there are only 1,000 rows"):
        make_task(tmp_path, {"train": 1001}).prepare()


@pytest.mark.parametrize("seq_len", [0, 9, 63, 256])
def test_bad_lengths_are_named(seq_len: int):
    with pytest.raises(OptionError, match=f"seq_len={seq_len}: must be 64, or the square of what divides 8"):
        make_task(Path("unused"), seq_len=seq_len)


def test_the_configuration_states_the_defaults():
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/task/digits.yaml"), resolve=False)
    assert set(node) == {"_target_", *inspect.signature(Digits).parameters}
    data = {name: value for name, value in node["data"].items() if name != "_target_"}
    defaults = {name: p.default for name, p in inspect.signature(DigitsData).parameters.items()}
    assert data == {**defaults, "dir": "${paths.data}"}
    assert sum(composed("task=digits").task.data[split] for split in SPLITS) == 1797


@pytest.mark.e2e
def test_a_run(tmp_path: Path):
    pytest.importorskip("sklearn")
    done = runs.train(tmp_path, *runs.small("task=digits", "model=stu", "name=run", "task.permuted=true"))
    assert (done.code, done.err) == (0, "")
    summary = runs.run_of(tmp_path, "digits", "stu", "run").read_summary()
    assert summary["steps"] == 20
    assert set(summary["baselines"]) == {"majority", "nearest mean"}
