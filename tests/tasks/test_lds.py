"""The synthetic linear dynamical system against its defining recurrence."""

import pickle
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from data.systems import lds
from data.systems.lds import LDS, LDSData
from data.systems.system import System
from stu.cli.composition import build
from stu.errors import OptionError
from stu.task import Batch

CONFIG = Path(__file__).parents[2] / "conf/task/lds.yaml"
SPECTRA = ("signs", "uniform", "complex")
# (spectrum, structure), all there are
KINDS = [(a, b) for a in SPECTRA for b in ("diagonal", "symmetric", "general") if (a, b) != ("complex", "symmetric")]
FIRST_INPUT = (0.5455176, -1.60954, 1.397619)
LAST_OUTPUT = (14.79148, 10.91788, 18.89744)

spectra = pytest.mark.parametrize("spectrum", SPECTRA)
kinds = pytest.mark.parametrize(("spectrum", "structure"), KINDS)
options = st.builds(
    lambda kind, **others: {"spectrum": kind[0], "structure": kind[1], **others},
    st.sampled_from(KINDS),
    seq_len=st.integers(1, 40),
    d_state=st.sampled_from((2, 4, 6)),
    d_input=st.integers(1, 4),
    d_output=st.integers(1, 4),
    radius=st.sampled_from((0.3, 0.9999, 1.0)),
    correlation=st.sampled_from((0.0, 0.9, -0.5)),
    seed=st.integers(0, 2**70),
)


def small(**changes) -> LDSData:
    return LDSData(**{"seq_len": 32, "train": 7, "val": 5, "test": 6} | changes)


def task_of(data: LDSData) -> LDS:
    return LDS(seq_len=data.seq_len, causal=True, data=data)


def recurrence(system: System, inputs, process, observation) -> np.ndarray:
    """The definition, step by step."""
    state, outputs = np.zeros(len(system.A)), []
    for u, w, v in zip(inputs, process, observation, strict=True):
        state = system.A @ state + system.B @ u + w
        outputs.append(system.C @ state + system.D @ u + v)
    return np.array(outputs)


