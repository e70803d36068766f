"""Preconditioned targets: exact coefficients, the literal sum, original units everywhere, rollouts, refusals."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import stu
from data.memory.adding import Adding, AddingData
from data.systems.lds import LDS, LDSData
from stu.errors import OptionError
from stu.preconditioning import HIGHEST, Preconditioner
from stu.rollout import batch_rollout, rollout
from stu.task import Batch, collate
from tests import runs
from tests.test_rollout import forecast, sequence_model

KINDS = ("chebyshev", "legendre")
kinds = pytest.mark.parametrize("kind", KINDS)


def exact(kind: str, degree: int) -> list[Fraction]:
    """c_1 … c_n by the three-term recurrence of monic polynomials, p_{n+1} = z p_n − b_n p_{n−1}."""
    before, now = [Fraction(0)], [Fraction(1)]
    for n in range(degree):
        legendre = Fraction(n * n, 4 * n * n - 1)
        b = legendre if kind == "legendre" else Fraction(1, 2) if n == 1 else Fraction(1, 4)
        now, before = (
            [x - b * y for x, y in zip([*now, Fraction(0)], [Fraction(0), Fraction(0), *before], strict=False)],
            now,
        )
    return now[1:]


def literal(coefficients, outputs: Tensor) -> Tensor:
    """Σ c_i y_{t−i}, one step, one lag at a time."""
    past = torch.zeros_like(outputs)
    for t in range(outputs.shape[1]):
        for i, c in enumerate(coefficients, 1):
            if t >= i:
                past[:, t] += c * outputs[:, t - i]
    return past


@kinds
@pytest.mark.parametrize("degree", [*range(12), 20, HIGHEST])
def test_coefficients_are_exact(kind, degree):
    found = Preconditioner(kind, degree)
    expected = [float(c) for c in exact(kind, degree)]
    assert found.coefficients == pytest.approx(expected, rel=1e-13, abs=1e-16 * (1 + found.norm))
    assert all(c == 0 for c in found.coefficients[::2])
    points = np.linspace(-1, 1, 999)
    largest = np.abs(np.polyval([1, *expected], points)).max()
    assert kind == "legendre" or largest == pytest.approx(2.0 ** (1 - degree) if degree else 1, rel=1e-3)


def test_the_size_of_the_coefficients():
    norms = [1 + Preconditioner("chebyshev", n).norm for n in (10, 20, HIGHEST)]
    root = 1 + math.sqrt(2)
    assert norms == pytest.approx([(root**n + (2 - root) ** n) / 2**n for n in (10, 20, HIGHEST)])
    assert [round(norm) for norm in norms] == [7, 43, 413]


@kinds
@pytest.mark.parametrize("degree", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("length", [1, 4, 17])
def test_the_past_is_the_literal_sum(kind, degree, length):
    found, y = Preconditioner(kind, degree), torch.randn(3, length, 2, dtype=torch.float64)
    assert_close(found.past(y), literal(found.coefficients, y), rtol=0, atol=1e-14)
    assert_close(
        found.next_past(y), literal(found.coefficients, torch.cat((y, y[:, :1]), 1))[:, -1], rtol=0, atol=1e-14
    )
    combined = y + found.past(y)
    assert_close(torch.from_numpy(found.simulated(combined[0].numpy())), y[0], rtol=0, atol=1e-12)


def test_degree_32_in_float32():
    found, y = Preconditioner("chebyshev", HIGHEST), torch.randn(1, 500, 1, dtype=torch.float64)
    error = found.past(y.float()).double() - found.past(y)
    assert 0 < error.abs().max() < 413 * 6e-8 * y.abs().max()


def lds(**options) -> LDS:
    return LDS(seq_len=16, causal=True, data=LDSData(seq_len=16, train=8, val=2, test=4, **options))


def preconditioned(task, kind: str = "chebyshev", degree: int = 3):
    task.precondition(Preconditioner(kind, degree))
    return task


def test_only_the_outputs_before_enter():
    task, prediction, targets = preconditioned(lds()), torch.zeros(1, 16, 3), torch.randn(1, 16, 3)
    before, _ = task.scored(prediction, Batch(torch.zeros(1, 16, 3), targets, None))
    targets[:, 9:] = 100.0
    after, _ = task.scored(prediction, Batch(torch.zeros(1, 16, 3), targets, None))
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10:], after[10:])


def test_the_loss_is_that_of_the_combination_on_real_steps():
    task, plain = preconditioned(lds()), lds()
    sequences = [(np.ones((n, 3), np.float32), np.random.default_rng(n).normal(size=(n, 3))) for n in (5, 16, 2)]
    batch = collate(sequences)
    prediction = torch.randn(3, 16, 3, dtype=torch.float64)
    combined = batch._replace(targets=batch.targets + literal(task.preconditioner.coefficients, batch.targets))
    found, expected = task.loss(*task.scored(prediction, batch)), plain.loss(*plain.scored(prediction, combined))
    assert_close(found, expected)
    assert torch.equal(task.scored(prediction, batch)[1], plain.scored(prediction, batch)[1])  # in original units


def test_degree_0_changes_nothing():
    task = preconditioned(lds(), degree=0)
    assert task.preconditioner is None
    assert task.references() == task.baselines()


@pytest.mark.parametrize(("kind", "degree"), [("hermite", 2), ("chebyshev", -1), ("legendre", HIGHEST + 1)])
def test_what_is_refused(kind, degree):
    with pytest.raises(OptionError, match=r"polynomial=hermite: must be one of|degree=.*must be in 0 … 32"):
        Preconditioner(kind, degree)


def test_other_targets_are_refused():
    task = Adding(seq_len=8, causal=True, pool="last", data=AddingData(seq_len=8))
    with pytest.raises(OptionError, match=r"precondition=legendre: needs real targets at every step"):
        preconditioned(task, "legendre")


def test_baselines_know_as_much():
    """On a system of two states, two past outputs are all that least squares needs."""
    task = preconditioned(lds(d_state=2, radius=0.999), degree=2)
    found = task.references()
    assert task.baselines().keys() < found.keys()
    assert found["past outputs: least squares"] < 1e-10
    targets = np.stack([task.datasets().test[i][1] for i in range(4)]).astype(np.float64)
    past = literal(task.preconditioner.coefficients, torch.from_numpy(targets)).numpy()
    assert found["past outputs: fixed"] == pytest.approx(np.square(targets + past).mean())
    last = np.concatenate((np.zeros((4, 1, 3)), targets[:, :-1]), 1)
    assert found["past outputs: last"] == pytest.approx(np.square(targets - last).mean())
    assert set(task.trivial) == {"zero", "static", "fir", "past outputs: last", "past outputs: fixed"}


@pytest.mark.parametrize("context", [1, 2, 10])
@torch.no_grad()
def test_a_rollout_uses_its_own_predictions(context, tmp_path):
    """Against `forward` over growing prefixes, with outputs replaced by predictions from the context on."""
    model = sequence_model("stu", inputs=3, outputs=3)
    found = Preconditioner("legendre", 4)
    samples = torch.randn(2, context + 6, 3, dtype=torch.float64)
    inputs, predictions = samples[:, :context], []
    for _ in range(6):
        outputs = torch.cat((inputs[:, 1:], torch.zeros(2, 1, 3, dtype=torch.float64)), 1)  # y_{t} = x_{t+1}
        predictions.append((model(inputs) - literal(found.coefficients, outputs))[:, -1])
        inputs = torch.cat((inputs, predictions[-1][:, None]), 1)
    assert_close(
        rollout(model, samples[:, :context], 6, None, found), torch.stack(predictions, 1), rtol=1e-9, atol=1e-9
    )


@torch.no_grad()
def test_the_first_step_of_a_rollout_is_the_scored_one(tmp_path):
    task = preconditioned(forecast(tmp_path), degree=5)
    task.prepare()
    batch = task.collate(list(task.datasets().test))
    model = sequence_model("stu", inputs=3, outputs=3, dtype=torch.float32)
    scored = task.restored(model(batch.inputs), batch.targets)
    first, _ = batch_rollout(model, batch, context=10, horizon=1, preconditioner=task.preconditioner)
    assert_close(first[:, 0], scored[:, 9], rtol=1e-5, atol=1e-5)


def test_a_run_stays_in_original_units(tmp_path):
    """Trained, tested again, and refused without its preconditioner."""
    command = runs.small("task=lds", "model=stu", "precondition=chebyshev", "name=p", "trainer.max_steps=2")
    done = runs.train(tmp_path, *command)
    assert (done.code, done.err) == (0, "")
    summary = runs.run_of(tmp_path, "lds", "stu", "p").read_summary()
    assert summary["baselines"].keys() >= {"arx", "past outputs: fixed", "past outputs: least squares"}
    assert "past outputs: fixed" in summary["trivial"]
    tested = runs.train(tmp_path, *command, "mode=test")
    assert f"{summary['test']['mse']:.4g}" in tested.out
    loaded = stu.load(runs.run_of(tmp_path, "lds", "stu", "p").path)
    with pytest.raises(OptionError, match=r"precondition=.*chebyshev.*: predictions need the outputs before"):
        loaded.predict([np.zeros((4, 3))])
    loaded.save(tmp_path / "exported")
    kept = {"polynomial": "chebyshev", "degree": 5, "inputs": False}
    assert stu.load(tmp_path / "exported").task["precondition"] == kept
    plain = [word for word in command if "precondition" not in word]
    refused = runs.train(tmp_path, *plain, "mode=test")
    assert refused.code == 2
    assert "precondition.degree (5 → 0)" in refused.err
    refused = runs.train(tmp_path, *runs.small("task=lra_listops", "model=stu", "precondition=legendre"))
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "precondition=legendre: needs real targets at every step" in refused.err
