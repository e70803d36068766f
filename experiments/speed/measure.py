"""Measuring mixers of one size against each other: first each alone, under limits, then all interleaved.

Alone, every stage runs once, to find those that exceed the memory or the time, or fail, and to measure peak memory. On
a CPU each mixer has a subprocess of its own: the only way to tell its memory apart, and to survive a crash.
"""

import contextlib
import gc
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from experiments.shared.machine import memory_of
from experiments.speed.bench import Bench, Data, Settings, Stage
from experiments.speed.candidates import Candidate, Size
from experiments.speed.launches import Launches, launches_of
from experiments.speed.results import Facts, Row, Timing
from experiments.speed.roofline import least_work
from stu.errors import OptionError
from stu.ops.forms import on_cpu

Key = TypeVar("Key", bound=Hashable)

# Of those that run the mixer, the one most likely to fail comes last; launches are counted of what has run.
STAGES: Sequence[Stage] = ("build", "forward", "step", "forward_backward", "launches")
TIMED: Sequence[Stage] = ("forward", "step", "forward_backward")

if sys.platform == "linux":
    _context: Any = get_context("forkserver")
    # A subprocess is then a fork of one with all imports, also those that PyTorch defers until they are needed.
    _context.set_forkserver_preload([__name__, "torch._dynamo"])
else:
    _context = get_context("spawn")


NO_DEVICE_MEMORY = ("CUDA error: out of memory", "_ALLOC_FAILED")  # of CUDA, and of its libraries


class Failure(NamedTuple):
    """Why there is no measurement. limit: whether it was a limit, which a longer sequence would exceed as well."""

    reason: str
    limit: bool


# Of the build: facts; of the launches: their counts; of the others: peak memory in bytes, where known.
Outcome = Facts | Launches | int | Failure | None
Outcomes = dict[Stage, Outcome]


def measure(
    candidates: Sequence[Candidate], sizes: Iterable[Size], settings: Settings, progress: Callable[[str], None]
) -> Iterator[list[Row]]:
    """The rows of one size after the other, one row per candidate.

    What exceeded a limit is not tried again at greater lengths, if they come later in `sizes`; its row says so.
    """
    hopeless: dict[tuple[str, Size], dict[Stage, Failure]] = {}
    for size in sizes:
        outcomes: dict[str, Outcomes] = {}
        for candidate in candidates:
            progress(f"L = {size.length}: {candidate.name} alone")
            known = hopeless.setdefault((candidate.name, size._replace(length=0)), {})
            outcomes[candidate.name] = {**alone(candidate.node(size), size, settings, known), **known}
        progress(f"L = {size.length}: all interleaved")
        timings = _timed(candidates, size, settings, outcomes)
        for candidate in candidates:
            known = hopeless[candidate.name, size._replace(length=0)]
            for stage, outcome in outcomes[candidate.name].items():
                if isinstance(outcome, Failure) and outcome.limit and stage not in known:
                    known[stage] = Failure(f"{outcome.reason} already at L = {size.length}", True)
        _free()
        yield [_row(candidate, size, outcomes[candidate.name], timings) for candidate in candidates]


def alone(node: Mapping[str, Any], size: Size, settings: Settings, skip: Iterable[Stage] = ()) -> Outcomes:
    """Each stage of one mixer, once, except those to skip; where the mixer does not go on, all later stages fail."""
    stages = [stage for stage in STAGES if stage not in skip]
    if stages[:2] != ["build", "forward"]:
        return {}
    run = _in_subprocess if torch.device(settings.device).type == "cpu" else _in_process
    outcomes = run(node, size, settings, stages)
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    return outcomes | {stage: failures[-1] for stage in stages if stage not in outcomes}


