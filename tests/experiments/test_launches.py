"""Launches: what counts as one, the limits of every layer, and the command."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from experiments.speed import launches
from experiments.speed.launches import VARIANTS, count, main
from stu.cli.layers import of_one_mixer
from stu.mixers.stu_t import STUT
from stu.ops.forms import taken_for
from tests.experiments.commands import assert_refused

CPU = torch.device("cpu")

# Forward, and with backward, of the forms for devices, at any length.
LIMITS = {
    "stu": (15, 40),
    "stu:two_sided=false": (15, 40),
    "stu:two_sided=false,causal=false": (20, 50),
    "stu_t": (20, 50),
    "stu_ar": (60, 140),
    "s4d": (30, 80),
    "s4d_dfout": (40, 100),
    "s4": (60, 160),
    "s5": (60, 150),
    "lru": (60, 150),
    "linoss": (75, 150),
    "linoss:discretization=imex,damping=true": (75, 170),
    "mamba2": (60, 180),
    "gated_deltanet": (90, 260),
    "mega:chunk_size=256": (75, 200),
}


@pytest.fixture(autouse=True)
def _memory_is_not_filled() -> None:
    """Deterministic algorithms fill new memory, which is a launch."""
    torch.use_deterministic_algorithms(False)


def counted(mixer: str, length: int) -> tuple[int, int]:
    with taken_for("cuda"):
        [row] = launches.counted([mixer], [length], batch=2, width=8, device="cpu")
    assert row[:2] == (mixer, length)
    return row.forward, row.both


# --- the limits ---


@pytest.mark.parametrize("length", [pytest.param(1024, marks=pytest.mark.thorough), 16384])
@pytest.mark.parametrize("mixer", LIMITS)
def test_a_layer_launches_no_more_than_its_limit(mixer, length):
    found, limits = counted(mixer, length), LIMITS[mixer]
    assert all(ours <= limit for ours, limit in zip(found, limits, strict=True)), f"{found} launches, at most {limits}"


def test_a_loop_over_the_sequence_exceeds_the_limit(monkeypatch):
    forward = STUT.forward

    def in_a_loop(self, x, mask=None):
        return torch.cat([2 * block for block in forward(self, x, mask).split(32, dim=1)], 1)

    plain = counted("stu_t", 1024)
    monkeypatch.setattr(STUT, "forward", in_a_loop)
    looped = counted("stu_t", 1024)
    assert looped[0] == plain[0] + 32 + 1  # 32 products and cat
    assert looped[1] >= plain[1] + 2 * 32 + 1
    assert all(found > limit for found, limit in zip(looped, LIMITS["stu_t"], strict=True))
    assert counted("stu_t", 2048)[0] == plain[0] + 64 + 1


# --- what is counted ---


@torch.library.custom_op("launches_test::three", mutates_args=())
def _three(x: torch.Tensor) -> torch.Tensor:
    return (x.T.exp() + 1).sin()


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("call", "launched"),
    [
        (lambda: X.T.view(6, 2, 2).flatten().unflatten(0, (4, 6))[1:, None].expand(3, 5, 6).detach(), 1),  # the copy
        (lambda: X.unsqueeze(0).permute(2, 0, 1).narrow(0, 1, 2).squeeze().split(1), 0),
        (lambda: torch.view_as_complex(X.view(4, 3, 2)).real.mT.unbind(), 0),
        (lambda: X.contiguous().reshape(24).to(torch.float32), 0),
        (lambda: X.T.contiguous(), 1),
        (lambda: X.to(torch.float64), 1),
        (lambda: (torch.empty(3), torch.empty_like(X), X.new_empty(2), torch.empty_strided((2,), (1,))), 0),
        (lambda: (torch.zeros(3), torch.ones(3), torch.arange(3)), 3),
        (lambda: (X.shape, X.is_complex(), torch.result_type(X, 1), X[0, 0].item()), 0),
        (lambda: X + 1, 1),
        (lambda: X.clone().add_(1), 2),
        (lambda: torch.sin(X, out=torch.empty(4, 6)), 1),
        (lambda: X @ X.T, 1),
        (lambda: torch.einsum("bi,bj->bij", X, X), 1),
        (lambda: torch.einsum("abi,abj->aij", X.view(2, 2, 6), X.view(2, 2, 6)), 1),
        (lambda: nn.functional.linear(X, X, torch.zeros(4)), 2),
        (lambda: torch.cat([X, X]), 1),
        (lambda: torch.fft.rfft(X), 1),
        (lambda: torch.softmax(X, 1), 1),
        (lambda: torch.ops.aten.silu_backward(X, X), 1),
        (lambda: _three(X), 3),
        (lambda: [X.add(i) for i in range(50)], 50),
    ],
)
def test_what_writes_tensors_is_counted_once(call, launched):
    call()
    assert count(call, CPU) == launched


def test_the_backward_pass_is_counted_too():
    x = X.clone().requires_grad_()

    def both():
        torch.autograd.grad(x.sin().cos(), x, torch.ones(4, 6))

    # sin and cos; ones; of cos: sin, neg and mul; of sin: cos and mul
    assert count(both, CPU) == 2 + 1 + 3 + 2


def test_on_a_cuda_device_kernels_are_counted(monkeypatch):
    kinds = [(DeviceType.CPU, False), (DeviceType.CUDA, False), (DeviceType.CUDA, True), (DeviceType.CUDA, False)]
    events = [
        SimpleNamespace(device_type=lambda kind=kind: kind, is_user_annotation=lambda mark=mark: mark)
        for kind, mark in kinds
    ]
    asked = []

    class Profiled:
        def __init__(self, activities):
            asked.extend(activities)
            self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(launches, "profile", Profiled)
    assert count(lambda: None, torch.device("cuda:0")) == 2
    assert asked == [torch.profiler.ProfilerActivity.CUDA]


# --- the command ---


@pytest.mark.slow
def test_the_command_prints_every_mixer(capfd):
    arguments = ["--form", "cuda", "--lengths", "128", "64"]
    assert main([*arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    rows = json.loads(out)
    assert err == ""
    mixers = [*VARIANTS, *of_one_mixer()]
    assert [(row["mixer"], row["length"]) for row in rows] == [
        (mixer, length) for mixer in mixers for length in (64, 128)
    ]
    assert all(list(row) == ["mixer", "length", "forward", "both"] for row in rows)
    assert all(0 < row["forward"] < row["both"] for row in rows)
    assert main([*arguments, "--models", "stu_t"]) == 0
    [own] = [row for row in rows if row["mixer"] == "stu_t" and row["length"] == 64]
    assert re.search(rf"stu_t .* {own['forward']} / {own['both']} ", capfd.readouterr().out)


def test_rows_go_to_a_file(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main(["--models", "transformer", "--lengths", "16", "--json", str(file)]) == 0
    assert capsys.readouterr().out == ""
    [row] = json.loads(file.read_text())
    assert (row["mixer"], row["length"]) == ("transformer", 16)


def test_the_form_is_that_of_the_device_unless_given(monkeypatch):
    asked = []
    monkeypatch.setattr(launches, "taken_for", lambda form: asked.append(form) or taken_for(form))
    monkeypatch.setattr(launches, "counted", lambda *_, **__: [])
    assert [main(["--device", "cpu"]), main(["--device", "cpu", "--form", "cuda"])] == [0, 0]
    assert asked == ["cpu", "cuda"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "foo"], "error: --models=foo: no such model; choose from literal, "),
        (["--models", "stu:two_sided=maybe"], "error: model.mixer.two_sided=maybe: must be true or false"),
        (["--device", "foo"], "error: --device=foo: must be auto, cpu, "),
        (["--form", "gpu"], "python -m experiments.speed.launches: error: argument --form: invalid choice: 'gpu'"),
        (["--lengths", "0"], "python -m experiments.speed.launches: error: argument --lengths: 0: must be a whole"),
        (["--width", "x"], "python -m experiments.speed.launches: error: argument --width: x: must be a whole"),
        (["--models", "stu_t", "--lengths", "16"], "error: num_filters=24: must be in 1 … "),
        (
            ["--models", "transformer", "--lengths", "8", "--json", "/dev/null/a"],
            "error: --json=/dev/null/a: cannot be",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_commands_are_refused_in_one_line(arguments, message, capsys):
    assert_refused(main, arguments, message, capsys)
