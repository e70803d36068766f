"""Mixers in pieces: states of prefixes, padding, packed sequences, beams, decoding in place; for every causal mixer."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixer import map_state
from tests.mixers.test_contract import SEQ_LEN, D, noise, stepped
from tests.models import mixer_cases
from tests.runs import ROOT
from tests.versions import newer_than_2_7

TOLERANCE = {"rtol": 0, "atol": 1e-9}
CASES = {case: case.build(seq_len=8).causal for case in mixer_cases()}
every = pytest.mark.parametrize("case", CASES, ids=str)
causal = pytest.mark.parametrize("case", [case for case in CASES if CASES[case]], ids=str)
bidirectional = pytest.mark.parametrize("case", [case for case in CASES if not CASES[case]], ids=str)


def tensors(state):
    """All that `map_state` visits."""
    found = []
    map_state(lambda part: found.append(part) or part, state)
    return found


@causal
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (1, 2, 3, 16, 17), (16, 32), (32,)], ids=str)
def test_a_sequence_in_pieces_is_the_sequence(case, cuts):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, SEQ_LEN, D).requires_grad_()
    expected = mixer(x)
    pieces, state = [], None
    for piece in x.tensor_split(cuts, 1):
        if state is not None:
            before = [part.clone() for part in tensors(state)]
            assert_close(mixer(piece, state=state), mixer.prefill(piece, state=state)[0], rtol=0, atol=1e-12)
            assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))
        y, state = mixer.prefill(piece, state=state)
        pieces.append(y)
    found = torch.cat(pieces, 1)
    assert_close(found, expected, **TOLERANCE)
    weight = noise(2, SEQ_LEN, D)
    wanted = [x, *mixer.parameters()]
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), wanted, allow_unused=True),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        assert_close(a, b, rtol=0, atol=1e-8 * b.abs().max().item() + 1e-12)


@causal
def test_pieces_and_steps_alternate(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, SEQ_LEN, D)
    state = mixer.initial_state(2)
    outputs = []
    for start, stop in ((0, 5), (5, 6), (6, 20), (20, 22), (22, SEQ_LEN)):
        y, state = mixer.prefill(x[:, start : stop - 1], state=state) if stop - start > 1 else (x[:, :0], state)
        y_t, state = mixer.step(x[:, stop - 1], state)
        outputs += [y, y_t.unsqueeze(1)]
    assert_close(torch.cat(outputs, 1), mixer(x), **TOLERANCE)


def ragged(mask_of_rows):
    """(B, L) masks, and the (start, stop) of the real positions of each row."""
    length = 12
    mask = torch.zeros(len(mask_of_rows), length, dtype=torch.bool)
    for row, (start, stop) in enumerate(mask_of_rows):
        mask[row, start:stop] = True
    return mask


@causal
@pytest.mark.parametrize("before", [0, 1, 7], ids="after {} steps".format)
@pytest.mark.parametrize(
    "rows",
    [((0, 12), (0, 5), (0, 1), (0, 0)), ((0, 12), (7, 12), (11, 12), (12, 12)), ((3, 9), (0, 2), (5, 6), (0, 12))],
    ids=["right", "left", "both"],
)
def test_padded_prefixes_leave_each_sequence_where_it_ends(case, before, rows):
    mixer, mask = case.random(seq_len=SEQ_LEN), ragged(rows)
    start, x, rest = noise(4, 7, D)[:, :before], noise(4, 12, D), noise(4, 5, D)
    x = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    state = mixer.prefill(start)[1] if before else None
    y, after = mixer.prefill(x, mask, state)
    assert_close(mixer(x, mask, state=state)[mask], y[mask], rtol=0, atol=1e-12)
    if state is None:
        assert_close(y[mask], mixer(x, mask)[mask], **TOLERANCE)
    stepped_after = stepped(mixer, rest, after)
    chunk_after = mixer.prefill(rest, state=after)[0]
    for row, (first, last) in enumerate(rows):
        whole = torch.cat((start[row], x[row, first:last], rest[row]))[None]
        expected = mixer(whole)[0]
        assert_close(y[row, first:last], expected[before : before + last - first], **TOLERANCE)
        assert_close(stepped_after[row], expected[before + last - first :], **TOLERANCE)
        assert_close(chunk_after[row], expected[before + last - first :], **TOLERANCE)


@causal
def test_padding_between_real_positions_is_refused(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, 4, D)
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])
    for call in (lambda: mixer.prefill(x, mask), lambda: mixer(x, mask, state=mixer.initial_state(2))):
        with pytest.raises(OptionError, match=r"mask=.*no padding between real positions"):
            call()
    assert mixer(x, mask).shape == x.shape


@causal
def test_states_of_some_sequences(case):
    mixer, x, rest = case.random(seq_len=SEQ_LEN), noise(3, 9, D), noise(4, 6, D)
    _, state = mixer.prefill(x)
    index = torch.tensor([2, 0, 0, 1])
    expected = mixer(torch.cat((x[index], rest), 1))[:, 9:]
    assert_close(stepped(mixer, rest, mixer.select(state, index)), expected, **TOLERANCE)
    assert_close(mixer(rest, state=mixer.select(state, index)), expected, **TOLERANCE)
    for wrong in (index.double(), index > 0, index[None]):
        with pytest.raises(OptionError, match="index="):
            mixer.select(state, wrong)
    with pytest.raises(OptionError, match="state=of 3 sequences: must be of 4"):
        mixer.step(rest[:, 0], state)
    with pytest.raises(OptionError, match="state=of 3 sequences: must be of 4"):
        mixer.prefill(rest, state=state)


@causal
@pytest.mark.parametrize("start", [0, 1, 9], ids="after {} steps".format)
def test_decoding_in_place(case, start):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, SEQ_LEN, D)
    state = mixer.prefill(x[:, :start])[1] if start else mixer.initial_state(2)
    state = mixer.reserve(state, SEQ_LEN - start)
    places = [part.data_ptr() for part in tensors(state)]
    other = stepped(mixer, x[:, start:], state)  # leaves the state alone, reserved or not
    outputs = []
    for x_t in x[:, start:].unbind(1):
        y, state = mixer.step_(x_t, state)
        assert not y.requires_grad
        outputs.append(y)
    assert [part.data_ptr() for part in tensors(state)] == places
    expected = mixer(x)[:, start:]
    assert_close(torch.stack(outputs, 1), expected, **TOLERANCE)
    assert_close(other, expected, **TOLERANCE)


@causal
def test_reserved_states_are_states(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, SEQ_LEN, D)
    expected = mixer(x)
    state = mixer.reserve(mixer.prefill(x[:, :5])[1], 20)
    _, state = mixer.step_(x[:, 5], state)
    y, state = mixer.prefill(x[:, 6:12], state=state)
    assert_close(y, expected[:, 6:12], **TOLERANCE)
    state = mixer.select(state, torch.tensor([1, 0]))
    assert_close(stepped(mixer, x[:, 12:].flip(0), state), expected[:, 12:].flip(0), **TOLERANCE)


@every
def test_packed_sequences_are_each_alone(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(1, 40, D).requires_grad_()
    bounds = torch.tensor([0, 7, 7, 8, 40], dtype=torch.int32)
    y = mixer(x, cu_seqlens=bounds)
    alone = torch.cat([mixer(x[:, a:b], state=None, cu_seqlens=None) for a, b in ((0, 7), (7, 8), (8, 40))], 1)
    assert_close(y, alone, rtol=0, atol=1e-10)
    weight = noise(1, 40, D)
    assert_close(*(torch.autograd.grad((z * weight).sum(), x)[0] for z in (y, alone)), rtol=0, atol=1e-9)
    for wrong in (bounds[1:], bounds[:-1], bounds.flip(0), bounds[None], bounds[:0]):
        with pytest.raises(OptionError, match=r"cu_seqlens=.*must ascend from 0 to 40"):
            mixer(x, cu_seqlens=wrong)
    with pytest.raises(OptionError, match="cu_seqlens="):
        mixer(x.expand(2, -1, -1), cu_seqlens=bounds)
    with pytest.raises(OptionError, match="cu_seqlens="):
        mixer(x, torch.ones(1, 40, dtype=torch.bool), cu_seqlens=bounds)


@bidirectional
def test_bidirectional_mixers_have_no_states(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, 5, D)
    calls = (
        lambda: mixer.initial_state(2),
        lambda: mixer.step(x[:, 0], None),
        lambda: mixer.step_(x[:, 0], None),
        lambda: mixer.prefill(x),
        lambda: mixer(x, state=()),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="runs step by step only with causal=true"):
            call()


@every
def test_parameters_drawn_again_are_those_of_a_new_mixer(case):
    torch.manual_seed(3)
    expected = case.build(seq_len=SEQ_LEN)
    with torch.device("meta"):
        mixer = case.build(seq_len=SEQ_LEN)
    mixer = mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(3)
    mixer.reset_parameters()
    for (name, a), b in zip(mixer.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


@causal
def test_states_keep_their_dtypes(case):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        check_dtypes(case, dtype, None)
        if dtype != torch.float16:  # PyTorch mixes no two kinds of half precision
            check_dtypes(case, dtype, torch.bfloat16)


def check_dtypes(case, dtype, autocast):
    mixer, x = case.random(seq_len=SEQ_LEN, dtype=dtype), noise(2, 4, D, dtype=dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None), torch.no_grad():
        state = mixer.initial_state(2)
        others = [mixer.step(x[:, 0], state)[1], mixer.prefill(x)[1], mixer.prefill(x, state=state)[1]]
        others.append(mixer.step(x[:, 0], others[1])[1])
        others.append(mixer.step_(x[:, 0], mixer.reserve(others[1], 2))[1])
        y, _ = mixer.step(x[:, 0], state)
    assert autocast is not None or y.dtype == dtype
    expected, *found = [
        [part.dtype for part in tensors(each) if part.is_floating_point() or part.is_complex()]
        for each in (state, *others)
    ]
    assert all(dtypes == expected for dtypes in found)


@newer_than_2_7
@causal
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch itself, in forward mode
def test_states_under_function_transforms(case):
    mixer, x, rest = case.random(seq_len=SEQ_LEN), noise(3, 2, 9, D), noise(3, 2, 4, D)
    mask = ragged(((0, 9), (0, 4)))[:, :9]

    def continued(x, rest):
        _, state = mixer.prefill(x, mask)
        y, state = mixer.step(rest[:, 0], state)
        return torch.cat((y.unsqueeze(1), mixer.prefill(rest[:, 1:], state=state)[0]), 1)

    expected = torch.stack([continued(*each) for each in zip(x, rest, strict=True)])
    assert_close(torch.func.vmap(continued)(x, rest), expected, **TOLERANCE)
    initial = mixer.prefill(x[0])[1]  # of no transform
    stepped_after = torch.func.vmap(lambda rest: mixer.step(rest[:, 0], initial)[0])(rest)
    assert_close(stepped_after, torch.stack([mixer.step(each[:, 0], initial)[0] for each in rest]), **TOLERANCE)
    tangent = noise(2, 9, D)
    _, found = torch.func.jvp(lambda x: continued(x, rest[0]), (x[0],), (tangent,))
    step = 1e-6
    ahead, behind = (continued(x[0] + sign * step * tangent, rest[0]) for sign in (1, -1))
    assert_close(found, (ahead - behind) / (2 * step), rtol=0, atol=1e-6 * (1 + found.abs().max().item()))


@causal
def test_states_of_no_sequence(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, 5, D)
    none = mixer.select(mixer.prefill(x)[1], torch.tensor([], dtype=torch.long))
    y, state = mixer.prefill(x[:0], state=none)
    assert y.shape == (0, 5, D)
    assert mixer.prefill(x[:0], torch.ones(0, 5, dtype=torch.bool), state)[0].shape == (0, 5, D)
    assert mixer.step_(x[:0, 0], mixer.reserve(state, 1))[0].shape == (0, D)


COLD = """
import sys, torch
from stu import STU
from stu.mixers.stu_t import STUT
unit, options = (STU, {"k_y": 2}) if sys.argv[1] == "STU" else (STUT, {})
layer = unit(4, seq_len=600, num_filters=4, **options).double()
x = torch.randn(2, 9, 4, dtype=torch.float64)
def run(x):
    y, state = layer.prefill(x)
    y, state = layer.prefill(x, state=state)
    return layer.step(x[:, 0], state)[0]
with torch.no_grad():
    found = torch.compile(run, backend="aot_eager")(x)  # the first call of all in this process
    assert torch.allclose(found, run(x), rtol=0, atol=1e-9)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("unit", ["STU", "STUT"])
def test_what_is_made_once_may_be_made_while_a_program_is_compiled(unit):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COLD, unit], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
