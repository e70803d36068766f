"""Collect the results of runs on the Long Range Arena: python -m experiments.lra RUN … --out FOLDER.

Writes results.json, with commands, machine, accuracy over time and results of finished runs, and accuracy.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.shared.files import command, refuse
from stu.errors import OptionError
from stu.files import write_atomically
from stu.training import Run
from stu.training.loggers import read_metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the runs and write the files; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.lra", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write the files")
    parser.add_argument("--force", action="store_true", help="replace existing results")
    options = parser.parse_args(arguments)
    for path in options.runs:
        if not Run(path).finished:
            return refuse(f"{path}: no finished run: summary.json is missing or damaged")
    file: Path = options.out / "results.json"
    if file.exists() and not options.force:
        return refuse(f"{file}: is there already; --force replaces it")
    try:
        results = [read(path) for path in options.runs]
    except KeyError as error:
        return refuse(f"a manifest.json or summary.json has no {error}")
    except (OptionError, OSError) as error:
        return refuse(error)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(results, indent=1) + "\n")
    for result in results:
        print(" ".join([*result["run"], *(f"{key}={value}" for key, value in result["test"].items())]))
    try:
        draw(results, options.out / "accuracy.png")
    except ModuleNotFoundError:
        print("no accuracy.png: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
    return 0


def read(path: Path) -> dict[str, Any]:
    """The results of a finished run; `curves`: metric → [(step, value), …]."""
    run = Run(path.absolute())
    manifest, summary = run.read_manifest(), run.read_summary()
    monitor = manifest["monitor"]
    curves: dict[str, list[tuple[int, float]]] = {f"{split}/{monitor}": [] for split in ("train", "val")}
    for step, _, name, value in read_metrics(run.metrics):
        if name in curves:
            curves[name].append((step, value))
    starts = [{key: start[key] for key in ("time", "command", "device", "git")} for start in manifest["starts"]]
    facts = {"run": run.path.parts[-3:], "starts": starts, "data": manifest["data"], "monitor": monitor}
    kept = ("test", "best", "baselines", "steps", "seconds", "parameters")
    return facts | {key: summary[key] for key in kept} | {"curves": curves}


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """The monitored metric over the steps, one panel per task: training faint, validation strong, baselines dashed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tasks = sorted({result["run"][0] for result in results})
    figure = Figure(figsize=(5.5 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for task, panel in zip(tasks, panels, strict=True):
        here = [result for result in results if result["run"][0] == task]
        for color, result in zip(colormaps["tab10"].colors, here, strict=False):  # type: ignore[attr-defined]
            for split, width, alpha in (("train", 0.6, 0.35), ("val", 1.8, 1.0)):
                steps, values = zip(*result["curves"][f"{split}/{result['monitor']}"], strict=True)
                label = "/".join(result["run"][1:]) if split == "val" else None
                panel.plot(steps, values, color=color, linewidth=width, alpha=alpha, label=label)
        for name, value in here[0]["baselines"].items():
            panel.axhline(value, color="black", linestyle="--", linewidth=0.7)
            panel.annotate(name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=7)
        panel.set(title=task, xlabel="step", ylabel=here[0]["monitor"])
        panel.legend(fontsize="small", loc="lower right")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    command(main)
