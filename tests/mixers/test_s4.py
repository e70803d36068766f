"""S4 and S4D against their definitions, the algorithm of the official code and golden numbers; then the operations.

Golden parameters are laid out (channel, mode) and signals (batch, channel, time).
"""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from stu.cli.composition import build
from stu.errors import OptionError
from stu.mixers.s4 import S4
from stu.mixers.s4d import S4D
from stu.ops.discretize import discretize
from stu.ops.forms import taken_for
from stu.ops.hippo import clipped_input, nplr_legs
from stu.ops.kernels import (
    dense_kernel,
    dense_state,
    diagonal_kernel,
    diagonal_responses,
    diagonal_state,
    kernel_reference,
    state_reference,
)
from stu.ops.power_series import closed_loop, reciprocal
from stu.reference.s4d import dfout_poles, discrete_kernel
from tests.golden import cases
from tests.models import composed, randomized, small_backbone

VARIANTS = {
    "s4": (S4, {}),
    "s4-rank3": (S4, {"rank": 3}),
    "s4-zoh": (S4, {"discretization": "zoh"}),
    "s4-zoh-rank2-copies": (S4, {"discretization": "zoh", "rank": 2, "n_ssm": 2, "causal": False}),
    "s4-copies": (S4, {"n_ssm": 2, "causal": False}),
    "s4d-legs-zoh": (S4D, {}),
    "s4d-lin-zoh-copies": (S4D, {"init": "lin", "n_ssm": 4, "causal": False}),
    "s4d-dfout": (S4D, {"init": "dfout", "n_ssm": 2, "causal": False}),
    "s4d-inv-bilinear": (S4D, {"init": "inv", "discretization": "bilinear", "n_ssm": 2}),
}
variants = pytest.mark.parametrize(("kind", "options"), VARIANTS.values(), ids=VARIANTS)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def assert_near(actual, expected, tolerance, what=""):
    """Relative to the largest entry."""
    assert actual.shape == expected.shape, what
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), what


def random_layer(kind, d_model=4, d_state=8, **options):
    return randomized(kind(d_model, d_state=d_state, **options)).double()


def stepped(layer, x, state=None):
    state, outputs = state or layer.initial_state(len(x)), []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1), state


# --- what the layers are, by their definitions ---


def literal_system(layer):
    """Dense Ā (D, N, N), B̄ (D, N) and C (H, D, N) of all modes and their conjugates, from x' = M x + B u."""
    both = lambda half: torch.cat((half, half.conj()), -1)  # noqa: E731
    channel = torch.arange(layer.d_model) % len(layer.B)
    A = both(torch.complex(-layer.log_A_real.exp(), layer.A_imag))[channel]
    B, C = both(torch.view_as_complex(layer.B))[channel], both(torch.view_as_complex(layer.C))
    dt = layer.log_dt.exp()[:, None, None]
    if getattr(layer, "init", "") == "dfout":
        A, B, dt = torch.complex(dt[:, 0] * A.real, A.imag), dt[:, 0] * B, torch.ones_like(dt)
    M, eye = torch.diag_embed(A), torch.eye(A.shape[-1]).to(A)
    if isinstance(layer, S4):
        for column in both(torch.view_as_complex(layer.P))[:, channel]:
            M = M - column.unsqueeze(-1) * column.conj().unsqueeze(-2)
    if getattr(layer, "discretization", "bilinear") == "zoh":
        dA = torch.matrix_exp(dt * M)
        dB = torch.linalg.solve(M, dA - eye) @ B.unsqueeze(-1)
    else:
        dA = torch.linalg.solve(eye - dt / 2 * M, eye + dt / 2 * M)
        dB = torch.linalg.solve(eye - dt / 2 * M, dt * B.unsqueeze(-1))
    return dA, dB.squeeze(-1), C


@variants
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 100])
def test_kernels_are_c_times_powers_of_a_times_b(kind, options, length):
    layer = random_layer(kind, **options)
    expected = kernel_reference(*literal_system(layer), length)
    assert_close(expected.imag, torch.zeros_like(expected.real), rtol=0, atol=1e-10)
    expected = expected.real
    expected[0, 0] += layer.D
    assert layer.kernel(length).shape == (1 if layer.causal else 2, length, layer.d_model)
    assert_near(layer.kernel(length), expected, 1e-11)


