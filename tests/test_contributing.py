"""CONTRIBUTING says how to add a mixer and a task: its two examples, written into a copy of the project, and used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.generate import README, START, read_trajectories
from tests.runs import ENVIRONMENT, ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
SMALL = ("trainer=cpu", "trainer.max_steps=2", "loader.batch_size=4", "logger=csv", "model.depth=1", "model.d_model=8")
SIZES = ("task.seq_len=16", "task.data.train=20", "task.data.val=5", "task.data.test=5")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files that CONTRIBUTING shows."""
    folder = tmp_path_factory.mktemp("contributing") / "copy"
    unwanted = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "runs", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    for name, content in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(content, encoding="utf-8")
    run(folder, "-m", "tests.generate")
    return folder


def run(copy: Path, *arguments: str) -> str:
    """What `python …` prints in the copy; it has to succeed."""
    environment = ENVIRONMENT | {
        "PATH": str(Path(sys.executable).parent),
        "HOME": str(copy / "home"),
        "PYTHONPATH": str(copy),
        "STU_RUNS": str(copy / "runs"),
        "STU_DATA": str(copy / "data-cache"),
    }
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_examples_are_short():
    python = {name: len(content.splitlines()) for name, content in FILES.items() if name.endswith(".py")}
    assert python.keys() == {"stu/mixers/ema.py", "data/memory/parity.py"}
    assert python["data/memory/parity.py"] <= 50
    assert len(FILES) == 4


@pytest.mark.thorough
def test_what_is_generated_for_a_new_model_and_a_new_task(copy: Path):
    added = (copy / README.name).read_text(encoding="utf-8").splitlines()
    [row] = set(added) - set(README.read_text(encoding="utf-8").splitlines())
    assert row.startswith("| `ema` | EMA: an exponential moving average with a learned rate per channel |")
    assert "\n## `ema`\n\nEMA: an exponential moving average" in (copy / "docs/models.md").read_text(encoding="utf-8")
    assert "\n## `parity`\n\nParity of random bits" in (copy / "docs/tasks.md").read_text(encoding="utf-8")
    assert "\n::: data.memory.parity\n" in (copy / "docs/api/data.md").read_text(encoding="utf-8")
    trajectories = (copy / "tests/golden/trajectories.json").read_text()
    assert '"ema"' in trajectories
    assert START in README.read_text(encoding="utf-8")
    assert "ema" not in read_trajectories()


def test_the_examples_pass_the_checks(copy: Path):
    names = [name for name in FILES if name.endswith(".py")]
    run(copy, "-m", "ruff", "check", *names)
    run(copy, "-m", "ruff", "format", "--check", *names)


@pytest.mark.thorough  # without a cache it takes a minute
def test_the_examples_have_types(copy: Path):
    names = [name for name in FILES if name.endswith(".py")]
    # What mypy knows of the packages that they import, it may know from an earlier check of the project.
    run(copy, "-m", "mypy", f"--cache-dir={ROOT / '.mypy_cache'}", *names)


def test_the_contract_finds_a_new_mixer_and_the_house_rules_hold(copy: Path):
    mixer = "ema and (contract or test_state or golden_trajectory or built_for_every_task or padding_changes)"
    house = "test_layering and (ema or parity or circles or rooms or copied)"
    files = (
        "tests/mixers/test_contract.py",
        "tests/mixers/test_state.py",
        "tests/training/test_training.py",
        "tests/conf/test_conf.py",
        "tests/test_backbone.py",
        "tests/test_layering.py",
    )
    selected = f"({mixer}) or ({house})"
    printed = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "-k", selected, *files)
    passed = re.findall(r"^PASSED (\S+?)::", printed, re.MULTILINE)
    assert set(passed) == set(files), printed
    assert len(passed) - passed.count("tests/test_layering.py") > 60, printed


@pytest.mark.thorough
def test_they_train(copy: Path):
    printed = run(copy, "train.py", "model=ema", "task=parity", *SMALL, *SIZES)
    assert "test accuracy" in printed
    assert "chance" in printed
    printed = run(copy, "-m", "data.prepare", "task=parity", *SIZES)
    assert "parity" in printed
