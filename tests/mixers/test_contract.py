"""The contract of every mixer of conf/model, and of variants of the STU and attention."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.ops.bank import FilterBank
from tests.models import mixer_cases
from tests.runs import ROOT

SEQ_LEN = 33
D = 8

mixers = pytest.mark.parametrize("case", mixer_cases(), ids=str)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def right_padded(lengths, seq_len):
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


def stepped(mixer, x, state):
    """The outputs of `step` over a whole sequence."""
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1)


@mixers
def test_every_parameter_is_initialised_and_used(case):
    mixer = case.build(seq_len=SEQ_LEN)
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())
    assert all(buffer.isfinite().all() for buffer in mixer.buffers())
    mixer = case.random(seq_len=SEQ_LEN)
    mixer(noise(2, SEQ_LEN, D)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in mixer.parameters())


@mixers
@pytest.mark.parametrize("t", [0, 1, 2, 15, SEQ_LEN - 2])
def test_the_past_knows_the_future_only_where_mixers_say_so(case, t):
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(2, SEQ_LEN, D)
    other = torch.cat((x[:, : t + 1], noise(2, SEQ_LEN - t - 1, D)), 1)
    change = (mixer(x) - mixer(other)).abs().amax((0, 2))
    assert (change[: t + 1].max() < 1e-10) == mixer.causal
    assert change[t + 1 :].min() > 1e-6  # the future itself does change


@mixers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_forward_step_and_prefill_agree(case, dtype, tolerance):
    mixer = case.random(seq_len=SEQ_LEN, dtype=dtype)
    x = noise(2, SEQ_LEN, D, dtype=dtype)
    if not mixer.causal:
        for call in (lambda: mixer.initial_state(2), lambda: mixer.step(x[:, 0], None), lambda: mixer.prefill(x)):
            with pytest.raises(NotImplementedError):
                call()
        return
    y = mixer(x)
    atol = tolerance * y.detach().abs().max().item()
    assert_close(stepped(mixer, x, mixer.initial_state(2)), y, rtol=0, atol=atol)
    for cut in (1, 2, 3, 16, SEQ_LEN - 1, SEQ_LEN):
        prefix, state = mixer.prefill(x[:, :cut])
        assert_close(prefix, y[:, :cut], rtol=0, atol=atol)
        if cut < SEQ_LEN:
            stepped(mixer, noise(2, 1, D, dtype=dtype), state)  # must leave the state alone: a continuation may branch
            assert_close(stepped(mixer, x[:, cut:], state), y[:, cut:], rtol=0, atol=atol)


@mixers
@pytest.mark.parametrize("length", [1, 2, 3, 13, 16, SEQ_LEN - 1])
def test_shorter_inputs_are_prefixes(case, length):
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(2, SEQ_LEN, D)
    mask = None if mixer.causal else right_padded([length, length], SEQ_LEN)
    assert_close(mixer(x[:, :length]), mixer(x, mask)[:, :length], rtol=0, atol=1e-10)


@mixers
@pytest.mark.parametrize("padding", [0.0, 1.0, 1e6], ids=["zeros", "noise", "loud"])
def test_padding_is_never_seen(case, padding):
    mixer = case.random(seq_len=SEQ_LEN)
    lengths = [SEQ_LEN, 20, 7, 1]
    mask = right_padded(lengths, SEQ_LEN)
    x = noise(len(lengths), SEQ_LEN, D)
    x = x.where(mask.unsqueeze(-1), padding * noise(len(lengths), SEQ_LEN, D)).requires_grad_()
    y = mixer(x, mask)
    assert y.isfinite().all()
    for row, length in enumerate(lengths):
        alone = mixer(x[row : row + 1, :length])
        assert_close(y[row, :length], alone[0], rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad((y[mask] * noise(int(mask.sum()), D)).sum(), x)
    assert (grad[~mask] == 0).all()
    assert (grad[mask].abs().amax(-1) > 0).all()


@mixers
def test_real_positions_never_see_padding_wherever_it_is(case):
    mixer = case.random(seq_len=SEQ_LEN)
    mask = torch.rand(3, SEQ_LEN) < 0.6
    mask[2] = False  # nothing real at all
    x = noise(3, SEQ_LEN, D)
    y = mixer(x, mask)
    for padding in (torch.nan, torch.inf, 1e8):
        other = x.masked_fill(~mask.unsqueeze(-1), padding).requires_grad_()
        found = mixer(other, mask)
        assert torch.equal(found[mask], y[mask])
        (grad,) = torch.autograd.grad(found[mask].square().sum(), other)
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()


@mixers
def test_a_mask_of_ones_is_no_mask(case):
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(2, 21, D)
    assert_close(mixer(x, torch.ones(2, 21, dtype=torch.bool)), mixer(x), rtol=0, atol=1e-12)


BAD_INPUTS = {
    "integers": torch.ones(2, 5, D, dtype=torch.long),
    "complex": torch.ones(2, 5, D, dtype=torch.complex128),
    "bool": torch.ones(2, 5, D, dtype=torch.bool),
    "narrower": torch.ones(2, 5, D - 1, dtype=torch.float64),
    "wider": torch.ones(2, 5, D + 1, dtype=torch.float64),
    "of one channel": torch.ones(2, 5, 1, dtype=torch.float64),
    "without a batch": torch.ones(5, D, dtype=torch.float64),
    "of one number": torch.ones((), dtype=torch.float64),
    "with another axis": torch.ones(2, 5, 1, D, dtype=torch.float64),
    "without a step": torch.ones(2, 0, D, dtype=torch.float64),
}


@mixers
def test_inputs_that_are_none_are_refused_at_the_door(case):
    mixer = case.random(seq_len=SEQ_LEN)
    assert mixer.d_model == D
    methods = [mixer]
    if mixer.causal:
        methods += [mixer.prefill, lambda x: mixer.step(x, mixer.initial_state(2))]
    for name, x in BAD_INPUTS.items():
        for method in methods[:2] if x.ndim == 2 else methods:
            with pytest.raises(OptionError) as refused:
                method(x)
            line = str(refused.value)
            assert f"x={x.dtype} {tuple(x.shape)}: must be floating-point (B, " in line, name
            assert f"{D})" in line
            assert "\n" not in line


@mixers
def test_inputs_may_be_given_by_name(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, 5, D)
    mask = right_padded([5, 3], 5)
    assert torch.equal(mixer(x=x, mask=mask), mixer(x, mask))
    with pytest.raises(OptionError, match="x="):
        mixer(x=x.long())
    if mixer.causal:
        state = mixer.initial_state(batch_size=2)
        assert torch.equal(mixer.step(x=x[:, 0], state=state)[0], mixer.step(x[:, 0], state)[0])
        assert torch.equal(mixer.prefill(x=x)[0], mixer.prefill(x)[0])


@mixers
def test_masks_that_are_none_are_refused_at_the_door(case):
    mixer, x = case.random(seq_len=SEQ_LEN), noise(2, 5, D)
    masks = [torch.ones(shape, dtype=torch.bool) for shape in ((2, 4), (1, 5), (5,), (2, 5, 1))]
    for mask in (*masks, torch.ones(2, 5), torch.ones(2, 5, dtype=torch.long)):
        for call in (lambda mask=mask: mixer(x, mask), lambda mask=mask: mixer(x, mask=mask)):
            with pytest.raises(OptionError, match=r"mask=torch\.\w+ \(.*\): must be bool \(2, 5\)"):
                call()


def layouts(batch):
    """Inputs (batch, SEQ_LEN, D) that are not contiguous."""
    yield "permuted", noise(batch, D, SEQ_LEN).transpose(1, 2)
    yield "time first", noise(SEQ_LEN, batch, D).transpose(0, 1)
    yield "sliced", noise(batch, 2 * SEQ_LEN, D + 3)[:, ::2, 1:-2]
    yield "expanded", noise(1, SEQ_LEN, D).expand(batch, -1, -1)
    yield "expanded in time", noise(batch, 1, D).expand(-1, SEQ_LEN, -1)


@mixers
def test_any_layout_of_inputs_and_gradients(case):
    mixer = case.random(seq_len=SEQ_LEN)
    for name, x in layouts(3):
        plain = x.contiguous().requires_grad_()
        y, expected = mixer(x.requires_grad_()), mixer(plain)
        assert_close(y, expected, rtol=0, atol=1e-12, msg=name)
        for _, weight in layouts(3):
            assert_close(
                torch.autograd.grad(y, x, weight, retain_graph=True)[0],
                torch.autograd.grad(expected, plain, weight.contiguous(), retain_graph=True)[0],
                rtol=0, atol=1e-11, msg=name,
            )  # fmt: skip


@mixers
def test_outputs_may_be_changed_in_place(case):
    mixer = case.random(seq_len=SEQ_LEN)
    for batch, length in ((1, SEQ_LEN), (2, SEQ_LEN), (2, 16)):
        x = noise(batch, length, D).requires_grad_()
        expected = mixer(x) + x
        y = mixer(x)
        y += x
        assert_close(y, expected, rtol=0, atol=1e-12)


@mixers
def test_gradients_are_the_same_while_flops_are_counted(case):
    """A dispatch mode runs the bodies of operators as any tensor code: lazy views must not survive in them."""
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(2, SEQ_LEN, D)
    expected = torch.autograd.grad(mixer(x).square().sum(), list(mixer.parameters()))
    with FlopCounterMode(display=False):
        found = torch.autograd.grad(mixer(x).square().sum(), list(mixer.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12 * b.abs().max().item())


@mixers
def test_an_empty_batch_has_empty_outputs(case):
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(0, SEQ_LEN, D).requires_grad_()
    y = mixer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    if mixer.causal:
        assert mixer.step(x[:, 0], mixer.prefill(x[:, :4])[1])[0].shape == (0, D)


@mixers
def test_a_model_built_on_the_meta_device_is_the_same_model(case):
    expected = case.random(seq_len=SEQ_LEN)
    with torch.device("meta"):
        mixer = case.build(seq_len=SEQ_LEN)
    assert all(parameter.is_meta for parameter in mixer.parameters())
    mixer = mixer.to_empty(device="cpu").double().eval()
    mixer.load_state_dict(expected.state_dict())
    x = noise(2, SEQ_LEN, D)
    assert_close(mixer(x), expected(x), rtol=0, atol=0)
    if mixer.causal:
        assert_close(stepped(mixer, x, mixer.initial_state(2)), expected(x), rtol=0, atol=1e-9)


@mixers
def test_sequences_of_a_batch_do_not_meet(case):
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(5, SEQ_LEN, D)
    y = mixer(x)
    for row in range(5):
        assert_close(mixer(x[row : row + 1]), y[row : row + 1], rtol=0, atol=1e-12)


@mixers
def test_saved_copied_and_pickled_mixers_are_the_same(case):
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(2, SEQ_LEN, D)
    y = mixer(x)
    fresh = case.random(seq_len=SEQ_LEN)
    assert not torch.equal(fresh(x), y)
    fresh.load_state_dict(mixer.state_dict())
    for twin in (fresh, copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(twin(x), y)


@mixers
def test_too_long_inputs_are_refused_or_taken_in_full(case):
    """A mixer may be built for a length, but must not return something else for more."""
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(2, SEQ_LEN + 1, D)
    try:
        y = mixer(x)
    except OptionError:
        with pytest.raises(OptionError, match=f"seq_len={SEQ_LEN}: .* {SEQ_LEN + 1} steps"):
            mixer(x)
        return
    longer = case.build(seq_len=SEQ_LEN + 1).double().eval()
    longer.load_state_dict(mixer.state_dict())
    assert_close(y, longer(x), rtol=0, atol=1e-10)


@mixers
def test_bfloat16_autocast_stays_near_float32(case):
    mixer = case.random(seq_len=128, dtype=torch.float32)
    x = noise(2, 128, D, dtype=torch.float32).requires_grad_()
    mask = right_padded([128, 70], 128)
    loss_w = noise(2, 128, D, dtype=torch.float32) * mask.unsqueeze(-1)
    exact = mixer(x, mask)
    exact_grads = torch.autograd.grad((exact * loss_w).sum(), (x, *mixer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x, mask)
    grads = torch.autograd.grad((y.float() * loss_w).sum(), (x, *mixer.parameters()))
    assert ((y - exact) * mask.unsqueeze(-1)).norm() < 0.02 * (exact * mask.unsqueeze(-1)).norm()
    floor = 0.03 * torch.stack([grad.norm() for grad in exact_grads]).norm()  # some gradients nearly cancel
    for low, high in zip(grads, exact_grads, strict=True):
        assert low.isfinite().all()
        assert (low - high).norm() < 0.02 * max(high.norm(), floor)


@pytest.mark.slow
@mixers
def test_gradcheck(case):
    mixer = case.random(seq_len=5, d_model=4, num_filters=3)
    names, values = zip(*mixer.named_parameters(), strict=True)
    mask = right_padded([5, 3], 5)

    def outputs(x, *parameters):
        return functional_call(mixer, dict(zip(names, parameters, strict=True)), (x, mask))[mask]

    x = noise(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, *values), fast_mode=True)  # every number, in random combinations


@mixers
def test_infinities_in_the_padding_are_ignored(case):
    layer = case.random(seq_len=SEQ_LEN)
    mask = right_padded([SEQ_LEN, 7], SEQ_LEN)
    x = noise(2, SEQ_LEN, D)
    y = layer(x, mask)
    for bad in (torch.inf, torch.nan):
        assert torch.equal(layer(x.masked_fill(~mask.unsqueeze(-1), bad), mask)[mask], y[mask])


LOADED = """
import sys, torch
from stu.mixers import lru, s4, s5, stu, stu_t  # what the programs call must be registered
for file in sys.argv[1:]:
    x, y = torch.load(f"{file}.pt")
    found = torch.export.load(f"{file}.pt2").module()(x)
    assert torch.allclose(found, y, rtol=0, atol=1e-12), (file, (found - y).abs().max())
"""


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*_flat_weights.*were assigned during export")  # of torch.nn.RNN
def test_an_exported_program_is_the_same_in_another_process(tmp_path):
    files = []
    other = STU(D, seq_len=SEQ_LEN, num_filters=2, k_u=1).double()
    other.bank = FilterBank(noise(SEQ_LEN, 5))  # of no name that another process could understand
    # Both ways wherever a mixer has them: in `test_transforms` programs of causal ones are loaded, too.
    cases = [case for case in mixer_cases() if not re.search("causal$|^Attention-(causal|bidirectional)$", case.name)]
    mixers = {case.name: case.random(seq_len=SEQ_LEN) for case in cases} | {"other filters": other}
    for name, mixer in mixers.items():
        x, file = noise(2, 21, D), str(tmp_path / name)
        program = torch.export.export(mixer, (x,), strict=False)  # the default of newer releases
        torch.export.save(program, f"{file}.pt2")
        torch.save((x, mixer(x).detach()), f"{file}.pt")
        files.append(file)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED, *files], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