@variants
def test_outputs_are_the_sums_of_their_kernels(kind, options):
    layer, length = random_layer(kind, **options), 13
    dA, dB, C = literal_system(layer)
    kernel = kernel_reference(dA, dB, C, length).real
    x = noise(2, length, layer.d_model)
    expected = torch.zeros_like(x)
    for t in range(length):
        expected[:, t] = layer.D * x[:, t]
        for s in range(length):
            if s <= t:
                expected[:, t] += kernel[0, t - s] * x[:, s]
            elif not layer.causal:
                expected[:, t] += kernel[1, s - t - 1] * x[:, s]
    assert_near(layer(x), expected, 1e-11)


@variants
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 100, 1024])
def test_devices_have_the_same_kernels_in_few_calls(kind, options, length):
    layer = random_layer(kind, **options)
    expected = kernel_reference(*literal_system(layer), length).real
    expected[0, 0] += layer.D
    with taken_for("cuda"):
        kernel = layer.kernel(length)
    assert_near(kernel, expected, 1e-12)
    direction, parameters = noise(*kernel.shape), dict(layer.named_parameters())
    found, gradients = (torch.autograd.grad(k, parameters.values(), direction) for k in (kernel, layer.kernel(length)))
    for name, *pair in zip(parameters, found, gradients, strict=True):
        assert_near(*pair, 1e-11, name)


@variants
@pytest.mark.parametrize(("dt_min", "dt_max"), [(1e-5, 1e-5), (1e-3, 1e-1), (1.0, 1.0)], ids=str)
def test_float32_outputs_and_gradients_of_devices(kind, options, dt_min, dt_max):
    layer = kind(4, d_state=64, dt_min=dt_min, dt_max=dt_max, **options)
    exact, x = copy.deepcopy(layer).double(), noise(2, 3000, 4, dtype=torch.float32)
    expected = exact(x.double())
    with taken_for("cuda"):
        y = layer(x)
    assert_near(y.double(), expected, 3e-6)
    direction = noise(*y.shape)
    found = torch.autograd.grad(y, layer.parameters(), direction.float())
    for one, other in zip(found, torch.autograd.grad(expected, exact.parameters(), direction), strict=True):
        assert_near(one.double(), other, 1e-5)


def literal_cauchy_kernel(layer, length):
    """The official algorithm (2111.00396, algorithm 1): Cauchy sums with (1 − Ā^L)ᵀ C at roots of unity, Woodbury."""
    dA, _, C = literal_system(layer)
    truncated = C[0] - (torch.linalg.matrix_power(dA, length).mT @ C[0].unsqueeze(-1)).squeeze(-1)
    both = lambda half: torch.cat((half, half.conj()), -1)  # noqa: E731
    A = both(torch.complex(-layer.log_A_real.exp(), layer.A_imag))
    B, P = both(torch.view_as_complex(layer.B)), both(torch.view_as_complex(layer.P))  # (1, N), (R, 1, N)
    dt = layer.log_dt.exp()[:, None]
    omega = torch.exp(-2j * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64))
    z = 2 * (1 - omega) / (1 + omega)
    left = torch.cat((truncated[None], P.conj().expand(-1, len(dt), -1)))  # (1 + R, D, N)
    right = torch.cat((B[None], P)).expand(-1, len(dt), -1)
    v = dt * left[:, None] * right[None]
    r = (v.unsqueeze(-1) / (z - (dt * A).unsqueeze(-1))).sum(-2).permute(2, 3, 0, 1)  # (D, F, 1 + R, 1 + R)
    woodbury = torch.linalg.inv(torch.eye(len(P)).to(r) + r[..., 1:, 1:])
    spectrum = r[..., :1, :1] - r[..., :1, 1:] @ woodbury @ r[..., 1:, :1]
    return torch.fft.irfft(spectrum[..., 0, 0] * 2 / (1 + omega), n=length).mT


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("length", [16, 63, 256])
def test_s4_is_the_inverse_fourier_transform_of_cauchy_sums(rank, length):
    layer = random_layer(S4, rank=rank)
    with torch.no_grad():
        layer.D.zero_()
        assert_near(layer.kernel(length)[0], literal_cauchy_kernel(layer, length), 1e-10)


def test_s4_without_its_feedback_is_s4d():
    s4 = random_layer(S4)
    s4d = S4D(s4.d_model, d_state=8, discretization="bilinear").double()
    with torch.no_grad():
        s4.P.zero_()
    s4d.load_state_dict({name: value for name, value in s4.state_dict().items() if name != "P"})
    assert_near(s4.kernel(50), s4d.kernel(50), 1e-13)


