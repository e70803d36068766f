"""The LRU against the numbers of the published code, its equation written out, and the claims of its options."""

import math
import re

import pytest
import torch
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.lru import LRU, ring_eigenvalues
from tests.golden import cases
from tests.models import composed, randomized

D, N = 3, 6


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def pair(re, im):
    return torch.stack((re, im), -1)


def literal(layer, u):
    """The equation of the paper (2303.06349, appendix A), one step after the other; (L, D) → (L, D)."""
    modulus, phase = torch.exp(-torch.exp(layer.nu_log)), torch.exp(layer.theta_log)
    eigenvalues = torch.complex(modulus * torch.cos(phase), modulus * torch.sin(phase))
    B, C = torch.complex(*layer.B.unbind(-1)), torch.complex(*layer.C.unbind(-1))
    drive = [torch.exp(layer.gamma_log) * (B @ u_t.to(B.dtype)) for u_t in u]

    def states(inputs):
        x = torch.zeros_like(inputs[0])
        for b in inputs:
            x = eigenvalues * x + b
            yield x

    y = torch.stack([(C[0] @ x).real for x in states(drive)])
    if len(C) == 2:
        y = y + torch.stack([(C[1] @ z).real for z in [*states(drive[::-1])][::-1]])
    return y + layer.D * u


