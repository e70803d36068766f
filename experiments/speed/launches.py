"""How many kernels a layer launches: python -m experiments.speed.launches.

Launching a kernel costs the host about 5 µs, so a layer of many small ones takes a device as long as they are many.
Counted are, on a CUDA device, the kernels, copies and fills that ran; elsewhere leaf ATen operations, which stand for
them: those that write tensors, and have no part that does. Views, allocations, and what only reads a dtype, a shape or
a number are none. So a CPU tells what a device would launch, but for the needs of its libraries: cuFFT, for example,
copies the input of an inverse transform.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from experiments.shared.arguments import count as whole
from experiments.shared.files import command, refuse
from experiments.speed.bench import Bench, Data, Settings, device_of
from experiments.speed.candidates import Size, find
from stu.cli.layers import of_one_mixer
from stu.errors import OptionError
from stu.files import write_atomically
from stu.ops.forms import taken_for

VARIANTS = ("stu:two_sided=false", "stu:two_sided=false,causal=false")  # the STU with one branch; from both ends
STDOUT = Path("-")
CAPTION = "forward / forward and backward"

# New tensors without a value yet, and those that only their schemas do not call views.
FREE = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "unsafe_split", "unsafe_split_with_sizes"),
}


@dataclass(frozen=True)
class Launches:
    """Of a forward pass, and of forward and backward with gradients of the input and of all parameters."""

    forward: int
    both: int


def launches_of(bench: Bench) -> Launches:
    """The launches of a mixer, once it has run: the first calls also make filters and fill caches."""
    return Launches(count(bench.call("forward"), bench.device), count(bench.call("forward_backward"), bench.device))


def count(call: Callable[[], object], device: torch.device) -> int:
    """The launches of a call, which must return when the device is done."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its starts on the standard error
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        call()
    # The events as they are: `profiler.events()` takes a minute for what a recurrence launches in a second.
    results: Any = profiler.profiler.kineto_results
    return _kernels(results.events()) if on_cuda else sum(map(_leaves, results.experimental_event_tree()))


def _kernels(events: Iterable[Any]) -> int:
    """Kernels, copies and fills among the profiler's events."""
    return sum(event.device_type() == DeviceType.CUDA and not event.is_user_annotation() for event in events)


def _leaves(event: Any) -> int:
    """Launching operations at or below this one, of which none consists of another."""
    namespace, _, name = event.name.partition("::")
    if namespace != "aten":
        return sum(map(_leaves, event.children))
    if name in FREE:  # even if deterministic algorithms fill the new memory
        return 0
    return sum(map(_leaves, event.children)) or int(_launches(name))


@cache
def _launches(name: str) -> bool:
    """Whether an ATen operation without parts launches something, by the schemas of its overloads."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(map(_computes, [overload for overload in overloads if not overload._schema.is_mutable] or overloads))


def _computes(overload: Any) -> bool:
    """Whether it writes to an argument, or returns a tensor that is no view of one, and is more than its parts."""
    if overload.name() in _composite() or torch.Tag.inplace_view in overload.tags:
        return False
    schema = overload._schema
    fresh = any("Tensor" in str(result.type) and result.alias_info is None for result in schema.returns)
    return schema.is_mutable or fresh


@cache
def _composite() -> set[str]:
    """The operations that only call others."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    return set(registered("CompositeImplicitAutograd")) - set(registered("CPU"))


# --- the command ---


class Row(NamedTuple):
    """The launches of one mixer at one length; fields are the keys of the JSON."""

    mixer: str
    length: int
    forward: int
    both: int


def counted(mixers: Sequence[str], lengths: Sequence[int], *, batch: int, width: int, device: str) -> Iterator[Row]:
    """The rows of one mixer after the other. Raises `OptionError` for an unknown mixer, or options that it refuses."""
    sizes = [Size(length, batch, width, None) for length in lengths]
    settings = Settings(device=device)
    for candidate, size in itertools.product(find(mixers, causal=True, size=sizes[0]), sizes):
        bench = Bench(candidate.node(size), Data.draw(size, settings), settings)
        for stage in ("forward", "forward_backward"):
            bench.call(stage)()
        found = launches_of(bench)
        yield Row(candidate.name, size.length, found.forward, found.both)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and show the table or write the rows; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        device = device_of(options.device)
        rows = []
        with taken_for(options.form or device.type), Console(stderr=True).status("") as status:
            sizes = {"batch": options.batch, "width": options.width, "device": str(device)}
            for row in counted(options.models, sorted(set(options.lengths)), **sizes):
                status.update(f"{row.mixer}, L = {row.length}")
                rows.append(row)
        if options.json is None:
            Console().print(_table(rows))
        else:
            _write(rows, options.json)
    except OptionError as error:
        return refuse(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.launches",
        usage=argparse.SUPPRESS,  # so that an error takes one line
        description="Count what a layer launches, forward and with backward.",
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL[:KEY=VALUE,…]", default=[*VARIANTS, *of_one_mixer()],
                        help="mixers, with options (default: the STU with one branch, one and both ways, and all of "
                        "conf/model, in which the STU has two branches)")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=whole, default=[1024, 16384], metavar="L",
                        help="(default: 1024 16384)")  # fmt: skip
    parser.add_argument("--batch", type=whole, default=2, metavar="B", help="(default: 2)")
    parser.add_argument("--width", type=whole, default=8, metavar="D", help="(default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--form", choices=["cpu", "cuda"],
                        help="of the operations, wherever they run (default: that of the device)")  # fmt: skip
    parser.add_argument("--json", nargs="?", type=Path, const=STDOUT, metavar="FILE",
                        help="the rows as JSON, to a file or to the standard output, instead of the table")  # fmt: skip
    return parser


def _table(rows: Sequence[Row]) -> Table:
    lengths = sorted({row.length for row in rows})
    table = Table("launches", *(Column(f"L = {length:,}", justify="right") for length in lengths), caption=CAPTION)
    for mixer, own in itertools.groupby(rows, lambda row: row.mixer):
        table.add_row(mixer, *(f"{row.forward:,} / {row.both:,}" for row in own))
    return table


def _write(rows: Sequence[Row], file: Path) -> None:
    text = json.dumps([row._asdict() for row in rows], indent=2) + "\n"
    if file == STDOUT:
        print(text, end="")
        return
    try:
        write_atomically(file, text)
    except OSError as error:
        raise OptionError("--json", file, f"cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    command(main)
