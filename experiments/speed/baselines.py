"""The baselines against their literal forms, the official algorithms: python -m experiments.speed.baselines."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from experiments.shared.files import command
from experiments.shared.machine import origin
from experiments.speed.bench import Data, Settings, synchronize
from experiments.speed.candidates import Size, build, find
from experiments.speed.literal import LITERAL
from experiments.speed.measure import interleaved
from experiments.speed.results import Timing
from stu.files import write_atomically

FILE = "baselines.json"


@dataclass(frozen=True)
class Pair:
    """Times of forward and backward: of a model and of its literal form."""

    model: str
    length: int
    batch: int
    width: int
    ours: Timing
    literal: Timing

    @property
    def ratio(self) -> float:
        """Ours over literal, of medians."""
        return self.ours.median / self.literal.median


def main(arguments: Sequence[str] | None = None) -> None:
    """Time forward and backward of both forms of each model, interleaved; print a table and write the results."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.baselines", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=LITERAL, default=list(LITERAL), metavar="MODEL")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], metavar="L")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-s", type=float, default=1.0, help="minimum seconds of each call, in total (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where to write {FILE} (default: nowhere)")
    options = parser.parse_args(given)
    settings = Settings(device=options.device, threads=options.threads, min_seconds=options.min_s, repeats=3)
    settings.apply()
    pairs: list[Pair] = []
    for length in options.lengths:
        size = Size(length, options.batch, options.width, None)
        compared = _compared(options.models, size, settings)
        Console().print(_table(size, compared))
        pairs += compared
    if options.out is not None:
        content = {
            "command": f"python -m experiments.speed.baselines {shlex.join(given)}".strip(),
            **origin(torch.device(settings.device)),
            "settings": asdict(settings),
            "rows": [asdict(pair) | {"ratio": pair.ratio} for pair in pairs],
        }
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _compared(models: Sequence[str], size: Size, settings: Settings) -> list[Pair]:
    """All models and their literal forms, interleaved. Raises what one of them raises."""
    data, calls = Data.draw(size, settings), {}
    for candidate in find(models, causal=True, size=size):
        torch.manual_seed(0)
        layer = build(candidate.node(size), size.width).to(settings.device)
        literal = LITERAL[candidate.name](layer, size.length)
        calls[candidate.name, "ours"] = partial(_forward_backward, layer, data)
        calls[candidate.name, "literal"] = partial(_forward_backward, literal, data)
    timings, failures = interleaved(calls, min_seconds=settings.min_seconds, repeats=settings.repeats)
    for error in failures.values():
        raise error
    return [Pair(model, *size[:3], timings[model, "ours"], timings[model, "literal"]) for model in models]


def _forward_backward(layer: nn.Module, data: Data) -> None:
    """Gradients of the input and of all parameters that are used: the literal S4 does not use the layer's C."""
    x = data.x.detach().requires_grad_()
    torch.autograd.grad(layer(x), (x, *layer.parameters()), data.grad, allow_unused=True)
    synchronize(x.device)


def _table(size: Size, pairs: Sequence[Pair]) -> Table:
    title = f"L = {size.length}, B = {size.batch}, D = {size.width}, forward and backward: medians (minima)"
    numbers = (Column(name, justify="right") for name in ("ours", "literal", "ours / literal"))
    table = Table("", *numbers, title=title, title_justify="left")
    for pair in pairs:
        times = (f"{1e3 * timing.median:.0f} ({1e3 * timing.min:.0f}) ms" for timing in (pair.ours, pair.literal))
        table.add_row(pair.model, *times, f"{pair.ratio:.2f} ({pair.ours.min / pair.literal.min:.2f})")
    return table


if __name__ == "__main__":
    command(main)
