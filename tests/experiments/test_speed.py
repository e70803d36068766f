"""The benchmark: its candidates, how it measures; its command, table and file."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from experiments.speed import candidates, compiled, generation, measure, report, roofline, run
from experiments.speed.__main__ import main
from experiments.speed.bench import STREAMED, Bench, Data, Settings
from experiments.speed.candidates import Size
from experiments.speed.launches import Launches
from experiments.speed.literal import LiteralSTU, literal_stu
from experiments.speed.measure import Facts, Failure, alone, interleaved
from experiments.speed.results import Results, Row, Timing
from experiments.speed.roofline import Peak, Work, least_work
from stu import STU
from stu.cli.layers import of_one_mixer
from stu.errors import OptionError
from tests.experiments.commands import assert_refused
from tests.models import randomized

ROOT = Path(__file__).resolve().parents[2]
TINY = Size(length=12, batch=2, width=4, filters=3)
SETTINGS = Settings(min_seconds=1e-3, repeats=2, limit_seconds=60.0, limit_bytes=2e9)


@pytest.fixture(autouse=True, scope="module")
def _composed_once():
    """Composing a model takes longer than most of what is done with it here."""
    once = cache(candidates._composed)
    with mock.patch.object(candidates, "_composed", lambda *choice: once(*choice).copy()):
        yield


# --- the literal STU ---


def test_the_literal_stu_survives_autocast():
    stu = partial(STU, seq_len=64, num_filters=6, k_y=2, recurrence="fixed")
    literal, u = randomized(literal_stu(8, stu)), torch.randn(2, 64, 8)
    exact = literal(u)
    with torch.autocast("cpu", torch.bfloat16):
        y = literal(u)
    assert (y.float() - exact).norm() < 0.03 * exact.norm()


# --- which layers are measured ---


def test_every_model_takes_part_and_the_literal_stu():
    assert candidates.allowed() == ["literal", *of_one_mixer()]


def test_options_of_a_mixer_win_over_the_size():
    plain, changed = candidates.find(["stu", "stu:num_filters=2,two_sided=false"], causal=True, size=TINY)
    assert plain.node(TINY)["num_filters"] == 3
    node = changed.node(TINY)
    assert (node["num_filters"], node["two_sided"], node["seq_len"]) == (2, False, 12)
    assert plain.node(TINY._replace(filters=None))["num_filters"] == 24  # what conf/model/stu.yaml says
    assert candidates.build(node, 4).m_phi.shape == (2, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_the_literal_stu_takes_the_options_of_the_fast_one(causal):
    names = ["literal", "stu", "literal:k_y=2,recurrence=learned", "stu:k_y=2,recurrence=learned"]
    mixers = [candidates.build(c.node(TINY), 4) for c in candidates.find(names, causal=causal, size=TINY)]
    for literal, fast in zip(mixers[::2], mixers[1::2], strict=True):
        assert type(literal) is LiteralSTU
        assert literal.causal == fast.causal == causal
        literal.layer.load_state_dict(fast.state_dict())
        x = torch.randn(2, 12, 4)
        assert_close(literal(x), fast(x), rtol=0, atol=1e-5)


def test_of_a_model_that_cycles_mixers_each_takes_part(monkeypatch):
    config = candidates._composed("stu", True)
    mixer = config.model.mixer
    config.model.mixer = [mixer, {**mixer, "two_sided": False}]
    monkeypatch.setattr(candidates, "_composed", lambda *_: config)
    found = candidates.find(["stu:1.num_filters=2"], causal=True, size=TINY)
    assert [candidate.name for candidate in found] == ["stu:1.num_filters=2.0", "stu:1.num_filters=2.1"]
    assert [len(candidates.build(candidate.node(TINY), 4).m_phi) for candidate in found] == [6, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foo", "--models=foo: no such model; choose from literal, "),
        ("stu:two_sided", "--models=stu:two_sided: two_sided must be KEY=VALUE"),
        ("stu:two_sided=maybe", r"model\.mixer\.two_sided=maybe: must be true or false"),
        (
            "literal:algorithm=features",
            "--models=literal:algorithm=features: algorithm is no option of the literal STU",
        ),
        ("literal:two_side=true", r"model\.mixer\.two_side=True: no such key; did you mean two_sided\?"),
        ("stu:num_filters={", "--models=stu:num_filters=.: cannot be understood"),
    ],
)
def test_impossible_names_are_refused(name, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        candidates.find(["stu", name], causal=True, size=TINY)


# --- how it is measured ---


class Odd(nn.Module):
    """Does something odd with more than 8 steps, where memory is measured, or with a gradient only."""

    causal = True

    def __init__(self, d_model: int, *, how: str, training_only: bool = False) -> None:
        super().__init__()
        self.how, self.training_only = how, training_only
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, x):
        if x.shape[1] > 8 and (self.training or not self.training_only):
            if self.how.startswith("sleeps"):
                with suppress(OSError if self.how == "sleeps through errors" else ()):
                    time.sleep(60)
            elif self.how == "crashes":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif self.how == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            elif self.how == "fails":
                raise RuntimeError("no\n such luck")
            else:
                torch.ones(int(self.how), dtype=torch.uint8)
        return x * self.weight


def odd(how, **options):
    return {"_target_": f"{Odd.__module__}.Odd", "_partial_": True, "how": how, **options}


def stu_node():
    return candidates.find(["stu"], causal=True, size=TINY)[0].node(TINY)


@pytest.mark.parametrize("way", [measure._in_process, measure._in_subprocess])
def test_a_mixer_alone(way):
    outcomes = way(stu_node(), TINY, SETTINGS, measure.STAGES)
    assert list(outcomes) == ["build", "forward", "step", "forward_backward", "launches"]
    facts, launches = outcomes.pop("build"), outcomes.pop("launches")
    assert 0 < launches.forward < launches.both < 1000
    assert (facts.parameters, facts.causal, facts.streams) == (9 * 16, True, True)
    assert all(isinstance(peak, int) and 0 <= peak < 3e7 for peak in outcomes.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "seconds"), [(measure._in_process, 1.0), (measure._in_subprocess, 3.0)], ids=["in_process", "in_subprocess"]
)
@pytest.mark.parametrize(
    ("how", "reason", "limit"),
    [
        ("sleeps", "over {} s", True),
        pytest.param("sleeps through errors", "over {} s", True, marks=pytest.mark.thorough),
        ("3000000000", "over 2 GB", True),
        pytest.param("out of memory", "out of memory, of at most 2 GB", True, marks=pytest.mark.thorough),
        ("fails", "RuntimeError: no such luck", False),
        ("crashes", "died of SIGSEGV", False),
    ],
)
def test_failures_are_reported(way, seconds, how, reason, limit):
    if way is measure._in_process and how == "crashes":
        return
    outcomes = way(odd(how), TINY, replace(SETTINGS, limit_seconds=seconds), measure.STAGES)
    assert isinstance(outcomes["build"], Facts)
    assert outcomes["forward"] == Failure(reason.format(f"{seconds:g}"), limit)
    assert "forward_backward" not in outcomes


def test_backward_may_fail_alone():
    outcomes = alone(odd("3000000000", training_only=True), TINY, SETTINGS)
    assert isinstance(outcomes["forward"], int)
    assert outcomes["step"] is None  # not a mixer of ours: it does not stream
    assert outcomes["forward_backward"] == outcomes["launches"] == Failure("over 2 GB", True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_of_memory_is_what_the_call_takes():
    outcomes = alone(odd("100000000"), TINY, SETTINGS)
    assert outcomes["forward"] == pytest.approx(1e8, rel=0.05)
    assert outcomes["forward_backward"] == pytest.approx(1e8, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_peak_is_not_that_of_an_earlier_call():
    device = torch.device("cpu")
    for size in (3 * 10**8, 10**8):
        held = measure._used_memory(device)
        peak = measure._peak_memory(lambda size=size: torch.ones(size, dtype=torch.uint8), device, held)
        assert peak == pytest.approx(size, rel=0.05)


def test_calls_are_interleaved(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def lasting(name, *seconds):
        durations = iter(seconds)

        def call():
            order.append(name)
            clock[0] += next(durations, seconds[-1])

        return call

    def failing():
        order.append("failing")
        if order.count("failing") == 2:
            raise ValueError("the second time")

    calls = {"a": lasting("a", 9, 1, 3, 2), "b": lasting("b", 6), "failing": failing, "slow": lasting("slow", 50)}
    timings, failures = interleaved(calls, min_seconds=10, repeats=3)
    # a warm-up each; then a until it has had ten seconds, b three times, slow twice, which is a hundred seconds
    assert order == ["a", "b", "failing", "slow"] * 2 + ["a", "b", "slow"] + ["a", "b"] + ["a", "a"]
    assert timings == {"a": Timing(2, 1, 2, 5), "b": Timing(6, 6, 6, 3), "slow": Timing(50, 50, 50, 2)}
    assert str(failures["failing"]) == "the second time"


@pytest.mark.slow
def test_what_exceeded_a_limit_is_not_tried_at_greater_lengths(monkeypatch):
    asked = []

    def alone(node, size, settings, skip):
        asked.append((size.length, sorted(skip)))
        failure = Failure("over 1 GB", True) if size.length >= 4 else Failure("K", False) if size.length == 2 else 1
        return {"build": Facts(0, True, True, None, None), "forward": 1, "step": None, "forward_backward": failure}

    monkeypatch.setattr(measure, "alone", alone)
    found = candidates.find(["transformer"], causal=True, size=TINY)
    sizes = [TINY._replace(length=length) for length in (2, 3, 4, 5, 6)]
    rows = [row for rows in measure.measure(found, sizes, SETTINGS, lambda _: None) for row in rows]
    assert asked == [(2, []), (3, []), (4, []), (5, ["forward_backward"]), (6, ["forward_backward"])]
    failures = [row.failures.get("forward_backward") for row in rows]
    assert failures == ["K", None, "over 1 GB", *["over 1 GB already at L = 4"] * 2]
    assert [row.forward_backward is None for row in rows] == [True, False, True, True, True]
    assert all(row.forward for row in rows)
    skipped = measure.measure(found, sizes[-1:], SETTINGS, lambda _: None)
    assert next(skipped)[0].failures == {"forward_backward": "over 1 GB"}  # each run starts over


def test_after_a_failed_forward_pass_all_has_failed(monkeypatch):
    failure = Failure("over 1 GB", True)
    monkeypatch.setattr(
        measure, "_in_subprocess", lambda *_: {"build": Facts(0, True, True, None, None), "forward": failure}
    )
    outcomes = alone(stu_node(), TINY, SETTINGS)
    assert [outcomes[stage] for stage in ("forward", "step", "forward_backward", "launches")] == [failure] * 4
    assert alone(stu_node(), TINY, SETTINGS, skip={"forward": failure}) == {}


# --- on a device, as far as a CPU can tell ---


@pytest.fixture
def in_process(monkeypatch):
    """As on a device, whose memory then has been given back once or more."""
    freed = []
    monkeypatch.setattr(measure, "_in_subprocess", measure._in_process)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    return freed


def measured(lengths):
    """All models at these lengths: their failures, and those whose times are known, by length."""
    found = candidates.find(["transformer", "stu_t"], causal=True, size=TINY)
    sizes = [TINY._replace(length=length) for length in lengths]
    rows = [row for rows in measure.measure(found, sizes, SETTINGS, lambda _: None) for row in rows]
    assert all(row.forward and row.forward_backward and row.launches for row in rows if row.model == "stu_t")
    return [row for row in rows if row.model == "transformer"]


def exhausted(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        pytest.param("__init__", "build", marks=pytest.mark.thorough),
        ("warm_up", "build"),
        pytest.param("_forward", "forward", marks=pytest.mark.thorough),
        pytest.param("_step", "step", marks=pytest.mark.thorough),
        ("_forward_backward", "forward_backward"),
    ],
)
def test_a_device_out_of_memory_ends_one_mixer_at_this_and_greater_lengths(method, stage, monkeypatch, in_process):
    reached, original = [], getattr(Bench, method)

    def limited(self, *arguments):
        node, data = (arguments[0], arguments[1]) if method == "__init__" else (None, self.data)
        name = node["_target_"] if node else type(self.mixer).__name__
        length = data.x.shape[1]
        if name.endswith("Attention") and length > (12 if method in ("__init__", "warm_up") else 8):
            reached.append(length)
            exhausted()
        return original(self, *arguments)

    monkeypatch.setattr(Bench, method, limited)
    first, second, third = measured([12, 13, 14] if method in ("__init__", "warm_up") else [8, 13, 14])
    assert first.failures == {}
    assert second.failures[stage] == "out of memory, of at most 2 GB"
    assert third.failures[stage] == "out of memory, of at most 2 GB already at L = 13"
    assert (second.forward is None) == (stage in ("build", "forward"))
    assert second.forward_backward is None or stage == "step"
    assert reached == [13]
    assert len(in_process) == 3 + 1  # after every size, and after the failure


@pytest.mark.parametrize("stage", ["forward", "forward_backward"])
def test_a_device_out_of_memory_in_company_ends_one_mixer(stage, monkeypatch, in_process):
    original = measure.interleaved

    def crowded(calls, **options):
        calls = {key: exhausted if key == ("transformer", stage) else call for key, call in calls.items()}
        return original(calls, **options)

    monkeypatch.setattr(measure, "interleaved", crowded)
    first, second = measured([12, 13])
    assert first.failures == {stage: "out of memory, of at most 2 GB"}
    assert second.failures[stage] == "out of memory, of at most 2 GB already at L = 12"
    assert len(in_process) == 2 + 1


def test_a_device_without_memory_for_the_data_times_nothing(monkeypatch, in_process):
    original, alone = Data.draw, [True]
    monkeypatch.setattr(Data, "draw", lambda *arguments: original(*arguments) if alone else exhausted())
    timed = measure._timed
    monkeypatch.setattr(measure, "_timed", lambda *arguments: (alone.clear(), timed(*arguments))[1])
    found = candidates.find(["transformer"], causal=True, size=TINY)
    [[row]] = measure.measure(found, [TINY], SETTINGS, lambda _: None)
    assert row.forward is row.step is row.forward_backward is None
    assert set(row.failures.values()) == {"out of memory, of at most 2 GB"}


def test_what_a_failed_call_computed_is_freed(in_process):
    computed = []

    def failing():
        activations = torch.ones(1000)
        computed.append(weakref.ref(activations))
        exhausted()

    _, failures = interleaved({"failing": failing}, min_seconds=1e-3, repeats=1)
    assert isinstance(failures["failing"], torch.OutOfMemoryError)
    assert computed[0]() is None
    assert in_process


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"]
)
def test_libraries_run_out_of_memory_in_their_own_words(message):
    assert measure._failure(RuntimeError(message), SETTINGS) == Failure("out of memory, of at most 2 GB", True)


def test_memory_of_a_device_is_counted_by_its_allocator(monkeypatch):
    device, calls = torch.device("cuda:0"), []
    monkeypatch.setattr(measure, "_status", lambda _: pytest.fail("that of the process"))
    monkeypatch.setattr(measure, "memory_of", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 350)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: calls.append(share))
    before = measure._used_memory(device)
    with measure._memory_limit(400, device):
        assert measure._peak_memory(lambda: calls.append("call"), device, before) == 250
    assert calls == [0.5, "reset", "call", 1.0]


def test_without_memory_for_the_peak_there_is_no_roofline(monkeypatch, quick, tmp_path, capsys):
    monkeypatch.setattr(roofline, "_measured_peak", exhausted)
    monkeypatch.setattr(run, "measured_peak", roofline.measured_peak)
    assert main([*quick, "--models", "stu:num_filters=1", "--out", str(tmp_path)]) == 0
    assert "peak of the device: not measured, out of memory\n" in capsys.readouterr().out
    found = Results.read(tmp_path)
    assert found.peak is None
    assert all(row.forward and found.derived(row)["floor_share"] is None for row in found.rows)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 12, 100])
def test_streaming_goes_over_the_end_of_the_sequence(length):
    size = TINY._replace(length=length, filters=1)
    bench = Bench(candidates.find(["stu"], causal=True, size=size)[0].node(size), Data.draw(size, SETTINGS), SETTINGS)
    steps, step = [], bench.mixer.step

    def spied(x, state):
        t = state.position
        assert torch.equal(x, bench.data.x[:, t])
        steps.append(t)
        return step(x, state)

    bench.mixer.step = spied
    for _ in range(70):
        bench.call("step")()
    last = list(range(length - min(STREAMED, (length + 1) // 2), length))
    assert steps == (last * 70)[:70]


def test_no_parameter_is_zero_when_time_is_taken():
    bench = Bench(stu_node(), Data.draw(TINY, SETTINGS), SETTINGS)
    assert not STU(4, seq_len=12, num_filters=3, k_y=0).m_phi.any()
    assert all(parameter.all() for parameter in bench.mixer.parameters())


def test_the_least_work():
    stu = STU(4, seq_len=12, num_filters=3, k_y=2, recurrence="learned")
    parameters = (6 + 3 + 2) * 16
    products = 8 * 2 * 13 * 16 + 2 * 2 * 2 * 12 * 16
    transforms = 2 * 2 * 4 * 2.5 * 24 * math.log2(24)
    numbers = 2 * 2 * 12 * 4 + parameters
    assert least_work(stu, TINY, backward=False) == Work(products + transforms, 4 * numbers)
    assert least_work(stu.double(), TINY, backward=True) == Work(3 * products + 2 * transforms, 2 * 8 * numbers)
    literal = LiteralSTU(stu.float(), 12)
    assert least_work(literal, TINY, backward=False) == least_work(stu, TINY, backward=False)
    assert least_work(nn.Linear(4, 4), TINY, backward=False) is None
    assert Peak(flops=10, bytes=100).seconds(Work(flops=30, bytes=100)) == 3
    assert Peak(flops=10, bytes=100).seconds(Work(flops=3, bytes=100)) == 1


def test_the_least_work_of_a_device_has_the_transfer_function_in_memory():
    layer = STU(128, seq_len=1024, two_sided=False, k_u=0, k_y=0)
    size, frequencies, matrix, learned = Size(1024, 32, 128, 24), 1025, 128**2, 24 * 128**2
    ends, signal, response = 2 * 32 * 1024 * 128, 2 * 32 * frequencies * 128, 2 * frequencies * matrix
    assert round(4e-6 * response) == 134  # MB
    products, mixing = 8 * 32 * frequencies * matrix, 4 * 24 * frequencies * matrix
    transforms = 2 * 32 * 128 * 2.5 * 2048 * 11
    forward = least_work(layer, size, backward=False, on_cpu=False)
    assert forward == Work(products + mixing + transforms, 4 * (ends + learned + 4 * signal + 2 * response))
    backward = least_work(layer, size, backward=True, on_cpu=False) - forward
    traffic = 4 * (ends + 2 * learned + 6 * signal + 4 * response)
    assert backward == Work(2 * products + 2 * mixing + transforms, traffic)
    both_ways = STU(128, seq_len=1024, two_sided=False, k_u=0, k_y=0, causal=False)
    assert least_work(both_ways, size, backward=False, on_cpu=False) == forward + Work(0, 4 * learned)


# --- what comes of it ---


def timing(seconds):
    return Timing(median=seconds, min=seconds / 2, mean=2 * seconds, count=7)


def results(*rows):
    machine = {"device": "a processor", "cores": 2, "torch": "2.6.0"}
    return Results(
        command="python -m experiments.speed",
        date="2026-01-31T12:00:00+00:00",
        commit="0123456789ab",
        machine=machine,
        settings=Settings(threads=2, autocast="bfloat16"),
        peak=Peak(flops=1e11, bytes=1e10),
        rows=rows,
    )


def row(model, length=1024, forward=0.01, both=0.03, floors=(None, None), **others):
    return Row(
        model=model,
        length=length,
        batch=8,
        width=128,
        filters=None,
        facts=Facts(1000, True, True, *floors),
        forward=timing(forward),
        forward_backward=timing(both) if both else None,
        **{"step": None, "forward_bytes": 10**6, "forward_backward_bytes": 2 * 10**6, "failures": {}} | others,
    )


# Forward 4 ms of operations, backward 6 ms of traffic.
FLOORS = Work(flops=4e8, bytes=1e7), Work(flops=5e8, bytes=7e7)

EXAMPLE = results(
    row("literal:k_y=0", both=0.3),
    row("stu", floors=FLOORS, step=timing(1e-3), launches=Launches(12, 1234)),
    row("s4", 4096),
    row("stu", 4096, both=None, failures={"step": "no", "forward_backward": "over 8 GB"}, forward_backward_bytes=None),
    Row("gru", 4096, 8, 128, None, None, None, None, None, None, None, {"forward": "over 2 s", "step": "over 2 s"}),
    Row("stu_t", 4096, 8, 128, 24, None, None, None, None, None, None, {"build": "num_filters=24: must be in 1 … 9"}),
    row("transformer:window=128", both=0.06),
)


def test_what_follows_from_a_row():
    assert EXAMPLE.derived(EXAMPLE.rows[1]) == {
        "tokens_per_second": pytest.approx(8 * 1024 / 0.03),
        "speedup": pytest.approx(10),
        "attention_speedup": pytest.approx(2),
        "forward_floor_share": pytest.approx(0.4),
        "floor_share": pytest.approx(0.01 / 0.03),
        "step_share": pytest.approx(0.1),
    }
    assert EXAMPLE.derived(EXAMPLE.rows[2])["speedup"] is None  # the literal STU has another length
    assert set(EXAMPLE.derived(EXAMPLE.rows[3]).values()) == {None}


def test_results_are_read_as_they_were_written(tmp_path):
    EXAMPLE.write(tmp_path)
    assert Results.read(tmp_path) == EXAMPLE
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[1]["forward"] == {"median": 0.01, "min": 0.005, "mean": 0.02, "count": 7}
    assert rows[1]["derived"]["speedup"] == pytest.approx(10)
    assert (rows[0]["launches"], rows[1]["launches"]) == (None, {"forward": 12, "both": 1234})


def test_results_from_before_launches_were_counted_are_read():
    for file in (ROOT / "experiments/speed/results").glob("*/results.json"):
        assert all(row.launches is None for row in Results.read(file.parent).rows) or "launches" in file.read_text()


@pytest.mark.slow
def test_the_table(tmp_path, capsys):
    EXAMPLE.write(tmp_path)
    assert main(["--redraw", str(tmp_path)]) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["a processor, 2 threads, torch 2.6.0, float32, bfloat16 autocast"]
    assert lines[1] == ["peak of the device, measured: 100 GFLOP/s in a matrix product, 10 GB/s copied"]
    stu = ["stu", "10.0", "5.00", "30.0", "15.0", "10.0", "2.00", "12 / 1,234", "2.00", "273,067", "1,000", "10.0 %"]
    stu += ["40.0 / 33.3 %"]
    assert stu in lines
    assert ["stu", "10.0", "5.00", *["—"] * 10, "step: no; fwd+bwd: over 8 GB"] in lines
    assert ["gru", *["—"] * 12, "over 2 s"] in lines
    assert ["stu_t", *["—"] * 12, "build: num_filters=24: must be in 1 … 9"] in lines
    assert ["L = 4,096, B = 8, D = 128, K = 24"] in lines


@pytest.mark.slow
def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(EXAMPLE, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_all_but_the_figure_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    EXAMPLE.write(tmp_path)
    assert main(["--redraw", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"saved in {tmp_path}: results.json\n")
    assert err.count("\n") == 1
    assert err.startswith("no figure: matplotlib")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command on a small size, with a made-up peak and without subprocesses."""
    monkeypatch.setenv("STU_RUNS", str(tmp_path))
    monkeypatch.setattr(run, "measured_peak", lambda _: Peak(1e11, 1e10))
    monkeypatch.setattr(measure, "_in_subprocess", measure._in_process)
    monkeypatch.setattr(report, "plot", lambda _, file: file.touch())
    return ["--models", "transformer", "--lengths", "8", "4", "--batches", "1", "--widths", "4",
            "--min-s", "1e-3", "--repeats", "1", "--limit-gb", "2"]  # fmt: skip


