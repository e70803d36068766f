"""Every operator under every transform of PyTorch, compared with the same formula in plain tensor code."""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from stu.ops import (
    convolution,
    delta_rule,
    dense_bilinear,
    kernels,
    long_convolution,
    oscillators,
    power_kernel,
    power_series,
    recurrence,
    scan,
    ssd,
    zoh_kernel,
)
from stu.ops.bank import FilterBank
from stu.ops.flops import fft_flops

L, D = 7, 2
COMPLEX = torch.complex128


class Problem(NamedTuple):
    """An operator, the same in plain tensor code, and inputs with derivatives."""

    operator: Callable
    reference: Callable
    inputs: tuple


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def decays(*shape):
    return torch.polar(0.5 + 0.4 * torch.rand(*shape, dtype=torch.float64), noise(*shape))


def filtered(two_way, algorithm):
    filters = noise(9, 3)
    bank = FilterBank(filters)

    def operator(u, weight, *reverse):
        return convolution.filter_convolution(u, bank, weight, *reverse, algorithm=algorithm)

    def reference(u, weight, *reverse):
        y = convolution.filter_convolution_reference(u, filters, weight)
        for other in reverse:
            y = y + convolution.filter_convolution_reference(u.flip(1), filters, other).flip(1)
        return y

    matrices = (noise(3, D, 3) for _ in range(1 + two_way))
    return Problem(operator, reference, (noise(2, L, D), *matrices))


def long(*kernels):
    return Problem(
        long_convolution.long_convolution, long_convolution.long_convolution_reference, (noise(2, L, D), *kernels)
    )


def recurrent(order, length):
    inputs = noise(2, length, D), 0.4 * noise(order, D, D), noise(2, order, D)
    return Problem(recurrence.linear_recurrence, recurrence.linear_recurrence_reference, inputs)


def scanned(decay, *, reverse):
    inputs = noise(2, L, D, dtype=COMPLEX), decay, noise(2, D, dtype=COMPLEX)
    forms = scan.linear_scan, scan.linear_scan_reference
    return Problem(*(functools.partial(form, reverse=reverse) for form in forms), inputs)


def literal_ssm(u, decay, B, C, initial):
    drive = u.to(B.dtype) @ B.T
    states = scan.linear_scan_reference(drive, decay, initial)
    y = torch.einsum("on,bln->blo", C[0], states).real
    if len(C) == 2:
        y = y + torch.einsum("on,bln->blo", C[1], scan.linear_scan_reference(drive, decay, reverse=True)).real
    return y, states[:, -1]


def diagonal(directions):
    inputs = noise(2, L, D), decays(3), noise(3, D, dtype=COMPLEX), noise(directions, D, 3, dtype=COMPLEX)
    return Problem(scan.diagonal_ssm, literal_ssm, (*inputs, noise(2, 3, dtype=COMPLEX)))


def selective(chunk_size, algorithm="auto"):
    x, dt, A = noise(2, L, 2, 3), torch.rand(2, L, 2, dtype=torch.float64), -torch.rand(2, dtype=torch.float64)
    B, C = noise(2, L, 1, 2), noise(2, L, 1, 2)
    inputs = x, dt, A, B, C, noise(2), noise(2, 2, 2, 3)
    operator = functools.partial(ssd.ssd, chunk_size=chunk_size, algorithm=algorithm)
    return Problem(operator, ssd.ssd_reference, inputs)


def impulse_response():
    def reference(a, b, c):
        return torch.stack([2 * (c * a**step * b).sum(-1).real for step in range(L)], 1)

    operator = functools.partial(kernels.diagonal_kernel, length=L)
    return Problem(operator, reference, (decays(D, 2), noise(D, 2, dtype=COMPLEX), noise(1, D, 2, dtype=COMPLEX)))


def held_kernel():
    def reference(log_dt, log_rate, frequency, B, C, D):
        A = torch.complex(-log_rate.exp(), frequency)
        a = torch.exp(log_dt.exp().unsqueeze(-1) * A)
        b = (a - 1) / A * torch.view_as_complex(B)
        kernel = torch.stack([2 * (torch.view_as_complex(C) * a**step * b).sum(-1).real for step in range(L)], 1)
        return kernel + D * (torch.arange(L) == 0).unsqueeze(-1)

    inputs = noise(D), noise(1, 3), noise(1, 3), noise(1, 3, 2), noise(1, D, 3, 2), noise(D)
    return Problem(functools.partial(zoh_kernel.zoh_kernel, length=L), reference, inputs)


