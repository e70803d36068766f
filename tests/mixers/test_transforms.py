"""Every mixer under everything PyTorch can do to a module: right, or refused in one line.

"Right" is what the same mixer gives in plain tensor code: the literal reference in the place of every operator, and
derivatives by autograd alone. `python -m tests.mixers.test_transforms` prints the table.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stu.mixers.attention import Attention
from stu.mixers.gated_deltanet import GatedDeltaNet
from stu.mixers.linoss import LinOSS
from stu.mixers.lru import LRU
from stu.mixers.mamba2 import Mamba2
from stu.mixers.mega import Mega
from stu.mixers.rnn import RNN
from stu.mixers.s4 import S4
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from stu.ops import convolution, delta_rule, ema, kernels, long_convolution, recurrence, ssd
from tests.models import randomized
from tests.ops.test_transforms import literal_ssm

B, L, D = 3, 11, 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

SPECTRAL = {"seq_len": 16, "num_filters": 4}
SELECTIVE = {"d_state": 4, "num_heads": 2, "chunk_size": 4}
AVERAGING = {"seq_len": 16, "d_state": 3, "d_query": 4}
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "STU": partial(STU, D, **SPECTRAL),
    "STU, bidirectional": partial(STU, D, **SPECTRAL, causal=False),
    "STU, Hankel-L": partial(STU, D, **SPECTRAL, hankel="L", two_sided=False),
    "STU, fixed recurrence": partial(STU, D, **SPECTRAL, k_y=2),
    "AR-STU": partial(STU, D, **SPECTRAL, k_y=2, recurrence="learned"),
    "AR-STU, bidirectional": partial(STU, D, **SPECTRAL, k_y=1, recurrence="learned", causal=False),
    "STU-T": partial(STUT, D, **SPECTRAL),
    "STU-T, bidirectional": partial(STUT, D, **SPECTRAL, causal=False),
    "S4": partial(S4, D, d_state=4),
    "S4, zero-order hold": partial(S4, D, d_state=4, discretization="zoh", causal=False),
    "S4D": partial(S4D, D, d_state=4),
    "S5": partial(S5, D, d_state=4, num_blocks=1),
    "S5, bidirectional": partial(S5, D, d_state=4, num_blocks=1, causal=False),
    "LRU": partial(LRU, D, d_state=4),
    "LinOSS": partial(LinOSS, D, d_state=3),
    "D-LinOSS, bidirectional": partial(LinOSS, D, d_state=3, discretization="imex", damping=True, causal=False),
    "Mamba-2": partial(Mamba2, D, **SELECTIVE),
    "Mamba-2, bidirectional": partial(Mamba2, D, **SELECTIVE, causal=False),
    "gated DeltaNet": partial(GatedDeltaNet, D, **SELECTIVE),
    "gated DeltaNet, bidirectional": partial(GatedDeltaNet, D, **SELECTIVE, causal=False),
    "Mega": partial(Mega, D, **AVERAGING),
    "Mega, chunks, bidirectional": partial(Mega, D, **AVERAGING, causal=False, attention="laplace", chunk_size=4),
    "LSTM": partial(RNN, D, d_state=3, cell="lstm"),
    "GRU": partial(RNN, D, d_state=3, cell="gru"),
    "attention": partial(Attention, D, num_heads=2, positions="rotary"),
    "attention, local": partial(Attention, D, num_heads=2, window=4, causal=False),
}


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


# --- the same mixers in plain tensor code ---


def literal_filters(u, filters, weight, reverse=None, *, algorithm="auto"):
    filters = filters.filters.to(u.dtype)
    y = convolution.filter_convolution_reference(u, filters, weight)
    if reverse is None:
        return y
    return y + convolution.filter_convolution_reference(u.flip(1), filters, reverse).flip(1)


def literal_diagonal_ssm(u, decay, B, C):
    return literal_ssm(u, decay, B, C, u.new_zeros(len(u), len(decay), dtype=decay.dtype))


def literal_ssd(*inputs, chunk_size):
    return ssd.ssd_reference(*inputs)


def literal_oscillator_response(a, delta, length):
    u = [torch.zeros_like(a), torch.ones_like(a)]
    for _ in range(length - 1):
        u.append((1 + delta - a) * u[-1] - delta * u[-2])
    return torch.stack(u[1:], -1)


def literal_delta_rule(*inputs, chunk_size):
    steps = zip(*(signal.unbind(1) for signal in inputs[:-1]), strict=True)
    outputs, state = [], inputs[-1]
    for step in steps:
        y, state = delta_rule.gated_delta_step(*step, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def literal_ema_kernel(log_decay, inputs, outputs, length):
    return ema.ema_kernel_reference(log_decay.exp(), inputs, outputs, length)


def literal_diagonal_kernel(a, b, c, length):
    return 2 * kernels.kernel_reference(torch.diag_embed(a), b, c, length).real


PLAIN = {
    "stu.mixers.stu.filter_convolution": literal_filters,
    "stu.mixers.stu.linear_recurrence": recurrence.linear_recurrence_reference,
    "stu.mixers.stu_t.long_convolution": long_convolution.long_convolution_reference,
    "stu.mixers.s4.long_convolution": long_convolution.long_convolution_reference,
    "stu.mixers.s4.dense_kernel": kernels.kernel_reference,
    "stu.mixers.s4.S4._by_feedback": lambda self, length: False,
    "stu.mixers.s4d.long_convolution": long_convolution.long_convolution_reference,
    "stu.mixers.s4d.diagonal_kernel": literal_diagonal_kernel,
    "stu.mixers.s5.diagonal_ssm": literal_diagonal_ssm,
    "stu.mixers.lru.diagonal_ssm": literal_diagonal_ssm,
    "stu.mixers.linoss.long_convolution": long_convolution.long_convolution_reference,
    "stu.mixers.linoss.oscillator_response": literal_oscillator_response,
    "stu.mixers.mamba2.ssd": literal_ssd,
    "stu.mixers.gated_deltanet.gated_delta_rule": literal_delta_rule,
    "stu.mixers.mega.ema_kernel": literal_ema_kernel,
    "stu.mixers.mega.long_convolution": long_convolution.long_convolution_reference,
}


@contextmanager
def plain():
    with ExitStack() as stack:
        for name, function in PLAIN.items():
            stack.enter_context(mock.patch(name, function))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


class Subject:
    """A mixer with inputs, and what plain tensor code makes of them."""

    def __init__(self, name):
        torch.manual_seed(7)
        self.build = MIXERS[name]
        self.mixer = randomized(self.build()).double().eval()
        self.parameters = dict(self.mixer.named_parameters())
        self.x, self.direction, self.weight = noise(B, L, D), noise(B, L, D), noise(B, L, D)
        inputs = [self.x.requires_grad_(), *self.parameters.values()]
        with plain():
            y = self.mixer(self.x)
            self.gradients = torch.autograd.grad((y * self.weight).sum(), inputs, retain_graph=True)
            loss = (y * self.weight).sum().square() + y.pow(3).sum()
            (first,) = torch.autograd.grad(loss, self.x, create_graph=True)
            (self.second,) = torch.autograd.grad((first * self.direction).sum(), self.x)
            step = 1e-6
            with torch.no_grad():
                ahead, behind = (self.mixer(self.x + s * self.direction) for s in (step, -step))
        self.y, self.tangent = y.detach(), (ahead - behind) / (2 * step)
        self.x = self.x.detach()

    def __call__(self, parameters, x):
        return functional_call(self.mixer, parameters, (x,))

    def copy(self):
        return copy.deepcopy(self.mixer)


class WrongError(Exception):
    """Neither right nor refused."""


def near(found, expected, tolerance=1e-9):
    if found.shape != expected.shape:
        raise WrongError(f"{tuple(found.shape)} instead of {tuple(expected.shape)}")
    if expected.numel():
        error = (found.detach().to(torch.float64) - expected).abs().max()
        if not error <= tolerance * (1 + expected.abs().max()):
            raise WrongError(f"off by {error}")


def outputs_and_gradients(call, s, tolerance=1e-9):
    """The module, called like the mixer, has the mixer's outputs, and gradients of the input."""
    x = s.x.clone().requires_grad_()
    y = call(x)
    near(y, s.y, tolerance)
    near(torch.autograd.grad((y * s.weight).sum(), x)[0], s.gradients[0], tolerance)


