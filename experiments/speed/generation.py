"""Tokens per second of generation, by the state against the whole context: python -m experiments.speed.generation."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path

import torch

from experiments.shared.arguments import count, positive
from experiments.shared.files import command, refuse
from experiments.shared.machine import origin
from experiments.speed.bench import Settings, device_of, synchronize, without_zeros
from experiments.speed.candidates import Size, find
from experiments.speed.measure import interleaved
from experiments.speed.results import Timing
from stu.backbone import Backbone, SequenceModel
from stu.cli.composition import build
from stu.cli.usage import options_of
from stu.encoders import TokenEncoder
from stu.errors import OptionError
from stu.files import write_atomically
from stu.generation import generate
from stu.heads import StepHead

VOCABULARY = 257  # of bytes, and what stands before the first one
WAYS = ("state", "context")


def main(arguments: Sequence[str] | None = None) -> int:
    """Time one more token both ways, interleaved; print a table and write the results; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    try:
        settings = Settings(device=str(device_of(options.device)), threads=options.threads)
        settings.apply()
        size, rows = Size(2 * options.context, 1, options.width, None), {}
        print("| | state, tokens/s | context, tokens/s | times as fast | of the medians |\n|---|---|---|---|---|")
        for candidate in find(options.models, causal=True, size=size):
            config = candidate.configured(size).model
            config.depth = options.depth
            calls = _calls(build(config), options.context, settings)
            timings, failures = interleaved(calls, min_seconds=options.min_s, repeats=3)
            for failure in failures.values():
                raise failure
            rows[candidate.name] = {name: asdict(timing) for name, timing in timings.items()}
            print(_row(candidate.name, *(timings[name] for name in WAYS)), flush=True)
    except OptionError as error:
        return refuse(error)
    if options.out is not None:
        line = f"python -m experiments.speed.generation {shlex.join(given)}".strip()
        sizes = {name: getattr(options, name) for name in ("context", "width", "depth", "threads")}
        content = {"command": line, **origin(torch.device(settings.device)), "sizes": sizes, "rows": rows}
        write_atomically(options.out, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.generation", description=__doc__)
    parser.add_argument("--models", nargs="+", default=options_of("model"), help="(default: all of conf/model)")
    parser.add_argument("--context", type=count, default=4096, metavar="L", help="tokens before (default: 4096)")
    parser.add_argument("--width", type=count, default=128, metavar="D", help="(default: 128)")
    parser.add_argument("--depth", type=count, default=4, metavar="N", help="blocks (default: 4)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--min-s", type=positive, default=1.0, help="seconds of each way, in total (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file for the results")
    return parser


def _calls(backbone: Backbone, context: int, settings: Settings) -> dict[str, Callable[[], None]]:
    """One more token: by `generate` from the state, which goes on from call to call; and by all tokens before it."""
    torch.manual_seed(0)
    width = backbone.d_model
    model = SequenceModel(TokenEncoder(width, vocab_size=VOCABULARY), backbone, StepHead(width, d_output=VOCABULARY))
    without_zeros(model)
    model = model.to(settings.device).eval()
    tokens = torch.randint(1, VOCABULARY, (context,)).tolist()
    stream = chain.from_iterable(generate(model, tokens, context, temperature=0) for _ in repeat(None))
    next(stream)  # reads the context

    @torch.no_grad()
    def recompute() -> None:
        inputs = torch.tensor([tokens], device=settings.device)
        int(model.head(model.backbone(model.encoder(inputs))[:, -1:], None).argmax())

    def step() -> None:
        next(stream)
        synchronize(torch.device(settings.device))

    return dict(zip(WAYS, (step, recompute), strict=True))


def _row(name: str, state: Timing, context: Timing) -> str:
    rates = f"{1 / state.min:,.0f} | {1 / context.min:,.2f}"
    return f"| `{name}` | {rates} | {context.min / state.min:,.0f} | {context.median / state.median:,.0f} |"


if __name__ == "__main__":
    command(main)
