"""Layers extended past the length they were built for, against the equations with filters written out."""

import copy
import gc
import pickle
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from stu.ops.bank import FilterBank, filter_bank
from stu.ops.filters import spectral_filters
from stu.ops.realization import TOLERANCE, realize_filters
from stu.reference import stu as reference
from tests.mixers.test_contract import noise, stepped
from tests.mixers.test_streaming import VARIANTS as STU_VARIANTS
from tests.mixers.test_stu_t import VARIANTS as STUT_VARIANTS
from tests.models import randomized
from tests.runs import ROOT

D = 4
BUILT, LONG = 60, 130
FEW = {name: options | {"num_filters": 6} for name, options in STU_VARIANTS.items()}
variants = pytest.mark.parametrize("options", FEW.values(), ids=FEW)
unit_variants = pytest.mark.parametrize("options", STUT_VARIANTS.values(), ids=STUT_VARIANTS)
kinds = pytest.mark.parametrize("kind", ["window", "states"])


def random(unit=STU, **options):
    layer = randomized(unit(D, **({"seq_len": BUILT, "num_filters": 6} | options))).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("m_y"):
            parameter.data *= 0.3  # stable
    return layer


def continued(hankel, length=LONG):
    """σ_k^{1/4} φ_k of length BUILT, and from there on the sums of exponentials, one entry after the other: (L, K)."""
    values, filters = spectral_filters(BUILT, 6, hankel)
    found = realize_filters(BUILT, 6, hankel, tolerance=TOLERANCE)
    rows = [values**0.25 * filters]
    for i in range(BUILT, length):
        rows.append((found.poles**i @ found.coefficients)[None])
    return torch.cat(rows)


def literal(layer, x, *, k_y=0, recurrence="fixed", hankel="standard", delay=2, **_):
    m_y = layer.m_y
    if k_y and recurrence == "fixed":
        m_y = reference.fixed_recurrence(k_y, x)
    return reference.stu(x, continued(hankel), layer.m_phi, layer.m_u, m_y, delay=delay)


@variants
@torch.no_grad()
def test_an_extended_stu_is_its_equation_with_filters_that_go_on(options):
    layer = random(**options)
    longer = layer.extended(LONG)
    assert (layer.seq_len, longer.seq_len) == (BUILT, LONG)
    x = noise(2, LONG, D)
    exact = literal(layer, x, **options)
    scale = exact.abs().max().item()
    assert_close(longer(x), exact, rtol=0, atol=1e-11 * scale)
    assert_close(longer(x[:, :BUILT]), layer(x[:, :BUILT]), rtol=0, atol=1e-12 * scale)
    assert (longer(x) - longer(torch.cat((0 * x[:, :1], x[:, 1:]), 1)))[:, BUILT + 5 :].norm() > 1e-6


@pytest.mark.parametrize("unit", [STU, STUT])
def test_the_first_filters_are_those_of_the_layer(unit):
    """To the last digit, where the exponentials have lost some."""
    layer = random(unit, num_filters=24)
    assert realize_filters(BUILT, 24, tolerance=TOLERANCE).error.max() > 1e-5
    assert torch.equal(layer.extended(LONG).filters[:BUILT], layer.filters)


@variants
@torch.no_grad()
def test_both_directions_of_an_extended_stu(options):
    layer = random(causal=False, **options)
    x = noise(2, LONG, D)
    both = literal(layer, x, **options) + literal(layer.reverse, x.flip(1), **options).flip(1)
    assert_close(layer.extended(LONG)(x), both, rtol=0, atol=1e-11 * both.abs().max().item())


@kinds
@variants
@torch.no_grad()
def test_an_extended_stu_runs_step_by_step_past_the_end(options, kind):
    layer = random(streaming=kind, **options)
    longer, x = layer.extended(LONG), noise(2, LONG, D)
    y = longer(x)
    assert (longer.initial_state(2).inputs.sums.numel() > 0) == (kind == "states")
    atol = 1e-9 * y.abs().max().item()
    assert_close(stepped(longer, x, longer.initial_state(2)), y, rtol=0, atol=atol)
    for cut in (10, BUILT, BUILT + 20):
        prefix, state = longer.prefill(x[:, :cut])
        assert_close(prefix, y[:, :cut], rtol=0, atol=atol)
        piece, state = longer.prefill(x[:, cut : cut + 30], state=state)
        assert_close(piece, y[:, cut : cut + 30], rtol=0, atol=atol)
        assert_close(longer.step(x[:, cut + 30], state)[0], y[:, cut + 30], rtol=0, atol=atol)


def test_a_state_may_go_on_in_the_extended_layer():
    layer = random(streaming="states", k_y=0)
    longer, x = layer.extended(LONG), noise(1, LONG, D)
    _, state = layer.prefill(x[:, :BUILT])
    assert_close(stepped(longer, x[:, BUILT:], state), longer(x)[:, BUILT:], rtol=0, atol=1e-9)


