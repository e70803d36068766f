"""Image: the pixels, their normalisation, the splits, and the images that are refused."""

import inspect
import pickle
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data.lra import image as lra_image
from data.lra.image import CIFAR10, CIFARData, SequentialCIFAR
from data.store import sources as of_others
from data.store.pixels import PixelExamples
from stu.errors import OptionError
from tests import runs, sources

ROOT = Path(__file__).parents[2]
SIZES = {"train": 40, "val": 10, "test": 10}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.cifar10(tmp_path_factory.mktemp("cifar10"))


def make_data(folder, source, **options):
    given = {**SIZES, "color": False, "dir": str(folder), "source": None if source is None else str(source)}
    return CIFARData(**{**given, **options})


def make_task(data, **options):
    return SequentialCIFAR(
        **{"seq_len": 1024, "causal": False, "pool": "mean", "tokens": False, "data": data, **options}
    )


def drawn(rows, seed):
    """The pixels and labels that `sources.images` has, (n, 32, 32, 3) and (n,)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), np.uint8)
    return pixels, np.arange(rows) % 10


def found_in(images, pixels):
    """The rows of `pixels` (n, …) that the `images` (m, …) are."""
    rows = {one.tobytes(): row for row, one in enumerate(pixels)}
    return [rows[one.tobytes()] for one in images]


def grey_of(pixels):
    """ITU-R 601-2 luma, (n, 32, 32, 3) → (n, 32, 32)."""
    return pixels.astype(np.float64) @ [0.299, 0.587, 0.114]


# Pixels


def test_grey_pixels(source, tmp_path):
    data = make_data(tmp_path, source)
    luma = grey_of(drawn(10, 1)[0]).reshape(10, 1024)
    pixels = data.examples("test").pixels
    assert pixels.dtype == np.uint8
    assert abs(pixels - luma).max() < 0.501  # rounded; the last bits of the weights are not the same
    sure = abs(luma % 1 - 0.5) > 0.01
    np.testing.assert_array_equal(pixels[sure], luma.round()[sure])


def test_the_published_rounding():
    """Pillow's: weights in 16 bits, halves up."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    luma = (pixels.astype(np.int64) @ [19595, 38470, 7471] + 2**15) >> 16
    np.testing.assert_array_equal(lra_image.decoded(sources.png(pixels), "L"), luma.reshape(-1))


def test_colored_pixels(source, tmp_path):
    """Row by row, the three channels of a pixel together."""
    task = make_task(make_data(tmp_path, source, color=True))
    test = task.data.examples("test")
    expected = drawn(10, 1)[0]
    np.testing.assert_array_equal(test.pixels, expected.reshape(10, -1))
    batch = task.collate([test[i] for i in range(10)])
    assert batch.inputs.shape == (10, 1024, 3)
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    pixel = expected[4, 3, 7]
    np.testing.assert_allclose(batch.inputs[4, 3 * 32 + 7], (pixel / 255 - mean) / std, atol=1e-3)


@pytest.mark.parametrize("color", [False, True])
def test_normalisation(color, source, tmp_path):
    task = make_task(make_data(tmp_path, source, color=color))
    test = task.data.examples("test")
    batch = task.collate([test[i] for i in range(10)])
    mean, std = lra_image.COLORED if color else ([0.480784], [0.239216])
    expected = (test.pixels.reshape(10, 1024, -1) / 255 - mean) / std
    assert batch.inputs.dtype == torch.float32
    np.testing.assert_allclose(batch.inputs, expected, atol=1e-5)
    assert batch.mask is None
    assert batch.targets.tolist() == list(range(10))


def test_grey_values_as_tokens(source, tmp_path):
    task = make_task(make_data(tmp_path, source), tokens=True)
    test = task.data.examples("test")
    batch = task.collate([test[i] for i in range(10)])
    assert batch.inputs.dtype == torch.int64
    np.testing.assert_array_equal(batch.inputs, test.pixels)
    encoder = task.encoder(8)
    assert encoder.embedding.num_embeddings == 256
    assert encoder(batch.inputs).shape == (10, 1024, 8)


