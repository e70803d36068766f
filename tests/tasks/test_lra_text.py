"""Text: the tokens, the splits, where reviews come from, and what is wrong with those that are refused."""

import inspect
import json
import pickle
import shutil
import socket
import time
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Thread

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.optimize import minimize

from data.lra import text as lra_text
from data.lra.text import (
    IMDB,
    MOST,
    RARE,
    UNKNOWN,
    Text,
    TextData,
    byte_tokens,
    character_tokens,
    code_points,
    logistic_regression,
    vocabulary,
)
from data.store import sources as of_others
from data.store.sources import divided, stratified
from data.store.tokens import ROWS, TokenExamples
from stu import SequenceModel
from stu.errors import OptionError
from tests import runs, sources
from tests.models import small_backbone

ROOT = Path(__file__).parents[2]
HALF = {"train": 40, "val": 10, "test": 10}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.imdb(tmp_path_factory.mktemp("imdb"))


def make_data(folder, source, **options):
    given = {**HALF, "seq_len": 64, "dir": str(folder), "source": None if source is None else str(source)}
    return TextData(**{**given, **options})


def make_task(data, **options):
    return Text(
        **{"seq_len": data.seq_len, "causal": False, "vocab_size": 257, "pool": "mean", "data": data, **options}
    )


def stored(data):
    """split → [(tokens, label), …], as lists."""
    return {split: [(x.tolist(), y) for x, y in data.examples(split)] for split in HALF}


# Tokens


texts = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6)


@given(texts=texts, longest=st.integers(1, 40))
def test_bytes(texts, longest):
    column = pa.array(["", *texts]).slice(1)  # whose buffers begin elsewhere
    tokens = byte_tokens(column, longest).to_pylist()
    assert tokens == [[byte + 1 for byte in text.encode()][:longest] for text in texts]


@given(texts=texts, longest=st.integers(1, 40))
def test_characters(texts, longest):
    known = sorted({ord(c) for text in texts for c in text})[::2]
    token_of = np.full(lra_text.CODE_POINTS, 1, np.uint8)
    token_of[known] = np.arange(2, len(known) + 2)
    tokens = character_tokens(pa.array(["x", *texts]).slice(1), longest, token_of).to_pylist()
    assert tokens == [[known.index(ord(c)) + 2 if ord(c) in known else 1 for c in text[:longest]] for text in texts]


def test_code_points():
    column = pa.array(["cut off", "aé", "", "好😀", "cut off"]).slice(1, 3)
    assert code_points(column).tolist() == [ord(c) for c in "aé好😀"]


def test_a_character_is_known_from_the_fifteenth_time_on():
    column = pa.chunked_array([["好é" * 14 + "ignored"], ["x好" + "x" * 27]])
    assert vocabulary(column, 28).tolist() == [ord("x"), ord("好")]


def test_reviews_become_bytes(source, tmp_path):
    columns = sources.reviews(50, seed=0)
    both = [([b + 1 for b in text.encode()][:64], label) for text, label in zip(*columns.values(), strict=True)]
    found = stored(make_data(tmp_path, source))
    assert Counter(map(str, found["train"] + found["val"])) == Counter(map(str, both))
    columns = sources.reviews(10, seed=1)
    assert found["test"] == [([b + 1 for b in x.encode()][:64], y) for x, y in zip(*columns.values(), strict=True)]


def test_reviews_become_characters(source, tmp_path):
    """Those that the training texts, cut, have 15 times; not those of the validation texts."""
    options = {"tokens": "characters", "seq_len": 12}
    data = make_data(tmp_path, source, **options)
    cut = {split: [text[:12] for text in table["text"].to_pylist()] for split, table in data.reviews().items()}
    counts = Counter("".join(cut["train"]))
    known = sorted(c for c in counts if counts[c] >= 15)
    assert 5 < len(known) < len(counts)
    assert known != sorted(c for c, n in Counter("".join(cut["train"] + cut["val"])).items() if n >= 15)
    for split, examples in stored(data).items():
        assert [x for x, _ in examples] == [[known.index(c) + 2 if c in known else 1 for c in t] for t in cut[split]]
    assert json.loads((data.prepare() / "vocabulary.json").read_text()) == known


