"""The module, its callbacks and a real Trainer: exact metrics, reproducible steps, validations when planned."""

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torchmetrics import MeanSquaredError, Metric

from stu.backbone import SequenceModel
from stu.encoders import LinearEncoder
from stu.errors import OptionError
from stu.heads import StepHead
from stu.task import Batch, Rollout, Splits, Task, scored_steps
from stu.training import Diverged, SequenceModule, memory
from tests.generate import read_trajectories, trajectory
from tests.models import MODELS, small_backbone
from tests.runs import Training
from tests.training.devices import counting, half_filled_metrics


class Lengths:
    """Sequences of unlike lengths, with a target for every step."""

    def __init__(self, seed: int, size: int, longest: int = 12) -> None:
        random = np.random.default_rng(seed)
        self.lengths = random.integers(1, longest + 1, size)
        self.inputs = [random.standard_normal((n, 2), np.float32) for n in self.lengths]
        self.targets = [x.cumsum(0)[:, :1] for x in self.inputs]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs[index], self.targets[index]


class Untouchable(Lengths):
    """A data set that nobody may read."""

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("the test set was read")


class Steps(Task):
    """Predict every step of sequences of unlike lengths; only real steps count."""

    seq_len, causal, monitor, mode = 12, False, "mse", "min"

    def __init__(self, *, test: type[Lengths] = Lengths, mode: Literal["min", "max"] = "min") -> None:
        self.splits = Splits(Lengths(1, 18), Lengths(2, 10), test(3, 7))
        self.mode = mode

    def prepare(self) -> None: ...

    def datasets(self) -> Splits:
        return self.splits

    def fingerprint(self) -> str:
        return ""

    def baselines(self) -> dict[str, float]:
        return {}

    def encoder(self, d_model: int) -> nn.Module:
        return LinearEncoder(d_model, d_input=2)

    def head(self, d_model: int) -> nn.Module:
        return StepHead(d_model, d_output=1)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return scored_steps(prediction, batch), scored_steps(batch.targets, batch)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().mean()  # unlike the metric

    def metrics(self) -> dict[str, Metric]:
        return {"mse": MeanSquaredError()}


def model(name: str = "stu", **options: Any) -> SequenceModel:
    torch.manual_seed(7)
    task = Steps()
    return SequenceModel(task.encoder(8), small_backbone(name, seq_len=task.seq_len, **options), task.head(8))


def errors(network: nn.Module, split: Lengths) -> dict[str, float]:
    """Loss and metric over a whole split, one sequence after the other, so without any padding."""
    network.eval()
    with torch.no_grad():
        differences = [
            network(torch.as_tensor(inputs)[None])[0] - torch.as_tensor(targets)
            for inputs, targets in (split[i] for i in range(len(split)))
        ]
    d = torch.cat(differences).double()
    return {"loss": float(d.abs().mean()), "mse": float(d.square().mean())}


