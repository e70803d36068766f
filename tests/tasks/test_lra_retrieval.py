"""Retrieval: the pairs, the files they come from, two sequences in one batch, and the head that compares them."""

import inspect
import os
import pickle
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from data.lra import retrieval as lra_retrieval
from data.lra.retrieval import FILES, PUBLISHED, PairExamples, Retrieval, RetrievalData
from data.store.tokens import ROWS
from stu import SequenceModel
from stu.errors import OptionError
from stu.heads import TwoTowerHead
from stu.training import SequenceData, StepPlan
from tests import runs, sources
from tests.models import randomized, small_backbone

ROOT = Path(__file__).parents[2]
SIZES = {"train": 40, "val": 10, "test": 10}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.aan(tmp_path_factory.mktemp("aan"))


def make_data(folder, source, **options):
    given = {**SIZES, "seq_len": 64, "dir": str(folder), "source": None if source is None else str(source)}
    return RetrievalData(**{**given, **options})


def make_task(data, **options):
    return Retrieval(
        **{"seq_len": data.seq_len, "causal": False, "vocab_size": 257, "pool": "mean", "data": data, **options}
    )


def stored(data):
    """split → [(tokens, tokens, label), …], as lists."""
    return {split: [(x.tolist(), y.tolist(), z) for (x, y), z in data.examples(split)] for split in SIZES}


def expected(rows, seed, longest=64):
    """What the lines of `sources.pairs` mean."""
    tokens = [[[b + 1 for b in text.encode()][:longest] for text in line[3:]] for line in sources.pairs(rows, seed)]
    return [(first, second, row % 2) for row, (first, second) in enumerate(tokens)]


# Pairs


@pytest.mark.parametrize("seq_len", [1, 64, 4000])
def test_lines_become_pairs(seq_len, source, tmp_path):
    found = stored(make_data(tmp_path, source, seq_len=seq_len))
    for seed, (split, rows) in enumerate(SIZES.items()):
        assert found[split] == expected(rows, seed, seq_len)


def test_a_text_is_stored_once(source, tmp_path):
    data = make_data(tmp_path, source)
    texts = {str(x) for pairs in stored(data).values() for pair in pairs for x in pair[:2]}
    documents = datasets.Dataset.from_file(str(data.prepare() / "documents.arrow"))
    assert Counter(map(str, documents["tokens"])) == dict.fromkeys(texts, 1)
    assert len(documents) <= 3 * 12


