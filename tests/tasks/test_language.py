"""Language: windows of a text, its files and splits, bits per byte, what a model has to beat."""

import gzip
import lzma
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.language import baselines, corpus
from data.language.files import text_files
from data.language.text import Bits, Language, LanguageData
from stu.errors import OptionError
from stu.task import Batch

WORDS = "the cat sat on the mat and the dog sat on the log and they all ran away again "


def data(folder: Path, source: object, **options: Any) -> LanguageData:
    options = {"seq_len": 16, "val": 0.1, "test": 0.1} | options
    return LanguageData(dir=str(folder / "cache"), source=None if source is None else str(source), **options)


def written(folder: Path, **files: str | bytes) -> Path:
    """A folder with files: a_dot_txt="…" is a.txt, a_in_b the file b in the folder a."""
    for name, content in files.items():
        path = folder / name.replace("_dot_", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def text_of(data: LanguageData, split: str) -> str:
    return data.encoding.decode(np.concatenate([targets for _, targets in iter_windows(data, split)]).tolist())


def iter_windows(data: LanguageData, split: str) -> list[Any]:
    examples = data.examples(split)
    return [examples[index] for index in range(len(examples))]


@pytest.mark.parametrize("units", ["bytes", "characters", "words"])
def test_every_unit_is_predicted_once_from_those_before_it_in_its_window(tmp_path: Path, units: Any):
    text = "Grüße, 好! " + WORDS * 5
    source = written(tmp_path / "in", a_dot_txt=text)
    found = data(tmp_path, source / "a.txt", units=units)
    joined = ("" if units != "words" else " ").join(text_of(found, split) for split in ("train", "val", "test"))
    assert joined == (text if units != "words" else " ".join(text.split()))
    for inputs, targets in iter_windows(found, "train"):
        assert inputs[0] == 0
        assert inputs[1:].tolist() == targets[:-1].tolist()
        assert 0 not in targets
    train = found.examples("train")
    again = pickle.loads(pickle.dumps(train))
    assert [x.tolist() for x in again[0]] == [x.tolist() for x in train[0]]
    lengths = [len(targets) for _, targets in iter_windows(found, "train")]
    assert lengths[:-1] == [16] * (len(lengths) - 1)
    assert (train.lengths is None and lengths[-1] == 16) or train.lengths.tolist() == lengths


def test_splits_are_shares_of_the_text_or_numbers_of_sequences(tmp_path: Path):
    source = written(tmp_path / "in", a_dot_txt=b"ab" * 500)
    shares = data(tmp_path, source, val=0.2, test=0.1)
    assert [sum(len(t) for _, t in iter_windows(shares, split)) for split in ("train", "val", "test")] == [
        700,
        200,
        100,
    ]
    numbers = data(tmp_path, source, train=3, val=2, test=4)
    assert [len(numbers.examples(split)) for split in ("train", "val", "test")] == [3, 2, 4]
    with pytest.raises(OptionError, match="train=62: there are only 57 sequences of 16 bytes"):
        data(tmp_path, source, train=62, val=2, test=4).examples("train")
    with pytest.raises(OptionError, match="val=60: leaves nothing to train on: the text has 1,000 bytes, 64 are for"):
        data(tmp_path, source, val=60, test=4).prepare()
    for value in (0, 1.0, 1.5, -0.1, math.inf, math.nan, -3):
        with pytest.raises(OptionError, match=rf"val={value}: must be a share of the text"):
            data(tmp_path, source, val=value)


def test_a_folder_of_files_is_read_in_order_and_what_is_no_text_is_said(tmp_path: Path, capsys: Any):
    source = written(
        tmp_path / "in", b_dot_txt="second ", a_in_z_dot_md="first ", c_dot_png=b"\x89PNG\0\0", _dot_hidden="no",
        _dot_git_in_config="no", d="third", e_dot_txt=b"",
    )  # fmt: skip
    found = data(tmp_path, source, val=2.0**-4, test=2.0**-4)
    assert "".join(text_of(found, split) for split in ("train", "val", "test")) == "first second third"
    line = capsys.readouterr().err
    assert "2 files of" in line
    assert ".hidden, c.png" in line
    assert "".join(path.name for path in text_files(f"{source}/*.txt").paths["all"]) == "b.txte.txt"
    assert [path.name for path in text_files(f"{source}/**/*.md").paths["all"]] == ["z.md"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "val.txt", "test.txt"),
        ("my_train.txt", "my_val.txt", "my_test.txt"),
        ("Training-1.txt", "dev.txt", "2_testing.txt"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
        ("train/1", "validation/1", "test/1"),
    ],
)
def test_files_can_say_which_split_they_are_of(tmp_path: Path, names: tuple[str, ...], capsys: Any):
    source = tmp_path / "in"
    for name in (*names, "README.md"):
        written(source, **{name.replace(".", "_dot_").replace("/", "_in_"): f"{name} " * 9})
    found = data(tmp_path, source)
    assert [text_of(found, split) for split in ("train", "val", "test")] == [f"{name} " * 9 for name in names]
    train, val, test = (Path(name).name for name in names)
    assert f"{source}: train is {train}; val is {val}; test is {test}\n" in capsys.readouterr().err
    (source / names[1]).unlink()
    with pytest.raises(OptionError, match=r"has files called train .*, and must have some called val"):
        data(tmp_path, source).prepare()


