"""The memory and recall tasks against their definitions: solved from the inputs alone, with the stated chances."""

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.stats import chisquare, kstest
from torch.utils.data import DataLoader

from data.memory import recall
from data.memory.adding import Adding, AddingData
from data.memory.associative_recall import AssociativeRecallData
from data.memory.copying import CopyingData, SelectiveCopyingData
from data.memory.induction_heads import InductionHeadsData
from data.memory.mqar import MQARData, power_law
from data.memory.recall import IGNORE, Recall, RecallData, commonest
from data.store import synthetic
from data.store.synthetic import SyntheticData, shuffled, subsets, uniforms
from stu.cli.composition import build
from stu.cli.usage import CONF
from stu.errors import OptionError
from stu.task import Batch, Task
from tests import runs

Tokens = list[int]


class Kind(NamedTuple):
    """A task: its file in conf/task, its data, options of a small one, its least length with these, and its oracle."""

    name: str
    data: type[RecallData]
    options: dict[str, Any]
    least: int
    oracle: Callable[[RecallData, Tokens], int]

    def __call__(self, **changes: Any) -> RecallData:
        return self.data(**{"seq_len": 24, "train": 7, "val": 5, "test": 6} | self.options | changes)

    def __str__(self) -> str:
        return self.name


# What each definition asks for at the last step of a prefix, read from the tokens of that prefix.


def copy(data: RecallData, past: Tokens) -> int:
    marker = data.vocab_size - 1
    return past[len(past) - past.index(marker) - 2] if marker in past[:-1] else IGNORE


def copy_selectively(data: RecallData, past: Tokens) -> int:
    marker = data.vocab_size - 1
    shown = [token for token in past if token not in (0, marker)]
    return shown[past.count(marker) - 1] if past[-1] == marker else IGNORE


def induce(data: RecallData, past: Tokens) -> int:
    return past[past.index(0) + 1] if past.count(0) == 2 else IGNORE


def associate(data: RecallData, past: Tokens) -> int:
    if 0 not in past or past[-1] == 0:
        return IGNORE
    pairs = past[: past.index(0)]
    return dict(zip(pairs[::2], pairs[1::2], strict=True))[past[-1]]


def associate_many(data: MQARData, past: Tokens) -> int:
    pairs, rest = past[: 2 * data.num_kv_pairs], past[2 * data.num_kv_pairs :]
    return dict(zip(pairs[::2], pairs[1::2], strict=True))[rest[-1]] if rest and rest[-1] else IGNORE


COPYING = Kind("copying", CopyingData, {"vocab_size": 6, "num_symbols": 4}, 9, copy)
SELECTIVE = Kind("selective_copying", SelectiveCopyingData, {"vocab_size": 6, "num_symbols": 4}, 8, copy_selectively)
INDUCTION = Kind("induction_heads", InductionHeadsData, {"vocab_size": 6}, 3, induce)
ASSOCIATIVE = Kind("associative_recall", AssociativeRecallData, {"vocab_size": 8}, 4, associate)
MQAR = Kind("mqar", MQARData, {"vocab_size": 16, "num_kv_pairs": 3}, 11, associate_many)
KINDS = (COPYING, SELECTIVE, INDUCTION, ASSOCIATIVE, MQAR)
TOKENS = {
    "copying": [2, 3, 1, 4, 0, 0, 0, 5, 0, 0, 0, 0],
    "selective_copying": [0, 0, 2, 0, 3, 0, 1, 4, 5, 5, 5, 5],
    "induction_heads": [3, 0, 1, 5, 5, 3, 4, 4, 3, 5, 5, 0],
    "associative_recall": [2, 6, 3, 6, 1, 5, 3, 6, 3, 6, 0, 2],
    "mqar": [1, 15, 3, 14, 5, 12, 1, 0, 5, 0, 3, 0],
}
NUMBERS = (0.9453366042943712, 0.9409177199311742)
LEAST_VOCABULARY = {"copying": 4, "selective_copying": 4, "induction_heads": 3, "associative_recall": 5, "mqar": 8}


def adding(**changes: Any) -> AddingData:
    return AddingData(**{"seq_len": 24, "train": 7, "val": 5, "test": 6} | changes)


kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
all_data = pytest.mark.parametrize("make", [*KINDS, adding], ids=[*map(str, KINDS), "adding"])


