"""Systems that are discretised once for many steps: a part of the states of S4, S4D, S5, the LRU and LinOSS."""

import copy

import pytest
import torch
from torch.testing import assert_close

from stu.mixers import LRU, S4, S4D, S5, LinOSS
from tests.models import randomized

D = 4

mixers = pytest.mark.parametrize(
    "build",
    [
        lambda: LRU(D, d_state=8),
        lambda: S5(D, d_state=8, num_blocks=2),
        lambda: S4D(D, d_state=8),
        lambda: S4(D, d_state=8),
        lambda: S4(D, d_state=8, discretization="zoh"),
        lambda: LinOSS(D, d_state=8),
        lambda: LinOSS(D, d_state=8, discretization="imex", damping=True),
    ],
    ids=["lru", "s5", "s4d", "s4", "s4-zoh", "linoss", "d-linoss"],
)


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@mixers
def test_steps_use_the_system_of_their_state(build):
    mixer, x = randomized(build()).double(), noise(2, 9, D)
    expected = mixer(x)
    states = mixer.initial_state(2), mixer.prefill(x[:, :5])[1]
    mixer._system = None  # not called again
    for start, state in zip((0, 5), states, strict=True):
        for t in range(start, 9):
            y_t, state = mixer.step(x[:, t], state)
            assert_close(y_t, expected[:, t], rtol=0, atol=1e-12)


@mixers
def test_steps_after_an_evaluation_have_all_gradients(build):
    mixer, x = randomized(build()).double(), noise(2, 9, D)
    gradients = []
    for made in (torch.no_grad, torch.enable_grad):
        with made():
            state = mixer.initial_state(2)
        outputs = []
        for x_t in x.unbind(1):
            y_t, state = mixer.step(x_t, state)
            outputs.append(y_t)
        gradients.append(torch.autograd.grad(torch.stack(outputs).square().sum(), [*mixer.parameters()]))
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        assert_close(one, other, rtol=1e-10, atol=1e-12)


@mixers
@torch.no_grad()
def test_pieces_in_float32_are_as_good_as_the_whole(build):
    mixer, x = build(), noise(2, 4096, D).float()
    exact, state, pieces = copy.deepcopy(mixer).double()(x.double()), None, []
    for piece in x.split(100, 1):
        y, state = mixer.prefill(piece, state=state)
        pieces.append(y)
    assert (torch.cat(pieces, 1) - exact).norm() < 1e-6 * exact.norm()
