"""`filter_convolution` against its reference and against the sum written out."""

import pytest
import torch
from torch.testing import assert_close

from stu.errors import OptionError
from stu.ops import convolution, dense_transfer, forms
from stu.ops.bank import FilterBank
from stu.ops.convolution import choose_algorithm, filter_convolution, filter_convolution_reference
from stu.ops.forms import chunks

lengths = pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 31, 64, 100])


algorithms = pytest.mark.parametrize("algorithm", ["transfer", "features", "dense"])


def problem(length, *, batch=2, filters=3, width=4, out=5, built=None, dtype=torch.float64):
    u = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    bank = torch.randn(built or length, filters, dtype=dtype)
    weight = torch.randn(filters, width, out, dtype=dtype, requires_grad=True)
    return u, bank, weight


def assert_same(first, second, inputs, atol):
    """The same outputs, and the same gradients of a random linear loss."""
    assert_close(first, second, rtol=0, atol=atol)
    loss_w = torch.randn_like(first)
    for one, other in zip(
        torch.autograd.grad((first * loss_w).sum(), inputs),
        torch.autograd.grad((second * loss_w).sum(), inputs),
        strict=True,
    ):
        assert_close(one, other, rtol=0, atol=atol)


def test_reference_is_the_sum_written_out():
    u, bank, weight = problem(6, built=8)
    y = torch.zeros(2, 6, 5, dtype=torch.float64)
    for t in range(6):
        for i in range(t + 1):
            for k in range(3):
                y[:, t] += bank[i, k] * (u[:, t - i] @ weight[k]).detach()
    assert_close(filter_convolution_reference(u, bank, weight).detach(), y, rtol=0, atol=1e-12)


@lengths
@algorithms
def test_equals_reference(length, algorithm):
    u, bank, weight = problem(length)
    fast = filter_convolution(u, bank, weight, algorithm=algorithm)
    assert_same(fast, filter_convolution_reference(u, bank, weight), (u, weight), 1e-10)


@algorithms
@pytest.mark.parametrize(("width", "out"), [(1, 1), (1, 6), (6, 1), (7, 3)])
def test_equals_reference_at_other_widths(width, out, algorithm):
    u, bank, weight = problem(23, batch=1, width=width, out=out, built=40)
    fast = filter_convolution(u, bank, weight, algorithm=algorithm)
    assert_same(fast, filter_convolution_reference(u, bank, weight), (u, weight), 1e-10)


@lengths
@algorithms
def test_input_shorter_than_the_filters(length, algorithm):
    u, bank, weight = problem(length, built=127)
    shorter = filter_convolution(u, bank, weight, algorithm=algorithm)
    assert_same(shorter, filter_convolution_reference(u, bank, weight), (u, weight), 1e-10)
    longer = torch.cat((u, torch.randn(2, 127 - length, 4, dtype=torch.float64)), 1)
    assert_close(filter_convolution(longer, bank, weight)[:, :length], shorter, rtol=0, atol=1e-10)


def test_nothing_wraps_around():
    """The last input, large, must not come round to the first output."""
    u, bank, weight = problem(32)
    loud = torch.cat((u[:, :-1], 1e6 * torch.ones_like(u[:, :1])), 1)
    quiet = filter_convolution(u, bank, weight)
    assert_close(filter_convolution(loud, bank, weight)[:, :-1], quiet[:, :-1], rtol=0, atol=1e-7)


@algorithms
@pytest.mark.parametrize("numbers", [1, 61, 10_000])
def test_chunks_do_not_change_the_result(numbers, algorithm, monkeypatch):
    u, bank, weight = problem(40)
    whole = filter_convolution(u, bank, weight, algorithm=algorithm)
    monkeypatch.setattr(convolution, "PRODUCT_CHUNK", numbers)
    monkeypatch.setattr(convolution, "SIGNAL_CHUNK", numbers)
    with forms.device_memory(8 * numbers):
        assert_same(filter_convolution(u, bank, weight, algorithm=algorithm), whole, (u, weight), 1e-12)


def test_a_dense_transfer_function_takes_no_more_memory_than_allowed(monkeypatch):
    """Of H, as real and imaginary parts and as complex numbers, in as few pieces as there is memory for."""
    pieces = []
    monkeypatch.setattr(dense_transfer, "chunks", lambda *given: pieces.append(chunks(*given)) or pieces[-1])
    u, bank, weight = problem(1000, width=8, out=8, dtype=torch.float32)
    whole = filter_convolution(u, bank, weight, algorithm="dense")
    with forms.taken_for("cuda"), forms.device_memory(1 << 18):
        assert_same(filter_convolution(u, bank, weight), whole, (u, weight), 1e-3)
    frequencies = [[f.stop - f.start for f in slices] for slices in pieces if slices[-1].stop == 1001]
    assert frequencies == [[1001], [256, 256, 256, 233], [256, 256, 256, 233], [256, 256, 256, 233]]


def test_chunks_cover_everything_within_the_budget():
    slices = chunks(41, 20, 61)
    assert [i for f in slices for i in range(41)[f]] == list(range(41))
    assert [f.stop - f.start for f in slices] == [3] * 13 + [2]
    assert chunks(5, 100, 61) == [slice(i, i + 1) for i in range(5)]


