"""Inputs sampled at another rate than in training: `rate` of S4, S4D, S5 and the LRU."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixer import Mixer
from stu.mixers import s4, s4d
from stu.mixers.lru import LRU, held
from stu.mixers.s4 import S4
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5
from tests import runs
from tests.mixers.test_contract import noise, stepped
from tests.models import randomized

D, L = 3, 20
Make = Callable[..., Mixer]
HELD: dict[str, Make] = {  # whose steps are those of an input that is held
    "S4": partial(S4, D, d_state=8, discretization="zoh"),
    "S4D": partial(S4D, D, d_state=8),
    "S4D, dfout": partial(S4D, D, d_state=8, init="dfout"),
    "S5": partial(S5, D, d_state=8, num_blocks=2),
    "LRU": partial(LRU, D, d_state=8),
    "LRU, λ itself": partial(LRU, D, d_state=8, exponential=False, normalize=False),
}
BILINEAR: dict[str, Make] = {
    "S4": partial(S4, D, d_state=8),
    "S4D": partial(S4D, D, d_state=8, discretization="bilinear"),
    "S5": partial(S5, D, d_state=8, num_blocks=2, discretization="bilinear"),
}


def pair(make: Make, rate: float, **options: Any) -> tuple[Mixer, Mixer]:
    """A mixer, and the same parameters at another rate."""
    torch.manual_seed(0)
    mixer, other = randomized(make(**options), 0.05).double(), make(rate=rate, **options).double()
    other.load_state_dict(mixer.state_dict())
    return mixer, other


def by_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose calls cost more than its numbers."""
    for module in (s4, s4d):
        monkeypatch.setattr(module, "on_cpu", lambda _: False)


@pytest.mark.parametrize("few", [False, True], ids=["CPU", "few calls"])
@pytest.mark.parametrize("rate", [2, 5])
@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
@torch.no_grad()
def test_an_input_held_for_some_steps_is_one_input_at_that_rate(
    make: Make, rate: int, few: bool, monkeypatch: pytest.MonkeyPatch
):
    if few:
        by_few_calls(monkeypatch)
    mixer, slower = pair(make, rate)
    x = noise(2, L, D)
    expected = mixer(x.repeat_interleave(rate, 1))[:, rate - 1 :: rate]
    assert_close(slower(x), expected, rtol=0, atol=1e-10)
    assert_close(stepped(slower, x, slower.initial_state(2)), expected, rtol=0, atol=1e-10)
    y, state = slower.prefill(x[:, :7])
    assert_close(y, expected[:, :7], rtol=0, atol=1e-10)
    assert_close(slower.prefill(x[:, 7:], state=state)[0], expected[:, 7:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["S4", "S4D"])
@torch.no_grad()
def test_what_looks_ahead_sees_held_inputs_so_too(name: str):
    mixer, slower = pair(HELD[name], 3, causal=False)
    x = noise(2, L, D)
    assert_close(slower(x), mixer(x.repeat_interleave(3, 1))[:, 2::3], rtol=0, atol=1e-10)


def error_on_held(make: Make, scale: float) -> float:
    """The largest difference between 32 inputs at half the rate and each of them twice, with all dt `scale` times."""
    mixer, slower = pair(make, 2, dt_min=0.05 * scale, dt_max=0.05 * scale)
    x = torch.linspace(0, 3, 33).double()[1:].sin().view(1, -1, 1).expand(-1, -1, D)
    steps = round(1 / scale)
    x = x.repeat_interleave(steps, 1)
    return float((slower(x) - mixer(x.repeat_interleave(2, 1))[:, 1::2]).abs().max())


@pytest.mark.parametrize("make", BILINEAR.values(), ids=BILINEAR)
@torch.no_grad()
def test_the_bilinear_rule_is_of_second_order(make: Make):
    coarse, fine = error_on_held(make, 1 / 8), error_on_held(make, 1 / 16)
    assert 3.3 < coarse / fine < 4.7
    assert fine < 1e-2


@pytest.mark.parametrize("name", ["S4", "S4D", "S5", "LRU"])
@torch.no_grad()
def test_a_signal_at_half_the_rate_has_nearly_the_same_outputs(name: str):
    """To first order in its frequency: a sample stands for the interval before it, whose middle is half a step back."""
    slow = {"r_min": 0.94, "r_max": 0.96, "max_phase": 0.05}
    options = slow if name == "LRU" else {"dt_min": 0.1, "dt_max": 0.1}
    mixer, slower = pair(HELD[name], 2, **options)
    errors = []
    for frequency in (0.02, 0.01):  # both slow compared with the modes
        x = (frequency * torch.arange(800).double()).sin().view(1, -1, 1).expand(-1, -1, D)
        y, sampled = mixer(x)[:, 1::2], x[:, 1::2]
        errors.append(float((slower(sampled) - y).abs().max()))
        assert errors[-1] < 0.6 * float((mixer(sampled) - y).abs().max())  # of a model that does not know the rate
    assert 1.7 < errors[0] / errors[1] < 2.3


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1), st.floats(-math.pi + 1e-3, math.pi - 1e-3), st.floats(0.1, 4), st.floats(0.1, 4))
def test_an_input_is_held_for_one_time_and_then_another(radius: float, angle: float, first: float, second: float):
    decay = torch.polar(torch.tensor([radius]).double(), torch.tensor([angle]).double())
    (a, gain_a), (b, gain_b), (both, gain) = (held(decay, rate) for rate in (first, second, first + second))
    assert_close(a * b, both, rtol=0, atol=1e-12)
    if radius > 0:  # at 0, an input acts once, however short its time is
        assert_close(gain_a + a * gain_b, gain, rtol=1e-9, atol=1e-9)


def test_held_inputs_where_the_formula_divides_by_zero():
    decay, gain = held(torch.tensor([0, 1], dtype=torch.complex128), 3.0)
    assert decay.tolist() == [0, 1]
    assert gain.tolist() == [1, 3]


def test_gradients_pass_through_the_rate():
    layer = LRU(D, d_state=8, rate=1.5).double()
    layer(noise(1, L, D)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("make", [*HELD.values(), *BILINEAR.values()])
def test_other_rates_are_refused(make: Make, rate: float):
    with pytest.raises(OptionError, match=r"^rate=.*: must be above 0 and finite$"):
        make(rate=rate)


@torch.no_grad()
def test_steps_of_a_call_multiply_the_rate():
    mixer, slower = pair(HELD["S5"], 2)
    assert isinstance(mixer, S5)
    x, factors = noise(2, L, D), 0.5 + torch.rand(2, L).double()
    assert_close(slower(x, step_rescale=factors), mixer(x, step_rescale=2 * factors), rtol=0, atol=1e-12)


@pytest.mark.e2e
def test_a_run_is_tested_at_another_rate(tmp_path: Path):
    words = runs.small("task=lds", "model=lru")
    assert runs.train(tmp_path, *words).code == 0
    tested = runs.train(tmp_path, *words, "mode=test", "model.mixer.rate=2")
    assert tested.code == 0, tested.err
    assert "was trained with other settings: model.mixer.rate (1.0 → 2)" in tested.err
    assert tested.out.count("test mse") == 1
