"""LinOSS against its equations, one step after the other, and the claims of its discretisations and options."""

import math
import re
from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.linoss import LinOSS
from stu.ops.oscillators import oscillator_response
from stu.reference.linoss import damped, implicit, implicit_explicit, linoss, matrices, over_time, projected
from tests.models import composed, randomized

D, N = 3, 7
OPTIONS = {
    "im": {},
    "imex": {"discretization": "imex"},
    "damped": {"discretization": "imex", "damping": True},
}
variants = pytest.mark.parametrize("variant", OPTIONS)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def step_of(layer):
    """The step of the paper's equations with a layer's parameters, which it keeps where they are stable."""
    dt = layer.logit_dt.sigmoid()
    if layer.discretization == "im":
        return implicit(layer.A.relu(), dt)
    A, G = projected(layer.A, torch.zeros_like(dt) if layer.G is None else layer.G, dt)
    return implicit_explicit(A, dt) if layer.G is None else damped(A, G, dt)


def literal(layer, u, form=over_time):
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    y = form(u, step_of(layer), B, C[0], layer.D)
    return y if len(C) == 1 else y + form(u.flip(1), step_of(layer), B, C[1], 0 * layer.D).flip(1)


def with_extremes(layer):
    """Oscillators without stiffness, and where A must be kept: below 0, critically damped, beyond the stable range."""
    with torch.no_grad():
        layer.A[:4] = torch.tensor([-1.0, 0.0, 1e-9, 1e3])
        if layer.G is not None:
            layer.G[:3] = torch.tensor([-1.0, 5.0, 0.0])
    return layer