def test_what_is_no_text_is_refused(tmp_path: Path):
    source = written(
        tmp_path / "in", a_dot_bin=b"\0\1", empty_in_x="", latin_in_a="ü".encode("latin-1") * 99, blank=" \n" * 9
    )
    written(source, splits_in_train="a", splits_in_val="", splits_in_test="c")
    for place, options, line in (
        (source / "nope", {}, "no such file or folder"),
        (source / "*.nope", {}, "no such file or folder, and no pattern"),
        (source / "a.bin", {}, "holds no text; 1 binary files are there"),
        (source / "empty", {}, "empty: has no bytes"),
        (source / "empty/x", {}, "source=.*/in/empty/x: has no bytes"),
        (source / "blank", {"units": "words"}, "blank: has no words"),
        (source / "splits", {}, "splits: has no bytes for val"),
        (source / "latin", {"units": "characters"}, "must be UTF-8 where units=characters: byte 0 is not"),
        ("~nobody/x", {}, "no such file or folder|must be a text file"),
    ):
        with pytest.raises(OptionError, match=line):
            data(tmp_path, place, **options).prepare()
    assert text_of(data(tmp_path, source / "latin"), "val") == "\ufffd" * 9  # but bytes are bytes


def test_the_fingerprint_is_of_the_contents_alone(tmp_path: Path):
    one, two = (written(tmp_path / name, a_dot_txt=WORDS, b_dot_txt=WORDS) for name in ("one", "two"))
    assert data(tmp_path, one).fingerprint() == data(tmp_path, two).fingerprint()
    (two / "b.txt").write_text(WORDS + "!")
    assert data(tmp_path, one).fingerprint() != data(tmp_path, two).fingerprint()
    assert data(tmp_path, one).fingerprint() != data(tmp_path, one, seq_len=8).fingerprint()
    changing = data(tmp_path, one)
    changing.fingerprint()
    (one / "a.txt").write_text("other")
    with pytest.raises(OptionError, match="was changed while it was read"):
        changing.prepare()


def test_the_vocabulary_is_of_the_most_frequent_units_of_train(tmp_path: Path):
    source = written(tmp_path / "in", a_dot_txt=WORDS * 4 + "unseen " * 30)
    found = data(tmp_path, source, units="words", vocab_size=5, val=0.01, test=0.29)
    assert found.encoding.vocabulary == ("the", "and", "on")
    assert found.encoding.vocab_size == 5
    _, targets = found.examples("test")[0]
    assert set(targets.tolist()) == {1}


def test_the_text_of_python_is_long_english_and_the_same_every_time():
    text = corpus.corpus().decode()
    assert text.encode() == corpus.corpus()
    assert len(text) > 1_000_000
    assert 'The "assert" statement' in text  # of the language reference
    words = text.lower().split()
    assert 0.02 < words.count("the") / len(words) < 0.1


# --- scores ---


def test_counts_are_those_of_their_formulas():
    train, test = np.array([1, 2, 1, 2, 3, 1]), np.array([2, 1, 2, 4])
    counts = {1: 3, 2: 2, 3: 1}
    single = [-math.log2((counts.get(token, 0) + 1) / (6 + 5)) for token in test]
    assert baselines.unigram(train, test, 5) == pytest.approx(np.mean(single))
    pairs = {(1, 2): 2, (2, 1): 1, (2, 3): 1, (3, 1): 1}
    before = {1: 2, 2: 2, 3: 1}
    double = [-math.log2((pairs.get((a, b), 0) + 1) / (before.get(a, 0) + 5)) for a, b in pairwise(test)]
    assert baselines.bigram(train, test, 5) == pytest.approx(np.mean([single[0], *double]))
    assert baselines.bigram(train[:1], test, 5) == pytest.approx(np.mean([-math.log2(1 / 6)] + [math.log2(5)] * 3))


def test_compression_is_that_of_the_programs():
    train, test = WORDS.encode() * 9, (WORDS + "never seen before").encode()
    found = baselines.compressed(train, test)
    assert found["gzip"] == 8 * len(gzip.compress(test)) / len(test)
    assert 0 < found["lzma after train"] < 8 * len(lzma.compress(test)) / len(test)
    assert found["lzma after train"] == 8 * (len(lzma.compress(train + test)) - len(lzma.compress(train))) / len(test)


@given(st.integers(1, 5), st.integers(0, 99))
def test_bits_are_exact_over_padding_and_batches(pieces: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(3, 7, 5, generator=generator), torch.randint(0, 5, (3, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    metric, task = Bits(), Language.scored
    for rows in torch.arange(3).tensor_split(pieces):
        if len(rows):
            batch = Batch(targets[rows], targets[rows], mask[rows])
            metric.update(*task(None, logits[rows], batch))
    expected = -logits.log_softmax(2).gather(2, targets[..., None])[..., 0][mask].mean() / math.log(2)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_task_scores_its_baselines_in_its_metric(tmp_path: Path):
    source = written(tmp_path / "in", a_dot_txt=WORDS * 20)
    for units, metric in (("bytes", "bits_per_byte"), ("characters", "bits_per_character"), ("words", "bits_per_word")):
        task = Language(seq_len=16, causal=True, data=data(tmp_path, source, units=units))
        assert task.monitor == metric
        found = task.baselines()
        assert set(task.trivial) <= set(found)
        assert found["uniform"] >= found["unigram"] > found["bigram"]
        assert ("gzip" in found) == (units == "bytes")
        assert task.preprocessing.inputs.decode(task.preprocessing.inputs.encode("the cat")) == "the cat"
    with pytest.raises(OptionError, match="causal=False: must be true"):
        Language(seq_len=16, causal=False, data=data(tmp_path, source))
