"""Several devices compute what one does: gradients, runs under DDP and FSDP2, resumed on another number of devices."""

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from torch.testing import assert_close

from tests import runs
from tests.models import MODELS
from tests.training.devices import double_model, gradient, gradients, on_two_nodes

STEP = "stu.training.module:SequenceModule.training_step"
STU = runs.small("task=lra_listops", "model=stu", "model.norm=batch", "model.depth=2", "task.data.val=9", "log_every=5")


@pytest.mark.thorough
def test_gradients_of_two_devices_are_those_of_one(tmp_path: Path):
    """Of all models, with padding and batch norm; blocks that are computed again gather their weights again."""
    multiprocessing.start_processes(gradients, (str(tmp_path),), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for name in MODELS:
        expected = gradient(double_model(name), slice(None))
        for kind in ("DDP", "FSDP2", "FSDP2, computed again"):
            for rank in ranks:
                found = rank[kind, name]
                assert found.keys() == expected.keys()
                for key, value in expected.items():
                    scale = float(value.abs().max()) or 1.0
                    assert_close(found[key] / scale, value / scale, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_run_goes_on_under_any_strategy(tmp_path: Path):
    """Begun under FSDP2 on two nodes, stopped, gone on with under DDP, stopped, and ended by one process."""
    command = (*STU, "trainer.gradient_clip_val=0.5", "trainer.accumulate_grad_batches=2")
    assert runs.train(tmp_path, *command, "name=one").code == 0
    expected = runs.results(runs.run_of(tmp_path, "lra_listops", "stu", "one"))
    run = runs.run_of(tmp_path, "lra_listops", "stu", "run")
    for strategy, batch in (("fsdp", 10), ("ddp", 12)):
        at = runs.signalled(signal.SIGTERM, STEP, batch)
        first, second = on_two_nodes(tmp_path, *command, f"trainer={strategy}", "name=run", at=at)
        assert (first.code, first.err, second.code, second.err) == (143, "", 143, "")
    done = runs.train(tmp_path, *command, "name=run")
    assert done.code == 0
    assert "world_size 2 → 1" in done.err
    found = runs.results(run)
    assert [row[:3] for row in found["rows"]] == [row[:3] for row in expected["rows"]]
    assert [row[3] for row in found["rows"]] == pytest.approx([row[3] for row in expected["rows"]], rel=1e-4, abs=1e-6)
    starts = json.loads(run.manifest.read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 2, 1]
    assert [bool(start.get("stopped")) for start in starts] == [True, True, False]
