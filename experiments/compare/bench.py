"""How fast runs are compared: python -m experiments.compare.bench. Makes run directories in a folder that it deletes.

Times are the least of some repetitions, of a process from its start to its end.
"""

import argparse
import importlib.util
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.shared.arguments import count
from experiments.shared.files import command

MODELS = ("gru", "lru", "lstm", "mamba2", "s4", "s4d", "s5", "stu", "stu_t", "transformer")
TASKS = ("lds", "lra_listops")
TRAIN = ("train/loss", "train/accuracy", "lr/default", "gradient_norm", "time/sequences_per_second", "time/data_share")
VAL = ("val/loss", "val/accuracy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make runs and print what it takes to compare them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.bench", description=__doc__)
    parser.add_argument("--runs", type=count, default=200, help="how many (default: 200)")
    parser.add_argument("--numbers", type=count, default=10_000, help="logged numbers per run (default: 10000)")
    parser.add_argument("--repeats", type=count, default=3, help="of which the fastest counts (default: 3)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        few, many, page = Path(folder) / "few", Path(folder) / "many", Path(folder) / "report.html"
        make_runs(few, 4, 100)
        make_runs(many, options.runs, options.numbers)
        sizes = f"{options.runs} runs of {options.numbers:,} numbers"
        for title, what in (
            ("4 small runs, the leaderboard", [few]),
            (f"{sizes}, the leaderboard", [many]),
            (f"{sizes}, with --significance", [many, "--significance"]),
        ):
            print(f"{title}: {seconds(what, options.repeats):.2f} s")
        if importlib.util.find_spec("plotly") and importlib.util.find_spec("experiments.compare.report"):
            taken = seconds([many, "--html", page], options.repeats)
            print(f"{sizes}, with --html: {taken:.2f} s, {page.stat().st_size / 1e6:.1f} MB")
    return 0


def seconds(arguments: Sequence[Any], repeats: int) -> float:
    """The least time that the command takes."""
    return min(_once([sys.executable, "-m", "experiments.compare", *map(str, arguments)]) for _ in range(repeats))


def _once(words: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def make_runs(home: Path, runs: int, numbers: int) -> None:
    """Finished runs that are read as trained ones are: ten models, five seeds and two learning rates, two tasks."""
    for index in range(runs):
        seed, lr = index // len(MODELS) % 5, (1e-3, 3e-3)[index // 50 % 2]
        task = TASKS[index // 100 % len(TASKS)]
        path = home / task / MODELS[index % len(MODELS)] / f"{index},optimizer.lr={lr},seed={seed}"
        path.mkdir(parents=True)
        config = {
            "seed": seed,
            "optimizer": {"lr": lr},
            **{f"part{n}": dict.fromkeys("abcdefgh", n) for n in range(12)},
        }
        (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        start = {"time": "2026-01-01T00:00:00+00:00", "command": f"train.py task={task} seed={seed}", "device": "cpu"}
        facts = {"monitor": "accuracy", "mode": "max", "total_steps": numbers, "parameters": 100_000, "seed": seed}
        (path / "manifest.json").write_text(json.dumps({**facts, "starts": [start]}), encoding="utf-8")
        chance = random.Random(index)
        (path / "metrics.csv").write_text("\n".join(_rows(numbers, chance)) + "\n", encoding="utf-8")
        best = {"metric": "val/accuracy", "value": 0.5 + chance.random() / 10, "step": numbers, "epoch": 1.0}
        result = {"test": {"accuracy": 0.5 + chance.random() / 10, "loss": 1.0}, "baselines": {"majority": 0.17}}
        (path / "summary.json").write_text(json.dumps({**result, "best": best, "seconds": 100.0}), encoding="utf-8")


def _rows(numbers: int, chance: random.Random) -> list[str]:
    """The lines of a `metrics.csv` with so many numbers."""
    lines: list[str] = []
    step = 0
    while len(lines) < numbers:
        step += 10
        names = TRAIN if step % 500 else (*TRAIN, *VAL)
        level = math.exp(-step / 3000)
        lines += [f"{step},{step / 1000},{name},{chance.random() + level!r}" for name in names]
    return ["step,epoch,metric,value", *lines[:numbers]]


if __name__ == "__main__":
    command(main)
