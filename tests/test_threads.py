"""How threads wait is settled before PyTorch is imported, and by the environment first."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


def test_train_py_settles_it_before_other_imports():
    body = ast.parse((ROOT / "train.py").read_text(encoding="utf-8")).body
    before = [
        ast.unparse(statement) for statement in body[: list(map(ast.unparse, body)).index("threads.wait_briefly()")]
    ]
    assert before[1:] == ["from conf import threads, usage", "usage.answer()"]
