"""Compiled blocks: the same outputs, gradients and statistics as without, for every model, or refused in one line."""

import copy
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, multiprocessing
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stu import compilation
from stu.backbone import Backbone
from stu.cli.layers import of_one_mixer
from stu.errors import OptionError
from stu.training import Run
from tests import runs
from tests.distributed import compiled_and_not
from tests.models import MODELS, factory, small_backbone
from tests.test_backbone import Running
from tests.versions import newer_than_2_7

# What PyTorch's compiler warns of in its own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SEQ_LEN, D = 200, 8
RECURRENT = ("gru", "lstm")  # which PyTorch does not compile
COMPILED = [model for model in MODELS if model not in RECURRENT]
OF_OPERATORS = ("lru", "mamba2", "s4", "stu")  # with different operators; compiling takes seconds


@pytest.fixture(autouse=True)
def _no_programs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    """In the place of the compiler, for what takes no arithmetic to see: counts programs, and runs them as they are."""
    found = CompileCounterWithBackend("eager")
    program = torch.compile(compilation._whole, backend=found, fullgraph=True)
    with mock.patch.object(compilation, "_program", return_value=program):
        yield found


def both(model: str, **options: Any) -> tuple[Backbone, Backbone]:
    """A compiled model, and the same as it is."""
    fast = small_backbone(model, seq_len=SEQ_LEN, compile=True, **options)
    eager = factory(model, seq_len=SEQ_LEN, **options)()
    eager.load_state_dict(fast.state_dict())
    return fast, eager