def task_of(data: SyntheticData) -> Task:
    if isinstance(data, AddingData):
        return Adding(seq_len=data.seq_len, causal=True, pool="last", data=data)
    return Recall(seq_len=data.seq_len, causal=True, data=data)


def many(data: SyntheticData, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of many sequences."""
    return type(data)(**asdict(data) | {"train": count}).examples("train").stacked(range(count))


def assert_uniform(values: Iterable[Any], possible: Iterable[Any]) -> None:
    assert_frequencies(values, dict.fromkeys(possible, 1.0))


def assert_frequencies(values: Iterable[Any], weights: dict[Any, float]) -> None:
    """Each value is as frequent as its weight says, and none is another's."""
    counts = Counter(values)
    assert counts.keys() <= weights.keys()
    expected = np.array(list(weights.values())) * counts.total() / sum(weights.values())
    assert not chisquare([counts[value] for value in weights], expected).pvalue < 1e-3  # nan where there is one


def tuples(rows: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows.tolist()]


# The definitions


@settings(max_examples=100)
@given(st.sampled_from(KINDS), st.integers(0, 30), st.integers(0, 30), st.integers(0, 2**128 - 1))
def test_the_past_alone_says_what_is_asked_and_what_is_right(kind, longer, richer, seed):
    vocabulary = LEAST_VOCABULARY[kind.name] + richer
    data = kind(seq_len=kind.least + longer, vocab_size=vocabulary, seed=seed)
    for inputs, targets in map(data.splits().val.__getitem__, range(5)):
        assert inputs.shape == targets.shape == (data.seq_len,)
        assert inputs.dtype == targets.dtype == np.int64
        assert 0 <= inputs.min() <= inputs.max() < vocabulary
        past = inputs.tolist()
        assert targets.tolist() == [kind.oracle(data, past[: t + 1]) for t in range(len(past))]


@kinds
def test_every_sequence_asks_equally_often_for_possible_answers(kind):
    data = kind(**{"num_kv_pairs": 6, "random_fillers": True} if kind is MQAR else {})
    _, targets = many(data, 500)
    answers = {"copying": 4, "selective_copying": 4, "mqar": 6}.get(kind.name, 1)
    assert data.num_answers == answers
    assert ((targets != IGNORE).sum(1) == answers).all()
    assert set(np.unique(targets)) == {IGNORE, *data.answers}


def test_copying_is_symbols_blanks_marker_and_blanks():
    inputs, targets = many(COPYING(seq_len=24), 50)
    assert set(np.unique(inputs[:, :4])) == {1, 2, 3, 4}
    assert (inputs[:, 4:] == [0] * 15 + [5] + [0] * 4).all()  # T − 1 = 15
    assert (targets[:, -4:] == inputs[:, :4]).all()


def test_selective_copying_is_symbols_among_blanks_and_markers():
    inputs, _ = many(SELECTIVE(seq_len=24), 50)
    assert (inputs[:, -4:] == 5).all()
    assert ((inputs[:, :-4] > 0).sum(1) == 4).all()
    assert inputs[:, :-4].max() == 4


def test_the_trigger_stands_twice():
    inputs, _ = many(INDUCTION(), 200)
    assert ((inputs == 0).sum(1) == 2).all()
    assert (inputs[:, -1] == 0).all()
    assert (inputs[:, -2] > 0).all()


@pytest.mark.parametrize("seq_len", [4, 5, 12, 13])
def test_associative_recall_is_consistent_pairs_delimiter_and_key(seq_len):
    inputs, _ = many(ASSOCIATIVE(seq_len=seq_len), 200)
    pairs = inputs[:, : seq_len // 2 * 2 - 2].reshape(200, -1, 2)
    assert (pairs[..., 0] >= 1).all()
    assert (pairs[..., 0] <= 3).all()
    assert (pairs[..., 1] >= 4).all()
    assert (inputs[:, pairs[0].size : -1] == 0).all()
    for some in pairs:
        value_of: dict[int, int] = {}
        assert all(value_of.setdefault(key, value) == value for key, value in some.tolist())


@pytest.mark.parametrize("seq_len", [11, 12, 40])
@pytest.mark.parametrize("random_fillers", [False, True])
def test_mqar_is_pairs_and_then_every_key_once_among_fillers(seq_len, random_fillers):
    data = MQAR(seq_len=seq_len, random_fillers=random_fillers)
    inputs, targets = many(data, 500)
    keys, values = inputs[:, 0:6:2], inputs[:, 1:6:2]
    assert set(np.unique(keys)) == set(range(1, 8))
    assert set(np.unique(values)) == set(range(8, 16))
    for row, answers, some, others in zip(inputs, targets, keys, values, strict=True):
        assert len(set(some)) == len(set(others)) == 3
        places = np.flatnonzero(answers != IGNORE)
        assert (places >= 6).all()
        assert (places % 2 == 0).all()
        assert sorted(zip(row[places], answers[places], strict=True)) == sorted(zip(some, others, strict=True))
    fillers = inputs[:, 6:][targets[:, 6:] == IGNORE]
    if random_fillers and seq_len > 12:
        assert_uniform(fillers, range(16))
    elif not random_fillers:
        assert not fillers.any()


@pytest.mark.parametrize("seq_len", [2, 3, 24])
def test_adding_marks_one_step_in_each_half_and_asks_for_the_sum(seq_len):
    data = adding(seq_len=seq_len)
    inputs, targets = many(data)
    assert inputs.shape == (20_000, seq_len, 2)
    assert inputs.dtype == targets.dtype == np.float32
    marks, half = inputs[..., 1], seq_len // 2
    assert ((marks == 0) | (marks == 1)).all()
    assert (marks[:, :half].sum(1) == 1).all()
    assert (marks[:, half:].sum(1) == 1).all()
    np.testing.assert_allclose(targets, inputs.astype(float).prod(2).sum(1), rtol=1e-6)
    places = np.stack([marks[:, :half].argmax(1), half + marks[:, half:].argmax(1)], 1)
    assert_uniform(tuples(places), product(range(half), range(half, seq_len)))
    assert kstest(inputs[:2000, :, 0].ravel(), "uniform").pvalue > 1e-3


# The chances


@kinds
def test_answers_are_equally_likely(kind):
    data = kind(vocab_size=10)
    _, targets = many(data)
    for t in range(data.seq_len):
        asked = targets[:, t][targets[:, t] != IGNORE]
        if len(asked) > 1000:
            assert_uniform(asked, data.answers)


def test_answers_of_a_sequence_are_independent_where_symbols_are_copied():
    for kind in (COPYING, SELECTIVE):
        _, targets = many(kind(vocab_size=4, num_symbols=3))
        assert_uniform(tuples(targets[:, -3:]), product((1, 2), repeat=3))


def test_symbols_stand_at_any_places():
    inputs, _ = many(SELECTIVE(seq_len=8, num_symbols=3))
    assert_uniform([tuple(np.flatnonzero(row)) for row in inputs[:, :5]], combinations(range(5), 3))


@pytest.mark.parametrize("seq_len", [3, 4, 24])
def test_the_first_trigger_stands_wherever_an_answer_fits(seq_len):
    inputs, _ = many(INDUCTION(seq_len=seq_len))
    assert_uniform((inputs == 0).argmax(1), range(seq_len - 2))


def test_keys_and_the_values_they_are_given_are_independent():
    inputs, _ = many(ASSOCIATIVE(seq_len=6, vocab_size=5))
    same = inputs[:, 0] == inputs[:, 2]
    assert_uniform(tuples(inputs[:, (0, 2)]), product((1, 2), repeat=2))
    assert_uniform(tuples(inputs[~same][:, (1, 3)]), product((3, 4), repeat=2))


def test_each_key_that_came_is_equally_likely_to_be_asked_for():
    inputs, _ = many(ASSOCIATIVE(seq_len=8, vocab_size=5))
    two_of_one = inputs[(inputs[:, (0, 2, 4)] == 1).sum(1) == 2]
    assert_uniform(two_of_one[:, -1], (1, 2))


def test_different_keys_and_values_come_in_any_order():
    inputs, _ = many(MQAR(vocab_size=8, seq_len=7, num_kv_pairs=2))
    assert_uniform(tuples(inputs[:, (0, 2)]), permutations((1, 2, 3), 2))
    assert_uniform(tuples(inputs[:, (1, 3)]), permutations((4, 5, 6, 7), 2))
    assert_uniform(tuples(inputs[:, (0, 1)]), product((1, 2, 3), (4, 5, 6, 7)))


@pytest.mark.parametrize("a", [0.01, 0.4, 1.0])
def test_gaps_follow_the_power_law_without_replacement(a):
    data = MQAR(seq_len=14, num_kv_pairs=2, power_a=a)
    inputs, _ = many(data)
    gaps = [tuple((np.flatnonzero(row[4:] == key)[0]) // 2 for key in row[[0, 2]]) for row in inputs]
    weight = {gap: (gap + 1) ** (a - 1) for gap in range(5)}
    total = sum(weight.values())
    assert_frequencies(
        gaps, {(g, h): weight[g] / total * weight[h] / (total - weight[g]) for g, h in permutations(weight, 2)}
    )


def test_all_gaps_are_used_where_there_are_no_more_than_pairs():
    uniform = np.random.default_rng(0).random((100, 6))
    assert (np.sort(power_law(uniform, 0.01, 6)) == np.arange(6)).all()
    assert power_law(np.zeros((1, 3)), 0.01, 3).shape == (1, 3)  # the least number a stream gives


@pytest.mark.parametrize(("count", "size"), [(5, 2), (5, 5), (4, 3), (3, 1)])
def test_subsets_are_equally_likely_and_shuffling_makes_orders_so(count, size):
    random = np.random.default_rng(0)
    chosen = subsets(random.random((20_000, size)), count)
    assert_uniform(tuples(np.sort(chosen)), combinations(range(count), size))
    ordered = shuffled(chosen, random.random((20_000, size)))
    assert_uniform(tuples(ordered), permutations(range(count), size))


def test_numbers_just_below_one_stay_below_the_count():
    last = np.nextafter(1.0, 0.0)
    for count in (1, 3, 5, 10, 1000, 8191, 2**20 + 1):
        assert synthetic.integers(np.array([0.0, last]), count).tolist() == [0, count - 1]
    assert sorted(subsets(np.full((1, 4), last), 6)[0]) == [2, 3, 4, 5]


@kinds
def test_chance_is_what_random_guesses_get(kind):
    data = kind(vocab_size=9, test=2000)
    _, targets = data.examples("test").stacked(range(2000))
    guesses = np.random.default_rng(0).choice(list(data.answers), targets.shape)
    right = (guesses == targets)[targets != IGNORE]
    expected = {"copying": 1 / 7, "selective_copying": 1 / 7, "induction_heads": 1 / 8, "mqar": 1 / 5}
    chance = task_of(data).baselines()["chance"]
    assert chance == pytest.approx(expected.get(kind.name, 1 / 4))
    assert right.mean() == pytest.approx(chance, abs=4 * math.sqrt(chance / len(right)))


@kinds
def test_the_commonest_answer_is_counted_before_anything_is_asked(kind):
    data = kind(seq_len=40, test=300, **{"random_fillers": True} if kind is MQAR else {})
    right = []
    for inputs, targets in map(data.splits().test.__getitem__, range(300)):
        asked = [t for t in range(40) if targets[t] != IGNORE]
        shown = Counter(sorted(token for token in inputs[: asked[0]].tolist() if token in data.answers))
        right += [targets[t] == shown.most_common(1)[0][0] for t in asked]
    baselines = task_of(data).baselines()
    assert baselines["commonest"] == pytest.approx(np.mean(right))
    assert baselines["commonest"] > baselines["chance"]
    assert baselines.keys() == {"chance", "commonest"}


def test_knowing_the_values_of_a_sequence_gives_mqar_one_in_as_many():
    assert task_of(MQAR(vocab_size=200, test=300)).baselines() == {"chance": 1 / 100, "commonest": pytest.approx(1 / 3)}


def test_the_commonest_answer_is_one_of_the_answers():
    inputs, asked = np.array([[3, 6, 6, 3, 5, 5], [3, 6, 6, 3, 3, 3]]), np.array([[False] * 5 + [True]] * 2)
    assert commonest(inputs, asked, range(4, 6)).tolist() == [5, 4]


def test_baselines_read_a_bounded_number_of_tokens(monkeypatch):
    data = COPYING(test=50)
    inputs, targets = data.examples("test").stacked(range(3))
    for budget, count in ((1, 1), (3 * 24, 3)):
        monkeypatch.setattr(recall, "BASELINE_TOKENS", budget)
        guesses = commonest(inputs[:count], targets[:count] != IGNORE, data.answers)
        expected = (targets[:count, -4:] == guesses[:, None]).mean()
        assert task_of(data).baselines()["commonest"] == pytest.approx(expected)


def test_adding_baselines_are_errors_of_what_they_say():
    data = adding(seq_len=10)
    inputs, targets = many(data)
    second = (inputs[:, 5:, 0] * inputs[:, 5:, 1]).sum(1)
    baselines = task_of(data).baselines()
    assert baselines == {"constant": 1 / 6, "one number": 1 / 12}
    assert np.square(targets - 1).mean() == pytest.approx(baselines["constant"], rel=0.03)
    assert np.square(targets - second - 0.5).mean() == pytest.approx(baselines["one number"], rel=0.03)


# The random numbers


def same(mine: Any, theirs: Any) -> None:
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@all_data
def test_a_sequence_depends_on_seed_split_and_index_alone(make):
    first = make().splits()
    forward = [[split[i] for i in range(len(split))] for split in first]
    np.random.seed(5)
    torch.manual_seed(5)
    second = pickle.loads(pickle.dumps(make(train=70, val=50, test=60))).splits()
    for split, expected in reversed(list(zip(second, forward, strict=True))):
        for i in reversed(range(len(expected))):
            same(split[i], expected[i])
        order = [3, 0, 3, 4]
        for one, i in zip(split.__getitems__(order), order, strict=True):
            same(one, expected[i])


@all_data
def test_loader_processes_change_nothing(make):
    data = make()
    task = task_of(data)
    batches = [[6, 0], [3, 2, 1]]
    loader = DataLoader(data.splits().train, batch_sampler=batches, collate_fn=task.collate, num_workers=2)
    for batch, indices in zip(loader, batches, strict=True):
        expected = task.collate([data.splits().train[i] for i in indices])
        assert torch.equal(batch.inputs, expected.inputs)
        assert torch.equal(batch.targets, expected.targets)


def test_no_two_streams_have_a_number_in_common():
    numbers = [
        uniforms(seed, split, range(first, first + 20), 37)
        for seed in (0, 1, 2**64, 2**128 - 1)
        for split in range(3)
        for first in (0, 2**32)
    ]
    assert len(np.unique(numbers)) == np.size(numbers) == 4 * 3 * 2 * 20 * 37


def test_streams_are_uniform_and_unrelated_to_their_neighbours():
    numbers = uniforms(0, 0, range(2000), 50)
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    for one, other in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers, uniforms(1, 0, range(2000), 50)),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.015


@all_data
def test_splits_and_seeds_share_no_sequence(make):
    many_tokens = {"vocab_size": 1000} if isinstance(make, Kind) else {}
    data = [make(seq_len=80, train=50, val=40, test=30, seed=seed, **many_tokens) for seed in (0, 1, 2**100)]
    made = [
        inputs.tobytes() for one in data for split in one.splits() for inputs, _ in map(split.__getitem__, range(30))
    ]
    assert len(set(made)) == len(made) == 3 * 3 * 30


def test_the_generator_is_the_one_of_this_version():
    """Committed numbers: if these change, so must `VERSION`."""
    assert uniforms(3, 1, [5], 2)[0] == pytest.approx(NUMBERS, rel=1e-15)
    for kind in KINDS:
        assert kind(seq_len=12).splits().val[2][0].tolist() == TOKENS[kind.name]
    inputs, _ = adding().splits().train[0]
    assert inputs[0, 0] == pytest.approx(0.011546754, rel=1e-6)
    assert np.flatnonzero(inputs[:, 1]).tolist() == [8, 14]
    assert synthetic.VERSION == 1


@pytest.mark.parametrize("index", [-1, 7])
@all_data
def test_indices_beyond_the_split_are_refused(make, index):
    with pytest.raises(IndexError, match=f"{index} is not in 0…6"):
        make().splits().train[index]


# The options


@kinds
def test_the_least_length_is_allowed_and_one_less_is_not(kind):
    assert len(kind(seq_len=kind.least).splits().train[0][0]) == kind.least
    with pytest.raises(OptionError, match=f"^seq_len={kind.least - 1}: must be at least {kind.least}[,:]"):
        kind(seq_len=kind.least - 1)


@kinds
def test_the_least_vocabulary_is_allowed_and_one_less_is_not(kind):
    least = LEAST_VOCABULARY[kind.name]
    assert len(kind(vocab_size=least).answers) >= 2
    with pytest.raises(OptionError, match=f"^vocab_size={least - 1}: must be at least {least}[,:]"):
        kind(vocab_size=least - 1)


def test_adding_needs_two_numbers():
    with pytest.raises(OptionError, match=r"^seq_len=1: must be at least 2:"):
        adding(seq_len=1)


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("val", 0), ("test", -1), ("seed", -1), ("seed", 2**128)])
@all_data
def test_bad_sizes_and_seeds_are_named(make, name, value):
    with pytest.raises(OptionError, match=f"^{name}={value}: must be at least"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (COPYING, "num_symbols", 0),
        (SELECTIVE, "num_symbols", 0),
        (MQAR, "num_kv_pairs", 0),
        *((MQAR, "power_a", value) for value in (0.0, -0.5, 1.1, float("nan"))),
    ],
    ids=str,
)
def test_bad_options_are_named(kind, name, value):
    with pytest.raises(OptionError, match=f"^{name}={value}: must be"):
        kind(**{name: value})


