"""ListOps: the answers, the official distribution, the official files, and the cache that holds the data.

The statistics of the official generator were measured on 30,000, 3,000 and 20,000 of its examples.
"""

import errno
import gzip
import hashlib
import inspect
import itertools
import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.lra import listops as lra_listops
from data.lra.listops import ListOps, ListOpsData, read_official
from data.lra.listops_trees import ROOTS, VOCABULARY, Bounds, distinct_trees, draw_trees, grow
from data.store import cache
from data.store.cache import cached, fingerprint, tracked
from data.store.tokens import ROWS, TokenExamples
from stu.errors import OptionError

ROOT = Path(__file__).parents[2]
SAMPLES = Path(os.environ.get("LRA_SAMPLES_DIR", Path(__file__).parents[1] / "golden" / "lra"))
OFFICIAL = Bounds(500, 2000, 10, 10)
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")


# An independent reading of the tokens: nested lists [operator, argument, …], and their value.


def tree_of(tokens):
    stack = [[]]
    for symbol in (VOCABULARY[token] for token in tokens):
        if symbol in OPERATORS:
            stack.append([symbol])
        elif symbol == "]":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(int(symbol))
    [[tree]] = stack
    return tree


def value_of(tree):
    if isinstance(tree, int):
        return tree
    operator, *arguments = tree
    numbers = [value_of(argument) for argument in arguments]
    by_name = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda x: int(statistics.median(x)),
        "[SM": lambda x: sum(x) % 10,
    }
    return by_name[operator](numbers)


def nodes_of(tree, depth=1):
    """(depth, operator or "digit", number of arguments) of every node."""
    if isinstance(tree, int):
        yield depth, "digit", 0
        return
    yield depth, tree[0], len(tree) - 1
    for argument in tree[1:]:
        yield from nodes_of(argument, depth + 1)


def official_text(tree):
    """`( ( ( [MAX 2 ) 9 ) ] )` for [MAX 2 9 ]: arguments curried."""
    if isinstance(tree, int):
        return str(tree)
    text = tree[0]
    for argument in tree[1:]:
        text = f"( {text} {official_text(argument)} )"
    return f"( {text} ] )"


def tokens_of(text):
    """Long Range Arena's own words: ] becomes X, parentheses vanish, the rest is split at whitespace."""
    symbols = text.replace("]", "X").replace("(", "").replace(")", "").split()
    return bytes(VOCABULARY.index("]" if symbol == "X" else symbol) for symbol in symbols)


def samples(name):
    """(text, label) pairs of an official sample."""
    opened = gzip.open if name.endswith(".gz") else open
    with opened(SAMPLES / name, "rt", newline="") as lines:
        header, *rows = (line.rstrip("\r\n").split("\t") for line in lines)
    assert header == ["Source", "Target"]
    return [(text, int(label)) for text, label in rows]


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    data = ListOpsData(dir=str(tmp_path_factory.mktemp("listops")), train=5900, val=500, test=2000)
    data.prepare()
    return data


@pytest.fixture(scope="session")
def train(generated):
    return generated.examples("train")


@pytest.fixture(scope="session")
def census(train):
    """(trees, depth 1…10, digit or operator, arguments 0…10): how many such nodes a tree has."""
    kinds = ("digit", *OPERATORS)
    counts = np.zeros((1500, 11, 5, 11))
    for index, table in enumerate(counts):
        for (depth, kind, arguments), n in Counter(nodes_of(tree_of(train[index][0]))).items():
            table[depth, kinds.index(kind), arguments] = n
    return counts


def make_task(data, **options):
    return ListOps(**{"seq_len": 2048, "causal": False, "vocab_size": 16, "pool": "mean", "data": data, **options})


# Answers


@pytest.mark.slow
def test_generated_answers(train):
    for index in range(1000):
        tokens, label = train[index]
        assert value_of(tree_of(tokens)) == label


