"""State space duality against its recurrence and its matrix, and Mamba-2 against its equations."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from stu.cli.composition import build
from stu.errors import OptionError
from stu.mixers.mamba2 import Mamba2
from stu.ops import ssd as module
from stu.ops.forms import device_memory, taken_for
from stu.ops.ssd import ssd, ssd_reference
from tests.models import composed, randomized, small_backbone
from tests.sizes import Sizes

D = 8
NAMES = ("x", "dt", "A", "B", "C", "D", "initial")
algorithms = pytest.mark.parametrize("algorithm", ["sequential", "parallel"])


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def problem(length, *, batch=2, heads=4, width=3, groups=2, d_state=5, dt=None, dtype=torch.float64):
    """x, dt, A, B, C, D and the state before the first step; dt as at the start of training, or as given."""
    if dt is None:
        dt = torch.empty(batch, length, heads).uniform_(math.log(1e-3), math.log(0.5)).exp()
    inputs = (
        noise(batch, length, heads, width),
        dt,
        -torch.empty(heads).uniform_(1, 16),
        noise(batch, length, groups, d_state),
        noise(batch, length, groups, d_state),
        noise(heads),
        noise(batch, heads, d_state, width),
    )
    return tuple(each.to(dtype).requires_grad_() for each in inputs)


def gradients(results, inputs):
    """Gradients of one random linear loss of all results, the same for all results of these shapes."""
    torch.manual_seed(7)
    loss = sum((result * noise(*result.shape).to(result.dtype)).sum() for result in results)
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_same(first, second, inputs, atol):
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, rtol=0, atol=atol)
    for one, other in zip(gradients(first, inputs), gradients(second, inputs), strict=True):
        assert_close(one, other, rtol=0, atol=atol)


# --- the operation ---


def test_reference_is_the_recurrence_written_out():
    """One number of one state after the other, in plain Python."""
    x, dt, A, B, C, D, initial = (each.detach() for each in problem(6, groups=2))
    y, final = ssd_reference(x, dt, A, B, C, D, initial)
    for b, h in [(0, 0), (0, 3), (1, 1), (1, 2)]:
        group = h // 2
        for p in range(3):
            state = [initial[b, h, n, p].item() for n in range(5)]
            for t in range(6):
                decay, step = math.exp(dt[b, t, h] * A[h]), dt[b, t, h].item() * x[b, t, h, p].item()
                state = [decay * state[n] + B[b, t, group, n].item() * step for n in range(5)]
                expected = sum(C[b, t, group, n].item() * state[n] for n in range(5)) + (D[h] * x[b, t, h, p]).item()
                assert y[b, t, h, p].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert final[b, h, :, p].tolist() == pytest.approx(state, rel=1e-12, abs=1e-12)


def test_is_one_matrix_over_time():
    """The dual form of the paper, y = (C Bᵀ ∘ decay) (Δ x) + D x, the whole matrix of each head at once."""
    x, dt, A, B, C, D, _ = problem(37, heads=2, groups=1)
    y, _ = ssd(x, dt, A, B, C, D, chunk_size=8)
    for b in range(2):
        for h in range(2):
            matrix = torch.zeros(37, 37).double()
            for t in range(37):
                for s in range(t + 1):
                    decay = torch.exp((dt[b, s + 1 : t + 1, h] * A[h]).sum())
                    matrix[t, s] = (C[b, t, 0] @ B[b, s, 0] * decay * dt[b, s, h]).detach()
            assert_close(y[b, :, h], matrix @ x[b, :, h] + D[h] * x[b, :, h], rtol=0, atol=1e-12)


@algorithms
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (2, 1), (7, 7), (16, 8), (17, 8), (31, 10), (67, 64), (67, 67)])
def test_equals_reference(length, chunk, groups, algorithm, monkeypatch):
    inputs = problem(length, groups=groups)
    reference = ssd_reference(*inputs)
    for entries in (1, 3 * 4 * chunk**2, 1 << 30):  # chunks one by one, by threes, all at once
        monkeypatch.setattr(module, "ENTRIES_ON_CPU", entries)
        assert_same(ssd(*inputs, chunk_size=chunk, algorithm=algorithm), reference, inputs, 1e-12)


@pytest.mark.parametrize(("length", "chunk"), [(2, 1), (17, 2), (64, 4), (67, 1), (130, 3)])
def test_blocks_of_chunks_and_blocks_of_those_are_as_one_product(length, chunk, monkeypatch):
    monkeypatch.setattr(module, "PRODUCT_AT_ONCE", 0)
    inputs = problem(length)
    reference = ssd_reference(*inputs)
    for at_once in (2, 3, 10):
        monkeypatch.setattr(module, "CHUNKS_AT_ONCE", at_once)
        assert_same(ssd(*inputs, chunk_size=chunk, algorithm="parallel"), reference, inputs, 1e-12)


@algorithms
def test_the_memory_of_a_device_changes_nothing(algorithm):
    inputs = problem(100, dt=steps("forgetful", (2, 100, 4)))
    with taken_for("cuda"):
        whole = ssd(*inputs, chunk_size=8, algorithm=algorithm)
        for size in (1, 4 * 8 * 6 * 4 * 8**2):  # a chunk at a time, and four
            with device_memory(size):
                assert_same(ssd(*inputs, chunk_size=8, algorithm=algorithm), whole, inputs, 1e-9)


def test_a_device_has_the_parallel_form(monkeypatch):
    taken = []
    monkeypatch.setattr(module, "_ssd", lambda *inputs: taken.append(inputs[-1]) or inputs[:3])
    inputs = problem(3)
    ssd(*inputs)
    with taken_for("cuda"):
        ssd(*inputs)
    assert taken == ["sequential", "parallel"]


@pytest.mark.slow
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 50),
    groups=st.integers(1, 3),
    heads_of_group=st.integers(1, 3),
    width=st.integers(1, 4),
    d_state=st.integers(1, 4),
    chunk=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1e-6, 0.1, 3.0, 1e4]),
    algorithm=st.sampled_from(["sequential", "parallel"]),
)
def test_equals_reference_whatever_the_sizes(
    batch, length, groups, heads_of_group, width, d_state, chunk, scale, algorithm
):
    heads = groups * heads_of_group
    dt = scale * torch.rand(batch, length, heads, dtype=torch.float64)
    inputs = problem(length, batch=batch, heads=heads, width=width, groups=groups, d_state=d_state, dt=dt)
    atol = 1e-10 * max(1.0, scale) * max(1.0, scale)
    assert_same(ssd(*inputs, chunk_size=chunk, algorithm=algorithm), ssd_reference(*inputs), inputs, atol)


@algorithms
def test_gradcheck(algorithm):
    inputs = problem(5, batch=1, heads=2, width=2, groups=1, d_state=2)
    assert torch.autograd.gradcheck(lambda *i: ssd(*i, chunk_size=2, algorithm=algorithm), inputs, fast_mode=False)


def test_a_sequence_may_be_cut_anywhere():
    x, dt, A, B, C, D, initial = problem(60)
    y, final = ssd(x, dt, A, B, C, D, initial, chunk_size=16)
    for cut in (1, 16, 33, 59):
        first, state = ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, initial, chunk_size=16)
        second, end = ssd(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, state, chunk_size=16)
        assert_close(torch.cat((first, second), 1), y, rtol=0, atol=1e-12)
        assert_close(end, final, rtol=0, atol=1e-12)


def steps(kind, shape):
    """Δ of four sorts: as initialised; of every size; small, but now and then one that forgets; all of that sort."""
    match kind:
        case "initial":
            return torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)).exp()
        case "wide":
            return torch.exp(4 * torch.randn(shape) - 2)
        case "forgetful":
            return torch.where(torch.rand(shape) < 0.05, 1e3, 1e-3)
        case "huge":
            return torch.full(shape, 1e4)


@algorithms
@pytest.mark.parametrize("kind", ["initial", "wide", "forgetful", "huge"])
def test_float32_is_exact_over_long_sequences(kind, algorithm):
    """Forgetting makes running sums large and gradients of Δ A small: neither may cost the others their digits."""
    inputs = problem(
        16384, batch=1, heads=2, width=4, groups=1, d_state=4, dt=steps(kind, (1, 16384, 2)), dtype=torch.float32
    )
    wide = tuple(each.detach().double().requires_grad_() for each in inputs)
    results, exact = ssd(*inputs, algorithm=algorithm), ssd(*wide)
    for name, low, high in zip(
        ("y", "final", *NAMES), (*results, *gradients(results, inputs)), (*exact, *gradients(exact, wide)), strict=True
    ):
        assert low.dtype == torch.float32
        assert (low - high).norm() <= 5e-6 * high.norm(), name


@algorithms
def test_no_step_changes_nothing_and_an_endless_one_forgets_everything(algorithm):
    x, _, A, B, C, D, initial = (each.detach() for each in problem(40))
    form = functools.partial(ssd, chunk_size=16, algorithm=algorithm)
    y, final = form(x, torch.zeros(2, 40, 4).double(), A, B, C, D, initial)
    assert torch.equal(final, initial)
    kept = torch.einsum("bhnp,blhn->blhp", initial, C.repeat_interleave(2, 2))
    assert_close(y, kept + D[:, None] * x, rtol=0, atol=1e-13)
    y, final = form(x, torch.full((2, 40, 4), 1e6).double(), A, B, C, D, 1e300 * initial)
    products = torch.einsum("blgn,blgn->blg", B, C).repeat_interleave(2, 2).unsqueeze(-1)
    assert_close(y, 1e6 * products * x + D[:, None] * x, rtol=1e-12, atol=1e-6)
    assert final.isfinite().all()


def test_autocast_and_half_precision_never_reach_the_recurrence():
    inputs = problem(200, dtype=torch.float32)
    plain = ssd(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ssd(*inputs)
        cast_grads = gradients(cast, inputs)  # the backward pass inside, too
    assert all(map(torch.equal, plain, cast))
    assert all(map(torch.equal, gradients(plain, inputs), cast_grads))
    x, dt, A, B, C, D, initial = (each.detach().bfloat16() for each in inputs)
    y, final = ssd(x, dt, A, B, C, D, initial)
    exact, exact_final = ssd(*(each.float() for each in (x, dt, A, B, C, D, initial)))
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(final, exact_final)
    assert torch.equal(y, exact.bfloat16())


def test_memory_is_linear_and_nothing_of_a_chunk_squared_is_kept():
    length, heads, width, d_state, chunk = 4096, 2, 16, 32, 64
    inputs = problem(length, batch=1, heads=heads, width=width, groups=1, d_state=d_state, dtype=torch.float32)
    kept = []
    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gradients(ssd(*inputs, chunk_size=chunk), inputs)
    states = length // chunk * heads * d_state * width
    signals = length * (heads * width + 2 * d_state)
    assert sizes.largest <= max(states, module.ENTRIES_ON_CPU)
    assert sum(kept) < 3 * (states + signals)
    assert length * heads * chunk > states + signals  # what M of all chunks would take


# --- the layer ---


def literal_mamba2(layer, u, mask):
    """The block of one sequence (L, D), step by step; padding is a time without steps."""
    width, matrix, _ = layer.widths
    heads, groups = layer.num_heads, layer.num_groups
    taps = layer.conv.weight.shape[2]
    length = len(u)
    projected = (u * mask.unsqueeze(-1)) @ layer.project_in.weight.T
    z, signals, dt = projected.tensor_split((width, 2 * width + 2 * matrix), -1)
    dt = torch.log1p(torch.exp(dt + layer.dt_bias)) * mask.unsqueeze(-1)
    convolved = torch.zeros_like(signals)
    for t in range(length):
        for i in range(taps):
            if t - i >= 0:
                convolved[t] += layer.conv.weight[:, 0, taps - 1 - i, 0] * signals[t - i]
        convolved[t] += layer.conv.bias
    convolved = convolved / (1 + torch.exp(-convolved))
    x, B, C = convolved.tensor_split((width, width + matrix), -1)
    x, B, C = x.view(length, heads, -1), B.view(length, groups, -1), C.view(length, groups, -1)
    state = torch.zeros(heads, x.shape[2], B.shape[2]).double()
    outputs = []
    for t in range(length):
        y = []
        for h in range(heads):
            g = h // (heads // groups)
            decay = torch.exp(-dt[t, h] * torch.exp(layer.A_log[h]))
            state[h] = decay * state[h] + dt[t, h] * torch.outer(x[t, h], B[t, g])
            y.append(state[h] @ C[t, g] + layer.D[h] * x[t, h])
        gated = torch.cat(y) * z[t] / (1 + torch.exp(-z[t]))
        blocks = gated.view(groups, -1)
        normed = blocks / torch.sqrt(blocks.square().mean(-1, keepdim=True) + 1e-5)
        outputs.append((normed.flatten() * layer.gain) @ layer.project_out.weight.T)
    return torch.stack(outputs)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 2},
        {"num_heads": 4, "num_groups": 2, "d_conv": 3},
        {"num_heads": 1, "expand": 1, "d_conv": 1, "chunk_size": 3},
        {"num_heads": 3, "num_groups": 3, "expand": 3, "d_conv": 2, "chunk_size": 4},
    ],
    ids=str,
)
@torch.no_grad()
def test_mamba2_is_its_equations(options, causal, masked):
    layer = randomized(Mamba2(D, d_state=5, causal=causal, **options), 0.3).double()
    u = noise(2, 11, D)
    mask = torch.ones(2, 11, dtype=torch.bool)
    if masked:
        mask[0, 7:] = False
        mask[1, :3], mask[1, 6] = False, False
    y = layer(u, mask if masked else None)
    for row in range(2):
        expected = literal_mamba2(layer, u[row], mask[row])
        if not causal:
            expected = expected + literal_mamba2(layer.reverse, u[row].flip(0), mask[row].flip(0)).flip(0)
        assert_close(y[row][mask[row]], expected[mask[row]], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_forward_step_and_prefill_agree_over_many_chunks(dtype, tolerance):
    layer = randomized(Mamba2(D, d_state=6, num_heads=4, num_groups=2, chunk_size=8)).to(dtype)
    x = noise(2, 50, D, dtype=dtype)
    y = layer(x)
    atol = tolerance * y.detach().abs().max().item()
    for cut in (0, 1, 2, 8, 31, 49):
        prefix, state = layer.prefill(x[:, :cut]) if cut else (y[:, :0], layer.initial_state(2))
        outputs = [prefix]
        for t in range(cut, 50):
            y_t, state = layer.step(x[:, t], state)
            outputs.append(y_t.unsqueeze(1))
        assert_close(torch.cat(outputs, 1), y, rtol=0, atol=atol)
        assert (state.signals.shape, state.hidden.shape) == ((2, 3, 2 * D + 2 * 2 * 6), (2, 4, 6, 4))


def test_the_length_of_chunks_changes_nothing():
    x = noise(2, 45, D)
    layer = randomized(Mamba2(D, d_state=6, causal=False)).double()
    y = layer(x)
    for chunk in (1, 7, 44, 45, 1000):
        layer.chunk_size = layer.reverse.chunk_size = chunk
        assert_close(layer(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
def test_padding_at_the_start_is_as_if_it_were_not_there(causal):
    layer, x = randomized(Mamba2(D, d_state=6, causal=causal, chunk_size=8)).double(), noise(1, 40, D)
    left = torch.arange(40) >= 13
    assert_close(layer(x, left.expand(1, -1))[:, 13:], layer(x[:, 13:]), rtol=0, atol=1e-12)


def test_mamba2_begins_as_in_the_official_code():
    layer = Mamba2(64, num_heads=64, d_state=4)
    dt, A = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert (dt > 0.99e-3).all()
    assert (dt < 1.01e-1).all()
    assert dt.log().mean().item() == pytest.approx((math.log(1e-3) + math.log(0.1)) / 2, abs=0.6)
    assert (A >= 1).all()
    assert (A <= 16).all()
    assert A.mean().item() == pytest.approx(8.5, abs=2)
    assert (layer.D == 1).all()
    assert (layer.gain == 1).all()
    assert layer.conv.weight.abs().max() <= 4**-0.5
    floor = Mamba2(64, num_heads=64, d_state=4, dt_min=1e-6, dt_max=1e-5, dt_init_floor=2e-3)
    assert_close(F.softplus(floor.dt_bias), torch.full((64,), 2e-3), rtol=1e-4, atol=0)
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    assert shapes == {
        "dt_bias": (64,),
        "A_log": (64,),
        "D": (64,),
        "gain": (128,),
        "project_in.weight": (2 * 128 + 2 * 4 + 64, 64),
        "conv.weight": (128 + 2 * 4, 1, 4, 1),
        "conv.bias": (128 + 2 * 4,),
        "project_out.weight": (64, 128),
    }


def test_the_other_direction_has_parameters_of_its_own():
    layer = Mamba2(D, causal=False)
    assert layer.reverse.causal
    assert not torch.equal(layer.project_in.weight, layer.reverse.project_in.weight)


def test_official_settings_of_the_optimizer():
    """state-spaces/mamba: A_log, D and the bias of Δ do not decay."""
    optimizer = build(composed("model=mamba2", "task=lds").optimizer)
    backbone = small_backbone("mamba2", seq_len=32, causal=False)
    made, _ = optimizer(backbone.named_parameters(), 100).build(backbone.named_parameters())
    ssm, default = made.param_groups
    units = [unit for block in backbone.blocks for unit in (block.mixer, block.mixer.reverse)]
    assert {id(p) for p in ssm["params"]} == {id(p) for unit in units for p in (unit.A_log, unit.D, unit.dt_bias)}
    assert (ssm["weight_decay"], default["weight_decay"]) == (0.0, 0.05)
    assert ssm["initial_lr"] == default["initial_lr"]


def test_steps_are_limited():
    """Δ below the limits is the lower one, above them the upper one, in all three methods; padding is no step."""
    for limit, bias in (((0.01, 0.1), 0.1), ((0.02, math.inf), 0.02)):
        layer = randomized(Mamba2(D, d_state=6, dt_limit=limit)).double()
        torch.nn.init.zeros_(layer.project_in.weight[-layer.num_heads :])
        same = copy.deepcopy(layer)
        same.dt_limit = (0.0, math.inf)
        torch.nn.init.constant_(layer.dt_bias, 5.0 if bias == 0.1 else -20.0)
        torch.nn.init.constant_(same.dt_bias, math.log(math.expm1(bias)))
        x, mask = noise(2, 12, D), torch.arange(12) < torch.tensor([[12], [7]])
        assert_close(layer(x), same(x), rtol=0, atol=1e-12)
        (y, state), (expected, after) = (each.prefill(x, mask) for each in (layer, same))
        assert_close(y[mask], expected[mask], rtol=0, atol=1e-12)
        assert_close(layer.step(x[:, 0], state)[0], same.step(x[:, 0], after)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_state_has_one_dtype_however_it_was_made():
    layer, x = randomized(Mamba2(D, d_state=6)), noise(2, 20, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        states = layer.initial_state(2), layer.prefill(x)[1], layer.step(x[:, 0], layer.initial_state(2))[1]
    for state in states:
        assert (state.signals.dtype, state.hidden.dtype) == (torch.bfloat16, torch.float32)


def test_a_state_keeps_nothing_of_a_prefix_alive():
    _, state = Mamba2(D, d_state=6).prefill(noise(2, 500, D, dtype=torch.float32))
    assert state.signals.untyped_storage().nbytes() == 4 * state.signals.numel()


@pytest.mark.parametrize("extreme", [-100.0, 100.0], ids=["frozen", "forgetful"])
def test_extreme_steps_stay_finite(extreme):
    layer = Mamba2(D, d_state=6)
    torch.nn.init.constant_(layer.dt_bias, extreme)
    x = noise(2, 100, D, dtype=torch.float32).requires_grad_()
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            y = layer(x)
        grads = torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))
        assert y.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)


def test_a_model_of_half_precision_keeps_its_state_in_float32():
    layer = randomized(Mamba2(D, d_state=6)).bfloat16()
    x = noise(2, 150, D, dtype=torch.bfloat16)
    y, state = layer.prefill(x)
    assert (y.dtype, state.hidden.dtype) == (torch.bfloat16, torch.float32)
    assert layer.initial_state(2).hidden.dtype == torch.float32
    y_t, state = layer.step(x[:, 0], layer.initial_state(2))
    assert (y_t.dtype, state.hidden.dtype) == (torch.bfloat16, torch.float32)
    exact = layer.float()(x.float())
    assert (y.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 0}, "num_groups"),
        ({"d_state": 0}, "d_state"),
        ({"expand": 0}, "expand"),
        ({"d_conv": 0}, "d_conv"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"dt_min": 0.2}, "dt_min"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_init_floor": 0.0}, "dt_init_floor"),
        ({"A_init_range": (0.0, 1.0)}, "A_init_range"),
        ({"A_init_range": (2.0, 1.0)}, "A_init_range"),
        ({"dt_limit": (-0.1, 1.0)}, "dt_limit"),
        ({"dt_limit": (0.1, 0.1)}, "dt_limit"),
        ({"dt_limit": (math.nan, 1.0)}, "dt_limit"),
        ({"d_model": 0}, "d_model"),
    ],
    ids=str,
)
def test_mamba2_names_impossible_options(options, name):
    with pytest.raises(OptionError) as caught:
        Mamba2(**{"d_model": D} | options)
    assert caught.value.name == name


@pytest.mark.parametrize("algorithm", ["loop", "blocks"])
def test_an_unknown_algorithm_is_named(algorithm):
    x, dt, A, B = torch.randn(1, 5, 2, 3), torch.rand(1, 5, 2), -torch.rand(2), torch.randn(1, 5, 1, 4)
    with pytest.raises(OptionError, match=r"algorithm.*must be one of auto, sequential, parallel"):
        ssd(x, dt, A, B, B, A, algorithm=algorithm)