@kinds
@unit_variants
@torch.no_grad()
def test_an_extended_stu_t(options, kind):
    layer = random(STUT, streaming=kind, **options)
    longer, x = layer.extended(LONG), noise(2, LONG, D)
    filters = filter_bank(
        continued(options.get("hankel", "standard")),
        two_sided=options.get("two_sided", True),
        delay=options.get("delay", 0),
    )
    if options.get("shared_branches"):
        filters = filters[:, :6] + filters[:, 6:]
    kernel, v = filters @ layer.m_filters, x @ layer.m_inputs
    exact = torch.stack([(kernel[: t + 1].flip(0) * v[:, : t + 1]).sum(1) for t in range(LONG)], 1)
    assert_close(longer(x), exact, rtol=0, atol=1e-11)
    assert_close(longer(x[:, :BUILT]), layer(x[:, :BUILT]), rtol=0, atol=1e-12)
    assert_close(stepped(longer, x, longer.initial_state(2)), exact, rtol=0, atol=1e-9)
    _, state = longer.prefill(x[:, :70])
    assert_close(longer.prefill(x[:, 70:], state=state)[0], exact[:, 70:], rtol=0, atol=1e-9)
    both = random(STUT, causal=False, **options)
    one, other = (random(STUT, **options) for _ in range(2))
    for part, weights in ((one, both.m_filters), (other, both.m_reverse)):
        part.load_state_dict({"m_inputs": both.m_inputs, "m_filters": weights})
    expected = one.extended(LONG)(x) + other.extended(LONG)(x.flip(1)).flip(1)
    assert_close(both.extended(LONG)(x), expected, rtol=0, atol=1e-11)


# --- extended layers are layers ---


@pytest.mark.parametrize(("unit", "options"), [(STU, {}), (STUT, {}), (STUT, {"shared_branches": True})], ids=str)
def test_extended_layers_are_copied_pickled_trained_and_extended_again(unit, options):
    layer = random(unit, **options)
    longer, x = layer.extended(100), noise(2, 100, D)
    y = longer(x)
    for twin in (copy.deepcopy(longer), pickle.loads(pickle.dumps(longer)), layer.extended(100)):
        assert torch.equal(twin(x), y)
    assert torch.equal(layer.extended(BUILT)(x[:, :BUILT]), layer(x[:, :BUILT]))
    again, x = longer.extended(LONG), noise(2, LONG, D)
    assert_close(again(x), layer.extended(LONG)(x), rtol=0, atol=0)
    before = [parameter.clone() for parameter in layer.parameters()]
    again(x).square().sum().backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(layer.parameters(), before, strict=True))
    assert not torch.equal(again(x), layer.extended(LONG)(x))
    fresh = random(unit, **options).extended(LONG)
    fresh.load_state_dict(again.state_dict())
    assert torch.equal(fresh(x), again(x))


def test_banks_are_shared_and_found_by_name():
    layer = random()
    longer = layer.extended(LONG)
    assert longer.bank is layer.extended(LONG).bank is layer.extended(90).extended(LONG).bank is not layer.bank
    assert layer.extended(BUILT).bank is layer.bank
    assert random(seq_len=LONG).bank is not longer.bank
    name, filters = longer.bank.name, longer.bank.filters
    del longer
    gc.collect()
    assert torch.equal(FilterBank.of(name).filters, filters)


def test_names_of_earlier_versions_are_understood():
    layer = random()
    assert FilterBank.of(f'[{BUILT}, 6, "standard", true, 2, 3, 0]') is layer.bank


@pytest.mark.parametrize("unit", [STU, STUT])
@pytest.mark.parametrize("seq_len", [0, 1, BUILT - 1])
def test_layers_are_not_cut(unit, seq_len):
    with pytest.raises(OptionError, match=f"seq_len={seq_len}: must be at least {BUILT}, that of the layer"):
        random(unit).extended(seq_len)


def test_filters_of_unknown_origin_end_where_they_end():
    layer = random()
    layer.bank = FilterBank(layer.bank.filters)
    with pytest.raises(OptionError, match=f"seq_len={LONG}: needs spectral filters"):
        layer.extended(LONG)


def test_a_longer_layer_keeps_states_where_they_are_faster():
    layer = random(seq_len=200)
    assert layer.initial_state(1).inputs.sums.numel() == 0
    assert layer.extended(600).initial_state(1).inputs.sums.numel() > 0
    many = random(seq_len=64, num_filters=24).extended(600)  # too many for the exponentials to be exact
    assert many.initial_state(1).inputs.sums.numel() == 0


def test_an_extended_layer_may_be_built_on_the_meta_device():
    expected = random()
    with torch.device("meta"):
        layer = STU(D, seq_len=BUILT, num_filters=6).extended(LONG)
    layer = layer.to_empty(device="cpu").double()
    layer.load_state_dict(expected.state_dict())
    x = noise(2, LONG, D)
    assert torch.equal(layer(x), expected.extended(LONG)(x))


LOADED = """
import sys, torch
import stu.mixers.stu, stu.mixers.stu_t  # what the programs call must be registered
for file in sys.argv[1:]:
    x, y = torch.load(f"{file}.pt")
    found = torch.export.load(f"{file}.pt2").module()(x)
    assert torch.allclose(found, y, rtol=0, atol=1e-11), (file, (found - y).abs().max())
"""


@pytest.mark.slow
def test_an_exported_extended_layer_is_the_same_in_another_process(tmp_path):
    files, x = [], noise(2, LONG, D)
    for unit in (STU, STUT):
        longer, file = random(unit).extended(LONG).eval(), str(tmp_path / unit.__name__)
        torch.export.save(torch.export.export(longer, (x,)), f"{file}.pt2")
        torch.save((x, longer(x).detach()), f"{file}.pt")
        files.append(file)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED, *files], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