@pytest.mark.parametrize("name", ["listops_1000.tsv.gz", "listops_small_200.tsv"])
def test_official_answers(name):
    rows = samples(name)
    assert all(value_of(tree_of(tokens_of(text))) == label for text, label in rows)
    assert list(read_official(SAMPLES / name, 2000)) == [(tokens_of(text), label) for text, label in rows]


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**40),
    low=st.integers(0, 30),
    span=st.integers(2, 60),
    max_depth=st.integers(1, 6),
    max_args=st.integers(2, 12),
)
def test_any_bounds(seed, low, span, max_depth, max_args):
    """Whatever is asked for, all that comes keeps the bounds, differs and has the right label."""
    bounds = Bounds(low, low + span, max_depth, max_args)
    trees = list(islice(distinct_trees(seed, bounds), 50))
    assert len({tokens for tokens, _ in trees}) == len(trees)
    for tokens, label in trees:
        tree = tree_of(tokens)
        nodes = list(nodes_of(tree))
        assert value_of(tree) == label
        assert low < len(tokens) < low + span
        assert max(depth for depth, _, _ in nodes) <= max_depth
        assert {arguments for _, _, arguments in nodes} <= {0, *range(2, max_args + 1)}


# The official distribution


@pytest.mark.slow
def test_lengths(generated):
    lengths = np.concatenate([generated.examples(split).lengths for split in ("train", "val", "test")])
    n = len(lengths)
    assert n == 8400
    assert lengths.min() in (501, 502)
    assert 1990 < lengths.max() <= 1999
    error = np.sqrt(1 / n + 1 / 30_000)
    assert abs(lengths.mean() - 1033.9) < 4 * 393.8 * error
    assert abs(lengths.std() - 393.8) < 4 * 393.8 / np.sqrt(2) * error
    for length, share in [(536, 0.05), (576, 0.1), (702, 0.25), (953, 0.5), (1308, 0.75), (1641, 0.9), (1801, 0.95)]:
        assert abs((lengths <= length).mean() - share) < 4 * np.sqrt(share * (1 - share)) * error


def test_bounds_are_exclusive_and_nothing_is_left_out():
    """Of length 4 there is [op a b ] alone: 4 · 10 · 10 trees, each of which comes."""
    every = {bytes((op, a, b, 15)) for op in range(11, 15) for a in range(1, 11) for b in range(1, 11)}
    assert {tokens for tokens, _ in distinct_trees(0, Bounds(3, 5, 3, 3))} == every
    assert {tokens for tokens, _ in distinct_trees(0, Bounds(0, 2, 1, 2))} == {bytes((d,)) for d in range(1, 11)}
    assert list(distinct_trees(0, Bounds(1, 3, 3, 3))) == [], "there is no tree of two tokens"


def test_labels(train):
    reference = np.array([0.1695, 0.0926, 0.0775, 0.0805, 0.0870, 0.0854, 0.0777, 0.0726, 0.0885, 0.1688])
    share = np.bincount(train.labels, minlength=10) / len(train)
    chi_square = ((share - reference) ** 2 / reference).sum() / (1 / len(train) + 1 / 30_000)
    assert chi_square < 33.7  # its 0.9999 quantile, 9 degrees of freedom


def test_label_given_the_root(train):
    def share(symbol, label):
        labels = train.labels[train.tokens.first_tokens == VOCABULARY.index(symbol)]
        return (labels == label).mean(), len(labels)

    for symbol, label, reference in [("[MAX", 9, 0.566), ("[MIN", 0, 0.568), ("[MED", 4, 0.208), ("[MED", 5, 0.202)]:
        found, n = share(symbol, label)
        assert abs(found - reference) < 4 * np.sqrt(reference * (1 - reference) * (1 / n + 1 / 5000))
    for label in range(10):
        found, n = share("[SM", label)
        assert abs(found - 0.1) < 0.02 + 4 * np.sqrt(0.09 / n)


def test_acceptance():
    """8.226 % of 364,709 draws are kept; the shares of shorter and longer ones are those of 35,730."""
    lengths = np.concatenate([grow(np.random.default_rng(number), OFFICIAL)[1] for number in range(24)])
    for low, high, reference, of in [
        (501, 1999, 0.08226, 364_709),
        (1, 1, 0.75, np.inf),
        (2, 500, 0.1537, 35_730),
        (2000, np.inf, 0.0117, 35_730),
    ]:
        found = ((low <= lengths) & (lengths <= high)).mean()
        assert abs(found - reference) < 4 * np.sqrt(reference * (1 - reference) * (1 / len(lengths) + 1 / of))


