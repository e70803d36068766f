"""Cards of data sets: numbers counted in another way, invalid data, tables, figures and errors."""

import math
import re
import runpy
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from omegaconf import OmegaConf
from PIL import Image

from data.lra.listops import ListOps
from data.prepare import __main__ as prepare
from data.prepare.cards import Card, Counts, InvalidData, Moments, Split, card_of, markdown, rows_of
from data.systems.lds import LDS
from stu.cli.check import check
from stu.cli.composition import build
from stu.cli.errors import USAGE
from stu.cli.usage import options_of
from stu.task import Batch, Splits, Task
from tests import runs, sources
from tests.models import composed

TASKS = options_of("task")
FETCHED = sorted(sources.WRITERS)
SIZES = ("task.data.train=40", "task.data.val=10", "task.data.test=10")


class Done(NamedTuple):
    """The exit code and the output of a command that ran in this process."""

    code: Any
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`python -m data.prepare …`, but in this process; its cache in the test's folder, without a network."""
    monkeypatch.setenv("STU_DATA", str(tmp_path / "data"))
    for name in ("HYDRA_FULL_ERROR", "STU_ERROR_LINES"):  # which `stu.cli.errors.run` sets
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("data.store.sources.answers", lambda url: False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["data/prepare.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(prepare.__file__), run_name="__main__")
        return Done(end.value.code, *capsys.readouterr())

    return run


def built(folder: Path, name: str, *overrides: str) -> Any:
    """A small task, its data below `folder`; the same arguments give an equal task."""
    config = composed(*runs.small(f"task={name}")).copy()  # composed once; what differs is set in the copy
    for override in (f"paths.data={folder / 'data'}", *sources.overrides(name, folder), *overrides):
        key, _, value = override.partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value), force_add=False)
    task = build(config.task)
    task.prepare()
    return task


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """`built` in the test's folder."""
    return partial(built, tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Card]:
    """Small images in a folder, their task and its card; drawn once."""
    folder = tmp_path_factory.mktemp("images")
    task, rebuilt = (built(folder, "lra_pathfinder") for _ in range(2))
    return folder, task, card_of("lra_pathfinder", task, rebuilt)


def rows_in(folder: Path, split: str) -> dict[str, list[Any]]:
    """The columns of an Arrow file in the cache, as plain lists."""
    [file] = folder.glob(f"data/*/*/{split}.arrow")
    return Dataset.from_file(str(file)).to_dict()


