"""A run of the benchmark: from the options of the command line to the table, the file and the figure."""

import argparse
import itertools
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from experiments.shared.files import runs_folder
from experiments.shared.machine import memory_of, origin
from experiments.speed import candidates, report
from experiments.speed.bench import Settings, device_of
from experiments.speed.candidates import Size
from experiments.speed.measure import measure
from experiments.speed.results import FILE, Results
from experiments.speed.roofline import measured_peak
from stu.errors import OptionError, require

WIDTH = 160  # at least; in a narrower terminal lines wrap, which is easier to read than columns of single letters


def measure_all(options: argparse.Namespace, command: str) -> None:
    """Measure every size, show its table immediately and save all results so far; draw the figure.

    Raises `OptionError` for impossible options, before anything is measured.
    """
    settings = _settings(options)
    varied = map(dict.fromkeys, (options.batches, options.widths, options.filters, sorted(options.lengths)))
    sizes = [Size(length, batch, width, filters) for batch, width, filters, length in itertools.product(*varied)]
    found = candidates.find(options.models or candidates.allowed(), causal=settings.causal, size=sizes[0])
    folder = _new(options.out or _new_folder(), options.force)
    settings.apply()
    console = _console()
    about = origin(torch.device(settings.device))
    results = Results(command=command, settings=settings, peak=measured_peak(settings), **about)
    report.show_machine(results, console)
    try:
        with Console(stderr=True).status("") as status:
            for rows in measure(found, sizes, settings, status.update):
                results = replace(results, rows=(*results.rows, *rows))
                results.write(folder)
                report.show(results, console, rows)
    finally:  # also when it is interrupted
        if results.rows:
            _draw(results, folder, console)


def redraw(folder: Path) -> None:
    """Show and draw what an earlier run saved. Raises `OptionError` if it cannot be read."""
    try:
        results = Results.read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError("--redraw", folder, f"has no {FILE} that can be read") from error
    console = _console()
    report.show_machine(results, console)
    for rows in results.sizes:
        report.show(results, console, rows)
    _draw(results, folder, console)


def _settings(options: argparse.Namespace) -> Settings:
    device = device_of(options.device)
    require(not options.tf32 or device.type == "cuda", "--tf32", device, "only CUDA devices have it")
    given = ("dtype", "autocast", "tf32", "compile", "repeats", "min_seconds", "limit_seconds")
    return Settings(
        device=str(device),
        causal=not options.bidirectional,
        threads=options.threads or torch.get_num_threads(),
        limit_bytes=0.75 * memory_of(device) if options.limit_gb is None else 1e9 * options.limit_gb,
        **{name: getattr(options, name) for name in given},
    )


def _new(folder: Path, force: bool) -> Path:
    """The folder of the results, created, without results or with some that may be replaced."""
    there = [name for name in (FILE, report.FIGURE) if (folder / name).exists()]
    require(force or not there, "--out", folder, f"has {' and '.join(there)}; --force replaces them")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("--out", folder, f"cannot be created: {error.strerror}") from error
    return folder


def _new_folder() -> Path:
    """A folder below runs/ that does not exist yet."""
    parent = runs_folder() / "speed"
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d-%H%M%S")
    names = itertools.chain([stamp], (f"{stamp}-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, WIDTH) if sys.stdout.isatty() else 10_000
    return console


def _draw(results: Results, folder: Path, console: Console) -> None:
    files = [FILE]
    try:
        report.plot(results, folder / report.FIGURE)
        files.append(report.FIGURE)
    except ModuleNotFoundError as error:
        advice = f"pip install matplotlib, then --redraw {folder}"
        print(f"no figure: {error.name} is not installed; {advice}", file=sys.stderr)
    console.print(f"saved in {folder}: {', '.join(files)}")