@pytest.mark.parametrize("case", cases("lru", r"(.+?)__y"))
def test_lru_is_the_published_one(case, golden):
    arrays = golden("lru")
    get = lambda name: arrays[f"{case}__{name}"]  # noqa: E731
    layer = LRU(get("D").numel(), d_state=get("nu_log").numel()).double()
    golden_of = {
        "nu_log": lambda p: get(p + "nu_log"),
        "theta_log": lambda p: get(p + "theta_log"),
        "gamma_log": lambda p: get(p + "gamma_log"),
        "B": lambda p: pair(get(p + "B_re"), get(p + "B_im")),
        "C": lambda p: pair(get(p + "C_re"), get(p + "C_im")).unsqueeze(0),
        "D": lambda p: get(p + "D"),
    }
    layer.load_state_dict({name: value("") for name, value in golden_of.items()})
    x = get("x").clone().requires_grad_()
    y = layer(x)
    assert_close(layer._system()[0].detach(), get("lambda"), rtol=0, atol=1e-14)
    assert_close(y.detach(), get("y"), rtol=0, atol=1e-10)
    (y * get("loss_w")).sum().backward()
    assert_close(x.grad, get("g_x"), rtol=0, atol=1e-10)
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, golden_of[name]("g_"), rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", cases("lru", r"(init\d+)__nu_log"))
def test_lru_begins_as_the_published_one(case, golden, monkeypatch):
    arrays = golden("lru")
    get = lambda name: arrays[f"{case}__{name}"]  # noqa: E731
    limits = {name: get(name).item() for name in ("r_min", "r_max", "max_phase")}
    nu, theta = ring_eigenvalues(get("u_nu"), get("u_theta"), **limits)
    assert_close(nu.log(), get("nu_log"), rtol=0, atol=1e-12)
    assert_close(theta.log(), get("theta_log"), rtol=0, atol=1e-12)
    draws = torch.stack((get("u_nu"), get("u_theta")))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.copy_(draws))
    layer = LRU(D, d_state=draws.shape[1], **limits)
    for name in ("nu_log", "theta_log", "gamma_log"):
        assert_close(getattr(layer, name).detach(), get(name).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
def test_lru_is_its_equation(causal):
    layer = randomized(LRU(D, d_state=N, causal=causal)).double()
    u = noise(2, 23, D)
    expected = torch.stack([literal(layer, u_b) for u_b in u])
    assert_close(layer(u), expected, rtol=0, atol=1e-12)
    weights = noise(2, 23, D)
    for one, other in zip(
        torch.autograd.grad((layer(u) * weights).sum(), [*layer.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [*layer.parameters()]),
        strict=True,
    ):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("exponential", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_options_are_forms_of_one_equation(exponential, normalize):
    """Set to the same λ and to the same product exp(γ) B, all forms are the full LRU."""
    full = randomized(LRU(D, d_state=N)).double()
    layer = LRU(D, d_state=N, exponential=exponential, normalize=normalize).double()
    values = full.state_dict()
    if not exponential:
        del values["nu_log"], values["theta_log"]
        values["eigenvalues"] = torch.view_as_real(full._system()[0].detach())
    if not normalize:
        values["B"] = values.pop("gamma_log").exp()[:, None, None] * values["B"]
    layer.load_state_dict(values)
    u = noise(2, 40, D)
    assert_close(layer(u), full(u), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponential", [True, False])
def test_eigenvalues_begin_on_the_ring_or_on_the_disk(exponential):
    def eigenvalues(**options):
        return LRU(1, d_state=4000, exponential=exponential, **options)._system()[0].detach()

    ring = eigenvalues(r_min=0.5, r_max=0.8, max_phase=1.0)
    assert ring.abs().min() >= 0.5 - 1e-6
    assert ring.abs().max() <= 0.8 + 1e-6
    assert ring.angle().min() >= 0
    assert ring.angle().max() <= 1 + 1e-6
    area = (ring.abs() ** 2 - 0.5**2) / (0.8**2 - 0.5**2)  # inside |λ|, of the whole ring
    disk = eigenvalues(ring=False, r_min=0.5, r_max=0.8, max_phase=1.0)
    turn = disk.angle().remainder(2 * math.pi) / (2 * math.pi)
    for uniform in (area, ring.angle(), disk.abs() ** 2, turn):
        assert_close(uniform.sort().values, torch.linspace(0, 1, 4000).double(), rtol=0, atol=0.04)


def test_normalisation_keeps_the_variance_of_white_noise():
    layer = LRU(16, d_state=64, r_min=0.9, r_max=0.99).double()
    eigenvalues, B, _ = layer._system()
    variance = B.abs().square().sum(-1) / (1 - eigenvalues.abs() ** 2)  # of x, where u is white and of variance 1
    assert_close(variance, torch.view_as_complex(layer.B).abs().square().sum(-1), rtol=1e-5, atol=0)
    assert layer.B.square().sum(-1).mean().item() == pytest.approx(1 / 16, rel=0.1)
    assert layer.C.square().sum(-1).mean().item() == pytest.approx(2 / 64, rel=0.1)


def test_the_stable_form_is_stable_whatever_its_parameters():
    layer = LRU(D, d_state=N, causal=False)
    x = noise(1, 2000, D, dtype=torch.float32)
    for extreme in (-30.0, 30.0):
        with torch.no_grad():
            layer.nu_log.fill_(extreme)
            layer.theta_log.fill_(extreme)
        assert (layer._system()[0].abs() <= 1).all()
        y = layer(x)
        assert y.isfinite().all()
        grads = torch.autograd.grad(y.sum(), [*layer.parameters()])
        assert all(grad.isfinite().all() for grad in grads)


def test_long_memory_survives_low_precision():
    layer = LRU(D, d_state=16, r_min=0.999, r_max=0.9999)
    x = noise(1, 16384, D)
    exact = layer.double()(x)
    assert (layer.float()(x.float()) - exact).norm() < 1e-6 * exact.norm()
    assert (layer(x.bfloat16()) - layer(x.bfloat16().float())).norm() < 2**-8 * exact.norm()
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.slow
def test_lru_compiles_without_a_break():
    layer, x = LRU(D, d_state=N), noise(2, 9, D, dtype=torch.float32)
    torch._dynamo.reset()
    assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("exponential", ["true", "false"])
def test_the_recurrence_learns_slower_and_does_not_decay(exponential):
    group = composed("model=lru", "task=lds").optimizer.groups.ssm
    layer = LRU(D, d_state=N, exponential=exponential == "true")
    slow = {name for name, _ in layer.named_parameters() if re.search(group.match, f"blocks.0.mixer.{name}")}
    assert slow == {name for name, _ in layer.named_parameters()} - {"C", "D"}
    assert (group.lr_scale, group.weight_decay) == (0.5, 0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_state": 0}, "d_state"),
        ({"r_min": -0.1}, "r_min"),
        ({"r_min": 0.9, "r_max": 0.9}, "r_min"),
        ({"r_max": 1.1}, "r_max"),
        ({"max_phase": 0.0}, "max_phase"),
        ({"max_phase": 7.0}, "max_phase"),
    ],
    ids=str,
)
def test_lru_names_impossible_options(options, name):
    with pytest.raises(OptionError) as caught:
        LRU(D, **options)
    assert caught.value.name == name