def check_shares(counts, reference):
    """counts (trees, kinds) agree with the shares of 3,000 other trees, in standard errors over trees."""
    counts, reference = np.asarray(counts), np.asarray(reference)
    assert counts.shape[1] == len(reference)
    total = counts.sum(1, keepdims=True)
    share = counts.sum(0) / total.sum()
    error = (counts - share * total).std(0) / total.mean() * np.sqrt(1 / len(counts) + 1 / 3000)
    np.testing.assert_array_less(abs(share - reference), 4 * error + 5e-5)  # the references have 4 digits


def test_operators(census):
    operators = census[:, :, 1:].sum((1, 3))
    check_shares(operators, [0.25] * 4)
    check_shares(census[:, 1, 1:].sum(2), [0.25] * 4)
    assert abs(operators.sum(1).mean() - 146.4) < 4 * operators.sum(1).std() * np.sqrt(1 / len(census) + 1 / 3000)


def test_arity(census):
    shares = [0.1092, 0.1101, 0.1103, 0.1108, 0.1111, 0.1118, 0.1119, 0.1131, 0.1117]
    check_shares(census[:, :, 1:, 2:].sum((1, 2)), shares)


def test_levels(census):
    operators, digits = census[:, :, 1:].sum((2, 3)), census[:, :, 0].sum(2)
    assert (operators[:, 9] > 0).all(), "operators nest nine deep in every sequence"
    assert not operators[:, 10].any()
    check_shares(operators[:, 1:10], [0.0068, 0.0154, 0.0270, 0.0437, 0.0672, 0.1026, 0.1545, 0.2328, 0.3501])
    check_shares(digits[:, 2:], [0.0063, 0.0140, 0.0242, 0.0390, 0.0598, 0.0919, 0.1386, 0.2084, 0.4178])


def test_symbols(train):
    """Digits are uniform; an operator is 3.56 % of the tokens, and a bracket closes each."""
    tokens = np.stack([np.bincount(train[i][0], minlength=16) for i in range(1500)])
    check_shares(tokens[:, 1:11], [0.1] * 10)
    check_shares(tokens[:, 1:], [0.0715] * 10 + [0.0356] * 4 + [0.1423])
    assert not tokens[:, 0].any()
    np.testing.assert_array_equal(tokens[:, 11:15].sum(1), tokens[:, 15])


# Seeds and splits


def test_the_same_seed_gives_the_same_data_on_every_machine():
    """If this digest changes, so do everybody's data: raise VERSION."""
    digest = hashlib.sha256(repr(list(islice(distinct_trees(0, OFFICIAL), 1000))).encode()).hexdigest()
    assert digest[:16] == "6fbef289c2736db2"


def test_rounds_are_independent():
    stream = distinct_trees(7, OFFICIAL)
    rounds = [list(draw_trees(np.random.default_rng([7, number]), OFFICIAL)) for number in (1, 0)]
    assert list(islice(stream, len(rounds[1]) + len(rounds[0]))) == rounds[1] + rounds[0]
    assert len(rounds[1]) < ROOTS / 10


def test_another_seed_gives_other_data(tmp_path):
    one, other = (ListOpsData(dir=str(tmp_path), seed=seed, train=300, val=1, test=1) for seed in (0, 1))
    assert make_task(one).fingerprint() != make_task(other).fingerprint()
    assert one.prepare() != other.prepare()
    trees = [{tokens.tobytes() for tokens, _ in data.examples("train")} for data in (one, other)]
    assert not trees[0] & trees[1]


@pytest.mark.parametrize(
    "option", ["seed", "train", "val", "test", "min_length", "max_length", "max_depth", "max_args"]
)
def test_every_option_has_a_fingerprint(option):
    data = ListOpsData(dir="unused")
    changed = ListOpsData(dir="unused", **{option: getattr(data, option) + 1})
    assert make_task(data).fingerprint() != make_task(changed).fingerprint()
    assert make_task(data).fingerprint() == make_task(ListOpsData(dir="elsewhere")).fingerprint()