class TestMetrics:
    @pytest.mark.parametrize("name", ["stu", "transformer"])
    @pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 18])
    def test_an_evaluation_is_exact_whatever_the_batches(self, tmp_path: Path, name: str, batch_size: int):
        training = Training(tmp_path, Steps(), model(name), batch_size=batch_size, max_epochs=0.5).fit()
        split = training.data.splits.val
        expected = errors(training.module.model, split)
        logged = {metric: training.rows(f"val/{metric}")[training.plan.total_steps] for metric in expected}
        assert logged == pytest.approx(expected, rel=1e-5)
        batches = len(training.data.val_dataloader())
        assert batches == math.ceil(10 / batch_size)  # the last is smaller than the others, or there is one
        training.trainer.test(training.module, training.data, verbose=False)
        assert training.module.evaluated == pytest.approx(
            errors(training.module.model, training.data.splits.test), rel=1e-5
        )

    @pytest.mark.parametrize(("method", "split"), [("validate", "val"), ("test", "test")])
    def test_an_evaluation_that_was_broken_off_leaves_nothing_behind(self, tmp_path: Path, method: str, split: str):
        training = Training(tmp_path, Steps(), model())
        module, data = training.module, training.data
        module.validation_step(next(iter(data.val_dataloader())), 0)
        getattr(training.trainer, method)(module, data, verbose=False)
        assert module.evaluated == pytest.approx(errors(module.model, getattr(data.splits, split)), rel=1e-5)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_row_of_training_is_exact_over_its_steps(self, tmp_path: Path, accumulate: int):
        """Weighted by what counts: the real steps of each batch."""
        seen: list[Tensor] = []

        class Recording(Steps):
            def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
                if torch.is_grad_enabled():
                    seen.append((prediction - target).detach().double())
                return super().loss(prediction, target)

        training = Training(
            tmp_path, Recording(), model(), log_every=3, accumulate_grad_batches=accumulate, max_steps=8, max_epochs=9
        ).fit()
        assert len({len(difference) for difference in seen}) > 3  # the batches differ in what counts
        for metric, of in (("loss", Tensor.abs), ("mse", Tensor.square)):
            rows = training.rows(f"train/{metric}")
            assert list(rows) == [3, 6]  # the two remaining steps fill no row
            for step, value in rows.items():
                part = torch.cat(seen[(step - 3) * accumulate : step * accumulate])
                assert value == pytest.approx(float(of(part).mean()), rel=1e-5)

    def test_validation_leaves_the_training_metrics_alone(self, tmp_path: Path):
        """A row whose steps lie on both sides of a validation."""
        rows = []
        for interval in (1, 2.0):
            folder = tmp_path / str(interval)
            training = Training(folder, Steps(), model(), log_every=4, val_check_interval=interval, max_epochs=1.9)
            rows.append(training.fit().rows("train/loss"))
        assert rows[0] == rows[1]

    def test_padding_has_no_part_in_loss_and_gradient(self):
        task = Steps()
        module = SequenceModule(model(norm="layer"), task)
        examples = [task.splits.train[i] for i in range(5)]
        batch = task.collate(examples)
        assert batch.mask is not None
        results = []
        for garbage in (0.0, 1e3):
            fill = Batch(
                torch.where(batch.mask[..., None], batch.inputs, garbage),
                torch.where(batch.mask[..., None], batch.targets, -garbage),
                batch.mask,
            )
            module.zero_grad()
            loss = module.training_step(fill, 0)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)

    def test_gradient_norm_is_that_before_clipping(self, tmp_path: Path):
        class Norms(L.Callback):
            def __init__(self) -> None:
                self.norms: list[float] = []

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                squares = [p.grad.double().square().sum() for p in pl_module.parameters()]
                self.norms.append(math.sqrt(sum(squares)))

        norms = Norms()
        training = Training(tmp_path, Steps(), model(), callbacks=[norms], max_epochs=1)
        training.trainer.gradient_clip_val = 1e-3
        logged = training.fit().rows("gradient_norm")
        assert list(logged.values()) == pytest.approx(norms.norms, rel=1e-5)
        assert min(norms.norms) > 1e-2

    def test_throughput_counts_sequences_and_the_time_data_take(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        now = [0.0]
        monkeypatch.setattr("stu.training.callbacks.time.perf_counter", lambda: now[0])

        class Slow(Steps):
            def collate(self, examples: Any) -> Any:
                now[0] += 0.25
                return super().collate(examples)

            def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
                now[0] += 0.75
                return super().loss(prediction, target)

        training = Training(tmp_path, Slow(), model(), log_every=2, batch_size=3, max_steps=4).fit()
        # two steps of three sequences take two seconds, a quarter of them for the data; validation does not count
        assert training.rows("time/sequences_per_second") == {2: 3.0, 4: 3.0}
        assert training.rows("time/data_share") == {2: 0.25, 4: 0.25}

    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("known", [True, False])
    def test_a_token_is_a_real_position(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, known: bool
    ):
        now, read = [0.0], list[int]()
        monkeypatch.setattr("stu.training.callbacks.time.perf_counter", lambda: now[0])

        class Counted(Steps):
            def collate(self, examples: Any) -> Any:
                if any(inputs is own for inputs, _ in examples for own in self.splits.train.inputs):
                    now[0] += 0.5
                    read.append(sum(len(inputs) for inputs, _ in examples))
                batch = super().collate(examples)
                return batch if known or batch.mask is None else batch._replace(num_real=None)

        options = {"batch_size": 4, "accumulate_grad_batches": accumulate, "max_steps": 4, "log_every": 2}
        training = Training(tmp_path, Counted(), model(), **options).fit()
        half = 2 * accumulate  # batches per row, each of which takes half a second
        expected = {2: sum(read[:half]) / (0.5 * half), 4: sum(read[half : 2 * half]) / (0.5 * half)}
        assert training.rows("time/tokens_per_second") == expected

    def test_peak_memory_is_what_the_process_took_or_the_device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        rows = Training(tmp_path, Steps(), model(), max_steps=2).fit().rows("memory/peak_bytes")
        now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert 0.9 * now < rows[1] <= rows[2] <= memory.peak(torch.device("cpu")) < 2**40
        asked = list[Any]()
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
        device = torch.device("cuda", 1)
        memory.reset_peak(device)
        assert memory.peak(device) == 7
        assert asked == [device, device]

    def test_every_device_goes_on_with_its_own_half_filled_metrics(self, tmp_path: Path):
        losses = torch.rand(5, 2) ** 9  # steps, devices
        torch.save({"losses": losses}, tmp_path / "job.pt")
        multiprocessing.start_processes(half_filled_metrics, (str(tmp_path),), nprocs=2, start_method="forkserver")
        for rank in range(2):
            found = torch.load(tmp_path / f"rank{rank}.pt")
            assert found["row"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
            assert found["again"] == found["row"]  # to the last bit
        # on another number of devices, nothing is counted twice or left out
        checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for count in (1, 3):
            values = []
            for rank in range(count):
                module = counting(rank, world_size=count)
                module.on_load_checkpoint(loaded := checkpoint | {"state_dict": dict(checkpoint["state_dict"])})
                module.load_state_dict(loaded["state_dict"])
                values.append(module.train_metrics["loss"].metric_state)
            assert float(sum(v["mean_value"] for v in values)) == pytest.approx(float(losses[:3].sum()), rel=1e-6)
            assert float(sum(v["weight"] for v in values)) == 6


class TestRandomness:
    def test_what_a_step_draws_depends_on_seed_step_and_device_alone(self):
        task = Steps()
        batch = task.collate([task.splits.train[i] for i in range(4)])

        def loss(seed: int, step: int, *, drawn_before: int = 0, rank: int = 0) -> float:
            module = SequenceModule(model(dropout=0.5), task, seed=seed)
            module._trainer = type("Trainer", (), {"global_rank": rank})() if rank else None
            torch.rand(drawn_before)
            return float(module.training_step(batch, step).detach())

        first = loss(0, 5)
        assert first == loss(0, 5, drawn_before=17)
        others = [loss(0, 6), loss(1, 5), loss(5, 0), loss(0, 5, rank=1)]
        assert len({first, *others}) == 5

    def test_a_seed_is_a_run_and_another_is_another(self, tmp_path: Path):
        def trajectory(folder: str, **options: Any) -> dict[int, float]:
            training = Training(tmp_path / folder, Steps(), model(dropout=0.2), max_epochs=1, **options)
            return training.fit().rows("train/loss")

        first = trajectory("a", seed=3)
        assert trajectory("b", seed=3) == first
        assert trajectory("c", seed=4) != first


class Validations(L.Callback):
    """The optimiser steps after which a validation was made, and how many batches it read."""

    def __init__(self) -> None:
        self.batches: defaultdict[int, int] = defaultdict(int)
        self.tried = 0

    def on_validation_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.sanity_checking:
            self.tried += 1
        else:
            self.batches[trainer.global_step] += 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({"max_epochs": 2}, [4, 8]),
        ({"max_steps": 7, "val_check_interval": 0.75}, [3, 6, 7]),  # across the end of an epoch, and the last
        ({"max_steps": 4, "val_check_interval": 1}, [1, 2, 3, 4]),
        ({"max_steps": 3, "max_epochs": None}, [3]),
        ({"max_steps": 6, "val_check_interval": 2.0}, [6]),
    ],
)
def test_validations_are_made_when_planned(tmp_path: Path, recipe: dict[str, Any], steps: list[int], accumulate: int):
    validations = Validations()
    training = Training(
        tmp_path, Steps(), model(), accumulate_grad_batches=accumulate, callbacks=[validations], **recipe
    ).fit()
    if isinstance(recipe.get("val_check_interval"), int) and accumulate == 2:
        assert training.plan.val_every == 1  # an integer counts batches, and there is no half step
    assert dict(validations.batches) == dict.fromkeys(steps, 3)  # every time all of the 10 sequences, in fours
    assert validations.tried == 1
    assert list(training.rows("val/loss")) == steps
    assert training.trainer.global_step == training.plan.total_steps == steps[-1]