def both_kernels(layer, length):
    """By power series with a feedback, and by powers of dense matrices; without the skip."""
    ways = {}
    for way in (True, False):
        layer._by_feedback = lambda _, way=way: way
        ways[way] = layer.kernel(length)
    del layer._by_feedback
    for kernel in ways.values():
        kernel[0, 0] -= layer.D
    return ways[True], ways[False]


@pytest.mark.parametrize(("dt_min", "dt_max"), [(1e-3, 1e-1), (1e-4, 1e-4), (1e-1, 1e-1), (1e2, 1e2)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 100, 1024, 4097])
def test_both_kernels_of_s4_agree(dt_min, dt_max, length):
    layer = S4(3, rank=2, causal=False, dt_min=dt_min, dt_max=dt_max).double()
    feedback, dense = both_kernels(layer, length)
    assert_near(feedback, dense, 1e-12)
    direction, parameters = noise(*dense.shape), dict(layer.named_parameters())
    del parameters["D"]
    gradients = (torch.autograd.grad(kernel, parameters.values(), direction) for kernel in (feedback, dense))
    for name, *pair in zip(parameters, *gradients, strict=True):
        assert_near(*pair, 1e-9, name)


def test_both_kernels_of_s4_agree_where_the_feedback_is_strong():
    layer = S4(3, rank=2).double().requires_grad_(False)
    layer.P *= 100
    assert_near(*both_kernels(layer, 2048), 1e-11)


def test_s4_takes_the_kernel_that_costs_less():
    taken = {}
    for options in ({}, {"rank": 2}, {"d_state": 16}, {"discretization": "zoh"}):
        layer = S4(2, **options)
        taken[str(options)] = [layer._by_feedback(length) for length in (1, 512, 2048, 4096)]
    assert list(taken.values()) == [
        [True, True, True, False],
        [True, True, False, False],
        [True, False, False, False],
        [False] * 4,
    ]


@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
@pytest.mark.parametrize("dt", [1e-5, 1e-3, 0.1, 1.0])
def test_a_step_of_s4_never_lengthens_a_vector(dt, discretization):
    layer = S4(2, dt_min=dt, dt_max=dt, discretization=discretization).double()
    A, _ = randomized(layer, 1.0)._system().dense()
    assert torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-12


@variants
def test_a_kernel_is_the_beginning_of_longer_ones(kind, options):
    layer = random_layer(kind, **options)
    longest = layer.kernel(700)
    for length in (1, 2, 31, 32, 33, 512):
        assert_near(layer.kernel(length), longest[:, :length], 1e-12)


@pytest.mark.parametrize(("kind", "method"), [(S4, "bilinear"), (S4, "zoh"), (S4D, "zoh")])
@pytest.mark.parametrize("length", [1, 5, 64, 65, 1000])
def test_prefill_leaves_the_state_of_all_steps(kind, method, length):
    layer = random_layer(kind, n_ssm=2, discretization=method)
    x = noise(2, length + 3, layer.d_model)
    y, state = layer.prefill(x[:, :length])
    by_steps, expected = stepped(layer, x[:, :length])
    assert_near(y, by_steps, 1e-12)
    assert_near(torch.view_as_real(state.modes), torch.view_as_real(expected.modes), 1e-12)
    assert_near(stepped(layer, x[:, length:], state)[0], layer(x)[:, length:], 1e-12)


@pytest.mark.parametrize("kind", [S4, S4D])
def test_channels_share_copies_in_turn(kind):
    layer = random_layer(kind, n_ssm=2)
    expanded = kind(layer.d_model, d_state=8, n_ssm=layer.d_model).double()
    copies = {"log_A_real": 0, "A_imag": 0, "B": 0, "P": 1}
    state = layer.state_dict()
    for name in copies.keys() & state.keys():
        state[name] = torch.cat((state[name], state[name]), copies[name])
    expanded.load_state_dict(state)
    assert_near(expanded.kernel(20), layer.kernel(20), 1e-14)


# --- numbers of limited precision, and cost ---

STEPS = [(1e-5, 1e-5), (1e-3, 1e-1), (1.0, 1.0)]


