"""What a sweep costs besides the training of its jobs: python -m experiments.sweep.overhead.

Sweeps of one and of three small jobs, one after another, are compared with the seconds that the jobs say they trained;
and a finished sweep of many jobs, most of them copies of one, is repeated, which only looks for their results. Measure
on a quiet machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stu.files import sealed, unsealed
from stu.training.names import run_name

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("task=lds", "model=lru", "task.data.train=64", "task.data.val=16", "task.data.test=16", "task.seq_len=64"),
    *("model.d_model=8", "model.depth=1", "trainer=cpu", "trainer.max_epochs=null", "trainer.max_steps=20"),
    *("logger=csv", "figures.when=never"),
)


def sweep(home: Path, seeds: str) -> float:
    """The seconds that `python train.py -m … seed=seeds` takes, with runs and data below `home`."""
    environment = os.environ | {"STU_RUNS": str(home / "runs"), "STU_DATA": str(home / "data")}
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, f"seed={seeds}"]
    started = time.perf_counter()
    subprocess.run(command, cwd=home, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def copied(runs: Path, jobs: int) -> None:
    """Let the run of seed 2 stand for all seeds that have not been trained."""
    for seed in range(5, jobs + 1):
        source, target = (runs / run_name([*SMALL, f"seed={one}"], {"seed"}) for one in (2, seed))
        shutil.copytree(source, target)
        manifest = unsealed((target / "manifest.json").read_text(encoding="utf-8"))
        manifest["settings"]["seed"] = seed
        (target / "manifest.json").write_text(sealed(manifest), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep.overhead", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100, help="of the sweep that is repeated")
    parser.add_argument("--times", type=int, default=5, help="how often it is repeated")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        sweep(home, "0")  # makes the data
        one, three = sweep(home, "1"), sweep(home, "2,3,4")
        runs = home / "runs/lds/lru"
        texts = [file.read_text(encoding="utf-8") for file in runs.glob("seed=[234],*/summary.json")]
        trained = statistics.mean(json.loads(text)["seconds"] for text in texts)
        job = (three - one) / 2
        print(f"a job: {job - trained:.1f} s besides its training of {trained:.1f} s")
        print(f"a sweep of which not all is finished: {one - job:.1f} s before its first job")
        copied(runs, options.jobs)
        again = [sweep(home, f"range(1,{options.jobs + 1})") for _ in range(options.times)]
        best, median = min(again), statistics.median(again)
        print(f"{options.jobs} finished jobs, repeated: {best:.2f} s at best, {median:.2f} s in the median")


if __name__ == "__main__":
    main()
