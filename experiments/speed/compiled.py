"""One block of every model, compiled against eager: python -m experiments.speed.compiled."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.shared.files import command
from experiments.shared.machine import origin
from experiments.speed.bench import Settings, synchronize, without_zeros
from experiments.speed.candidates import Candidate, Size, find
from experiments.speed.measure import interleaved
from experiments.speed.results import Timing
from stu.cli.composition import build
from stu.cli.usage import options_of
from stu.errors import OptionError
from stu.files import write_atomically


def main(arguments: Sequence[str] | None = None) -> None:
    """Time forward and backward of both, interleaved; print a table and write the results."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.compiled", description=__doc__)
    parser.add_argument("--models", nargs="+", default=options_of("model"), help="(default: all of conf/model)")
    parser.add_argument("--length", type=int, default=1024, metavar="L", help="(default: 1024)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="(default: 8)")
    parser.add_argument("--width", type=int, default=128, metavar="D", help="(default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-s", type=float, default=2.0, help="minimum seconds of each call, in total (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file for the results")
    options = parser.parse_args(given)
    settings = Settings(device=options.device, threads=options.threads, compile=True)
    settings.apply()
    size, rows = Size(options.length, options.batch, options.width, None), {}
    print("| | eager ms | compiled ms | compiled / eager | of the medians |\n|---|---|---|---|---|")
    for candidate in find(options.models, causal=True, size=size):
        try:
            calls = {
                name: _call(candidate, size, settings, compile=name == "compiled") for name in ("eager", "compiled")
            }
            timings, failures = interleaved(calls, min_seconds=options.min_s, repeats=5)
            for failure in failures.values():
                raise failure
        except OptionError as error:
            print(f"| `{candidate.name}` | — | — | {error.allowed} | — |", flush=True)
            continue
        rows[candidate.name] = {name: asdict(timing) for name, timing in timings.items()}
        print(_row(candidate.name, timings["eager"], timings["compiled"]), flush=True)
    if options.out is not None:
        command = f"python -m experiments.speed.compiled {shlex.join(given)}".strip()
        content = {"command": command, **origin(torch.device(options.device)), "size": size._asdict(), "rows": rows}
        write_atomically(options.out, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _call(candidate: Candidate, size: Size, settings: Settings, *, compile: bool) -> Callable[[], None]:
    """Forward and backward of one block, with gradients of the input and of all parameters."""
    torch.manual_seed(0)
    config = candidate.configured(size)
    config.model.depth, config.model.compile = 1, compile
    backbone = without_zeros(build(config.model, _partial_=True)()).to(settings.device)
    x, grad = torch.randn(2, size.batch, size.length, size.width, device=settings.device)
    inputs = (x.requires_grad_(), *backbone.parameters())

    def call() -> None:
        torch.autograd.grad(backbone(x), inputs, grad)
        synchronize(x.device)

    return call


def _row(name: str, eager: Timing, compiled: Timing) -> str:
    least, medians = compiled.min / eager.min, compiled.median / eager.median
    return f"| `{name}` | {1e3 * eager.min:,.3g} | {1e3 * compiled.min:,.3g} | {least:.2f} | {medians:.2f} |"


if __name__ == "__main__":
    command(main)