def test_the_version_has_a_fingerprint(monkeypatch):
    before = make_task(ListOpsData(dir="unused")).fingerprint()
    monkeypatch.setattr(lra_listops, "VERSION", 0)
    assert make_task(ListOpsData(dir="unused")).fingerprint() != before


def test_splits_share_no_tree(tmp_path):
    """All 400 trees of length 4, in three splits; one more there is not."""
    data = ListOpsData(dir=str(tmp_path), train=300, val=60, test=40, min_length=3, max_length=5)
    trees = [tokens.tobytes() for split in make_task(data).datasets() for tokens, _ in split]
    assert len(trees) == len(set(trees)) == 400
    greedy = ListOpsData(dir=str(tmp_path), train=300, val=60, test=41, min_length=3, max_length=5)
    with pytest.raises(OptionError, match="test=41: only 40 trees are left"):
        greedy.prepare()
    assert len(list((tmp_path / "lra_listops").glob("*/"))) == 1, "the failed build left files"


# Reading


def test_examples(generated, train):
    stored = Dataset.from_file(str(generated.prepare() / "train.arrow"))
    assert len(train) == len(stored) == 5900
    assert stored.features["tokens"].feature.dtype == stored.features["label"].dtype == "uint8"
    for index in (0, 1, ROWS - 1, ROWS, 3 * ROWS + 17, 5899):
        tokens, label = train[index]
        assert tokens.tolist() == stored[index]["tokens"]
        assert label == stored[index]["label"] == train.labels[index]
        assert len(tokens) == train.lengths[index]
        assert tokens[0] == train.tokens.first_tokens[index]
    np.testing.assert_array_equal(train[-1][0], train[5899][0])
    for index in (5900, -5901):
        with pytest.raises(IndexError):
            train[index]


def test_an_example_belongs_to_its_reader(train):
    before = train[3][0].copy()
    train[3][0][:] = 0
    np.testing.assert_array_equal(train[3][0], before)


def test_workers_get_a_path_not_the_data(train):
    message = pickle.dumps(train)
    assert len(message) < 1000
    copy = pickle.loads(message)
    assert isinstance(copy, TokenExamples)
    np.testing.assert_array_equal(copy[4321][0], train[4321][0])
    np.testing.assert_array_equal(copy.lengths, train.lengths)


# The task


def test_baselines(generated):
    train, test = generated.examples("train"), generated.examples("test")
    found = make_task(generated).baselines()
    majority = Counter(train.labels.tolist()).most_common(1)[0][0]
    by_token = {
        token: Counter(train.labels[train.tokens.first_tokens == token].tolist()).most_common(1)[0][0]
        for token in set(train.tokens.first_tokens.tolist())
    }
    guesses = [by_token[tokens[0]] == label for tokens, label in test]
    assert found == {
        "majority": pytest.approx(np.mean(test.labels == majority)),
        "first token": pytest.approx(np.mean(guesses)),
    }
    assert abs(found["majority"] - 0.173) < 4 * np.sqrt(0.173 * 0.827 / len(test))
    assert abs(found["first token"] - 0.364) < 4 * np.sqrt(0.364 * 0.636 / len(test))


def test_the_first_token_of_a_test_tree_may_be_new(tmp_path):
    """Then the guess is the majority's."""
    write_official(tmp_path, train=[["[MAX", 7, 1], ["[MAX", 7, 2], 3], test=[["[MIN", 7, 8], ["[MIN", 3, 3]])
    found = make_task(ListOpsData(dir=str(tmp_path / "cache"), source=str(tmp_path))).baselines()
    assert found == {"majority": 0.5, "first token": 0.5}


