"""Local windows of attention, its masks, and what it costs; its contract and plain form are in test_mixers.py."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stu.errors import OptionError
from stu.mixers.attention import BLOCK, Attention, local_attention, rotate
from tests.models import randomized

D = 8

causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
positions = pytest.mark.parametrize("positions", ["none", "rotary"])


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def attention(*, dtype=torch.float64, **options):
    return randomized(Attention(D, num_heads=2, **options), 0.3).to(dtype).eval()


def within(window, causal, length):
    """(L, L), True where position t, the row, may look at s: the definition of the window."""
    t, s = torch.arange(length)[:, None], torch.arange(length)
    if causal:
        return (s <= t) & (s > t - window)
    return (t - s).abs() <= window // 2


def dense(layer, x, visible):
    """The attention of a layer by the whole matrix of weights, `visible` (B, L, L)."""
    query, key, value = layer.project_in(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
    if layer.rotary:
        query, key = rotate(query, 0), rotate(key, 0)
    scores = query @ key.mT / math.sqrt(D // 2)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return layer.project_out((weights @ value).transpose(1, 2).flatten(2))


class Sizes(TorchDispatchMode):
    """How many entries the largest tensor has that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor) and not each._is_view()]
        self.largest = max([self.largest, *made])
        return result


@causality
@positions
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("length", [1, 9, BLOCK + 1, 3 * BLOCK + 7])
def test_a_window_hides_the_rest(causal, positions, masked, length):
    for window in (1, 2, 3, 4, 7, 8, BLOCK + 2, 2 * BLOCK + 1, 1000):
        layer = attention(causal=causal, window=window, positions=positions)
        x = noise(2, length, D)
        mask = torch.ones(2, length, dtype=torch.bool)
        if masked:
            mask = torch.rand(2, length) < 0.7
            mask[0, 0] = True
        visible = within(window, causal, length) & mask[:, None] | torch.eye(length, dtype=torch.bool)
        expected = dense(layer, x, visible)
        y = layer(x, mask if masked else None)
        assert_close(y[mask], expected[mask], rtol=0, atol=1e-12)


def test_the_window_by_example():
    def reach(**options):
        """Which inputs change output 10 of 20."""
        layer, x = attention(**options), noise(1, 20, D).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x)[0, 10].sum(), x)
        return grad[0].abs().amax(-1).nonzero().flatten().tolist()

    assert reach(causal=True, window=1) == [10]
    assert reach(causal=True, window=4) == [7, 8, 9, 10]
    assert reach(causal=False, window=1) == [10]
    assert reach(causal=False, window=4) == reach(causal=False, window=5) == [8, 9, 10, 11, 12]


@causality
@positions
def test_a_window_as_long_as_the_sequence_hides_nothing(causal, positions):
    layer = attention(causal=causal, window=40 if causal else 80, positions=positions)
    whole = copy.deepcopy(layer)
    whole.window = None
    x, mask = noise(2, 40, D), torch.rand(2, 40) < 0.7
    assert_close(layer(x), whole(x), rtol=0, atol=1e-12)
    assert_close(layer(x, mask)[mask], whole(x, mask)[mask], rtol=0, atol=1e-12)


