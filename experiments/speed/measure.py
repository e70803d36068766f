"""Measuring mixers of one size against each other: first each alone, under limits, then all in turns.

Alone, every stage runs once, so that one which exceeds the memory or the time, or fails, is found out, and its peak of
memory is known. On a CPU that is a fresh process each: the only way to tell its memory apart, and to survive its end.
"""

import contextlib
import gc
import resource
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import torch

from experiments.speed.bench import Bench, Data, Settings, Stage
from experiments.speed.contenders import Contender, Size
from experiments.speed.floor import floor
from experiments.speed.results import Facts, Row, Timing
from stu.errors import OptionError

Key = TypeVar("Key", bound=Hashable)

STAGES: Sequence[Stage] = ("build", "forward", "step", "forward_backward")  # the one most likely to fail comes last

if sys.platform == "linux":
    _fresh: Any = get_context("forkserver")
    # A fresh process is then a fork of one with all imports, also those that PyTorch puts off until they are needed.
    _fresh.set_forkserver_preload([__name__, "torch._dynamo"])
else:
    _fresh = get_context("spawn")


class Failure(NamedTuple):
    """Why there is no measurement. limit: one that a longer sequence would exceed as well."""

    reason: str
    limit: bool


class TimeUp(Exception):
    """A stage took longer than the limit."""


Outcome = Facts | int | Failure | None  # of the build; of the others the peak of memory in bytes, where it is known
Outcomes = dict[Stage, Outcome]


def measure(
    contenders: Sequence[Contender], sizes: Iterable[Size], settings: Settings, progress: Callable[[str], None]
) -> Iterator[list[Row]]:
    """The rows of one size after the other, a row for every contender.

    What exceeded a limit is not tried again at greater lengths, if they come later in `sizes`: its row says so.
    """
    hopeless: dict[tuple[str, Size], dict[Stage, Failure]] = {}
    for size in sizes:
        outcomes: dict[str, Outcomes] = {}
        for contender in contenders:
            progress(f"L = {size.length}: {contender.name} alone")
            known = hopeless.setdefault((contender.name, size._replace(length=0)), {})
            outcomes[contender.name] = {**alone(contender.node(size), size, settings, known), **known}
            for stage, outcome in outcomes[contender.name].items():
                if isinstance(outcome, Failure) and outcome.limit and stage not in known:
                    known[stage] = Failure(f"{outcome.reason} already at L = {size.length}", True)
        progress(f"L = {size.length}: all in turns")
        timings = _timed(contenders, size, settings, outcomes)
        _release()
        yield [_row(contender, size, outcomes[contender.name], timings) for contender in contenders]


def alone(node: Mapping[str, Any], size: Size, settings: Settings, skip: Iterable[Stage] = ()) -> Outcomes:
    """Each stage of one mixer, once, but those to skip; after a failed forward pass the others have failed with it."""
    stages = [stage for stage in STAGES if stage not in skip]
    if stages[:2] != ["build", "forward"]:
        return {}
    afresh = torch.device(settings.device).type == "cpu"
    outcomes = (_afresh if afresh else _here)(node, size, settings, stages)
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    return outcomes | {stage: failures[-1] for stage in stages if stage not in outcomes}


def in_turns(
    calls: Mapping[Key, Callable[[], None]], *, min_seconds: float, repeats: int
) -> tuple[dict[Key, Timing], dict[Key, Exception]]:
    """Time all calls, one after the other and round again, so that what else the machine does meets all of them alike.

    Each is called once to warm up, then `repeats` times and for `min_seconds` in all; twice, where that takes ten
    times as long. A call that raises is left out from then on.
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
                failures[key] = error
                del waiting[key]
                continue
            if key not in samples:  # the first one warms up
                samples[key] = []
                continue
            samples[key].append(seconds)
            enough = min_seconds if len(samples[key]) >= repeats else 10 * min_seconds
            if len(samples[key]) >= 2 and sum(samples[key]) >= enough:
                del waiting[key]
    return {key: Timing.of(taken) for key, taken in samples.items() if key not in failures}, failures


def _timed(
    contenders: Sequence[Contender], size: Size, settings: Settings, outcomes: Mapping[str, Outcomes]
) -> dict[tuple[str, Stage], Timing]:
    """Timings of all that went well alone; what fails here all the same is added to `outcomes`."""
    calls = {}
    data = Data.draw(size, settings)
    for contender in contenders:
        own = outcomes[contender.name]
        facts = own.get("build")
        if not isinstance(facts, Facts) or isinstance(own["forward"], Failure):
            continue
        try:
            bench = Bench(contender.node(size), data, settings)
        except Exception as error:
            own["build"] = _failure(error, settings)
            continue
        for stage in STAGES[1:]:
            if not isinstance(own[stage], Failure) and (stage != "step" or facts.streams):
                calls[contender.name, stage] = bench.call(stage)
    timings, failures = in_turns(calls, min_seconds=settings.min_seconds, repeats=settings.repeats)
    for (name, stage), failed in failures.items():
        outcomes[name][stage] = _failure(failed, settings)
    return timings


def _release() -> None:
    """Give memory back that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row(contender: Contender, size: Size, outcomes: Outcomes, timings: Mapping[tuple[str, Stage], Timing]) -> Row:
    facts = outcomes.get("build")
    peak = {stage: outcome for stage, outcome in outcomes.items() if isinstance(outcome, int)}
    return Row(
        model=contender.name,
        length=size.length,
        batch=size.batch,
        width=size.width,
        filters=size.filters,
        facts=facts if isinstance(facts, Facts) else None,
        forward=timings.get((contender.name, "forward")),
        forward_backward=timings.get((contender.name, "forward_backward")),
        step=timings.get((contender.name, "step")),
        forward_bytes=peak.get("forward"),
        forward_backward_bytes=peak.get("forward_backward"),
        failures={stage: outcome.reason for stage, outcome in outcomes.items() if isinstance(outcome, Failure)},
    )


