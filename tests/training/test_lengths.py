"""One checkpoint at several lengths: tasks of other lengths, and runs that are tested at them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.language.text import Language
from data.lra.listops import ListOps
from data.systems.forecast import Forecast
from data.systems.lds import LDS
from stu.cli.composition import build
from stu.cli.usage import options_of
from stu.errors import OptionError
from stu.preprocessing import Preprocessing, Tokens
from stu.task import Task
from stu.training import SequenceData, StepPlan, lengths, model_for, report
from tests import runs, sources
from tests.models import composed, factory

OF_ONE_LENGTH = {"cifar_color", "digits", "lra_image", "lra_pathfinder", "lra_pathx", "lra_pathx256", "own"}
TASKS = options_of("task")
SIZES = ("task.seq_len=16", "task.data.train=40", "task.data.val=10", "task.data.test=12")


def task_of(name: str, *overrides: str) -> Task:
    task: Task = build(composed(*runs.small(f"task={name}", *overrides)).task)
    return task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_another_length_has_its_other_options(name: str, tmp_path: Path):
    told = sources.overrides(name, tmp_path) if name in sources.COLUMNS else []
    task = task_of(name, f"paths.data={tmp_path}", "task.test_lengths=[7]", *told)
    assert task.test_lengths == (7,)
    assert "test_lengths" not in task.arguments
    if name in OF_ONE_LENGTH:
        with pytest.raises(OptionError, match=r"seq_len=32: the sequences of this task have a length of their own"):
            task.at_length(32)
        return
    longer = task.at_length(2 * task.seq_len)
    assert (type(longer), longer.seq_len, longer.test_lengths) == (type(task), 2 * task.seq_len, ())
    assert longer.data != task.data
    assert len(set(longer.metrics()) ^ set(task.metrics())) == 0
    changed = {"seq_len", "data"}
    assert {n: v for n, v in longer.arguments.items() if n not in changed} == {
        n: v for n, v in task.arguments.items() if n not in changed
    }
    assert longer.at_length(task.seq_len).seq_len == task.seq_len


def test_a_constructor_may_pass_its_options_on():
    class Weighted(LDS):  # type: ignore[misc]  # as a user might
        def __init__(self, *, weight: float, **options: Any) -> None:
            super().__init__(**options)
            self.weight = weight

    given = task_of("lds", *SIZES).arguments
    other = Weighted(weight=2.0, **given).at_length(8)
    assert (other.weight, other.seq_len, other.test_lengths) == (2.0, 8, ())


def test_the_unit_of_a_system_stays():
    """The outputs of a marginally stable system grow: divided by the RMS of longer ones, they would be smaller."""
    task = task_of("lds", *SIZES)
    assert isinstance(task, LDS)
    again = task.at_length(64).at_length(16)
    for split in ("val", "test"):
        inputs, targets = task.data.examples(split).stacked(range(3))
        others = again.data.examples(split)[0]
        assert np.array_equal(inputs[0], others[0])
        assert np.array_equal(targets[0], others[1])
    assert task.at_length(64).fingerprint() != task.fingerprint()


def test_forecasts_of_other_lengths_are_of_the_same_trajectories(tmp_path: Path):
    options = ("task.seq_len=8", "task.data.windows=4", "task.data.test=6", "task.data.train=8")
    task = task_of("lorenz63", f"paths.data={tmp_path}", *options)
    assert isinstance(task, Forecast)
    longer = task.at_length(16)
    assert isinstance(longer, Forecast)
    assert (longer.data.windows, longer.data.test) == (2, 4)  # both cut two trajectories
    assert longer.rollout.horizon == 9
    short, long = task.data.examples("test"), longer.data.examples("test")
    assert np.array_equal(np.concatenate([short[0][0], short[1][0]]), long[0][0])
    assert task.at_length(100).data.windows == 1  # of longer trajectories


@pytest.mark.parametrize("units", ["bytes", "words"])
def test_a_text_is_divided_at_the_same_places_at_another_length(tmp_path: Path, units: str):
    (tmp_path / "a.txt").write_text(" ".join(f"word{i % 7} {i}" for i in range(300)))
    options = (f"task.data.source={tmp_path}/a.txt", f"task.data.units={units}", "task.data.vocab_size=300")
    sizes = ("task.seq_len=8", "task.data.train=null", "task.data.val=3", "task.data.test=5")
    task = task_of("language", f"paths.data={tmp_path}", *options, *sizes)
    assert isinstance(task, Language)
    for length in (3, 16, 100):
        other = task.at_length(length)
        assert isinstance(other, Language)
        for split in ("train", "val", "test"):
            assert np.array_equal(other.data.examples(split).tokens(), task.data.examples(split).tokens())
        assert other.preprocessing.as_dict() == task.preprocessing.as_dict()


def test_tokens_that_depend_on_the_length_are_refused(monkeypatch: pytest.MonkeyPatch):
    task = task_of("copying", "task.test_lengths=[300]")
    longer = task.at_length(300)
    longer.preprocessing = Preprocessing(Tokens(5))
    monkeypatch.setattr(task, "at_length", lambda length: longer)
    data = SequenceData(task, task.datasets(), StepPlan(1, 1, 1, 1), seed=0, batch_size=4)
    with pytest.raises(OptionError, match="cannot have 300: tokens=others: they depend on the length"):
        lengths.at_lengths(data, model_for(task, factory("lru", seq_len=16)()), {"limit_test_batches": None}, 1)


def test_trees_of_another_length_have_their_share_of_tokens(tmp_path: Path):
    task = task_of("lra_listops", f"paths.data={tmp_path}")
    assert isinstance(task, ListOps)
    longer = task.at_length(120).data
    assert (longer.min_length, longer.max_length, longer.train, longer.test) == (20, 120, 1, task.data.test)
    with pytest.raises(OptionError, match="source=here: the trees of files have lengths of their own"):
        task_of("lra_listops", "task.data.source=here").at_length(120)


@pytest.mark.e2e
def test_a_run_is_tested_at_all_lengths_and_mode_test_at_any(tmp_path: Path):
    words = runs.small("task=selective_copying", "model=stu_t", "task.seq_len=32", "task.data.num_symbols=2")
    first = runs.train(tmp_path, *words, "task.test_lengths=[16,64]", "name=a", "figures.when=end")
    assert first.code == 0, first.err
    assert "at 64 steps" in first.out
    run = runs.run_of(tmp_path, "selective_copying", "stu_t", "a")
    tested = run.read_summary()["test"]
    assert {"accuracy", "accuracy@16", "accuracy@64", "loss@64", "sequence_accuracy@16"} <= tested.keys()
    assert "test/accuracy@64" in run.metrics.read_text()
    assert [file.stem.split("-step")[0] for file in sorted(run.figures.iterdir())] == ["filters", "lengths"]

    again = runs.train(tmp_path, *words, "task.test_lengths=[128]", "name=a")
    assert again.code == 0
    assert "was not tested at task.test_lengths=[128]" in again.err
    assert run.read_summary()["test"] == tested  # not done again

    shown = runs.train(tmp_path, *words, "mode=test", "task.test_lengths=[64,128]", "name=a")
    assert shown.code == 0, shown.err
    assert "was trained with other settings" not in shown.err
    line = next(line for line in shown.out.splitlines() if "at 64 steps" in line)
    assert f"accuracy {tested['accuracy@64']:.4g}, loss {tested['loss@64']:.4g}" in line
    assert "at 128 steps" in shown.out


@pytest.mark.e2e
def test_what_cannot_be_tested_is_refused_before_anything_is_trained(tmp_path: Path):
    words = runs.small("task=selective_copying", "model=transformer", "model.positions=learned", "task.seq_len=32")
    ended = runs.train(tmp_path, *words, "task.data.num_symbols=2", "task.test_lengths=[16,64]")
    assert ended.code == 2
    assert ended.err.strip().endswith(
        "task.test_lengths=[16, 64]: cannot have 64: positions=learned: there are none beyond 32 steps"
    )
    assert not list(tmp_path.rglob("config.yaml"))


def test_every_device_has_something_to_test_at_every_length():
    """Where one has no batch, Lightning would evaluate nothing, and the numbers of another length would stay."""
    task = task_of("lds", *SIZES, "task.test_lengths=[8]")
    data = SequenceData(task, task.datasets(), StepPlan(1, 1, 1, 1), seed=0, batch_size=4)
    model = model_for(task, factory("lru", seq_len=16)())
    assert list(lengths.at_lengths(data, model, {"limit_test_batches": 0.4}, 1)) == [8]
    task.test_lengths = (0,)
    with pytest.raises(OptionError, match=r"test_lengths=\[0\]: cannot have 0: seq_len=0: must be at least 1"):
        lengths.at_lengths(data, model, {"limit_test_batches": None}, 1)
    task.test_lengths = (8,)
    for limit, devices, line in (
        (0.3, 1, "trainer.limit_test_batches=0.3"),
        (None, 13, "devices=13: must be at most 12"),
    ):
        with pytest.raises(OptionError, match=rf"test_lengths=\[8\]: cannot have 8: {line}"):
            lengths.at_lengths(data, model, {"limit_test_batches": limit}, devices)


def test_metrics_may_be_called_as_if_they_were_of_a_length():
    values = {"recall@10": 0.5, "recall@10@64": 0.25, "recall@k": 0.125, "loss": 1.0, "loss@1024": 3.0, "loss@64": 2.0}
    assert list(report._tests(values)) == [
        ("test loss", "1"),
        ("test recall@10", "0.5"),
        ("test recall@k", "0.125"),
        ("  at 64 steps", "loss 2, recall@10 0.25"),
        ("  at 1,024 steps", "loss 3"),
    ]


def test_batches_of_longer_sequences_have_fewer():
    task = task_of("lds", *SIZES)
    data = SequenceData(task, task.datasets(), StepPlan(1, 1, 1, 1), seed=0, batch_size=8)
    assert [data.of(task.at_length(length)).batch_size for length in (4, 16, 32, 1000)] == [8, 8, 4, 1]
    batch = next(iter(data.of(task.at_length(32)).test_dataloader()))
    assert batch.inputs.shape == (4, 32, 3)
