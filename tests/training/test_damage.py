"""Damage to files of a run other than checkpoints: no command ends in a traceback, gives other results, or loses a run.

`python -m tests.training.test_damage 200` tries as many damages as one asks for; the suite tries a few.
"""

import random
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from experiments.compare.runs import read
from stu.training import Run
from tests import runs

COMMAND = runs.small("task=lds", "model=stu", "trainer.max_epochs=1", "log_every=2", "trainer.val_check_interval=0.5")
STEP = "stu.training.module:SequenceModule.training_step"
FILES = ("config.yaml", "manifest.json", "metrics.csv", "summary.json", ".metrics.csv.checksum")


@dataclass(frozen=True)
class Damage:
    """To the file `name` of the run `of`: what is left of it; None: it is gone."""

    of: str
    name: str
    kind: str
    left: bytes | None

    def __str__(self) -> str:
        return f"{self.of}/{self.name}: {self.kind}"


def make(home: Path) -> dict[str, dict[str, Any]]:
    """A finished run and an interrupted one, and what each has computed when it is finished."""
    for name, at in (("finished", None), ("interrupted", runs.signalled(signal.SIGKILL, STEP, 8))):
        done = runs.train(home, *COMMAND, f"name={name}", at=at)
        assert done.code == (128 + signal.SIGKILL if at else 0), done.err
    expected = runs.results(runs.run_of(home, "lds", "stu", "finished"))
    return {"finished": expected, "interrupted": expected}


def damages(home: Path, chance: random.Random) -> Iterator[Damage]:
    """One after another, at random."""
    while True:
        of = chance.choice(("finished", "interrupted"))
        file = runs.run_of(home, "lds", "stu", of).path / chance.choice(FILES)
        if not file.exists():
            continue
        content, kind = file.read_bytes(), chance.choice(("emptied", "deleted", "cut", "cut", "flipped", "flipped"))
        at, bit = chance.randrange(len(content)), chance.randrange(8)
        flipped = bytes([*content[:at], content[at] ^ 1 << bit, *content[at + 1 :]])
        left = {"emptied": b"", "deleted": None, "cut": content[:at], "flipped": flipped}[kind]
        yield Damage(of, file.name, f"{kind} at {at}.{bit}", left)


def survive(home: Path, damage: Damage, expected: dict[str, Any]) -> None:
    """Test, compare and go on with a copy of the damaged run; every difference is said."""
    whole, run = runs.run_of(home, "lds", "stu", damage.of), runs.run_of(home, "lds", "stu", "damaged")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(whole.path, run.path)
    file = run.path / damage.name
    file.unlink() if damage.left is None else file.write_bytes(damage.left)
    harmless = damage.left is not None and damage.left.strip() == (whole.path / damage.name).read_bytes().strip()

    row, before = read(run.path), read(whole.path)
    shown = ("test", "best_val", "step", "seed", "parameters", "sequences_per_second", "total_steps")
    same = all(getattr(row, key) in (getattr(before, key), None) for key in shown)
    assert same or row.unreadable, f"{damage}: compare shows {row}"

    tested = runs.train(home, *COMMAND, "name=damaged", "mode=test")
    assert tested.code == 0, f"{damage}: {tested.err}"
    loss = runs.run_of(home, "lds", "stu", "finished").read_summary()["test"]["loss"]
    if damage.of == "finished":
        assert f"test loss {loss:.4g}" in " ".join(tested.out.split()), str(damage)

    done = runs.train(home, *COMMAND, "name=damaged")
    assert done.code == 0, f"{damage}: {done.err}"
    assert "Traceback" not in done.err + tested.err
    assert all(line.startswith("note: ") for line in done.err.splitlines()), done.err
    assert Run(run.path).finished, str(damage)
    if damage.name != "metrics.csv" or harmless:
        runs.assert_identical(runs.results(run), expected, str(damage))
        return
    others = {key: value for key, value in expected.items() if key != "rows"}
    runs.assert_identical(runs.states(run), others, str(damage))
    if damage.of == "interrupted":  # the one damage that nothing makes good is said
        assert "metrics.csv was" in done.err or runs.results(run)["rows"] == expected["rows"], str(damage)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
@pytest.mark.e2e
def test_damage_is_survived(home: Path):
    expected, chance = make(home), random.Random(1)
    for damage, _ in zip(damages(home, chance), range(2), strict=False):
        survive(home, damage, expected[damage.of])


def main(count: int, seed: int) -> None:
    """Try `count` damages; print those that are not survived."""
    runs.preload()
    lost = 0
    with TemporaryDirectory() as folder:
        expected, chance = make(Path(folder)), random.Random(seed)
        for number, damage in zip(range(count), damages(Path(folder), chance), strict=False):
            try:
                survive(Path(folder), damage, expected[damage.of])
            except Exception as error:
                lost += 1
                print(f"{number} {damage}: {error!r}"[:1500], flush=True)
    print(f"{lost} of {count} not survived", flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in [*sys.argv[1:], "100", "0"][:2]))
