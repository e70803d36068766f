"""Rollouts: `step` after `prefill` against `forward` over growing prefixes, for every model; in a Trainer, too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from data.systems.dynamics import Lorenz63, Pendulum
from data.systems.forecast import Forecast, TrajectoryData
from data.systems.lds import LDS, LDSData
from stu.backbone import SequenceModel
from stu.encoders import LinearEncoder
from stu.heads import StepHead
from stu.rollout import batch_rollout, rollout
from stu.task import Batch
from tests import runs
from tests.models import MODELS, small_backbone

SEQ_LEN = 24
models = pytest.mark.parametrize("name", MODELS)


def sequence_model(
    name: str, *, inputs: int, outputs: int, dtype: torch.dtype = torch.float64, **options
) -> SequenceModel:
    backbone = small_backbone(name, **{"seq_len": SEQ_LEN, **options})
    width = backbone.d_model
    model = SequenceModel(LinearEncoder(width, d_input=inputs), backbone, StepHead(width, d_output=outputs))
    with torch.no_grad():
        model.head.linear.weight.mul_(0.5)  # most rollouts stay in bounds
    return model.to(dtype).eval()


def naive(model: Callable[[Tensor], Tensor], context: Tensor, horizon: int, known: Tensor) -> Tensor:
    """`forward` over all inputs so far, again for every step."""
    inputs, predictions = context, []
    for step in range(horizon):
        predictions.append(model(inputs)[:, -1])
        if step < horizon - 1:
            latest = torch.cat((predictions[-1], known[:, step]), dim=1)
            inputs = torch.cat((inputs, latest[:, None]), dim=1)
    return torch.stack(predictions, dim=1)


@models
@pytest.mark.parametrize("forces", [0, 2])
@torch.no_grad()
def test_steps_are_forward_over_growing_prefixes(name, forces):
    model = sequence_model(name, inputs=3 + forces, outputs=3)
    inputs = torch.randn(2, SEQ_LEN, 3 + forces, dtype=torch.float64)
    for context, horizon in ((1, 24), (10, 15), (24, 1)):
        known = inputs[:, context : context + horizon - 1, 3:]
        found = rollout(model, inputs[:, :context], horizon, known)
        expected = naive(model, inputs[:, :context], horizon, known)
        assert found.shape == (2, horizon, 3)
        assert_close(found, expected, rtol=1e-6, atol=1e-9)
        if not forces:
            assert torch.equal(found, rollout(model, inputs[:, :context], horizon))


@models
@torch.no_grad()
def test_in_float32_too(name):
    model = sequence_model(name, inputs=3, outputs=3, dtype=torch.float32)
    context = torch.randn(2, 8, 3)
    found, expected = rollout(model, context, 16), naive(model, context, 16, torch.empty(2, 16, 0))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_streaming_by_states_at_length():
    model = sequence_model("stu", inputs=2, outputs=2, seq_len=520)
    context = torch.randn(1, 260, 2, dtype=torch.float64)
    found, expected = rollout(model, context, 40), naive(model, context, 40, torch.empty(1, 40, 0, dtype=torch.float64))
    assert_close(found, expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_a_batch_is_cut_where_its_targets_lie():
    """A model that repeats its last observation: step h of the rollout is the last observation of the context."""

    class Echo(nn.Module):
        """Prefill and step as a backbone has them."""

        def prefill(self, x):
            return x, None

        def step(self, x, state):
            return x, state

    class Head(nn.Module):
        def forward(self, x, mask):
            return x[..., :2] + x[..., 2:]  # with the force, so that a wrong one shows

    model = SequenceModel(nn.Identity(), Echo(), Head())
    samples = torch.arange(22.0).reshape(1, 11, 2)
    force = torch.tensor([0.0, 0.0, 0.0, 100.0, 1000.0, 1e4, 1e5, 1e6, 1e7, 1e8])[None, :, None]
    batch = Batch(torch.cat((samples[:, :-1], force), dim=2), samples[:, 1:], None)
    prediction, target = batch_rollout(model, batch, context=4, horizon=3)
    assert target.tolist() == [[[8, 9], [10, 11], [12, 13]]]
    assert prediction.tolist() == [[[106, 107], [1106, 1107], [11106, 11107]]]


@torch.no_grad()
def test_autocast_feeds_back_the_dtype_of_the_inputs():
    model = sequence_model("stu", inputs=3, outputs=3, dtype=torch.float32)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    context = torch.randn(2, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = rollout(model, context, 6)
    assert set(seen) == {torch.float32}
    assert_close(found.float(), rollout(model, context, 6), rtol=0.1, atol=0.1)


# --- in a Trainer ---


def forecast(folder: Path, **changes) -> Forecast:
    options = {
        "dir": str(folder),
        "system": Lorenz63(),
        "seq_len": SEQ_LEN,
        "dt": 0.05,
        "windows": 2,
        "tolerance": 1e-6,
    }
    data = TrajectoryData(**{**options, "train": 16, "val": 4, "test": 6, **changes})
    return Forecast(seq_len=SEQ_LEN, causal=True, context=10, horizon=8, threshold=0.4, data=data)


def test_which_tasks_have_rollouts(tmp_path):
    assert forecast(tmp_path).rollout[:2] == (10, 8)
    assert LDS(seq_len=4, causal=True, data=LDSData(seq_len=4)).rollout is None


@pytest.mark.parametrize(
    ("changes", "channels", "inputs"),
    [({}, 3, 3), ({"force": 5.0}, 3, 4), ({"system": Pendulum()}, 3, 3)],
    ids=["lorenz", "forced", "pendulum"],
)
def test_a_test_measures_rollouts(changes, channels, inputs, tmp_path):
    task = forecast(tmp_path / "data", **changes)
    task.prepare()
    model = sequence_model("stu", inputs=inputs, outputs=channels, dtype=torch.float32)
    training = runs.Training(tmp_path / "run", task, model.train(), max_epochs=1).fit()
    module, trainer = training.module, training.trainer
    trainer.validate(module, training.data, verbose=False)
    assert module.evaluated.keys() == {"loss", *task.metrics()}
    for _ in range(2):  # nothing is left of the first
        trainer.test(module, training.data, verbose=False)
        assert module.evaluated.keys() == {"loss", *task.metrics(), *task.rollout.metrics()}
        whole = task.collate(list(task.datasets().test))
        with torch.no_grad():
            run = batch_rollout(model.eval(), whole, context=10, horizon=8)
        for name, metric in task.rollout.metrics().items():
            metric.update(*run)
            assert module.evaluated[name] == pytest.approx(metric.compute().item(), rel=1e-4)


@pytest.mark.slow
def test_a_run_writes_them_down(tmp_path):
    """As a user does, in seconds."""
    command = runs.small("task=lorenz63", "model=stu", "name=free", "trainer.max_epochs=1")
    done = runs.train(tmp_path, *command)
    assert (done.code, done.err) == (0, "")
    summary = runs.run_of(tmp_path, "lorenz63", "stu", "free").read_summary()
    names = {"rollout_mse", "rollout_mse_last", "rollout_nmse", "rollout_r2", "rollout_valid_steps"}
    assert names | {"rollout_valid_lyapunov"} < summary["test"].keys()
    assert not names & summary["best"]["val"].keys()
    steps = summary["test"]["rollout_valid_steps"]
    assert 0 <= steps <= 33
    assert summary["test"]["rollout_valid_lyapunov"] == pytest.approx(steps * 0.02 * 0.906, rel=1e-5)
    assert "test rollout_nmse" in done.out
    assert {"persistence", "rollout: persistence", "rollout: linear, 8 lags"} < summary["baselines"].keys()