def interleaved(
    calls: Mapping[Key, Callable[[], None]], *, min_seconds: float, repeats: int
) -> tuple[dict[Key, Timing], dict[Key, Exception]]:
    """Time all calls round-robin, so that other load on the machine affects all of them equally.

    Each is called once to warm up, then at least `repeats` times and for at least `min_seconds` in all; but only twice
    where that takes ten times as long. A call that raises is left out from then on, and what it computed is freed.
    """
    samples: dict[Key, list[float]] = {}
    failures: dict[Key, Exception] = {}
    waiting = dict(calls)
    while waiting:
        for key, call in list(waiting.items()):
            try:
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                failures[key] = error
                del waiting[key]
                _free()
                continue
            samples.setdefault(key, []).append(seconds)
            taken = samples[key][1:]  # the first call warms up
            enough = min_seconds if len(taken) >= repeats else 10 * min_seconds
            if len(taken) >= 2 and sum(taken) >= enough:
                del waiting[key]
    return {key: Timing.of(taken[1:]) for key, taken in samples.items() if key not in failures}, failures


def _timed(
    candidates: Sequence[Candidate], size: Size, settings: Settings, outcomes: Mapping[str, Outcomes]
) -> dict[tuple[str, Stage], Timing]:
    """Timings of all that succeeded alone; what fails here nevertheless is added to `outcomes`."""
    calls = {}
    try:
        data = Data.draw(size, settings)
    except Exception as error:
        for own in outcomes.values():
            own.update(dict.fromkeys(TIMED, _failure(error, settings)))
        return {}
    for candidate in candidates:
        own = outcomes[candidate.name]
        facts = own.get("build")
        if not isinstance(facts, Facts) or isinstance(own["forward"], Failure):
            continue
        try:
            bench = Bench(candidate.node(size), data, settings)
        except Exception as error:
            own["build"] = _failure(error, settings)
            _free()
            continue
        for stage in TIMED:
            if not isinstance(own[stage], Failure) and (stage != "step" or facts.streams):
                calls[candidate.name, stage] = bench.call(stage)
    timings, failures = interleaved(calls, min_seconds=settings.min_seconds, repeats=settings.repeats)
    for (name, stage), failed in failures.items():
        outcomes[name][stage] = _failure(failed, settings)
    return timings


def _row(candidate: Candidate, size: Size, outcomes: Outcomes, timings: Mapping[tuple[str, Stage], Timing]) -> Row:
    facts, launches = outcomes.get("build"), outcomes.get("launches")
    peak = {stage: outcome for stage, outcome in outcomes.items() if isinstance(outcome, int)}
    return Row(
        model=candidate.name,
        **size._asdict(),
        facts=facts if isinstance(facts, Facts) else None,
        forward=timings.get((candidate.name, "forward")),
        forward_backward=timings.get((candidate.name, "forward_backward")),
        step=timings.get((candidate.name, "step")),
        forward_bytes=peak.get("forward"),
        forward_backward_bytes=peak.get("forward_backward"),
        failures={stage: outcome.reason for stage, outcome in outcomes.items() if isinstance(outcome, Failure)},
        launches=launches if isinstance(launches, Launches) else None,
    )


def _in_process(node: Mapping[str, Any], size: Size, settings: Settings, stages: Sequence[Stage]) -> Outcomes:
    previous = signal.signal(signal.SIGALRM, _time_up)
    try:
        return dict(_outcomes(node, size, settings, stages))
    finally:
        signal.signal(signal.SIGALRM, previous)


def _in_subprocess(node: Mapping[str, Any], size: Size, settings: Settings, stages: Sequence[Stage]) -> Outcomes:
    outcomes: Outcomes = {}
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_subprocess, args=(theirs, node, size, settings, stages))
    process.start()
    theirs.close()
    try:
        while True:
            stage, outcome = ours.recv()
            outcomes[stage] = outcome
    except EOFError:
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        lost = next(stage for stage in stages if stage not in outcomes)
        outcomes[lost] = _end(process.exitcode, settings)
    return outcomes