@all_data
def test_task_and_data_must_agree_on_the_length(make):
    task = task_of(make())
    pool = {"pool": "last"} if make is adding else {}
    with pytest.raises(OptionError, match=r"^seq_len=25: must be the data's, 24$"):
        type(task)(seq_len=25, causal=True, data=task.data, **pool)


def test_fingerprints_cover_every_option_the_kind_and_the_version(monkeypatch):
    made: list[SyntheticData] = [COPYING(), SELECTIVE(), INDUCTION(), ASSOCIATIVE(), MQAR(), adding()]
    fingerprints = [task_of(data).fingerprint() for data in made]
    assert fingerprints == [task_of(data).fingerprint() for data in made]
    for data in list(made):
        for name, value in asdict(data).items():
            other = {"power_a": 0.5, "random_fillers": True}.get(name, value + 1)
            fingerprints.append(task_of(type(data)(**asdict(data) | {name: other})).fingerprint())
    monkeypatch.setattr(synthetic, "VERSION", 0)
    fingerprints += [task_of(data).fingerprint() for data in made]
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize(("name", "data"), [*((str(kind), kind.data) for kind in KINDS), ("adding", AddingData)])
def test_configuration_is_the_defaults_with_every_key_explained(name, data):
    path = CONF / "task" / f"{name}.yaml"
    config = OmegaConf.load(path)
    task = build(OmegaConf.create({"task": config})).task
    assert type(task) is (Adding if data is AddingData else Recall)
    assert type(task.data) is data
    assert task.causal is True
    assert task.data == data(seq_len=config.seq_len)
    assert set(config.data) == {"_target_", *asdict(task.data)}
    keys = [line for line in path.read_text().splitlines() if ":" in line and "_target_" not in line]
    assert all("  # " in line for line in keys[1:] if line != "data:")


