"""Every mixer of conf/model over 16384 steps: numbers of limited precision, and memory."""

import copy
import sys
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from experiments.speed.bench import Settings
from experiments.speed.candidates import Size, find
from experiments.speed.measure import Failure, alone
from stu.cli.layers import of_one_mixer
from tests.models import MODELS, mixer_cases

pytestmark = pytest.mark.slow

LONG = 16384
SLOW = (
    "transformer",
    "mamba2_attention",
    "lstm",
    "gru",
)  # quadratic, or step by step: shorter inputs, which forget no less

models = pytest.mark.parametrize("case", [case for case in mixer_cases() if case.name.split("-")[0] in MODELS], ids=str)


def noise(*shape):
    return torch.randn(*shape)


@models
def test_float32_and_autocast_are_healthy(case):
    """At the start of training: values, gradients and the last steps against float64; bfloat16 autocast."""
    length = 512 if case.name.startswith(SLOW) else LONG
    small = {"d_model": 4, "num_filters": 24, "d_state": 16, "num_heads": 2}
    layer = case.build(seq_len=length, chunk_size=64, **small).eval()  # within which Mega attends
    exact = copy.deepcopy(layer).double()
    x, weight = noise(1, length, 4).requires_grad_(), noise(1, length, 4)
    y, expected = layer(x), exact(x.double())
    assert (y - expected).norm() < 2e-6 * expected.norm()
    grads = torch.autograd.grad((y * weight).sum(), (x, *layer.parameters()))
    exact_grads = torch.autograd.grad((expected * weight).sum(), (x, *exact.parameters()))
    for one, other in zip(grads, exact_grads, strict=True):
        assert (one - other).norm() < 1e-4 * max(other.norm().item(), 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert (low - expected).norm() < 0.02 * expected.norm()
    assert all(g.isfinite().all() for g in torch.autograd.grad((low * weight).sum(), (x, *layer.parameters())))
    if layer.causal:
        with torch.no_grad():
            _, state = layer.prefill(x[:, :-5])
            for t in range(length - 5, length):
                y_t, state = layer.step(x[:, t], state)
                assert_close(y_t, y[:, t], rtol=0, atol=1e-5 * y.abs().max().item())


# The RNNs keep a few numbers of every step, but take long over it; attention is the same to both sides of a sequence.
# Two units, from both ends, need more than one.
SAMPLE = [("stu", True), *((model, False) for model in ("gated_deltanet", "mamba2", "mega", "s4", "stu"))]
MEASURED = [
    pytest.param(
        "mega:chunk_size=256" if model == "mega" else model,
        causal,
        marks=() if (model, causal) in SAMPLE else pytest.mark.thorough,
    )
    for model, causal in product(of_one_mixer(), (True, False))
    if model not in SLOW
] + [("transformer", True)]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process takes is known on Linux only")
@pytest.mark.parametrize(("model", "causal"), MEASURED, ids=lambda x: {True: "causal", False: "free"}.get(x, x))
def test_forward_and_backward_fit_into_a_gigabyte(model, causal):
    """In a fresh process that may take no more, at D = 64; anything of L·L or a few of L·N·D would."""
    size = Size(LONG, batch=1, width=64, filters=None)
    (candidate,) = find([model], causal=causal, size=size)
    settings = Settings(causal=causal, limit_bytes=1e9, limit_seconds=300, repeats=1, min_seconds=0.0)
    outcomes = alone(candidate.node(size), size, settings, skip=["step", "launches"])
    assert [stage for stage, outcome in outcomes.items() if not isinstance(outcome, Failure)] == [
        "build",
        "forward",
        "forward_backward",
    ], outcomes
    assert outcomes["forward_backward"] < 1e9