@positions
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("window", [1, 5, 30, 100])
def test_a_window_remembers_no_more_than_it_shows(window, dtype, tolerance, positions):
    layer = attention(causal=True, window=window, positions=positions, dtype=dtype)
    x = noise(2, 80, D, dtype=dtype)
    y = layer(x)
    for cut in (0, 1, 5, 29, 79):
        prefix, state = layer.prefill(x[:, :cut]) if cut else (y[:, :0], layer.initial_state(2))
        outputs = [prefix]
        for t in range(cut, 80):
            assert state.position == t
            assert state.keys.shape == state.values.shape == (2, 2, min(t, window), D // 2)
            layer.step(noise(2, D, dtype=dtype), state)  # must leave the state alone
            y_t, state = layer.step(x[:, t], state)
            outputs.append(y_t.unsqueeze(1))
        assert_close(torch.cat(outputs, 1), y, rtol=0, atol=tolerance)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 200),
    before=st.integers(0, 90),
    after=st.integers(0, 90),
    masked=st.booleans(),
)
def test_local_attention_is_attention_with_a_band_for_a_mask(batch, heads, length, before, after, masked):
    query, key, value = (noise(batch, heads, length, 3).requires_grad_() for _ in range(3))
    mask = torch.rand(batch, length) < 0.5 if masked else None
    ahead = torch.arange(length) - torch.arange(length)[:, None]
    band = (ahead >= -before) & (ahead <= after)
    visible = band.expand(batch, -1, -1) if mask is None else band & mask[:, None] | (ahead == 0)
    expected = F.scaled_dot_product_attention(query, key, value, visible[:, None])
    y = local_attention(query, key, value, before=before, after=after, mask=mask)
    assert_close(y, expected, rtol=0, atol=1e-12)
    loss_w = noise(*y.shape)
    for one, other in zip(
        torch.autograd.grad((y * loss_w).sum(), (query, key, value)),
        torch.autograd.grad((expected * loss_w).sum(), (query, key, value)),
        strict=True,
    ):
        assert_close(one, other, rtol=0, atol=1e-11)


@causality
@pytest.mark.parametrize("window", [None, 6], ids=["all", "window"])
def test_real_positions_never_see_padding_wherever_it_is(causal, window):
    layer = attention(causal=causal, window=window, positions="rotary")
    mask = torch.rand(3, 30) < 0.6
    mask[2] = False  # nothing real at all
    x = noise(3, 30, D)
    y = layer(x, mask)
    assert y.isfinite().all()
    for padding in (torch.nan, torch.inf, 1e8):
        other = x.masked_fill(~mask.unsqueeze(-1), padding).requires_grad_()
        again = layer(other, mask)
        assert torch.equal(again[mask], y[mask])
        again.square().sum().backward()  # padding with a loss of its own must do no harm either
        assert other.grad.isfinite().all()
        assert (other.grad[~mask] == 0).all()


@causality
@positions
@pytest.mark.parametrize("window", [None, 24], ids=["all", "window"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_memory_is_linear_in_the_length(causal, positions, window, masked):
    """No operation, forwards or backwards, makes L × L numbers, and with a window none makes more than L × K."""
    length = 2048
    layer = attention(causal=causal, window=window, positions=positions, dtype=torch.float32)
    x = noise(2, length, D, dtype=torch.float32).requires_grad_()
    mask = torch.rand(2, length) < 0.7 if masked else None
    with Sizes() as sizes:
        layer(x, mask).sum().backward()
    # queries, keys and values of two sequences; or two blocks of keys and values or a mask for each
    bound = 3 * 2 * length * D if window is None else 2 * length * (BLOCK + 24)
    assert sizes.largest <= bound < length**2 / 8


@causality
def test_a_window_drops_out_in_training_only(causal):
    layer = Attention(D, num_heads=2, causal=causal, window=6, dropout=0.5)
    x = noise(2, 100, D, dtype=torch.float32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@causality
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_windows_under_autocast_stay_near_float32(causal, masked):
    layer = attention(causal=causal, window=9, positions="rotary", dtype=torch.float32)
    x = noise(2, 100, D, dtype=torch.float32).requires_grad_()
    mask = torch.arange(100) < torch.tensor([100, 60])[:, None] if masked else None
    exact = layer(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, mask)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    (exact_grad,) = torch.autograd.grad(exact.square().sum(), x)
    assert (y - exact).norm() < 0.01 * exact.norm()
    assert (grad - exact_grad).norm() < 0.02 * exact_grad.norm()


@pytest.mark.parametrize("window", [0, -3])
def test_an_impossible_window_is_named(window):
    with pytest.raises(OptionError, match=f"window={window}: must be at least 1"):
        Attention(D, num_heads=2, window=window)
