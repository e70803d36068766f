"""The STU against its equation; its options, initialisation and precision."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.ops.bank import filter_bank
from stu.ops.filters import hankel_matrix
from stu.structure import KEY
from tests.mixers.test_contract import SEQ_LEN, D, noise, stepped
from tests.models import randomized, stu_cases

stus = pytest.mark.parametrize("case", stu_cases(), ids=str)


def literal_stu(u, seq_len, num_filters, m_plus, m_minus, m_u, m_y, *, hankel, delay, fixed_lag):
    """The equation of the paper (2312.06837, section 2), time from 1, one sum after the other.

    The matrices are [index, in, out]; u (L, D) → (L, D).
    """
    values, vectors = np.linalg.eigh(hankel_matrix(seq_len, hankel).numpy())
    length, width = u.shape

    def spectral(t, k, sign):
        phi = vectors[:, -1 - k]
        phi = phi * np.sign(phi[np.abs(phi).argmax()])
        features = np.zeros(width)
        for i in range(t):  # U_{t,k} = Σ_{i=0}^{t−1} u_{t−i} (±1)^i φ_k(i); zero where t < 1
            features += u[t - i - 1] * sign**i * phi[i]
        return values[-1 - k] ** 0.25 * features

    y = {}
    for t in range(1, length + 1):
        total = np.zeros(width)
        for i in range(1, len(m_y) + 1):
            total += y.get(t - i, np.zeros(width)) @ m_y[i - 1]
        if fixed_lag:
            total += y.get(t - fixed_lag, np.zeros(width))
        for i in range(1, len(m_u) + 1):
            if t + 1 - i >= 1:
                total += u[t + 1 - i - 1] @ m_u[i - 1]
        for k in range(num_filters):
            total += spectral(t - delay, k, 1) @ m_plus[k]
            if m_minus is not None:
                total += spectral(t - delay, k, -1) @ m_minus[k]
        y[t] = total
    return np.stack([y[t] for t in range(1, length + 1)])


@pytest.mark.parametrize("branches", ["standard", "two_sided", "L"])
@pytest.mark.parametrize("recurrence", ["none", "fixed-1", "fixed-2", "fixed-3", "learned-1", "learned-2"])
def test_stu_is_its_equation(recurrence, branches):
    length, seq_len, num_filters, width = 9, 11, 3, 2
    kind, _, lags = recurrence.partition("-")
    k_y = int(lags or 0)
    for k_u, delay in product((0, 1, 3), (0, 1, 2, 3)):
        hankel = "L" if branches == "L" else "standard"
        layer = STU(
            width,
            seq_len=seq_len,
            num_filters=num_filters,
            two_sided=branches == "two_sided",
            k_u=k_u,
            k_y=k_y,
            recurrence="fixed" if kind == "fixed" else "learned",
            hankel=hankel,
            delay=delay,
        ).double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        m_phi = layer.m_phi.detach().numpy()
        expected_filters = num_filters * (2 if branches == "two_sided" else 1)
        assert m_phi.shape == (expected_filters, width, width)
        u = noise(length, width)
        expected = literal_stu(
            u.numpy(),
            seq_len,
            num_filters,
            m_phi[:num_filters],
            m_phi[num_filters:] if branches == "two_sided" else None,
            () if layer.m_u is None else layer.m_u.detach().numpy(),
            () if layer.m_y is None else layer.m_y.detach().numpy(),
            hankel=hankel,
            delay=delay,
            fixed_lag=k_y if kind == "fixed" else 0,
        )
        y = layer(u.unsqueeze(0)).squeeze(0)
        assert_close(y.detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@stus
def test_stu_is_linear(case):
    layer = case.random(seq_len=SEQ_LEN)
    a, b = noise(2, SEQ_LEN, D), noise(2, SEQ_LEN, D)
    assert_close(layer(2.5 * a - b), 2.5 * layer(a) - layer(b), rtol=0, atol=1e-10)


@stus
def test_stu_is_time_invariant(case):
    layer = case.random(seq_len=SEQ_LEN)
    x = noise(1, SEQ_LEN, D)
    later = torch.cat((torch.zeros(1, 4, D), x[:, :-4]), 1)
    assert_close(layer(later)[:, 4:], layer(x)[:, :-4], rtol=0, atol=1e-10)


@stus
def test_stu_refuses_more_steps_than_it_has_filters_for(case):
    layer = case.random(seq_len=8)
    x = noise(1, 9, D)
    _, full = layer.prefill(x[:, :8])
    for call in (
        lambda: layer(x),
        lambda: layer.prefill(x),
        lambda: layer.step(x[:, 8], full),
        lambda: stepped(layer, x, layer.initial_state(1)),
    ):
        with pytest.raises(OptionError, match="seq_len=8"):
            call()


@stus
def test_stu_works_at_any_built_length(case):
    for seq_len in (1, 2, 3, 5):
        layer = case.random(seq_len=seq_len, num_filters=min(2, seq_len))
        x = noise(1, seq_len, D)
        assert_close(stepped(layer, x, layer.initial_state(1)), layer(x), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"k_y": 0}, {"k_y": 2, "recurrence": "learned"}, {"k_y": 0, "causal": False}], ids=str
)
def test_compiles_into_one_graph(options):
    """Two layers of the same code, evaluated and then trained: nothing is specialised to the first."""
    layers = nn.Sequential(*(randomized(STU(D, seq_len=40, num_filters=6, **options)) for _ in range(2))).double()
    x = noise(2, 30, D)
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), layers(x), rtol=1e-10, atol=1e-10)
    for one, other in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(layers.parameters())),
        torch.autograd.grad(layers(x).square().sum(), list(layers.parameters())),
        strict=True,
    ):
        assert_close(one, other, rtol=1e-10, atol=1e-10)


@stus
def test_filters_stay_exact_in_a_model_of_half_precision(case):
    layer = case.random(seq_len=64, dtype=torch.float32)
    before, x = layer.bank.filters.clone(), noise(2, 64, D, dtype=torch.float32).bfloat16()
    layer.bfloat16()
    assert layer.bank.filters.dtype == torch.float64
    assert torch.equal(layer.bank.filters, before)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = layer.float()(x.float())
    assert (y.float() - exact).norm() < 2**-8 * exact.norm()
    if layer.m_y is None:  # nothing is rounded but inputs, matrices and outputs
        assert torch.equal(y, exact.bfloat16())


def test_stu_stores_nothing_but_its_matrices():
    layer = STU(D, seq_len=16, num_filters=4, k_u=3, k_y=2, recurrence="learned")
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    assert {*layer.state_dict()} == {*shapes, KEY}
    assert shapes == {"m_phi": (8, D, D), "m_u": (3, D, D), "m_y": (2, D, D)}


def test_stu_begins_as_in_the_official_code():
    width = 64
    layer = STU(width, seq_len=64, num_filters=5, k_u=3, k_y=2, recurrence="learned")
    assert (layer.m_phi == 0).all()
    assert (layer.m_y == 0).all()
    std = width**-0.5
    assert layer.m_u.abs().max() <= 2 * std
    # a normal distribution truncated at two standard deviations has 0.8796 of the std
    assert layer.m_u.std().item() == pytest.approx(0.8796 * std, rel=0.03)
    purely_spectral = STU(width, seq_len=64, num_filters=5, k_u=0, k_y=0, delay=0)
    assert purely_spectral.m_phi.std().item() == pytest.approx(std * 10**-0.5, rel=0.03)


def test_filter_bank_is_a_list_of_impulse_responses():
    scaled = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]).double()
    bank = filter_bank(scaled, two_sided=True, delay=1, k_u=2, recurrence=2)
    plus, minus = [0, 1, 3, 5], [0, 1, -3, 5]  # of the first filter, one step late
    expected = {0: [0, 1, 3, 6], 2: [0, 1, -3, 6], 4: [1, 0, 1, 0], 5: [0, 1, 0, 1]}
    for column, response in expected.items():
        assert bank[:, column].tolist() == response
    without = filter_bank(scaled, two_sided=True, delay=1)
    assert (without[:, 0].tolist(), without[:, 2].tolist()) == (plus, minus)
    assert filter_bank(scaled, delay=9, k_u=6, recurrence=7).shape == (4, 8)
    assert (filter_bank(scaled, delay=9) == 0).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_model": 0}, "d_model"),
        ({"k_u": -1}, "k_u"),
        ({"k_y": -1}, "k_y"),
        ({"delay": -1}, "delay"),
        ({"recurrence": "none"}, "recurrence"),
        ({"hankel": "L"}, "two_sided"),
        ({"hankel": "M"}, "hankel"),
        ({"num_filters": 17}, "num_filters"),
        ({"seq_len": 0}, "seq_len"),
    ],
    ids=str,
)
def test_stu_names_impossible_options(options, name):
    with pytest.raises(OptionError) as caught:
        STU(**({"d_model": D, "seq_len": 16, "num_filters": 4} | options))
    assert caught.value.name == name


@pytest.mark.parametrize(
    "options", [{"k_y": 0}, {"k_y": 2, "recurrence": "fixed"}, {"k_y": 2, "recurrence": "learned"}], ids=str
)
def test_a_bidirectional_stu_is_two_units_one_from_the_end(options):
    layer = randomized(STU(D, seq_len=20, num_filters=4, causal=False, **options)).double()
    forward = STU(D, seq_len=20, num_filters=4, **options).double()
    forward.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("reverse.")})
    x = noise(2, 17, D)
    assert_close(layer(x), forward(x) + layer.reverse(x.flip(1)).flip(1), rtol=0, atol=1e-10)
    assert not torch.allclose(layer.reverse.m_u, layer.m_u)
    with pytest.raises(NotImplementedError, match="causal"):
        layer.initial_state(1)