class TestNumbers:
    """What a card says, counted in another way from what lies in the cache."""

    def test_tokens_and_labels(self, small: Any, tmp_path: Path):
        task = small("lra_listops", "task.data.train=600", "task.data.val=30")  # more than two batches
        card = card_of("lra_listops", task, small("lra_listops", "task.data.train=600", "task.data.val=30"))
        assert (card.name, card.fingerprint, card.monitor) == ("lra_listops", task.fingerprint(), "accuracy")
        assert list(card.splits) == ["train", "val", "test"]
        columns = {split: rows_in(tmp_path, split) for split in card.splits}
        for split, found in card.splits.items():
            tokens, labels = columns[split]["tokens"], columns[split]["label"]
            assert found.size == len(labels)
            assert found.lengths.tolist() == list(map(len, tokens))
            assert dict(enumerate(found.targets.counts)) == {k: labels.count(k) for k in range(10)}
            counted = Counter(token for sequence in tokens for token in sequence)
            assert {k: n for k, n in enumerate(found.inputs.counts.tolist()) if n} == dict(counted)
            assert found.repeats == 0
        majority = max(range(10), key=columns["train"]["label"].count)
        assert card.baselines["majority"] == columns["test"]["label"].count(majority) / 10
        assert set(card.baselines) == {"majority", "first token"}

    @pytest.mark.slow
    def test_reals(self, small: Any):
        task = small("lds", "task.data.train=300")
        card = card_of("lds", task, small("lds", "task.data.train=300"))
        for number, (split, size) in enumerate([("train", 300), ("val", 10), ("test", 10)]):
            found = card.splits[split]
            assert (found.size, found.repeats, found.lengths.tolist()) == (size, 0, [64] * size)
            sequences = [task.data.sequence(number, index) for index in range(size)]
            for counted, parts in zip((found.inputs, found.targets), zip(*sequences, strict=True), strict=True):
                values = np.concatenate(parts).astype(np.float64)
                assert counted.count == values.size
                assert counted.mean == pytest.approx(values.mean(), abs=1e-9)
                assert counted.std == pytest.approx(values.std(), rel=1e-7)
                assert (counted.min, counted.max) == (values.min(), values.max())
        assert card.baselines == task.baselines()

    @pytest.mark.slow
    def test_images(self, images: tuple[Path, Any, Card]):
        folder, _, card = images
        [file] = folder.glob("data/lra_pathfinder/*/00000.arrow")
        columns = Dataset.from_file(str(file)).to_dict()
        pixels = np.array(columns["pixels"][:40]) / 255
        train = card.splits["train"]
        assert train.lengths.tolist() == [64] * 40  # of 1024 pixels the means of blocks of 16
        assert train.inputs.mean == pytest.approx(pixels.mean(), rel=1e-6)
        blocks = pixels.reshape(40, 8, 4, 8, 4).mean((2, 4))
        assert train.inputs.std == pytest.approx(blocks.std(), rel=1e-6)
        assert train.inputs.max == pytest.approx(blocks.max(), rel=1e-6)
        assert train.targets.counts.tolist() == [columns["label"][:40].count(k) for k in (0, 1)]
        assert set(card.baselines) == {"majority", "marker distance"}

    def test_pairs_are_two_sequences_each(self, small: Any):
        task, rebuilt = small("lra_retrieval"), small("lra_retrieval")
        card = card_of("lra_retrieval", task, rebuilt)
        seen: list[bytes] = []
        for split, examples in zip(Splits._fields, task.datasets(), strict=True):
            pairs = [examples[index] for index in range(len(examples))]
            assert card.splits[split].size == len(pairs)
            lengths = sorted(len(text) for pair, _ in pairs for text in pair)
            assert sorted(card.splits[split].lengths) == lengths
            repeats = 0
            for (first, second), _ in pairs:
                key = first.tobytes() + b"\0" + second.tobytes()
                repeats += key in seen
                seen.append(key)
            assert card.splits[split].repeats == repeats
        assert card.splits["train"].repeats > 0  # few papers, in many pairs

    def test_repeated_inputs(self, tmp_path: Path, small: Any):
        """In the same split, or in an earlier one; a longer sequence with the same beginning is another."""
        texts = {"train": ["[MAX 1 2 ]", "[MAX 1 2 ]", "[MIN 3 2 ]", "2"], "val": ["[MAX 1 2 ]", "[MAX 1 2 2 ]"]}
        for split, lines in {**texts, "test": ["[MED 2 ]", "2", "[MED 2 2 ]"]}.items():
            rows = "".join(f"{line}\t2\r\n" for line in lines)
            (tmp_path / f"basic_{split}.tsv").write_bytes(f"Source\tTarget\r\n{rows}".encode())
        task, rebuilt = (small("lra_listops", f"task.data.source={tmp_path}") for _ in range(2))
        card = card_of("lra_listops", task, rebuilt)
        assert [split.repeats for split in card.splits.values()] == [1, 1, 1]
        assert card.splits["val"].targets.counts.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 0, 0]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", FETCHED)
    def test_every_task_has_a_card(self, name: str, small: Any):
        """Of those that `task=all` cannot build here."""
        card = card_of(name, small(name), small(name))
        assert [split.size for split in card.splits.values()] == [40, 10, 10]
        assert len(rows_of(card)) >= 4
        assert f"`{name}`" in markdown([card])


class Altered:
    """Examples, one of which is replaced."""

    def __init__(self, examples: Any, index: int, example: tuple[Any, Any], lengths: np.ndarray | None = None) -> None:
        self.examples, self.index, self.example = examples, index, example
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.example if index == self.index else self.examples[index]


TOKENS = np.array([1, 2, 3], np.uint8)
REALS = np.zeros((64, 3), np.float32)


def with_a(value: float) -> np.ndarray:
    """Reals, one of which is `value`."""
    return np.where(np.arange(192).reshape(64, 3) == 100, np.float32(value), REALS)


