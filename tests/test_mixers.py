"""What every mixer promises, for every mixer of conf/model and for variants; then each mixer against its equation."""

import copy
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.attention import Attention, rotate
from stu.mixers.stu import STU, filter_bank
from stu.ops.filters import hankel_matrix
from tests.models import mixer_cases, randomized, stu_cases

SEQ_LEN = 33
D = 8

mixers = pytest.mark.parametrize("case", mixer_cases(), ids=str)
stus = pytest.mark.parametrize("case", stu_cases(), ids=str)


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


# --- the contract of all mixers ---


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
def test_a_mask_of_ones_is_no_mask(case):
    mixer = case.random(seq_len=SEQ_LEN)
    x = noise(2, 21, D)
    assert_close(mixer(x, torch.ones(2, 21, dtype=torch.bool)), mixer(x), rtol=0, atol=1e-12)


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


@mixers
def test_gradcheck(case):
    mixer = case.random(seq_len=5, d_model=4, num_filters=3)
    names, values = zip(*mixer.named_parameters(), strict=True)
    mask = right_padded([5, 3], 5)

    def outputs(x, *parameters):
        return functional_call(mixer, dict(zip(names, parameters, strict=True)), (x, mask))[mask]

    x = noise(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, *values), fast_mode=False)


# --- the STU ---