# The tasks


def whole_test(task: Task) -> Batch:
    return task.collate(list(map(task.datasets().test.__getitem__, range(len(task.datasets().test)))))


@kinds
def test_encoder_and_head_lead_from_inputs_to_answers(kind):
    task = task_of(kind())
    task.prepare()
    batch = whole_test(task)
    assert batch.mask is None
    assert task.datasets().test.lengths is None
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    prediction = task.head(8)(task.encoder(8)(batch.inputs), batch.mask)
    assert prediction.shape == (6, 24, kind().vocab_size)
    prediction, target = task.scored(prediction, batch)
    answers = int((batch.targets[0] != IGNORE).sum())
    assert prediction.shape == (6, kind().vocab_size, answers)
    assert target.shape == (6, answers)
    task.loss(prediction, target).backward()


@kinds
def test_only_the_answers_are_scored_each_with_its_own_prediction(kind):
    data = kind()
    task = task_of(data)
    batch = whole_test(task)
    prediction = torch.randn(6, 24, data.vocab_size)
    asked = batch.targets != IGNORE
    prediction[~asked] = torch.nan
    literal = [(prediction[b, t], int(batch.targets[b, t])) for b, t in asked.nonzero().tolist()]
    scored, target = task.scored(prediction, batch)
    assert [int(y) for y in target.flatten()] == [y for _, y in literal]
    expected = sum(float(-p.log_softmax(0)[y]) for p, y in literal) / len(literal)
    assert task.loss(scored, target).item() == pytest.approx(expected, rel=1e-5)
    right = torch.tensor([bool(p.argmax() == y) for p, y in literal]).view(6, -1)
    shares = (right.float().mean().item(), right.all(1).float().mean().item())
    assert accuracies(task, scored, target) == pytest.approx(shares)