@settings(max_examples=60, deadline=None)
@given(options)
def test_response_is_the_recurrence(option):
    system = LDSData(**option).system
    random = np.random.default_rng(option["seed"])
    widths = (option["d_input"], option["d_state"], option["d_output"])
    u, w, v = (random.standard_normal((option["seq_len"], width)) for width in widths)
    np.testing.assert_allclose(system.respond(u, w, v), recurrence(system, u, w, v), rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(options, st.booleans())
def test_targets_are_the_response_to_the_inputs_given(option, normalize):
    data = LDSData(**option, normalize=normalize)
    inputs, targets = data.splits().train[3]
    assert inputs.shape == (data.seq_len, data.d_input)
    assert inputs.dtype == targets.dtype == np.float32
    silence = (np.zeros((data.seq_len, width)) for width in (data.d_state, data.d_output))
    expected = recurrence(data.system, inputs, *silence) / data.scale
    np.testing.assert_allclose(targets, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(options)
def test_impulse_response_is_made_of_powers_and_convolves(option):
    data = LDSData(**option, normalize=False)
    A, B, C, D = (getattr(data.system, name) for name in "ABCD")
    response = data.system.impulse_response(data.seq_len)
    powers = [C @ np.linalg.matrix_power(A, t) @ B + (D if t == 0 else 0) for t in range(data.seq_len)]
    np.testing.assert_allclose(response, powers, rtol=1e-9, atol=1e-9)
    inputs, targets = data.splits().test[0]
    convolved = [sum(response[s] @ inputs[t - s] for s in range(t + 1)) for t in range(data.seq_len)]
    np.testing.assert_allclose(targets, convolved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spectrum", ["signs", "uniform"])
def test_the_time_convention_is_the_one_of_the_spectral_transform_unit(spectrum):
    """y_t − y_{t−2} = M^u (u_t, u_{t−1}, u_{t−2}) + Σ_i C (A² − I) Aⁱ B u_{t−2−i}, as in the proof of theorem 3.1."""
    system = small(spectrum=spectrum).system
    A, B, C, D = system.A, system.B, system.C, system.D
    inputs = np.random.default_rng(0).standard_normal((20, 3))
    y = system.respond(inputs)
    for t in range(2, 20):
        short = (C @ B + D) @ inputs[t] + C @ A @ B @ inputs[t - 1] - D @ inputs[t - 2]
        kernel = [C @ (A @ A - np.eye(4)) @ np.linalg.matrix_power(A, i) @ B for i in range(t - 1)]
        long = sum(kernel[i] @ inputs[t - 2 - i] for i in range(t - 1))
        np.testing.assert_allclose(y[t] - y[t - 2], short + long, atol=1e-10)


@spectra
@pytest.mark.parametrize("radius", [0.5, 0.9999, 1.0])
def test_eigenvalues_are_as_asked(spectrum, radius):
    system = small(spectrum=spectrum, radius=radius, d_state=200).system
    eigenvalues = np.linalg.eigvals(system.A)
    assert np.isrealobj(system.A)
    if spectrum == "uniform":
        assert 0.9 * radius < abs(eigenvalues).max() <= radius
        assert abs(eigenvalues.mean()) < 0.2 * radius
    else:
        np.testing.assert_allclose(abs(eigenvalues), radius, rtol=1e-12)
    if spectrum == "signs":
        assert set(np.diag(system.A)) == {radius, -radius}
    assert (abs(eigenvalues.imag).min() > 0) == (spectrum == "complex")
    assert (system.A == system.A.T).all() == (spectrum != "complex")


def test_phases_cover_the_circle():
    modes = small(spectrum="complex", d_state=2000).system.modes
    quarters = np.floor(np.angle(modes) / (np.pi / 2))
    np.testing.assert_allclose(np.unique(quarters, return_counts=True)[1], [250] * 4, rtol=0.2)


@pytest.mark.parametrize(("d_output", "d_input"), [(3, 3), (2, 5), (5, 2)])
def test_matrices_are_unit_gaussian_and_d_is_diagonal(d_output, d_input):
    systems = [small(seed=seed, d_input=d_input, d_output=d_output).system for seed in range(400)]
    for name, shape in (("B", (4, d_input)), ("C", (d_output, 4)), ("D", (d_output, d_input))):
        drawn = np.stack([getattr(system, name) for system in systems])
        assert drawn.shape[1:] == shape
        entries = drawn[:, np.eye(*shape, dtype=bool)] if name == "D" else drawn
        assert entries.std() == pytest.approx(1, abs=0.1)
        assert abs(entries.mean()) < 0.15
    assert not np.stack([system.D for system in systems])[:, ~np.eye(d_output, d_input, dtype=bool)].any()


@spectra
def test_noise_has_the_stated_standard_deviation(spectrum):
    quiet = LDSData(seq_len=4000, spectrum=spectrum, d_output=4, normalize=False)
    inputs, clean = quiet.splits().train[0]
    same, observed = replace(quiet, observation_noise=0.3).splits().train[0]
    np.testing.assert_array_equal(inputs, same)
    np.testing.assert_allclose((observed - clean).std(0), 0.3, rtol=0.06)

    same, driven = replace(quiet, process_noise=0.3).splits().train[0]
    np.testing.assert_array_equal(inputs, same)
    states = np.linalg.solve(quiet.system.C, (driven - clean).astype(float).T).T
    process = states[1:] - states[:-1] @ quiet.system.A.T
    np.testing.assert_allclose(process.std(0), 0.3, rtol=0.06)
    correlation = np.corrcoef(process[1:].T, process[:-1].T)
    np.testing.assert_allclose(correlation, np.eye(8), atol=0.08)


@pytest.mark.parametrize("structure", ["diagonal", "symmetric", "general"])
@pytest.mark.parametrize("gap", [1e-1, 1e-4, 1e-7])
def test_structures_have_the_eigenvectors_they_say(structure, gap):
    """`basis` is what it is called, A has its eigenvalues, and only the general one is not normal."""
    data = small(structure=structure, spectrum="uniform", radius=1 - gap, d_state=12, condition=50.0)
    A, basis = data.system.A, np.eye(12) if data.system.basis is None else data.system.basis
    np.testing.assert_allclose(A @ basis, basis * data.system.modes, atol=1e-12)
    assert np.linalg.cond(basis) == pytest.approx(50 if structure == "general" else 1, rel=1e-9)
    assert np.allclose(A, A.T, atol=1e-13) == (structure != "general")
    assert np.allclose(A, np.diag(np.diag(A))) == (structure == "diagonal")
    assert np.linalg.norm(A @ A.T - A.T @ A) < 1e-12 or structure == "general"
    assert abs(np.linalg.eigvals(A)).max() <= 1 - gap + 1e-10


def test_complex_modes_in_a_general_basis():
    system = small(structure="general", spectrum="complex", radius=0.9999, d_state=8).system
    eigenvalues = np.linalg.eigvals(system.A)
    np.testing.assert_allclose(abs(eigenvalues), 0.9999, rtol=1e-10)
    np.testing.assert_allclose(
        np.sort_complex(eigenvalues[eigenvalues.imag > 0]),
        np.sort_complex(system.modes.real + 1j * abs(system.modes.imag)),
    )
    assert np.linalg.norm(system.A @ system.A.T - system.A.T @ system.A) > 0.1


def test_bases_point_anywhere():
    """Columns of a random orthogonal matrix have no favourite direction."""
    first = np.stack([small(structure="symmetric", seed=seed, d_state=3).system.basis[:, 0] for seed in range(600)])
    np.testing.assert_allclose(first.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(first.T @ first / 600, np.eye(3) / 3, atol=0.06)


def test_a_gap_of_ten_millionths_is_exact():
    """No mode is rounded to 1: after 10⁷ steps a tenth of a millionth each has taken away all but 1/e."""
    system = small(radius=1 - 1e-7, spectrum="signs").system
    np.testing.assert_allclose(abs(system.modes) ** 1e7, np.exp(-1), rtol=1e-5)
    assert small(radius=0.9999999).system.modes.tolist() == system.modes.tolist()


@pytest.mark.slow
def test_very_long_sequences_take_seconds():
    for spectrum, structure in KINDS:
        data = LDSData(seq_len=131_072, spectrum=spectrum, structure=structure, radius=0.9999999, correlation=0.5)
        start = time.process_time()
        inputs, targets = data.splits().train[0]
        assert time.process_time() - start < 5
        assert inputs.shape == targets.shape == (131_072, 3)
        t = 131_071  # of rest and impulse: h_t = C Aᵗ B, with all digits
        response = data.system.impulse_response(t + 1)[t]
        power = data.system.C @ np.linalg.matrix_power(data.system.A, t) @ data.system.B
        np.testing.assert_allclose(response, power, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("correlation", [0.9, -0.5])
def test_coloured_inputs_are_stationary_and_of_unit_variance(correlation):
    data = LDSData(seq_len=50, correlation=correlation, train=4000)
    inputs = np.stack([data.splits().train[i][0] for i in range(4000)]).astype(float)  # (n, L, C)
    np.testing.assert_allclose(inputs.std(0), 1, atol=0.06)  # at every step, the first as well
    np.testing.assert_allclose(inputs.mean(0), 0, atol=0.08)
    for lag in (1, 2, 5):
        found = (inputs[:, lag:] * inputs[:, :-lag]).mean((0, 1))
        np.testing.assert_allclose(found, correlation**lag, atol=0.02)
    across = (inputs[..., 0] * inputs[..., 1]).mean()
    assert abs(across) < 0.02


@pytest.mark.parametrize("correlation", [0.9, -0.5])
@kinds
def test_the_scale_knows_coloured_inputs(spectrum, structure, correlation):
    """Against the covariance of outputs, from that of the inputs: E u_s u_t = ρ^|s−t|."""
    data = small(spectrum=spectrum, structure=structure, correlation=correlation)
    response = data.system.impulse_response(32)
    steps = np.arange(32)
    covariance = correlation ** abs(steps[:, None] - steps)
    power = []
    for t in range(32):
        h = response[t::-1]  # (t + 1, O, C), of inputs 0 … t
        power.append(np.einsum("soc,st,toc->", h, covariance[: t + 1, : t + 1], h) / 3)
    assert data.scale == pytest.approx(np.sqrt(np.mean(power)), rel=1e-10)


def test_structure_and_colour_have_streams_of_their_own():
    """What they add changes nothing else."""
    plain = small()
    np.testing.assert_array_equal(small(structure="general").splits().val[1][0], plain.splits().val[1][0])
    for name in ("B", "C", "D", "modes"):
        np.testing.assert_array_equal(getattr(small(structure="symmetric").system, name), getattr(plain.system, name))
    assert small(condition=3.0).splits().val[1][1].tolist() == plain.splits().val[1][1].tolist()


@kinds
@pytest.mark.parametrize("noise", [(0.0, 0.0), (0.5, 2.0)])
def test_scale_is_the_rms_of_the_covariance_recursion(spectrum, structure, noise):
    process, observation = noise
    data = small(spectrum=spectrum, structure=structure, process_noise=process, observation_noise=observation)
    A, B, C, D = (getattr(data.system, name) for name in "ABCD")
    covariance, power = np.zeros((4, 4)), []
    for _ in range(data.seq_len):
        before = A @ covariance @ A.T + process**2 * np.eye(4)
        power.append(np.trace(C @ before @ C.T + (C @ B + D) @ (C @ B + D).T) / 3 + observation**2)
        covariance = before + B @ B.T
    assert data.scale == pytest.approx(np.sqrt(np.mean(power)), rel=1e-10)


def test_normalize_only_changes_the_unit():
    raw, normalized = (small(normalize=flag, observation_noise=0.5) for flag in (False, True))
    assert raw.scale == 1 < normalized.scale
    (u, y), (same, z) = raw.splits().val[2], normalized.splits().val[2]
    np.testing.assert_array_equal(u, same)
    np.testing.assert_allclose(y, z * normalized.scale, rtol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_sequence_depends_on_seed_split_and_index_alone(noise):
    first = small(process_noise=noise, observation_noise=noise).splits()
    forward = [[split[i] for i in range(len(split))] for split in first]
    np.random.seed(5)
    torch.manual_seed(5)
    second = pickle.loads(pickle.dumps(small(process_noise=noise, observation_noise=noise))).splits()
    for split, expected in reversed(list(zip(second, forward, strict=True))):
        for i in reversed(range(len(split))):
            for mine, theirs in zip(split[i], expected[i], strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_sizes_do_not_change_the_sequences():
    few, many = small().splits(), small(train=700, val=500, test=600).splits()
    assert [len(split) for split in few] == [7, 5, 6]
    for mine, theirs in zip(few, many, strict=True):
        np.testing.assert_array_equal(mine[4][1], theirs[4][1])


def test_splits_and_seeds_share_no_sequence():
    datasets = [small(seed=seed, train=50, val=40, test=30).splits() for seed in (0, 1, 2**32)]
    inputs = [u.tobytes() for splits in datasets for split in splits for u, _ in split]
    assert len(set(inputs)) == len(inputs) == 3 * 120


def test_another_seed_is_another_system():
    first, second = (small(spectrum="uniform", seed=seed).system for seed in (0, 1))
    for name in ("modes", "B", "C"):
        assert not np.isclose(getattr(first, name), getattr(second, name)).any()
    assert not np.isclose(np.diag(first.D), np.diag(second.D)).any()


@spectra
def test_another_spectrum_keeps_the_other_matrices(spectrum):
    system, reference = small(spectrum=spectrum, radius=0.5).system, small().system
    for name in "BCD":
        np.testing.assert_array_equal(getattr(system, name), getattr(reference, name))


def test_generator_is_the_one_of_this_version():
    """Committed numbers: if these change, so must `VERSION`."""
    inputs, targets = small(normalize=False).splits().train[0]
    np.testing.assert_allclose(inputs[0], FIRST_INPUT, rtol=1e-5)
    np.testing.assert_allclose(targets[-1], LAST_OUTPUT, rtol=1e-5)
    assert lds.VERSION == 1


@pytest.mark.parametrize("index", [-1, 7])
def test_indices_beyond_the_split_are_refused(index):
    with pytest.raises(IndexError, match=f"{index} is not in 0…6"):
        small().splits().train[index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("seq_len", "d_state", "d_input", "d_output")),
        *((name, 0) for name in ("train", "val", "test")),
        ("spectrum", "sign"),
        ("structure", "dense"),
        *(("condition", value) for value in (0.5, 1e7, float("nan"))),
        *(("correlation", value) for value in (1.0, -1.0, float("nan"))),
        *(("radius", value) for value in (0.0, -0.5, 1.0001, float("nan"))),
        *((name, value) for name in ("process_noise", "observation_noise") for value in (-0.1, float("inf"))),
        ("seed", -1),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(OptionError) as error:
        small(**{name: value})
    assert error.value.name == name
    assert error.value.value is value


def test_complex_pairs_need_an_even_state():
    assert len(small(d_state=3).system.A) == 3
    with pytest.raises(OptionError, match="d_state=3: must be even"):
        small(d_state=3, spectrum="complex")


def test_symmetric_matrices_have_no_complex_eigenvalues():
    with pytest.raises(OptionError, match="structure=symmetric: must be diagonal or general where spectrum=complex"):
        small(structure="symmetric", spectrum="complex")


def test_task_and_data_must_agree_on_the_length():
    with pytest.raises(OptionError, match="seq_len=16: must be the data's, 32"):
        LDS(seq_len=16, causal=True, data=small())


@given(st.lists(st.integers(1, 32), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_padding_is_never_scored(lengths):
    task = task_of(small())
    train = task.datasets().train
    batch = task.collate([(u[:n], y[:n]) for n, (u, y) in zip(lengths, train, strict=False)])
    prediction = torch.randn(batch.targets.shape)
    real = [(p[:n], y[:n]) for n, p, y in zip(lengths, prediction, batch.targets, strict=True)]
    expected = sum(float(((p - y) ** 2).sum()) for p, y in real) / (3 * sum(lengths))
    if batch.mask is not None:
        prediction[~batch.mask] = torch.nan
    scored = task.scored(prediction, batch)
    assert [x.shape for x in scored] == [(sum(lengths), 3)] * 2
    assert task.loss(*scored).item() == pytest.approx(expected, rel=1e-5)


def whole_test(task: LDS) -> Batch:
    return task.collate(list(task.datasets().test))


def test_metrics_are_error_and_explained_variance():
    task = task_of(small())
    batch = whole_test(task)
    scored = task.scored(batch.targets + 0.1 * torch.randn(batch.targets.shape), batch)
    metrics = task.metrics()
    for half in zip(*(x.chunk(2) for x in scored), strict=True):
        for metric in metrics.values():
            metric.update(*half)
    prediction, target = (x.double() for x in scored)
    error, variance = (prediction - target).square().mean(), target.var(0, correction=0).mean()
    assert metrics["mse"].compute().item() == pytest.approx(error.item(), rel=1e-4)
    assert metrics["r2"].compute().item() == pytest.approx(1 - (error / variance).item(), rel=1e-4)
    assert task.monitor in metrics
    assert task.mode == "min"
    assert task.metrics()["mse"] is not metrics["mse"]


def score(task: LDS, prediction: Tensor) -> float:
    metric = task.metrics()[task.monitor]
    metric.update(*task.scored(prediction, whole_test(task)))
    return metric.compute().item()


@spectra
def test_baselines_are_scores_in_the_monitored_metric(spectrum):
    task = task_of(small(spectrum=spectrum, train=200, test=200))
    baselines = task.baselines()
    batch = whole_test(task)
    first = torch.tensor(task.data.system.impulse_response(1)[0] / task.data.scale, dtype=torch.float32)
    assert baselines["zero"] == pytest.approx(score(task, torch.zeros_like(batch.targets)), rel=1e-5)
    assert baselines["static"] == pytest.approx(score(task, batch.inputs @ first.T), rel=1e-2)
    assert baselines["static"] < baselines["zero"]


@spectra
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_baselines_are_in_the_order_of_what_they_know(spectrum, noise):
    """Nothing, one input, some inputs, the form of the system, the system; only noise is left to the last."""
    data = small(spectrum=spectrum, seq_len=200, radius=0.99, observation_noise=noise, train=100, test=100)
    baselines = task_of(data).baselines()
    assert list(baselines) == ["zero", "static", "fir", "arx", "ho-kalman", "truth"]
    assert baselines["truth"] == pytest.approx((noise / data.scale) ** 2, rel=0.05, abs=1e-12)
    assert 1.2 * baselines["fir"] < baselines["static"] < baselines["zero"]
    for name in ("arx", "ho-kalman"):
        assert 0.99 * baselines["truth"] <= baselines[name] <= max(1e-12, baselines["fir"])


def test_baselines_of_the_shortest_sequences():
    assert list(task_of(small(seq_len=2)).baselines()) == ["zero", "static", "fir", "arx", "truth"]


def test_baselines_know_memory_from_none():
    static = {radius: task_of(small(radius=radius)).baselines()["static"] for radius in (1e-6, 0.9999)}
    assert static[1e-6] < 1e-9
    assert static[0.9999] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_normalized_targets_have_unit_power(noise):
    data = LDSData(seq_len=128, process_noise=noise, observation_noise=noise, test=2000)
    assert task_of(data).baselines()["zero"] == pytest.approx(1, abs=0.06)


def test_baselines_read_a_bounded_number_of_steps(monkeypatch):
    task = task_of(small())
    sequences = task.datasets().test
    for budget, count in ((1, 1), (100, 3), (10**6, 6)):
        monkeypatch.setattr(lds, "BASELINE_STEPS", budget)
        power = np.mean([np.square(sequences[i][1]).mean() for i in range(count)])
        assert task.baselines()["zero"] == pytest.approx(power, rel=1e-5)


def test_fingerprint_covers_every_option_and_the_version(monkeypatch):
    fingerprints = [task_of(small()).fingerprint()]
    assert task_of(small()).fingerprint() == fingerprints[0]
    for name, value in asdict(small()).items():
        other = {
            "spectrum": "complex", "radius": 0.5, "structure": "general", "correlation": 0.5, "normalize": False,
            "unit_len": 9
        }.get(name)  # fmt: skip
        fingerprints.append(task_of(small(**{name: value + 2 if other is None else other})).fingerprint())
    monkeypatch.setattr(lds, "VERSION", 0)
    fingerprints.append(task_of(small()).fingerprint())
    assert len(set(fingerprints)) == len(fingerprints) == 19


def test_configuration_is_the_defaults_with_every_key_explained():
    config = OmegaConf.load(CONFIG)
    task = build(OmegaConf.create({"task": config})).task
    assert isinstance(task, LDS)
    assert task.data == LDSData(seq_len=1024)
    assert (task.seq_len, task.causal) == (1024, True)
    assert set(config.data) == {"_target_", *asdict(task.data)}
    keys = [line for line in CONFIG.read_text().splitlines() if ":" in line and "_target_" not in line]
    assert all("  # " in line for line in keys[1:] if line != "data:")


def test_encoder_and_head_lead_from_inputs_to_targets():
    task = task_of(small(d_input=2, d_output=5))
    task.prepare()
    batch = whole_test(task)
    assert batch.mask is None
    assert task.datasets().test.lengths is None
    prediction = task.head(8)(task.encoder(8)(batch.inputs), batch.mask)
    assert prediction.shape == batch.targets.shape == (6, 32, 5)
    assert task.scored(prediction, batch)[0].shape == (6 * 32, 5)
