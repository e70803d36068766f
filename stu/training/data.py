"""The one data module: which examples make up batch n is a pure function of the seed and n."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from stu.errors import OptionError, require
from stu.resources import memory
from stu.task import Batch, Examples, Splits, Task
from stu.training.plan import StepPlan
from stu.training.resident import Resident
from stu.training.signals import end_workers_at_exit, spare

BYTES_PER_EXAMPLE = 32  # of the orders in which a split is read
WORKERS_PER_CORE = 16  # more would only wait for each other
SHARE = 0.25  # of a GPU's free memory, that a split may take unasked


class SequenceData(L.LightningDataModule):
    """Loaders over the prepared data of a task, for the batches of a plan.

    batch_size: sequences per optimiser step, over all devices and accumulated micro-batches together, so that a
    recipe means the same on any hardware. bucket: batches are drawn from pools of that many batches, inside which
    sequences of similar length share a batch (less padding); 1 shuffles freely. num_workers: loader processes, which
    live as long as the run and prepare two batches each.

    device_resident: whether training and validation examples are kept on the device, and their batches made there; the
    test set, which is read once, is not. "auto": on a GPU, where each split takes at most a quarter of the free memory
    and the run reads all of its training examples. Batches are the same, to the last bit.
    """

    def __init__(
        self,
        task: Task,
        splits: Splits,
        plan: StepPlan,
        seed: int,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        bucket: int = 1,
        device_resident: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        allowed = device_resident in (True, False, "auto")
        require(allowed, "device_resident", device_resident, "must be auto, true or false")
        require(bucket >= 1, "bucket", bucket, "must be at least 1")
        most = WORKERS_PER_CORE * (os.cpu_count() or 1)
        range_of_workers = f"must be in 0 … {most}, {WORKERS_PER_CORE} for each core of this machine"
        require(0 <= num_workers <= most, "num_workers", num_workers, range_of_workers)
        most = memory() // BYTES_PER_EXAMPLE
        for split, examples in splits._asdict().items():
            require(
                len(examples) <= most, split, len(examples), f"must be at most {most:,}: so many can be shuffled here"
            )
        self.task, self.splits, self.plan, self.seed = task, splits, plan, seed
        self.batch_size, self.num_workers, self.bucket = batch_size, num_workers, bucket
        self.device_resident = device_resident
        self._resident: dict[str, Resident | None] = {}

    def of(self, task: Task) -> "SequenceData":
        """The same loaders of the prepared data of another task, whose batches have about as many steps."""
        batch_size = max(1, self.batch_size * self.task.seq_len // max(task.seq_len, self.task.seq_len))
        options: dict[str, Any] = {"num_workers": self.num_workers, "bucket": self.bucket}
        return SequenceData(task, task.datasets(), self.plan, self.seed, batch_size=batch_size, **options)

    def require_enough(self, world_size: int) -> None:
        """Raise `OptionError` unless every device gets the same share of each micro-batch, and has examples."""
        require_divisible(self.batch_size, self.plan, world_size)
        fewest = min(map(len, self.splits))
        require(fewest >= world_size, "devices", world_size, f"must be at most {fewest} (examples)")

    def require_tests(self, arguments: Mapping[str, Any], world_size: int) -> None:
        """Raise `OptionError` where a device has nothing to test."""
        examples = len(self.splits.test)
        require(examples >= world_size, "devices", world_size, f"must be at most {examples} (examples to test)")
        self.require_batches(arguments, world_size, "test")

    def require_batches(self, arguments: Mapping[str, Any], world_size: int, *splits: str) -> None:
        """Raise `OptionError` where the arguments of a Trainer leave no batch of val or test on some device."""
        for split in splits:
            limit = arguments[f"limit_{split}_batches"]
            overfits = self.plan.overfits and split == "val"
            count = len(self._overfitted()) if overfits else len(getattr(self.splits, split))
            examples = count // world_size  # of the device that has fewest
            batches = math.ceil(examples / max(1, self.batch_size // world_size))
            allowed = f"must be at least {1 / max(1, batches):.3g}: there are {batches} batches"
            fits = not isinstance(limit, float) or int(limit * batches) >= 1
            require(fits, f"trainer.limit_{split}_batches", limit, allowed)

    def train_dataloader(self) -> "ResumableLoader":
        """Every batch of the run, in order, from where the checkpoint left off."""
        sampler = RunBatches(
            len(self.splits.train),
            self.splits.train.lengths,
            plan=self.plan,
            batch_size=self.batch_size,
            bucket=self.bucket,
            seed=self.seed,
            rank=self._rank,
            world_size=self._world_size,
        )
        return ResumableLoader(sampler, **self._source("train"))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation example once, or every training example of a plan that overfits."""
        if self.plan.overfits:
            return self._evaluation_loader(self.splits.train, self._source("train"), self._overfitted())
        return self._evaluation_loader(self.splits.val, self._source("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Every test example once."""
        return self._evaluation_loader(self.splits.test, self._from_host(self.splits.test))

    def _evaluation_loader(
        self, examples: Examples, source: dict[str, Any], some: np.ndarray | None = None
    ) -> DataLoader[Batch]:
        """some: the examples that are read, by their indices; None: all."""
        some = np.arange(len(examples)) if some is None else some
        lengths = None if examples.lengths is None else examples.lengths[some]
        per_device = max(1, self.batch_size // self._world_size)
        batches = evaluation_batches(len(some), lengths, per_device, self._rank, self._world_size)
        return DataLoader(batch_sampler=[some[batch].tolist() for batch in batches], **source)

    def _overfitted(self) -> np.ndarray:
        """Indices of the training examples of a plan that overfits."""
        train = self.splits.train
        first = epoch_batches(len(train), train.lengths, self.batch_size, self.bucket, self.seed, epoch=0)
        return first[: self.plan.steps_per_epoch].flatten()

    def _source(self, split: str) -> dict[str, Any]:
        """Where a loader has its batches from: the device, if they live there, or else the host."""
        if split not in self._resident:
            self._resident[split] = self._made_resident(getattr(self.splits, split))
        resident = self._resident[split]
        if resident is None:
            return self._from_host(getattr(self.splits, split))
        return {"dataset": resident, "collate_fn": _as_it_is}

    def _from_host(self, examples: Examples) -> dict[str, Any]:
        if self.num_workers > 0:
            end_workers_at_exit()
        return {
            "dataset": examples,
            "collate_fn": self.task.collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": spare,
            "pin_memory": self._device.type == "cuda",  # Lightning's copies to the GPU then wait for nothing
        }

    def _made_resident(self, examples: Examples) -> Resident | None:
        if self.device_resident is not True:
            limited = self.plan.steps_per_epoch < len(self.splits.train) // self.batch_size
            all_read = self.plan.total_steps >= self.plan.steps_per_epoch and not limited
            if not self.device_resident or self._device.type != "cuda" or not all_read:
                return None
        share = 1.0 if self.device_resident is True else SHARE
        try:
            return Resident(self.task, examples, self._device, share=share)
        except (OptionError, torch.OutOfMemoryError):
            if self.device_resident is True:
                raise
            return None

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


class RunBatches(Sampler[list[int]]):
    """The batches of a whole run on one device, as lists of indices, from batch `start` on."""

    def __init__(
        self,
        examples: int,
        lengths: np.ndarray | None,
        *,
        plan: StepPlan,
        batch_size: int,
        bucket: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require_divisible(batch_size, plan, world_size)
        self.examples, self.lengths, self.plan = examples, lengths, plan
        self.batch_size, self.bucket, self.seed = batch_size, bucket, seed
        self.rank, self.world_size = rank, world_size
        self.start = 0

    def __len__(self) -> int:
        """Batches of the whole run, wherever it starts."""
        return self.plan.total_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Batch `start`, `start` + 1, …"""
        order, epoch = np.empty((0, 0), np.int64), -1
        for batch in range(self.start, len(self)):
            step, part = divmod(batch, self.plan.accumulate)
            if epoch < 0 or (step // self.plan.steps_per_epoch != epoch and not self.plan.overfits):
                epoch = 0 if self.plan.overfits else step // self.plan.steps_per_epoch
                order = epoch_batches(self.examples, self.lengths, self.batch_size, self.bucket, self.seed, epoch)
            whole = order[step % self.plan.steps_per_epoch]
            micro_batch = whole[part :: self.plan.accumulate]  # the same on any number of devices
            yield micro_batch[self.rank :: self.world_size].tolist()


def require_divisible(batch_size: int, plan: StepPlan, world_size: int) -> None:
    """Raise `OptionError` unless every device gets the same share of every micro-batch."""
    allowed = f"must be a multiple of devices x accumulate_grad_batches ({world_size} x {plan.accumulate})"
    require(batch_size % (world_size * plan.accumulate) == 0, "batch_size", batch_size, allowed)


def evaluation_batches(
    examples: int, lengths: np.ndarray | None, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Indices of every example once, over all devices; similar lengths share a batch.

    The longest come first, so that what does not fit in memory fails at once; the other batches are in a fixed random
    order, so that an evaluation of some of them is a fair sample of lengths.
    """
    order = np.arange(examples) if lengths is None else np.argsort(-lengths.astype(np.int64), kind="stable")
    mine = order[rank::world_size].tolist()
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    order = np.random.default_rng(0).permutation(np.arange(1, len(batches)))
    return batches[:1] + [batches[i] for i in order]


def epoch_batches(
    examples: int, lengths: np.ndarray | None, batch_size: int, bucket: int, seed: int, epoch: int
) -> np.ndarray:
    """(steps, batch_size) indices of one epoch; examples left over from the last whole batch wait for another epoch."""
    rng = np.random.default_rng([seed, epoch])
    steps = examples // batch_size
    order = rng.permutation(examples)[: steps * batch_size]
    if lengths is None or bucket == 1:
        return order.reshape(steps, batch_size)
    pool = bucket * batch_size
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    by_length = [p[np.argsort(lengths[p], kind="stable")].reshape(-1, batch_size) for p in pools]
    return rng.permutation(np.concatenate(by_length))


class ResumableLoader(DataLoader[Batch]):
    """A loader whose state is the number of batches it has returned."""

    def __init__(self, sampler: RunBatches, **source: Any) -> None:
        super().__init__(batch_sampler=sampler, **source)
        self.sampler_of_run, self.returned = sampler, 0

    def __len__(self) -> int:
        """Batches of the whole run."""
        return len(self.sampler_of_run)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator is all that is used
        """The batches that remain."""
        self.returned = self.sampler_of_run.start
        for batch in super().__iter__():
            self.returned += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How far the run is."""
        return {"batches": self.returned}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after batch number `state["batches"]`."""
        self.sampler_of_run.start = self.returned = state["batches"]


def _as_it_is(batch: Batch) -> Batch:
    return batch
