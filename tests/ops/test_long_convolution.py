"""`long_convolution` against its reference, the sum written out, golden kernels, and under torch.compile."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import next_fast_len
from torch.testing import assert_close

from stu.ops import long_convolution as module
from stu.ops.long_convolution import fft_length, long_convolution, long_convolution_reference
from tests.golden import cases
from tests.ops.test_convolution import assert_same

# (steps, taps, taps of the reverse kernel): one step, as long as the input, FIR, longer than the input
SHAPES = [
    (1, 1, None),
    (1, 1, 1),
    (2, 2, 1),
    (7, 7, 7),
    (7, 7, 6),
    (16, 3, None),
    (16, 1, 15),
    (17, 40, 40),
    (33, 5, 60),
]
shapes = pytest.mark.parametrize(("length", "taps", "ahead"), SHAPES)


def problem(length, taps, ahead=None, *, batch=2, width=3, dtype=torch.float64):
    """u, kernel and, with `ahead`, a reverse kernel: all arguments of `long_convolution`."""
    sizes = [(batch, length, width), (taps, width)] + ([] if ahead is None else [(ahead, width)])
    return tuple(torch.randn(*size, dtype=dtype, requires_grad=True) for size in sizes)


@shapes
def test_reference_is_the_sum_written_out(length, taps, ahead):
    u, kernel, *reverse = problem(length, taps, ahead)
    y = torch.zeros(2, length, 3, dtype=torch.float64)
    for t in range(length):
        for i in range(min(taps, t + 1)):
            y[:, t] += (kernel[i] * u[:, t - i]).detach()
        for j in range(min(ahead or 0, length - t - 1)):
            y[:, t] += (reverse[0][j] * u[:, t + 1 + j]).detach()
    assert_close(long_convolution_reference(u, kernel, *reverse).detach(), y, rtol=0, atol=1e-12)


@shapes
def test_equals_reference(length, taps, ahead):
    arguments = problem(length, taps, ahead)
    assert_same(long_convolution(*arguments), long_convolution_reference(*arguments), arguments, 1e-11)


@given(
    length=st.integers(1, 70),
    taps=st.integers(1, 90),
    ahead=st.none() | st.integers(1, 90),
    batch=st.integers(1, 5),
    width=st.integers(1, 40),
    chunk=st.integers(1, 5000),
)
def test_equals_reference_whatever_the_sizes(length, taps, ahead, batch, width, chunk):
    arguments = problem(length, taps, ahead, batch=batch, width=width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        assert_same(long_convolution(*arguments), long_convolution_reference(*arguments), arguments, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "taps", "ahead"), [shape for shape in SHAPES if shape[0] <= 7] + [(5, 2, None)])
def test_gradients_of_any_order(length, taps, ahead):
    arguments = problem(length, taps, ahead)
    assert torch.autograd.gradcheck(long_convolution, arguments)
    assert torch.autograd.gradgradcheck(long_convolution, arguments)


def test_an_impulse_in_a_kernel_is_a_shift():
    (u,) = problem(50, 1)[:1]
    for lag in (0, 1, 17, 49):
        impulse = torch.zeros(50, 3, dtype=torch.float64)
        impulse[lag] = 1
        zeros = torch.zeros(2, lag, 3, dtype=torch.float64)
        later = torch.cat((zeros, u[:, : 50 - lag]), 1)
        assert_close(long_convolution(u, impulse), later, rtol=0, atol=1e-12)
        earlier = torch.cat((u[:, lag + 1 :], torch.zeros(2, min(lag + 1, 50), 3, dtype=torch.float64)), 1)
        assert_close(long_convolution(u, torch.zeros_like(impulse), impulse), earlier, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ahead", [None, 9])
def test_nothing_wraps_around(ahead):
    """A large input at either end must not come round to the other, nor the lags of one side to the other side."""
    u, kernel, *reverse = problem(32, 9, ahead)
    y = long_convolution(u, kernel, *reverse)
    for loud, audible in ((31, slice(0, 31 - (ahead or 0))), (0, slice(9, 32))):
        shouted = u.detach().clone()
        shouted[:, loud] = 1e6
        assert_close(long_convolution(shouted, kernel, *reverse)[:, audible], y[:, audible], rtol=0, atol=1e-7)


def test_a_causal_kernel_never_sees_the_future():
    u, kernel = problem(64, 64)
    other = torch.cat((u[:, :30], torch.randn_like(u[:, 30:])), 1)
    first, second = long_convolution(u, kernel), long_convolution(other, kernel)
    assert_close(first[:, :30], second[:, :30], rtol=0, atol=1e-12)
    assert (first - second)[:, 30:].abs().amin((0, 2)).min() > 1e-4


def test_chunks_cover_everything_once():
    u = torch.empty(5, 64, 70)
    for n, chunk in ((128, module.CHUNK), (128, 1), (128, 5000), (1 << 20, 1 << 18)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK", chunk)
            seen = torch.zeros(5, 70)
            for channels, chunks in module._chunks(u, n):
                for rows in chunks:
                    seen[rows, channels] += 1
                    assert seen[rows, channels].numel() <= max(module.CHANNELS, chunk // n)
        assert (seen == 1).all()


@pytest.mark.parametrize("ahead", [None, 19])
def test_takes_arguments_of_any_layout(ahead):
    arguments = problem(19, 19, ahead)
    turned = [v.mT.contiguous().mT for v in arguments]
    assert not any(v.is_contiguous() for v in turned)
    y = long_convolution(*turned)
    assert y.stride() == turned[0].stride()
    assert_same(y, long_convolution(*arguments), arguments, 1e-12)
    long_convolution(*arguments).sum().backward()  # whose gradient has strides of zero
    (expected,) = torch.autograd.grad((long_convolution(*arguments) * torch.ones_like(y)).sum(), arguments[0])
    assert_close(arguments[0].grad, expected, rtol=0, atol=1e-12)


def test_an_empty_batch_has_an_empty_answer():
    u, kernel = problem(8, 8, batch=0)
    y = long_convolution(u, kernel)
    assert y.shape == (0, 8, 3)
    y.sum().backward()
    assert (kernel.grad == 0).all()


@pytest.mark.parametrize("case", cases("s4d", r"(.+?)__bidir__y_linear"))
def test_golden_bidirectional_kernels(case, golden):
    arrays = golden("s4d")
    x, skip = arrays[f"{case}__x"], arrays[f"{case}__D"]
    forward, reverse = arrays[f"{case}__bidir__k"]
    y = long_convolution(x.mT, forward.mT, reverse.mT).mT + skip[:, None] * x
    assert_close(y, arrays[f"{case}__bidir__y_linear"], rtol=0, atol=1e-10)


# --- precision ---


def test_float32_is_as_good_as_float32():
    arguments = problem(1000, 1000, 1000, batch=1)
    exact = long_convolution(*arguments)
    low = [v.detach().float().requires_grad_() for v in arguments]
    y = long_convolution(*low)
    assert y.dtype == torch.float32
    assert (y - exact).norm() < 5e-7 * exact.norm()
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), low), torch.autograd.grad(exact.square().sum(), arguments), strict=True
    ):
        assert (one - other).norm() < 1e-6 * other.norm()


@pytest.mark.parametrize("kernel_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_is_transformed_in_float32(kernel_dtype):
    u, kernel = problem(200, 200, dtype=torch.float32)
    low, low_kernel = (v.detach().to(d).requires_grad_() for v, d in ((u, torch.bfloat16), (kernel, kernel_dtype)))
    wide, wide_kernel = (v.detach().float().requires_grad_() for v in (low, low_kernel))
    y, exact = long_convolution(low, low_kernel), long_convolution(wide, wide_kernel)
    assert torch.equal(y, exact.bfloat16())
    loss_w = torch.randn_like(exact).bfloat16()
    grads = torch.autograd.grad((y * loss_w).sum(), (low, low_kernel))
    exact_grads = torch.autograd.grad((exact * loss_w.float()).sum(), (wide, wide_kernel))
    for grad, exact_grad, dtype in zip(grads, exact_grads, (torch.bfloat16, kernel_dtype), strict=True):
        assert grad.dtype == dtype
        assert torch.equal(grad, exact_grad.to(dtype))


def test_the_wider_dtype_decides():
    u, kernel = problem(50, 50)
    low = u.detach().float().requires_grad_()
    y, exact = long_convolution(low, kernel), long_convolution(low.double(), kernel)
    assert torch.equal(y, exact.float())
    loss_w = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * loss_w).sum(), kernel)
    assert_close(grad, torch.autograd.grad((exact * loss_w).sum(), kernel)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_changes_nothing(dtype):
    arguments = problem(100, 100, 50, dtype=dtype)
    outside = long_convolution(*arguments)
    grads = torch.autograd.grad(outside.square().sum(), arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = long_convolution(*arguments)
        inside_grads = torch.autograd.grad(inside.square().sum(), arguments)
    for inner, outer in zip((inside, *inside_grads), (outside, *grads), strict=True):
        assert torch.equal(inner, outer)


# --- cost ---


def test_nothing_but_the_arguments_is_kept_for_the_gradient():
    u, kernel = problem(100, 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        long_convolution(u, kernel)
    assert {v.untyped_storage().data_ptr() for v in kept} == {v.untyped_storage().data_ptr() for v in (u, kernel)}


@given(st.integers(1, 1 << 20))
def test_fft_lengths_are_long_enough_and_fast(least):
    n = fft_length(least)
    assert n >= least
    assert n % 16 == 0
    assert next_fast_len(n, real=True) == n
    assert n <= max(16, 1.25 * least + 16)


# --- torch.compile ---


def test_compiled_in_one_graph():
    def loss(*arguments):
        return long_convolution(*arguments).sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for length in (5, 9):
        arguments = problem(length, length, 4)
        eager, fast = loss(*arguments), compiled(*arguments)
        assert_close(fast, eager, rtol=1e-12, atol=0)
        for one, other in zip(torch.autograd.grad(fast, arguments), torch.autograd.grad(eager, arguments), strict=True):
            assert_close(one, other, rtol=0, atol=1e-12)