def test_many_texts_fill_several_batches(tmp_path):
    rows = ROWS // 2 + 9
    lines = [f"{row % 2}\tA\tB\tb'first {row}'\tb'second {row}'\r\n" for row in range(rows)]
    sources.aan(tmp_path / "in")
    (tmp_path / "in" / FILES["train"]).write_text("".join(lines))
    examples = make_data(tmp_path, tmp_path / "in", train=rows).examples("train")
    assert isinstance(examples, PairExamples)
    for index in (0, ROWS // 2 - 1, ROWS // 2, rows - 1, -1):
        row = range(rows)[index]
        pair, label = examples[index]
        assert [bytes(text - 1).decode() for text in pair] == [f"b'first {row}'", f"b'second {row}'"]
        assert label == row % 2
        assert examples.lengths[index] == len(f"b'second {row}'")
    for index in (rows, -rows - 1):
        with pytest.raises(IndexError):
            examples[index]
    message = pickle.dumps(examples)
    assert len(message) < 1000
    assert pickle.loads(message)[7][0][1].tolist() == examples[7][0][1].tolist()


def test_lengths_are_those_of_the_longer_text(source, tmp_path):
    examples = make_data(tmp_path, source, seq_len=200).examples("train")
    assert examples.lengths.tolist() == [max(len(x), len(y)) for (x, y), _ in examples]
    assert len(set(examples.lengths.tolist())) > 3


def test_every_way_to_write_a_label(tmp_path):
    sources.aan(tmp_path / "in")
    labels = ["0", "1", "0.0", "1.0"]
    lines = "".join(f"{label}\tA\tB\tb'x'\tb\"y\"\n" for label in labels)
    (tmp_path / "in" / FILES["test"]).write_text(lines)
    assert make_data(tmp_path, tmp_path / "in", test=4).examples("test").labels.tolist() == [0, 1, 0, 1]


def test_fewer_pairs_are_the_first(source, tmp_path):
    found = stored(make_data(tmp_path, source, train=7, val=3, test=1))
    assert found == {"train": expected(40, 0)[:7], "val": expected(10, 1)[:3], "test": expected(10, 2)[:1]}


def test_quotes_mean_nothing(tmp_path):
    sources.aan(tmp_path / "in")
    (tmp_path / "in" / FILES["test"]).write_text('1.0\t"A\tB\tb\'say "x\'\t"b\'""y""\'"\n')
    [(first, second, _)] = stored(make_data(tmp_path, tmp_path / "in", test=1))["test"]
    assert bytes(b - 1 for b in first) == b"b'say \"x'"
    assert bytes(b - 1 for b in second) == b'"b\'""y""\'"'


# Where they come from


@pytest.mark.parametrize("below", ["", "tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data"])
def test_the_files_are_found_in_the_release(below, source, tmp_path):
    sources.aan(tmp_path / "release" / below)
    data = make_data(tmp_path, tmp_path / "release")
    assert stored(data) == stored(make_data(tmp_path, source))
    assert make_task(data).fingerprint() == make_task(make_data(tmp_path, source)).fingerprint()


@pytest.mark.parametrize("missing", [[], ["val"], ["train", "test"], ["train", "val", "test"]])
def test_missing_files_are_named(missing, tmp_path):
    sources.aan(tmp_path / "in")
    for split in missing:
        (tmp_path / "in" / FILES[split]).unlink()
    if not missing:
        make_data(tmp_path, tmp_path / "in").prepare()
        return
    names = ", ".join(FILES[split] for split in missing)
    with pytest.raises(OptionError, match=rf"source={tmp_path}/in: .*lra_release\.gz when unpacked; missing: {names}$"):
        make_data(tmp_path, tmp_path / "in").prepare()


def test_no_folder_at_all(tmp_path):
    names = ", ".join(FILES.values())
    for source in (None, tmp_path / "nowhere"):
        with pytest.raises(OptionError, match=rf"source={source}: must be a folder with the official files, {names}, "):
            make_data(tmp_path, source).prepare()


def test_a_file_that_is_there_twice_is_named(tmp_path):
    sources.aan(tmp_path / "in/tsv_data")
    expected = stored(make_data(tmp_path, tmp_path / "in"))
    sources.aan(tmp_path / "in/.Trash")
    (tmp_path / "in/tsv_data" / f"._{FILES['val']}").write_bytes(b"hidden")
    assert stored(make_data(tmp_path, tmp_path / "in")) == expected
    sources.aan(tmp_path / "in/copy")
    with pytest.raises(OptionError, match=rf"must have each file once; has .*/copy/{FILES['train']} and .*/tsv_data/"):
        make_data(tmp_path, tmp_path / "in").prepare()


def test_what_test_repeats_of_train_is_said(tmp_path, capfd):
    sources.aan(tmp_path / "in")
    train, test = (tmp_path / "in" / FILES[split] for split in ("train", "test"))
    test.write_text("".join([*train.read_text().splitlines(True)[:3], *test.read_text().splitlines(True)[3:]]))
    make_data(tmp_path, tmp_path / "in", seq_len=4000).prepare()
    assert "note: 3 of 10 examples of test are in train, too" in capfd.readouterr().err


GOOD = b"0.0\tA\tB\tb'x'\tb'y'\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (GOOD + b"0.0\tA\tB\tb'x'\n", "line 2: 4 columns, must be 5"),
        (GOOD + b"\n", "line 2: 1 columns, must be 5"),
        (b"0.0\tA\tB\tb'x'\tb'y'\tz\n", "line 1: 6 columns, must be 5"),
        (b"label\tid1\tid2\ttext1\ttext2\n" + GOOD, "line 1: label 'label', must be 0.0 or 1.0"),
        (GOOD + b"2.0\tA\tB\tb'x'\tb'y'\n", "line 2: label '2.0', must be 0.0 or 1.0"),
        (b"\tA\tB\tb'x'\tb'y'\n", "line 1: label '', must be 0.0 or 1.0"),
        (b"0.0\tA\tB\t\tb'y'\n", "line 1: a text is empty"),
        (b"0.0\tA\tB\tb'x'\t\n", "line 1: a text is empty"),
        (b"0.0\tA\tB\tb'x'\tb'\xff'\n", "line 1: a text is not in UTF-8"),
        (GOOD + b"1.0\tA\tB\tb'x'\tb'y", "line 2: the file ends within the text"),
        (GOOD + b"1.0\tA\tB", "line 2: 3 columns, must be 5"),
    ],
    ids=range(11),
)
def test_wrong_lines_are_named(content, problem, tmp_path):
    sources.aan(tmp_path / "in")
    (tmp_path / "in" / FILES["val"]).write_bytes(content)
    with pytest.raises(OptionError, match=rf"source=.*new_aan_pairs\.eval\.tsv: {problem}"):
        make_data(tmp_path, tmp_path / "in").prepare()
    assert not list((tmp_path / "lra_retrieval").glob("*/"))


