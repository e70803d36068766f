"""Results on the screen and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.speed.results import Results, Row, Timing

ABSENT = "—"
FIGURE = "speed.png"
TIMES = ("forward ms", "(min)", "fwd+bwd ms", "(min)")
RATIOS = ("× literal", "× attention", "launches")
COLUMNS = (*TIMES, *RATIOS, "peak MB", "tokens/s", "step µs", "of fwd", "of roofline")
MARKERS = "os^vDPX*<>p"
STAGES = {"step": "step", "forward_backward": "fwd+bwd", "launches": "launches"}


def show(results: Results, console: Console, rows: Sequence[Row]) -> None:
    """The table of one size."""
    console.print(_title(rows[0]), style="bold")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("mixer", no_wrap=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        table.add_row(row.model, *_cells(results, row), _note(row))
    console.print(table)
    console.print()


def show_machine(results: Results, console: Console) -> None:
    """What this was measured on, and the peak that the roofline assumes."""
    console.print(describe(results))
    peak = results.peak
    if peak is None:
        console.print("peak of the device: not measured, out of memory", end="\n\n")
        return
    flops, traffic = f"{peak.flops / 1e9:,.0f} GFLOP/s in a matrix product", f"{peak.bytes / 1e9:,.0f} GB/s copied"
    console.print(f"peak of the device, measured: {flops}, {traffic}", end="\n\n")


def plot(results: Results, file: Path) -> None:
    """Time and memory against the length, log-log, one row of axes per B, D and K.

    Raises `ModuleNotFoundError` without matplotlib.
    """
    from matplotlib import colormaps  # not a dependency of the benchmark itself
    from matplotlib.figure import Figure

    pairs: Sequence[Any] = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colors = [*pairs[::2], *pairs[1::2]]  # the dark ones first
    groups = list(dict.fromkeys(row.size[:3] for row in results.rows))
    figure = Figure(figsize=(13, 4.5 * len(groups)), layout="constrained")
    for group, (times, memory) in zip(groups, figure.subplots(len(groups), 2, squeeze=False), strict=True):
        rows = [row for row in results.rows if row.size[:3] == group]
        for index, model in enumerate(dict.fromkeys(row.model for row in rows)):
            own = [row for row in rows if row.model == model]
            style = {"color": colors[index % 20], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            forward = [(row.length, 1e3 * row.forward.median) for row in own if row.forward]
            both = [(row.length, 1e3 * row.forward_backward.median) for row in own if row.forward_backward]
            peak = [(row.length, 1e-6 * row.forward_backward_bytes) for row in own if row.forward_backward_bytes]
            _line(times, forward, **style, linestyle=":")
            _line(times, both, **style)
            _line(memory, peak, **style)
            memory.plot([], [], **style, label=_label(own))  # also for models without a line
        for axis, what in ((times, "milliseconds (dotted: forward alone)"), (memory, "peak memory, MB")):
            axis.set(xscale="log", xlabel="L", ylabel=what)
            if any(len(line.get_xdata()) for line in axis.lines):  # an empty axis cannot be logarithmic
                axis.set_yscale("log")
            axis.set_title(_title(rows[0], length=False), fontsize="medium")
            lengths = sorted({row.length for row in rows})
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        memory.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.suptitle(f"forward and backward: {describe(results)}", fontsize="medium")
    figure.savefig(file, dpi=150)


def describe(results: Results) -> str:
    """Where and how it was measured, in one line."""
    machine, settings = results.machine, results.settings
    options = [
        machine["device"],
        f"{settings.threads} thread{'s' * (settings.threads > 1)}" if settings.device == "cpu" else "",
        f"torch {machine['torch']}",
        settings.dtype,
        f"{settings.autocast} autocast" if settings.autocast else "",
        "TF32" if settings.tf32 else "",
        "compiled" if settings.compile else "",
        "" if settings.causal else "bidirectional",
    ]
    return ", ".join(filter(None, options))


def _line(axis: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _label(rows: Sequence[Row]) -> str:
    """The name of a line, and why it ends early."""
    for row in rows:
        if row.forward_backward is None:
            return f"{row.model} (L = {row.length:,}: {_note(row)})"
    return rows[0].model


def _title(row: Row, *, length: bool = True) -> str:
    parts = [f"L = {row.length:,}"] if length else []
    parts += [f"B = {row.batch}", f"D = {row.width}", *([f"K = {row.filters}"] if row.filters else [])]
    return ", ".join(parts)


def _cells(results: Results, row: Row) -> list[str]:
    derived = results.derived(row)
    return [
        *_times(row.forward, 1e3),
        *_times(row.forward_backward, 1e3),
        _number(derived["speedup"]),
        _number(derived["attention_speedup"]),
        f"{row.launches.forward:,} / {row.launches.both:,}" if row.launches else ABSENT,
        _number(row.forward_backward_bytes, 1e-6),
        _number(derived["tokens_per_second"], digits=0),
        _times(row.step, 1e6)[0],
        _number(derived["step_share"], 100, " %"),
        _shares(derived["forward_floor_share"], derived["floor_share"]),
    ]


def _note(row: Row) -> str:
    """Why something was not measured."""
    if "build" in row.failures:
        return f"build: {row.failures['build']}"
    if "forward" in row.failures:  # then nothing else was measured
        return row.failures["forward"]
    failures = dict(row.failures)
    if "forward_backward" in failures:  # then its launches were not counted
        failures.pop("launches", None)
    return "; ".join(f"{STAGES[stage]}: {reason}" for stage, reason in failures.items())


def _times(timing: Timing | None, factor: float) -> tuple[str, str]:
    return (_number(timing.median, factor), _number(timing.min, factor)) if timing else (ABSENT, ABSENT)


def _shares(forward: float | None, both: float | None) -> str:
    return f"{_number(forward, 100)} / {_number(both, 100)} %" if forward or both else ABSENT


def _number(value: float | None, factor: float = 1.0, unit: str = "", digits: int | None = None) -> str:
    """Three significant digits, or a whole number."""
    if value is None:
        return ABSENT
    value *= factor
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}{unit}"