def test_many_reviews_fill_several_batches(tmp_path):
    rows = 2 * ROWS + 17
    folder = sources.published(tmp_path / "imdb", partial(sources.reviews, longest=6), rows + 2, 1)
    data = make_data(tmp_path, folder, train=rows, val=2, test=1)
    examples = data.examples("train")
    assert isinstance(examples, TokenExamples)
    assert len(examples) == rows
    as_rows = datasets.Dataset.from_file(str(data.prepare() / "train.arrow"))
    assert as_rows.features["tokens"].feature.dtype == as_rows.features["label"].dtype == "uint8"
    for index in (0, ROWS - 1, ROWS, rows - 1):
        assert examples[index][0].tolist() == as_rows[index]["tokens"]
        assert examples[index][1] == as_rows[index]["label"] == examples.labels[index]
        assert len(examples[index][0]) == examples.lengths[index]
    assert examples[-1][0].tolist() == as_rows[rows - 1]["tokens"]
    for index in (rows, -rows - 1):
        with pytest.raises(IndexError):
            examples[index]
    counts = examples.tokens.counts(257)
    assert counts.shape == (rows, 257)
    for index in (0, ROWS, rows - 1):
        assert counts[index].tolist() == np.bincount(examples[index][0], minlength=257).tolist()
    np.testing.assert_allclose(lra_text.shares(examples), counts / counts.sum(1, keepdims=True))
    message = pickle.dumps(examples)
    assert len(message) < 1000
    assert pickle.loads(message)[ROWS][0].tolist() == examples[ROWS][0].tolist()


def test_an_example_belongs_to_its_reader(source, tmp_path):
    examples = make_data(tmp_path, source).examples("train")
    before = examples[3][0].copy()
    examples[3][0][:] = 0
    assert examples[3][0].tolist() == before.tolist()