@algorithms
@pytest.mark.parametrize("two_way", [False, True])
def test_gradcheck(two_way, algorithm):
    u, bank, weight = problem(5, width=2, out=3)
    matrices = (weight, torch.randn_like(weight).requires_grad_()) if two_way else (weight,)
    assert torch.autograd.gradcheck(lambda a, *m: filter_convolution(a, bank, *m, algorithm=algorithm), (u, *matrices))


@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_one_gradient_alone(wanted):
    u, bank, weight = problem(19)
    loss_w = torch.randn(2, 19, 5, dtype=torch.float64)
    both = torch.autograd.grad((filter_convolution(u, bank, weight) * loss_w).sum(), (u, weight))
    given = (u, weight.detach()) if wanted == "input" else (u.detach(), weight)
    (filter_convolution(given[0], bank, given[1]) * loss_w).sum().backward()
    assert_close((u if wanted == "input" else weight).grad, both[wanted == "weight"], rtol=0, atol=0)
    assert (weight if wanted == "input" else u).grad is None


def test_takes_arguments_of_any_layout():
    u, bank, weight = problem(19)
    turned = u.transpose(1, 2).contiguous().transpose(1, 2), bank, weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned[0].is_contiguous()
    assert not turned[2].is_contiguous()
    assert_same(filter_convolution(turned[0], bank, turned[2]), filter_convolution(u, bank, weight), (u, weight), 1e-12)


def test_float32_is_as_good_as_float32():
    u, bank, weight = problem(1000, batch=1, width=8, out=8)
    exact = filter_convolution(u, bank, weight)
    y = filter_convolution(u.float(), bank, weight.float())
    assert y.dtype == torch.float32
    assert (y - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_input_is_transformed_in_float32(weight_dtype):
    u, bank, weight = problem(200, dtype=torch.float32)
    low, low_weight = (v.detach().to(d).requires_grad_() for v, d in ((u, torch.bfloat16), (weight, weight_dtype)))
    wide, wide_weight = (v.detach().float().requires_grad_() for v in (low, low_weight))
    y = filter_convolution(low, bank, low_weight)
    exact = filter_convolution(wide, bank, wide_weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    grads = torch.autograd.grad(y.float().sum(), (low, low_weight))
    exact_grads = torch.autograd.grad(exact.sum(), (wide, wide_weight))
    for grad, exact_grad, dtype in zip(grads, exact_grads, (torch.bfloat16, weight_dtype), strict=True):
        assert grad.dtype == dtype
        assert_close(grad.float(), exact_grad, rtol=1e-4 if dtype == torch.float32 else 2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype):
    u, bank, weight = problem(100, dtype=dtype)
    outside = filter_convolution(u, bank, weight)
    grads = torch.autograd.grad(outside.square().sum(), (u, weight))
    with torch.autocast("cpu", torch.bfloat16):
        inside = filter_convolution(u, bank, weight)
        inside_grads = torch.autograd.grad(inside.square().sum(), (u, weight))
    assert torch.equal(inside, outside)
    for inner, outer in zip(inside_grads, grads, strict=True):
        assert_close(inner, outer, rtol=1e-4, atol=1e-3)


@lengths
@algorithms
@pytest.mark.parametrize("built", [None, 127])
def test_reverse_matrices_run_from_the_end(length, built, algorithm):
    u, bank, weight = problem(length, built=built)
    reverse = torch.randn_like(weight).requires_grad_()
    both = filter_convolution(u, bank, weight, reverse, algorithm=algorithm)
    forward = filter_convolution_reference(u, bank, weight)
    backward = filter_convolution_reference(u.flip(1), bank, reverse).flip(1)
    assert_same(both, forward + backward, (u, weight, reverse), 1e-10)


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize(
    ("batch", "width", "expected"), [(1, 24, "dense"), (1, 25, None), (2, 48, None), (4, 48, "dense"), (4, 49, None)]
)
def test_auto_is_one_of_the_algorithms(batch, width, expected, two_way):
    u, bank, weight = problem(9, batch=batch, filters=27, width=width, out=width)
    reverse = torch.randn_like(weight) if two_way else None
    chosen = choose_algorithm(u, weight, two_way=two_way)
    assert chosen == (expected or ("features" if (batch, two_way) == (1, False) else "transfer"))
    assert torch.equal(
        filter_convolution(u, bank, weight, reverse), filter_convolution(u, bank, weight, reverse, algorithm=chosen)
    )
    with forms.taken_for("cuda"):
        assert choose_algorithm(u, weight, two_way=two_way) == "dense"


def test_an_unknown_algorithm_is_named():
    u, bank, weight = problem(3)
    with pytest.raises(OptionError, match="algorithm"):
        filter_convolution(u, bank, weight, algorithm="direct")


@pytest.mark.slow
def test_compiles_into_one_graph():
    u, filters, weight = problem(50)
    bank = FilterBank(filters)

    def loss(u, weight):
        return filter_convolution(2 * u, bank, weight).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(u, weight), (u, weight))
    for one, other in zip(torch.autograd.grad(compiled(u, weight), (u, weight)), expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-10)