def literal_stu(u, seq_len, num_filters, m_plus, m_minus, m_u, m_y, *, hankel, delay, fixed_lag):
    """The equation of the paper (2312.06837, section 2; SCIENCE.md), time from 1, one sum after the other.

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


@mixers
def test_infinities_in_the_padding_are_ignored(case):
    layer = case.random(seq_len=SEQ_LEN)
    mask = right_padded([SEQ_LEN, 7], SEQ_LEN)
    x = noise(2, SEQ_LEN, D)
    y = layer(x, mask)
    for bad in (torch.inf, torch.nan):
        assert torch.equal(layer(x.masked_fill(~mask.unsqueeze(-1), bad), mask)[mask], y[mask])


@pytest.mark.parametrize("options", [{"k_y": 0}, {"k_y": 2}, {"k_y": 0, "causal": False}], ids=str)
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
    layer = STU(D, seq_len=16, num_filters=4, k_u=3, k_y=2)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"m_phi": (8, D, D), "m_u": (3, D, D), "m_y": (2, D, D)}


def test_stu_begins_as_in_the_official_code():
    width = 64
    layer = STU(width, seq_len=64, num_filters=5, k_u=3, k_y=2)
    assert (layer.m_phi == 0).all()
    assert (layer.m_y == 0).all()
    deviation = width**-0.5
    assert layer.m_u.abs().max() <= 2 * deviation
    # a normal distribution cut at two deviations has 0.8796 of the deviation
    assert layer.m_u.std().item() == pytest.approx(0.8796 * deviation, rel=0.03)
    purely_spectral = STU(width, seq_len=64, num_filters=5, k_u=0, k_y=0, delay=0)
    assert purely_spectral.m_phi.std().item() == pytest.approx(deviation * 10**-0.5, rel=0.03)


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
        STU(D, **({"seq_len": 16, "num_filters": 4} | options))
    assert caught.value.name == name


# --- attention ---


def literal_attention(layer, x, mask, rotary):
    """Softmax attention of one sequence (L, D), query by query and head by head, in complex numbers for rotations."""
    projected = x @ layer.project_in.weight.T + layer.project_in.bias
    query, key, value = projected.chunk(3, -1)
    width = D // layer.num_heads
    outputs = []
    for t in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            part = slice(h * width, (h + 1) * width)
            scores, values = [], []
            for s in range(len(x)):
                if (layer.causal and s > t) or (not mask[s] and s != t) or (not mask[s] and not layer.causal):
                    continue
                q, k = query[t, part], key[s, part]
                if rotary:
                    half = width // 2
                    angle = (t - s) * 10_000 ** (-2 / width * torch.arange(half, dtype=torch.float64))
                    turned = torch.complex(q[:half], q[half:]) * torch.polar(torch.ones_like(angle), angle)
                    dot = (turned * torch.complex(k[:half], k[half:]).conj()).real.sum()
                else:
                    dot = q @ k
                scores.append(dot / math.sqrt(width))
                values.append(value[s, part])
            weights = torch.stack(scores).exp()
            heads.append((weights / weights.sum()) @ torch.stack(values))
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ layer.project_out.weight.T + layer.project_out.bias


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_attention_is_softmax_attention(causal, positions, num_heads, masked):
    layer = Attention(D, num_heads=num_heads, causal=causal, positions=positions).double()
    x = noise(2, 9, D)
    mask = torch.ones(2, 9, dtype=torch.bool)
    if masked:
        mask[0, 5:] = False
        mask[1, :3] = False  # padding on the left, too
    y = layer(x, mask if masked else None)
    for row in range(2):
        expected = literal_attention(layer, x[row], mask[row], positions == "rotary")
        assert_close(y[row][mask[row]], expected[mask[row]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_masks_never_give_nan(causal):
    layer = Attention(D, num_heads=2, causal=causal)
    x = noise(4, 6, D, dtype=torch.float32).requires_grad_()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, :2], mask[2, -1], mask[3, 3] = True, True, True  # row 0 has no real position at all
    y = layer(x, mask)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in (x.grad, *(p.grad for p in layer.parameters())))


def test_rotated_scores_depend_on_the_distance_alone():
    q, k = noise(1, 4), noise(1, 4)
    starts = (0, 1, 37, 100_000)
    scores = torch.stack([rotate(q.expand(20, 4), start) @ rotate(k.expand(20, 4), start).T for start in starts])
    assert_close(scores, scores[:1].expand_as(scores), rtol=0, atol=1e-9)
    diagonals = [scores[0].diagonal(offset) for offset in range(-19, 20)]
    assert all((diagonal - diagonal[0]).abs().max() < 1e-12 for diagonal in diagonals)
    first = torch.stack([diagonal[0] for diagonal in diagonals])
    assert (first.diff().abs() > 1e-3).any()  # and on the distance it does depend


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = noise(3, 10, 6)
    assert_close(rotate(x, 0).norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-12)
    assert torch.equal(rotate(x, 0)[:, 0], x[:, 0])
    assert_close(rotate(x, 0)[:, 4:], rotate(x[:, 4:], 4), rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        assert rotate(x.to(dtype), 0).dtype == dtype


def test_attention_drops_out_in_training_only():
    layer = Attention(D, num_heads=2, dropout=0.5)
    x = noise(2, 20, D, dtype=torch.float32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("width", "options"), [(8, {"num_heads": 3}), (8, {"num_heads": 0}), (6, {"num_heads": 2, "positions": "rotary"})]
)
def test_attention_names_impossible_options(width, options):
    with pytest.raises(OptionError, match=f"num_heads={options['num_heads']}"):
        Attention(width, **options)


@pytest.mark.parametrize("options", [{"k_y": 0}, {"k_y": 2, "recurrence": "fixed"}, {"k_y": 2}], ids=str)
def test_a_bidirectional_stu_is_two_units_one_from_the_end(options):
    layer = randomized(STU(D, seq_len=20, num_filters=4, causal=False, **options)).double()
    forward = STU(D, seq_len=20, num_filters=4, **options).double()
    forward.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("reverse.")})
    x = noise(2, 17, D)
    assert_close(layer(x), forward(x) + layer.reverse(x.flip(1)).flip(1), rtol=0, atol=1e-10)
    assert not torch.allclose(layer.reverse.m_u, layer.m_u)
    with pytest.raises(NotImplementedError, match="causal"):
        layer.initial_state(1)