# Splits


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    seed=st.integers(0, 2**40),
)
def test_every_beginning_has_its_share_of_every_label(labels, seed):
    labels = np.array(labels)
    order = stratified(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for size in range(len(labels) + 1):
        found = np.bincount(labels[order[:size]], minlength=4)
        assert (abs(found - size * np.bincount(labels, minlength=4) / len(labels)) < 2).all()


def test_the_order_is_random():
    labels = np.repeat([0, 1], 500)
    one, other = stratified(labels, 0), stratified(labels, 1)
    np.testing.assert_array_equal(one, stratified(labels, 0))
    assert (one == other).mean() < 0.02
    assert (labels[one[:100]] == 0).sum() == 50
    for label in (0, 1):
        assert abs(np.corrcoef(np.arange(500), one[labels[one] == label])[0, 1]) < 0.15


def test_parts_are_disjoint_and_keep_the_order_of_the_rows():
    table = pa.table({"row": range(100), "label": [0] * 50 + [1] * 50})
    parts = divided(table, sizes={"val": 20, "train": 60}, seed=0)
    rows = {name: part["row"].to_pylist() for name, part in parts.items()}
    assert {name: len(part) for name, part in rows.items()} == {"val": 20, "train": 60}
    assert not set(rows["val"]) & set(rows["train"])
    assert all(part == sorted(part) for part in rows.values())
    assert [sum(part["label"].to_pylist()) for part in parts.values()] == [10, 30]
    fewer = divided(table, sizes={"val": 20, "train": 10}, seed=0)
    assert fewer["val"]["row"].to_pylist() == rows["val"], "the validation set is that of any training set"
    assert set(fewer["train"]["row"].to_pylist()) < set(rows["train"])


def test_the_official_test_set_is_never_validated_on(source, tmp_path):
    marked = {"text": [f"test {row}" for row in range(10)], "label": [0, 1] * 5}
    folder = sources.imdb(tmp_path / "imdb")
    sources.parquet(folder / "plain_text/test-00000-of-00001.parquet", marked)
    found = stored(make_data(tmp_path, folder))
    begins = [byte + 1 for byte in b"test "]
    assert all(x[:5] == begins for x, _ in found["test"])
    assert not any(x[:5] == begins for split in ("train", "val") for x, _ in found[split])


def test_the_seed_chooses_the_validation_reviews(source, tmp_path):
    one, other = (stored(make_data(tmp_path, source, seed=seed)) for seed in (0, 1))
    assert one["val"] != other["val"]
    assert one["test"] == other["test"]


# Where reviews come from


def save(folder, **options):
    """What `save_to_disk` writes of the small IMDB."""
    columns = {split: sources.reviews(rows, seed) for seed, (split, rows) in enumerate([("train", 50), ("test", 10)])}
    splits = {split: datasets.Dataset.from_dict(column) for split, column in columns.items()}
    datasets.DatasetDict(splits).save_to_disk(folder, **options)


def flat(folder):
    sources.imdb(folder / "below")
    for path in (folder / "below").rglob("*.parquet"):
        path.rename(folder / path.name)


def sharded(folder):
    for seed, (split, rows) in enumerate([("train", 50), ("test", 10)]):
        columns = sources.reviews(rows, seed)
        for shard, part in enumerate([slice(rows // 3), slice(rows // 3, None)]):
            some = {name: column[part] for name, column in columns.items()}
            sources.parquet(folder / f"data/{split}-0000{shard}-of-00002.parquet", some)


def other_types(folder):
    """Large strings, small labels and one more column."""
    for seed, (split, rows) in enumerate([("train", 50), ("test", 10)]):
        columns = sources.reviews(rows, seed)
        text, label = pa.array(columns["text"], pa.large_string()), pa.array(columns["label"], pa.int8())
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": range(rows), "label": label, "text": text}), folder / f"{split}.parquet")


def mapped(folder):
    """With the files in which `datasets` caches computations next to the data."""
    save(folder)
    datasets.load_from_disk(folder)["train"].map(lambda row: {"text": row["text"][::-1]})
    assert len(list((folder / "train").glob("*.arrow"))) == 2


def with_strays(folder):
    """With what macOS and downloads leave."""
    sources.imdb(folder)
    for stray in ("plain_text/._train-00000-of-00001.parquet", ".cache/train-00000-of-00001.parquet"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_bytes(b"\0\5\x16\7")


@pytest.mark.parametrize(
    "write",
    [flat, sharded, other_types, save, partial(save, num_shards={"train": 3, "test": 2}), mapped, with_strays],
    ids=["flat", "sharded", "other types", "saved", "saved in shards", "saved and used", "with strays"],
)
def test_layouts(write, source, tmp_path):
    datasets.disable_progress_bars()
    write(tmp_path / "imdb")
    data = make_data(tmp_path, tmp_path / "imdb")
    assert stored(data) == stored(make_data(tmp_path, source))


def test_a_home_directory(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(source.parent))
    data = make_data(tmp_path, f"~/{source.name}")
    assert stored(data) == stored(make_data(tmp_path, source))


class TestTheHub:
    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    def test_what_is_fetched(self, source, tmp_path, monkeypatch):
        asked = []

        def load_dataset(name, *, revision, split):
            asked.append((name, revision, split))
            return datasets.Dataset.from_dict(sources.reviews(*{"train": (50, 0), "test": (10, 1)}[split]))

        monkeypatch.setattr(of_others, "answers", lambda url: url == "http://127.0.0.1:9")
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        data = make_data(tmp_path, None)
        assert stored(data) == stored(make_data(tmp_path, source))
        assert asked == [(IMDB.name, IMDB.revision, split) for split in ("train", "test")]
        assert len(IMDB.revision) == 40

        monkeypatch.setattr(of_others, "answers", None)
        monkeypatch.setattr(datasets, "load_dataset", None)
        second = make_data(tmp_path, None)
        assert second.prepare() == data.prepare(), "the hub is not asked once the data are stored"

    def test_no_connection(self, tmp_path, monkeypatch):
        monkeypatch.setattr(of_others, "TIMEOUT", 60)
        before = time.monotonic()
        with pytest.raises(OptionError) as caught:
            make_data(tmp_path, None).prepare()
        assert time.monotonic() - before < 30
        message = str(caught.value)
        assert "source=None: stanfordnlp/imdb cannot be fetched: http://127.0.0.1:9 does not answer" in message
        assert "plain_text/train-00000-of-00001.parquet and plain_text/test-00000-of-00001.parquet" in message
        assert "https://huggingface.co/datasets/stanfordnlp/imdb into a folder" in message
        assert not list((tmp_path / "lra_text").glob("*/"))

    def test_a_server_that_says_nothing(self, monkeypatch):
        monkeypatch.setattr(of_others, "TIMEOUT", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            before = time.monotonic()
            assert not of_others.answers(f"http://127.0.0.1:{server.getsockname()[1]}")
            assert time.monotonic() - before < 30

    @pytest.mark.parametrize(
        ("said", "answered"),
        [(b"HTTP/1.0 200 OK\r\n\r\n", True), (b"HTTP/1.0 404 Not Found\r\n\r\n", True), (b"nonsense\r\n", False)],
        ids=["yes", "no such page", "another protocol"],
    )
    def test_a_server_that_says_something(self, said, answered):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve():
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(said)

            thread = Thread(target=serve)
            thread.start()
            assert of_others.answers(f"http://127.0.0.1:{server.getsockname()[1]}") == answered
            thread.join()

    def test_offline_by_choice_the_hugging_face_cache_is_asked(self, tmp_path, monkeypatch):
        def load_dataset(*_, **__):
            raise ConnectionError("not\nin the cache")

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(of_others, "answers", None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(OptionError, match=r"imdb cannot be fetched: not in the cache\. Give the same command once"):
            make_data(tmp_path, None).prepare()


# What is refused


@pytest.mark.parametrize(
    "source", ["", "~nobody-of-that-name/x", "x" * 5000, "null\0"], ids=["empty", "~", "long", "0"]
)
def test_a_source_that_is_no_path(source, tmp_path):
    with pytest.raises(OptionError, match="must be a folder with plain_text/train-00000") as caught:
        make_data(tmp_path, source).prepare()
    assert caught.value.name == "source"


def test_a_folder_that_disappears_is_named(source, tmp_path, monkeypatch):
    def glob(*_):
        raise FileNotFoundError("gone")

    monkeypatch.setattr(Path, "glob", glob)
    with pytest.raises(OptionError, match=f"source={source}: cannot be searched: gone"):
        make_data(tmp_path, source).prepare()


@pytest.mark.parametrize("known", [MOST, MOST + 1])
def test_every_frequent_character_has_a_token_of_its_own(known, tmp_path):
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + known)))
    replaced(tmp_path / "imdb", text=[letters] * (RARE + 1), label=[row % 2 for row in range(RARE + 1)])
    data = make_data(tmp_path, tmp_path / "imdb", seq_len=640, tokens="characters", train=RARE, val=1)
    if known > MOST:
        with pytest.raises(OptionError, match=r"tokens=characters: must be bytes: 255 characters occur 15 times in tr"):
            data.prepare()
        return
    tokens, _ = data.examples("train")[0]
    assert tokens.tolist() == list(range(UNKNOWN + 1, 256)), "none is padding, none stands for two"


def test_what_test_repeats_of_train_is_said(source, tmp_path, capfd):
    columns = sources.reviews(50)
    columns["text"] = [*sources.reviews(10, 1)["text"][:3], *columns["text"][3:]]
    replaced(tmp_path / "imdb", **columns)
    repeated = len([text for text in sources.reviews(10, 1)["text"] if text in columns["text"]])
    make_data(tmp_path, tmp_path / "imdb").prepare()
    assert f"note: {repeated} of 10 examples of test are in train, too" in capfd.readouterr().err


def replaced(folder, split="train", **columns):
    """The small IMDB with a file whose columns are other ones."""
    rows = {"train": 50, "test": 10}[split]
    parts = {**sources.reviews(rows), **columns}
    given = {name: column for name, column in parts.items() if column is not None}
    sources.parquet(sources.imdb(folder) / f"plain_text/{split}-00000-of-00001.parquet", given)


def damaged(folder, damage):
    """The small IMDB with a file that `damage` changes."""
    path = sources.imdb(folder) / "plain_text/train-00000-of-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))


def cut_short(folder):
    save(folder)
    [path] = (folder / "train").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-900])


def one_shard(folder):
    sharded(folder)
    (folder / "data/train-00000-of-00002.parquet").unlink()


def one_shard_twice(folder):
    one_shard(folder)
    (folder / "more").mkdir()
    shutil.copy(folder / "data/train-00001-of-00002.parquet", folder / "more")


def a_copy(folder):
    path = sources.imdb(folder) / "plain_text/train-00000-of-00001.parquet"
    shutil.copy(path, path.with_stem(f"{path.stem} (1)"))


def a_column_twice(folder):
    replaced(folder)
    table = pa.table([TEXT, LABEL, LABEL], names=["text", "label", "label"])
    pq.write_table(table, folder / "plain_text/train-00000-of-00001.parquet")


def huge_labels(folder):
    replaced(folder)
    table = pa.table({"text": TEXT, "label": pa.array([2**63] * 50, pa.uint64())})
    pq.write_table(table, folder / "plain_text/train-00000-of-00001.parquet")


def no_utf8(folder):
    rows = pa.array([b"good", b"b\xe9d"] * 25).cast(pa.binary())
    text = pa.StringArray.from_buffers(50, rows.buffers()[1], rows.buffers()[2])
    replaced(folder)
    table = pa.table({"text": text, "label": pa.array([0, 1] * 25)})
    pq.write_table(table, folder / "plain_text/train-00000-of-00001.parquet")


def instead(values, row, value):
    return [*values[:row], value, *values[row + 1 :]]


TEXT, LABEL = sources.reviews(50).values()
WRONG = {
    "nothing": (
        Path.mkdir,
        r"must hold train\*\.parquet, or train/data\*\.arrow .* 0 of 1 files are there\. Published",
    ),
    "no folder": (lambda folder: None, r"must be a folder with plain_text/train-.* of https.*imdb: .*No such file"),
    "a file": (Path.touch, r"must be a folder with .*Not a directory"),
    "one of two shards": (one_shard, r"must hold train\*\.parquet.* 1 of 2 files are there"),
    "one shard twice": (one_shard_twice, r"2 of 2 files are there \(data/train-00001-of-00002\.parquet, more/train-0"),
    "a copy": (a_copy, r"2 of 1 files are there \(plain_text/train-00000-of-00001 \(1\)\.parquet, plain_text/train-0"),
    "a column twice": (a_column_twice, "cannot be read, or not to its end: Multiple matches .*label"),
    "huge labels": (huge_labels, r"must have the columns text \(string\), label \(int64\): .*not in range"),
    "empty file": (partial(damaged, damage=lambda _: b""), r"train-00000-of-00001\.parquet: cannot be read"),
    "cut file": (partial(damaged, damage=lambda all: all[:-50]), r"parquet: cannot be read, or not to its end: "),
    "no parquet": (partial(damaged, damage=lambda _: b"text\tlabel\n" * 20), r"parquet: cannot be read"),
    "cut saved file": (cut_short, r"data-00000-of-00001\.arrow: cannot be read, or not to its end: "),
    "no UTF-8": (no_utf8, r"cannot be read, or not to its end: .*UTF8"),
    "no label": (partial(replaced, label=None), r"must have the columns text \(string\), label \(int64\), each"),
    "other name": (partial(replaced, text=None, review=TEXT), r"has label \(int64\), review \(string\)"),
    "numbers for texts": (partial(replaced, text=LABEL), r"has text \(int64\), label \(int64\)"),
    "texts for labels": (partial(replaced, label=TEXT), r"has text \(string\), label \(string\)"),
    "fractions for labels": (partial(replaced, label=[0.5] * 50), r"label \(double\)"),
    "no text": (partial(replaced, text=instead(TEXT, 7, None)), "train has no text in row 7"),
    "empty text": (partial(replaced, text=instead(TEXT, 9, "")), "train has an empty text in row 9"),
    "label missing": (partial(replaced, label=instead(LABEL, 3, None)), "train has no label in row 3"),
    "label below": (partial(replaced, label=instead(LABEL, 4, -1)), r"train has a label in row 4 that is not 0 … 1"),
    "label above": (partial(replaced, label=instead(LABEL, 5, 2)), r"train has a label in row 5 that is not 0 … 1"),
    "wrong test": (partial(replaced, split="test", label=[2] * 10), r"test has a label in row 0 that is not 0 … 1"),
}


@pytest.mark.parametrize(("write", "problem"), WRONG.values(), ids=list(WRONG))
def test_wrong_sources_are_named(write, problem, tmp_path):
    datasets.disable_progress_bars()
    write(tmp_path / "imdb")
    with pytest.raises(OptionError, match=f"source={tmp_path}/imdb.*{problem}") as caught:
        make_data(tmp_path, tmp_path / "imdb").prepare()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "lra_text").glob("*/"))


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"train": 41}, "train=41: there are only 40 rows for it"),
        ({"val": 51}, "val=51: there are only 50 rows for it"),
        ({"test": 11}, "test=11: there are only 10 rows for it"),
        ({"train": 22_500, "val": 2_500, "test": 25_000}, "val=2500: there are only 50 rows for it"),
    ],
)
def test_too_few_reviews_are_named(sizes, problem, source, tmp_path):
    with pytest.raises(OptionError, match=problem):
        make_data(tmp_path, source, **sizes).prepare()