# --- the columns of the table ---


def by_grad(s):
    found = grad(lambda p: (s(p, s.x) * s.weight).sum())(s.parameters)
    for one, expected in zip(found.values(), s.gradients[1:], strict=True):
        near(one, expected)


def by_vjp(s):
    y, pull_back = vjp(s.mixer, s.x)
    near(y, s.y)
    near(pull_back(s.weight)[0], s.gradients[0])


def by_jvp(s):
    y, tangent = jvp(s.mixer, (s.x,), (s.direction,))
    near(y, s.y)
    near(tangent, s.tangent, 1e-7)


def by_jacrev(s):
    near((jacrev(s.mixer)(s.x) * s.direction).sum((-3, -2, -1)), s.tangent, 1e-7)


def by_jacfwd(s):
    near((jacfwd(s.mixer)(s.x) * s.direction).sum((-3, -2, -1)), s.tangent, 1e-7)


def by_vmap(s):
    near(vmap(lambda x: s.mixer(x.unsqueeze(0)).squeeze(0))(s.x), s.y)
    stacked = {name: torch.stack((p, p)) for name, p in s.parameters.items()}  # an ensemble
    near(vmap(s, (0, None))(stacked, s.x)[1], s.y)


def by_sample(s):
    def loss(p, x, weight):
        return (s(p, x.unsqueeze(0)).squeeze(0) * weight).sum()

    found = vmap(grad(loss), (None, 0, 0))(s.parameters, s.x, s.weight)
    for one, expected in zip(found.values(), s.gradients[1:], strict=True):
        assert len(one) == B
        near(one.sum(0), expected)