def test_fitting_leaves_the_test_set_alone(tmp_path: Path):
    training = Training(tmp_path, Steps(test=Untouchable), model()).fit()
    training.trainer.validate(training.module, training.data, verbose=False)
    with pytest.raises(AssertionError, match="the test set was read"):
        training.trainer.test(training.module, training.data, verbose=False)


def test_what_the_test_does_is_tried_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    class Rolling(Steps):
        rollout = Rollout(2, 3, dict)

    monkeypatch.setattr("stu.training.module.batch_rollout", failing)
    training = Training(tmp_path, Rolling(test=Untouchable), model())
    with pytest.raises(ZeroDivisionError):
        training.fit()
    assert training.trainer.global_step == 0


def test_a_metric_that_nobody_measures_cannot_be_monitored(tmp_path: Path):
    class Unmeasured(Steps):
        monitor = "accuracy"

    with pytest.raises(OptionError, match="monitor=accuracy: must be one of loss, mse"):
        SequenceModule(model(), Unmeasured())


class TestCheckpoints:
    @pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
    def test_the_best_is_that_of_the_monitored_metric(self, tmp_path: Path, mode: Literal["min", "max"], best: int):
        class Scripted(Steps):
            def metrics(self) -> dict[str, Metric]:
                return {"mse": Nth([4.0, 2.0, 5.0, 2.0, 5.0])}  # of equal ones the first counts

        weights: dict[int, Tensor] = {}

        class Weights(L.Callback):
            def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
                weights[trainer.global_step] = pl_module.model.head.linear.weight.detach().clone()

        training = Training(
            tmp_path,
            Scripted(mode=mode),
            model(),
            callbacks=[Weights()],
            val_check_interval=1,
            max_steps=5,
            max_epochs=None,
        ).fit()
        assert (training.checkpoints.best_step, training.checkpoints.best_value) == (
            best,
            2.0 if mode == "min" else 5.0,
        )
        for name, step in (("best", best), ("last", 5)):
            saved = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)
            assert saved["global_step"] == step
            assert torch.equal(saved["state_dict"]["model.head.linear.weight"], weights[step])

    def test_saved_every_n_steps_and_nothing_half(self, tmp_path: Path):
        saved: list[int] = []

        class Saves(L.Callback):
            def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
                assert not (tmp_path / "checkpoints" / "last.ckpt").exists() or torch.load(
                    tmp_path / "checkpoints" / "last.ckpt", weights_only=True
                )
                saved.append(trainer.global_step)

        options = {"checkpoints": {"every_n_steps": 3}, "max_steps": 7, "max_epochs": None, "val_check_interval": 5.0}
        Training(tmp_path, Steps(), model(), callbacks=[Saves()], **options).fit()
        assert saved == [3, 6, 7, 7]  # at the end, after the validation, the best and the last
        names = ["best.ckpt", "last.ckpt", "previous.ckpt"]
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names

    def test_time_is_counted_from_the_first_step_of_each_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        clock = [0.0]
        monkeypatch.setattr("stu.training.callbacks.time.monotonic", lambda: clock[0])

        class Takes(L.Callback):
            def on_train_batch_start(self, *arguments: Any) -> None:
                clock[0] += 1.0  # a step

        options = {"max_steps": 3, "max_epochs": None, "val_check_interval": 1.0}
        training = Training(tmp_path, Steps(), model(), callbacks=[Takes()], **options)
        training.checkpoints.load_state_dict({"best_value": None, "best_step": 0, "seconds": 7.0})  # of earlier starts
        clock[0] += 1000.0  # what else starts
        assert training.fit().checkpoints.seconds_trained == 7 + 3
        clock[0] += 1000.0  # the test
        assert training.checkpoints.seconds_trained == 7 + 3
        # a start that finds all steps done, as after a kill during the test, adds nothing
        again = Training(tmp_path, Steps(), model(), **options)
        clock[0] += 1000.0
        again.fit(tmp_path / "checkpoints" / "last.ckpt")
        clock[0] += 1000.0
        assert again.checkpoints.seconds_trained == 7 + 3
        assert again.trainer.global_step == 3

    def test_saved_when_minutes_have_passed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        clock = [0.0]
        monkeypatch.setattr("stu.training.callbacks.time.monotonic", lambda: clock[0])
        saved: list[int] = []

        class Saves(L.Callback):
            def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
                clock[0] += 30.0  # seconds a step

            def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
                saved.append(trainer.global_step)

        options = {"checkpoints": {"every_minutes": 1.0, "check_every": 50}, "max_steps": 9, "val_check_interval": 9.0}
        Training(tmp_path, Steps(), model(), callbacks=[Saves()], max_epochs=None, **options).fit()
        assert saved == [3, 6, 9, 9]  # due after more than two steps, however rare the checks of the weights are