def test_too_many_reviews_are_named(tmp_path):
    columns = {"text": ["good"] * 25_001, "label": [0] * 25_001}
    replaced(tmp_path / "imdb", **columns)
    with pytest.raises(OptionError, match=r"imdb: train has 25,001 rows, must have at most 25,000"):
        make_data(tmp_path, tmp_path / "imdb").prepare()


# The task


@pytest.mark.parametrize("option", ["seq_len", "tokens", "seed", "train", "val", "test"])
def test_every_option_has_a_fingerprint(option):
    data = TextData(dir="unused", seq_len=64)
    value = "characters" if option == "tokens" else getattr(data, option) - 1 if option != "seed" else 1
    changed = TextData(**{"dir": "unused", "seq_len": 64, option: value})
    assert make_task(data).fingerprint() != make_task(changed).fingerprint()
    assert make_task(data).fingerprint() == make_task(TextData(dir="elsewhere", seq_len=64)).fingerprint()


def test_the_version_and_the_contents_have_a_fingerprint(tmp_path, monkeypatch):
    sources.imdb(tmp_path / "imdb")
    first = make_task(make_data("unused", tmp_path / "imdb")).fingerprint()
    (tmp_path / "moved").mkdir()
    flat(tmp_path / "moved")
    assert make_task(make_data("unused", tmp_path / "moved")).fingerprint() == first
    replaced(tmp_path / "imdb", split="test", label=[1] * 10)
    second = make_task(make_data("unused", tmp_path / "imdb")).fingerprint()
    monkeypatch.setattr(lra_text, "VERSION", 0)
    assert len({first, second, make_task(make_data("unused", tmp_path / "imdb")).fingerprint()}) == 3