def twice(s):
    x = s.x.clone().requires_grad_()
    y = s.mixer(x)
    (first,) = torch.autograd.grad((y * s.weight).sum().square() + y.pow(3).sum(), x, create_graph=True)
    near(torch.autograd.grad((first * s.direction).sum(), x)[0], s.second)


def compiled(s):
    torch._dynamo.reset()
    outputs_and_gradients(torch.compile(s.mixer, backend="aot_eager"), s)


def compiled_backward(s):
    torch._dynamo.reset()
    few = slice(2)  # of the steps: the program of some mixers grows with them
    x, weight = s.x[:, few].clone().requires_grad_(), s.weight[:, few]
    [expected] = torch.autograd.grad((s.mixer(x) * weight).sum(), x)
    with compiled_autograd._enable(partial(torch.compile, backend="eager"), dynamic=False):
        near(torch.autograd.grad((s.mixer(x) * weight).sum(), x)[0], expected)


def exported(s):
    file = io.BytesIO()
    torch.export.save(torch.export.export(s.mixer, (s.x,), strict=False), file)
    file.seek(0)
    outputs_and_gradients(torch.export.load(file).module(), s)


def counted(s):
    with FlopCounterMode(display=False) as counter:
        x = s.x.clone().requires_grad_()
        (s.mixer(x) * s.weight).sum().backward()
    near(x.grad, s.gradients[0])
    s.mixer.zero_grad()
    assert counter.get_total_flops() > 0


def fake(s):
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = s.mixer(torch.empty(B, L, D, dtype=torch.float64))
        gradients = torch.autograd.grad(y.sum(), s.mixer.parameters())
    assert (y.shape, y.dtype) == (s.x.shape, s.x.dtype)
    assert [g.shape for g in gradients] == [p.shape for p in s.mixer.parameters()]
    outputs_and_gradients(s.mixer, s)  # nothing of it is left behind


def meta(s):
    with torch.device("meta"):
        mixer = s.build()
        y = mixer(torch.randn(B, L, D))
        y.sum().backward()
    assert y.shape == s.x.shape
    assert y.is_meta
    mixer = mixer.to_empty(device="cpu").double().eval()
    mixer.reset_parameters()
    mixer.load_state_dict(s.mixer.state_dict())
    outputs_and_gradients(mixer, s)


def copied(s):
    outputs_and_gradients(s.copy(), s)


def pickled(s):
    outputs_and_gradients(pickle.loads(pickle.dumps(s.mixer)), s)


def replicated(s):
    """As `DataParallel` makes replicas: modules whose parameters are plain attributes."""

    def replica(module):
        twin = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            twin._parameters.pop(name, None)
            setattr(twin, name, None if parameter is None else parameter.view_as(parameter))
        for name, child in module._modules.items():
            if child is not None:
                twin._modules[name] = replica(child)
        return twin

    outputs_and_gradients(replica(s.mixer), s)


def sharded(s):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        outputs_and_gradients(fully_shard(s.copy(), mesh=mesh), s)
    finally:
        distributed.destroy_process_group()


def checkpointed(s):
    outputs_and_gradients(lambda x: checkpoint(s.mixer, x, use_reentrant=False), s)


def in_autocast(dtype, s):
    mixer = s.copy().float()
    x = s.x.float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = mixer(x)
    near(y, s.y, TOLERANCE[dtype])
    near(torch.autograd.grad((y * s.weight).sum(), x)[0], s.gradients[0], TOLERANCE[dtype])


def in_half(dtype, s):
    y = s.copy().to(dtype)(s.x.to(dtype))
    assert y.dtype == dtype
    near(y, s.y, 2 * TOLERANCE[dtype])


def float64_by_default(s):
    torch.set_default_dtype(torch.float64)
    try:
        mixer = s.build().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(parameter.dtype == torch.float64 for parameter in mixer.parameters())
    mixer.load_state_dict(s.mixer.state_dict())
    outputs_and_gradients(mixer, s)


def default_device(s):
    with torch.device("cpu:0"):
        mixer = s.build().double().eval()
        mixer.load_state_dict(s.mixer.state_dict())
        outputs_and_gradients(mixer, s)