def test_a_batch_through_encoder_and_head(generated):
    task = make_task(generated)
    splits = task.datasets()
    assert [len(split) for split in splits] == [5900, 500, 2000]
    batch = task.collate([splits.val[i] for i in range(5)])
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == (5, splits.val.lengths[:5].max())
    assert batch.mask.sum(1).tolist() == splits.val.lengths[:5].tolist()
    assert not batch.inputs[~batch.mask].any(), "padding is token 0"
    logits = task.head(8)(task.encoder(8)(batch.inputs), batch.mask)
    prediction, target = task.scored(logits, batch)
    assert prediction.shape == (5, 10)
    expected = -logits.log_softmax(1)[torch.arange(5), batch.targets].mean()
    torch.testing.assert_close(task.loss(prediction, target), expected)


def test_accuracy_is_over_examples():
    metric = make_task(ListOpsData(dir="unused")).metrics()["accuracy"]
    metric.update(torch.eye(10)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2]))
    assert metric.compute() == 0.75


def test_the_configuration_states_the_defaults():
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/task/lra_listops.yaml"), resolve=False)
    data = node["data"]
    assert set(node) == {"_target_", *inspect.signature(ListOps).parameters}
    assert data.pop("_target_") == "data.lra.listops.ListOpsData"
    defaults = {name: p.default for name, p in inspect.signature(ListOpsData).parameters.items()}
    assert data == {**defaults, "dir": "${paths.data}"}
    assert node["vocab_size"] == len(VOCABULARY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", 0),
        ("val", 0),
        ("test", 0),
        ("seed", -1),
        ("min_length", -1),
        ("max_length", 501),
        ("max_depth", 0),
        ("max_args", 1),
    ],
)
def test_bad_data_options_are_named(name, value):
    with pytest.raises(OptionError, match=f"{name}={value}: must be"):
        ListOpsData(dir="unused", **{name: value})


@pytest.mark.parametrize(("name", "least"), [("seq_len", 1999), ("vocab_size", 16)])
def test_bad_task_options_are_named(name, least):
    data = ListOpsData(dir="unused")
    make_task(data, **{name: least})
    with pytest.raises(OptionError, match=f"{name}={least - 1}: must be at least {least}"):
        make_task(data, **{name: least - 1})


def test_the_pool_reaches_the_head():
    x = torch.arange(6.0).reshape(1, 3, 2)
    heads = {pool: make_task(ListOpsData(dir="unused"), pool=pool).head(2) for pool in ("mean", "last")}
    heads["mean"].linear.load_state_dict(heads["last"].linear.state_dict())
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(heads["last"](x, mask), heads["last"].linear(x[:, 1]))
    torch.testing.assert_close(heads["mean"](x, mask), heads["mean"].linear(x[:, :2].mean(1)))


# The official files


def write_official(folder, train=(1,), val=(1,), test=(1,)):
    for split, trees in (("train", train), ("val", val), ("test", test)):
        rows = "".join(f"{official_text(tree)}\t{value_of(tree)}\r\n" for tree in trees)
        (folder / f"basic_{split}.tsv").write_bytes(b"Source\tTarget\r\n" + rows.encode())


trees = st.recursive(
    st.integers(0, 9),
    lambda children: st.builds(
        lambda operator, arguments: [operator, *arguments],
        st.sampled_from(OPERATORS),
        st.lists(children, min_size=2, max_size=5),
    ),
    max_leaves=40,
)