@pytest.mark.parametrize(
    ("name", "example", "problem"),
    [
        ("lra_listops", (TOKENS[:0], 1), "a sequence is empty"),
        ("lra_listops", (np.ones(65, np.uint8), 1), "a sequence has 65 steps, must have at most 64"),
        ("lra_listops", (TOKENS, 10), "labels are 0 to 10, must be 0 to 9"),
        ("lra_listops", (TOKENS, -1), "labels are -1 to 9, must be 0 to 9"),
        ("lra_listops", (TOKENS + 13, 1), "tokens are 0 to 16, which the encoder does not take"),
        ("lds", (REALS[:65][:0], REALS[:0]), "a sequence is empty"),
        ("lds", (with_a(math.nan), REALS), "not all numbers are finite"),
        ("lds", (with_a(math.inf), REALS), "not all numbers are finite"),
        ("lds", (REALS, with_a(-math.inf)), "not all numbers are finite"),
        ("lds", (REALS, with_a(math.nan)), "not all numbers are finite"),
    ],
)
def test_an_invalid_example_is_found(name: str, example: tuple[Any, Any], problem: str, small: Any, monkeypatch: Any):
    """Wherever it is: here the last but one of the second split."""
    task, rebuilt = small(name), small(name)
    splits = task.datasets()
    monkeypatch.setattr(task, "datasets", lambda: splits._replace(val=Altered(splits.val, 8, example)))
    with pytest.raises(InvalidData, match=f"^val, examples 0 to 9: {problem}$"):
        card_of(name, task, rebuilt)


class TestInvalidData:
    """Problems of more than one example."""

    def test_the_place_is_named(self, small: Any, monkeypatch: pytest.MonkeyPatch):
        task, rebuilt = small("lds", "task.data.train=600"), small("lds", "task.data.train=600")
        splits = task.datasets()
        monkeypatch.setattr(
            task, "datasets", lambda: splits._replace(train=Altered(splits.train, 512, (with_a(math.nan), REALS)))
        )
        with pytest.raises(InvalidData, match=r"^train, examples 512 to 599: not all"):
            card_of("lds", task, rebuilt)

    def test_lengths_that_are_not_those(self, small: Any, monkeypatch: pytest.MonkeyPatch):
        task, rebuilt = small("lra_listops"), small("lra_listops")
        splits = task.datasets()
        first = splits.test[0]
        for lengths in (splits.test.lengths + (np.arange(10) == 3), splits.test.lengths[:9]):
            other = Altered(splits.test, 0, first, lengths)
            monkeypatch.setattr(task, "datasets", lambda other=other: splits._replace(test=other))
            with pytest.raises(InvalidData, match=r"^test, examples 0 to 9: the sequences have other lengths"):
                card_of("lra_listops", task, rebuilt)

    def test_a_split_without_examples(self, small: Any, monkeypatch: pytest.MonkeyPatch):
        task, rebuilt = small("lds"), small("lds")
        splits = task.datasets()
        monkeypatch.setattr(task, "datasets", lambda: splits._replace(test=[]))
        with pytest.raises(InvalidData, match=r"^test: there are no examples"):
            card_of("lds", task, rebuilt)

    def test_padding_within_a_sequence(self, small: Any, monkeypatch: pytest.MonkeyPatch):
        task, rebuilt = small("lra_listops"), small("lra_listops")
        collate = task.collate

        def holed(examples: Any) -> Batch:
            batch = collate(examples)
            mask = batch.mask.clone()
            mask[0, 1] = False
            return batch._replace(mask=mask)

        monkeypatch.setattr(task, "collate", holed)
        with pytest.raises(InvalidData, match=r"^train, examples 0 to 39: there is padding within a sequence"):
            card_of("lra_listops", task, rebuilt)

    @pytest.mark.parametrize("index", [0, 9])
    def test_examples_that_change(self, index: int, small: Any, monkeypatch: pytest.MonkeyPatch):
        task, rebuilt = small("lds"), small("lds")
        splits = task.datasets()
        monkeypatch.setattr(
            rebuilt, "datasets", lambda: splits._replace(val=Altered(splits.val, index, (REALS, REALS)))
        )
        with pytest.raises(InvalidData, match=r"^val, rebuilt: the examples differ"):
            card_of("lds", task, rebuilt)

    def test_a_fingerprint_that_changes(self, small: Any):
        with pytest.raises(InvalidData, match=r"^rebuilt: the fingerprint differs"):
            card_of("lds", small("lds"), small("lds", "task.data.seed=1"))