def layouts(s):
    for x in (s.x.mT.contiguous().mT, torch.stack((s.x, s.x), -1)[..., 0], s.x[:1].expand(B, -1, -1)):
        y, expected = s.mixer(x.requires_grad_()), s.mixer(x.detach().contiguous())
        near(y, expected.detach())
    x = s.x.clone().requires_grad_()
    weight = s.weight.mT.contiguous().mT
    near(torch.autograd.grad(s.mixer(x), x, weight)[0], s.gradients[0])


def no_sequence(s):
    assert s.mixer(s.x[:0]).shape == (0, L, D)


def no_step(s):
    near(s.mixer(s.x[:, :0]), s.y[:, :0])


def one_step(s):
    with plain():
        expected = s.mixer(s.x[:, :1]).detach()
    near(s.mixer(s.x[:, :1]), expected)


COLUMNS = {
    "grad": by_grad,
    "vjp": by_vjp,
    "jvp": by_jvp,
    "jacrev": by_jacrev,
    "jacfwd": by_jacfwd,
    "vmap": by_vmap,
    "per-sample gradients": by_sample,
    "double backward": twice,
    "compile": compiled,
    "compiled autograd": compiled_backward,
    "export": exported,
    "FlopCounter": counted,
    "fake tensors": fake,
    "meta device": meta,
    "deepcopy": copied,
    "pickle": pickled,
    "DataParallel replica": replicated,
    "FSDP2": sharded,
    "checkpoint": checkpointed,
    "autocast bfloat16": partial(in_autocast, torch.bfloat16),
    "autocast float16": partial(in_autocast, torch.float16),
    "bfloat16": partial(in_half, torch.bfloat16),
    "float16": partial(in_half, torch.float16),
    "float64 by default": float64_by_default,
    "default device": default_device,
    "permuted, sliced, expanded": layouts,
    "B = 0": no_sequence,
    "L = 0": no_step,
    "L = 1": one_step,
}

# What is refused, and by which line.
REFUSED = {(name, "L = 0"): "must be floating-point (B, L ≥ 1, 4)" for name in MIXERS}
REFUSED |= {
    (name, "double backward"): "_scaled_dot_product_flash_attention_for_cpu_backward is not implemented"
    for name in ("attention", "attention, local")
}


def row(name):
    """(column, "right" or "refused: line" or "wrong: line") of one mixer."""
    s = Subject(name)
    for column, check in COLUMNS.items():
        torch.manual_seed(8)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(s)
            yield column, "right"
        except (AssertionError, WrongError) as error:
            yield column, f"wrong: {error}"
        except Exception as error:
            yield column, f"refused: {type(error).__name__}: {' '.join(str(error).split())}"


# One of each unit, and what has code of its own; the others are variants of these.
OF_UNITS = {"STU", "AR-STU, bidirectional", "STU-T", "S4", "S4D", "S5", "LRU", "Mamba-2", "GRU", "attention"}
ROWS = [name if name in OF_UNITS else pytest.param(name, marks=pytest.mark.thorough) for name in MIXERS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_right_or_refused(name):
    for column, found in row(name):
        line = REFUSED.get((name, column))
        assert found == "right" if line is None else found.startswith("refused") and line in found, (column, found)


def test_nine_in_ten_are_right():
    assert set(REFUSED) <= {(name, column) for name in MIXERS for column in COLUMNS}
    assert len(REFUSED) <= len(MIXERS) * len(COLUMNS) / 10


# PyTorch does not compile its own LSTM and GRU. Local attention has other blocks below 64 steps.
COMPILED = set(MIXERS) - {"LSTM", "GRU", "attention, local"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("S4", "S5", "STU", "Mamba-2") else pytest.param(n, marks=pytest.mark.thorough)
        for n in sorted(COMPILED)
    ],
)
def test_one_program_serves_all_lengths_and_layers(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    first, *layers = (MIXERS[name]().double() for _ in range(3))
    for layer in (first, *layers):
        layer.compile(backend=counter, dynamic=True, fullgraph=True)
    first(noise(2, 12, D).requires_grad_())
    one = counter.frame_count  # PyTorch may have begun twice
    for length in (12, 11, 7, 16, 9, 5):
        nn.Sequential(first, *layers)(noise(2, length, D).requires_grad_())
    other_algorithm = name == "S4"  # where L is large compared with N²
    assert counter.frame_count == one + other_algorithm


if __name__ == "__main__":
    rows = {name: dict(row(name)) for name in MIXERS}
    print("| | " + " | ".join(MIXERS) + " |\n" + "|---" * (len(MIXERS) + 1) + "|")
    for column in COLUMNS:
        print(f"| {column} | " + " | ".join(rows[name][column].split(":")[0] for name in MIXERS) + " |")
    for name, found in rows.items():
        for column, outcome in found.items():
            if outcome != "right":
                print(f"{name}, {column}: {outcome[:300]}")