@variants
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize("prepare", [randomized, with_extremes], ids=["usual", "extreme"])
def test_linoss_is_its_equations(variant, causal, prepare):
    layer = prepare(LinOSS(D, d_state=N, causal=causal, **OPTIONS[variant])).double()
    u, weights = noise(2, 40, D), noise(2, 40, D)
    y, expected = layer(u), literal(layer, u)
    assert_close(y, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    for name, one, other in zip(
        dict(layer.named_parameters()),
        torch.autograd.grad((y * weights).sum(), [*layer.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [*layer.parameters()]),
        strict=True,
    ):
        if name in ("A", "G") and prepare is with_extremes:  # at a kink either side is right
            one, other = one[4:], other[4:]
        assert_close(
            one, other, rtol=1e-8, atol=1e-8 * other.abs().max().item() + 1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@variants
def test_the_parallel_scan_is_the_loop(variant):
    layer = randomized(LinOSS(D, d_state=N, **OPTIONS[variant])).double()
    for length in (1, 2, 13):
        u = noise(2, length, D)
        assert_close(literal(layer, u, linoss), literal(layer, u))


@variants
@torch.no_grad()
def test_a_step_turns_oscillators_as_the_papers_say(variant):
    """IM: |λ|² = 1/(1 + Δt² A); IMEX: |λ| = 1; with damping |λ|² = 1/(1 + Δt G), on the ring of the initialisation."""
    ring = {"r_min": 0.5, "r_max": 0.8, "max_phase": 1.0} if variant == "damped" else {}
    layer = LinOSS(D, d_state=200, **OPTIONS[variant], **ring).double()
    M, F, *_ = layer._system()
    for ours, theirs in zip((M[:200], F[:200]), matrices(step_of(layer), layer.A), strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)
    eigenvalues, dt = torch.linalg.eigvals(M[:200]), layer.logit_dt.sigmoid()
    damping = {"im": dt**2 * layer.A, "imex": 0 * dt, "damped": dt * (0 if layer.G is None else layer.G)}[variant]
    assert_close(eigenvalues.abs(), (1 + damping).rsqrt().unsqueeze(-1).expand(-1, 2), rtol=0, atol=1e-7)
    if variant == "damped":
        share = (eigenvalues[:, 0].abs() ** 2 - 0.5**2) / (0.8**2 - 0.5**2)
        for uniform in (share, eigenvalues[:, 0].angle().abs()):
            assert_close(uniform.sort().values, torch.linspace(0, 1, 200).double(), rtol=0, atol=0.15)


@variants
@torch.no_grad()
def test_small_steps_follow_the_oscillator(variant):
    """x'' = −A x − G x' from (x, x') = (1, 0), to first order in Δt."""
    layer = LinOSS(1, d_state=2, **OPTIONS[variant]).double()
    A, G, errors = torch.tensor([4.0, 9.0]), torch.tensor([0.5, 1.0]) * (variant == "damped"), []
    frequency = (A - G**2 / 4).sqrt()
    expected = torch.exp(-G / 2) * (torch.cos(frequency) + G / (2 * frequency) * torch.sin(frequency))
    for steps in (500, 1000):
        layer.logit_dt.fill_(-math.log(steps - 1))
        layer.A.copy_(A)
        if layer.G is not None:
            layer.G.copy_(G)
        rest = layer.initial_state(1)
        state = rest._replace(oscillators=torch.tensor([0.0, 1.0]).double().expand(1, 4, 2))
        for _ in range(steps):
            _, state = layer.step(torch.zeros(1, 1).double(), state)
        errors.append((state.oscillators[0, :2, 1] - expected).abs().max())
    assert errors[1] < 5e-3
    assert 0.9 < torch.log2(errors[0] / errors[1]) < 1.1


@pytest.mark.parametrize(
    ("a", "delta"),
    [(0.0, 1.0), (4.0, 1.0), (2.0**-60, 1.0), (1.5, 1.0), (0.25, 0.25), (2.25, 0.25), (2.0**-20, 1 - 2.0**-20)],
)
def test_responses_are_exact_wherever_eigenvalues_are(a, delta):
    """Double eigenvalues at ±1 and ±½, almost double ones, and both in the interior; by fractions."""
    found = oscillator_response(
        torch.tensor([a], dtype=torch.float64), torch.tensor([delta], dtype=torch.float64), 100
    )[0]
    u = [Fraction(0), Fraction(1)]
    for _ in range(99):
        u.append((1 + Fraction(delta) - Fraction(a)) * u[-1] - Fraction(delta) * u[-2])
    scale = max(abs(float(each)) for each in u)
    assert_close(
        found, torch.tensor([float(each) for each in u[1:]], dtype=torch.float64), rtol=1e-12, atol=1e-13 * scale
    )


@variants
@torch.no_grad()
def test_oscillators_are_stable_whatever_their_parameters(variant):
    layer = LinOSS(D, d_state=N, **OPTIONS[variant])
    x = noise(1, 2000, D, dtype=torch.float32)
    for dt in (-30.0, 30.0):
        for extreme in (-1e6, 0.0, 1e6):
            for parameter in (layer.A, layer.G):
                if parameter is not None:
                    parameter.fill_(extreme)
            layer.logit_dt.fill_(dt)
            M, *_ = layer._system()
            assert (torch.linalg.eigvals(M).abs() < 1 + 1e-7).all()
            assert layer(x).isfinite().all()


@variants
@torch.no_grad()
def test_long_memory_survives_low_precision(variant):
    layer, x = LinOSS(D, d_state=16, **OPTIONS[variant]), noise(1, 16384, D)
    exact = layer.double()(x)
    assert (layer.float()(x.float()) - exact).norm() < 1e-6 * exact.norm()
    assert (layer(x.bfloat16()) - layer(x.bfloat16().float())).norm() < 2**-8 * exact.norm()
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@variants
def test_oscillators_do_not_decay_by_the_optimiser(variant):
    group = composed("model=linoss", "task=lds").optimizer.groups.ssm
    layer = LinOSS(D, d_state=N, **OPTIONS[variant])
    found = {name for name, _ in layer.named_parameters() if re.search(group.match, f"blocks.0.mixer.{name}")}
    assert found == {name for name, _ in layer.named_parameters()} - {"C", "D"}
    assert group.weight_decay == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_state": 0}, "d_state"),
        ({"discretization": "zoh"}, "discretization"),
        ({"damping": True}, "damping"),
        ({"r_min": 0.0}, "r_min"),
        ({"r_min": 0.9, "r_max": 0.9}, "r_min"),
        ({"r_max": 1.1}, "r_max"),
        ({"max_phase": 3.2}, "max_phase"),
    ],
    ids=str,
)
def test_linoss_names_impossible_options(options, name):
    with pytest.raises(OptionError) as caught:
        LinOSS(D, **options)
    assert caught.value.name == name
