"""Examples on the device: their batches are those of a loader, and nothing waits for them."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stu.cli.composition import build
from stu.cli.usage import options_of
from stu.errors import OptionError
from stu.task import Batch
from stu.training import SequenceData, StepPlan
from stu.training.data import SHARE
from stu.training.resident import Resident
from tests import runs, sources
from tests.host_waits import DEVICE, NoHostWaits
from tests.models import composed, kinds_of_tasks
from tests.training.test_training import Steps, model

CPU = torch.device("cpu")
PLAN = StepPlan.make(
    examples=40, batch_size=8, max_epochs=2, max_steps=-1, val_check_interval=1.0, accumulate_grad_batches=2
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data of all tests lie."""
    return tmp_path_factory.mktemp("data")


def small_task(name: str, data: Path) -> Any:
    task = build(composed(*runs.small(f"task={name}", *sources.overrides(name, data), f"paths.data={data}")).task)
    task.prepare()
    return task


def data_of(task: Any, *, device: str = "cpu", rank: int = 0, world_size: int = 1, **options: Any) -> SequenceData:
    """As a trainer on some device would have it."""
    found = SequenceData(task, task.datasets(), options.pop("plan", PLAN), seed=3, batch_size=8, **options)
    strategy = SimpleNamespace(root_device=torch.device(device))
    found.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)  # type: ignore[assignment]
    return found