def test_logistic_regression():
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 6)) * [1, 2, 1, 1, 0.1, 1]
    labels = (random.random(200) < 1 / (1 + np.exp(-x @ [1, -2, 0.5, 0, 3, 0]))).astype(np.uint8)

    def objective(w):
        return np.logaddexp(0, np.where(labels, -1, 1) * (x @ w)).sum() + w @ w / 2

    expected = minimize(objective, np.zeros(6), tol=1e-12).x
    np.testing.assert_allclose(logistic_regression(x, labels), expected, atol=1e-4)


def test_baselines(tmp_path):
    """What frequencies tell is found: praise has more of the letter a; two thirds are condemned."""
    random = np.random.default_rng(0)

    def columns(rows, seed):
        label = [int(row % 3 == 0) for row in range(rows)]
        text = ["".join(random.permutation(list("a" * (4 + 2 * y) + "b" * random.integers(10, 12)))) for y in label]
        return {"text": text, "label": label}

    folder = sources.published(tmp_path / "imdb", columns, 330, 90)
    data = make_data(tmp_path, folder, train=300, val=30, test=90)
    assert make_task(data).baselines() == {"majority": pytest.approx(2 / 3), "bag of bytes": 1.0}
    characters = make_data(tmp_path, folder, train=300, val=30, test=90, tokens="characters")
    assert make_task(characters).baselines() == {"majority": pytest.approx(2 / 3), "bag of characters": 1.0}