@given(drawn=st.lists(trees, min_size=1, max_size=4))
def test_official_text_round_trip(drawn, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    write_official(folder, train=drawn)
    rows = list(read_official(folder / "basic_train.tsv", 2000))
    assert [(tree_of(tokens), label) for tokens, label in rows] == [(tree, value_of(tree)) for tree in drawn]


def test_official_files_become_the_data(tmp_path):
    big, small = "listops_1000.tsv.gz", "listops_small_200.tsv"
    for name, official in [("basic_train.tsv.gz", big), ("basic_val.tsv", small), ("basic_test.tsv", small)]:
        (tmp_path / name).symlink_to((SAMPLES / official).resolve())
    task = make_task(ListOpsData(dir=str(tmp_path / "cache"), source=str(tmp_path), train=5))
    task.prepare()
    for split, name in zip(task.datasets(), (big, small, small), strict=True):
        stored = [(tokens.tobytes(), label) for tokens, label in split]
        assert stored == [(tokens_of(text), label) for text, label in samples(name)]


def test_other_contents_have_another_fingerprint(tmp_path):
    def digest(**options):
        return make_task(ListOpsData(dir="unused", source=str(tmp_path), **options)).fingerprint()

    write_official(tmp_path)
    first = digest()
    assert first == digest(seed=5, train=7), "the generator's options do not matter here"
    assert first != digest(max_length=1000), "which lengths are refused does"
    write_official(tmp_path, val=[2])
    assert first != digest()


HEADER = b"Source\tTarget\r\n"
LONG = b"( " * 2000 + b"1 " * 2000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "line 1: no example follows"),
        (HEADER, "line 1: no example follows"),
        (b"1\t1\r\n", "line 1: the columns must be Source and Target"),
        (b"Target\tSource\r\n1\t1\r\n", "line 1: the columns must be Source and Target"),
        (HEADER + b"1\t1\r\n1 1\r\n", "line 3: 1 columns, must be 2"),
        (HEADER + b"1\t1\t1\r\n", "line 2: 3 columns, must be 2"),
        (HEADER + b"( [FIRST 1 ) ] )\t1\r\n", r"line 2: unknown symbol '\[FIRST'"),
        (HEADER + b"12\t1\r\n", "line 2: unknown symbol '12'"),
        (HEADER + b"<pad>\t1\r\n", "line 2: unknown symbol '<pad>'"),
        (HEADER + b"1\t1\r\n1\t10\r\n", "line 3: label '10', must be 0…9"),
        (HEADER + b"1\t\r\n", "line 2: label '', must be 0…9"),
        (HEADER + b"( ( [MAX 2 ) ] )\t3\r\n", "line 2: label 3, must be 2, the value of the tree"),
        (HEADER + b"[SM 9 [MED 1 4 ] ]\t2\r\n", "line 2: label 2, must be 1, the value of the tree"),
        (HEADER + b"[MIN 2 3\t2\r\n", "line 2: 1 open brackets and 0 values, must be 0 and 1"),
        (HEADER + b"[MIN 2 ] ]\t2\r\n", "line 2: a bracket closes nothing"),
        (HEADER + b"[MIN ]\t2\r\n", "line 2: a bracket closes nothing"),
        (HEADER + b"] 2\t2\r\n", "line 2: a bracket closes nothing"),
        (HEADER + b"2 2\t2\r\n", "line 2: 0 open brackets and 2 values, must be 0 and 1"),
        (HEADER + b"( ( [MIN 2 ) ]\t2\r\n", "line 2: its parentheses do not match"),
        (HEADER + b"( )\t1\r\n", "line 2: 0 tokens, must be 1…1999"),
        (HEADER + LONG + b"\t1\r\n", "line 2: 2000 tokens, must be 1…1999"),
    ],
    ids=itertools.count(),
)
def test_wrong_official_files_are_named(content, problem, tmp_path):
    write_official(tmp_path)
    (tmp_path / "basic_val.tsv").write_bytes(content)
    data = ListOpsData(dir=str(tmp_path / "cache"), source=str(tmp_path))
    with pytest.raises(OptionError, match=rf"source=.*basic_val\.tsv: {problem}"):
        data.prepare()
    assert not list((tmp_path / "cache/lra_listops").glob("*/"))


@pytest.mark.parametrize(
    "content", [gzip.compress(HEADER + b"1\t1\r\n" * 9)[:-9], b"no gzip"], ids=["cut", "no archive"]
)
def test_damaged_archives_are_named(content, tmp_path):
    write_official(tmp_path)
    (tmp_path / "basic_val.tsv").unlink()
    (tmp_path / "basic_val.tsv.gz").write_bytes(content)
    with pytest.raises(OptionError, match=r"source=.*basic_val\.tsv\.gz: cannot be read beyond line"):
        ListOpsData(dir=str(tmp_path / "cache"), source=str(tmp_path)).prepare()


