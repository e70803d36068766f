"""How threads wait is settled before PyTorch is imported, and by the environment first."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "0"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_the_environment_decides(given: dict[str, str], expected: dict[str, str]):
    code = (
        "import json, os, sys, experiments.speed\n"
        "assert 'torch' not in sys.modules\n"
        f"print(json.dumps({{name: os.environ[name] for name in {NAMES} if name in os.environ}}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.slow
def test_what_comes_too_late_is_not_set():
    """Or results would name an environment that PyTorch never read."""
    code = f"import torch, os, experiments.speed; print([name for name in {NAMES} if name in os.environ])"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_train_py_settles_it_before_other_imports():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    _, _, *first = map(ast.unparse, tree.body[:6])  # after the docstring and `from __future__`
    calls = ["output.guard()", "usage.answer()", "threads.wait_briefly()"]
    assert first == ["from stu.cli import output, threads, usage", *calls]