@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize(("dt_min", "dt_max"), STEPS, ids=str)
def test_float32_is_exact_to_rounding_over_long_sequences(kind, dt_min, dt_max):
    length = 16384
    layer = kind(2, dt_min=dt_min, dt_max=dt_max)
    exact = copy.deepcopy(layer).double()
    x = noise(1, length, 2, dtype=torch.float32)
    y, expected = layer(x), exact(x.double())
    assert_near(y.double(), expected, 3e-6)
    y.square().mean().backward()
    expected.square().mean().backward()
    for one, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert_near(one.grad.double(), other.grad, 2e-5)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :-9])
        assert_near(stepped(layer, x[:, -9:], state)[0].double(), expected[:, -9:], 3e-6)


@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize(("dt_min", "dt_max"), STEPS, ids=str)
def test_half_precision_never_reaches_the_state_space(kind, dt_min, dt_max):
    layer = kind(2, dt_min=dt_min, dt_max=dt_max).bfloat16()
    exact = copy.deepcopy(layer).float()
    x = noise(1, 512, 2).bfloat16()
    y, expected = layer(x), exact(x.float())
    assert y.dtype == torch.bfloat16
    assert_near(y.float(), expected, 2**-8)
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    state = layer.prefill(x[:, :-1])[1]
    y_t, state = layer.step(x[:, -1], state)
    assert (y_t.dtype, state.modes.dtype) == (torch.bfloat16, torch.complex128)
    assert_near(y_t.float(), expected[:, -1], 2**-8)
    (_, before), outside = exact.prefill(x.float()), exact.step(x[:, -1].float(), state)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(x.float()), expected)
        assert torch.equal(exact.prefill(x.float())[1].modes, before.modes)
        assert torch.equal(exact.step(x[:, -1].float(), state)[0], outside)


@pytest.mark.parametrize(("kind", "by_feedback"), [(S4, True), (S4, False), (S4D, None)])
def test_nothing_of_length_times_state_is_kept(kind, by_feedback):
    """The largest array is a channel's kernel or a matrix of its states, L or N² numbers, not L·N."""
    layer, length, sizes = kind(2, d_state=64), 16384, []
    layer._by_feedback = lambda _: by_feedback
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        layer.kernel(length)
    assert max(sizes) <= 2 * length


@pytest.mark.slow
@pytest.mark.parametrize("kind", [S4, S4D])
def test_compiled_in_one_graph(kind):
    layer = random_layer(kind, causal=False)
    x = noise(2, 20, layer.d_model)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    fast, eager = compiled(x), layer(x)
    assert_near(fast, eager, 1e-14)
    parameters = dict(layer.named_parameters())
    gradients = (torch.autograd.grad(y.sin().sum(), parameters.values()) for y in (fast, eager))
    for name, one, other in zip(parameters, *gradients, strict=True):
        assert_near(one, other, 1e-12, name)


# --- initialisation and training ---


@pytest.mark.parametrize("kind", [S4, S4D])
def test_parameters_begin_as_in_the_official_code(kind):
    layer = kind(2048, d_state=4, causal=False, dt_min=1e-4, dt_max=1e-2)
    log_dt = layer.log_dt.detach()
    assert math.log(1e-4) <= log_dt.min() < math.log(1.1e-4)
    assert math.log(0.9e-2) < log_dt.max() <= math.log(1e-2)
    assert log_dt.mean().item() == pytest.approx(math.log(1e-3), abs=0.1)  # uniform in the logarithm
    assert layer.C.var().item() == pytest.approx(0.5, rel=0.05)  # of either part
    assert layer.D.var().item() == pytest.approx(1, rel=0.1)
    assert torch.equal(layer.log_A_real, torch.full((1, 2), 0.5).log())


def test_s4_begins_as_hippo_legs():
    layer = S4(2, d_state=64, n_ssm=2).double()
    legs = nplr_legs(64)
    expected = {"A": legs.eigenvalues, "P": legs.P, "B": clipped_input(legs.B)}
    actual = {"A": torch.complex(-layer.log_A_real.exp(), layer.A_imag)}
    actual |= {"P": torch.view_as_complex(layer.P[0]), "B": torch.view_as_complex(layer.B)}
    for name, value in expected.items():
        assert_near(actual[name], value[:32].expand(2, -1), 1e-6, name)


def test_further_columns_of_the_low_rank_part_begin_small_and_learn():
    layer = S4(4, rank=2)
    assert 0 < layer.P[1].abs().max() < 0.1
    layer.kernel(10).square().sum().backward()
    assert layer.P.grad[1].abs().max() > 0


