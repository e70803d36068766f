"""STU-T against its equation, golden outputs and gradients, and the STU it approximates."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from stu.ops import realization
from stu.ops.bank import FilterBank, filter_bank
from stu.ops.filters import hankel_matrix
from tests.golden import cases
from tests.models import randomized

D = 8
VARIANTS = {
    "plain": {},
    "one_branch": {"two_sided": False},
    "hankel_l": {"two_sided": False, "hankel": "L"},
    "delayed": {"delay": 2},
    "shared": {"shared_branches": True},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def random(seq_len, num_filters=6, dtype=torch.float64, **options):
    return randomized(STUT(D, seq_len=seq_len, num_filters=num_filters, **options)).to(dtype)


def part(arrays, case):
    """The arrays of one golden case, without its name."""
    return {name.partition("__")[2]: value for name, value in arrays.items() if name.startswith(f"{case}__")}


def stepped(mixer, x, state):
    """The outputs of `step` over a whole sequence."""
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1)


def literal_stu_t(u, seq_len, m_inputs, m_plus, m_minus, *, hankel="standard", delay=0):
    """Every product and sum written out: project, then sum over lags, filters and branches. u (L, D) → (L, D)."""
    values, vectors = np.linalg.eigh(hankel_matrix(seq_len, hankel).numpy())
    v = u @ m_inputs
    y = np.zeros_like(v)
    for k in range(len(m_plus)):
        phi = vectors[:, -1 - k]
        phi = values[-1 - k] ** 0.25 * phi * np.sign(phi[np.abs(phi).argmax()])
        for t in range(len(u)):
            for i in range(t - delay + 1):
                weight = m_plus[k] if m_minus is None else m_plus[k] + (-1) ** i * m_minus[k]
                y[t] += phi[i] * weight * v[t - delay - i]
    return y


@variants
def test_is_its_equation(options):
    layer = random(11, num_filters=3, **options)
    plus, *minus = layer.m_filters.detach().numpy().reshape(-1, 3, D)
    if layer.bank.filters.shape[1] == 3 and options.get("shared_branches"):
        minus = [plus]
    u = noise(9, D)
    expected = literal_stu_t(
        u.numpy(),
        11,
        layer.m_inputs.detach().numpy(),
        plus,
        minus[0] if minus else None,
        hankel=options.get("hankel", "standard"),
        delay=options.get("delay", 0),
    )
    assert_close(layer(u[None])[0].detach(), torch.from_numpy(expected), rtol=0, atol=1e-10)


@variants
def test_is_an_stu_whose_matrices_share_all_but_a_diagonal(options):
    layer = random(40, **options)
    stu_options = {name: value for name, value in options.items() if name != "shared_branches"}
    stu = STU(D, seq_len=40, num_filters=6, k_u=0, k_y=0, **({"delay": 0} | stu_options)).double()
    weights = torch.cat((layer.m_filters,) * (len(stu.m_phi) // len(layer.m_filters)))
    with torch.no_grad():
        stu.m_phi.copy_(layer.m_inputs * weights.unsqueeze(1))
    x = noise(2, 33, D)
    assert_close(layer(x), stu(x), rtol=0, atol=1e-10)


def test_shared_branches_never_hear_odd_lags():
    layer = random(32, shared_branches=True)
    impulse = torch.zeros(1, 32, D, dtype=torch.float64)
    impulse[:, 0] = noise(D)
    y = layer(impulse)
    assert (y[:, 1::2].abs().max() < 1e-12) & (y[:, ::2].abs().amin() > 0)
    assert random(32)(impulse)[:, 1::2].abs().max() > 1e-3


@pytest.mark.parametrize(("case", "kind"), cases("stu_two_sided", r"(.+?)__(std|L)__tensordot__y"))
def test_golden_outputs_and_gradients(case, kind, golden):
    """As published: the standard matrix has two branches with the same weights."""
    arrays = part(golden("stu_two_sided"), case)
    phi, standard = arrays[f"{kind}__phi"], kind == "std"
    options = {"two_sided": standard, "hankel": "standard" if standard else "L", "shared_branches": standard}
    layer = STUT(arrays["x"].shape[2], seq_len=len(phi), num_filters=phi.shape[1], **options).double()
    responses = filter_bank(phi, two_sided=standard, delay=0)
    if standard:
        responses = responses.unflatten(1, (2, -1)).sum(1)
    layer.bank = FilterBank(responses)
    with torch.no_grad():
        layer.m_inputs.copy_(arrays["M_inputs"])
        layer.m_filters.copy_(arrays["M_filters"])
    x = arrays["x"].clone().requires_grad_()
    y = layer(x)
    (y * arrays["loss_w"]).sum().backward()
    got = {"y": y, "g_x": x.grad, "g_M_inputs": layer.m_inputs.grad, "g_M_filters": layer.m_filters.grad}
    for name, value in got.items():
        assert_close(value, arrays[f"{kind}__tensordot__{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", cases("stu_two_sided", r"(.+?)__std__tensordot__y_plus"))
def test_golden_branches_have_weights_of_their_own(case, golden):
    arrays = part(golden("stu_two_sided"), case)
    phi = arrays["std__phi"]
    layer = STUT(arrays["x"].shape[2], seq_len=len(phi), num_filters=phi.shape[1]).double()
    layer.bank = FilterBank(filter_bank(phi, two_sided=True, delay=0))
    with torch.no_grad():
        layer.m_inputs.copy_(arrays["M_inputs"])
        layer.m_filters.copy_(torch.cat((arrays["M_filters"], -3 * arrays["M_filters"])))
    expected = arrays["std__tensordot__y_plus"] - 3 * arrays["std__tensordot__y_minus"]
    assert_close(layer(arrays["x"]).detach(), expected, rtol=0, atol=1e-10)


@variants
def test_a_bidirectional_unit_is_two_one_from_the_end(options):
    layer = random(20, causal=False, **options)
    forward, reverse = (random(20, **options) for _ in range(2))
    for one, weights in ((forward, layer.m_filters), (reverse, layer.m_reverse)):
        one.load_state_dict({"m_inputs": layer.m_inputs, "m_filters": weights})
    for length in (1, 2, 17, 20):
        x = noise(2, length, D)
        assert_close(layer(x), forward(x) + reverse(x.flip(1)).flip(1), rtol=0, atol=1e-10)
    assert not torch.allclose(layer.m_filters, layer.m_reverse)


# --- step by step ---


@variants
@pytest.mark.parametrize("streaming", ["window", "states"])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 65])
def test_steps_to_the_end_whatever_the_built_length(options, streaming, seq_len):
    layer = random(seq_len, num_filters=min(3, seq_len), streaming=streaming, **options)
    x = noise(2, seq_len, D)
    y = layer(x)
    assert_close(stepped(layer, x, layer.initial_state(2)), y, rtol=0, atol=1e-9)
    for cut in range(1, seq_len):
        prefix, state = layer.prefill(x[:, :cut])
        assert_close(prefix, y[:, :cut], rtol=0, atol=1e-10)
        assert_close(layer.step(x[:, cut], state)[0], y[:, cut], rtol=0, atol=1e-9)


@variants
def test_a_long_unit_keeps_states_as_good_as_a_window(options):
    layer = random(1024, num_filters=24, **options)
    window = random(1024, num_filters=24, streaming="window", **options)
    window.load_state_dict(layer.state_dict())
    x = noise(2, 1024, D)
    y = layer(x)
    state, whole = (mixer.prefill(x[:, :1000])[1] for mixer in (layer, window))
    assert 0 < state.inputs.sums[0, ..., 0].numel() < 128
    assert whole.inputs.inputs.shape[1] == 1024
    assert_close(stepped(layer, x[:, 1000:], state), y[:, 1000:], rtol=0, atol=1e-9 * y.abs().max().item())
    assert_close(stepped(window, x[:, 1000:], whole), y[:, 1000:], rtol=0, atol=1e-10)


def test_keeps_states_where_they_are_smaller_and_as_good(monkeypatch):
    def keeps_states(seq_len, num_filters=24):
        return STUT(D, seq_len=seq_len, num_filters=num_filters).initial_state(1).inputs.sums.numel() > 0

    assert keeps_states(600)
    assert not keeps_states(100, num_filters=4)
    monkeypatch.setattr(realization, "STATES_ERROR", 0.0)
    assert not keeps_states(600)


@pytest.mark.parametrize("streaming", ["window", "states"])
def test_half_precision_steps_as_well_as_it_runs(streaming):
    layer = random(1024, dtype=torch.float32, streaming=streaming).bfloat16()
    x = noise(2, 1024, D, dtype=torch.bfloat16)
    y = layer(x)
    _, state = layer.prefill(x[:, :900])
    steps = stepped(layer, x[:, 900:], state)
    assert steps.dtype == torch.bfloat16
    assert_close(steps.float(), y[:, 900:].float(), rtol=2**-7, atol=2**-8 * y.float().abs().max().item())


@pytest.mark.parametrize("streaming", ["window", "states"])
def test_refuses_more_steps_than_it_has_filters_for(streaming):
    layer = random(8, num_filters=3, streaming=streaming)
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


@pytest.mark.parametrize("streaming", ["window", "states"])
def test_gradients_pass_through_the_steps(streaming):
    layer = random(12, num_filters=3, delay=1, streaming=streaming)
    x, loss_w = noise(2, 12, D), noise(2, 12, D)
    parameters = list(layer.parameters())
    whole = torch.autograd.grad((layer(x) * loss_w).sum(), parameters)
    prefix, state = layer.prefill(x[:, :5])
    y = torch.cat((prefix, stepped(layer, x[:, 5:], state)), 1)
    for one, other in zip(torch.autograd.grad((y * loss_w).sum(), parameters), whole, strict=True):
        assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("streaming", ["window", "states"])
def test_what_an_evaluation_leaves_behind_can_be_trained_on(streaming):
    """Tensors made in inference mode take part in no backward pass."""
    layer = random(20, num_filters=3, dtype=torch.float32, streaming=streaming)
    x = noise(2, 20, D, dtype=torch.float32)
    with torch.inference_mode():
        stepped(layer, x[:, 10:], layer.prefill(x[:, :10])[1])
    layer(x).sum().backward()
    stepped(layer, x, layer.initial_state(2)).sum().backward()


# --- precision and construction ---


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
def test_filters_stay_exact_in_a_model_of_half_precision(causal):
    layer = random(64, dtype=torch.float32, causal=causal)
    before = layer.bank.filters.clone()
    layer.bfloat16()
    assert torch.equal(layer.bank.filters, before)
    assert before.dtype == torch.float64
    x = noise(2, 64, D, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    v = x @ layer.m_inputs  # rounded, as in any bfloat16 model; then nothing is rounded but the outputs
    layer.float()
    assert torch.equal(y, layer._convolved(v.float()).bfloat16())


def test_kernels_are_not_mixed_in_bfloat16_under_autocast():
    layer = random(64, dtype=torch.float32)
    v = noise(2, 64, D, dtype=torch.float32)
    outside = layer._convolved(v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._convolved(v), outside)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
def test_compiled_in_one_graph(causal):
    layer = random(16, causal=causal)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = noise(2, 13, D).requires_grad_()
    wanted = (x, *layer.parameters())
    eager, fast = layer(x), compiled(x)
    assert_close(fast, eager, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(fast.sin().sum(), wanted), torch.autograd.grad(eager.sin().sum(), wanted), strict=True
    ):
        assert_close(one, other, rtol=0, atol=1e-12)


def test_stores_one_matrix_and_one_weight_for_every_filter_and_channel():
    def shapes(**options):
        layer = STUT(D, seq_len=16, num_filters=4, **options)
        return {name: tuple(value.shape) for name, value in layer.named_parameters()}

    assert shapes() == {"m_inputs": (D, D), "m_filters": (8, D)}
    assert shapes(shared_branches=True) == {"m_inputs": (D, D), "m_filters": (4, D)}
    assert shapes(causal=False) == {"m_inputs": (D, D), "m_filters": (8, D), "m_reverse": (8, D)}


@pytest.mark.parametrize("two_sided", [True, False])
def test_begins_as_in_the_published_code(two_sided):
    """Xavier's normal distribution: variance 2 / (rows + columns)."""
    width, num_filters = 512, 12
    layer = STUT(width, seq_len=256, num_filters=num_filters, two_sided=two_sided, causal=False)
    assert layer.m_inputs.std().item() == pytest.approx(width**-0.5, rel=0.02)
    for weights in (layer.m_filters, layer.m_reverse):
        assert weights.std().item() == pytest.approx((2 / (width + num_filters)) ** 0.5, rel=0.03)
        assert abs(weights.mean().item()) < 0.003


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_model": 0}, "d_model"),
        ({"delay": -1}, "delay"),
        ({"hankel": "L"}, "two_sided"),
        ({"hankel": "M"}, "hankel"),
        ({"streaming": "ring"}, "streaming"),
        ({"shared_branches": True, "two_sided": False}, "shared_branches"),
        ({"num_filters": 17}, "num_filters"),
        ({"seq_len": 0}, "seq_len"),
    ],
    ids=str,
)
def test_names_impossible_options(options, name):
    with pytest.raises(OptionError) as caught:
        STUT(**({"d_model": D, "seq_len": 16, "num_filters": 4} | options))
    assert caught.value.name == name