def test_moments_and_counts_come_in_parts():
    values = torch.randn(1000, dtype=torch.float64) * 3 + 7
    moments, counts = Moments(), Counts(4)
    for part in values.split(300):
        moments.add(part)
    assert moments.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert moments.std == pytest.approx(values.std(correction=0).item(), rel=1e-12)
    for part in ([0, 2, 2], [6], [0]):
        counts.add(torch.tensor(part))
    assert counts.counts.tolist() == [2, 0, 2, 0, 0, 0, 1]
    assert counts.shares.tolist() == [0.4, 0, 0.4, 0, 0, 0, 0.2]


def made_up(name: str = "a", monitor: str = "accuracy", labels: int = 3, **lengths: list[int]) -> Card:
    """A card by hand: labels 0, 1, 1, 2, …"""
    splits = {}
    for split, values in lengths.items():
        inputs, targets = Counts(), Counts(labels)
        inputs.add(torch.arange(5))
        targets.add(torch.arange(1, labels))
        targets.add(torch.tensor([1]))
        splits[split] = Split(len(values), np.array(values), inputs, targets, 0)
    return Card(name, "0123456789abcdef0123", monitor, {"majority": 0.12345, "other": 1 / 3}, splits)


class TestWords:
    def test_the_table_in_markdown(self):
        one = made_up("one", train=[1000, 2000], val=[10], test=[3000, 1500])
        two = made_up("two", "mse", train=[7], val=[7], test=[7])
        assert markdown([one, two]).splitlines() == [
            "| task | train / val / test | length | targets of train | trivial baselines | fingerprint |",
            "| --- | --- | --- | --- | --- | --- |",
            "| `one` | 2 / 1 / 2 | 10 to 3,000, mean 1,502 | 3 labels, 0.0 % to 66.7 % |"
            " majority 12.3 %, other 33.3 % (accuracy) | `0123456789abcdef` |",
            "| `two` | 1 / 1 / 1 | 7 | 3 labels, 0.0 % to 66.7 % | majority 0.123, other 0.333 (mse)"
            " | `0123456789abcdef` |",
        ]

    def test_the_table_on_the_screen(self):
        rows = dict(rows_of(made_up(train=list(range(1, 102)), val=[1], test=[2])))
        assert rows["examples"] == ["101", "1", "1"]
        lengths = [rows[f"length, {name}"][0] for name in ("min", "5 %", "median", "mean", "95 %", "max")]
        assert lengths == ["1", "6", "51", "51", "96", "101"]
        assert rows["different tokens"] == ["5"] * 3
        assert [rows[f"label {k}"][0] for k in range(3)] == ["0.0 %", "66.7 %", "33.3 %"]

    def test_equal_lengths_are_one_row(self):
        rows = dict(rows_of(made_up(train=[4, 4], val=[4], test=[4])))
        assert rows["length"] == ["4"] * 3
        assert not any(title.startswith("length,") for title in rows)

    def test_many_labels_are_two_rows(self):
        rows = dict(rows_of(made_up(labels=100, train=[1], val=[2], test=[3])))
        assert (rows["rarest label"][0], rows["most frequent label"][0]) == ("0.0 %", "2.0 %")
        assert "label 0" not in rows

    def test_reals(self, small: Any):
        card = card_of("lds", small("lds"), small("lds"))
        rows = dict(rows_of(card))
        assert rows["targets, std"][0] == f"{card.splits['train'].targets.std:.3f}"
        assert re.search(r"\| 64 \| reals, -?\d\.\d\d ± \d\.\d\d \| zero .*, static .* \(mse\) \|", markdown([card]))