@pytest.mark.parametrize(
    ("model", "names"), [("s4", "log_dt log_A_real A_imag P B"), ("s4d", "log_dt log_A_real A_imag B")]
)
def test_the_state_space_learns_at_its_own_rate_without_decay(model, names):
    backbone = small_backbone(model, seq_len=16)
    config = composed(f"model={model}", "task=lds", "optimizer.lr=0.01")
    recipe = build(config.optimizer)(backbone.named_parameters(), 100)
    optimizer, _ = recipe.build(backbone.named_parameters())
    group = next(group for group in optimizer.param_groups if group["name"] == "ssm")
    assert (group["initial_lr"], group["weight_decay"]) == (1e-3, 0)
    expected = {id(getattr(block.mixer, name)) for block in backbone.blocks for name in names.split()}
    assert {id(parameter) for parameter in group["params"]} == expected


@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_state": 7}, "d_state"),
        ({"d_state": 0}, "d_state"),
        ({"n_ssm": 3}, "n_ssm"),
        ({"n_ssm": 0}, "n_ssm"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
    ids=str,
)
def test_impossible_options_are_named(kind, options, name):
    with pytest.raises(OptionError) as caught:
        kind(8, **options)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (S4D, {"discretization": "bilinear", "init": "dfout"}),
        (S4, {"rank": 0}),
        (S4, {"discretization": "foo"}),
        (S4D, {"init": "foo"}),
        (S4D, {"discretization": "foo"}),
    ],
    ids=str,
)
def test_impossible_options_of_one_are_named(kind, options):
    with pytest.raises(OptionError) as caught:
        kind(8, **options)
    assert caught.value.name == next(iter(options))


def test_dfout_fills_the_half_circle_with_poles_at_any_damping():
    layer = S4D(6, d_state=8, init="dfout", n_ssm=6, dt_min=1e-4, dt_max=0.5).double()
    poles, b, C = layer._system()
    xi = layer.log_dt.exp()
    assert_close(poles.conj(), dfout_poles(xi, 8), rtol=0, atol=1e-6)
    grid = torch.linspace(0, math.pi, 25)[:-1].double()
    assert_close((-poles.angle()).flatten().sort().values, grid, rtol=0, atol=1e-6)
    assert_near(kernel_without_skip(layer, 40)[0], discrete_kernel(poles, b, C[0], 40), 1e-12)
    assert_near(b, xi.unsqueeze(-1) * (poles - 1) / poles.log(), 1e-12)
    with torch.no_grad():
        layer.log_dt += 1  # damps, and turns nothing
    damped = layer._system()[0]
    assert_close(damped.angle(), poles.angle(), rtol=0, atol=1e-14)
    assert_close(damped.abs().log(), math.e * poles.abs().log(), rtol=1e-12, atol=0)


def test_copies_of_dfout_are_shared_in_turn():
    layer = S4D(6, d_state=8, init="dfout", n_ssm=2).double()
    poles = layer._system()[0].angle()
    assert_close(poles[2:], poles[:-2], rtol=0, atol=1e-15)
    assert len({f"{-angle:.6f}" for angle in poles.flatten().tolist()}) == 8


# --- golden numbers ---


def golden_layer(layer, arrays, case, *, A, B, C):
    """The layer with golden parameters, in float64."""
    layer = layer.double()
    values = {"log_A_real": (-A.real).log(), "A_imag": A.imag, "B": torch.view_as_real(B), "C": torch.view_as_real(C)}
    values |= {"log_dt": arrays[f"{case}__dt"].log(), "D": arrays[f"{case}__D"]}
    if isinstance(layer, S4):
        values["P"] = torch.view_as_real(arrays[f"{case}__P"])[None]
    assert values.keys() == dict(layer.named_parameters()).keys()
    layer.load_state_dict(values)
    return layer.requires_grad_(False)


def kernel_without_skip(layer, length):
    kernel = layer.kernel(length)
    kernel[0, 0] -= layer.D
    return kernel.mT


def block(arrays, case, y):
    """GELU, linear to twice the width, gated linear unit: what follows in the official block; (B, D, L)."""
    return F.glu(arrays[f"{case}__out_w"] @ F.gelu(y) + arrays[f"{case}__out_b"].unsqueeze(-1), dim=1)


def check_golden_outputs(layer, arrays, case, expected):
    x = arrays[f"{case}__x"].mT
    assert_near(layer(x).mT, expected, 1e-12)
    cut = x.shape[1] // 3
    y, state = layer.prefill(x[:, :cut])
    assert_near(torch.cat((y, stepped(layer, x[:, cut:], state)[0]), 1).mT, expected, 1e-12)


