"""Attention against softmax over all pairs, rotary positions, local windows, masks, and cost."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from stu.encoders import RotaryPositions
from stu.errors import OptionError
from stu.mixers.attention import Attention
from stu.ops import attention as module
from stu.ops.attention import BLOCK, causal_attention, local_attention
from tests.models import randomized
from tests.sizes import Sizes

D = 8

causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
positions = pytest.mark.parametrize("positions", ["none", "rotary"])
rotate = RotaryPositions()


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


@pytest.mark.slow
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


def assert_same(y, expected, inputs):
    """Values and gradients."""
    assert_close(y, expected, rtol=0, atol=1e-12)
    loss_w = noise(*y.shape)
    for one, other in zip(
        torch.autograd.grad((y * loss_w).sum(), inputs),
        torch.autograd.grad((expected * loss_w).sum(), inputs),
        strict=True,
    ):
        assert_close(one, other, rtol=0, atol=1e-11)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 200),
    before=st.integers(0, 90),
    after=st.integers(0, 90),
    past=st.integers(0, 90),
    masked=st.booleans(),
)
def test_local_attention_is_attention_with_a_band_for_a_mask(batch, heads, length, before, after, past, masked):
    total = length + min(past, before)
    query, key, value = (noise(batch, heads, n, 3).requires_grad_() for n in (length, total, total))
    mask = torch.rand(batch, total) < 0.5 if masked else None
    ahead = torch.arange(total) - torch.arange(total - length, total)[:, None]
    band = (ahead >= -before) & (ahead <= after)
    visible = band.expand(batch, -1, -1) if mask is None else band & mask[:, None] | (ahead == 0)
    expected = F.scaled_dot_product_attention(query, key, value, visible[:, None])
    y = local_attention(query, key, value, before=before, after=after, mask=mask)
    assert_same(y, expected, (query, key, value))


@pytest.mark.parametrize("entries", [1, 200, 1 << 20])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 12), (7, 1), (13, 20), (16, 16)])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_causal_attention_is_attention_with_a_triangle_for_a_mask(length, past, masked, entries, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES_ON_CPU", entries)
    query, key, value = (noise(2, 3, n, 4).requires_grad_() for n in (length, past + length, past + length))
    mask = torch.rand(2, past + length) < 0.5 if masked else torch.ones(2, past + length, dtype=torch.bool)
    mask[:, past:] = True
    visible = torch.ones(length, past + length, dtype=torch.bool).tril(past) & mask[:, None]
    expected = F.scaled_dot_product_attention(query, key, value, visible[:, None])
    y = causal_attention(query, key, value, mask=mask if masked else None)
    assert_same(y, expected, (query, key, value))


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


@pytest.mark.slow
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


# --- states ---


@positions
@pytest.mark.parametrize("window", [None, 1, 2, 7, 64, 200])
@torch.no_grad()
def test_any_walk_through_the_methods_is_forward(window, positions):
    """Sequences of which each has its own number of inputs; in turn: padded pieces, steps, padded pieces, a piece."""
    layer = attention(window=window, positions=positions)
    state = layer.initial_state(3)
    inputs, outputs = [[], [], []], [[], [], []]
    for turn in range(24):
        x = noise(3, int(torch.randint(1, 90, ())), D)
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        if turn % 4 == 1:
            step = layer.step
            if turn % 8 == 1:
                step, state = layer.step_, layer.reserve(state, x.shape[1])
            steps = []
            for x_t in x.unbind(1):
                y_t, state = step(x_t, state)
                steps.append(y_t)
            y = torch.stack(steps, 1)
        elif turn % 4 == 3:
            y, state = layer.prefill(x, state=state)
        else:
            start, count = (torch.rand(2, 3, 1) * x.shape[1]).long()
            place = torch.arange(x.shape[1])
            mask = (place >= start) & (place < start + count)
            y, state = layer.prefill(x, mask, state)
        for row in range(3):
            inputs[row].append(x[row, mask[row]])
            outputs[row].append(y[row, mask[row]])
    for x, y in zip(inputs, outputs, strict=True):
        assert_close(torch.cat(y), layer(torch.cat(x)[None])[0], rtol=0, atol=1e-10)
    assert state.lengths.tolist() == [sum(map(len, x)) for x in inputs]
    assert state.position == max(state.lengths)


def test_a_step_in_place_copies_no_cache_and_reads_nothing_back():
    layer = attention(dtype=torch.float32)
    state = layer.reserve(layer.prefill(noise(2, 9, D, dtype=torch.float32))[1], 4000)
    with Sizes() as sizes:
        layer.step_(noise(2, D, dtype=torch.float32), state)
    assert sizes.largest < state.keys.numel() / 2
    on_meta = attention(dtype=torch.float32, positions="rotary").to("meta")  # where no number can be read
    state = on_meta.reserve(on_meta.initial_state(2), 3)
    for _ in range(3):
        _, state = on_meta.step_(torch.empty(2, D, device="meta"), state)
    assert state.keys.shape == (2, 2, 3, D // 2)


@pytest.mark.parametrize("window", [None, 20])
def test_steps_in_place_need_room(window):
    layer, x = attention(window=window), noise(2, D)
    _, grown = layer.prefill(noise(2, 5, D))
    state = layer.reserve(grown, 4)
    for _ in range(4):
        _, state = layer.step_(x, state)
    for full, slots in ((state, 9), (grown, 5), (layer.initial_state(2), 0)):
        with pytest.raises(OptionError, match=rf"state=\(2, 2, {slots}, 4\): has no room for one more step; see"):
            layer.step_(x, full)


def test_a_full_window_has_room_for_ever():
    layer, x = attention(window=3), noise(2, 20, D)
    for state in (layer.prefill(x[:, :5])[1], layer.reserve(layer.initial_state(2), 100)):
        assert state.keys.shape[2] == 3
        after = state
        for x_t in x[:, state.position :].unbind(1):
            y, after = layer.step_(x_t, after)
        assert_close(y, layer(x)[:, -1], rtol=0, atol=1e-12)


def test_the_steps_that_a_graph_took_are_counted_again():
    """Replays advance tensors alone."""
    layer, x = attention(), noise(2, 20, D)
    state = layer.reserve(layer.prefill(x[:, :4])[1], 12)
    for x_t in x[:, 4:10].unbind(1):
        layer.step_(x_t, state)
    assert state.position == 4
    y, after = layer.prefill(x[:, 10:], state=state)
    assert_close(y, layer(x)[:, 10:], rtol=0, atol=1e-12)
    assert after.position == 20
    assert layer.reserve(state, 8).keys.shape[2] == 18


@pytest.mark.slow
@positions
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_piece_in_a_window_takes_memory_linear_in_its_length(positions, masked):
    length = 2048
    layer = attention(window=24, positions=positions, dtype=torch.float32)
    x = noise(2, length, D, dtype=torch.float32).requires_grad_()
    mask = torch.arange(length) < torch.tensor([[2000], [77]]) if masked else None
    _, state = layer.prefill(noise(2, 30, D, dtype=torch.float32), torch.ones(2, 30, dtype=torch.bool))
    with Sizes() as sizes:
        layer.prefill(x, mask, state)[0].sum().backward()
    assert sizes.largest <= 2 * length * (BLOCK + 24)


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_a_cache_has_the_dtype_of_its_keys(window):
    layer = attention(window=window, positions="rotary", dtype=torch.float32)
    x = noise(2, 12, D, dtype=torch.float32)
    exact = layer(x)
    outside = layer.reserve(layer.initial_state(2), 12)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer.prefill(x[:, :6])
        assert state.keys.dtype == layer.initial_state(2).values.dtype == torch.bfloat16
    for before in (state, outside):  # steps in another precision are as exact as the state
        after = before
        for x_t in x[:, before.position :].unbind(1):
            y, after = layer.step(x_t, after)
        assert (y.dtype, after.keys.dtype) == (torch.float32, before.keys.dtype)
        tolerance = 1e-5 if before is outside else 0.02
        assert (y - exact[:, -1]).norm() < tolerance * exact[:, -1].norm()


# --- the plain form ---


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


rotate = RotaryPositions()


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
    each = rotate(x, torch.tensor([[0], [3], [70_000]]))
    assert all(torch.equal(each[row], rotate(x[row], start)) for row, start in enumerate((0, 3, 70_000)))
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
    with pytest.raises(OptionError, match="d_model=0"):
        Attention(0)