@pytest.mark.parametrize("split", SIZES)
def test_too_few_lines_are_named(split, source, tmp_path):
    size = SIZES[split] + 1
    with pytest.raises(OptionError, match=rf"{split}={size}: .*{FILES[split]} has only {size - 1} lines"):
        make_data(tmp_path, source, **{split: size}).prepare()


def test_more_lines_than_were_published_are_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "val", 9)
    with pytest.raises(OptionError, match=r"new_aan_pairs\.eval\.tsv: must have 9 lines, has more"):
        make_data(tmp_path, source, val=9).prepare()
    make_data(tmp_path, source, val=8).prepare()


def test_an_unreadable_file_is_named(tmp_path):
    sources.aan(tmp_path / "in")
    path = tmp_path / "in" / FILES["val"]
    path.unlink()
    path.mkdir()
    with pytest.raises(OptionError, match=rf"source=.*{path.name}: cannot be read: "):
        make_data(tmp_path, tmp_path / "in").prepare()


# The fingerprint


@pytest.mark.parametrize("option", ["seq_len", "train", "val", "test"])
def test_every_option_has_a_fingerprint(option, source, tmp_path):
    data = make_data(tmp_path, source)
    changed = make_data(tmp_path, source, **{option: getattr(data, option) - 1})
    assert make_task(data).fingerprint() != make_task(changed).fingerprint()
    assert make_task(data).fingerprint() == make_task(make_data(tmp_path / "elsewhere", source)).fingerprint()