@pytest.mark.parametrize("case", cases("s4_dplr", r"([a-z])__k"))
def test_s4_against_golden_numbers(golden, case):
    arrays = golden("s4_dplr")
    A, B, C = (arrays[f"{case}__{name}"] for name in "ABC")
    layer = golden_layer(S4(len(A), d_state=2 * A.shape[1], n_ssm=len(A)), arrays, case, A=A, B=B, C=C[None])
    for name in ("k", "k_double"):
        expected = arrays[f"{case}__{name}"]
        for kernel in both_kernels(layer, expected.shape[1]):
            assert_near(kernel[0].mT, expected, 1e-11, name)
    check_golden_outputs(layer, arrays, case, arrays[f"{case}__y_linear"])
    steps = stepped(layer, arrays[f"{case}__x"].mT)[0].mT
    for name in ("y_step_dense", "y_step_linear"):
        assert_near(steps, arrays[f"{case}__{name}"], 1e-12, name)
    assert_near(block(arrays, case, layer(arrays[f"{case}__x"].mT).mT), arrays[f"{case}__y_block"], 1e-12)


@pytest.mark.parametrize("case", cases("s4_dplr", r"([a-z])__dA", optional=True))
def test_steps_of_s4_against_golden_matrices(golden, case):
    arrays = golden("s4_dplr")
    A, B, C = (arrays[f"{case}__{name}"] for name in "ABC")
    layer = golden_layer(S4(len(A), d_state=2 * A.shape[1], n_ssm=len(A)), arrays, case, A=A, B=B, C=C[None])
    x, u = torch.complex(noise(3, *A.shape), noise(3, *A.shape)), noise(3, len(A))
    both = torch.cat((x, x.conj()), -1)
    expected = torch.einsum("dmn,bdn->bdm", arrays[f"{case}__dA"], both) + arrays[f"{case}__dB"] * u.unsqueeze(-1)
    advanced = layer._bilinear().advance(x, u)
    assert_near(torch.cat((advanced, advanced.conj()), -1), expected, 1e-12)
    assert_near(torch.cat((C, C.conj()), -1), arrays[f"{case}__dC"], 1e-9)  # which the official code solved for


@pytest.mark.parametrize(("case", "init", "method"), cases("s4d", r"([a-z])__(\w+)__(zoh|bilinear)__k"))
def test_s4d_against_golden_numbers(golden, case, init, method):
    arrays = golden("s4d")
    A, B, C = arrays[f"{case}__{init}__A"], arrays[f"{case}__{init}__B_init"], arrays[f"{case}__C"]
    layer = S4D(len(A), d_state=2 * A.shape[1], n_ssm=len(A), init=init, discretization=method)
    layer = golden_layer(layer, arrays, case, A=A, B=B, C=C[None])
    expected = arrays[f"{case}__{init}__{method}__k"]
    assert_near(kernel_without_skip(layer, expected.shape[1])[0], expected, 1e-12)
    check_golden_outputs(layer, arrays, case, arrays[f"{case}__{init}__{method}__y_linear"])


@pytest.mark.parametrize("case", cases("s4d", r"([a-z])__lin_min__k"))
def test_the_small_s4d_against_golden_numbers(golden, case):
    arrays = golden("s4d")
    A, C = arrays[f"{case}__lin_min__A"], arrays[f"{case}__C"]
    layer = S4D(len(A), d_state=2 * A.shape[1], n_ssm=len(A), init="lin")
    layer = golden_layer(layer, arrays, case, A=A, B=torch.ones_like(A), C=C[None])
    expected = arrays[f"{case}__lin_min__k"]
    assert_near(kernel_without_skip(layer, expected.shape[1])[0], expected, 1e-12)
    y = layer(arrays[f"{case}__x"].mT).mT
    assert_near(block(arrays, case, y), arrays[f"{case}__lin_min__y_block"], 1e-12)


@pytest.mark.parametrize("case", cases("s4d", r"([a-z])__bidir__k"))
def test_the_bidirectional_s4d_against_golden_numbers(golden, case):
    arrays = golden("s4d")
    A, B, C = arrays[f"{case}__lin__A"], arrays[f"{case}__lin__B_init"], arrays[f"{case}__bidir__C"]
    layer = S4D(len(A), causal=False, d_state=2 * A.shape[1], n_ssm=len(A), init="lin")
    layer = golden_layer(layer, arrays, case, A=A, B=B, C=C)
    expected = arrays[f"{case}__bidir__k"]
    assert_near(kernel_without_skip(layer, expected.shape[2]), expected, 1e-12)
    assert_near(layer(arrays[f"{case}__x"].mT).mT, arrays[f"{case}__bidir__y_linear"], 1e-12)