def assert_same(found: Batch, expected: Batch) -> None:
    assert type(found) is Batch
    for x, y in zip(found, expected, strict=True):
        if isinstance(y, Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
            assert x.is_contiguous() == y.is_contiguous()  # whose products may be rounded in other ways
        else:
            assert x == y


@pytest.mark.parametrize(
    "name", [n if n in kinds_of_tasks() else pytest.param(n, marks=pytest.mark.thorough) for n in options_of("task")]
)
def test_batches_are_those_of_a_loader(name: str, data: Path):
    task = small_task(name, data)
    pairs = 0
    for start, rank, world_size in ((0, 0, 1), (11, 0, 1), (3, 1, 2)):
        options = {"rank": rank, "world_size": world_size, "bucket": 2}
        resident, ordinary = (data_of(task, device_resident=kept, **options) for kept in (True, False))
        for kind in ("train", "val", "test"):
            loaders = [getattr(each, f"{kind}_dataloader")() for each in (resident, ordinary)]
            assert isinstance(loaders[0].dataset, Resident) == (kind != "test")
            if kind == "train":
                for loader in loaders:
                    loader.load_state_dict({"batches": start})
            for found, expected in zip(*loaders, strict=True):
                assert_same(found, expected)
                pairs += 1
            assert kind != "train" or loaders[0].state_dict() == loaders[1].state_dict() == {"batches": 20}
    assert pairs == 20 + 2 * 2 + 9 + 2 * 2 + 17 + 2 * 2


def test_tokens_are_kept_in_one_byte_and_padded_to_the_longest(data: Path):
    task = small_task("lra_listops", data)
    train = task.datasets().train
    resident = Resident(task, train, CPU, share=1.0)
    assert resident.inputs.data.dtype == resident.targets.data.dtype == torch.uint8
    assert resident.inputs.data.shape == (1, 40, train.lengths.max())
    batch = resident.__getitems__([int(train.lengths.argmin()), 3])
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.num_real == int(train.lengths[[train.lengths.argmin(), 3]].sum())


def test_a_split_whose_first_examples_have_smaller_integers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stu.training.resident.AT_ONCE", 3)
    task = Integers()
    resident = Resident(task, task.splits.train, CPU, share=1.0)
    assert resident.inputs.data.dtype == torch.int32
    some = [17, 0, 9]
    assert_same(resident.__getitems__(some), task.collate([task.splits.train[i] for i in some]))


class Integers(Steps):
    """Integers that grow from one example to the next."""

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        batch = super().collate(examples)
        size = torch.tensor([len(inputs) ** 5 for inputs, _ in examples])
        return batch._replace(inputs=(batch.inputs[..., 0] != 0) * size[:, None] * 7 - 3 * size[:, None] ** 0)


def test_making_batches_never_waits():
    task = Steps()
    source = data_of(task, device_resident=True, plan=StepPlan(8, 2, 5, 1))
    loader = source.train_dataloader()
    resident: Any = loader.dataset
    resident.device = DEVICE
    resident.lengths_there = resident.lengths_there.to(DEVICE)
    for column in (resident.inputs, resident.targets):
        column.data = column.data.to(DEVICE)
    with NoHostWaits():
        batches = list(loader)
    assert len(batches) == 8
    assert {x.device for batch in batches for x in batch if isinstance(x, Tensor)} == {DEVICE}
    assert all(batch.num_real is not None for batch in batches if batch.mask is not None)


def test_a_run_is_the_same_to_the_last_bit(tmp_path: Path):
    trained = []
    for kept in (False, True):
        training = runs.Training(tmp_path / str(kept), Steps(), model(dropout=0.1), device_resident=kept).fit()
        trained.append((training.rows("train/loss"), training.rows("val/mse"), training.module.state_dict()))
    runs.assert_identical(trained[1], trained[0])


# --- where they cannot be kept, or need not ---


class Standardised(Steps):
    """Inputs relative to those of the batch."""

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        batch = super().collate(examples)
        return batch._replace(inputs=batch.inputs - batch.inputs.mean())


def test_a_batch_that_is_more_than_its_examples_is_refused():
    with pytest.raises(OptionError, match="device_resident=True: must be false: a batch of this task is more than"):
        data_of(Standardised(), device_resident=True).train_dataloader()


def test_a_split_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    task = Steps()
    bytes_taken = 18 * 12 * (2 + 1) * 4  # 18 sequences of 12 steps at most, inputs and targets
    assert task.splits.train.lengths.max() == 12
    for free, fits in ((bytes_taken, True), (bytes_taken - 1, False)):
        monkeypatch.setattr("stu.training.resident.free_memory", lambda device, free=free: free)
        if fits:
            assert len(Resident(task, task.splits.train, CPU, share=1.0)) == 18
        with pytest.raises(OptionError, match="must be false: 18 examples take"):
            Resident(task, task.splits.train, CPU, share=SHARE if fits else 1.0)


@pytest.mark.parametrize(
    ("device", "steps", "kept"), [("cuda", 5, True), ("cuda", 4, False), ("cpu", 5, False), ("mps", 5, False)]
)
def test_auto_keeps_what_a_gpu_has_room_for_and_the_run_reads(
    device: str, steps: int, kept: bool, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def made(task: Any, examples: Any, device: torch.device, *, share: float) -> Any:
        asked.append(share)
        return examples

    task, plan = Steps(), StepPlan(steps, 5, 5, 1)
    monkeypatch.setattr("stu.training.data.Resident", made)
    sources = [data_of(task, device=device, plan=plan).train_dataloader().collate_fn for _ in range(2)]
    assert asked == ([SHARE] * 2 if kept else [])
    assert all((source != task.collate) == kept for source in sources)

    def refused(*arguments: Any, share: float) -> Any:
        raise OptionError("device_resident", True, "must be false: no room")

    monkeypatch.setattr("stu.training.data.Resident", refused)
    assert data_of(task, device=device, plan=plan).train_dataloader().collate_fn == task.collate
    with pytest.raises(OptionError, match="no room"):
        data_of(task, device=device, plan=plan, device_resident=True).train_dataloader()


def test_a_split_is_moved_once():
    source = data_of(Steps(), device_resident=True, plan=StepPlan(5, 2, 5, 1))
    first, again = source.val_dataloader(), source.val_dataloader()
    assert first.dataset is again.dataset


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False), ("mps", False)])
def test_memory_is_pinned_where_the_run_is_on_a_gpu(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    source = data_of(Steps(), device=device, device_resident=False, plan=StepPlan(5, 2, 5, 1))
    assert {getattr(source, f"{kind}_dataloader")().pin_memory for kind in ("train", "val", "test")} == {pinned}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_processes_live_on(num_workers: int):
    source = data_of(Steps(), num_workers=num_workers, plan=StepPlan(5, 2, 5, 1))
    loader = source.val_dataloader()
    assert loader.persistent_workers == (num_workers > 0)
    first, second = ([batch.targets for batch in islice(loader, 2)] for _ in range(2))
    runs.assert_identical(first, second)