def oscillations():
    def reference(a, delta):
        u = [torch.zeros_like(a), torch.ones_like(a)]
        for _ in range(L - 1):
            u.append((1 + delta - a) * u[-1] - delta * u[-2])
        return torch.stack(u[1:], -1)

    inputs = 0.9 + 0.2 * torch.rand(3, dtype=torch.float64), 0.8 + 0.2 * torch.rand(3, dtype=torch.float64)
    return Problem(functools.partial(oscillators.oscillator_response, length=L), reference, inputs)


def dense_powers(outputs=1):
    def reference(A, B, C, skip):
        kernel = 3 * kernels.kernel_reference(A, B, C, L)
        first = skip * (torch.arange(L) == 0).unsqueeze(-1)
        return torch.cat((kernel[:1] + first, kernel[1:]))

    inputs = 0.4 * noise(D, 3, 3), noise(D, 3), noise(outputs, D, 3), noise(D)
    return Problem(lambda *inputs: power_kernel.power_kernel(*inputs, L, 3.0), reference, inputs)


def bilinear_step():
    def reference(log_dt, log_rate, frequency, P, B):
        rates, frequencies = log_rate.exp().repeat_interleave(2, 1), frequency.repeat_interleave(2, 1)
        rotation = torch.kron(torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double())
        eye = torch.eye(4, dtype=torch.float64)
        modes = rotation * frequencies.unsqueeze(-1) - eye * rates.unsqueeze(-1)
        M = modes - 2 * torch.einsum("rnm,rnk->nmk", P, P)
        dt = log_dt.exp()[:, None, None]
        inverse = torch.linalg.inv(eye - dt / 2 * M)
        return inverse @ (eye + dt / 2 * M) + inverse @ (dt / 2 * B.unsqueeze(-1))

    def operator(*inputs):
        A, half_B = dense_bilinear.dense_bilinear(*inputs)
        return A + half_B.unsqueeze(-1)

    inputs = noise(D), noise(1, 2), noise(1, 2), noise(2, 1, 4), noise(1, 4)
    return Problem(operator, reference, inputs)


def divided(x, series):
    """x/(1 + s), by long division."""
    entries = []
    for n in range(series.shape[1]):
        fed_back = sum(entries[m] * series[:, n - m] for m in range(n))
        entries.append((x[..., n] - fed_back) / (1 + series[:, 0]))
    return torch.stack(entries, -1)


def series():
    return 0.3 * noise(D, L)


