"""Diagonal recurrences against the recurrence written out, an associative scan, and themselves in double precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from stu.errors import OptionError
from stu.ops import forms, scan
from stu.ops.scan import diagonal_ssm, diagonal_step, linear_scan, linear_scan_reference, padded_ssm
from stu.reference.common import associative_scan

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 23, 31, 32, 33, 64, 67]
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])


@pytest.fixture(autouse=True, scope="module", params=["cpu", "cuda"])
def _forms(request):
    """The algorithms of both kinds of devices, and short blocks, so that short sequences have several levels."""
    with pytest.MonkeyPatch.context() as patch, forms.taken_for(request.param):
        patch.setattr(scan, "LONGEST_BLOCK", 5)
        yield


def disk(*shape, least=0.0, most=1.0):
    """Complex numbers with moduli in least … most."""
    modulus = least + (most - least) * torch.rand(*shape, dtype=torch.float64)
    return torch.polar(modulus, 2 * torch.pi * torch.rand(*shape, dtype=torch.float64))


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def gradients(outputs, inputs, weights):
    """Of a linear loss in all outputs, in all inputs."""
    loss = sum((y * w).sum().real for y, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def assert_same(first, second, inputs, tolerance=1e-11):
    """The same outputs and gradients, relative to the largest entry of each."""
    weights = [noise(*y.shape, dtype=y.dtype) for y in second]
    pairs = [*zip(first, second, strict=True)]
    pairs += zip(gradients(first, inputs, weights), gradients(second, inputs, weights), strict=True)
    for one, other in pairs:
        assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.detach().abs().max().item()))


def scan_problem(length, *, gated=False, is_complex=True, initial=False, batch=2, width=3):
    shape = (batch, length, width) if gated else (width,)
    decay = disk(*shape) if is_complex else disk(*shape).real
    dtype = decay.dtype
    start = noise(batch, width, dtype=dtype).requires_grad_() if initial else None
    return noise(batch, length, width, dtype=dtype).requires_grad_(), decay.requires_grad_(), start


def ssm_problem(length, *, directions=1, initial=False, batch=3, width=4, modes=5, outputs=2, **kind):
    """u, λ, B, C and the first state."""
    c = torch.complex128
    u, decay = noise(batch, length, width), disk(modes, **kind)
    B, C = noise(modes, width, dtype=c), noise(directions, outputs, modes, dtype=c)
    start = (noise(batch, modes, dtype=c),) if initial else ()
    return [x.requires_grad_() for x in (u, decay, B, C, *start)]


def literal_ssm(u, decay, B, C, initial=None):
    """The equations with complex matrices and one step after the other."""
    drive = u.to(B.dtype) @ B.T
    x = linear_scan_reference(drive, decay, initial)
    y = (x @ C[0].T).real
    if len(C) == 2:
        y = y + (linear_scan_reference(drive, decay, reverse=True) @ C[1].T).real
    return y, x[:, -1]


# --- the scan ---


def test_reference_is_the_recurrence_written_out():
    drive, decay, initial = scan_problem(3, gated=True, initial=True)
    (a1, a2, a3), (b1, b2, b3) = decay.unbind(1), drive.unbind(1)
    x1 = a1 * initial + b1
    x3 = a3 * (a2 * x1 + b2) + b3
    assert_close(linear_scan_reference(drive, decay, initial)[:, [0, 2]], torch.stack((x1, x3), 1))
    z3 = a3 * initial + b3
    z1 = a1 * (a2 * z3 + b2) + b1
    assert_close(linear_scan_reference(drive, decay, initial, reverse=True)[:, [0, 2]], torch.stack((z1, z3), 1))


@directions
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("gated", [False, True], ids=["constant", "gated"])
def test_scan_equals_reference(gated, is_complex, initial, reverse):
    for length in LENGTHS:
        drive, decay, start = scan_problem(length, gated=gated, is_complex=is_complex, initial=initial)
        inputs = (drive, decay) if start is None else (drive, decay, start)
        fast = linear_scan(drive, decay, start, reverse=reverse)
        assert_same((fast,), (linear_scan_reference(drive, decay, start, reverse=reverse),), inputs)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    width=st.integers(1, 4),
    modulus=st.sampled_from([0.0, 1e-30, 0.5, 0.9999, 1.0, 1.05]),
    gated=st.booleans(),
    reverse=st.booleans(),
)
def test_scan_equals_reference_for_any_decay(batch, length, width, modulus, gated, reverse):
    drive, decay, _ = scan_problem(length, gated=gated, batch=batch, width=width)
    decay = decay.detach() / decay.detach().abs() * modulus
    expected = linear_scan_reference(drive, decay, reverse=reverse)
    fast = linear_scan(drive, decay, reverse=reverse)
    assert_close(fast, expected, rtol=0, atol=1e-12 * expected.detach().abs().max().item())


@directions
def test_scan_takes_real_and_complex_together(reverse):
    real, c = noise(2, 9, 3), torch.complex128
    for drive, decay in ((real, disk(3)), (real, disk(2, 9, 3)), (real.to(c), torch.rand(3).double())):
        expected = linear_scan_reference(drive.to(c), decay.to(c), reverse=reverse)
        drive, decay = drive.requires_grad_(), decay.requires_grad_()
        y = linear_scan(drive, decay, reverse=reverse)
        assert_close(y, expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(y.abs().sum(), (drive, decay))
        assert [g.dtype for g in grads] == [drive.dtype, decay.dtype]


@pytest.mark.slow
@directions
@pytest.mark.parametrize("gated", [False, True], ids=["constant", "gated"])
def test_gradcheck_of_the_scan(gated, reverse):
    inputs = scan_problem(6, gated=gated, initial=True, batch=1, width=2)
    call = lambda *args: linear_scan(*args, reverse=reverse)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_scan_leaves_its_inputs_alone():
    for gated in (False, True):
        inputs = scan_problem(20, gated=gated, initial=True)
        before = [x.detach().clone() for x in inputs]
        linear_scan(*inputs).abs().sum().backward()
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scan_runs_in_float32_at_least(dtype):
    drive, decay = noise(2, 3000, 4, dtype=torch.float32).to(dtype), 1 - 1e-3 * torch.rand(4)
    exact = linear_scan(drive.double(), decay)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_scan(drive, decay)
    assert y.dtype == torch.float32
    assert (y - exact).norm() < 1e-6 * exact.norm()


@directions
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
def test_the_algorithms_agree(dtype, reverse):
    """On as many steps as a model has, with decays that are zero, one, in between, and −1, whose powers are rounded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "LONGEST_BLOCK", 128)
        for length in (127, 128, 129, 1000, 16384, 16385):
            decay = torch.cat((torch.tensor([0.0, 1.0, -1.0]), disk(4, least=0.99)))
            drive = noise(1, length, 7, dtype=dtype)
            tree, blocks = (linear_scan(drive, decay, reverse=reverse, algorithm=name) for name in ("tree", "blocks"))
            tolerance = 1e-6 if dtype == torch.complex64 else 1e-12 if length < 10_000 else 4e-12
            assert_close(blocks, tree, rtol=0, atol=tolerance * tree.abs().max().item())


