"""Figures of a run: they show what the model does, and never cost the run."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.testing import assert_close

from data.systems.lds import LDS, LDSData
from stu import STU, Backbone, SequenceModel
from stu.cli.check import check
from stu.errors import OptionError
from stu.rollout import batch_rollout
from stu.task import Batch, Rollout, Splits, Task
from stu.training import Figures, MetricsCSV, WandbLog, figures, plots
from stu.training.trackers import log_figure
from tests import runs
from tests.models import composed, small_backbone
from tests.runs import Training
from tests.training.test_training import Lengths, Steps

PNG = b"\x89PNG\r\n\x1a\n"


def lds(**options: Any) -> LDS:
    return LDS(seq_len=16, causal=True, data=LDSData(seq_len=16, train=8, val=3, test=3, **options))


def network(task: Task, model: str = "stu") -> SequenceModel:
    torch.manual_seed(7)
    return SequenceModel(task.encoder(8), small_backbone(model, seq_len=task.seq_len), task.head(8))


@torch.no_grad()
def evaluated(function: Callable[..., Any], model: nn.Module, *arguments: Any) -> Any:
    """What a function makes of a model as the callback has it: in eval mode, without gradients."""
    return function(model.eval(), *arguments)


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said on the error output, without Lightning's remarks."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO: ")]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# --- what is shown ---


class Convolution(nn.Module):
    """Of a kernel (L, O, C), and a constant."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Parameter(kernel)

    def forward(self, inputs: Tensor, mask: None) -> Tensor:
        length = inputs.shape[1]
        lagged = [torch.einsum("oc,blc->blo", h, inputs[:, : length - i]) for i, h in enumerate(self.kernel)]
        return 3.0 + sum(nn.functional.pad(y, (0, 0, i, 0)) for i, y in enumerate(lagged))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_models_response_is_its_kernel(dtype: torch.dtype):
    kernel = torch.randn(6, 2, 5)  # (L, O, C)
    found = figures.impulse_response(Convolution(kernel).to(dtype), 6, 5)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert_close(torch.from_numpy(found), kernel[..., : figures.INPUTS], rtol=0, atol=tolerance)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_truth_is_that_of_the_targets(normalize: bool):
    task = lds(spectrum="complex", radius=0.9, d_input=2, normalize=normalize)
    inputs, targets = task.datasets().test[1]
    response = task.impulse_response(16)
    expected = [sum(response[i] @ inputs[t - i] for i in range(t + 1)) for t in range(16)]
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-5)


def test_truth_and_model_are_compared_where_both_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "LAGS", 9)
    task = lds(d_input=5, d_output=2)
    truth, found = evaluated(figures.responses, network(task), task)
    assert truth.shape == found.shape == (9, 2, 3)
    np.testing.assert_array_equal(truth, task.impulse_response(9)[..., :3])


def test_predictions_are_those_without_padding():
    task = Steps()
    model, examples = network(task), Lengths(3, 7)
    targets, predicted = evaluated(figures.predictions, model, task, examples, 4)
    assert [len(t) for t in targets] == list(examples.lengths[:4])
    for index, (target, prediction) in enumerate(zip(targets, predicted, strict=True)):
        inputs, expected = examples[index]
        np.testing.assert_array_equal(target, expected)
        alone = evaluated(lambda model: model(torch.as_tensor(inputs)[None])[0].numpy(), model)  # noqa: B023
        np.testing.assert_allclose(prediction, alone, rtol=0, atol=1e-5)


class Whole(Lengths):
    """Sequences of the same length."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__(seed, size)
        random = np.random.default_rng(seed)
        self.inputs = [random.standard_normal((12, 2), np.float32) for _ in range(size)]
        self.targets = [x.cumsum(0)[:, :1] for x in self.inputs]
        self.lengths = np.full(size, 12)


class Running(Steps):
    """With rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = Splits(Whole(1, 8), Whole(2, 3), Whole(3, 3))
        self.rollout = Rollout(4, 9, dict)


class Last(Whole):
    """One target per sequence."""

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs[index], self.targets[index][-1, 0]


