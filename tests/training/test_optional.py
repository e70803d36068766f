"""Optional callbacks: averages number by number, ends that are early and final, and what no run can bear."""

import copy
import json
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as theirs
from omegaconf import OmegaConf
from torch import Tensor
from torch.testing import assert_close

from stu.errors import OptionError
from stu.norm import BatchNorm
from stu.training import EMA, DeviceStats, EarlyStopping, Run, SequenceModule, Stopped, check_callbacks
from stu.training.optional import REFUSED, Average
from tests import runs
from tests.host_waits import DEVICE, NoHostWaits
from tests.models import composed
from tests.runs import Training, assert_identical
from tests.training.test_training import Steps, errors, model

ON_CPU = {"strategy": "auto", "accelerator": "cpu"}


class History(L.Callback):
    """The weights after each optimiser step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(copy.deepcopy(pl_module.model.state_dict()))


class Stops(L.Callback):
    """A SIGTERM after a step, or at a batch of the validation after it."""

    def __init__(self, step: int, batch: int | None = None) -> None:
        self.step, self.batch = step, batch

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step and self.batch is None:
            trainer.checkpoint_callback.signal_number = signal.SIGTERM

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, index: int, *rest: Any) -> None:
        if (trainer.global_step, index) == (self.step, self.batch):
            trainer.checkpoint_callback.signal_number = signal.SIGTERM


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def of_model(state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


class TestEMA:
    @pytest.mark.parametrize(("every", "start"), [(1, None), (2, 3)])
    def test_number_by_number(self, tmp_path: Path, every: int, start: int | None):
        history, decay = History(), 0.75
        ema = EMA(decay=decay, update_every_n_steps=every, update_starting_at_step=start)
        training = Training(tmp_path, Steps(), model(), callbacks=[history, ema], max_steps=9, max_epochs=None).fit()
        updates = [step for step in range(9) if step >= (start or 0) and step % every == 0]
        expected = {name: value.double() for name, value in statistics(history.weights[updates[0]]).items()}
        for step in updates[1:]:
            for name, value in statistics(history.weights[step]).items():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
        last = checkpoint(tmp_path)
        assert_close(
            {name: value.double() for name, value in statistics(of_model(last["state_dict"])).items()}, expected,
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip
        assert_identical(of_model(last["current_model_state"]), history.weights[-1])
        # what was validated is what the averages give
        network = model()
        network.load_state_dict(of_model(last["state_dict"]))
        found = {name: training.rows(f"val/{name}")[9] for name in ("loss", "mse")}
        assert found == pytest.approx(errors(network, training.data.splits.val), rel=1e-4)
        network.load_state_dict(history.weights[-1])
        assert found["loss"] != pytest.approx(errors(network, training.data.splits.val)["loss"], rel=1e-4)

    def test_until_it_starts_the_weights_are_evaluated(self, tmp_path: Path):
        rows = []
        for name, callbacks in (("a", [EMA(update_starting_at_step=5)]), ("b", [])):
            (tmp_path / name).mkdir()
            training = Training(tmp_path / name, Steps(), model(), callbacks=callbacks, max_steps=5).fit()
            rows.append(training.rows("val/loss"))
        assert rows[0] == rows[1]
        kept = [of_model(checkpoint(tmp_path / name, "best")["state_dict"]) for name in ("a", "b")]
        assert_identical(*kept)

    @pytest.mark.parametrize("stop", [(3, None), (4, None), (4, 0), (4, 2)])
    def test_stopped_and_resumed_it_is_the_same(self, tmp_path: Path, whole: dict[str, Any], stop: Any):
        options: Any = {"max_steps": 9, "max_epochs": None, "accumulate_grad_batches": 2}
        first = Training(tmp_path, Steps(), model(dropout=0.1), callbacks=[EMA(decay=0.9), Stops(*stop)], **options)
        with pytest.raises(Stopped):
            first.fit()
        again = Training(tmp_path, Steps(), model(dropout=0.1), callbacks=[EMA(decay=0.9)], **options)
        again.fit(tmp_path / "checkpoints" / "last.ckpt")
        for name in ("last", "best"):
            assert_identical(parts(checkpoint(tmp_path, name)), whole[name])
        assert {4, 8, 9} == set(again.rows("val/loss"))

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("whole")
        torch.use_deterministic_algorithms(True)
        options: Any = {"max_steps": 9, "max_epochs": None, "accumulate_grad_batches": 2}
        Training(folder, Steps(), model(dropout=0.1), callbacks=[EMA(decay=0.9)], **options).fit()
        return {name: parts(checkpoint(folder, name)) for name in ("last", "best")}

    def test_later_evaluations_are_of_the_weights_that_they_are_given(self, tmp_path: Path):
        training = Training(tmp_path, Steps(), model(), callbacks=[EMA(decay=0.9)], max_steps=6).fit()
        weights = checkpoint(tmp_path, "best")["state_dict"]
        training.module.load_state_dict(weights)
        training.trainer.validate(training.module, training.data, verbose=False)
        assert training.module.evaluated["mse"] == pytest.approx(training.checkpoints.best_value, rel=1e-6)
        assert_identical(dict(training.module.state_dict()), weights)

    def test_a_copy_of_the_data_is_not_made(self, tmp_path: Path):
        class Uncopied(Steps):
            def __deepcopy__(self, memo: Any) -> Any:
                raise AssertionError("the task was copied")

        Training(tmp_path, Uncopied(), model(), callbacks=[EMA()], max_steps=1).fit()


def test_no_step_waits_for_the_averages():
    module = SequenceModule(model(), Steps()).to(DEVICE)
    average = Average(module.model, 0.9, DEVICE)
    with NoHostWaits():
        for _ in range(3):
            average.update_parameters(module)
    assert int(average.n_averaged) == 3


def parts(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states")}


def statistics(state: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, and the means and variances that evaluations use."""
    network = model()
    network.load_state_dict(state)
    found = {name: p.detach() for name, p in network.named_parameters()}
    norms = {name: norm for name, norm in network.named_modules() if isinstance(norm, BatchNorm)}
    assert norms
    for name, norm in norms.items():
        found[f"{name}.mean"], found[f"{name}.var"] = norm._averages()
    return found