def test_what_test_repeats_of_train_is_said(tmp_path, capfd):
    write_official(tmp_path, train=(1, 2), val=(1, 3), test=(4,))
    ListOpsData(dir=str(tmp_path / "cache"), source=str(tmp_path)).prepare()
    assert capfd.readouterr().err == "note: 1 of 2 examples of val are in train, too\n"


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OptionError, match=rf"source=~/x: must be a folder with basic_train.*: .*'{tmp_path}/x'$"):
        ListOpsData(dir="unused", source="~/x").prepare()


def test_missing_official_files_are_named(tmp_path):
    write_official(tmp_path)
    (tmp_path / "basic_train.tsv").unlink()
    (tmp_path / "basic_test.tsv").unlink()
    with pytest.raises(OptionError, match=r"missing, plain and .gz: basic_train.tsv, basic_test.tsv$"):
        ListOpsData(dir="unused", source=str(tmp_path)).prepare()


# The cache


def test_a_second_call_builds_nothing(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "x").write_text("data")

    spec = {"seed": 1, "size": 2}
    folder = cached(tmp_path, "numbers", spec, build)
    assert cached(str(tmp_path), "numbers", dict(reversed(spec.items())), build) == folder
    assert len(built) == 1
    assert folder == tmp_path / "numbers" / fingerprint(spec)
    assert sorted(path.name for path in folder.iterdir()) == ["spec.json", "x"]
    found = json.loads((folder / "spec.json").read_text())
    assert found.pop("files").keys() == {"spec.json", "x"}
    assert found == spec
    assert cached(tmp_path, "numbers", {"seed": 2, "size": 2}, build) != folder
    assert len(built) == 2


def test_the_root_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached("~/deep/er", "x", {}, lambda folder: None).parent == tmp_path / "deep/er/x"


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "x", {}, fail)
    assert not list(tmp_path.glob("x/*/"))
    assert cached(tmp_path, "x", {}, lambda folder: None).is_dir()


def test_a_full_disk_is_one_message(tmp_path):
    def fail(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OptionError, match=rf"dir={tmp_path}: .*room.*No space left on device"):
        cached(tmp_path, "x", {}, fail)


def test_an_unusable_folder_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=rf"dir={tmp_path}/file: must be a folder"):
        cached(tmp_path / "file", "x", {}, lambda folder: None)


# Waits in the build until `crowd` processes have asked, then builds; or, without a crowd, until it is killed.
BUILDER = """
import sys, time
from pathlib import Path
from data.store.cache import cached

root, name, crowd = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def build(folder):
    (folder / "half").write_text("half")
    (root / f"{name}.building").touch()
    while not crowd or len(list(root.glob("*.asks"))) < crowd:
        time.sleep(0.01)
    time.sleep(0.3)
    (folder / "whole").write_text(name)

(root / f"{name}.asks").touch()
print((cached(root, "x", {}, build) / "whole").read_text())
"""


def builder(root, name, crowd):
    command = [sys.executable, "-c", BUILDER, str(root), name, str(crowd)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_once(tmp_path):
    processes = [builder(tmp_path, name, 2) for name in ("one", "two")]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("*.asks"))) == 2
    [building] = tmp_path.glob("*.building")
    assert said == [building.stem] * 2


def test_a_killed_build_is_no_data(tmp_path):
    process = builder(tmp_path, "killed", 0)
    with process:
        while not (tmp_path / "killed.building").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    [partial] = tmp_path.glob("x/*/")
    assert [path.name for path in partial.iterdir()] == ["half"]
    folder = cached(tmp_path, "x", {}, lambda folder: (folder / "whole").write_text("mine"))
    assert sorted(path.name for path in folder.iterdir()) == ["spec.json", "whole"]
    assert list(tmp_path.glob("x/*/")) == [folder]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal, monkeypatch, capsys):
    """A bar on a terminal, lines elsewhere, never on stdout; nothing is lost on the way."""
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # asks for colours, not for a bar
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with tracked(iter(range(3000)), "counting", 3000) as numbers:
        assert list(itertools.islice(numbers, 2000)) == list(range(2000))
        assert sum(1 for _ in numbers) == 1000
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting" in err
    assert ("counting: 1,234 of 3,000\n" in err) != terminal
