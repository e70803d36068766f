"""STU and STU-T in pieces, whatever they keep of the past: the contract, states row by row, precision, cost, limits."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from stu.ops import streaming
from tests.mixers import test_state as contract
from tests.mixers.test_contract import SEQ_LEN, D, noise, stepped
from tests.mixers.test_streaming import VARIANTS as STU_VARIANTS
from tests.mixers.test_streaming import random_stu
from tests.mixers.test_stu_t import VARIANTS as STUT_VARIANTS
from tests.models import Case, randomized
from tests.sizes import Sizes

ROWS = ((3, 9), (0, 2), (5, 6), (0, 12), (0, 0))
kinds = pytest.mark.parametrize("kind", ["window", "states"])


def _built(unit, *, seq_len, num_filters=6, d_model=D, **options):
    return unit(d_model, seq_len=seq_len, num_filters=num_filters, **options)


CASES = [
    Case(f"{unit.__name__}-{name}-{kind}", partial(_built, unit, streaming=kind, **variant))
    for unit, variants in ((STU, STU_VARIANTS), (STUT, STUT_VARIANTS))
    for name, variant in variants.items()
    for kind in ("window", "states")
    if variant.get("num_filters", 0) <= 6  # at a short length exponentials make no more
]
every = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("STU_CACHE", str(tmp_path))


def random(unit, **options):
    if unit is STU:
        return random_stu(**options)
    dtype = options.pop("dtype", torch.float64)
    return randomized(STUT(D, **options)).to(dtype)


def pieces(layer, x, cuts):
    """The outputs of `prefill` over the pieces of a sequence."""
    outputs, state = [], None
    for piece in x.tensor_split(cuts, 1):
        y, state = layer.prefill(piece, state=state)
        outputs.append(y)
    return torch.cat(outputs, 1)


# --- the contract, for both kinds of memory ---


@every
@pytest.mark.parametrize("few", [0, 1000], ids=["long", "short"])
def test_a_sequence_in_pieces_is_the_sequence(case, few, monkeypatch):
    """A short piece is computed in another way than a long one."""
    monkeypatch.setattr(streaming, "FEW", few)
    monkeypatch.setattr(streaming, "MATRICES_CHUNK", 1)
    contract.test_a_sequence_in_pieces_is_the_sequence(case, (1, 2, 5, 16, 17))


@every
def test_pieces_and_steps_alternate(case):
    contract.test_pieces_and_steps_alternate(case)


@every
@pytest.mark.parametrize("before", [0, 7], ids="after {} steps".format)
def test_padded_prefixes_leave_each_sequence_where_it_ends(case, before):
    contract.test_padded_prefixes_leave_each_sequence_where_it_ends(case, before, ROWS[:4])


@every
def test_states_of_some_sequences(case):
    contract.test_states_of_some_sequences(case)


@every
def test_decoding_in_place(case):
    contract.test_decoding_in_place(case, 9)


# --- states ---


@every
@torch.no_grad()
def test_the_state_of_a_row_is_that_of_the_row_alone(case):
    mixer, mask = case.random(seq_len=SEQ_LEN), contract.ragged(ROWS)
    x, start = noise(5, 12, D), noise(5, 6, D)
    x = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    _, before = mixer.prefill(start)
    _, after = mixer.prefill(x, mask, before)
    assert after.position == 6 + 12
    _, first = mixer.prefill(x, mask)
    for row, (begin, end) in enumerate(ROWS):
        parts = [start[row : row + 1], x[row : row + 1, begin:end]]
        for state, whole in ((after, parts), (first, parts[1:])):
            sequence = torch.cat(whole, 1)
            alone = mixer.prefill(sequence)[1] if sequence.shape[1] else mixer.initial_state(1)
            for a, b in zip(contract.tensors(state), contract.tensors(alone), strict=True):
                assert a.dtype == b.dtype
                assert_close(a[row : row + 1], b, rtol=0, atol=1e-9)


@every
@torch.no_grad()
def test_padding_counts_for_nothing_where_the_filters_end(case):
    mixer = case.random(seq_len=8)
    x, mask = noise(2, 30, D), torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 20:23], mask[1, 7] = True, True
    _, state = mixer.prefill(noise(2, 5, D))
    y, full = mixer.prefill(x, mask, state)
    assert full.position == 8
    assert_close(y[0, 20:23], mixer.prefill(x[:, 20:23], state=state)[0][0], rtol=0, atol=1e-9)
    mask[0, 23] = True
    for refused in (lambda: mixer.prefill(x, mask, state), lambda: mixer.prefill(x[:, :4], state=state)):
        with pytest.raises(OptionError, match="seq_len=8: is below the 9 steps of state and input"):
            refused()
    with pytest.raises(OptionError, match="seq_len=8"):
        mixer.step(x[:, 0], full)


@kinds
@pytest.mark.parametrize("unit", [STU, STUT])
def test_a_state_of_other_parameters_is_continued_with_those_of_now(unit, kind):
    """As in truncated backpropagation: a state keeps inputs, and the system is that of the layer."""
    mixer = random(unit, seq_len=SEQ_LEN, num_filters=4, streaming=kind, **({"k_y": 0} if unit is STU else {}))
    x = noise(2, 20, D)
    y, state = mixer.prefill(x[:, :9])
    y.sum().backward()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter is not getattr(mixer, "m_inputs", None):
                parameter.mul_(-2)
    state = tree_map_only(torch.Tensor, torch.Tensor.detach, state)
    y, state = mixer.prefill(x[:, 9:15], state=state)
    y_t, _ = mixer.step(x[:, 15], state)
    assert_close(torch.cat((y, y_t.unsqueeze(1)), 1), mixer(x)[:, 9:16], rtol=0, atol=1e-9)
    y.sum().backward()


# --- precision and cost, at length ---


@kinds
@pytest.mark.parametrize("options", [{}, {"recurrence": "fixed"}, {"k_y": 0}, None], ids=str)
@torch.no_grad()
def test_long_pieces_are_as_good_as_steps(kind, options):
    seq_len = 600
    unit, options = (STUT, {}) if options is None else (STU, options)
    layer = random(unit, seq_len=seq_len, num_filters=24, streaming=kind, **options)
    x = noise(2, seq_len, D)
    exact = layer(x)
    scale = exact.abs().max()
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        layer, x = layer.to(dtype), x.to(dtype)
        y = pieces(layer, x, (100, 103, 400, 401, 450))
        assert y.dtype == dtype
        error = (y - exact).abs().max() / scale
        by_steps = (stepped(layer, x, layer.initial_state(2)) - exact).abs().max() / scale
        assert error < max(limit, 2 * by_steps)


@kinds
@torch.no_grad()
def test_inputs_of_half_precision_go_on_in_float32(kind):
    layer = random_stu(seq_len=60, streaming=kind, dtype=torch.float32)
    x = noise(2, 60, D).bfloat16()
    y = pieces(layer, x, (20, 40))
    exact = layer.double()(x.double())
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 2**-7 * exact.norm()
    layer.float()
    state = layer.prefill(x[:, :30].float())[1]
    expected = layer.prefill(x[:, 30:].float(), state=state)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.prefill(x[:, 30:].float(), state=state)[0], expected)


@pytest.mark.parametrize("unit", [STU, STUT])
@torch.no_grad()
def test_nothing_has_all_steps_of_all_filters(unit, monkeypatch):
    monkeypatch.setattr(streaming, "MATRICES_CHUNK", 1 << 14)
    width, steps = 32, 400
    layer = unit(width, seq_len=1024)
    x = torch.randn(2, steps, width)
    _, state = layer.prefill(x)
    layer.prefill(x, state=state)
    with Sizes() as plain:
        layer.prefill(x)
    with Sizes() as resumed:
        layer.prefill(x, state=state)
    assert resumed.largest <= max(1.1 * plain.largest, 1 << 15)
    assert resumed.largest < x.numel() * 48 / 8
