"""Nonlinear systems against known facts, their trajectories in the cache, and the forecasting task."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from data.systems import dynamics, forecast
from data.systems.dynamics import DoublePendulum, Dynamics, Lorenz63, Lorenz96, Pendulum, VanDerPol, simulate
from data.systems.forecast import (
    BLOCK,
    LIMIT,
    R2,
    Autoregression,
    Forecast,
    RelativeError,
    RolloutR2,
    TrajectoryData,
    last_squared_error,
    squared_error,
    valid_steps,
)
from stu.cli.composition import build
from stu.errors import OptionError
from stu.task import Splits
from tests.models import composed

TASKS = ("pendulum", "double_pendulum", "lorenz63", "lorenz96", "van_der_pol")
SYSTEMS: tuple[Dynamics, ...] = (Pendulum(), DoublePendulum(), Lorenz63(), Lorenz96(sites=5), VanDerPol())
SMALL = {"seq_len": 16, "dt": 0.05, "windows": 2, "train": 5, "val": 3, "test": 4, "tolerance": 1e-6}

systems = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)
forced = pytest.mark.parametrize("force", [0.0, 2.0], ids=["unforced", "forced"])


def small(folder: Path, system: Dynamics = SYSTEMS[2], **changes) -> TrajectoryData:
    return TrajectoryData(**{"dir": str(folder), "system": system, **SMALL, **changes})


def task_of(data: TrajectoryData, **changes) -> Forecast:
    options = {"seq_len": data.seq_len, "causal": True, "context": None, "horizon": None, "threshold": 0.4}
    return Forecast(**{**options, **changes}, data=data)


def unforced(system: Dynamics, start, *, dt: float, steps: int, tolerance: float = 1e-10) -> np.ndarray:
    """(steps + 1, S, n)."""
    start = np.asarray(start, float)
    return simulate(system, start, np.zeros((1, start.shape[1])), dt=dt, hold=steps, tolerance=tolerance)


# --- the equations ---


def one_by_one(system: Dynamics, state, force: float) -> list[float]:
    """The equations as the books have them, for one trajectory."""
    match system:
        case Pendulum():
            angle, velocity = state
            return [velocity, -9.81 * math.sin(angle) + force]
        case Lorenz63():
            x, y, z = state
            return [10 * (y - x) + force, x * (28 - z) - y, x * y - 8 / 3 * z]
        case Lorenz96():
            n = len(state)
            return [(state[(i + 1) % n] - state[i - 2]) * state[i - 1] - state[i] + 8 + force for i in range(n)]
        case VanDerPol():
            x, velocity = state
            return [velocity, (1 - x * x) * velocity - x + force]
        case _:  # the form with both accelerations solved for; equal masses and lengths of 1
            a, b, p, q = state
            d, g = a - b, 9.81
            first = -g * 3 * math.sin(a) - g * math.sin(a - 2 * b)
            first -= 2 * math.sin(d) * (q * q + p * p * math.cos(d))
            second = 2 * math.sin(d) * (2 * p * p + 2 * g * math.cos(a) + q * q * math.cos(d))
            share = 3 - math.cos(2 * d)  # the force goes into the first row of the mass matrix alone
            torque = np.linalg.solve([[2, math.cos(d)], [math.cos(d), 1]], [force, 0])
            return [p, q, first / share + torque[0], second / share + torque[1]]


@systems
def test_derivatives_are_those_of_the_books(system):
    random = np.random.default_rng(0)
    states, forces = 3 * random.standard_normal((system.states, 7)), random.standard_normal(7)
    found = system.derivative(states, forces)
    expected = [one_by_one(system, *each) for each in zip(states.T, forces, strict=True)]
    np.testing.assert_allclose(found.T, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "system",
    [
        Pendulum(),
        Pendulum(length=0.5),
        DoublePendulum(),
        DoublePendulum(length1=0.7, mass1=2.0, mass2=0.3, length2=1.6),
    ],
    ids=str,
)
def test_energy_is_conserved_without_damping(system):
    random = np.random.default_rng(1)
    states = unforced(system, system.start(random.random((system.states, 8))), dt=0.05, steps=400)  # 20 s
    energy = system.energy(states.swapaxes(0, 1))
    assert np.ptp(states[:, 0], axis=0).min() > 0.1  # they do move
    np.testing.assert_allclose(energy, np.broadcast_to(energy[0], energy.shape), atol=1e-6)


@pytest.mark.parametrize("system", [Pendulum(damping=0.5), DoublePendulum(damping=0.5)], ids=str)
def test_damping_takes_energy_away(system):
    random = np.random.default_rng(1)
    states = unforced(system, system.start(random.random((system.states, 8))), dt=0.05, steps=1000)
    energy = system.energy(states.swapaxes(0, 1))
    assert (np.diff(energy, axis=0) < 1e-8).all()
    rest = system.energy(np.zeros((system.states, 1)))
    np.testing.assert_allclose(energy[-1], np.broadcast_to(rest, 8), atol=1e-2)


def test_the_pendulum_has_the_period_of_the_elliptic_integral():
    from scipy.special import ellipk

    angle = 2.0
    period = 4 * math.sqrt(1 / 9.81) * ellipk(math.sin(angle / 2) ** 2)
    states = unforced(Pendulum(), [[angle], [0.0]], dt=period / 50, steps=50)
    np.testing.assert_allclose(states[-1, :, 0], [angle, 0], atol=1e-8)
    np.testing.assert_allclose(states[25, :, 0], [-angle, 0], atol=1e-8)


def test_lorenz_63_rests_at_its_three_fixed_points():
    c = math.sqrt(8 / 3 * 27)
    points = np.array([[0, c, -c], [0, c, -c], [0, 27, 27]], float)
    np.testing.assert_allclose(Lorenz63().derivative(points, 0.0), 0, atol=1e-13)


def test_lorenz_96_rests_at_its_forcing_and_its_advection_conserves_energy():
    system = Lorenz96()
    np.testing.assert_array_equal(system.derivative(np.full((40, 1), 8.0), 0.0), 0)
    state = np.random.default_rng(2).standard_normal((40, 3))
    change = (state * system.derivative(state, 0.0)).sum(0)  # of Σ x²/2: −Σ x² + F Σ x
    np.testing.assert_allclose(change, (8 * state - state**2).sum(0), rtol=1e-10)


def test_van_der_pols_limit_cycle():
    """Amplitude 2.00862 and period 6.66329 for μ = 1."""
    states = unforced(VanDerPol(), [[0.1], [0.0]], dt=0.005, steps=16_000)[8_000:, :, 0]
    assert states[:, 0].max() == pytest.approx(2.00862, abs=1e-4)
    x = states[:, 0]
    rising = np.flatnonzero((x[:-1] < 0) & (x[1:] >= 0))
    crossings = rising - x[rising] / (x[rising + 1] - x[rising])
    assert np.diff(crossings).mean() * 0.005 == pytest.approx(6.66329, abs=1e-4)


@pytest.mark.parametrize("system", [Lorenz63(), Lorenz96()], ids=lambda system: type(system).__name__)
def test_lyapunov_exponents_are_about_those_stated(system):
    """The growth of small differences, rescaled at intervals, for many trajectories on the attractor at once."""
    random, interval, rounds = np.random.default_rng(3), 0.5, 40
    state = unforced(system, system.start(random.random((system.states, 16))), dt=15.0, steps=1, tolerance=1e-6)[-1]
    apart, growth = random.standard_normal(state.shape), []
    for _ in range(rounds):
        apart *= 1e-6 / np.linalg.norm(apart, axis=0)
        both = np.concatenate((state, state + apart), axis=1)
        state, other = np.split(unforced(system, both, dt=interval, steps=1, tolerance=1e-9)[-1], 2, axis=1)
        apart = other - state
        growth.append(np.log(np.linalg.norm(apart, axis=0) / 1e-6))
    assert np.mean(growth[5:]) / interval == pytest.approx(system.lyapunov, rel=0.1)


def test_exponents_are_known_for_published_parameters_alone(tmp_path):
    assert Lorenz63(rho=30.0).lyapunov is None
    assert Lorenz96(sites=36).lyapunov is None
    assert VanDerPol().lyapunov is None
    assert small(tmp_path).lyapunov_times == pytest.approx(0.906 * 0.05)
    assert small(tmp_path, force=1.0).lyapunov_times is None


# --- integration ---


def test_forces_hold_between_their_levels():
    """A small pendulum is linear: its exact answer to steps of the force."""
    system, dt, hold = Pendulum(damping=0.3), 0.1, 3
    levels = 1e-6 * np.random.default_rng(4).standard_normal((5, 2))
    states = simulate(system, np.zeros((2, 2)), levels, dt=dt, hold=hold, tolerance=1e-12)
    A = np.array([[0, 1], [-9.81, -0.3]])
    step = expm(np.block([[A, np.array([[0.0], [1.0]])], [np.zeros((1, 3))]]) * dt)
    expected = [np.zeros((2, 2))]
    for level in np.repeat(levels, hold, axis=0):
        expected.append(step[:2, :2] @ expected[-1] + step[:2, 2:] * level)
    assert len(states) == 16
    np.testing.assert_allclose(states, expected, atol=1e-9 * abs(np.array(expected)).max() + 1e-11)


@systems
def test_many_at_once_are_each_within_the_tolerance(system):
    random = np.random.default_rng(5)
    start = system.start(random.random((system.states, 6)))
    start[:, 0] *= 1.5
    together = unforced(system, start, dt=0.1, steps=10, tolerance=1e-8)
    for i in range(6):
        alone = solve_ivp(
            lambda _, x: system.derivative(x[:, None], 0.0)[:, 0], (0, 1), start[:, i], "RK45", rtol=1e-11, atol=1e-11
        )
        np.testing.assert_allclose(together[-1, :, i], alone.y[:, -1], atol=2e-6)


# --- the cache ---


@systems
@forced
def test_sequences_are_samples_of_trajectories(system, force, tmp_path):
    data = small(tmp_path, system, force=force, transient=0.3, hold=4)
    splits, (mean, std) = data.splits(), data.units()
    for name, split in zip(Splits._fields, splits, strict=True):
        raw = data.trajectories(name, 0)
        assert raw.shape == (BLOCK, 33, system.channels + (force > 0))
        samples = (raw - mean) / std
        assert len(split) == getattr(data, name)
        for i in range(len(split)):
            inputs, targets = split[i]
            assert inputs.dtype == targets.dtype == np.float32
            start = 16 * (i % 2)
            np.testing.assert_allclose(inputs, samples[i // 2, start : start + 16], atol=1e-6)
            np.testing.assert_allclose(targets, samples[i // 2, start + 1 : start + 17, : system.channels], atol=1e-6)


@systems
def test_the_next_sample_follows_from_state_and_force(system, tmp_path):
    """What the model sees determines what it should predict."""
    data = small(tmp_path, system, force=2.0, transient=0.35, hold=4, tolerance=1e-10)
    raw = data.trajectories("train", 0)
    mean, forces = raw[..., :-1], raw[..., -1]
    assert abs(forces).max() <= 2
    assert forces.std() == pytest.approx(2 / math.sqrt(3), rel=0.15)
    changes = np.flatnonzero(np.diff(forces, axis=1).any(0)) + 1
    assert set(changes % 4) == {1}  # 7 samples are discarded
    observed = mean.transpose(2, 0, 1)  # (C, BLOCK, T)
    match system:
        case Pendulum():
            states = np.stack((np.arctan2(observed[0], observed[1]), observed[2]))
        case DoublePendulum():
            states = np.concatenate((np.arctan2(observed[:2], observed[2:4]), observed[4:]))
        case _:
            states = observed
    for t in (0, 1, 12, 30):
        after = simulate(system, states[..., t], forces[None, :, t], dt=0.05, hold=1, tolerance=1e-10)[-1]
        np.testing.assert_allclose(system.observe(after), observed[..., t + 1], atol=1e-6)


def test_transients_are_discarded(tmp_path):
    data = small(tmp_path)
    late = replace(data, transient=0.4)  # 8 samples
    np.testing.assert_allclose(late.trajectories("val", 0)[:, :-8], data.trajectories("val", 0)[:, 8:], atol=1e-4)


@forced
def test_training_samples_have_mean_0_and_variance_1(force, tmp_path):
    data = small(tmp_path, force=force, train=64)
    samples = data.splits().train.samples.astype(float)
    np.testing.assert_allclose(samples.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(samples.std((0, 1)), 1, atol=1e-5)
    assert abs(data.splits().test.samples.mean((0, 1))).max() > 1e-4  # its own units would hide a shift


def test_a_channel_that_never_moves_is_left_as_it_is(tmp_path):
    data = small(tmp_path, Pendulum(gravity=0.0), transient=0.0)
    system = Lorenz96(sites=4, forcing=0.0)
    dead = small(tmp_path, system, transient=200.0)
    assert all(np.isfinite(split.samples).all() for each in (data, dead) for split in each.splits())


@forced
def test_a_trajectory_depends_on_seed_split_and_number_alone(force, tmp_path):
    first = small(tmp_path / "a", force=force)
    larger = small(tmp_path / "b", force=force, train=150, val=80, test=9)
    for name in Splits._fields:
        np.testing.assert_array_equal(first.trajectories(name, 0), larger.trajectories(name, 0))
    assert len(larger.splits().train.samples) == 75 > BLOCK
    (mean, std), samples = larger.units(), larger.splits().train.samples
    second = (larger.trajectories("train", BLOCK) - mean) / std
    np.testing.assert_allclose(samples[BLOCK:], second[: 75 - BLOCK], atol=1e-5)
    rebuilt = small(tmp_path / "c", force=force).splits()
    for mine, theirs in zip(first.splits(), rebuilt, strict=True):
        np.testing.assert_array_equal(mine.samples, theirs.samples)


def test_splits_and_seeds_share_no_trajectory(tmp_path):
    starts = [
        tuple(one)
        for seed in (0, 1, 2**64)
        for name in Splits._fields
        for one in small(tmp_path, seed=seed).trajectories(name, 0)[:, 0]
    ]
    assert len(set(starts)) == 9 * BLOCK


def test_files_are_plain_arrow_and_built_once(tmp_path, monkeypatch):
    data = small(tmp_path)
    folder = data.prepare()
    assert folder.parent == tmp_path / "lorenz63"
    table = Dataset.from_file(str(folder / "val.arrow"))
    assert len(table) == 2
    assert len(table[0]["samples"]) == 33 * 3
    assert json.loads((folder / "spec.json").read_text())["system"] == {"sigma": 10.0, "rho": 28.0, "beta": 8 / 3}
    monkeypatch.setattr(forecast, "simulate", None)
    train = data.splits().train
    restored = pickle.loads(pickle.dumps(train))
    assert len(pickle.dumps(train)) < 2000
    np.testing.assert_array_equal(restored[4][0], train[4][0])
    restored[4][0][:] = 0  # a copy: the file stays
    assert train[4][0].any()


def test_fingerprints_cover_every_option_but_the_place(tmp_path, monkeypatch):
    data = small(tmp_path)
    found = [task_of(data).fingerprint()]
    assert task_of(replace(data, dir="elsewhere")).fingerprint() == found[0]
    others = {"system": Lorenz63(rho=29.0), "dt": 0.04, "transient": 1.0, "force": 1.0, "tolerance": 1e-7}
    counts = {name: getattr(data, name) + 1 for name in ("seq_len", "hold", "windows", "train", "val", "test", "seed")}
    found += [task_of(replace(data, **{name: value})).fingerprint() for name, value in (others | counts).items()]
    found.append(task_of(replace(data, system=VanDerPol())).fingerprint())
    monkeypatch.setattr(forecast, "VERSION", 0)
    found.append(task_of(data).fingerprint())
    assert len(set(found)) == len(found) == 15


@pytest.mark.parametrize("index", [-1, 5])
def test_indices_beyond_the_split_are_refused(index, tmp_path):
    with pytest.raises(IndexError, match=f"{index} is not in 0…4"):
        small(tmp_path).splits().train[index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("seq_len", "dt", "hold", "windows", "train", "val", "test", "tolerance")),
        *((name, -1.0) for name in ("transient", "force")),
        ("dt", math.inf),
        ("tolerance", 1e-14),
        ("seed", -1),
    ],
)
def test_bad_options_are_named(name, value, tmp_path):
    with pytest.raises(OptionError) as error:
        small(tmp_path, **{name: value})
    assert (error.value.name, error.value.value) == (name, value)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Pendulum(length=0.0), "length"),
        (lambda: Pendulum(damping=-1.0), "damping"),
        (lambda: DoublePendulum(mass2=0.0), "mass2"),
        (lambda: Lorenz96(sites=3), "sites"),
    ],
)
def test_systems_that_are_none_are_refused(build, name):
    with pytest.raises(OptionError) as error:
        build()
    assert error.value.name == name


# --- the task ---


@pytest.mark.parametrize(
    ("seq_len", "context", "horizon", "expected"),
    [
        (16, None, None, (8, 9)),
        (15, None, None, (8, 8)),
        (16, 5, None, (5, 12)),
        (16, 5, 3, (5, 3)),
        (1, None, None, (1, 1)),
    ],
)
def test_context_and_horizon_fill_a_sequence(seq_len, context, horizon, expected, tmp_path):
    task = task_of(small(tmp_path, seq_len=seq_len), context=context, horizon=horizon)
    assert (task.rollout.context, task.rollout.horizon) == expected
    assert task.rollout.metrics().keys() == task.rollout_metrics().keys()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"context": 0}, "context"),
        ({"context": 17}, "context"),
        ({"context": 16, "horizon": 2}, "horizon"),
        ({"horizon": 0}, "horizon"),
        ({"threshold": 0.0}, "threshold"),
        ({"causal": False}, "causal"),
        ({"seq_len": 8}, "seq_len"),
    ],
)
def test_what_does_not_fit_is_refused(changes, name, tmp_path):
    with pytest.raises(OptionError) as error:
        task_of(small(tmp_path), **changes)
    assert error.value.name == name


@forced
def test_encoder_and_head_lead_from_inputs_to_targets(force, tmp_path):
    task = task_of(small(tmp_path, force=force))
    task.prepare()
    batch = task.collate([task.datasets().test[i] for i in range(4)])
    prediction = task.head(8)(task.encoder(8)(batch.inputs), None)
    assert prediction.shape == batch.targets.shape == (4, 16, 3)
    assert batch.inputs.shape == (4, 16, 3 + (force > 0))
    scored = task.scored(prediction, batch)
    assert [x.shape for x in scored] == [(64, 3)] * 2
    assert task.loss(*scored).item() == pytest.approx((prediction - batch.targets).square().mean().item(), rel=1e-6)


def test_metrics_are_their_formulas(tmp_path):
    task = task_of(small(tmp_path))
    target = 1 + torch.randn(50, 3, dtype=torch.float64)
    prediction = target + 0.3 * torch.randn(50, 3, dtype=torch.float64)
    values = {}
    for name, metric in task.metrics().items():
        for half in zip(prediction.split(20), target.split(20), strict=True):
            metric.update(*half)
        values[name] = metric.compute().item()
    error, own = (prediction - target).square(), (target - target.mean(0)).square()
    assert values["mse"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert values["nmse"] == pytest.approx((error.sum() / target.square().sum()).item(), rel=1e-5)
    assert values["r2"] == pytest.approx((1 - error.sum() / own.sum()).item(), rel=1e-5)
    assert task.monitor == "mse"


def test_rollout_metrics_are_their_formulas(tmp_path):
    task = task_of(small(tmp_path), threshold=1.0)
    target = torch.randn(6, 9, 3)
    prediction = target + torch.linspace(0.1, 1.6, 9)[:, None] * torch.randn(6, 9, 3)
    values = {}
    for name, metric in task.rollout_metrics().items():
        for part in zip(prediction.split(4), target.split(4), strict=True):
            metric.update(*part)
        values[name] = metric.compute().item()
    error = (prediction - target).square()
    steps = []
    for one in error.mean(2).sqrt().tolist():
        steps.append(next((h for h, e in enumerate(one) if e > 1), 9))
    own = (target - target.mean((0, 1))).square()
    assert 0 < np.mean(steps) < 9
    expected = {
        "rollout_mse": error.mean(),
        "rollout_mse_last": error[:, -1].mean(),
        "rollout_nmse": error.sum() / target.square().sum(),
        "rollout_r2": 1 - error.sum() / own.sum(),
        "rollout_valid_steps": np.mean(steps),
        "rollout_valid_lyapunov": np.mean(steps) * 0.05 * 0.906,
    }
    assert values == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("metric", [R2(), RolloutR2()], ids=["steps", "rollouts"])
def test_a_single_target_has_no_share_of_the_variance(metric):
    shape = (1, 1, 3)[-3 if isinstance(metric, RolloutR2) else -2 :]
    metric.update(torch.ones(shape), torch.zeros(shape))
    assert math.isnan(metric.compute())
    metric.update(torch.ones(shape), torch.ones(shape))
    assert metric.compute() == pytest.approx(-1)  # an error of 1, a variance of 1/2


def test_lyapunov_times_are_not_given_where_they_are_unknown(tmp_path):
    assert "rollout_valid_lyapunov" not in task_of(small(tmp_path, VanDerPol())).rollout_metrics()


def test_valid_steps_by_hand():
    zero = torch.zeros(6, 4, 2)
    run = torch.zeros(6, 4, 2)
    run[1, 0] = 1  # at once
    run[2, 2] = torch.tensor([0.5, 0.0])  # √(0.25 / 2) = 0.354 is not above 0.4
    run[3, 2] = torch.tensor([0.6, 0.0])  # 0.424 is
    run[4, 3, 0] = torch.nan
    run[5, 1], run[5, 2] = 1, 0  # does not become valid again
    assert valid_steps(run, zero, 0.4).tolist() == [4, 0, 4, 2, 3, 1]
    assert valid_steps(run, zero, 0.36).tolist() == [4, 0, 4, 2, 3, 1]
    assert valid_steps(run, zero, 0.35).tolist() == [4, 0, 2, 2, 3, 1]


@given(st.lists(st.floats(0, 2), min_size=1, max_size=12), st.floats(0.1, 1.9))
def test_valid_steps_are_the_length_of_the_longest_valid_beginning(errors, threshold):
    run = torch.tensor(errors, dtype=torch.float64)[None, :, None].repeat(1, 1, 3)
    expected = 0
    while expected < len(errors) and run[0, expected, 0].square().sqrt() <= threshold:
        expected += 1
    found = valid_steps(run, torch.zeros_like(run), threshold)
    assert abs(found.item() - expected) == 0 or min(abs(e - threshold) for e in errors) < 1e-12


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_runs_that_diverge_have_finite_errors(value):
    run, target = torch.full((2, 3, 1), value), torch.zeros(2, 3, 1)
    assert squared_error(run, target).tolist() == last_squared_error(run, target).tolist() == [LIMIT**2] * 2
    metric = RelativeError()
    metric.update(run, target + 1)
    assert 0.9 * LIMIT**2 < metric.compute().item() < 1.1 * LIMIT**2


# --- baselines ---


@pytest.mark.parametrize("known", [0, 1])
def test_least_squares_recover_a_linear_system(known):
    random = np.random.default_rng(6)
    first, second, force = 0.9 * np.linalg.qr(random.standard_normal((2, 2)))[0], 0.3 * np.eye(2), np.ones((1, 2))
    samples = np.zeros((5, 41, 2 + known))
    samples[:, :2, :2] = random.standard_normal((5, 2, 2))
    samples[..., 2:] = random.standard_normal((5, 41, known))
    for t in range(1, 40):
        pushed = samples[:, t, 2:] @ force[:known]
        samples[:, t + 1, :2] = samples[:, t, :2] @ first - samples[:, t - 1, :2] @ second + pushed + 0.2
    inputs, targets = samples[:, :-1], samples[:, 1:, :2]
    model = Autoregression.fit(inputs, targets, 2)
    np.testing.assert_allclose(model(inputs), targets[:, 1:], atol=1e-9)
    run = model.rollout(inputs[:, :10], inputs[:, 10:15, 2:])
    np.testing.assert_allclose(run, targets[:, 9:15], atol=1e-8)
    assert np.square(Autoregression.fit(inputs, targets, 1)(inputs) - targets).mean() > 1e-3


@forced
def test_baselines_are_scores_in_the_monitored_metric(force, tmp_path):
    task = task_of(small(tmp_path, seq_len=40, force=force, train=40, test=40, transient=5.0), context=20, horizon=10)
    baselines = task.baselines()
    inputs, targets = (np.stack(x).astype(float) for x in zip(*task.datasets().test, strict=True))
    observed = inputs[..., :3]
    assert baselines["mean"] == pytest.approx(np.square(targets).mean(), rel=1e-6)
    assert baselines["persistence"] == pytest.approx(np.square(targets - observed).mean(), rel=1e-6)
    ahead = [np.square(targets[:, 19 + h] - observed[:, 19]).mean() for h in range(10)]
    assert baselines["rollout: persistence"] == pytest.approx(np.mean(ahead), rel=1e-6)
    assert baselines["linear, 8 lags"] < baselines["linear, 1 lag"] < baselines["persistence"] < baselines["mean"]
    assert baselines["rollout: linear, 8 lags"] < baselines["rollout: persistence"]
    assert len(baselines) == 7


def test_baselines_take_no_more_lags_than_the_context_has(tmp_path):
    baselines = task_of(small(tmp_path), context=7).baselines()
    assert set(baselines) == {
        "mean",
        "persistence",
        "linear, 1 lag",
        "rollout: persistence",
        "rollout: linear, 1 lag",
    }


def test_baselines_read_a_bounded_number_of_steps(tmp_path, monkeypatch):
    task = task_of(small(tmp_path))
    for budget, count in ((1, 1), (35, 2), (10**6, 4)):
        monkeypatch.setattr(forecast, "BASELINE_STEPS", budget)
        power = np.mean([np.square(task.datasets().test[i][1].astype(float)).mean() for i in range(count)])
        assert task.baselines()["mean"] == pytest.approx(power, rel=1e-6)


# --- the configuration ---


@pytest.mark.parametrize("name", TASKS)
def test_configurations_have_the_defaults_of_the_code(name):
    config = composed(f"task={name}").task
    task = build(config)
    assert isinstance(task, Forecast)
    assert task.data.system == type(task.data.system)()
    defaults = TrajectoryData(dir="", system=task.data.system, seq_len=1, dt=1.0)
    own = ("dir", "system", "seq_len", "dt", "transient")
    assert replace(task.data, **{key: getattr(defaults, key) for key in own}) == defaults
    assert set(config.data.system) == {"_target_", *vars(task.data.system)}
    assert set(config.data) == {"_target_", *vars(task.data)}
    text = (Path(__file__).parents[2] / f"conf/task/{name}.yaml").read_text()
    keys = [line for line in text.splitlines() if ":" in line and "_target_" not in line]
    assert all("  # " in line for line in keys[1:] if line.strip() not in ("data:", "system:"))


def test_every_system_is_offered():
    offered = {composed(f"task={name}").task.data.system._target_.rpartition(".")[2] for name in TASKS}
    assert offered == {kind.__name__ for kind in Dynamics.__subclasses__()}
    assert dynamics.__doc__