def test_a_batch_through_encoder_and_head(source, tmp_path):
    task = make_task(make_data(tmp_path, source))
    task.prepare()
    splits = task.datasets()
    assert list(map(len, splits)) == list(HALF.values())
    batch = task.collate([splits.val[i] for i in range(5)])
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.mask.sum(1).tolist() == splits.val.lengths[:5].tolist()
    assert not batch.inputs[~batch.mask].any(), "padding is token 0"
    assert batch.inputs[batch.mask].all(), "nothing else is"
    logits = task.head(8)(task.encoder(8)(batch.inputs), batch.mask)
    prediction, target = task.scored(logits, batch)
    assert prediction.shape == (5, 2)
    expected = -logits.log_softmax(1)[torch.arange(5), batch.targets].mean()
    torch.testing.assert_close(task.loss(prediction, target), expected)
    metric = task.metrics()["accuracy"]
    metric.update(torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 0]))
    assert metric.compute() == 0.75


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_never_changes_an_answer(pool, source, tmp_path):
    task = make_task(make_data(tmp_path, source, seq_len=200), pool=pool)
    model = SequenceModel(task.encoder(8), small_backbone("stu", seq_len=200, causal=False), task.head(8)).eval()
    examples = [task.datasets().train[i] for i in range(6)]
    together = task.collate(examples)
    assert together.mask is not None
    alone = [task.collate([example]) for example in examples]
    with torch.no_grad():
        expected = torch.cat([model(batch.inputs, batch.mask) for batch in alone])
        torch.testing.assert_close(model(together.inputs, together.mask), expected)