class Poison(L.Callback):
    """Makes the loss of one batch NaN: the 1st, 2nd, …"""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx + 1 == self.batch:
            batch.targets.fill_(math.nan)


@pytest.mark.slow
class TestDivergence:
    @pytest.mark.parametrize(
        ("accumulate", "batch", "step"),
        [(1, 1, 1), (1, 6, 6), (1, 7, 7), (1, 8, 8), (2, 11, 6), (2, 12, 6), (2, 13, 7)],
    )
    def test_it_names_the_step_and_spares_the_last_good_checkpoint(
        self, tmp_path: Path, accumulate: int, batch: int, step: int
    ):
        """Looked for every third step only, but never missed before a checkpoint is written."""
        options = {"accumulate_grad_batches": accumulate, "max_epochs": 3, "val_check_interval": 5.0}
        options["checkpoints"] = {"every_n_steps": 4, "check_every": 3}
        training = Training(tmp_path, Steps(), model(), callbacks=[Poison(batch)], **options)
        with pytest.raises(Diverged, match=f"not finite at step {step}$"):
            training.fit()
        last = tmp_path / "checkpoints" / "last.ckpt"
        good = (step - 1) // 4 * 4
        if not good:
            assert not last.exists()
            return
        saved = torch.load(last, weights_only=True)
        assert saved["global_step"] == good
        assert all(w.isfinite().all() for w in saved["state_dict"].values())
        training.csv.rewind(good)
        again = Training(tmp_path, Steps(), model(), **options).fit(last)  # without the poison it gets to its end
        assert again.trainer.global_step == 12
        never = Training(tmp_path / "never", Steps(), model(), **options).fit()
        assert again.rows("train/loss") == never.rows("train/loss")
        for name, weight in never.module.state_dict().items():
            assert torch.equal(again.module.state_dict()[name], weight), name

    def test_a_validation_that_is_not_finite_is_not_the_best(self, tmp_path: Path):
        class Sometimes(Steps):
            def metrics(self) -> dict[str, Metric]:
                return {"mse": Nth([3.0, math.nan, 2.0, 5.0])}

        training = Training(tmp_path, Sometimes(), model(), max_steps=4, val_check_interval=1)
        with pytest.raises(Diverged, match="validation loss is not finite after step 2"):
            training.fit()
        assert list(map(str, training.rows("val/mse").values())) == ["3.0", "nan"]
        assert (training.checkpoints.best_step, training.checkpoints.best_value) == (1, 3.0)
        for name in ("best", "last"):
            saved = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)
            assert saved["global_step"] == 1


class Nth(Metric):
    """One given value after the other, whatever it sees; a validation that is only tried takes none."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = iter(values)
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.seen += len(target)

    def compute(self) -> Tensor:
        whole = sum(Steps().splits.val.lengths)
        return torch.tensor(next(self.values) if self.seen == whole else math.nan)


@pytest.mark.parametrize("name", MODELS)
def test_golden_trajectory(name: str, tmp_path: Path):
    losses = trajectory(tmp_path, name)
    assert len(losses) == 20
    golden = read_trajectories()
    assert name in golden, "a new model: make generate writes its trajectory"
    assert losses == pytest.approx(golden[name], rel=1e-4)


def test_no_golden_trajectory_of_a_model_that_is_gone():
    assert set(read_trajectories()) <= set(MODELS)
