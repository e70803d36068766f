"""How long a run is, and which examples make up its batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import Metric

from stu.errors import OptionError
from stu.task import Batch, Splits, Task
from stu.training import SequenceData, StepPlan
from stu.training.data import ResumableLoader, RunBatches, epoch_batches, evaluation_batches
from stu.training.plan import set_matmul_precision

RECIPE = {
    "examples": 100,
    "batch_size": 8,
    "max_epochs": 2,
    "max_steps": -1,
    "val_check_interval": 1.0,
    "accumulate_grad_batches": 1,
}


def plan(**changes: Any) -> StepPlan:
    """A plan for 100 examples in batches of 8: 12 steps per epoch."""
    return StepPlan.make(**RECIPE | changes)


class TestMatmulPrecision:
    """Products of float32 matrices."""

    @pytest.fixture(autouse=True)
    def _restored(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        yield
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_a_gpu_computes_as_it_is_told(self, precision: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        set_matmul_precision(precision, on_gpu=True)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision != "highest")

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_a_cpu_computes_in_float32(self, precision: str, monkeypatch: pytest.MonkeyPatch):
        a, b = torch.randn(2, 512, 512)
        torch.set_float32_matmul_precision("highest")
        expected = a @ b
        torch.set_float32_matmul_precision("medium")  # as an earlier run of the same process may have left it
        for on_gpu, gpu in ((False, True), (True, False)):  # trainer=cpu beside a GPU; trainer=auto without
            monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
            set_matmul_precision(precision, on_gpu=on_gpu)
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.equal(a @ b, expected)


class TestStepPlan:
    @pytest.mark.parametrize(
        ("changes", "total", "val_every"),
        [
            ({}, 24, 12),
            ({"max_epochs": 1.5}, 18, 12),
            ({"max_epochs": 0.01}, 1, 12),  # never nothing at all
            ({"max_steps": 5}, 5, 12),
            ({"max_steps": 30}, 24, 12),  # the shorter of both
            ({"max_epochs": None, "max_steps": 30}, 30, 12),
            ({"val_check_interval": 0.25}, 24, 3),
            ({"val_check_interval": 2.0}, 24, 24),
            ({"val_check_interval": 0.001}, 24, 1),
            ({"val_check_interval": 1}, 24, 1),  # an integer counts batches, as in Lightning
            ({"val_check_interval": 5}, 24, 5),
            ({"val_check_interval": 6, "accumulate_grad_batches": 4}, 24, 1),
            ({"val_check_interval": 8, "accumulate_grad_batches": 4}, 24, 2),
            ({"val_check_interval": 1.0, "accumulate_grad_batches": 4}, 24, 12),
            ({"batch_size": 100}, 2, 1),
        ],
    )
    def test_lightnings_arguments_in_steps(self, changes: dict[str, Any], total: int, val_every: int):
        made = plan(**changes)
        assert (made.total_steps, made.val_every) == (total, val_every)
        assert made.total_batches == total * changes.get("accumulate_grad_batches", 1)

    @pytest.mark.parametrize(
        ("changes", "option"),
        [
            ({"batch_size": 101}, "batch_size"),
            ({"batch_size": 0}, "batch_size"),
            ({"max_epochs": 0}, "max_epochs"),
            ({"max_epochs": -1}, "max_epochs"),
            ({"max_epochs": None}, "max_steps"),
            ({"max_steps": 0}, "max_steps"),
            ({"max_steps": -2}, "max_steps"),
            ({"val_check_interval": 0}, "val_check_interval"),
            ({"val_check_interval": -0.5}, "val_check_interval"),
            ({"accumulate_grad_batches": 0}, "accumulate_grad_batches"),
        ],
    )
    def test_what_makes_no_run_is_named(self, changes: dict[str, Any], option: str):
        with pytest.raises(OptionError) as error:
            plan(**changes)
        assert error.value.name == option

    @given(st.integers(1, 300), st.integers(1, 50))
    def test_validates_every_so_often_and_at_the_end(self, total: int, every: int):
        steps = [step for step in range(1, total + 1) if StepPlan(total, 1, every, 1).validates_after(step)]
        assert steps == sorted({*range(every, total + 1, every), total})

    def test_an_epoch_is_a_pass_over_the_whole_batches(self):
        assert plan().epoch(0) == 0
        assert plan().epoch(12) == 1.0
        assert plan().epoch(18) == 1.5


SIZES = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
LENGTHS = st.integers(0, 1000)  # a seed of lengths; 0: all equal


def lengths_of(examples: int, seed: int) -> np.ndarray | None:
    return np.random.default_rng(seed).integers(1, 100, examples) if seed else None


class TestEpochBatches:
    @given(SIZES, LENGTHS, st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
    def test_every_example_once_in_whole_batches(
        self, size: tuple[int, int], lengths_seed: int, bucket: int, seed: int, epoch: int
    ):
        examples, batch_size = size
        lengths = lengths_of(examples, lengths_seed)
        batches = epoch_batches(examples, lengths, batch_size, bucket, seed, epoch)
        assert batches.shape == (examples // batch_size, batch_size)
        assert len(np.unique(batches)) == batches.size  # at most once …
        assert set(batches.flat) <= set(range(examples))  # … and nothing else
        again = epoch_batches(examples, lengths, batch_size, bucket, seed, epoch)
        np.testing.assert_array_equal(again, batches)

    def test_all_examples_where_the_batches_come_out_even(self):
        assert sorted(epoch_batches(60, None, 5, 1, 0, 0).flat) == list(range(60))
        assert sorted(epoch_batches(60, lengths_of(60, 1), 5, 3, 0, 0).flat) == list(range(60))

    def test_seed_and_epoch_change_the_order_and_which_examples_wait(self):
        orders = {(s, e): epoch_batches(43, None, 4, 1, s, e) for s in range(4) for e in range(4)}
        assert len({order.tobytes() for order in orders.values()}) == len(orders)
        waiting = {frozenset(set(range(43)) - set(order.flat)) for order in orders.values()}
        assert len(waiting) > 1

    def test_the_order_is_not_that_of_the_examples(self):
        places = np.mean([epoch_batches(50, None, 1, 1, seed, 0).ravel() for seed in range(400)], 0)
        assert np.abs(places - 24.5).max() < 4  # uniform: a mean of 400 has the standard deviation 0.72

    def test_buckets_pad_less_and_still_shuffle(self):
        lengths = np.random.default_rng(0).integers(10, 500, 1024)

        def padding(bucket: int) -> int:
            batches = lengths[epoch_batches(1024, lengths, 16, bucket, 0, 0)]
            return int((batches.max(1, keepdims=True) - batches).sum())

        assert padding(8) < padding(1) / 4
        assert padding(64) < padding(8) / 4
        longest = lengths[epoch_batches(1024, lengths, 16, 64, 0, 0)].max(1)
        assert abs(np.corrcoef(longest, np.arange(64))[0, 1]) < 0.3  # short and long batches come in random order
        first, second = (epoch_batches(1024, lengths, 16, 8, 0, epoch) for epoch in (0, 1))
        together = {frozenset(batch) for batch in first.tolist()} & {frozenset(batch) for batch in second.tolist()}
        assert not together  # other company in every epoch


def run_batches(*, examples: int = 50, batch_size: int = 12, steps: int = 10, **options: Any) -> RunBatches:
    """Ten steps of twelve: two and a half epochs of four steps."""
    accumulate = options.pop("accumulate", 1)
    lengths = lengths_of(examples, options.pop("lengths", 0))
    of_run = StepPlan(steps, examples // batch_size, 1, accumulate)
    return RunBatches(examples, lengths, plan=of_run, batch_size=batch_size, **{"bucket": 1, "seed": 3} | options)


class TestRunBatches:
    def test_a_run_is_one_epoch_after_the_other(self):
        epochs = np.concatenate([epoch_batches(50, None, 12, 1, 3, epoch) for epoch in range(3)])
        assert list(run_batches()) == epochs[:10].tolist()

    @pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 4), (12, 1)])
    @pytest.mark.parametrize("bucket", [1, 2])
    def test_devices_and_micro_batches_share_the_batch_of_one_device(
        self, world_size: int, accumulate: int, bucket: int
    ):
        one = list(run_batches(lengths=1, bucket=bucket))
        ranks = [
            list(run_batches(lengths=1, bucket=bucket, accumulate=accumulate, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {10 * accumulate}
        for step in range(10):
            parts = [batches[step * accumulate + part] for batches in ranks for part in range(accumulate)]
            assert {len(part) for part in parts} == {12 // (world_size * accumulate)}
            assert sorted(np.concatenate(parts)) == sorted(one[step])

    @pytest.mark.parametrize(("batch_size", "world_size", "accumulate"), [(7, 2, 1), (7, 1, 2), (6, 2, 2)])
    def test_a_batch_that_cannot_be_shared_out_is_refused(self, batch_size: int, world_size: int, accumulate: int):
        with pytest.raises(OptionError, match=f"batch_size={batch_size}: must be a multiple of .*{world_size} x"):
            run_batches(batch_size=batch_size, world_size=world_size, accumulate=accumulate)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_start_gives_the_tail(self, accumulate: int):
        whole = list(run_batches(lengths=1, bucket=2, accumulate=accumulate))
        for start in range(len(whole) + 1):
            resumed = run_batches(lengths=1, bucket=2, accumulate=accumulate)
            resumed.start = start
            assert list(resumed) == whole[start:]
            assert len(resumed) == len(whole)  # Lightning counts the batches before it, too


class Numbers:
    """Example i is i, once or as a sequence i + 1 long."""

    def __init__(self, size: int, *, growing: bool = False) -> None:
        self.size = size
        self.lengths = np.arange(1, size + 1) if growing else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        length = 1 if self.lengths is None else self.lengths[index]
        return np.full(length, index), index


class Counting(Task):
    """What a data module needs of a task, and no more."""

    seq_len, causal, monitor, mode = 100, False, "loss", "min"

    def __init__(self, *, growing: bool = False, train: int = 10, val: int = 7, test: int = 5) -> None:
        self.splits = Splits(*(Numbers(size, growing=growing) for size in (train, val, test)))

    def prepare(self) -> None: ...

    def datasets(self) -> Splits:
        return self.splits

    def fingerprint(self) -> str:
        return ""

    def baselines(self) -> dict[str, float]:
        return {}

    def encoder(self, d_model: int) -> nn.Module:
        return nn.Identity()

    def head(self, d_model: int) -> nn.Module:
        return nn.Identity()

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return prediction, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).mean()

    def metrics(self) -> dict[str, Metric]:
        return {}


def loader_of_run(**options: Any) -> ResumableLoader:
    return data_of(Counting(), seed=1, batch_size=2, **options).train_dataloader()


def data_of(task: Task, **options: Any) -> SequenceData:
    return SequenceData(task, task.datasets(), StepPlan(8, 5, 5, 1), **options)


class TestLoaders:
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_a_resumed_loader_hands_out_the_rest(self, num_workers: int):
        whole = [batch.targets.tolist() for batch in loader_of_run()]
        assert len(whole) == 8
        assert sorted(np.concatenate(whole[:5])) == list(range(10))
        broken_off = loader_of_run(num_workers=num_workers)
        batches = iter(broken_off)
        first = [next(batches).targets.tolist() for _ in range(3)]
        state = broken_off.state_dict()  # a loader process may have prepared more than was handed out
        batches.close()
        resumed = loader_of_run(num_workers=num_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state == {"batches": 3}  # a run may be stopped before the first batch
        assert first + [batch.targets.tolist() for batch in resumed] == whole
        assert resumed.state_dict() == {"batches": 8}

    @pytest.mark.parametrize("growing", [False, True])
    def test_evaluation_reads_every_example_once(self, growing: bool):
        data = data_of(Counting(growing=growing), seed=1, batch_size=3)
        for loader, size in ((data.val_dataloader(), 7), (data.test_dataloader(), 5)):
            batches = [batch.targets for batch in loader]
            assert sorted(torch.cat(batches).tolist()) == list(range(size))
            assert max(map(len, batches)) <= 3

    def test_batches_are_padded_to_their_longest(self):
        data = data_of(Counting(growing=True), seed=1, batch_size=3)
        for batch in data.val_dataloader():
            lengths = batch.targets + 1  # example i is i + 1 long
            assert batch.inputs.shape == (len(batch.targets), lengths.max())
            mask = torch.arange(batch.inputs.shape[1]) < lengths[:, None]
            assert torch.equal(mask, torch.ones_like(mask) if batch.mask is None else batch.mask)
            assert torch.equal(batch.inputs, torch.where(mask, batch.targets[:, None], 0))

    @pytest.mark.parametrize(("option", "value"), [("bucket", 0), ("num_workers", -1)])
    def test_options_out_of_range_are_named(self, option: str, value: int):
        with pytest.raises(OptionError) as error:
            data_of(Counting(), seed=0, **{option: value})
        assert error.value.name == option


class TestLimits:
    """Of training, for debugging: how many steps, and on which examples."""

    @pytest.mark.parametrize(
        ("changes", "per_epoch", "total", "every"),
        [
            ({}, 12, 24, 12),
            ({"limit_train_batches": 1.0}, 12, 24, 12),
            ({"limit_train_batches": 0.5}, 6, 12, 6),
            ({"limit_train_batches": 0.99}, 11, 22, 11),
            ({"limit_train_batches": 5}, 5, 10, 5),
            ({"limit_train_batches": 500}, 12, 24, 12),
            ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, 2, 4, 2),
            ({"limit_train_batches": 5, "max_steps": 7, "val_check_interval": 0.4}, 5, 7, 2),
            ({"overfit_batches": 3, "max_epochs": 10, "val_check_interval": 5.0}, 3, 30, 15),
            ({"overfit_batches": 0.25}, 3, 6, 3),
        ],
    )
    def test_in_steps(self, changes: dict[str, Any], per_epoch: int, total: int, every: int):
        found = plan(**changes)
        assert (found.steps_per_epoch, found.total_steps, found.val_every) == (per_epoch, total, every)
        assert found.overfits == ("overfit_batches" in changes)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"limit_train_batches": 0}, "limit_train_batches=0: must be at least 1 batches"),
            ({"limit_train_batches": 1, "accumulate_grad_batches": 2}, "limit_train_batches=1: must be at least 2"),
            ({"limit_train_batches": -1.0}, r"limit_train_batches=-1.0: must be a share in \(0, 1\]"),
            ({"limit_train_batches": 1.5}, r"limit_train_batches=1.5: must be a share in \(0, 1\]"),
            ({"limit_train_batches": 0.08}, "limit_train_batches=0.08: must be at least 0.0833: an epoch has 12 steps"),
            ({"overfit_batches": -1}, "overfit_batches=-1: must be at least 1"),
            ({"overfit_batches": 1, "limit_train_batches": 1}, "limit_train_batches=1: must be null with overfit"),
        ],
    )
    def test_what_makes_no_epoch_is_refused(self, changes: dict[str, Any], match: str):
        with pytest.raises(OptionError, match=match):
            plan(**changes)

    @pytest.mark.parametrize("kept", [{"limit_train_batches": 3}, {"overfit_batches": 3}])
    @pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (2, 2)])
    @pytest.mark.parametrize("bucket", [1, 2])
    def test_which_examples(self, kept: dict[str, int], world_size: int, accumulate: int, bucket: int):
        """The first batches of every epoch, shuffled as they always are, or of the first epoch alone."""
        lengths = lengths_of(50, 1) if bucket > 1 else None
        batches = {next(iter(kept)): accumulate * 3}
        changes = {"examples": 50, "accumulate_grad_batches": accumulate, **batches}
        of_run = plan(**changes, max_epochs=None, max_steps=8)
        options: Any = {"plan": of_run, "batch_size": 8, "bucket": bucket, "seed": 3, "world_size": world_size}
        epochs = [epoch_batches(50, lengths, 8, bucket, 3, epoch)[:3] for epoch in range(3)]
        if of_run.overfits:
            epochs = [epochs[0]] * 3
        expected = [sorted(batch.tolist()) for epoch in epochs for batch in epoch][:8]
        for start in (0, 4 * accumulate):  # at the beginning, and in the middle of an epoch
            shares = []
            for rank in range(world_size):
                sampler = RunBatches(50, lengths, rank=rank, **options)
                sampler.start = start
                shares.append(list(sampler))
            micro = [[i for part in parts for i in part] for parts in zip(*shares, strict=True)]
            groups = [micro[i : i + accumulate] for i in range(0, len(micro), accumulate)]
            assert [sorted(i for part in group for i in part) for group in groups] == expected[start // accumulate :]

    @pytest.mark.parametrize("growing", [False, True])
    def test_what_is_overfitted_is_validated(self, growing: bool):
        task = Counting(growing=growing, train=30)
        splits = task.datasets()
        changes = {"examples": 30, "batch_size": 4, "max_epochs": None, "max_steps": 6, "overfit_batches": 2}
        data = SequenceData(task, splits, plan(**changes), seed=5, batch_size=4)

        def read(loader: Any) -> list[int]:
            return [int(target) for batch in loader for target in batch.targets]

        trained = read(data.train_dataloader())
        assert len(trained) == 24
        assert trained[:8] == trained[8:16] == trained[16:]
        assert sorted(read(data.val_dataloader())) == sorted(trained[:8])
        assert sorted(read(data.test_dataloader())) == sorted(int(splits.test[i][1]) for i in range(5))
        data.require_batches({"limit_val_batches": 0.5}, 1, "val")
        with pytest.raises(OptionError, match=r"limit_val_batches=0\.4: must be at least 0.5: there are 2 batches"):
            data.require_batches({"limit_val_batches": 0.4}, 1, "val")


class TestEvaluationBatches:
    @given(st.integers(1, 60), LENGTHS, st.integers(1, 9), st.integers(1, 5))
    def test_every_example_once_over_all_devices(self, examples: int, lengths: int, batch_size: int, world_size: int):
        ranks = [
            evaluation_batches(examples, lengths_of(examples, lengths), batch_size, rank, world_size)
            for rank in range(world_size)
        ]
        assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(examples))
        assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)

    def test_the_longest_come_first_and_like_lengths_together(self):
        lengths = np.random.default_rng(0).integers(1, 1000, 100)
        batches = evaluation_batches(100, lengths, 10)
        assert sorted(lengths[batches[0]]) == sorted(lengths)[-10:]
        spreads = [np.ptp(lengths[batch]) for batch in batches]
        assert max(spreads) < 250
        assert batches == evaluation_batches(100, lengths, 10)  # the same at every validation