class Ends(Steps):
    """Predict the last value alone."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = Splits(Last(1, 8), Last(2, 3), Last(3, 3))

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return prediction[:, -1, 0], batch.targets


def test_a_rollout_starts_after_its_context(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "STEPS", 5)
    task = Running()
    model, examples = network(task), task.datasets().val
    targets, predicted = evaluated(figures.rollouts, model, task, task.rollout, examples, 2)
    batch = task.collate([examples[0], examples[1]])
    expected, _ = evaluated(lambda model: batch_rollout(model, batch, context=4, horizon=9), model)
    np.testing.assert_array_equal(targets, batch.targets[:, 3:8].numpy())
    np.testing.assert_allclose(predicted, expected[:, :5].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(np.float32(1), False), (3, False), (np.arange(4), False), (np.ones((4, 2), int), False), (np.ones((4, 2)), True)],
)
def test_trajectories_are_reals_at_every_step(target: Any, expected: bool):
    assert figures.has_trajectories([(np.zeros((4, 1)), target)]) is expected


def test_each_bank_of_filters_is_shown_once():
    task = Steps()
    assert figures.filter_banks(network(task, "transformer").backbone) == []
    [bank] = figures.filter_banks(network(task).backbone)  # of two blocks
    assert torch.equal(bank, STU(8, seq_len=12, num_filters=6).filters)
    mixers = [partial(STU, seq_len=12, num_filters=6, k_u=k_u, causal=False) for k_u in (0, 1)]
    hybrid = Backbone(8, depth=3, mixer=mixers, channel_mixer=None)
    assert [b.shape for b in figures.filter_banks(hybrid)] == [(12, 12), (12, 13)]


# --- how ---


def curves(figure: Figure, axes: int) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata()) for line in figure.axes[axes].lines]


def test_trajectories_end_at_the_last_step():
    targets = [np.random.default_rng(n).standard_normal((n, 5)) for n in (3, 500)]
    figure = plots.trajectories(targets, [t + 1 for t in targets])
    assert len(figure.axes) == 2 * plots.OUTPUTS
    for axes, sequence, output in ((0, 0, 0), (1, 1, 0), (3, 1, 1)):
        expected = targets[sequence][-plots.STEPS :, output]
        for found, wanted in zip(curves(figure, axes), (expected, expected + 1), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert figure.axes[1].lines[0].get_xdata()[-1] == 499
    assert figure.axes[1].get_title() == "sequence 1: mean squared error 1"


def test_impulse_responses_stand_at_their_output_and_input():
    truth = np.random.default_rng(0).standard_normal((10, 5, 2))
    figure = plots.impulse_responses(truth, 0.5 * truth)
    assert len(figure.axes) == plots.OUTPUTS * 2
    for found, wanted in zip(curves(figure, 3), (truth[:, 1, 1], 0.5 * truth[:, 1, 1]), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert figure.axes[0].get_title() == "input 0: relative error 0.5"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (5, 30), (5000, 4)])
def test_every_figure_can_be_written(tmp_path: Path, shape: tuple[int, int]):
    values = torch.randn(shape)
    banks = [values] * 5
    for figure in (
        plots.filters(banks),
        plots.impulse_responses(values[..., None].numpy(), values[..., None].numpy()),
        plots.trajectories([values.numpy()], [np.full(shape, np.nan)]),
    ):
        figures.save(figure, tmp_path / "new" / "one.png")
        assert names(tmp_path / "new") == ["one.png"]
        assert (tmp_path / "new" / "one.png").read_bytes().startswith(PNG)


def test_filters_are_looked_at_from_the_first_lag_to_the_last():
    bank = torch.randn(5000, 12)
    drawn = curves(plots.filters([bank]), 0)
    assert len(drawn) == plots.CURVES
    assert len(drawn[0]) <= plots.POINTS
    for curve, column in zip(drawn, bank.T.double().numpy(), strict=False):
        assert (curve[0], curve[-1]) == (column[0], column[-1])


# --- when ---


def trained(folder: Path, task: Task | None = None, model: str = "stu", **options: Any) -> Training:
    """Four steps and two validations, and the test, as train.py does it, with figures."""
    task = task or lds(d_input=1, d_output=1)
    callback = Figures(folder / "figures", **options)
    training = Training(folder, task, network(task, model), val_check_interval=1.0, callbacks=[callback]).fit()
    training.trainer.test(training.module, training.data, verbose=False)
    return training


def test_the_best_weights_are_drawn_after_the_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training = trained(tmp_path)
    assert training.plan.total_steps == 4
    best = training.checkpoints.best_step
    whole = [f"{name}-step{best:07d}.png" for name in ("filters", "impulse-response", "predictions-test")]
    assert names(tmp_path / "figures") == whole
    assert notes(capsys) == []


@pytest.mark.slow
def test_every_validation_is_drawn_if_asked_for(tmp_path: Path):
    training = trained(tmp_path, when="validations")
    drawn = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert {name for name in drawn if "-val-" in name} == {f"predictions-val-step{n:07d}" for n in (2, 4)}
    assert {"filters-step0000002", "impulse-response-step0000004"} < drawn
    assert training.checkpoints.best_step in (2, 4)


def test_tasks_with_rollouts_show_them(tmp_path: Path):
    trained(tmp_path, Running(), "transformer")
    assert [name.partition("-step")[0] for name in names(tmp_path / "figures")] == [
        "predictions-test",
        "rollout-test",
    ]


def test_never_is_never(tmp_path: Path):
    trained(tmp_path, when="never")
    assert not (tmp_path / "figures").exists()


def test_where_there_is_nothing_to_draw_there_is_no_folder(tmp_path: Path):
    trained(tmp_path, Ends(), "transformer")
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_figures_change_nothing_that_is_computed(tmp_path: Path):
    with_them, without = (trained(tmp_path / when, when=when) for when in ("validations", "never"))
    runs.assert_identical(with_them.module.state_dict(), without.module.state_dict())
    assert with_them.rows("val/mse") == without.rows("val/mse")
    assert with_them.rows("train/loss") == without.rows("train/loss")


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training = Training(tmp_path, lds(), network(lds()), callbacks=[Figures(tmp_path / "figures")]).fit()
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda trainer: False))
    training.trainer.test(training.module, training.data, verbose=False)
    assert not (tmp_path / "figures").exists()


# --- and if not ---


def test_without_matplotlib_a_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trained(tmp_path / "lds", when="validations")
    [line] = notes(capsys)
    assert line == (
        "note: no figures of predictions-test, impulse-response, filters: "
        "matplotlib is not installed; pip install matplotlib"
    )
    trained(tmp_path / "never", when="never")
    assert notes(capsys) == []
    assert not list(tmp_path.rglob("figures"))


@pytest.mark.slow
@pytest.mark.parametrize("breaks", ["trajectories", "save", "log_figure", "predictions", "has_trajectories"])
def test_a_figure_that_fails_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], breaks: str
):
    def fail(*arguments: Any) -> Any:
        raise OSError("no space\nleft")

    monkeypatch.setattr(plots if breaks == "trajectories" else figures, breaks, fail)
    training = trained(tmp_path)
    lines = notes(capsys)
    assert len(lines) == (3 if breaks in ("save", "log_figure") else 1)
    what = "any kind" if breaks == "has_trajectories" else "predictions-test"
    step = training.checkpoints.best_step
    assert lines[0] == f"note: no figure of {what} at step {step}: OSError: no space left"
    assert training.module.evaluated["mse"] > 0


def test_filters_that_are_none_cost_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    task = Running()
    model = network(task, "transformer")
    monkeypatch.setattr(type(model.backbone.blocks[0].mixer), "filters", property(lambda mixer: "of coffee"))
    training = Training(tmp_path, task, model, callbacks=[Figures(tmp_path / "figures")]).fit()
    training.trainer.test(training.module, training.data, verbose=False)
    [line] = notes(capsys)
    assert line.startswith("note: no figure of filters at step ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("figures.when=sometimes", "never, end, validations"),
        ("figures.sequences=many", "must be an integer"),
        ("figures.often=true", "no such key"),
    ],
)
def test_the_command_line_refuses_what_there_is_not(override: str, message: str):
    with pytest.raises(OptionError, match=message):
        check(composed("task=lds", override.replace("figures.often", "+pictures.often")))


@pytest.mark.parametrize(("option", "value"), [("when", "often"), ("sequences", 0), ("sequences", 9)])
def test_impossible_options_are_named(tmp_path: Path, option: str, value: Any):
    with pytest.raises(OptionError, match=f"{option}={value}: must be"):
        Figures(tmp_path, **{option: value})


# --- where else ---


class Experiment:
    """As much of a W&B run as is touched."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def test_weights_and_biases_gets_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "one.png"
    figures.save(plots.filters([torch.randn(4, 2)]), file)
    shown: list[tuple[str, Path, int]] = []
    monkeypatch.setattr(WandbLog, "log_image", lambda self, *arguments: shown.append(arguments))
    log_figure(WandbLog(), "figures/filters", file, 5)
    log_figure(MetricsCSV(tmp_path / "metrics.csv"), "figures/filters", file, 5)
    assert shown == [("figures/filters", file, 5)]
    assert names(tmp_path) == ["one.png"]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_has_its_figures_in_its_folder_and_in_wandb(tmp_path: Path):
    """And a finished one, or one that is resumed with other figures, keeps them."""
    command = runs.small("task=lds", "model=stu", "trainer.max_steps=4", "name=run", "logger=wandb", "figures.when=end")
    done = runs.train(tmp_path, *command)
    assert (done.code, done.err) == (0, "")
    run = runs.run_of(tmp_path, "lds", "stu", "run")
    step = run.read_summary()["best"]["step"]
    files = sorted((run.figures).iterdir())
    assert [f.name for f in files] == [
        f"{name}-step{step:07d}.png" for name in ("filters", "impulse-response", "predictions-test")
    ]
    in_wandb = {file.read_bytes() for file in run.path.rglob("files/media/images/figures/*.png")}
    assert in_wandb == {file.read_bytes() for file in files}
    written = [file.stat().st_mtime_ns for file in files]
    again = runs.train(tmp_path, *command, "figures.when=validations")
    assert (again.code, again.err) == (0, "")
    assert sorted((run.figures).iterdir()) == files
    assert [file.stat().st_mtime_ns for file in files] == written