def pixels_of(file: Path) -> np.ndarray:
    """(height, width, 3) of a PNG file."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


class TestFigures:
    """Files are PNG and hold what is to be seen."""

    def test_images(self, images: tuple[Path, Any, Card], tmp_path: Path):
        from data.prepare.figures import contact_sheet, draw

        _, task, card = images
        draw(card, task, tmp_path / "a.png")
        grey = pixels_of(tmp_path / "a.png").mean(-1).round()
        assert (grey < 60).mean() > 0.4  # black images on white paper
        assert len(np.unique(grey)) > 50
        batch = task.collate([task.datasets().train[index] for index in range(12)])
        figure = contact_sheet(batch.inputs.numpy(), batch.targets.numpy(), (8, 8))
        assert len(figure.axes) == 12
        for axis, image, label in zip(figure.axes, batch.inputs, batch.targets, strict=True):
            [shown] = axis.images
            expected = (image / batch.inputs.max()).reshape(8, 8)
            assert torch.allclose(torch.from_numpy(np.asarray(shown.get_array())), expected.double(), atol=1e-6)
            assert axis.get_title() == f"label {label}"

    @pytest.mark.parametrize("name", [name for name in TASKS if re.search("image|cifar|path", name)])
    def test_image_tasks_say_their_shape(self, name: str):
        """Otherwise their figures would be drawn as if they were text."""
        config = composed(*runs.small(f"task={name}"))
        rows, columns = build(config.task).image_shape
        assert rows * columns == config.task.seq_len

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [1, 5, 12])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_few_images_and_coloured_ones(self, number: int, channels: int):
        """Of another height than width; each channel from black to white."""
        from data.prepare.figures import contact_sheet

        images = np.random.default_rng(0).normal(size=(number, 6, channels)) * [1, 20, 300][:channels]
        figure = contact_sheet(images, np.arange(number), (2, 3))
        shown = np.stack([axis.images[0].get_array() for axis in figure.axes if axis.images])
        assert len(shown) == number
        shown = shown.reshape(number, 2, 3, channels)
        assert (shown.min((0, 1, 2)) == 0).all()
        assert (shown.max((0, 1, 2)) == 1).all()
        assert (np.argsort(shown[..., 0].ravel()) == np.argsort(images[..., 0].ravel())).all()

    def test_lengths_and_labels(self, small: Any, tmp_path: Path):
        from data.prepare.figures import draw, histograms

        card = card_of("lra_listops", small("lra_listops"), small("lra_listops"))
        draw(card, small("lra_listops"), tmp_path / "a.png")
        pixels = pixels_of(tmp_path / "a.png")
        for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # a split each
            assert (pixels == color).all(-1).sum() > 100
        left, right = histograms(card).axes
        for steps, split in zip(left.patches, card.splits.values(), strict=True):
            shares, edges, _ = steps.get_data()
            assert shares.sum() == pytest.approx(1)
            mean = (shares * (edges[1:] + edges[:-1]) / 2).sum()
            assert mean == pytest.approx(split.lengths.mean(), abs=np.diff(edges).max())
        for bars, split in zip(right.containers, card.splits.values(), strict=True):
            assert [bar.get_height() for bar in bars] == split.targets.shares.tolist()

    def test_many_labels(self):
        from data.prepare.figures import histograms

        card = made_up(labels=100, train=[1], val=[2], test=[3])
        _, right = histograms(card).axes
        assert [steps.get_data().values.tolist() for steps in right.patches] == [
            split.targets.shares.tolist() for split in card.splits.values()
        ]

    @pytest.mark.parametrize("lengths", [[5], [1, 60], [1, 61], [1, 62], [100, 100_000]])
    def test_every_length_is_in_the_histogram(self, lengths: list[int]):
        from data.prepare.figures import histograms

        left, _ = histograms(made_up(train=lengths, val=lengths[:1], test=lengths[-1:])).axes
        for steps in left.patches:
            assert steps.get_data().values.sum() == pytest.approx(1)
            assert len(steps.get_data().values) <= 61

    def test_reals(self, small: Any, tmp_path: Path):
        from data.prepare.figures import curves, draw

        task = small("lds")
        draw(card_of("lds", task, small("lds")), task, tmp_path / "a.png")
        pixels = pixels_of(tmp_path / "a.png")
        assert (np.ptp(pixels, -1) > 100).sum() > 1000  # colour
        inputs, targets = np.random.default_rng(0).normal(size=(2, 2, 7, 3))

        def drawn(figure: Any) -> list[np.ndarray]:
            return [np.stack([line.get_ydata() for line in axis.lines], -1) for axis in figure.axes]

        assert all(map(np.array_equal, drawn(curves(inputs, targets)), [*inputs, *targets]))
        one_number = curves(inputs, np.array([0.5, 2.0]))
        assert all(map(np.array_equal, drawn(one_number), inputs))
        assert [axis.get_title() for axis in one_number.axes] == ["target 0.5", "target 2"]


LISTOPS = ("task.data.min_length=10", "task.data.max_length=60")


class TestCommand:
    @pytest.mark.slow
    def test_a_task_is_built_shown_and_written(self, command: Any, tmp_path: Path):
        done = command("task=lds", "task.seq_len=32", *SIZES, "card=cards.md", "figures=look/at")
        assert (done.code, done.err) == (0, "")
        config = composed("task=lds", "task.seq_len=32", *SIZES)
        task: LDS = build(config.task)
        assert done.out.startswith(f"lds, {task.fingerprint()}\n")
        assert re.search(r"^examples +40 +10 +10 *$", done.out, re.MULTILINE)
        assert re.search(r"^length +32 +32 +32 *$", done.out, re.MULTILINE)
        assert re.search(
            r"^trivial baselines: zero [\d.]+, static [\d.]+, .*, truth [\de.-]+ \(mse\)$", done.out, re.MULTILINE
        )
        card = card_of("lds", task, build(config.task))
        overrides = f"task=lds task.seq_len=32 {' '.join(SIZES)} card=cards.md figures=look/at"
        expected = f"<!-- python -m data.prepare {overrides} -->\n\n{markdown([card])}"
        assert (tmp_path / "cards.md").read_text() == expected
        assert np.ptp(pixels_of(tmp_path / "look/at/lds.png"), -1).max() > 100

    def test_what_is_there_is_found(self, command: Any, tmp_path: Path):
        asked = ("task=lra_listops", *LISTOPS, *SIZES)
        first = command(*asked)
        assert first.code == 0
        [folder] = (path for path in (tmp_path / "data/lra_listops").iterdir() if path.is_dir())
        written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert command(*asked) == first
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
        assert f"lra_listops, {folder.name}\n" in first.out

    @pytest.mark.slow
    def test_several_tasks(self, command: Any, tmp_path: Path):
        done = command("task=lds,lra_listops,lds", *SIZES, "card=cards.md")
        assert (done.code, done.err) == (0, "")
        assert re.findall(r"^(l\w+), [0-9a-f]+$", done.out, re.MULTILINE) == ["lds", "lra_listops"]
        assert re.findall(r"^\| `(\w+)`", (tmp_path / "cards.md").read_text(), re.MULTILINE) == ["lds", "lra_listops"]

    def test_the_task_of_a_preset(self, command: Any):
        done = command("experiment=quick", *LISTOPS, *SIZES)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("lra_listops, ")

    @pytest.mark.thorough
    def test_all_that_can_be_had(self, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """What must be downloaded is named in a line each, without failure."""
        monkeypatch.setattr(
            "data.lra.pathfinder_images.SLOTS", 16
        )  # few examples do not need hundreds of trials at a time
        monkeypatch.setattr("data.systems.forecast.BLOCK", 4)
        done = command("task=all", "task.data.train=4", "task.data.val=2", "task.data.test=2", "card=cards.md")
        assert done.code == 0, done.err
        lines = [line for line in done.err.splitlines() if " is not here: " in line]
        assert [line.split()[0] for line in lines] == FETCHED
        assert all("task.data.source=None: " in line and "https://" in line for line in lines)
        shown = re.findall(r"^\| `(\w+)`", (tmp_path / "cards.md").read_text(), re.MULTILINE)
        assert shown == [name for name in TASKS if name not in FETCHED]
        assert "lra_pathx" in shown

    @pytest.mark.slow
    def test_what_is_asked_for_by_name_must_be_had(self, command: Any):
        done = command("task=lra_text,lds", *SIZES)
        assert done.code == USAGE
        [line] = done.err.splitlines()
        assert line.startswith("error: task.data.source=None: stanfordnlp/imdb cannot be fetched")
        assert done.out.startswith("lds, ")  # all the same

    @pytest.mark.slow
    @pytest.mark.parametrize(("fault", "code"), [(ZeroDivisionError, 1), (KeyboardInterrupt, 130)])
    def test_a_fault_of_the_code(self, fault: type, code: int, command: Any, monkeypatch: pytest.MonkeyPatch):
        """Is shown, and the other tasks are still built; but an interrupt ends the command."""

        def broken(self: Task) -> None:
            raise fault

        monkeypatch.setattr(ListOps, "prepare", broken)
        done = command("task=lra_listops,lds", *SIZES)
        assert done.code == code
        assert ("lds, " in done.out) == (fault is ZeroDivisionError)
        assert ("ZeroDivisionError" in done.err) == (fault is ZeroDivisionError)

    def test_a_file_of_the_cache_that_was_cut(self, command: Any, tmp_path: Path):
        asked = ("task=lra_listops", *LISTOPS, *SIZES)
        first = command(*asked)
        assert first.code == 0
        [file] = tmp_path.glob("data/lra_listops/*/val.arrow")
        content = file.read_bytes()
        file.write_bytes(content[:-700])
        done = command(*asked)
        assert (done.code, done.out) == (0, first.out)
        [line] = done.err.splitlines()
        assert line.startswith(f"note: damaged: {file} has {len(content) - 700} bytes, not {len(content)} as spec.json")
        assert file.read_bytes() == content

    def test_data_that_were_stored_wrongly(self, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Whole files whose contents the task does not take."""

        def refuse(self: Task, examples: object) -> None:
            raise ValueError("no such token")

        monkeypatch.setattr(ListOps, "collate", refuse)
        done = command("task=lra_listops", *LISTOPS, *SIZES)
        assert done.code == USAGE
        [folder] = tmp_path.glob("data/lra_listops/*/")
        [line] = done.err.splitlines()
        assert line.startswith("error: task=lra_listops: the data are invalid: ")
        assert line.endswith(f"remove the folder {folder.name} from the cache to have them rebuilt")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["task=lra_listop"], "task=lra_listop: no such option; choose one of "),
            (["task=lds,lra_listop"], "task=lra_listop: no such option"),
            (["task="], "task=: must not be empty"),
            (["task=,"], "task=,: must not be empty"),
            (["task=lds", "task=all"], "task=all: must be given once; is lds already"),
            (["lds"], "argument=lds: must be KEY=VALUE; see --help"),
            (["task=lds", "-m"], "argument=-m: must be KEY=VALUE"),
            (["task=lds", "card="], "card=: must not be empty"),
            (["task=lds", "card=no/where.md"], "card=no/where.md: must be a file, in a folder that exists"),
            (["task=lds", "card=."], "card=.: must be a file"),
            (["task=lds", "figures=/dev/null/x"], "figures=/dev/null/x: must be a folder: Not a directory"),
            (["task=lds", "pictures=look"], "pictures=look: no such key; it is figures now"),
            (["task=lds", "task.data.trian=3"], "task.data.trian=3: no such key; did you mean train?"),
            (["task=lds", "task.data.train=0"], "task.data.train=0: must be at least 1"),
            (
                ["task=lra_listops", "task.data.source=/nowhere"],
                "task.data.source=/nowhere: must be a folder with basic_train.tsv",
            ),
            (["task=lra_listops", "paths.data=/dev/null"], "task.data.dir=/dev/null: must be a folder with room"),
            (["task=all", "task.data.source=/nowhere"], "task.data.source=/nowhere: no such key"),
        ],
    )
    def test_one_line_says_what_is_wrong(self, arguments: list[str], problem: str, command: Any):
        done = command(*arguments)
        assert done.code == USAGE
        [line] = done.err.splitlines()
        assert line.startswith(f"error: {problem}")
        assert done.out == ""

    def test_nothing_is_built_where_a_later_task_cannot_be(self, command: Any, tmp_path: Path):
        assert command("task=lra_listops,lds", *SIZES, "task.data.max_length=600").code == USAGE
        assert not (tmp_path / "data").exists()

    def test_matplotlib_is_missed_before_anything_is_built(
        self, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        done = command("task=lra_listops", *SIZES, "figures=look")
        assert (done.code, done.err) == (2, "error: figures=look: needs matplotlib; pip install it\n")
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_files_that_cannot_be_written(self, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "look/lds.png").mkdir(parents=True)
        done = command("task=lds", "task.seq_len=32", *SIZES, "figures=look")
        assert (done.code, done.err) == (2, "error: figures=look: cannot be written to: Is a directory\n")
        (tmp_path / "cards.md").symlink_to(tmp_path / "not/there")
        done = command("task=lds", "task.seq_len=32", *SIZES, "card=cards.md")
        assert (done.code, done.err) == (2, "error: card=cards.md: No such file or directory\n")


def test_help_is_quick_and_names_every_task():
    imports = [sys.executable, "-X", "importtime", "-m", "data.prepare", "--help"]
    done = subprocess.run(imports, cwd=runs.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert all(name in done.stdout for name in TASKS)
    assert not re.search(r"\| +(torch|hydra|numpy)$", done.stderr, re.MULTILINE)


def test_the_examples_of_help_compose():
    commands = re.findall(r"^  python -m data\.prepare (task=.*)$", prepare.HELP, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        request = prepare.Request.parse(command.split())
        for name in request.names[:2]:
            assert name in TASKS
            check(prepare.composed(name, request.overrides)[1])
