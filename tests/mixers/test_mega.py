"""Mega against its equations; moving averages, biases, chunks, and states."""

import math
import re

import pytest
import torch
from torch.testing import assert_close

from experiments.speed.literal import LiteralMega
from stu.errors import OptionError
from stu.mixers.mega import Mega
from stu.ops import biased_attention as module
from stu.ops.biased_attention import laplace, toeplitz
from stu.ops.ema import ema_kernel, ema_kernel_reference
from tests.models import randomized

D = 6


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def built(*, seq_len=24, **options):
    return randomized(Mega(D, **{"seq_len": seq_len, "d_state": 3, "d_query": 4} | options), 0.3).double().eval()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize("attention", ["softmax", "laplace"])
@pytest.mark.parametrize("relative_bias", ["simple", "rotary", "none"])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, None), (13, None), (24, None), (24, 8), (5, 5)])
def test_mega_is_its_equations(length, chunk_size, relative_bias, attention, causal, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES_ON_CPU", 7 * length)  # a few queries at a time
    options = {"attention": attention, "relative_bias": relative_bias, "chunk_size": chunk_size}
    layer = built(causal=causal, **options)
    x = noise(2, length, D).requires_grad_()
    found, expected = layer(x), LiteralMega(layer, length)(x)
    assert_close(found, expected, rtol=0, atol=1e-11)
    weight, inputs = torch.randn_like(x), [x, *layer.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum(), inputs, materialize_grads=True) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}, {"attention": "laplace", "chunk_size": 5}], ids=str)
def test_a_sequence_in_padding_is_as_alone(options, causal):
    layer, x = built(causal=causal, **options), noise(3, 17, D)
    mask = torch.zeros(3, 17, dtype=torch.bool)
    mask[0, 5:], mask[1, 2:9], mask[2] = True, True, True
    y = layer(x, mask)
    for row, (start, stop) in enumerate(((5, 17), (2, 9), (0, 17))):
        assert_close(y[row, start:stop], layer(x[row : row + 1, start:stop])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["softmax", "laplace"])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
def test_chunks_cut_anywhere_in_ragged_pieces(chunk_size, attention):
    """Prefixes, pieces and steps of sequences of different lengths: each in its own chunks."""
    layer, x = built(chunk_size=chunk_size, attention=attention), noise(3, 30, D)
    expected = layer(x)
    starts = torch.tensor([9, 4, 0])
    first = torch.arange(9) < starts.unsqueeze(1)
    y, state = layer.prefill(x[:, :9], first)
    assert_close(y[first], expected[:, :9][first], rtol=0, atol=1e-11)
    rest = [torch.cat((x[row, start:], noise(9, D)))[:21] for row, start in enumerate(starts)]
    rest = torch.stack(rest)
    wanted = [layer(torch.cat((x[row, :start], rest[row])).unsqueeze(0))[0, start:] for row, start in enumerate(starts)]
    state = layer.reserve(state, 30)
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 18), (18, 21)):
        if stop - start == 1:
            y, state = layer.step_(rest[:, start], state)
            y = y.unsqueeze(1)
        else:
            y, state = layer.prefill(rest[:, start:stop], state=state)
        assert_close(y, torch.stack(wanted)[:, start:stop], rtol=0, atol=1e-11)
    assert state.keys.shape[1] <= chunk_size


def test_a_state_with_chunks_does_not_grow():
    layer = built(chunk_size=5)
    _, state = layer.prefill(noise(2, 23, D))
    assert [tuple(part.shape) for part in state[:3]] == [(2, D, 3), (2, 5, 4), (2, 5, 2 * D)]
    assert state.position == 23
    for _ in range(8):
        _, state = layer.step(noise(2, D), state)
    assert state.keys.shape[1] == 5


@pytest.mark.parametrize("length", [1, 2, 7, 16, 65, 300])
def test_the_kernel_is_a_sum_of_powers(length):
    decay, inputs, outputs = torch.rand(2, 3, 4, dtype=torch.float64), noise(2, 3, 4), noise(2, 3, 4)
    found = ema_kernel(decay.log(), inputs, outputs, length)
    assert_close(found, ema_kernel_reference(decay, inputs, outputs, length), rtol=0, atol=1e-12)