def _subprocess(
    connection: Connection, node: Mapping[str, Any], size: Size, settings: Settings, stages: Sequence[Stage]
) -> None:
    settings.apply()
    for number in (signal.SIGALRM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # ends the process, whatever library it is in
    for stage, outcome in _outcomes(node, size, settings, stages):
        connection.send((stage, outcome))


def _outcomes(
    node: Mapping[str, Any], size: Size, settings: Settings, stages: Sequence[Stage]
) -> Iterator[tuple[Stage, Outcome]]:
    """Run each stage once and yield its outcome; one that fails is the last, unless it is the streamed step."""
    device = torch.device(settings.device)
    for stage in stages:
        try:
            with _time_limit(settings.limit_seconds):
                if stage == "build":
                    bench = Bench(node, Data.draw(size, settings), settings)
                    bench.warm_up()
                    before = _used_memory(device)
                    outcome: Outcome = _facts(bench, size)
                elif stage == "step" and not bench.streams:
                    outcome = None
                elif stage == "launches":
                    # what a compiler makes for a CPU are no ATen operations
                    outcome = None if settings.compile and device.type != "cuda" else launches_of(bench)
                else:
                    with _memory_limit(settings.limit_bytes, device):
                        if settings.compile:  # whose own memory does not count
                            bench.call(stage)()
                            before = _used_memory(device)
                        outcome = _peak_memory(bench.call(stage), device, before)
        except Exception as error:
            outcome = _failure(error, settings)
        if isinstance(outcome, Failure):
            _free()
        yield stage, outcome
        if isinstance(outcome, Failure) and stage != "step":
            return


def _free() -> None:
    """Give back the memory of what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


def _facts(bench: Bench, size: Size) -> Facts:
    return Facts(
        parameters=sum(parameter.numel() for parameter in bench.mixer.parameters()),
        causal=bool(bench.mixer.causal),
        streams=bench.streams,
        forward_floor=least_work(bench.mixer, size, backward=False, on_cpu=on_cpu(bench.data.x)),
        forward_backward_floor=least_work(bench.mixer, size, backward=True, on_cpu=on_cpu(bench.data.x)),
    )


def _failure(error: Exception, settings: Settings) -> Failure:
    """An exception in a few words."""
    message = " ".join(str(error).split())
    if isinstance(error, _TimeUp):
        return Failure(f"over {settings.limit_seconds:g} s", True)
    if isinstance(error, torch.OutOfMemoryError) or any(words in message for words in NO_DEVICE_MEMORY):
        return Failure(f"out of memory, of at most {settings.limit_bytes / 1e9:.3g} GB", True)
    no_memory = isinstance(error, MemoryError) or "bad_alloc" in message
    if no_memory or "can't allocate memory" in message:  # a RuntimeError of PyTorch on CPUs
        return Failure(f"over {settings.limit_bytes / 1e9:.3g} GB", True)
    text = message if isinstance(error, OptionError) else f"{type(error).__name__}: {message}"
    return Failure(text if len(text) <= 120 else f"{text[:117]}...", False)


def _end(code: int, settings: Settings) -> Failure:
    """The exit code of a process in a few words."""
    if code == -signal.SIGALRM:
        return Failure(f"over {settings.limit_seconds:g} s", True)
    if code == -signal.SIGKILL:
        return Failure("killed by the system, probably out of memory", True)
    return Failure(f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}", False)


class _TimeUp(Exception):
    """The measurement takes too long. No `TimeoutError`: code that ignores an `OSError` would ignore this one, too."""


def _time_up(*_: object) -> None:
    raise _TimeUp


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Send SIGALRM after so many seconds."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _memory_limit(limit: float, device: torch.device) -> Iterator[None]:
    """Allow so many bytes more than are in use now, on Linux and on CUDA devices; no limit elsewhere."""
    with contextlib.ExitStack() as afterwards:
        if device.type == "cuda":
            share = (torch.cuda.memory_allocated(device) + limit) / memory_of(device)
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
            afterwards.callback(torch.cuda.set_per_process_memory_fraction, 1.0, device)
        elif (data := _status("VmData")) is not None:
            before = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (int(data + limit), before[1]))
            afterwards.callback(resource.setrlimit, resource.RLIMIT_DATA, before)
        yield


def _used_memory(device: torch.device) -> int | None:
    """Bytes in use; None where they are not counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _peak_memory(call: Callable[[], None], device: torch.device, before: int | None) -> int | None:
    """The most bytes in use during the call beyond those in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - (before or 0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, see proc(5)
    except OSError:
        before = None  # the peak would be that of an earlier call
    call()
    peak = _status("VmHWM")
    return max(peak - before, 0) if peak is not None and before is not None else None


def _status(key: str) -> int | None:
    """An entry of /proc/self/status in bytes; None where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
    except OSError:
        return None