def _here(node: Mapping[str, Any], size: Size, settings: Settings, stages: Sequence[Stage]) -> Outcomes:
    outcomes: Outcomes = {}
    previous = signal.signal(signal.SIGALRM, _time_up)
    try:
        _try_stages(node, size, settings, stages, outcomes.__setitem__)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return outcomes


def _afresh(node: Mapping[str, Any], size: Size, settings: Settings, stages: Sequence[Stage]) -> Outcomes:
    outcomes: Outcomes = {}
    ours, theirs = _fresh.Pipe(duplex=False)
    process = _fresh.Process(target=_fresh_process, args=(theirs, node, size, settings, stages))
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


def _fresh_process(
    connection: Connection, node: Mapping[str, Any], size: Size, settings: Settings, stages: Sequence[Stage]
) -> None:
    settings.apply()
    for number in (signal.SIGALRM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # ends the process, whatever library it is in
    _try_stages(node, size, settings, stages, lambda stage, outcome: connection.send((stage, outcome)))


def _try_stages(
    node: Mapping[str, Any],
    size: Size,
    settings: Settings,
    stages: Sequence[Stage],
    report: Callable[[Stage, Outcome], None],
) -> None:
    """Run each stage once and report how it ended; a build or forward pass that fails is the last."""
    device = torch.device(settings.device)
    for stage in stages:
        try:
            with _time_limit(settings.limit_seconds):
                if stage == "build":
                    bench = Bench(node, Data.draw(size, settings), settings)
                    bench.warm_up()
                    held = _held_memory(device)
                    outcome: Outcome = _facts(bench, size)
                elif stage == "step" and not bench.streams:
                    outcome = None
                else:
                    with _memory_limit(settings.limit_bytes, device):
                        if settings.compile:  # whose own memory is not meant
                            bench.call(stage)()
                            held = _held_memory(device)
                        outcome = _peak_memory(bench.call(stage), device, held)
        except Exception as error:
            outcome = _failure(error, settings)
        report(stage, outcome)
        if isinstance(outcome, Failure) and stage in ("build", "forward"):
            return


def _facts(bench: Bench, size: Size) -> Facts:
    return Facts(
        parameters=sum(parameter.numel() for parameter in bench.mixer.parameters()),
        causal=bool(bench.mixer.causal),
        streams=bench.streams,
        forward_floor=floor(bench.mixer, size, backward=False),
        forward_backward_floor=floor(bench.mixer, size, backward=True),
    )


def _failure(error: Exception, settings: Settings) -> Failure:
    """An exception in a few words."""
    message = " ".join(str(error).split())
    if isinstance(error, TimeUp):
        return Failure(_over_time(settings), True)
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "bad_alloc" in message
    if no_memory or "can't allocate memory" in message:  # which PyTorch raises as a RuntimeError on CPUs
        return Failure(f"over {settings.limit_bytes / 1e9:.3g} GB", True)
    text = message if isinstance(error, OptionError) else f"{type(error).__name__}: {message}"
    return Failure(text if len(text) <= 120 else f"{text[:117]}...", False)


def _end(code: int, settings: Settings) -> Failure:
    """The exit code of a process in a few words."""
    if code == -signal.SIGALRM:
        return Failure(_over_time(settings), True)
    if code == -signal.SIGKILL:
        return Failure("killed by the system, probably for want of memory", True)
    return Failure(f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}", False)


def _over_time(settings: Settings) -> str:
    return f"over {settings.limit_seconds:g} s"


def _time_up(*_: object) -> None:
    raise TimeUp


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """A SIGALRM after so many seconds."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _memory_limit(limit: float, device: torch.device) -> Iterator[None]:
    """So many bytes more than now, on Linux and on CUDA devices; nothing elsewhere."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_allocated(device) + limit) / total
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    elif (data := _status("VmData")) is not None:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(data + limit), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
    else:
        yield


def _held_memory(device: torch.device) -> int | None:
    """Bytes in use; None where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _peak_memory(call: Callable[[], None], device: torch.device, held: int | None) -> int | None:
    """The most bytes in use during the call beyond those held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - (held or 0)
    begun = _forget_peak()
    call()
    peak = _status("VmHWM")
    return max(peak - held, 0) if begun and peak is not None and held is not None else None


def _forget_peak() -> bool:
    """Let VmHWM begin anew, see proc(5); False where that cannot be done."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    """An entry of /proc/self/status in bytes; None without such a file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
    except OSError:
        return None
