"""Where the time of a layer goes, forward and backward, by kernels: python -m experiments.speed.kernels."""

import argparse
import os
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.shared.files import command, refuse
from experiments.speed.bench import Bench, Data, Settings
from experiments.speed.candidates import Size, find
from stu.errors import OptionError, require

PASSES = 5  # that are traced


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace each layer; print its most expensive kernels (on CPUs operations); return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.kernels", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["stu:two_sided=false"], help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, metavar="L", help="(default: 2048)")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="(default: 64)")
    parser.add_argument("--width", type=int, default=128, metavar="D", help="(default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32, on GPUs")
    parser.add_argument("--rows", type=int, default=12, help="kernels that are shown of each layer (default: 12)")
    options = parser.parse_args(arguments)
    size = Size(options.length, options.batch, options.width, None)
    try:
        require(options.rows >= 1, "--rows", options.rows, "must be at least 1")
        settings = Settings(device=options.device, tf32=options.tf32, threads=torch.get_num_threads())
        settings.apply()
        for candidate in find(options.models, causal=True, size=size):
            print(f"{candidate.name}: B = {size.batch}, L = {size.length}, D = {size.width}")
            bench = Bench(candidate.node(size), Data.draw(size, settings), settings)
            for share, calls, name in kernels(bench)[: options.rows]:
                print(f"  {share:6.1%} {calls:5.0f} x {name[:110]}", flush=True)
    except OptionError as error:
        return refuse(error)
    return 0


def kernels(bench: Bench) -> list[tuple[float, float, str]]:
    """(share of the time of all, calls per pass, name) of each kernel, the most expensive first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its starts on the standard error
    on_cuda = bench.data.x.is_cuda
    call = bench.call("forward_backward")
    call()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU], acc_events=True) as trace:
        for _ in range(PASSES):
            call()
    kind = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    rows = [(getattr(event, kind), event.count / PASSES, event.key) for event in trace.key_averages()]
    total = sum(time for time, _, _ in rows)
    return sorted(((time / total, calls, name) for time, calls, name in rows), reverse=True)


if __name__ == "__main__":
    command(main)
