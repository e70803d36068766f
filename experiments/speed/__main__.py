"""The command line: python -m experiments.speed. See --help."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.shared.arguments import count, positive
from experiments.shared.files import command, refuse, runs_folder
from stu.cli.usage import options_of

EXAMPLES = """\
examples:
  python -m experiments.speed                                            every mixer, L = 256 … 16384
  python -m experiments.speed --models stu literal literal:k_y=2         these; with another option of the mixer
  python -m experiments.speed --lengths 1024 --widths 64 256 --batches 1 32 --filters 16 24
  python -m experiments.speed --device cuda --tf32 --lengths 1024 4096 16384 --out FOLDER    all mixers, unattended
  python -m experiments.speed --device cuda --autocast bfloat16 --lengths 1024 16384 131072
  python -m experiments.speed --redraw FOLDER                            table and figure of an earlier run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show and save, or show what was saved; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    from experiments.speed import run
    from stu.errors import OptionError

    try:
        if options.redraw is None:
            run.measure_all(options, f"python -m experiments.speed {shlex.join(given)}".strip())
        else:
            run.redraw(options.redraw)
    except OptionError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed",
        usage=argparse.SUPPRESS,  # so that an error takes one line
        description="Compare time and memory of mixers, (B, L, D) → (B, L, D), side by side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--models", nargs="+", metavar="MODEL[:KEY=VALUE,…]",
                      help="mixers, with options; literal is the STU as the paper writes it, the baseline "
                      f"(default: literal and all of conf/model: {', '.join(options_of('model'))})")  # fmt: skip
    what.add_argument("--lengths", nargs="+", type=count, default=[256, 1024, 4096, 16384], metavar="L",
                      help="(default: 256 1024 4096 16384)")  # fmt: skip
    what.add_argument("--batches", nargs="+", type=count, default=[8], metavar="B", help="(default: 8)")
    what.add_argument("--widths", nargs="+", type=count, default=[128], metavar="D", help="(default: 128)")
    what.add_argument("--filters", nargs="+", type=count, default=[None], metavar="K",
                      help="num_filters of the mixers that have it (default: as in their files)")  # fmt: skip
    what.add_argument("--bidirectional", action="store_true", help="as on bidirectional tasks; nothing streams")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    how.add_argument("--threads", type=count, metavar="N", help="of the CPU (default: PyTorch's)")
    how.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="(default: float32)")
    how.add_argument("--autocast", choices=["bfloat16", "float16"], help="mixed precision")
    how.add_argument("--tf32", action="store_true", help="matrix products in TF32, on GPUs")
    how.add_argument("--compile", action="store_true", help="with torch.compile, except the streamed step")
    how.add_argument("--repeats", type=count, default=5, metavar="N",
                     help="minimum repetitions of each call (default: 5)")  # fmt: skip
    how.add_argument("--min-s", type=positive, default=0.5, metavar="S", dest="min_seconds",
                     help="minimum seconds of each call, in total (default: 0.5)")  # fmt: skip
    how.add_argument("--limit-s", type=positive, default=30.0, metavar="S", dest="limit_seconds",
                     help="a call that takes longer is abandoned (default: 30)")  # fmt: skip
    how.add_argument("--limit-gb", type=positive, metavar="GB",
                     help="a call that takes more memory is abandoned (default: three quarters of all)")  # fmt: skip
    where, runs = parser.add_argument_group("where"), runs_folder() / "speed"
    where.add_argument("--out", type=Path, metavar="FOLDER",
                       help=f"for results.json and speed.png (default: a new folder in {runs})")  # fmt: skip
    where.add_argument("--force", action="store_true", help="replace the results in that folder")
    where.add_argument("--redraw", type=Path, metavar="FOLDER", help="measure nothing; show and draw the results there")
    return parser


if __name__ == "__main__":
    command(main)