# --- the operations ---

WIDTH, STATES = 2, 3


def decaying(*shape):
    """Complex numbers in the unit disc."""
    return torch.polar(torch.rand(*shape, dtype=torch.float64), 2 * math.pi * torch.rand(*shape, dtype=torch.float64))


def complex_noise(*shape):
    return torch.complex(noise(*shape), noise(*shape))


def contraction():
    A = noise(WIDTH, STATES, STATES)
    return 0.99 * A / torch.linalg.matrix_norm(A, 2)[:, None, None]


@given(length=st.integers(1, 150), outputs=st.integers(1, 3))
def test_kernels_are_their_references(length, outputs):
    a, b, c = decaying(WIDTH, STATES), complex_noise(WIDTH, STATES), complex_noise(outputs, WIDTH, STATES)
    expected = 2 * kernel_reference(torch.diag_embed(a), b, c, length).real
    assert_close(diagonal_kernel(a, b, c, length), expected, rtol=0, atol=1e-12)
    responses = diagonal_responses(a, torch.stack((3 * b, b)), c, length)
    assert_close(responses.mT, torch.stack((3 * expected, expected), 1), rtol=0, atol=1e-12)
    A, B, C = contraction(), noise(WIDTH, STATES), noise(outputs, WIDTH, STATES)
    assert_close(dense_kernel(A, B, C, length), kernel_reference(A, B, C, length), rtol=0, atol=1e-12)


def decaying_series(*shape, length):
    """(*shape, D, L), whose entries halve every step: a feedback of these does not grow."""
    return noise(*shape, WIDTH, length) * 0.1 * 0.5 ** torch.arange(length, dtype=torch.float64)


def toeplitz(series):
    """(i, j, D, L) → the causal filters as one matrix a channel, (D, i·L, j·L)."""
    time = torch.arange(series.shape[3])
    lag = time[:, None] - time  # (t, s)
    filters = series[..., lag.clamp(min=0)] * (lag >= 0)  # (i, j, D, t, s)
    return filters.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