def test_contents_are_read_once_for_the_fingerprint(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(lra_retrieval, "sha256", lambda path: read.append(path.name) or f"digest {len(read)}")
    sources.aan(tmp_path / "in")
    first = make_task(make_data(tmp_path, tmp_path / "in")).fingerprint()
    assert read == list(FILES.values())
    assert make_task(make_data(tmp_path, tmp_path / "in")).fingerprint() == first
    assert len(read) == 3
    os.utime(tmp_path / "in" / FILES["val"], (1, 1))
    assert make_task(make_data(tmp_path, tmp_path / "in")).fingerprint() != first
    assert read[3:] == [FILES["val"]]


def test_other_contents_and_the_version_have_another_fingerprint(tmp_path, monkeypatch):
    sources.aan(tmp_path / "in")
    first = make_task(make_data(tmp_path, tmp_path / "in")).fingerprint()
    with (tmp_path / "in" / FILES["test"]).open("a") as file:
        file.write("0.0\tA\tB\tb'x'\tb'y'\n")
    second = make_task(make_data(tmp_path, tmp_path / "in")).fingerprint()
    monkeypatch.setattr(lra_retrieval, "VERSION", 0)
    assert len({first, second, make_task(make_data(tmp_path, tmp_path / "in")).fingerprint()}) == 3


def test_a_folder_that_cannot_be_written_to_is_named(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=f"dir={tmp_path}/file: must be a folder"):
        make_data(tmp_path / "file", source).prepare()


# Two sequences, one example


def test_a_batch_has_all_first_texts_before_the_second_ones(source, tmp_path):
    task = make_task(make_data(tmp_path, source, seq_len=200))
    examples = [task.datasets().train[i] for i in range(5)]
    batch = task.collate(examples)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == (10, max(len(x) for pair, _ in examples for x in pair))
    assert batch.targets.tolist() == [label for _, label in examples]
    for row, text in enumerate([pair[side] for side in (0, 1) for pair, _ in examples]):
        assert batch.inputs[row, batch.mask[row]].tolist() == text.tolist()
        assert batch.mask[row].tolist() == [True] * len(text) + [False] * (batch.inputs.shape[1] - len(text))
    assert not batch.inputs[~batch.mask].any(), "padding is token 0"


def test_the_labels_of_a_bucket_are_those_of_its_pairs(source, tmp_path):
    """Longest first, as evaluations are: targets go with their texts."""
    task = make_task(make_data(tmp_path, source, seq_len=200))
    examples = task.datasets().val
    order = np.argsort(-examples.lengths, kind="stable")
    batch = task.collate([examples[i] for i in order])
    assert batch.targets.tolist() == examples.labels[order].tolist()
    assert batch.mask[:10].sum(1).tolist() == [len(examples[i][0][0]) for i in order]


def test_a_batch_is_counted_in_pairs(source, tmp_path):
    task = make_task(make_data(tmp_path, source))
    task.prepare()
    plan = StepPlan.make(
        examples=40, batch_size=4, max_epochs=1, max_steps=-1, val_check_interval=1.0, accumulate_grad_batches=1
    )
    data = SequenceData(task, task.datasets(), plan, seed=0, batch_size=4, bucket=2)
    train = list(data.train_dataloader())
    assert [len(batch.targets) for batch in train] == [4] * 10
    assert {len(batch.inputs) for batch in train} == {8}
    assert sorted(len(batch.targets) for batch in data.val_dataloader()) == [2, 4, 4]
    assert sorted(chain.from_iterable(batch.targets.tolist() for batch in data.test_dataloader())) == [0] * 5 + [1] * 5


@pytest.mark.parametrize("model", ["stu", "transformer"])
@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_padding_and_company_never_change_an_answer(model, pool, source, tmp_path):
    """Alone, among others, or padded further: the same pair, the same answer."""
    task = make_task(make_data(tmp_path, source, seq_len=200), pool=pool)
    network = SequenceModel(task.encoder(8), small_backbone(model, seq_len=256, causal=False), task.head(8)).eval()
    examples = [task.datasets().train[i] for i in range(4)]
    together = task.collate(examples)
    further = torch.nn.functional.pad(together.inputs, (0, 30), value=7)
    alone = [task.collate([example]) for example in examples]
    with torch.no_grad():
        answers = torch.cat([network(batch.inputs, batch.mask) for batch in alone])
        assert_close(network(together.inputs, together.mask), answers)
        assert_close(network(further, torch.nn.functional.pad(together.mask, (0, 30))), answers)


def reference(head, first, second):
    """The head's answer for pooled sequences, (B, D) each, row by row."""
    rows = []
    for x, y in zip(first, second, strict=True):
        features = torch.cat([x, y, x * y, x - y])
        hidden = head.hidden.weight @ features + head.hidden.bias
        rows.append(head.linear.weight @ (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) + head.linear.bias)
    return torch.stack(rows)


def test_the_head():
    head = randomized(TwoTowerHead(6, d_output=3)).double()
    x, mask = torch.randn(8, 5, 6).double(), torch.arange(5) < torch.tensor([5, 1, 2, 4, 3, 5, 5, 1])[:, None]
    means = torch.stack([row[real].mean(0) for row, real in zip(x, mask, strict=True)])
    assert_close(head(x, mask), reference(head, means[:4], means[4:]))
    assert_close(head(x), reference(head, x[:4].mean(1), x[4:].mean(1)))
    last = randomized(TwoTowerHead(6, d_output=3, pool="last")).double()
    assert_close(last(x), reference(last, x[:4, -1], x[4:, -1]))
    assert torch.autograd.gradcheck(lambda x: head(x, mask), x.requires_grad_())


def test_swapped_texts_swap_their_features():
    """[x₁, x₂, x₁ ∘ x₂, x₁ − x₂] becomes [x₂, x₁, x₁ ∘ x₂, x₂ − x₁]: what the weights, so permuted, undo."""
    head, other = randomized(TwoTowerHead(6, d_output=3)), TwoTowerHead(6, d_output=3)
    x, y = torch.randn(2, 4, 5, 6)
    first, second, product, difference = head.hidden.weight.data.split(6, dim=1)
    other.load_state_dict(
        {**head.state_dict(), "hidden.weight": torch.cat((second, first, product, -difference), dim=1)}
    )
    assert_close(other(torch.cat((y, x))), head(torch.cat((x, y))))
    assert not torch.allclose(head(torch.cat((y, x))), head(torch.cat((x, y))))


def test_a_head_without_a_partner():
    with pytest.raises(RuntimeError):
        TwoTowerHead(6, d_output=2)(torch.randn(3, 5, 6))
    with pytest.raises(OptionError, match="pool=max: must be mean, first or last"):
        TwoTowerHead(6, d_output=2, pool="max")


def test_one_tower_reads_both(source, tmp_path):
    """Whichever place a text has, its features are the same."""
    task = make_task(make_data(tmp_path, source))
    network = torch.nn.ModuleList([task.encoder(8), small_backbone("stu", seq_len=64, causal=False)]).eval()
    ((x, y), label) = task.datasets().train[0]
    batch = task.collate([((x, y), label), ((y, x), label)])
    with torch.no_grad():
        features = network[1](network[0](batch.inputs), batch.mask)
    assert_close(features[0], features[3])
    assert_close(features[1], features[2])


# The task


def test_baselines(tmp_path):
    sources.aan(tmp_path / "in")
    for split, labels in (("train", "0001"), ("test", "01111")):
        lines = "".join(f"{label}.0\tA\tB\tb'x'\tb'y'\n" for label in labels)
        (tmp_path / "in" / FILES[split]).write_text(lines)
    task = make_task(make_data(tmp_path, tmp_path / "in", train=4, test=5))
    assert task.baselines() == {"majority": 0.2}


def test_loss_and_metrics():
    task = make_task(make_data("unused", None))
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    assert_close(task.loss(logits, labels), -logits.log_softmax(1)[torch.arange(5), labels].mean())
    metric = task.metrics()["accuracy"]
    metric.update(torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 0]))
    assert metric.compute() == 0.75


