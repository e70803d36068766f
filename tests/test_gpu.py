"""On a CUDA device: every mixer against the CPU, and a run that never waits for the device outside logging steps."""

import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from experiments.speed.launches import count
from stu.mixer import Mixer
from stu.mixers.attention import Attention
from stu.training.plan import set_matmul_precision
from tests import runs
from tests.models import Case, mixer_cases

LENGTH = 130
WIDTH = 32

gpu = pytest.mark.gpu
mixers = pytest.mark.parametrize("case", mixer_cases(), ids=str)
# Relative to the largest entry: of sums in another order in float32, of rounding to bfloat16 in between.
precisions = pytest.mark.parametrize(
    ("autocast", "tolerance"), [(False, 1e-4), (True, 4e-2)], ids=["float32", "bf16-autocast"]
)
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    """Matrix products in float32, not in TF32; and no deterministic algorithms, which some CUDA operations lack."""
    torch.use_deterministic_algorithms(False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_matmul_precision("highest", on_gpu=True)
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def pair(case: Any) -> tuple[Mixer, Mixer]:
    """The same mixer on the CPU and on the device."""
    options = {"d_model": WIDTH, "seq_len": LENGTH, "dtype": torch.float32}
    on_cpu = case.random(**options)
    on_device = case.random(**options)
    on_device.load_state_dict(on_cpu.state_dict())
    return on_cpu, on_device.cuda()


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    error = (found.float().cpu() - expected.float()).abs().max()
    assert error <= tolerance * expected.abs().max(), f"{what}: {error} of {expected.abs().max()}"


@gpu
@needs_device
@mixers
@precisions
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_forward_and_backward_are_those_of_the_cpu(case: Any, autocast: bool, tolerance: float, padded: bool):
    on_cpu, on_device = pair(case)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 77])[:, None] if padded else None
    keep = torch.ones(2, LENGTH, 1) if mask is None else mask.unsqueeze(-1).float()
    x, weight = torch.randn(2, LENGTH, WIDTH), torch.randn(2, LENGTH, WIDTH) * keep
    results = []
    for mixer, device in ((on_cpu, "cpu"), (on_device, "cuda")):
        inputs = x.to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast and device == "cuda"):
            y = mixer(inputs, None if mask is None else mask.to(device))
        gradients = torch.autograd.grad((y.float() * weight.to(device)).sum(), (inputs, *mixer.parameters()))
        results.append([(y * keep.to(device)).detach(), *gradients])
    names = ["output", "gradient of the input", *(f"gradient of {name}" for name, _ in on_cpu.named_parameters())]
    scale = (0.1 if autocast else 0.05) * max(gradient.abs().max() for gradient in results[0][1:])
    for name, expected, found in zip(names, *results, strict=True):
        # some gradients nearly cancel: those are compared with the largest
        floor = 0.0 if name == "output" else scale
        error = (found.float().cpu() - expected).abs().max()
        assert error <= tolerance * max(expected.abs().max(), floor), f"{name}: {error} of {expected.abs().max()}"


@gpu
@needs_device
@mixers
@precisions
@torch.no_grad()
def test_steps_and_prefill_are_those_of_the_cpu(case: Any, autocast: bool, tolerance: float):
    on_cpu, on_device = pair(case)
    if not on_cpu.causal:
        pytest.skip("runs in both directions, so not step by step")
    x = torch.randn(2, 20, WIDTH)
    expected = on_cpu(x)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        prefix, state = on_device.prefill(x[:, :12].cuda())
        steps = [prefix]
        for x_t in x[:, 12:].cuda().unbind(1):
            y_t, state = on_device.step(x_t, state)
            steps.append(y_t.unsqueeze(1))
        first, _ = on_device.step(x[:, 0].cuda(), on_device.initial_state(2))
    assert_near(torch.cat(steps, 1), expected, tolerance, "prefill and steps")
    assert_near(first, expected[:, 0], tolerance, "the first step")
    tree_map_only(Tensor, lambda tensor: tensor.is_cuda or pytest.fail("a state that is not on the device"), state)