@kinds
def test_scoring_does_not_wait_for_a_device(kind):
    """Shapes do not depend on values, so it works on a device without values."""
    task = task_of(kind())
    batch = whole_test(task)
    prediction = torch.empty(6, 24, task.data.vocab_size, device="meta")
    scored, target = task.scored(prediction, Batch(batch.inputs, batch.targets.to("meta"), None))
    answers = task.data.num_answers
    assert (scored.shape, target.shape) == ((6, task.data.vocab_size, answers), (6, answers))


def accuracies(task: Task, scored: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Of tokens and of sequences, from batches of two sizes."""
    metrics = task.metrics()
    for part in (slice(0, 4), slice(4, None)):
        for metric in metrics.values():
            metric.update(scored[part], target[part])
    assert metrics.keys() == {"accuracy", "sequence_accuracy"}
    assert task.monitor == "accuracy"
    assert task.mode == "max"
    return float(metrics["accuracy"].compute()), float(metrics["sequence_accuracy"].compute())


@kinds
def test_a_solution_gets_everything_right(kind):
    task = task_of(kind())
    batch = whole_test(task)
    solved = [[kind.oracle(task.data, row[: t + 1]) for t in range(24)] for row in batch.inputs.tolist()]
    prediction = torch.nn.functional.one_hot(torch.tensor(solved).clamp_min(0), task.data.vocab_size).float()
    assert accuracies(task, *task.scored(prediction, batch)) == (1.0, 1.0)


def test_one_wrong_answer_costs_its_sequence():
    task = task_of(COPYING())
    batch = whole_test(task)
    prediction = torch.nn.functional.one_hot(batch.targets.clamp_min(0), 6).float()
    prediction[2, -1] = 0.0  # its argmax, 0, is not a symbol
    assert accuracies(task, *task.scored(prediction, batch)) == pytest.approx((23 / 24, 5 / 6))


def test_adding_leads_from_numbers_and_marks_to_a_sum():
    task = task_of(adding())
    task.prepare()
    batch = whole_test(task)
    assert batch.mask is None
    assert batch.inputs.shape == (6, 24, 2)
    assert batch.inputs.dtype == batch.targets.dtype == torch.float32
    prediction, target = task.scored(task.head(8)(task.encoder(8)(batch.inputs), batch.mask), batch)
    assert prediction.shape == target.shape == (6,)
    assert torch.equal(target, batch.targets)
    loss = task.loss(prediction, target)
    loss.backward()
    error = np.square(prediction.detach().numpy().astype(float) - target.numpy()).mean()
    assert loss.item() == pytest.approx(error, rel=1e-6)
    metric = task.metrics()[task.monitor]
    for part in (slice(0, 4), slice(4, None)):
        metric.update(prediction.detach()[part], target[part])
    assert metric.compute().item() == pytest.approx(error, rel=1e-6)
    assert task.mode == "min"


def test_adding_is_read_where_asked():
    data = adding()
    features = torch.randn(3, 24, 8)
    for pool, pooled in (("last", features[:, -1]), ("mean", features.mean(1)), ("first", features[:, 0])):
        head = Adding(seq_len=24, causal=True, pool=pool, data=data).head(8)
        torch.testing.assert_close(head(features, None), head.linear(pooled))


@pytest.mark.slow
@pytest.mark.e2e
def test_an_lstm_learns_to_copy(tmp_path: Path):
    sizes = ("task.seq_len=9", "task.data.num_symbols=3", "task.data.vocab_size=5", "task.data.train=10000")
    few = ("task.data.val=200", "task.data.test=200", "model.d_model=32", "model.depth=1", "optimizer.lr=2e-2")
    budget = ("trainer.max_epochs=null", "trainer.max_steps=300", "trainer.val_check_interval=150")
    done = runs.train(
        tmp_path, "task=copying", "model=lstm", "trainer=cpu", "logger=csv", *sizes, *few, *budget, "name=run"
    )
    assert done.code == 0, done.err
    summary = runs.run_of(tmp_path, "copying", "lstm", "run").read_summary()
    assert summary["baselines"]["chance"] == pytest.approx(1 / 3)
    assert summary["test"]["accuracy"] > 0.9
    assert summary["test"]["sequence_accuracy"] <= summary["test"]["accuracy"]