def test_an_unknown_algorithm_is_named():
    drive, decay, _ = scan_problem(3)
    with pytest.raises(OptionError, match=r"algorithm.*must be one of auto, tree, blocks"):
        linear_scan(drive, decay, algorithm="loop")


# --- the state space ---


@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
def test_ssm_is_its_equations(directions, initial, chunk, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", chunk)
    for length in (1, 2, 3, 8, 13, 33):
        inputs = ssm_problem(length, directions=directions, initial=initial)
        with forms.device_memory(64 * chunk):
            assert_same(diagonal_ssm(*inputs), literal_ssm(*inputs), inputs)


def test_ssm_is_the_associative_scan_of_the_published_codes():
    u, decay, B, C = inputs = ssm_problem(100, directions=2)
    drive, a = u.to(B.dtype) @ B.T, decay.expand(3, 100, -1)
    x = associative_scan(a, drive)[1]
    z = associative_scan(a, drive.flip(1))[1].flip(1)
    y = (torch.cat((x, z), -1) @ torch.cat((C[0], C[1]), -1).T).real
    assert_same(diagonal_ssm(*inputs), (y, x[:, -1]), inputs)


@pytest.mark.parametrize("directions", [1, 2])
def test_gradcheck_of_the_ssm(directions):
    inputs = ssm_problem(6, directions=directions, initial=True, batch=2, width=2, modes=2)
    assert torch.autograd.gradcheck(diagonal_ssm, inputs)


def test_ssm_takes_conjugates_that_are_views():
    u, decay, B, C = (x.detach() for x in ssm_problem(9))
    lazy = diagonal_ssm(u, decay.conj(), B.conj(), C.conj())
    for one, other in zip(lazy, diagonal_ssm(u, *(x.conj().resolve_conj() for x in (decay, B, C))), strict=True):
        assert_close(one, other, rtol=0, atol=1e-13)


def test_gradients_of_one_output_need_no_other():
    inputs = ssm_problem(9, initial=True)
    for index in (0, 1):
        expected = gradients([literal_ssm(*inputs)[index]], inputs, [1.0])
        for one, other in zip(gradients([diagonal_ssm(*inputs)[index]], inputs, [1.0]), expected, strict=True):
            assert_close(one, other, rtol=0, atol=1e-12)


def test_ssm_goes_on_from_its_last_state_and_steps_alike():
    u, decay, B, C = ssm_problem(40)
    y, last = diagonal_ssm(u, decay, B, C)
    for cut in (1, 17, 39):
        head, state = diagonal_ssm(u[:, :cut], decay, B, C)
        rest, end = diagonal_ssm(u[:, cut:], decay, B, C, state)
        assert_close(torch.cat((head, rest), 1), y, rtol=0, atol=1e-12)
        assert_close(end, last, rtol=0, atol=1e-12)
    state, outputs = torch.zeros_like(last), []
    for u_t in u.unbind(1):
        y_t, state = diagonal_step(u_t, decay, B, C, state)
        outputs.append(y_t)
    assert_close(torch.stack(outputs, 1), y, rtol=0, atol=1e-12)
    assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
def test_padded_sequences_are_each_alone(initial):
    rows = ((0, 13), (0, 4), (9, 13), (3, 8), (6, 6))
    u, decay, B, C, *start = inputs = ssm_problem(13, initial=initial, batch=len(rows))
    mask = torch.stack([(torch.arange(13) >= a) & (torch.arange(13) < b) for a, b in rows])
    y, last = padded_ssm(u.where(mask.unsqueeze(-1), 0), mask, decay, B, C, *start)
    first = start[0] if initial else torch.zeros(len(rows), len(decay), dtype=decay.dtype)
    alone = [literal_ssm(u[i : i + 1, a:b], decay, B, C, first[i : i + 1]) for i, (a, b) in enumerate(rows) if a < b]
    expected = torch.cat([y[0] for y, _ in alone]), torch.cat([*(x for _, x in alone), first[-1:]])
    assert_same((y[mask], last), expected, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_memory_survives_low_precision(dtype):
    """Half a memory of 16384 steps: |λ| up to 0.9999, and an autocast that must not matter."""
    u, decay, B, C = ssm_problem(16384, directions=2, batch=1, width=2, modes=8, least=0.99, most=0.9999)
    u = u.detach().to(dtype).requires_grad_()
    inputs, wide = (u, decay, B, C), (u.detach().double().requires_grad_(), decay, B, C)
    exact, weights = diagonal_ssm(*wide), noise(1, 16384, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = diagonal_ssm(*inputs)
        grads = gradients([y], inputs, [weights.to(dtype)])
    assert (y.dtype, last.dtype) == (dtype, torch.complex128)
    eps = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert (y - exact[0]).norm() < eps * exact[0].norm()
    assert (last - exact[1]).norm() < 1e-6 * exact[1].norm()
    for one, other in zip(grads, gradients(exact[:1], wide, [weights.to(dtype).double()]), strict=True):
        assert (one - other).norm() < max(eps, 1e-5) * other.norm()


def test_a_long_memory_can_be_streamed_in_float32():
    u, decay, B, C = (x.detach() for x in ssm_problem(4096, batch=1, modes=3, least=0.9999, most=0.9999))
    exact, _ = diagonal_ssm(u, decay, B, C)
    state, outputs = torch.zeros(1, 3, dtype=torch.complex64), []
    for u_t in u.float().unbind(1):
        y_t, state = diagonal_step(u_t, decay, B, C, state)
        outputs.append(y_t)
    assert (torch.stack(outputs, 1) - exact).norm() < 1e-6 * exact.norm()


def test_no_states_are_stored():
    u, decay, B, C = ssm_problem(1000, modes=50)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        diagonal_ssm(u, decay, B, C)
    assert max(stored) == u.numel() < 1000 * 50


# --- as operators of torch ---


@pytest.mark.slow
def test_compiles_without_a_break():
    inputs = ssm_problem(12, directions=2, initial=True)
    torch._dynamo.reset()
    compiled = torch.compile(diagonal_ssm, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*inputs), diagonal_ssm(*inputs), inputs)
