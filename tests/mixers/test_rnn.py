"""LSTM and GRU against their equations, and against PyTorch's own handling of both directions and of padding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.rnn import RNN
from tests.models import randomized

D = 6
N = 5

cells = pytest.mark.parametrize("cell", ["lstm", "gru"])
causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def layer_of(cell, *, causal=True, d_state=N, dtype=torch.float64):
    return randomized(RNN(D, d_state=d_state, cell=cell, causal=causal), 0.3).to(dtype)


def literal_states(rnn, x):
    """h_1 … h_L of one sequence (L, D), by the equations at the head of stu/mixers/rnn.py."""
    weights = dict(rnn.named_parameters())
    size = rnn.hidden_size
    h = c = torch.zeros(size).double()
    states = []
    for x_t in x:
        from_input = weights["weight_ih_l0"] @ x_t + weights["bias_ih_l0"]
        from_state = weights["weight_hh_l0"] @ h + weights["bias_hh_l0"]
        if isinstance(rnn, nn.LSTM):
            i, f, g, o = (from_input + from_state).split(size)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (r, z, n), (r_state, z_state, n_state) = from_input.split(size), from_state.split(size)
            z = (z + z_state).sigmoid()
            h = (1 - z) * (n + (r + r_state).sigmoid() * n_state).tanh() + z * h
        states.append(h)
    return torch.stack(states)


@cells
@causality
@pytest.mark.parametrize("d_state", [N, D], ids=["projected", "plain"])
@torch.no_grad()
def test_rnn_is_its_equations(cell, causal, d_state):
    """Over the real positions of each sequence, wherever they are."""
    layer = layer_of(cell, causal=causal, d_state=d_state)
    x, mask = noise(3, 9, D), torch.ones(3, 9, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, :2], mask[1, 5] = False, False
    y = layer(x, mask)
    for row in range(3):
        real = x[row][mask[row]]
        expected = layer.project_out(literal_states(layer.rnn, real))
        if not causal:
            expected = expected + layer.reverse.project_out(literal_states(layer.reverse.rnn, real.flip(0))).flip(0)
        assert_close(y[row][mask[row]], expected, rtol=0, atol=1e-12)
    assert_close(layer(x)[2], y[2], rtol=0, atol=1e-12)


@cells
def test_both_directions_are_those_of_pytorch(cell):
    """PyTorch gives both directions side by side, and packs sequences of several lengths."""
    layer = layer_of(cell, causal=False, d_state=D)
    both = (nn.LSTM if cell == "lstm" else nn.GRU)(D, D, batch_first=True, bidirectional=True).double()
    weights = dict(layer.rnn.state_dict())
    weights |= {f"{name}_reverse": value for name, value in layer.reverse.rnn.state_dict().items()}
    both.load_state_dict(weights)
    lengths = torch.tensor([12, 7, 1])
    mask = torch.arange(12) < lengths[:, None]
    x = noise(3, 12, D)
    packed, _ = both(pack_padded_sequence(x, lengths, batch_first=True))
    expected, _ = pad_packed_sequence(packed, batch_first=True)
    assert_close(layer(x, mask)[mask], expected.unflatten(-1, (2, D)).sum(-2)[mask], rtol=0, atol=1e-12)


@cells
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_forward_step_and_prefill_agree_where_the_state_is_projected(cell, dtype, tolerance):
    layer = layer_of(cell, dtype=dtype)
    x = noise(2, 20, D, dtype=dtype)
    y = layer(x)
    for cut in (0, 1, 13):
        prefix, state = layer.prefill(x[:, :cut]) if cut else (y[:, :0], layer.initial_state(2))
        outputs = [prefix]
        for t in range(cut, 20):
            y_t, state = layer.step(x[:, t], state)
            outputs.append(y_t.unsqueeze(1))
        assert_close(torch.cat(outputs, 1), y, rtol=0, atol=tolerance)
        assert state.hidden.shape == (2, N)
        assert (state.cell is None) == (cell == "gru")


@cells
@causality
def test_low_precision_never_reaches_the_recurrence(cell, causal):
    layer = layer_of(cell, causal=causal, d_state=D, dtype=torch.float32)  # nothing but the recurrence
    x = noise(2, 200, D, dtype=torch.float32).requires_grad_()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, exact)
    halved, rounded = copy.deepcopy(layer).bfloat16(), x.detach().bfloat16()
    y = halved(rounded)
    exact = halved.float()(rounded.float())
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 2**-7 * exact.norm()  # outputs are rounded, and no state
    y, state = layer.bfloat16().prefill(rounded) if causal else (y, None)
    assert state is None or state.hidden.dtype == torch.float32


@cells
def test_an_empty_batch_of_padded_sequences_has_a_state(cell):
    layer = layer_of(cell)
    y, state = layer.prefill(noise(0, 4, D), torch.ones(0, 4, dtype=torch.bool))
    assert y.shape == (0, 4, D)
    assert state.hidden.shape == (0, N)


def test_the_lstm_begins_by_remembering():
    layer = RNN(D, d_state=N, cell="lstm")
    weights = layer.rnn.state_dict()
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    assert (bias[N : 2 * N] == 1).all()  # the gates are i, f, g, o
    others = torch.cat((bias[:N], bias[2 * N :]))
    assert others.abs().max() <= 2 * N**-0.5
    assert (others != 0).all()


def test_a_layer_stores_its_network_and_a_projection_where_the_sizes_differ():
    names = {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"}
    assert set(RNN(D, d_state=D, cell="lstm").state_dict()) == names
    assert set(RNN(D, d_state=N, cell="lstm").state_dict()) == names | {"project_out.weight", "project_out.bias"}
    assert set(RNN(D, d_state=D, cell="lstm", causal=False).state_dict()) == names | {
        f"reverse.{name}" for name in names
    }


@pytest.mark.parametrize(
    ("options", "name"), [({"d_state": 0}, "d_state"), ({"cell": "rnn"}, "cell"), ({"d_model": 0}, "d_model")]
)
def test_rnn_names_impossible_options(options, name):
    with pytest.raises(OptionError) as caught:
        RNN(**{"d_model": D, "d_state": N, "cell": "gru"} | options)
    assert caught.value.name == name