@gpu
@needs_device
@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("window", [None, 6])
@torch.no_grad()
def test_steps_of_attention_replay_as_a_graph(positions: Any, window: int | None):
    case = Case("", lambda *, seq_len, d_model: Attention(d_model, positions=positions, window=window))
    on_cpu, on_device = pair(case)
    x = torch.randn(2, 20, WIDTH)
    expected, x_t = on_cpu(x), x[:, 4].cuda()
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    expected[1] = torch.cat((expected[1, :4], on_cpu(torch.cat((x[1:, :2], x[1:, 4:]), 1))[0, 2:]))
    state = on_device.reserve(on_device.prefill(x[:, :4].cuda(), mask.cuda())[1], 16)
    _, state = on_device.step_(x_t, state)  # lets libraries allocate what they need
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = on_device.step_(x_t, state)
    for t in range(5, 20):
        x_t.copy_(x[:, t])
        graph.replay()
        assert_near(y, expected[:, t], 1e-4, f"step {t}")


@gpu
@needs_device
def test_launches_are_the_kernels_of_the_device():
    x = torch.randn(8, 8, device="cuda")

    def call() -> None:
        (x.T.unsqueeze(0)[:, 1:] + 1).sin()
        torch.cuda.synchronize()

    call()
    assert count(call, x.device) == 2


# --- host synchronisation ---


def check_synchronisation(switch: Callable[[str], None], log_every: int) -> None:
    """Make every step from its batch on the device to its end an error if it synchronises, unless it is logged."""
    from stu.training import MetricsLog

    def watched(method: Callable[..., None], mode: str) -> Callable[..., None]:
        @wraps(method)
        def wrapped(self: Any, trainer: Any, *arguments: Any) -> None:
            if mode == "default":
                switch(mode)
            method(self, trainer, *arguments)
            if mode == "error" and (trainer.global_step + 1) % log_every:
                switch(mode)

        return wrapped

    MetricsLog.on_train_batch_start = watched(MetricsLog.on_train_batch_start, "error")  # type: ignore[method-assign]
    MetricsLog.on_train_batch_end = watched(MetricsLog.on_train_batch_end, "default")  # type: ignore[method-assign]


def write_down(file: Path, log_every: int) -> None:
    """The same on a CPU, where nothing synchronises: the switches are written to a file."""

    def switch(mode: str) -> None:
        with file.open("a") as lines:
            lines.write(f"{mode}\n")

    check_synchronisation(switch, log_every)


def watch_device(log_every: int) -> None:
    """On the device."""
    warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
    check_synchronisation(torch.cuda.set_sync_debug_mode, log_every)


STEPS = ("trainer.max_steps=20", "trainer.max_epochs=null", "trainer.val_check_interval=20.0", "log_every=10")


@gpu
@needs_device
@pytest.mark.e2e
@pytest.mark.parametrize("task", ["lds", "lra_listops", "mqar"])
@pytest.mark.parametrize("model", ["stu", "stu_ar", "s5", "transformer"])
@pytest.mark.parametrize("resident", ["true", "false"])
def test_a_run_does_not_wait_for_the_device(task: str, model: str, resident: str, tmp_path: Path):
    chosen = f"task={task}", f"model={model}", f"loader.device_resident={resident}", "name=run"
    options = [o for o in runs.small(*chosen, *STEPS) if o != "trainer=cpu"]
    done = runs.train(tmp_path, *options, "trainer=gpu", at=partial(watch_device, 10))
    assert (done.code, done.err) == (0, "")
    assert runs.run_of(tmp_path, task, model, "run").read_summary()["steps"] == 20


@pytest.mark.slow
@pytest.mark.e2e
def test_the_check_covers_every_step_that_is_not_logged(tmp_path: Path):
    file = tmp_path / "switches"
    options = runs.small("task=lds", "model=stu", "name=run", *STEPS)
    done = runs.train(tmp_path, *options, at=partial(write_down, file, 10))
    assert (done.code, done.err) == (0, "")
    assert file.read_text().split() == 2 * (9 * ["error", "default"] + ["default"])