def test_the_configuration_states_the_defaults():
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/task/lra_retrieval.yaml"), resolve=False)
    data = node["data"]
    assert set(node) == {"_target_", *inspect.signature(Retrieval).parameters}
    assert data.pop("_target_") == "data.lra.retrieval.RetrievalData"
    defaults = {name: p.default for name, p in inspect.signature(RetrievalData).parameters.items()}
    assert data == {**defaults, "dir": "${paths.data}", "seq_len": "${task.seq_len}"}
    assert (node["seq_len"], node["vocab_size"], node["pool"]) == (4000, 257, "mean")


@pytest.mark.parametrize(
    ("name", "value"), [("seq_len", 0), ("train", 0), ("val", 0), ("test", 0), ("train", 147_087), ("val", 18_091)]
)
def test_bad_data_options_are_named(name, value):
    with pytest.raises(OptionError, match=f"{name}={value}: must be"):
        make_data("unused", None, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("seq_len", 63), ("seq_len", 65), ("vocab_size", 256)])
def test_bad_task_options_are_named(name, value):
    with pytest.raises(OptionError, match=f"{name}={value}: must be"):
        make_task(make_data("unused", None), **{name: value})


# As a command


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run(tmp_path):
    run = partial(runs.small, "task=lra_retrieval", "model=stu", "name=run", "loader.bucket=2")
    done = runs.train(tmp_path, *run(*sources.overrides("lra_retrieval", tmp_path)))
    assert done.code == 0, done.err
    assert done.err == ""
    summary = runs.run_of(tmp_path, "lra_retrieval", "stu", "run").read_summary()
    assert summary["steps"] == 20, "a batch is four pairs"
    assert summary["baselines"] == {"majority": 0.5}


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_without_data(tmp_path):
    done = runs.train(tmp_path, *runs.small("task=lra_retrieval", "model=stu"))
    assert done.code == 2
    assert done.err.startswith("error: task.data.source=None: must be a folder with the official files")
    assert done.err.count("\n") == 1