def test_the_configuration_states_the_defaults():
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/task/lra_text.yaml"), resolve=False)
    data = node["data"]
    assert set(node) == {"_target_", *inspect.signature(Text).parameters}
    assert data.pop("_target_") == "data.lra.text.TextData"
    defaults = {name: p.default for name, p in inspect.signature(TextData).parameters.items()}
    assert data == {**defaults, "dir": "${paths.data}", "seq_len": "${task.seq_len}"}
    assert (node["seq_len"], node["vocab_size"], node["pool"]) == (4096, 257, "mean")
    assert data["train"] + data["val"] == data["test"] == 25_000


@pytest.mark.parametrize(
    ("name", "value"), [("seq_len", 0), ("train", 0), ("val", 0), ("test", 0), ("seed", -1), ("tokens", "words")]
)
def test_bad_data_options_are_named(name, value):
    with pytest.raises(OptionError, match=f"{name}={value}: must be"):
        make_data("unused", None, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("seq_len", 63), ("seq_len", 65), ("vocab_size", 256)])
def test_bad_task_options_are_named(name, value):
    data = make_data("unused", None)
    with pytest.raises(OptionError, match=f"{name}={value}: must be"):
        make_task(data, **{name: value})


# As a command


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run(tmp_path):
    command = runs.small("task=lra_text", "model=stu", "name=run", *sources.overrides("lra_text", tmp_path))
    done = runs.train(tmp_path, *command)
    assert done.code == 0, done.err
    assert done.err == ""
    summary = runs.run_of(tmp_path, "lra_text", "stu", "run").read_summary()
    assert summary["steps"] == 20
    assert summary["baselines"].keys() == {"majority", "bag of bytes"}


def disconnected():
    """The hub is where nobody answers."""
    datasets.config.HF_ENDPOINT = "http://127.0.0.1:9"


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_without_data(tmp_path):
    done = runs.train(tmp_path, *runs.small("task=lra_text", "model=stu"), at=disconnected)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: task.data.source=None: stanfordnlp/imdb cannot be fetched: http://127.0.0.1:9")
