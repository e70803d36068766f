"""`linear_recurrence` against its reference and against the recurrence written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from stu.errors import OptionError
from stu.ops import forms, recurrence
from stu.ops.recurrence import choose_block, fixed_recurrence, linear_recurrence, linear_recurrence_reference

BLOCK = 5


@pytest.fixture(autouse=True, scope="module", params=["cpu", "cuda"])
def _blocks(request):
    """The algorithms of both kinds of devices, and short blocks, so that short sequences have many."""
    with pytest.MonkeyPatch.context() as patch, forms.taken_for(request.param):
        patch.setattr(recurrence, "choose_block", lambda *_: BLOCK)
        yield


def problem(length, order, *, batch=2, width=3, initial=False, radius=0.9, dtype=torch.float64):
    drive = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(order, width, width, dtype=torch.float64)
    weight *= radius / torch.linalg.matrix_norm(weight, ord=2).sum()  # stable
    start = torch.randn(batch, order, width, dtype=dtype, requires_grad=True) if initial else None
    return drive, weight.to(dtype).requires_grad_(), start


def assert_same(first, second, inputs, atol):
    """The same outputs, and the same gradients of a random linear loss."""
    assert_close(first, second, rtol=0, atol=atol)
    loss_w = torch.randn_like(first)
    for one, other in zip(
        torch.autograd.grad((first * loss_w).sum(), inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((second * loss_w).sum(), inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert_close(one, other, rtol=0, atol=atol)


def test_reference_is_the_recurrence_written_out():
    drive, weight, initial = problem(9, 3, initial=True)
    past = {-1 - i: initial[:, i] for i in range(3)}  # newest first
    for t in range(9):
        past[t] = drive[:, t] + sum(past[t - i] @ weight[i - 1] for i in (1, 2, 3))
    expected = torch.stack([past[t] for t in range(9)], 1)
    assert_close(linear_recurrence_reference(drive, weight, initial), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "length", [1, 2, 3, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 67, 128]
)
def test_equals_reference(length, order, initial):
    drive, weight, start = problem(length, order, initial=initial)
    inputs = (drive, weight) if start is None else (drive, weight, start)
    fast = linear_recurrence(drive, weight, start)
    assert_same(fast, linear_recurrence_reference(drive, weight, start), inputs, 1e-10)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    width=st.integers(1, 5),
    order=st.integers(1, BLOCK + 3),
    initial=st.booleans(),
    radius=st.sampled_from([0.0, 0.5, 1.0, 1.2]),
)
def test_equals_reference_at_any_shape(batch, length, width, order, initial, radius):
    drive, weight, start = problem(length, order, batch=batch, width=width, initial=initial, radius=radius)
    expected = linear_recurrence_reference(drive, weight, start)
    assert_close(linear_recurrence(drive, weight, start), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
def test_blocks_do_not_change_the_result(block, monkeypatch):
    drive, weight, start = problem(50, 2, initial=True)
    whole = linear_recurrence(drive, weight, start)
    monkeypatch.setattr(recurrence, "choose_block", lambda *_: block)
    assert_same(linear_recurrence(drive, weight, start), whole, (drive, weight, start), 1e-11)


def test_goes_on_from_what_came_before():
    drive, weight, _ = problem(60, 3)
    whole = linear_recurrence(drive, weight)
    for cut in (3, 16, 29, 59):
        initial = whole[:, cut - 3 : cut].flip(1)
        rest = linear_recurrence(drive[:, cut:], weight, initial)
        assert_close(rest, whole[:, cut:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("length", [1, 2, 6, 7, 20])
def test_a_fixed_recurrence_is_one_with_an_identity(length, stride):
    drive, initial = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(2, stride, 3, dtype=torch.float64)
    weight = torch.zeros(stride, 3, 3, dtype=torch.float64)
    weight[-1:] = torch.eye(3)
    expected = linear_recurrence_reference(drive, weight, initial) if stride else drive
    assert_close(fixed_recurrence(drive, initial), expected, rtol=0, atol=1e-13)
    found = fixed_recurrence(drive.float(), initial)
    assert found.dtype == (torch.float64 if stride else torch.float32)
    assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_weights_of_zero_give_back_the_drive_and_have_a_gradient():
    drive, weight, _ = problem(40, 2)
    weight = torch.zeros_like(weight, requires_grad=True)
    y = linear_recurrence(drive, weight)
    assert torch.equal(y, drive)
    y.sum().backward()
    expected = torch.stack([drive[:, :-lag].sum((0, 1)) for lag in (1, 2)])  # Σ_t y_{t−i}, the same for every output
    assert_close(weight.grad, expected.unsqueeze(-1).expand(-1, -1, 3).detach(), rtol=0, atol=1e-12)


def test_gradcheck():
    drive, weight, start = problem(BLOCK + 2, 2, batch=1, width=2, initial=True)
    assert torch.autograd.gradcheck(linear_recurrence, (drive, weight, start))


def test_float32_is_as_good_as_float32():
    drive, weight, _ = problem(500, 2, width=8)
    exact = linear_recurrence_reference(drive, weight)
    y = linear_recurrence(drive.float(), weight.float())
    assert y.dtype == torch.float32
    assert (y - exact).norm() < 1e-6 * exact.norm()


def marginal(length, dtype):
    """y_t = w_t + y_{t−2} Q with an orthogonal Q of eigenvalues ±1: no error ever decays."""
    q, _ = torch.linalg.qr(torch.randn(8, 8))
    weight = torch.stack((torch.zeros(8, 8), q @ torch.diag(torch.tensor([1.0, -1] * 4)) @ q.T)).requires_grad_()
    return torch.randn(2, length, 8).to(dtype).requires_grad_(), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_does_not_reach_into_the_recurrence(dtype):
    drive, weight = marginal(1000, dtype)
    exact = linear_recurrence(drive.detach().float(), weight)
    (exact_grad,) = torch.autograd.grad(exact.sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_recurrence(drive, weight)
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert_close(grad, exact_grad, rtol=1e-4, atol=1e-4 * exact_grad.abs().max().item())


def test_block_lengths_balance_product_and_seam():
    """T = √(seam flops / 2BD²) within its bounds: long blocks for narrow problems."""
    chosen = [choose_block(batch, 99, width, "sequential") for batch, width in ((8, 128), (1, 64), (1, 16), (1, 4))]
    assert chosen == [4, 9, 37, 64]
    assert [choose_block(8, length, 128, "doubling") for length in (1, 100, 1024, 16383, 16384)] == [4, 4, 16, 64, 64]


def test_blocks_are_no_longer_than_there_is_memory_for():
    drive, weight = torch.empty(1, 131072, 128, device="meta"), torch.empty(2, 128, 128, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "choose_block", choose_block)
        for size in (1 << 26, 1 << 30):
            with forms.device_memory(size):
                block, steps = recurrence._division(drive, weight, "doubling")
            assert size / 16 < 4 * 4 * (block * 128) ** 2 <= size
            assert block * steps >= 131072


@pytest.mark.parametrize("length", [1, 2, 3, 39, 40, 41, 300])
@pytest.mark.parametrize("order", [1, 2, 7])
def test_the_algorithms_agree(length, order):
    drive, weight, start = problem(length, order, initial=True)
    one, other = (linear_recurrence(drive, weight, start, algorithm=name) for name in ("sequential", "doubling"))
    assert_same(one, other, (drive, weight, start), 1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_poles_on_the_unit_circle_lose_no_more_than_step_by_step(order):
    """16,384 steps in float32 without decay; the error of either algorithm is that of a loop in float32 or below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "choose_block", choose_block)
        drive, weight = torch.randn(2, 16384, 8), torch.zeros(order, 8, 8)
        weight[-1] = torch.linalg.qr(torch.randn(8, 8)).Q
        exact = linear_recurrence_reference(drive.double(), weight.double())
        error = (linear_recurrence(drive, weight) - exact).abs().max() / exact.abs().max()
        assert error < 1e-5


def test_an_unknown_algorithm_is_named():
    drive, weight, _ = problem(3, 1)
    with pytest.raises(OptionError, match=r"algorithm.*must be one of auto, sequential, doubling"):
        linear_recurrence(drive, weight, algorithm="loop")


@pytest.mark.slow
def test_compiles_into_one_graph():
    drive, weight, start = problem(30, 2, initial=True)

    def loss(drive, weight, start):
        return linear_recurrence(2 * drive, weight, start).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    inputs = (drive, weight, start)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for one, other in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-10)