PROBLEMS = {
    "filter convolution": lambda: filtered(False, "transfer"),
    "filter convolution by features": lambda: filtered(False, "features"),
    "filter convolution both ways": lambda: filtered(True, "transfer"),
    "filter convolution both ways by features": lambda: filtered(True, "features"),
    "long convolution": lambda: long(noise(L, D)),
    "long convolution both ways": lambda: long(noise(3, D), noise(9, D)),
    "recurrence of order 1": lambda: recurrent(1, 11),
    "recurrence of order 3": lambda: recurrent(3, 7),
    "scan": lambda: scanned(decays(D), reverse=False),
    "scan from the end": lambda: scanned(decays(D), reverse=True),
    "gated scan": lambda: scanned(decays(2, L, D), reverse=False),
    "gated scan from the end": lambda: scanned(decays(2, L, D), reverse=True),
    "diagonal SSM": lambda: diagonal(1),
    "diagonal SSM both ways": lambda: diagonal(2),
    "SSD": lambda: selective(64),
    "SSD in chunks": lambda: selective(3),
    "SSD in chunks at once": lambda: selective(3, "parallel"),
    "diagonal kernel": impulse_response,
    "kernel of a zero-order hold": held_kernel,
    "kernel of dense powers": dense_powers,
    "oscillators": oscillations,
    "step of the bilinear rule": bilinear_step,
    "reciprocal": lambda: Problem(power_series.reciprocal, lambda s: divided(torch.eye(1, L), s), (series(),)),
    "quotient": lambda: Problem(power_series.quotient, divided, (noise(3, D, L), series())),
}
problems = pytest.mark.parametrize("name", PROBLEMS)
pytestmark = [  # of PyTorch itself, in forward mode
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def loss_of(function, weights):
    """A real function that is not linear in the outputs, so that its second derivatives ask for all of the first."""

    def loss(*inputs):
        outputs = function(*inputs)
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((part + w * part.abs().square()).real.sum() for part, w in zip(parts, weights, strict=False))

    return loss


def losses(problem):
    outputs = problem.reference(*problem.inputs)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [noise(*part.shape) for part in parts]
    return loss_of(problem.operator, weights), loss_of(problem.reference, weights)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@problems
def test_function_transforms(name):
    problem = PROBLEMS[name]()
    x = problem.inputs
    every = tuple(range(len(x)))
    tangents = tuple(noise(*each.shape, dtype=each.dtype) for each in x)
    loss, expected = losses(problem)
    assert_same(grad(loss, every)(*x), grad(expected, every)(*x))
    y, push_forward = linearize(problem.operator, *x)
    expected_jvp = jvp(problem.reference, x, tangents)
    assert_same(jvp(problem.operator, x, tangents), expected_jvp)
    assert_same((y, push_forward(*tangents)), expected_jvp)
    y, pull_back = vjp(problem.operator, *x)
    y_expected, pull_back_expected = vjp(problem.reference, *x)
    assert_same(y, y_expected)
    cotangents = torch.utils._pytree.tree_map(torch.randn_like, y)
    assert_same(pull_back(cotangents), pull_back_expected(cotangents))


@problems
def test_jacobians_and_hessians(name):
    problem = PROBLEMS[name]()
    x = problem.inputs
    loss, expected = losses(problem)
    for i, each in enumerate(x):
        if each.is_complex():  # torch.func has real Jacobians only
            continue
        direction = noise(*each.shape)

        def along(function, i=i, direction=direction):
            return lambda t: function(*x[:i], x[i] + t * direction, *x[i + 1 :])

        zero = torch.zeros((), dtype=torch.float64)
        assert_same(hessian(along(loss))(zero), hessian(along(expected))(zero))
        assert_same(jacrev(jacfwd(jacrev(along(loss))))(zero), jacrev(jacfwd(jacrev(along(expected))))(zero))
        assert_same(jacfwd(along(loss))(zero), jacrev(along(expected))(zero))


@problems
def test_vmap_over_each_input_and_per_sample_gradients(name):
    problem = PROBLEMS[name]()
    x = problem.inputs
    loss, expected = losses(problem)
    for i, each in enumerate(x):
        many = torch.stack((each, 0.5 * each, 0 * each + 0.1))
        where = tuple(0 if j == i else None for j in range(len(x)))
        given = (*x[:i], many, *x[i + 1 :])

        def one_by_one(function, i=i, many=many):
            results = [function(*x[:i], one, *x[i + 1 :]) for one in many]
            return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *results)

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PyTorch warns where it runs through the batch in a loop
            assert_same(vmap(problem.operator, where)(*given), one_by_one(problem.reference))
            every = tuple(range(len(x)))
            assert_same(vmap(grad(loss, every), where)(*given), one_by_one(grad(expected, every)))


@problems
def test_derivatives_of_derivatives(name):
    problem = PROBLEMS[name]()
    x = [each.requires_grad_() for each in problem.inputs]
    results = []
    for loss in losses(problem):
        first = torch.autograd.grad(loss(*x), x, create_graph=True)
        torch.manual_seed(1)
        second = torch.autograd.grad(
            sum((g * noise(*g.shape)).real.sum() + g.abs().square().sum() for g in first), x, create_graph=True
        )
        third = torch.autograd.grad(sum(g.abs().square().sum() for g in second), x)
        results.append((first, second, third))
    assert_same(*results)


@problems
def test_batches_of_gradients(name):
    problem = PROBLEMS[name]()
    x = [each.requires_grad_() for each in problem.inputs]
    results = []
    for function in problem[:2]:
        y = function(*x)
        y = y[0] if isinstance(y, tuple) else y
        torch.manual_seed(1)
        many = noise(3, *y.shape, dtype=y.dtype)
        found = torch.autograd.grad(y, x, many, is_grads_batched=True, allow_unused=True, materialize_grads=True)
        results.append(found)
    assert_same(*results)


@problems
def test_dual_numbers(name):
    problem = PROBLEMS[name]()
    loss, expected = losses(problem)
    tangents = tuple(noise(*each.shape, dtype=each.dtype) for each in problem.inputs)
    with forward_ad.dual_level():
        for some in (range(len(tangents)), *([i] for i in range(len(tangents)))):
            x = [
                forward_ad.make_dual(each, tangent) if i in some else each
                for i, (each, tangent) in enumerate(zip(problem.inputs, tangents, strict=True))
            ]
            assert_same(*(forward_ad.unpack_dual(function(*x)).tangent for function in (loss, expected)))
            inputs = [each.requires_grad_() for each in x]  # forward over reverse: the Hessian times a vector
            by_reverse = [
                [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(function(*inputs), inputs)]
                for function in (loss, expected)
            ]
            assert_same(*by_reverse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.thorough) if " by " in n or " from " in n or " in " in n else n
        for n in PROBLEMS
    ],
)
def test_compiled_transforms(name):
    problem = PROBLEMS[name]()
    x, every = problem.inputs, tuple(range(len(problem.inputs)))
    loss, expected = losses(problem)
    torch._dynamo.reset()
    compiled = torch.compile(grad(loss, every), backend="aot_eager", fullgraph=True)
    assert_same(compiled(*x), grad(expected, every)(*x))