@pytest.mark.parametrize(("color", "tokens"), [(False, False), (True, False), (False, True)])
def test_fewer_pixels_are_means_of_blocks(color, tokens, source, tmp_path):
    data = make_data(tmp_path, source, color=color)
    examples = [data.examples("test")[i] for i in range(10)]
    small = make_task(data, seq_len=64, tokens=tokens).collate(examples).inputs
    whole = make_task(data, tokens=tokens).collate(examples).inputs
    blocks = whole.reshape(10, 8, 4, 8, 4, -1).double().mean((2, 4)).reshape(10, 64, -1)
    expected = blocks.squeeze(2).round().long() if tokens else blocks.float()
    torch.testing.assert_close(small, expected, atol=1 if tokens else 1e-5, rtol=0)
    assert small.dtype == whole.dtype


# Splits and the cache


@pytest.mark.parametrize("color", [False, True])
def test_every_image_is_in_one_split(color, source, tmp_path):
    data = make_data(tmp_path, source, color=color)
    official, labels = drawn(50, 0)
    pixels = official if color else np.stack([lra_image.decoded(sources.png(one), "L") for one in official])
    rows = {split: found_in(data.examples(split).pixels, pixels) for split in ("train", "val")}
    assert sorted(rows["train"] + rows["val"]) == list(range(50))
    for split, count in (("train", 4), ("val", 1)):
        stored = data.examples(split).labels
        assert stored.tolist() == labels[rows[split]].tolist()
        assert np.bincount(stored).tolist() == [count] * 10, "as many of each class"


def test_splits(source, tmp_path):
    one, other, fewer = (make_data(tmp_path, source, **o) for o in ({}, {"seed": 1}, {"train": 20}))
    assert not np.array_equal(one.examples("val").pixels, other.examples("val").pixels)
    np.testing.assert_array_equal(one.examples("test").pixels, other.examples("test").pixels)
    np.testing.assert_array_equal(one.examples("val").pixels, fewer.examples("val").pixels)
    assert set(found_in(fewer.examples("train").pixels, one.examples("train").pixels)) < set(range(40))


def test_examples(source, tmp_path):
    data = make_data(tmp_path, source)
    train, stored = data.examples("train"), datasets.Dataset.from_file(str(data.prepare() / "train.arrow"))
    assert len(train) == len(stored) == 40
    assert train.lengths is None
    assert train[7][0].tolist() == stored[7]["pixels"]
    assert train[7][1] == stored[7]["label"]
    assert train[-1][0].tolist() == stored[39]["pixels"]
    for index in (40, -41):
        with pytest.raises(IndexError):
            train[index]
    message = pickle.dumps(train)
    assert len(message) < 1000
    copy = pickle.loads(message)
    assert isinstance(copy, PixelExamples)
    np.testing.assert_array_equal(copy[7][0], train[7][0])


def test_both_tasks_read_one_data_set(source, tmp_path):
    grey, color = (make_data(tmp_path, source, color=color) for color in (False, True))
    assert grey.prepare() != color.prepare()
    assert grey.examples("train").labels.tolist() == color.examples("train").labels.tolist()
    assert grey.prepare().parent == color.prepare().parent == tmp_path / "cifar10"


