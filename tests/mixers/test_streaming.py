"""The STU step by step: states of exponentials in place of a window of all inputs, for its variants and at length."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.ops import realization
from stu.ops.realization import STATES_FROM, realize_filters, realize_for_streaming
from tests.models import STU_VARIANTS, randomized

D = 8
SEQ_LEN = 520

VARIANTS = STU_VARIANTS | {
    "late": {"delay": 5, "k_u": 2, "k_y": 0},
    "many_lags": {"delay": 1, "k_u": 6, "k_y": 4, "recurrence": "fixed"},
    "many_filters": {"num_filters": 24},
    "hankel_l_filters": {"hankel": "L", "two_sided": False, "num_filters": 24},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)


@pytest.fixture(autouse=True)
def _no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("STU_CACHE", str(tmp_path))


def random_stu(*, d_model=D, seq_len=SEQ_LEN, dtype=torch.float64, **options):
    """An STU whose learned recurrence, if any, is stable."""
    defaults = {"seq_len": seq_len, "num_filters": 6, "k_y": 2, "recurrence": "learned"}
    layer = randomized(STU(d_model, **(defaults | options))).to(dtype)
    if layer.m_y is not None:
        with torch.no_grad():
            layer.m_y.mul_(0.5)
    return layer


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def stepped(layer, x, state):
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1), state


def assert_near(found, exact, tolerance):
    assert_close(found, exact, rtol=0, atol=tolerance * exact.detach().abs().max().item())


def keeps_states(layer):
    """Whether it streams by states, from what it remembers."""
    memory = layer.initial_state(1).inputs
    assert (memory.sums.numel() > 0) == (memory.inputs.shape[1] < layer.seq_len)
    return memory.sums.numel() > 0


def tensors(state):
    """All tensors of a state."""
    return [*state.inputs, state.outputs]


# --- one layer, three ways ---


@variants
@precisions
@torch.no_grad()
def test_forward_step_and_prefill_agree(variant, dtype, tolerance):
    layer = random_stu(dtype=dtype, **variant)
    assert keeps_states(layer)
    x = noise(2, SEQ_LEN, D, dtype=dtype)
    y = layer(x)
    found, _ = stepped(layer, x, layer.initial_state(2))
    assert found.dtype == dtype
    assert_near(found, y, tolerance)
    for cut in (1, 2, 5, 300, SEQ_LEN - 1, SEQ_LEN):
        prefix, state = layer.prefill(x[:, :cut])
        assert_near(prefix, y[:, :cut], tolerance)
        if cut < SEQ_LEN:
            stepped(layer, noise(2, 3, D, dtype=dtype)[:, : SEQ_LEN - cut], state)  # must leave the state alone
            assert_near(stepped(layer, x[:, cut : cut + 20], state)[0], y[:, cut : cut + 20], tolerance)


@pytest.mark.parametrize("streaming", ["window", "states"])
@torch.no_grad()
def test_inputs_in_float64_are_not_rounded_by_a_model_in_float32(streaming):
    layer = random_stu(dtype=torch.float32, streaming=streaming)
    x = noise(1, 40, D)
    y = layer(x)
    assert_near(stepped(layer, x, layer.initial_state(1))[0], y, 1e-11)
    assert_near(stepped(layer, x[:, 20:], layer.prefill(x[:, :20])[1])[0], y[:, 20:], 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recurrence": "fixed"}], ids=["learned", "fixed"])
@precisions
@torch.no_grad()
def test_thousands_of_steps_agree(options, dtype, tolerance):
    seq_len = 2048
    layer = random_stu(seq_len=seq_len, dtype=dtype, num_filters=24, **options)
    x = noise(1, seq_len, D, dtype=dtype)
    assert_near(stepped(layer, x, layer.initial_state(1))[0], layer(x), tolerance)


@variants
@torch.no_grad()
def test_states_after_a_prefill_are_those_after_as_many_steps(variant, monkeypatch):
    monkeypatch.setattr(realization, "CHUNK", 50)
    layer = random_stu(**variant)
    x = noise(2, 120, D)
    for length in (0, 1, 4, 50, 57, 120):
        _, steps = stepped(layer, torch.cat((x, x[:, :1]), 1)[:, : length + 1], layer.initial_state(2))
        state = layer.prefill(x[:, :length])[1] if length else layer.initial_state(2)
        _, prefilled = layer.step(torch.cat((x, x[:, :1]), 1)[:, length], state)
        assert steps.position == prefilled.position == length + 1
        for a, b in zip(tensors(steps), tensors(prefilled), strict=True):
            assert a.dtype == b.dtype
            assert_close(a, b, rtol=0, atol=1e-9)


@variants
@torch.no_grad()
def test_window_and_states_agree(variant):
    layer = random_stu(**variant)
    window = random_stu(streaming="window", **variant)
    window.load_state_dict(layer.state_dict())
    assert not keeps_states(window)
    x = noise(2, 100, D)
    found, state = stepped(layer, x, layer.initial_state(2))
    exact, full = stepped(window, x, window.initial_state(2))
    assert_near(found, exact, 1e-10)
    assert full.inputs.inputs.shape == (2, SEQ_LEN, D)
    assert state.inputs.inputs.shape == (2, max(layer.bank.spectral.delay + 1, layer.bank.spectral.k_u), D)


@variants
def test_gradients_flow_through_steps_and_prefill(variant):
    seq_len, cut = 24, 10
    layer = random_stu(d_model=3, seq_len=seq_len, streaming="states", **(variant | {"num_filters": 4}))
    assert keeps_states(layer)
    x, loss_w = noise(2, seq_len, 3).requires_grad_(), noise(2, seq_len, 3)
    prefix, state = layer.prefill(x[:, :cut])
    y = torch.cat((prefix, stepped(layer, x[:, cut:], state)[0]), 1)
    leaves = (x, *layer.parameters())
    found = torch.autograd.grad((y * loss_w).sum(), leaves)
    exact = torch.autograd.grad((layer(x) * loss_w).sum(), leaves)
    for a, b in zip(found, exact, strict=True):
        assert_near(a, b, 1e-8)
    detached = tree_map_only(torch.Tensor, torch.Tensor.detach, state)
    y, _ = layer.step(x[:, cut], detached)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad[:, :cut] == 0).all()


# --- which of the two is kept ---


@pytest.mark.parametrize(
    ("options", "states"),
    [
        ({"seq_len": STATES_FROM - 1}, False),
        ({"seq_len": STATES_FROM}, True),
        ({"seq_len": STATES_FROM, "streaming": "window"}, False),
        ({"seq_len": 40, "streaming": "states"}, True),
        ({"seq_len": 600, "num_filters": 32}, False),  # the last filters would lose more than a millionth
        ({"seq_len": 600, "num_filters": 32, "streaming": "states"}, True),
    ],
    ids=str,
)
def test_states_are_kept_where_they_pay_and_are_exact(options, states):
    assert keeps_states(random_stu(**options)) == states


def test_a_device_without_float64_keeps_the_window():
    assert realize_for_streaming(SEQ_LEN, 6, "standard", "auto", torch.device("mps")) is None


def test_streaming_must_be_one_of_three():
    with pytest.raises(OptionError, match="streaming=exponentials: must be one of auto, states, window"):
        STU(D, seq_len=16, num_filters=4, streaming="exponentials")


@pytest.mark.parametrize("streaming", ["states", "window"])
def test_no_step_is_taken_past_the_filters(streaming):
    layer = random_stu(seq_len=8, streaming=streaming)
    _, full = layer.prefill(noise(1, 8, D))
    with pytest.raises(OptionError, match="seq_len=8"):
        layer.step(noise(1, D), full)
    _, last = layer.prefill(noise(1, 7, D))
    layer.step(noise(1, D), last)


# --- what a step costs ---


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        taken = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in taken:
            self.sizes.append(result.numel())
        return result


@pytest.mark.slow
@variants
@torch.no_grad()
def test_a_step_costs_the_same_anywhere_and_copies_no_weights(variant):
    width = 256
    layer = random_stu(d_model=width, dtype=torch.float32, **variant)
    _, late = layer.prefill(noise(1, SEQ_LEN - 2, width, dtype=torch.float32))
    costs = []
    for state in (layer.initial_state(1), late):
        layer.step(noise(1, width, dtype=torch.float32), state)
        with Sizes() as made, FlopCounterMode(display=False) as flops:
            _, after = layer.step(noise(1, width, dtype=torch.float32), state)
        assert [tensor.shape for tensor in tensors(after)] == [tensor.shape for tensor in tensors(state)]
        assert max(made.sizes) < width * width  # not one matrix
        costs.append((flops.get_total_flops(), made.sizes))
    assert costs[0] == costs[1]
    _, branches, poles, _ = layer.initial_state(1).inputs.sums.shape
    filters = len(layer.m_phi)
    matrices = sum(len(weight) for weight in (layer.m_phi, layer.m_u, layer.m_y) if weight is not None)
    assert costs[0][0] == 2 * width * (matrices * width + filters * poles)
    assert branches * poles <= 2 * len(realize_filters(*layer.bank.spectral[:3], tolerance=0.0).poles)


# --- precision ---


@pytest.mark.parametrize("streaming", ["states", "window"])
@torch.no_grad()
def test_autocast_leaves_steps_in_float32(streaming):
    layer = random_stu(seq_len=60, dtype=torch.float32, streaming=streaming)
    x = noise(2, 30, D, dtype=torch.float32)
    exact, _ = stepped(layer, x, layer.prefill(x)[1])
    with torch.autocast("cpu", torch.bfloat16):
        same, _ = stepped(layer, x, layer.prefill(x)[1])
        rounded, _ = stepped(layer, x.bfloat16(), layer.prefill(x)[1])
    assert torch.equal(same, exact)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize("streaming", ["states", "window"])
@torch.no_grad()
def test_models_of_half_precision_step_as_they_run(streaming):
    layer = random_stu(seq_len=60, streaming=streaming, k_y=0).bfloat16()
    x = noise(2, 60, D).bfloat16()
    found, _ = stepped(layer, x, layer.initial_state(2))
    exact = layer.double()(x.double())
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("streaming", ["states", "window"])
def test_what_an_evaluation_leaves_behind_can_be_trained_on(streaming):
    """Tensors made in inference mode take part in no backward pass."""
    layer = random_stu(seq_len=20, streaming=streaming, dtype=torch.float32)
    x = noise(1, 20, D, dtype=torch.float32)
    with torch.inference_mode():
        layer.step(x[:, 0], layer.initial_state(1))
    y, _ = stepped(layer, x.requires_grad_(), layer.initial_state(1))
    y.sum().backward()
    layer(x).sum().backward()


# --- states and layers are values ---


@torch.no_grad()
def test_rows_of_a_state_are_states():
    layer = random_stu()
    x = noise(3, 40, D)
    _, state = layer.prefill(x)
    rows = torch.tensor([2, 0])
    chosen = tree_map_only(torch.Tensor, lambda x: x[rows], state)
    found, _ = layer.step(x[rows, 0], chosen)
    exact, _ = layer.step(x[:, 0], state)
    assert_close(found, exact[rows], rtol=0, atol=1e-12)


@torch.no_grad()
def test_layers_and_states_are_copied_and_pickled_in_the_middle_of_a_stream():
    layer = random_stu()
    x = noise(2, 30, D)
    _, state = layer.prefill(x)
    exact, _ = layer.step(x[:, 0], state)
    for twin, same in (copy.deepcopy((layer, state)), pickle.loads(pickle.dumps((layer, state)))):
        assert torch.equal(twin.step(x[:, 0], same)[0], exact)
    assert {name for name, _ in layer.named_parameters()} == {"m_phi", "m_u", "m_y"}
