"""The gated delta rule against its recurrence, and the gated DeltaNet against its equations."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from experiments.speed.literal import LiteralGatedDeltaNet
from stu.errors import OptionError
from stu.mixers.gated_deltanet import GatedDeltaNet
from stu.ops import delta_rule as module
from stu.ops.delta_rule import gated_delta_rule, gated_delta_step
from stu.ops.forms import device_memory, taken_for
from stu.reference.gated_deltanet import delta_rule
from tests.models import randomized

D = 8
algorithms = pytest.mark.parametrize("algorithm", ["sequential", "parallel"])


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def problem(length, *, batch=2, heads=3, width=4, d_state=5, decay=None, largest=1.0, dtype=torch.float64):
    """q, k, v, β, g and the state before the first step."""
    shape = batch, length, heads
    inputs = (
        noise(*shape, d_state),
        F.normalize(noise(*shape, d_state), dim=-1),
        noise(*shape, width),
        largest * torch.rand(shape),
        -torch.rand(shape) if decay is None else decay,
        noise(batch, heads, d_state, width),
    )
    return tuple(each.to(dtype).requires_grad_() for each in inputs)


def stepped(*inputs):
    """One step after the other."""
    *signals, state = inputs
    outputs = []
    for step in zip(*(signal.unbind(1) for signal in signals), strict=True):
        y, state = gated_delta_step(*step, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def gradients(results, inputs):
    """Gradients of one random linear loss of all results, the same for all results of these shapes."""
    torch.manual_seed(7)
    loss = sum((result * noise(*result.shape).to(result.dtype)).sum() for result in results)
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_same(first, second, inputs, atol):
    pairs = zip((*first, *gradients(first, inputs)), (*second, *gradients(second, inputs)), strict=True)
    for one, other in pairs:
        assert_close(one, other, rtol=0, atol=atol)


# --- the operation ---


def test_a_step_is_the_papers():
    q, k, v, beta, g, _ = problem(6)
    zeros = v.new_zeros(2, 3, 5, 4)
    y, _ = stepped(q, k, v, beta, g, zeros)
    assert_close(y, delta_rule(q, k, v, beta, g.exp()), rtol=0, atol=1e-13)


def test_a_pair_that_is_stored_twice_is_stored_once():
    """With β = 1 and α = 1, reading a key gives the value that was written last, however often others were written."""
    keys = torch.linalg.qr(noise(5, 5))[0]
    k = keys[torch.tensor([0, 1, 0, 2, 0, 1])][None, :, None]
    v, ones = noise(1, 6, 1, 4), torch.ones(1, 6, 1).double()
    _, state = gated_delta_rule(k, k, v, ones, 0 * ones, chunk_size=4)
    expected = torch.stack((v[0, 4, 0], v[0, 5, 0], v[0, 3, 0]))
    assert_close(keys[:3] @ state[0, 0], expected, rtol=0, atol=1e-12)


@algorithms
@pytest.mark.parametrize("largest", [1.0, 2.0])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (2, 1), (7, 7), (17, 8), (31, 10), (67, 64), (67, 5)])
def test_equals_the_recurrence(length, chunk, largest, algorithm):
    inputs = problem(length, largest=largest)
    found = gated_delta_rule(*inputs, chunk_size=chunk, algorithm=algorithm)
    assert_same(found, stepped(*inputs), inputs, 1e-12)


@pytest.mark.slow
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 50),
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    d_state=st.integers(1, 4),
    chunk=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1e-6, 0.1, 3.0, 1e4]),
    algorithm=st.sampled_from(["sequential", "parallel"]),
)
def test_equals_the_recurrence_whatever_the_sizes(batch, length, heads, width, d_state, chunk, scale, algorithm):
    decay = -scale * torch.rand(batch, length, heads, dtype=torch.float64)
    inputs = problem(length, batch=batch, heads=heads, width=width, d_state=d_state, decay=decay, largest=2.0)
    found = gated_delta_rule(*inputs, chunk_size=chunk, algorithm=algorithm)
    assert_same(found, stepped(*inputs), inputs, 1e-9)


@pytest.mark.slow  # the gradients of the recurrence are compared above
@algorithms
def test_gradcheck(algorithm):
    inputs = problem(5, batch=1, heads=2, width=2, d_state=2)

    def both(*inputs):
        return gated_delta_rule(*inputs, chunk_size=2, algorithm=algorithm)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs, fast_mode=True)
    torch.library.opcheck(module._gated_delta_rule, (*inputs, 2, algorithm))


@algorithms
@pytest.mark.parametrize("kind", ["never", "always", "now and then"])
def test_float32_is_exact_whatever_is_forgotten(kind, algorithm):
    """Decays are sums of terms of one sign: one that forgets everything does not blur those after it."""
    shape = 1, 400, 2
    decay = {
        "never": torch.zeros(shape),
        "always": torch.full(shape, -1e4),
        "now and then": torch.where(torch.rand(shape) < 0.05, -1e3, -1e-3),
    }[kind]
    inputs = problem(400, batch=1, heads=2, decay=decay, largest=2.0, dtype=torch.float32)
    exact = tuple(each.detach().double().requires_grad_() for each in inputs)
    found, expected = gated_delta_rule(*inputs, algorithm=algorithm), stepped(*exact)
    pairs = zip((*found, *gradients(found, inputs)), (*expected, *gradients(expected, exact)), strict=True)
    for one, other in pairs:
        assert (one - other).norm() <= 2e-5 * other.norm()


@algorithms
@pytest.mark.parametrize("numbers", [1, 6_000, 20_000])
def test_memory_is_bounded_by_pieces(algorithm, numbers, monkeypatch):
    """Whatever the pieces, results are the same; no array of chunks has more numbers than a piece may."""
    inputs, largest, parts = problem(61), [], module._parts
    monkeypatch.setattr(module, "_parts", lambda *a: largest.append(max(p.numel() for p in parts(*a))) or parts(*a))
    monkeypatch.setattr(module, "ENTRIES_ON_CPU", numbers)
    device = "cpu" if algorithm == "sequential" else "cuda"
    with taken_for(device), device_memory(8 * numbers):
        found = gated_delta_rule(*inputs, chunk_size=7, algorithm=algorithm)
        assert_same(found, stepped(*inputs), inputs, 1e-12)
    one = 2 * 3 * 7 * 2 * 5  # the keys and queries of one chunk
    assert max(largest) <= max(one, numbers // 8)
    assert len(largest) >= 2 * 61 // 7 * (numbers == 1)


def test_a_device_has_the_tree():
    taken = []
    inputs = problem(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_gated_delta_rule", lambda *inputs: taken.append(inputs[-1]) or inputs[2:5])
        gated_delta_rule(*inputs)
        with taken_for("cuda"):
            gated_delta_rule(*inputs)
    assert taken == ["sequential", "parallel"]
    with pytest.raises(OptionError, match=r"algorithm=loop: must be one of auto, sequential, parallel"):
        gated_delta_rule(*inputs, algorithm="loop")


# --- the layer ---


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads": 4, "d_conv": 3, "allow_negative_eigenvalues": True},
        {"num_heads": 1, "expand": 0.5, "d_conv": 1, "chunk_size": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_gated_deltanet_is_its_equations(options, causal):
    layer = randomized(GatedDeltaNet(D, d_state=5, causal=causal, **options), 0.3).double()
    u = noise(2, 11, D)
    mask = torch.tensor([[True] * 11, [False] * 3 + [True] * 6 + [False] * 2])
    y = layer(u, mask)
    for row, (start, stop) in enumerate(((0, 11), (3, 9))):
        alone = u[row : row + 1, start:stop]
        expected = LiteralGatedDeltaNet(layer, 11)(alone)
        if not causal:
            expected = expected + LiteralGatedDeltaNet(layer.reverse, 11)(alone.flip(1)).flip(1)
        assert_close(y[row : row + 1, start:stop], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_forward_step_and_prefill_agree_over_many_chunks(dtype, tolerance):
    layer = randomized(GatedDeltaNet(D, d_state=6, chunk_size=8)).to(dtype)
    x = noise(2, 50, D, dtype=dtype)
    y = layer(x)
    for cut in (0, 1, 8, 31, 49):
        prefix, state = layer.prefill(x[:, :cut]) if cut else (y[:, :0], layer.initial_state(2))
        outputs = [prefix]
        for t in range(cut, 50):
            y_t, state = layer.step(x[:, t], state)
            outputs.append(y_t.unsqueeze(1))
        assert_close(torch.cat(outputs, 1), y, rtol=0, atol=tolerance * y.abs().max().item())
        assert (state.signals.shape, state.hidden.shape) == ((2, 3, 4 * 6 + 12), (2, 2, 6, 6))


def test_gated_deltanet_begins_as_in_the_official_code():
    layer = GatedDeltaNet(64, num_heads=32, d_state=4)
    dt, rates = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 0.99e-3 < dt.min() <= dt.max() < 1.01e-1
    assert 0 < rates.min() <= rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8, abs=2.5)
    assert (layer.gain == 1).all()
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
        "dt_bias": (32,),
        "A_log": (32,),
        "gain": (3,),
        "project_in.weight": (2 * 96 + 2 * 128 + 2 * 32, 64),
        "conv.weight": (2 * 128 + 96, 1, 4, 1),
        "project_out.weight": (64, 96),
    }


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"d_model": 0}, "d_model=0: must be at least 1"),
        ({"d_state": 0}, "d_state=0: must be at least 1"),
        ({"d_conv": 0}, "d_conv=0: must be at least 1"),
        ({"chunk_size": 0}, "chunk_size=0: must be at least 1"),
        ({"num_heads": 5}, "num_heads=5: must divide expand · d_model (12)"),
        ({"num_heads": 0}, "num_heads=0: must divide expand · d_model (12)"),
        ({"expand": 1.3}, "expand=1.3: must be above 0 and make expand · d_model a whole number (d_model 8)"),
        ({"expand": 0.0}, "expand=0.0: must be above 0"),
        ({"expand": math.nan}, "expand=nan: must be above 0"),
        ({"dt_min": 0.2}, "dt_min=0.2: must be above 0 and at most dt_max (0.1)"),
        ({"dt_init_floor": 0.0}, "dt_init_floor=0.0: must be above 0"),
        ({"A_init_range": (0.0, 1.0)}, "A_init_range=(0.0, 1.0): must be two finite numbers above 0"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, line):
    with pytest.raises(OptionError, match=re.escape(line)):
        GatedDeltaNet(**{"d_model": D} | options)