def with_images(rows, seed):
    """As the hub has it, decoded."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict(sources.images(rows, seed), features=features)


def test_a_saved_data_set(source, tmp_path):
    datasets.disable_progress_bars()
    splits = {"train": with_images(50, 0), "test": with_images(10, 1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    saved, expected = make_data(tmp_path, tmp_path / "saved"), make_data(tmp_path, source)
    for split in SIZES:
        np.testing.assert_array_equal(saved.examples(split).pixels, expected.examples(split).pixels)


def test_what_is_fetched(source, tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, *, revision, split):
        asked.append((name, revision, split))
        return with_images(*{"train": (50, 0), "test": (10, 1)}[split])

    monkeypatch.setattr(of_others, "answers", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fetched, expected = make_data(tmp_path, None), make_data(tmp_path, source)
    for split in SIZES:
        np.testing.assert_array_equal(fetched.examples(split).pixels, expected.examples(split).pixels)
    assert asked == [("uoft-cs/cifar10", CIFAR10.revision, split) for split in ("train", "test")]


def test_nothing_can_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(of_others, "answers", lambda url: False)
    message = "uoft-cs/cifar10 cannot be fetched: .* plain_text/train-00000-of-00001.parquet and plain_text/test-0"
    with pytest.raises(OptionError, match=message):
        make_data(tmp_path, None).prepare()


# What is refused


def replaced(folder, split="train", **columns):
    """The small CIFAR-10 with a file that has other columns."""
    parts = {**sources.images({"train": 50, "test": 10}[split]), **columns}
    given = {name: column for name, column in parts.items() if column is not None}
    sources.parquet(sources.cifar10(folder) / f"plain_text/{split}-00000-of-00001.parquet", given)


def with_image(folder, content):
    """The small CIFAR-10 whose images are all `content`."""
    replaced(folder, img=[{"bytes": content, "path": None}] * 50)


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
PNG = sources.png(PIXELS)
SMALL = sources.png(PIXELS[:28])
GREY = sources.png(PIXELS[:, :, 0])
UNREADABLE = {
    "no image": (b"image", "cannot identify image file"),
    "nothing": (b"", "cannot identify image file"),
    "cut": (PNG[:1000], ""),
    "flipped header": (flipped(PNG, 20), ""),
    "flipped pixels": (flipped(PNG, 1500), ""),
    "small": (SMALL, "32 × 28 pixels of mode RGB"),
    "grey": (GREY, "32 × 32 pixels of mode L"),
}


@pytest.mark.parametrize(("content", "problem"), UNREADABLE.values(), ids=list(UNREADABLE))
def test_wrong_images_are_named(content, problem, tmp_path):
    with_image(tmp_path / "in", content)
    message = f"source={tmp_path}/in: image 0 of val must be RGB, 32 × 32 pixels: .*{problem}"
    with pytest.raises(OptionError, match=message):
        make_data(tmp_path, tmp_path / "in").prepare()
    assert not list((tmp_path / "cifar10").glob("*/"))


LABELS = [row % 10 for row in range(50)]
WRONG = {
    "other name": (partial(replaced, img=None, image=LABELS), r"must have the columns img\.bytes \(binary\), label"),
    "no images": (partial(replaced, img=LABELS), r"has img \(int64\), label \(int64\)"),
    "missing image": (partial(with_image, content=None), "train has no img.bytes in row 0"),
    "label above": (partial(replaced, label=[*LABELS[:-1], 10]), "train has a label in row 49 that is not 0 … 9"),
    "label below": (partial(replaced, split="test", label=[-1] * 10), "test has a label in row 0 that is not 0 … 9"),
    "no file": (Path.mkdir, r"must hold train\*\.parquet, .* of https://huggingface\.co/datasets/uoft-cs/cifar10"),
}


@pytest.mark.parametrize(("write", "problem"), WRONG.values(), ids=list(WRONG))
def test_wrong_sources_are_named(write, problem, tmp_path):
    write(tmp_path / "in")
    with pytest.raises(OptionError, match=f"source={tmp_path}/in.*{problem}"):
        make_data(tmp_path, tmp_path / "in").prepare()
    assert not list((tmp_path / "cifar10").glob("*/"))


@pytest.mark.parametrize(("name", "value", "left"), [("train", 41, 40), ("val", 51, 50), ("test", 11, 10)])
def test_too_few_images_are_named(name, value, left, source, tmp_path):
    with pytest.raises(OptionError, match=f"{name}={value}: there are only {left} rows for it"):
        make_data(tmp_path, source, **{name: value}).prepare()


# The task


@pytest.mark.parametrize("option", ["color", "seed", "train", "val", "test"])
def test_every_option_has_a_fingerprint(option):
    data = CIFARData(dir="unused", color=False)
    changed = CIFARData(
        dir="unused", **{"color": False, option: getattr(data, option) + 1 if option != "color" else True}
    )
    assert make_task(data).fingerprint() != make_task(changed).fingerprint()
    assert make_task(data).fingerprint() == make_task(CIFARData(dir="elsewhere", color=False)).fingerprint()


def test_the_version_and_the_contents_have_a_fingerprint(tmp_path, monkeypatch):
    sources.cifar10(tmp_path / "in")
    first = make_task(make_data("unused", tmp_path / "in")).fingerprint()
    replaced(tmp_path / "in", split="test", label=[1] * 10)
    second = make_task(make_data("unused", tmp_path / "in")).fingerprint()
    monkeypatch.setattr(lra_image, "VERSION", 0)
    assert len({first, second, make_task(make_data("unused", tmp_path / "in")).fingerprint()}) == 3


def test_baselines(tmp_path):
    replaced(tmp_path / "in", label=[3] * 30 + [4] * 20)
    replaced_test = {**sources.images(10), "label": [3] * 4 + [5] * 6}
    sources.parquet(tmp_path / "in/plain_text/test-00000-of-00001.parquet", replaced_test)
    assert make_task(make_data(tmp_path, tmp_path / "in")).baselines() == {"majority": 0.4}


@pytest.mark.parametrize("color", [False, True])
def test_a_batch_through_encoder_and_head(color, source, tmp_path):
    task = make_task(make_data(tmp_path, source, color=color), pool="last")
    task.prepare()
    splits = task.datasets()
    assert list(map(len, splits)) == list(SIZES.values())
    batch = task.collate([splits.val[i] for i in range(5)])
    features = task.encoder(8)(batch.inputs)
    head = task.head(8)
    logits = head(features, batch.mask)
    torch.testing.assert_close(logits, head.linear(features[:, -1]))
    prediction, target = task.scored(logits, batch)
    assert prediction.shape == (5, 10)
    expected = -logits.log_softmax(1)[torch.arange(5), batch.targets].mean()
    torch.testing.assert_close(task.loss(prediction, target), expected)
    metric = task.metrics()["accuracy"]
    metric.update(torch.eye(10)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2]))
    assert metric.compute() == 0.75


@pytest.mark.parametrize(("name", "color"), [("lra_image", False), ("cifar_color", True)])
def test_the_configuration_states_the_defaults(name, color):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/task/{name}.yaml"), resolve=False)
    data = node["data"]
    assert set(node) == {"_target_", *inspect.signature(SequentialCIFAR).parameters}
    assert data.pop("_target_") == "data.lra.image.CIFARData"
    defaults = {name: p.default for name, p in inspect.signature(CIFARData).parameters.items()}
    assert data == {**defaults, "dir": "${paths.data}", "color": color}
    assert (node["seq_len"], node["pool"], node["tokens"]) == (1024, "mean", False)
    assert data["train"] + data["val"] == CIFAR10.rows["train"]
    assert data["test"] == CIFAR10.rows["test"]


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("val", 0), ("test", 0), ("seed", -1)])
def test_bad_data_options_are_named(name, value):
    with pytest.raises(OptionError, match=f"{name}={value}: must be"):
        CIFARData(dir="unused", color=False, **{name: value})


@pytest.mark.parametrize("seq_len", [0, 1023, 1025, 9, 4096])
def test_bad_lengths_are_named(seq_len):
    with pytest.raises(OptionError, match=f"seq_len={seq_len}: must be 1024, or the square of what divides 32"):
        make_task(CIFARData(dir="unused", color=False), seq_len=seq_len)


def test_colored_pixels_are_no_tokens():
    with pytest.raises(OptionError, match=r"tokens=True: must be false where data\.color=true"):
        make_task(CIFARData(dir="unused", color=True), tokens=True)


# As a command


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("task", "options"), [("lra_image", ()), ("lra_image", ("task.tokens=true",)), ("cifar_color", ())]
)
def test_a_run(task, options, tmp_path):
    command = runs.small(f"task={task}", "model=stu", "name=run", *options, *sources.overrides(task, tmp_path))
    done = runs.train(tmp_path, *command)
    assert done.code == 0, done.err
    assert done.err == ""
    summary = runs.run_of(tmp_path, task, "stu", "run").read_summary()
    assert summary["steps"] == 20
    assert summary["baselines"] == {"majority": 0.1}