# --- every operator keeps what it promises to PyTorch ---


def operators():
    """Inputs for every operator of the library, with and without derivatives."""
    u, weight, bank = noise(2, L, D), noise(3, D, 3), FilterBank(noise(9, 3))
    for algorithm in convolution.ALGORITHMS[1:]:
        for reverse in (None, noise(3, D, 3)):
            given = u, weight, reverse, bank.name, algorithm
            yield convolution._convolution, given
            yield convolution._convolution_backward, (noise(2, L, 3), *given, True, True)
    for wants in ((True, False), (False, True)):
        yield convolution._convolution_backward, (noise(2, L, 3), u, weight, weight, bank.name, "transfer", *wants)
    yield long_convolution._convolution, (u, noise(L + 2, D), 2)
    yield long_convolution._adjoint, (noise(2, L, D), u, noise(L + 2, D), 2)
    for algorithm, order, length in (
        ("sequential", 3, 7),
        ("sequential", 1, 70),
        ("doubling", 1, 11),
        ("doubling", 3, 7),
    ):
        yield recurrence._recurrence, (*recurrent(order, length).inputs, algorithm)
    for decay, algorithm in itertools.product((decays(D), decays(2, L, D)), scan.ALGORITHMS[1:]):
        yield scan._linear_scan, (noise(2, L, D, dtype=COMPLEX), decay, True, algorithm)
    for directions, algorithm in itertools.product((1, 2), scan.ALGORITHMS[1:]):
        inputs = u, decays(3), noise(6, D), noise(directions, D, 6), noise(2, 3, dtype=COMPLEX), algorithm
        yield scan._diagonal_ssm, inputs
        yield scan._diagonal_ssm_backward, (noise(2, L, D), noise(2, 3, dtype=COMPLEX), *inputs)
    for options in ((3, "sequential"), (3, "parallel"), (64, "sequential")):
        *inputs, _, initial = selective(*options).inputs
        y, final, entering = ssd._ssd(*inputs, initial, *options)
        yield ssd._ssd, (*inputs, initial, *options)
        yield ssd._ssd_backward, (y, final, *inputs, initial, entering, *options)
    yield kernels._power_table, (decays(D, 2), 8)
    inputs = held_kernel().inputs
    kernel, *kept = zoh_kernel._zoh_kernel(*inputs, L, torch.float64)
    yield zoh_kernel._zoh_kernel, (*inputs, L, torch.float64)
    yield zoh_kernel._zoh_kernel_backward, (kernel, inputs[0], *inputs[3:5], *kept)
    for outputs, length in ((1, 16), (2, 7)):
        A, *inputs = dense_powers(outputs).inputs
        kernel, *kept = power_kernel._power_kernel(A, *inputs, length, 3.0, torch.float64)
        yield power_kernel._power_kernel, (A, *inputs, length, 3.0, torch.float64)
        yield power_kernel._power_kernel_backward, (kernel, *kept, 3.0)
    *inputs, initial = delta_rule_inputs()
    for algorithm in ("sequential", "parallel"):
        y, final, entering = delta_rule._gated_delta_rule(*inputs, initial, 4, algorithm)
        yield delta_rule._gated_delta_rule, (*inputs, initial, 4, algorithm)
        yield delta_rule._gated_delta_rule_backward, (y, final, *inputs, initial, entering, 4, algorithm)
    inputs = oscillations().inputs
    yield oscillators._response, (*inputs, L)
    yield oscillators._response_backward, (noise(3, L), oscillators._response(*inputs, L))
    inputs = bilinear_step().inputs
    A, *kept = dense_bilinear._dense_bilinear(*inputs)
    yield dense_bilinear._dense_bilinear, inputs
    yield dense_bilinear._dense_bilinear_backward, (A, kept[0], *inputs, *kept)
    yield power_series._reciprocal, (series(),)
    yield power_series._quotient, (noise(3, D, L), series(), power_series.reciprocal(series()))


def delta_rule_inputs():
    """q, k, v, β, log α and the state before the first step, of three heads."""
    q, k, v = noise(2, L, 3, 2) / 2, noise(2, L, 3, 2) / 2, noise(2, L, 3, 4)
    return q, k, v, torch.rand_like(v[..., 0]), -torch.rand_like(v[..., 0]), noise(2, 3, 2, 4)