@given(length=st.integers(1, 40), outputs=st.integers(1, 3), inputs=st.integers(1, 2), rank=st.integers(0, 3))
def test_closed_loops_are_solutions_of_their_equations(length, outputs, inputs, rank):
    responses = decaying_series(outputs + rank, inputs + rank, length=length)
    outward, inward = toeplitz(responses[:outputs]), toeplitz(responses[outputs:])
    free, back = inputs * length, torch.eye(rank * length, dtype=torch.float64)
    fed_back = torch.linalg.solve(back + inward[:, :, free:], inward[:, :, :free])
    expected = outward[:, :, :free] - outward[:, :, free:] @ fed_back
    assert_close(toeplitz(closed_loop(responses, rank)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pole", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("length", [1, 2, 17, 500])
def test_reciprocals_are_their_closed_forms(pole, length):
    """1/(1 + s) = (1 − p z)/(1 + g − p z) = 1 − g/(1 + g) Σ (p/(1 + g))^l z^l for s = g/(1 − p z)."""
    time = torch.arange(length, dtype=torch.float64)
    gain = torch.tensor([[1e-3], [1.0], [1e3]], dtype=torch.float64)
    expected = -gain / (1 + gain) * (pole / (1 + gain)) ** time
    expected[:, 0] += 1
    assert_close(reciprocal(gain * pole**time), expected, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_gradients_of_closed_loops():
    responses = decaying_series(3, 3, length=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: closed_loop(x, 2), responses)
    assert torch.autograd.gradgradcheck(lambda x: closed_loop(x[1:], 1), responses)
    assert torch.autograd.gradgradcheck(reciprocal, responses[0, 0])


@given(length=st.integers(1, 150), batch=st.integers(1, 3))
def test_states_are_their_references(length, batch):
    u = noise(batch, length, WIDTH)
    a, b = decaying(WIDTH, STATES), complex_noise(WIDTH, STATES)
    assert_close(diagonal_state(a, b, u), state_reference(torch.diag_embed(a), b, u), rtol=0, atol=1e-12)
    A, B = contraction(), noise(WIDTH, STATES)
    assert_close(dense_state(A, B, u), state_reference(A, B, u), rtol=0, atol=1e-12)


@given(start=st.integers(0, 40), steps=st.integers(0, 40), end=st.integers(0, 40))
def test_states_of_padded_sequences_are_their_references(start, steps, end):
    mask = torch.arange(start + steps + end + 1) >= start  # the second sequence has one step or more, and no end
    mask = torch.stack((mask & (torch.arange(len(mask)) < start + steps), mask))
    u = noise(*mask.shape, WIDTH).masked_fill(~mask.unsqueeze(-1), 0)
    alone = [u[row : row + 1, mask[row]] for row in range(2)]
    a, b, x = decaying(WIDTH, STATES), complex_noise(WIDTH, STATES), complex_noise(2, WIDTH, STATES)
    A, B = contraction(), noise(WIDTH, STATES)
    for initial in (None, x):
        first = [None if initial is None else initial[row : row + 1] for row in range(2)]
        expected = [state_reference(torch.diag_embed(a), b, *row) for row in zip(alone, first, strict=True)]
        assert_close(diagonal_state(a, b, u, mask, initial), torch.cat(expected), rtol=0, atol=1e-12)
        first = [None if initial is None else part.real for part in first]
        expected = [state_reference(A, B, *row) for row in zip(alone, first, strict=True)]
        real = None if initial is None else initial.real
        assert_close(dense_state(A, B, u, mask, real), torch.cat(expected), rtol=0, atol=1e-12)


def test_gradients_of_kernels_and_states():
    a, b, c = decaying(WIDTH, STATES), complex_noise(WIDTH, STATES), complex_noise(2, WIDTH, STATES)
    A, B, C = contraction(), noise(WIDTH, STATES), noise(2, WIDTH, STATES)
    u = noise(2, 7, WIDTH)
    diagonal, dense = (a, b, c), (A, B, C)
    for x in (*diagonal, *dense, u):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: diagonal_kernel(*x, 7), diagonal)
    assert torch.autograd.gradgradcheck(lambda *x: diagonal_kernel(*x, 7), diagonal)
    assert torch.autograd.gradcheck(lambda *x: dense_kernel(*x, 7), dense)
    assert torch.autograd.gradcheck(diagonal_state, (a, b, u))
    assert torch.autograd.gradcheck(dense_state, (A, B, u))
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    x, real = complex_noise(2, WIDTH, STATES).requires_grad_(), noise(2, WIDTH, STATES).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: diagonal_state(*inputs[:3], mask, x), (a, b, u, x))
    assert torch.autograd.gradcheck(lambda *inputs: dense_state(*inputs[:3], mask, real), (A, B, u, real))


def test_modes_that_die_at_once_have_gradients():
    """ā = 0 is reached by the bilinear rule at dt·Λ = −2, where a power of its logarithm would be nan."""
    a = torch.zeros(1, 1, dtype=torch.complex128, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.complex128)
    kernel = diagonal_kernel(a, one, one[None], 5)
    assert kernel.flatten().tolist() == [2, 0, 0, 0, 0]
    (grad,) = torch.autograd.grad(kernel[0, 1, 0], a)
    assert grad.item() == 2


@pytest.mark.parametrize("dt", [1e-12, 1e-3, 1.0, 1e4])
def test_discretizations_are_their_formulas(dt):
    A = torch.tensor([-0.5 + 3j, -1e-4 - 1300j, -2.0 + 0j], dtype=torch.complex128)
    step = torch.tensor(dt, dtype=torch.float64)
    a, gain = discretize(A, step, "zoh")
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(200))
    assert_close(a, torch.exp(dt * A), rtol=1e-14, atol=0)
    if dt <= 1e-1:  # the input is held for a step: ∫₀^dt e^{A s} ds
        held = (torch.exp(A[:, None] * dt * (nodes + 1) / 2) * weights).sum(-1) * dt / 2
        assert_close(gain, held, rtol=1e-12, atol=0)
    a, gain = discretize(A, step, "bilinear")
    assert_close(a, (1 + dt * A / 2) / (1 - dt * A / 2), rtol=1e-9, atol=1e-14)
    assert_close(gain, dt / (1 - dt * A / 2), rtol=1e-14, atol=0)
    with pytest.raises(OptionError, match="discretization=euler: must be zoh or bilinear"):
        discretize(A, step, "euler")
