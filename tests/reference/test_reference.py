"""The published models, as `stu.reference` writes them, are the layers of `stu.mixers`: outputs and gradients."""

import pytest
import torch
from torch.testing import assert_close

from experiments.speed.literal import LITERAL, LiteralSTU
from stu import STU
from stu.ops.kernels import kernel_reference
from stu.ops.long_convolution import long_convolution_reference
from stu.ops.scan import linear_scan_reference
from stu.ops.ssd import ssd_reference
from stu.reference.common import associative_scan, fft_convolution
from stu.reference.mamba2 import for_heads, minimal_ssd, segment_sums
from stu.reference.s4 import bilinear, s4, truncated_output, with_conjugates
from stu.reference.s4d import vandermonde_kernel
from stu.reference.stu import spectral_features
from tests.models import STU_VARIANTS, build, model_config, randomized

D = 6
LENGTHS = {1: 1, 2: 2, 7: 7, 13: 13, 15: 5, 32: 8}  # with steps of a chunk, of which each is a multiple


def assert_same(forms, u, parameters):
    """Both forms have the same outputs, and gradients of u and the parameters, to 1e-10."""
    weight = torch.randn_like(u)
    outputs = [form(u) for form in forms]
    assert_close(*outputs, rtol=1e-10, atol=1e-10)
    names, inputs = zip(("u", u), *parameters, strict=True)
    grads = (torch.autograd.grad((y * weight).sum(), inputs, materialize_grads=True) for y in outputs)
    for name, first, second in zip(names, *grads, strict=True):
        assert_close(first, second, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("variant", STU_VARIANTS)
def test_the_stu(variant, causal):
    """One and two branches, Hankel-L, learned and fixed recurrence; at lengths from 1 to the built one."""
    layer = randomized(STU(4, **{"seq_len": 33, "num_filters": 6, "causal": causal, **STU_VARIANTS[variant]})).double()
    literal = LiteralSTU(layer, 33)
    for length in (1, 2, 3, 13, 16, 33):
        assert_same((layer, literal), noise(2, length, 4), layer.named_parameters())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", LITERAL)
def test_the_baselines(model, length):
    sizes = {"d_model": D, "expand": 2, "d_state": 8, "num_blocks": 2, "num_heads": 4, "num_groups": 2, "n_ssm": 2}
    config = model_config(model, seq_len=length, chunk_size=LENGTHS[length], **sizes)
    layer = randomized(build(config.mixer)(D), 0.05).double()
    reference = (lambda u: s4_of(layer, u)) if model == "s4" else LITERAL[model](layer, length)
    assert_same((layer, reference), noise(3, length, D), layer.named_parameters())


def s4_of(layer, u):
    """S4 with C̃ from the layer's C, so that gradients are those of the layer's parameters."""
    dt, A = layer.log_dt.exp(), torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    A, P, B = (x.repeat(3, 1) for x in (A, torch.view_as_complex(layer.P[0]), torch.view_as_complex(layer.B)))
    C_tilde = truncated_output(A, P, torch.view_as_complex(layer.C[0]), dt, u.shape[1])
    return s4(u, A, P, B, C_tilde, layer.D, dt)


# --- one equation at a time ---


def test_features_are_convolutions():
    u, filters = noise(2, 7, 3), noise(7, 2)
    features = spectral_features(u, filters)
    for t in range(7):
        for k in range(2):
            expected = sum(u[:, t - i] * filters[i, k] for i in range(t + 1))
            assert_close(features[:, t, k], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_a_convolution_by_fft_is_the_sum(length):
    u, kernel = noise(2, length, 3), noise(3, length)
    assert_close(fft_convolution(u, kernel), long_convolution_reference(u, kernel.mT), rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33])
def test_the_associative_scan_is_the_recurrence(length):
    a, b = torch.randn(2, 2, length, 3, dtype=torch.complex128)
    products, states = associative_scan(a, b)
    assert_close(states, linear_scan_reference(b, a))
    assert_close(products, a.cumprod(1))


def test_the_vandermonde_kernel_is_that_of_the_held_system():
    A, B, C = torch.randn(3, 2, 4, dtype=torch.complex128)
    dt = torch.rand(2, 1, dtype=torch.float64)
    held = torch.linalg.matrix_exp(torch.diag_embed(dt * A)), (torch.exp(dt * A) - 1) / A * B
    expected = 2 * kernel_reference(*held, C.unsqueeze(0), 9)[0].real.mT
    assert_close(vandermonde_kernel(A, B, C, dt, 9), expected)


def test_the_bilinear_rule_is_the_trapezoid():
    """(x_t − x_{t−1})/dt = A (x_t + x_{t−1})/2, and C̃ is what is left of C after L steps."""
    A, P, C = torch.randn(3, 2, 3, dtype=torch.complex128)
    dt = torch.rand(2, dtype=torch.float64)
    modes, columns = with_conjugates(A), with_conjugates(P)
    step, eye = bilinear(modes, columns, dt), torch.eye(6, dtype=torch.complex128)
    system = torch.diag_embed(modes) - columns.unsqueeze(-1) * columns.conj().unsqueeze(-2)
    assert_close((step - eye) / dt[:, None, None], system @ (step + eye) / 2)
    power = step @ step @ step
    expected = with_conjugates(C) - torch.einsum("dn,dnm->dm", with_conjugates(C), power)
    assert_close(truncated_output(A, P, C, dt, 3), expected[:, :3])


def test_segment_sums_are_sums():
    steps = noise(2, 5)
    sums = segment_sums(steps)
    for t in range(5):
        for s in range(5):
            expected = steps[:, s + 1 : t + 1].sum(1) if s <= t else torch.full((2,), -torch.inf, dtype=torch.float64)
            assert_close(sums[:, t, s], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 3, 12])
def test_the_minimal_form_is_the_recurrence(chunk_size):
    x, dt, A = noise(2, 12, 4, 3), torch.rand(2, 12, 4, dtype=torch.float64), -torch.rand(4, dtype=torch.float64)
    B, C = noise(2, 12, 2 * 5), noise(2, 12, 2 * 5)
    y = minimal_ssd(x * dt.unsqueeze(-1), dt * A, *(for_heads(each, 2, 4) for each in (B, C)), chunk_size)
    groups = (each.unflatten(-1, (2, 5)) for each in (B, C))
    expected, _ = ssd_reference(x, dt, A, *groups, A.new_zeros(4), A.new_zeros(2, 4, 5, 3))
    assert_close(y, expected)