class Given(L.Callback):
    """In the place of what a validation finds."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.on_validation_epoch_end = lambda: self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.evaluated = {"loss": 1.0, "mse": self.values[trainer.global_step - 1]}


def ended(folder: Path, values: tuple[float, ...], *more: L.Callback, mode: str = "min", **options: Any) -> Training:
    early = EarlyStopping(**options)
    task = Steps(mode=mode)
    callbacks = [Given(*values), early, *more]
    return Training(folder, task, model(), callbacks=callbacks, max_steps=len(values), val_check_interval=1)


class TestEarlyStopping:
    @pytest.mark.parametrize(
        ("values", "mode", "options", "steps", "why"),
        [
            ((5.0, 4.0, 4.0, 4.5, 1.0), "min", {"patience": 2}, 4, "val/mse has not improved in 2 validations"),
            ((5.0, 4.0, 4.0, 4.5, 1.0), "min", {"patience": 3}, 5, ""),
            ((1.0, 2.0, 1.0, 3.0, 2.9), "max", {"patience": 2}, 5, ""),
            ((1.0, 2.0, 1.0, 1.9, 9.0), "max", {"patience": 2}, 4, "val/mse has not improved in 2 validations"),
            ((5.0, 4.9, 4.8, 1.0), "min", {"patience": 2, "min_delta": 0.5}, 3, "has not improved in 2 validations"),
            ((5.0, 4.0, 0.5, 9.0), "min", {"stopping_threshold": 1.0}, 3, "val/mse is better than 1"),
            ((5.0, 11.0, 1.0), "min", {"divergence_threshold": 10.0}, 2, "val/mse is worse than 10"),
            ((5.0, 4.0, 3.0), "min", {"patience": 1, "monitor": "val/loss"}, 2, "val/loss has not improved in 1"),
        ],
    )
    def test_when(self, tmp_path: Path, values: Any, mode: str, options: dict[str, Any], steps: int, why: str):
        training = ended(tmp_path, values, mode=mode, **options).fit()
        assert training.trainer.global_step == steps
        assert list(training.rows("val/mse")) == list(range(1, steps + 1))
        early: Any = training.trainer.early_stopping_callback
        assert why in early.why
        assert bool(why) == bool(early.why)

    def test_a_resumed_run_goes_on_counting_and_an_ended_one_is_ended(self, tmp_path: Path):
        values = (5.0, 6.0, 6.0, 6.0, 1.0)
        with pytest.raises(Stopped):
            ended(tmp_path, values, Stops(3), patience=3).fit()
        last = tmp_path / "checkpoints" / "last.ckpt"
        assert ended(tmp_path, values, patience=3).fit(last).trainer.global_step == 4
        # killed after its last checkpoint, and before the test
        again = ended(tmp_path, values, patience=3).fit(last)
        assert again.trainer.global_step == 4
        assert again.trainer.early_stopping_callback.why == "val/mse has not improved in 3 validations"  # type: ignore[union-attr]
        assert list(again.rows("val/mse")) == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"patience": 0}, "patience=0: must be at least 1"),
            ({"min_delta": -1.0}, "min_delta=-1.0: must be at least 0"),
            ({"monitor": "val/accuracy"}, "monitor=val/accuracy: must be one of loss, mse, or null for mse"),
            ({"mode": "max"}, "mode=max: must be min or null"),
            ({"monitor": "other"}, "mode=None: must be min or max"),
        ],
    )
    def test_what_is_refused(self, options: dict[str, Any], match: str):
        class More(Steps):
            def metrics(self) -> Any:
                return super().metrics() | ({"other": super().metrics()["mse"]} if "other" in options.values() else {})

        with pytest.raises(OptionError, match=match):
            check_callbacks({"early_stopping": EarlyStopping(**options)}, ON_CPU, More())


class TestDeviceStats:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_each_row_once_also_after_a_stop(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int):
        from lightning.pytorch.accelerators import CPUAccelerator

        monkeypatch.setattr(CPUAccelerator, "get_device_stats", lambda *arguments: {"load": 0.5})
        monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", True)
        options: Any = {"accumulate_grad_batches": accumulate, "max_steps": 7, "max_epochs": None}
        with pytest.raises(Stopped):
            Training(tmp_path, Steps(), model(), callbacks=[DeviceStats(every_n_steps=2), Stops(4)], **options).fit()
        again = Training(tmp_path, Steps(), model(), callbacks=[DeviceStats(every_n_steps=2)], **options)
        again.fit(tmp_path / "checkpoints" / "last.ckpt")
        again.trainer.validate(again.module, again.data, verbose=False)
        lines = [line for line in again.csv.path.read_text().splitlines() if "device/" in line]
        assert lines == [f"{step},{step / 4},device/load,0.5" for step in (2, 4, 6)]

    def test_a_cpu_needs_psutil(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("stu.training.optional.find_spec", lambda name: None)
        with pytest.raises(OptionError, match=r"^callbacks.d=DeviceStats: .*pip install psutil"):
            check_callbacks({"d": DeviceStats()}, ON_CPU, Steps())
        monkeypatch.setattr("stu.training.optional.find_spec", lambda name: name)
        check_callbacks({"d": DeviceStats()}, ON_CPU, Steps())


class Mine(L.Callback):
    """One of a user."""


def made(kind: type) -> L.Callback:
    return kind.__new__(kind)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", [*REFUSED, theirs.EMAWeightAveraging, theirs.ModelCheckpoint, theirs.BackboneFinetuning]
)
def test_what_no_run_can_bear_is_refused_with_its_reason(kind: type):
    with pytest.raises(OptionError, match=rf"^callbacks.x={kind.__name__}: not supported: \w+"):
        check_callbacks({"x": made(kind)}, ON_CPU, Steps())


def test_all_of_lightnings_callbacks_are_known():
    """What a later version adds is refused until it is tried."""
    for name in theirs.__all__:
        kind = getattr(theirs, name)
        if kind is theirs.Callback:
            continue
        borne = kind in (theirs.ModelSummary, theirs.RichModelSummary, theirs.LambdaCallback)
        assert borne or issubclass(kind, tuple(REFUSED)), f"{name} is neither borne nor refused with a reason"
    with pytest.raises(OptionError, match="not known to work"):
        check_callbacks({"x": type("New", (theirs.Callback,), {"__module__": "lightning.new"})()}, ON_CPU, Steps())


def test_what_can_be_borne():
    mine = {"mine": Mine(), "more": Mine(), "c": theirs.ModelSummary()}
    check_callbacks({"a": EMA(), "b": EarlyStopping()} | mine, ON_CPU, Steps())
    with pytest.raises(OptionError, match=r"^callbacks\.b=EMA: there is one already, callbacks\.a;"):
        check_callbacks({"a": EMA(), "b": EMA()}, ON_CPU, Steps())


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("strategy", {"_target_": "stu.training.FullyShard"}, "needs whole weights"),
        ("strategy", {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}, "needs whole weights"),
        ("strategy", {"_target_": "lightning.pytorch.strategies.DDPStrategy"}, None),
        ("precision", "bf16-true", "would not move"),
        ("precision", "bf16-mixed", None),
    ],
)
def test_where_there_are_averages(option: str, value: Any, reason: str | None):
    with pytest.raises(OptionError, match=rf"^callbacks\.a=EMA: {reason}") if reason else nullcontext():
        check_callbacks({"a": EMA()}, ON_CPU | {option: value}, Steps())


def test_as_a_user_does_it(tmp_path: Path):
    """Averages and an early end together: finished, repeated, tested with and without the callbacks."""
    chosen = ["callbacks=[ema,early_stopping]", "callbacks.early_stopping.divergence_threshold=0", "name=a"]
    command = runs.small(
        "task=lds",
        "model=stu",
        "log_every=5",
        "+callbacks.mine={_target_: lightning.pytorch.callbacks.ModelSummary}",
        *chosen,
    )
    done = runs.train(tmp_path, *command)
    assert (done.code, done.err) == (0, "")
    run = runs.run_of(tmp_path, "lds", "stu", "a")
    summary = run.read_summary()
    assert (summary["steps"], summary["stopped_early"]) == (10, "val/mse is worse than 0")
    assert "stopped early" in done.out
    assert "after step 10: val/mse is worse than 0" in " ".join(done.out.split())
    rows = [line.split(",")[0] for line in run.metrics.read_text().splitlines() if ",test/mse," in line]
    assert rows == ["10"]
    again = runs.train(tmp_path, *command)
    assert again.code == 0
    assert again.out.partition("Result")[2] == done.out.partition("Result")[2]
    refused = runs.train(tmp_path, *(word for word in command if "callbacks" not in word))
    assert refused.code == 2
    assert "callbacks.early_stopping.divergence_threshold (0 → absent)" in refused.err
    plain = [word for word in command if "callbacks" not in word and not word.startswith("name=")]
    tested = runs.train(tmp_path, *plain, "mode=test", "name=b", f"checkpoint={run.best}")
    assert f"test mse {summary['test']['mse']:.4g}" in " ".join(tested.out.split())


def test_a_run_that_was_made_before_there_were_these_options_goes_on(tmp_path: Path):
    config: Any = OmegaConf.to_container(composed("task=lds"), resolve=True)
    before = copy.deepcopy(config)
    del before["callbacks"], before["model"]["checkpoint_blocks"]
    del before["trainer"]["limit_train_batches"], before["trainer"]["overfit_batches"]
    run = Run(tmp_path / "earlier")
    run.open(before, overwrite=False)
    run.close()
    assert run.changes(config) == []
    run = Run(tmp_path / "run")
    run.open({"seed": 0}, overwrite=False)
    run.close()
    changes = run.changes({"seed": 0, "callbacks": {"ema": {"_target_": "stu.training.EMA", "decay": 0.999}}})
    assert changes == ["callbacks.ema._target_ (absent → stu.training.EMA)"]
    assert json.loads(run.manifest.read_text())["settings"] == {"seed": 0}