@pytest.mark.slow
def test_results_are_never_replaced_unasked(quick, tmp_path, capsys):
    assert main(quick) == 0
    [folder] = (tmp_path / "speed").iterdir()
    first = Results.read(folder)
    assert [r.length for r in first.rows] == [4, 8]
    assert main(quick) == 0  # into a folder of its own
    assert len(list((tmp_path / "speed").iterdir())) == 2
    capsys.readouterr()
    assert main([*quick, "--out", str(folder)]) == 2
    assert re.fullmatch(rf"error: --out={folder}: has results.json.*; --force replaces them\n", capsys.readouterr().err)
    assert Results.read(folder) == first
    assert main([*quick, "--out", str(folder), "--force"]) == 0
    assert Results.read(folder).rows != first.rows


@pytest.mark.slow
def test_what_was_measured_before_a_stop_is_kept(quick, tmp_path, capsys, monkeypatch):
    def stopped(*arguments):
        yield next(measure.measure(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", stopped)
    assert main([*quick, "--out", str(tmp_path / "a")]) == 130
    assert [r.length for r in Results.read(tmp_path / "a").rows] == [4]
    assert capsys.readouterr().out.endswith(f"saved in {tmp_path / 'a'}: results.json, speed.png\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "foo"], "error: --models=foo: no such model; choose from literal, "),
        (["--device", "foo"], "error: --device=foo: must be auto, cpu, "),
        (["--device", "cuda:99"], "error: --device=cuda:99: cannot be used: "),
        (["--device", "cpu", "--tf32"], "error: --tf32=cpu: only CUDA devices have it"),
        (["--models", "stu", "--out", "/dev/null/a"], "error: --out=/dev/null/a: cannot be created: "),
        (["--redraw", "/dev/null"], "error: --redraw=/dev/null: has no results.json that can be read"),
        (["--lengths", "16", "0"], "python -m experiments.speed: error: argument --lengths: 0: must be a whole number"),
        (["--lengths", "1.5"], "python -m experiments.speed: error: argument --lengths: 1.5: must be a whole number"),
        (["--limit-gb", "none"], "python -m experiments.speed: error: argument --limit-gb: none: must be a number"),
        (["--min-s", "-1"], "python -m experiments.speed: error: argument --min-s: -1: must be a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_commands_are_refused_in_one_line(arguments, message, capsys):
    assert_refused(main, arguments, message, capsys)


@pytest.mark.slow
@pytest.mark.e2e
def test_the_command(tmp_path):
    """All there is, as a user starts it."""
    sizes = ["--lengths", "16", "--batches", "2", "--widths", "8", "--filters", "3"]
    command = ["-m", "experiments.speed", *sizes, "--min-s", "1e-3", "--repeats", "1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["command"] == f"python {' '.join(command)}"
    assert content["machine"]["torch"] == torch.__version__
    assert content["peak"]["flops"] > 1e8
    rows = {row["model"].partition(".")[0]: row for row in content["rows"]}
    assert list(rows) == ["literal", *of_one_mixer()]
    for model, row in rows.items():
        assert row["failures"] == {}, model
        assert 0 < row["forward"]["min"] <= row["forward"]["median"]
        assert row["forward_backward"]["count"] >= 2
        assert (row["step"] is None) == (model == "literal")
        assert row["facts"]["causal"]
        assert row["derived"]["speedup"] > 0
        assert row["derived"]["attention_speedup"] > 0
        assert 0 < row["launches"]["forward"] < row["launches"]["both"]
        assert re.search(rf"^{model} ", done.stdout, re.MULTILINE)
    assert sys.platform != "linux" or all(row["forward_backward_bytes"] is not None for row in rows.values())
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return
    assert (tmp_path / "speed.png").exists()


# --- compiled blocks ---


@pytest.mark.slow
def test_compiled_blocks_are_timed_beside_eager_ones(tmp_path, capsys):
    size = ["--length", "64", "--batch", "2", "--width", "8", "--min-s", "0.01", "--device", "cpu", "--threads", "1"]
    compiled.main(["--models", "lstm", "stu_t:num_filters=4", *size, "--out", str(tmp_path / "times.json")])
    out = capsys.readouterr().out
    assert "| `lstm` | — | — | must be false: PyTorch does not compile its LSTM and GRU | — |" in out
    [row] = re.findall(r"\| `stu_t:num_filters=4` \| .* \| ([\d.]+) \| ([\d.]+) \|", out)
    times = json.loads((tmp_path / "times.json").read_text())["rows"]["stu_t:num_filters=4"]
    for ratio, of in zip(row, ("min", "median"), strict=True):
        assert float(ratio) == pytest.approx(times["compiled"][of] / times["eager"][of], abs=0.006)


# --- generation ---


def test_a_token_by_the_state_is_timed_beside_one_by_the_context(tmp_path, capsys):
    size = ["--context", "12", "--width", "8", "--depth", "1", "--min-s", "0.001"]
    out = tmp_path / "rates.json"
    assert generation.main(["--models", "stu:num_filters=4", "transformer", *size, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["stu:num_filters=4", "transformer"]
    for line, times in zip(capsys.readouterr().out.splitlines()[2:], rows.values(), strict=True):
        assert f"| {1 / times['state']['min']:,.0f} | {1 / times['context']['min']:,.2f} |" in line
    assert generation.main(["--models", "nope"]) == 2
    assert generation.main(["--models", "stu", "--device", "nope"]) == 2