def computed(model: Backbone, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Output, statistics of norms, and gradients where there are any; random numbers start at the same."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_(torch.is_grad_enabled())
    y = model(x, mask)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((y * weight).sum(), (x, *learned)) if torch.is_grad_enabled() else ()
    return [y.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


def assert_same(fast: Backbone, eager: Backbone, *inputs: Tensor | None, tolerance: float = 1e-5) -> None:
    for found, expected in zip(computed(fast, *inputs), computed(eager, *inputs), strict=True):
        scale = expected.abs().max().item() if expected.is_floating_point() else 0
        assert_close(found, expected, rtol=0, atol=tolerance * scale)


def ragged(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Sequences of many lengths, (B, L, D) and the mask of real positions."""
    return torch.randn(batch, length, D), torch.arange(length) < torch.randint(1, length, (batch, 1))


def marked(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.thorough] * (name not in OF_OPERATORS) + [newer_than_2_7] * (name == "s4")


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param(name, marks=marked(name)) for name in COMPILED])
def test_every_model_compiled_computes_the_same_by_one_program(model: str):
    shallow = {"depth": 1} if model in of_one_mixer() else {}
    fast, eager = (m.double() for m in both(model, causal=model not in ("stu", "lru"), dropout=0.25, **shallow))
    for batch, length in ((3, 120), (3, 71), (4, 199)):
        x, mask = ragged(batch, length)
        assert_same(fast, eager, x.double(), mask, tolerance=1e-10)
    # of hybrids one for each kind of layer; attention to a window has another one for sequences that fit into it
    assert counters["stats"]["unique_graphs"] == {"mamba2_attention": 2, "stu_attention": 3}.get(model, 1)


@pytest.mark.slow
def test_in_training_and_evaluation_in_any_precision():
    fast, eager = both("stu_t", causal=False, depth=1)
    x, _ = ragged(3, 50)
    assert_same(fast, eager, x, tolerance=1e-4)
    for model in (fast, eager):
        model.eval()
    with torch.inference_mode():
        assert_same(fast, eager, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(fast, eager, x, tolerance=0.02)
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.thorough
def test_in_two_processes(tmp_path: Path):
    multiprocessing.start_processes(compiled_and_not, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for found, expected in ranks:
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert_close(ranks[0][0], ranks[1][0])  # gradients and statistics are those of both


def test_equal_blocks_share_a_program_that_is_no_part_of_them(counter: CompileCounterWithBackend):
    fast, eager = both("stu_t", depth=3)
    assert fast.state_dict().keys() == eager.state_dict().keys()
    x, mask = ragged(3, 20)
    x.requires_grad_()  # as the outputs of all blocks but the first
    expected = eager(x, mask)
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_close(model(x, mask), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("length", [1, 2, 24])
def test_states_are_not_compiled(counter: CompileCounterWithBackend, length: int):
    fast, eager = both("stu_t")
    x, _ = ragged(2, 24)
    y, state = fast.eval().prefill(x[:, :length])
    after = [y]
    for t in range(length, 24):
        y, state = fast.step(x[:, t], state)
        after.append(y.unsqueeze(1))
    assert_close(torch.cat(after, 1), eager.eval()(x))
    assert counter.frame_count == 0


@newer_than_2_7
def test_what_takes_operations_apart_sees_them(counter: CompileCounterWithBackend):
    fast, eager = both("stu_t", norm="layer")
    x, _ = ragged(2, 20)
    parameters = {name: p.detach() for name, p in fast.named_parameters()}

    def gradients(model: Backbone) -> Any:
        return grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters)

    def flops(model: Backbone) -> int:
        with FlopCounterMode(display=False) as mode:
            model(x).sum().backward()
        return mode.get_total_flops()

    assert_close(gradients(fast), gradients(eager))
    assert_close(vmap(lambda one: fast(one.unsqueeze(0)).squeeze(0))(x), eager(x))
    assert_close(jvp(fast, (x,), (x,)), jvp(eager, (x,), (x,)))
    assert flops(fast) == flops(eager) > 0
    assert_close(torch.export.export(fast, (x,), strict=False).module()(x), eager(x))
    assert copy.deepcopy(fast).to("meta")(x.to("meta")).shape == x.shape
    assert counter.frame_count == 0
    # and none of this is in the way of programs
    assert_close(checkpoint(fast, x.requires_grad_(), use_reentrant=False), eager(x))
    assert counter.frame_count == 1


def test_wrong_inputs_are_refused_in_the_same_words(counter: CompileCounterWithBackend):
    models = both("stu_t", norm="layer")
    for inputs in ((torch.randn(2, SEQ_LEN + 1, D),), (torch.randn(2, 20, D), torch.ones(2, 20))):
        lines = []
        for model in models:
            with pytest.raises(OptionError) as refused:
                model(*inputs)
            lines.append(str(refused.value))
        assert lines[0] == lines[1]


class Breaking(Running):
    """A mixer that no program holds whole."""

    def forward(self, x, mask=None):
        torch._dynamo.graph_break()
        return x


def test_what_cannot_be_compiled_whole_is_refused(counter: CompileCounterWithBackend):
    backbone = Backbone(D, depth=1, mixer=Breaking, channel_mixer=None, compile=True)
    with pytest.raises(
        OptionError, match=r"^compile=True: must be false, as PyTorch cannot compile this: .+"
    ) as refused:
        backbone(torch.randn(2, 5, D))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("model", RECURRENT)
def test_recurrent_networks_of_pytorch_are_refused(model: str):
    with pytest.raises(OptionError, match=r"^compile=True: must be false: PyTorch does not compile its LSTM and GRU$"):
        factory(model, seq_len=SEQ_LEN)(compile=True)
    factory(model, seq_len=SEQ_LEN)(compile=False)


def test_without_a_compiler_or_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    build = factory("stu_t", seq_len=SEQ_LEN)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(OptionError, match=r"^compile=True: needs a C\+\+ compiler"):
            build(compile=True)
        build(compile=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        build(compile=True)


def without_a_compiler() -> None:
    """At the start of a process."""
    torch._inductor.config.cpp.cxx = ("no-such-compiler",)


@pytest.mark.thorough
@pytest.mark.e2e
def test_a_run_goes_on_with_and_without(tmp_path: Path):
    small = runs.small("task=lra_listops", "model=transformer", "name=it", "trainer.detect_anomaly=true")
    at = runs.signalled(signal.SIGTERM, "stu.training.module:SequenceModule.training_step", 12)
    stopped = runs.train(tmp_path, *small, "model.compile=true", at=at)
    assert (stopped.code, stopped.err) == (128 + signal.SIGTERM, "")
    run: Run = runs.run_of(tmp_path, "lra_listops", "transformer", "it")
    assert 0 < run.last_step < 20
    # where there is no compiler, it is refused in one line, and goes on without
    refused = runs.train(tmp_path, *small, "model.compile=true", at=without_a_compiler)
    assert refused.code == 2
    assert refused.err.startswith("error: model.compile=True: needs a C++ compiler")
    for overrides in ((), ("mode=test",)):
        done = runs.train(tmp_path, *small, *overrides, at=without_a_compiler)
        assert (done.code, done.err) == (0, "")
    keys = torch.load(run.last, weights_only=True)["state_dict"]
    assert not [key for key in keys if "_orig_mod" in key]
