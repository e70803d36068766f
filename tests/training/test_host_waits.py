"""Between two rows of the log, no training step waits for the device, and neither does a step of the validation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, distributed, nn
from torch._library.custom_ops import OPDEFS
from torchmetrics import MeanMetric

from stu.backbone import SequenceModel
from stu.cli.composition import build
from stu.task import Batch, Task
from stu.training.report import ProgressLines
from tests import runs, sources
from tests.host_waits import HostWait, OnMeta, Watched
from tests.models import MODELS, TASKS, composed, kinds_of_tasks
from tests.training.test_training import Steps, model

NEVER = 1000  # a log_every beyond the end of the run


def watch(monkeypatch: pytest.MonkeyPatch, folder: Path, task: Task, network: nn.Module, **options: Any) -> None:
    """Two steps and a validation; raises `HostWait` where they wait."""
    strategy = OnMeta()
    monkeypatch.setattr("stu.training.module.compute", strategy.results)
    monkeypatch.setattr("stu.training.report.SECONDS_BETWEEN_LINES", 0.0)
    options = {"log_every": NEVER, "max_steps": 2, "gradient_clip_val": 1.0} | options
    training = runs.Training(folder / "run", task, network, strategy=strategy, num_sanity_val_steps=0, **options)
    log = training.trainer.callbacks[0]
    training.trainer.callbacks.insert(1, ProgressLines(training.plan, log))
    with pytest.raises(Watched):
        training.fit()
    assert strategy.steps == 2 * options.get("accumulate_grad_batches", 1)
    assert strategy.validation_batches == len(training.data.val_dataloader())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data of all tests lie."""
    return tmp_path_factory.mktemp("data")


VARIANTS = ("gru", "mamba2_attention", "s4d_dfout", "stu_ar", "stu_attention")  # of other models here
CASES = [
    *(pytest.param(task, "stu", marks=() if task in kinds_of_tasks() else pytest.mark.thorough) for task in TASKS),
    *(
        pytest.param("lra_listops", name, marks=pytest.mark.thorough if name in VARIANTS else ())
        for name in MODELS
        if name != "stu"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_step_never_waits(task: str, name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chosen = f"task={task}", f"model={name}", *sources.overrides(task, data), f"paths.data={data}"
    config = composed(*runs.small(*chosen))
    of_task = build(config.task)
    of_task.prepare()
    width = config.model.d_model
    network = SequenceModel(of_task.encoder(width), build(config.model), of_task.head(width))
    watch(monkeypatch, tmp_path, of_task, network)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_step_with_padded_targets_never_waits(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    watch(monkeypatch, tmp_path, Steps(), model(dropout=0.1), **options)


def test_several_devices_do_not_ask_each_other_in_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def asked(loop: Any) -> None:
        raise HostWait("a broadcast")

    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", asked, raising=False)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        watch(monkeypatch, tmp_path, Steps(), model(norm="layer"))
    finally:
        distributed.destroy_process_group()


# --- each of these waits ---


class Reads(Steps):
    """A loss that is read."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss = super().loss(prediction, target)
        return loss if loss.item() < 9 else 9 * loss / loss.detach()


class Selects(Steps):
    """Steps selected by a mask, so that the device has to count them."""

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.mask is not None
        return prediction[batch.mask], batch.targets[batch.mask]


class Checks(Steps):
    """A metric that looks for NaN in every batch."""

    def metrics(self) -> Any:
        return {"mse": Mean()}


class Mean(MeanMetric):
    def update(self, prediction: Tensor, target: Tensor) -> None:  # type: ignore[override]
        super().update(prediction - target)


class Copies(Steps):
    """A number that is copied to the device in every step."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().loss(prediction, target) * torch.tensor([0.5], device=target.device).sum()


class Mixes(Steps):
    """A tensor of the host beside those of the device."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().loss(prediction[torch.arange(len(target))], target)


class Lists(L.Callback):
    """The losses of all steps."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        outputs["loss"].tolist()


class Shows(L.Callback):
    """A display of the loss of every step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        str(outputs["loss"])


class Picks(Steps):
    """Some of the steps, by a list of indices."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().loss(prediction[[0, 1]], target[:2])


WAITS: dict[str, tuple[type[Steps], dict[str, Any], str, str]] = {
    "reads": (Reads, {}, "_local_scalar_dense", "if loss.item() < 9"),
    "selects": (Selects, {}, "index.Tensor", "return prediction[batch.mask]"),
    "checks": (Checks, {}, "_local_scalar_dense", "super().update(prediction - target)"),
    "copies": (Copies, {}, "tensor", "torch.tensor([0.5]"),
    "picks": (Picks, {}, "__getitem__", "prediction[[0, 1]]"),
    "mixes": (Mixes, {}, "index.Tensor", "prediction[torch.arange"),
    "lists": (Steps, {"callbacks": [Lists()]}, "_to_copy", 'outputs["loss"].tolist()'),
    "shows": (Steps, {"callbacks": [Shows()]}, "__repr__", 'str(outputs["loss"])'),
    "logs": (Steps, {"log_every": 2}, "_local_scalar_dense", "float(cast(Metric, metric).compute())"),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_waits_is_named_with_its_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task, options, operation, line = WAITS[case]
    with pytest.raises(HostWait) as wait:
        watch(monkeypatch, tmp_path, task(), model(), **options)
    assert operation in str(wait.value)
    assert line in str(wait.value)


class Patched(L.Callback):
    """Replaces the body of an operator before the first step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, body: Callable[..., Tensor]) -> None:
        self.replace = lambda: monkeypatch.setattr(OPDEFS[name], "_init_fn", body)

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.replace()


def test_custom_operators_are_watched_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "stu::filter_convolution"
    body = OPDEFS[name]._init_fn

    def reading(*arguments: Any) -> Tensor:
        y = body(*arguments)
        return y if bool((y == y).all()) else y + 1

    with pytest.raises(HostWait, match=r"if bool\(\(y == y\)\.all\(\)\)"):
        watch(monkeypatch, tmp_path, Steps(), model(), callbacks=[Patched(monkeypatch, name, reading)])