def compiled_operators():
    """Those that only `torch.compile` sees."""
    inputs = decays(D, 2), noise(1, D, 2, dtype=COMPLEX), noise(2, D, 2, dtype=COMPLEX), L
    yield torch.ops.stu.diagonal_responses, inputs
    yield torch.ops.stu.diagonal_responses_backward, (noise(2, 1, D, L), *inputs)
    inputs = 0.4 * noise(D, 2, 2), noise(D, 2), noise(2, D, 2), L
    yield torch.ops.stu.dense_kernel, inputs
    yield torch.ops.stu.dense_kernel_backward, (noise(2, L, D), *inputs)
    inputs = -noise(1, D, 3).abs(), noise(1, D, 3), noise(1, D, 3), L
    yield torch.ops.stu.ema_kernel, inputs
    yield torch.ops.stu.ema_kernel_backward, (noise(1, D, L), *inputs)


def test_blocks_reach_over_the_end_of_some_inputs():
    """Where what is returned is a part of what was computed, whose strides are others."""
    reach = set()
    for operator, inputs in operators():
        if operator is recurrence._recurrence:
            drive, weight, _, algorithm = inputs
            block, count = recurrence._division(drive, weight, algorithm)
            if count * block > drive.shape[1]:
                reach.add(algorithm)
    assert reach == set(recurrence.ALGORITHMS[1:])


def registered():
    compiled = {str(operator).replace(".", "::") for operator, _ in compiled_operators()}
    return {f"stu::{name}" for name in dir(torch.ops.stu) if not name.startswith("_") and name != "name"} - compiled


# Their derivatives are those of the plain forms.
FIRST_ORDER = {
    f"stu::{name}_backward"
    for name in (
        "diagonal_ssm",
        "gated_delta_rule",
        "ssd",
        "zoh_kernel",
        "power_kernel",
        "dense_bilinear",
        "oscillator_response",
    )
}


@pytest.mark.slow
def test_every_operator_keeps_its_promises():
    checked = set()
    for operator, inputs in operators():
        derived = operator._qualname not in FIRST_ORDER
        given = [x.clone().requires_grad_(derived) if isinstance(x, torch.Tensor) else x for x in inputs]
        torch.library.opcheck(operator, given)
        checked.add(operator._qualname)
    assert checked == registered()
    for operator, inputs in compiled_operators():
        derived = not str(operator).endswith("backward")
        given = [x.clone().requires_grad_(derived) if isinstance(x, torch.Tensor) else x for x in inputs]
        torch.library.opcheck(operator.default, given)


@problems
def test_values_while_operations_are_dispatched_one_by_one(name):
    problem = PROBLEMS[name]()
    x = [each.requires_grad_() for each in problem.inputs]
    loss, expected = losses(problem)
    with FlopCounterMode(display=False):
        found = torch.autograd.grad(loss(*x), x)
    assert_same(found, torch.autograd.grad(expected(*x), x))


def raw(formula):
    """A formula of tensors, not of shapes."""
    formula._get_raw = True
    return formula


def counted(function, *inputs):
    """FLOPs of the matrix products and FFTs in tensor code."""
    aten = torch.ops.aten

    formulas = {aten._fft_r2c: r2c, aten._fft_c2r: c2r, aten.addmm_: addmm, aten.bmm: bmm}
    formulas |= {aten.baddbmm: baddbmm, aten.baddbmm_: baddbmm}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        function(*inputs)
    return counter.get_total_flops()


def r2c(x_shape, dim, *_, out_shape, **__):
    (axis,) = dim
    return fft_flops(x_shape[axis], math.prod(x_shape) // x_shape[axis])


def c2r(x_shape, dim, *_, out_shape, **__):
    (axis,) = dim
    return fft_flops(out_shape[axis], math.prod(out_shape) // out_shape[axis])


@raw
def bmm(a, b, **_):
    """The counter takes a complex product for a real one."""
    return 2 * a.numel() * b.shape[-1] * (4 if a.is_complex() else 1)


@raw
def baddbmm(x, a, b, **_):
    return bmm(a, b)


def addmm(shape, a, b, **_):
    return 2 * a[0] * a[1] * b[1]


def test_flops_are_those_of_the_products_and_ffts_inside():
    checked = set()
    for operator, inputs in operators():
        with torch.no_grad():
            counter = FlopCounterMode(display=False)
            with counter:
                operator(*inputs)
            assert counter.get_total_flops() == counted(operator._init_fn, *inputs), operator._qualname
            checked.add(operator._qualname)
    assert checked == registered()