def test_averages_that_forget_at_once_or_never_stay_finite():
    for alpha, delta in ((80.0, 80.0), (80.0, -800.0), (-800.0, 0.0)):
        layer = built()
        torch.nn.init.constant_(layer.alpha, alpha)
        torch.nn.init.constant_(layer.delta, delta)
        y = layer(noise(1, 24, D))
        y.square().sum().backward()
        assert y.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
        stepped, state = [], layer.initial_state(1)
        for x_t in (x := noise(1, 24, D)).unbind(1):
            y_t, state = layer.step(x_t, state)
            stepped.append(y_t)
        assert_close(torch.stack(stepped, 1), layer(x), rtol=0, atol=1e-9)


def test_the_laplace_function_touches_the_squared_relu():
    """Both have the same value and slope at √(1/2): so the paper chooses the mean and the deviation."""
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    expected = (1 + torch.erf((x - math.sqrt(0.5)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2)))) / 2
    assert_close(laplace(x), expected)
    x = torch.tensor(math.sqrt(0.5), dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(y := laplace(x), x)
    assert_close(torch.stack((y, slope)), torch.stack((x**2, 2 * x)))


def test_a_matrix_of_distances():
    matrix = toeplitz(torch.arange(-2, 5), 5)  # of the last 3 of 5 positions
    assert matrix.tolist() == [[t - s for s in range(5)] for t in range(2, 5)]


def test_mega_begins_as_in_the_official_code():
    layer = Mega(64, seq_len=10, causal=False, d_state=4)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
        **dict.fromkeys(("alpha", "delta", "beta", "eta"), (2, 64, 4)),
        "omega": (64,),
        "kappa": (2, 64),
        "mu": (2, 64),
        "project_value.weight": (128, 64),
        "project_value.bias": (128,),
        "project_average.weight": (64 + 64 + 128 + 64, 64),
        "project_average.bias": (64 + 64 + 128 + 64,),
        "project_out.weight": (64, 128),
        "project_out.bias": (64,),
        "bias.weight": (19,),
    }
    assert layer.alpha.std().item() == pytest.approx(0.2, rel=0.2)
    assert layer.beta.mean((0, 1)).tolist() == pytest.approx([1, -1, 1, -1], abs=0.01)
    assert layer.project_out.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not layer.mu.any()


def test_biases_of_any_length_take_inputs_of_any_length():
    for options in ({"relative_bias": "rotary"}, {"relative_bias": "none"}, {"chunk_size": 8}):
        assert built(seq_len=4, **options)(noise(1, 50, D)).shape == (1, 50, D)
    layer = built(seq_len=4)
    _, state = layer.prefill(noise(1, 4, D))
    for call in (lambda: layer.step(noise(1, D), state), lambda: layer.prefill(noise(1, 2, D), state=state)):
        with pytest.raises(OptionError, match="seq_len=4: is below the input's"):
            call()


def test_dropout_is_for_training():
    layer, x = built(dropout=0.5), noise(1, 9, D)
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"d_model": 0}, "d_model=0: must be at least 1"),
        ({"d_state": 0}, "d_state=0: must be at least 1"),
        ({"d_query": 0}, "d_query=0: must be at least 1"),
        ({"expand": 0.0}, "expand=0.0: must be above 0 and finite"),
        ({"expand": math.inf}, "expand=inf: must be above 0 and finite"),
        ({"attention": "relu"}, "attention=relu: must be softmax or laplace"),
        ({"relative_bias": "alibi"}, "relative_bias=alibi: must be simple, rotary or none"),
        ({"relative_bias": "rotary", "d_query": 3}, "d_query=3: must be even"),
        ({"chunk_size": 0}, "chunk_size=0: must be at least 1, or null"),
        ({"seq_len": 0}, "seq_len=0: must be given for relative_bias=simple"),
        ({"dropout": 1.0}, "dropout=1.0: must be in [0, 1)"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, line):
    with pytest.raises(OptionError, match=re.escape(line)):
        Mega(**{"d_model": D, "seq_len": 4} | options)
