"""What one of two processes does; a module of its own because both import it.

`python -m tests.training.devices` trains every model alone, under DDP and under FSDP2, and compares the results.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from stu.backbone import SequenceModel
from stu.encoders import LinearEncoder
from stu.heads import PooledHead
from stu.training.module import SequenceModule, compute
from stu.training.sharded import whole
from tests import runs
from tests.models import MODELS, randomized, small_backbone

LENGTHS = [24, 7, 24, 15]  # of the sequences of a batch over all processes; the longest of each process is the same

# Two nodes with a process each, as they are started by hand.
NODES = ("+trainer.num_nodes=2", "trainer.accelerator=cpu", "trainer.devices=1")


@contextmanager
def met(rank: int, folder: str) -> Iterator[None]:
    """In a group of two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    yield
    distributed.barrier()  # or the one that leaves later may wait for the other, which is gone
    distributed.destroy_process_group()


def gradients(rank: int, folder: str) -> None:
    """The gradients of all models under DDP and under FSDP2, of one of two halves of a batch, left in `folder`."""
    found = {}
    with met(rank, folder):
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        for name in MODELS:
            found["DDP", name] = gradient(nn.parallel.DistributedDataParallel(double_model(name)), slice(rank, None, 2))
            for kind, again in (("FSDP2", False), ("FSDP2, computed again", True)):
                module = around(double_model(name, checkpoint_blocks=again), rank, world_size=2)
                module._device_mesh = mesh
                module.configure_model()
                found[kind, name] = gradient(module.model, slice(rank, None, 2))
    torch.save(found, f"{folder}/rank{rank}.pt")


def double_model(name: str, **options: Any) -> SequenceModel:
    """A small model of conf/model in float64, the same in every process."""
    torch.manual_seed(0)
    backbone = small_backbone(name, seq_len=max(LENGTHS), **options)
    parts = LinearEncoder(backbone.d_model, d_input=3), backbone, PooledHead(backbone.d_model, d_output=2)
    return randomized(SequenceModel(*parts)).double()


def gradient(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """The whole gradient of every parameter, and what the buffers are afterwards, of these sequences of the batch."""
    torch.manual_seed(1)
    x, targets = torch.randn(4, max(LENGTHS), 3).double(), torch.randn(4, 2).double()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    (model(x[rows], mask[rows]) - targets[rows]).square().mean().backward()
    found = {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name.replace("module.", ""): value for name, value in found.items()}


def on_two_nodes(home: Path, *overrides: str, at: Callable[[], None] | None = None) -> list[runs.Finished]:
    """Both processes of a run; `at` is what `runs.start` takes, for the second one."""
    node = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 10_000)}
    words = [override for override in overrides if override != "trainer=cpu"]
    started = [
        runs.start(home, *words, *NODES, at=at if rank == "1" else None, **node, NODE_RANK=rank) for rank in ("0", "1")
    ]
    return [process.wait() for process in started]


def half_filled_metrics(rank: int, folder: str) -> None:
    """What one of two processes counts in five steps, interrupted after the third, in the eyes of a row of the log."""
    with met(rank, folder):
        count(rank, folder)


def count(rank: int, folder: str) -> None:
    job = torch.load(f"{folder}/job.pt")
    module = counting(rank, world_size=2)
    for loss in job["losses"][:3, rank]:
        module.train_metrics["loss"].update(loss)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    again = counting(rank, world_size=2)
    again.on_load_checkpoint(loaded := checkpoint | {"state_dict": dict(checkpoint["state_dict"])})
    again.load_state_dict(loaded["state_dict"])
    for each in (module, again):
        for loss in job["losses"][3:, rank]:
            each.train_metrics["loss"].update(loss)
    torch.save({"row": compute(module.train_metrics), "again": compute(again.train_metrics)}, f"{folder}/rank{rank}.pt")
    if rank == 0:
        torch.save(checkpoint, f"{folder}/checkpoint.pt")


def counting(rank: int, *, world_size: int) -> SequenceModule:
    """A module as one of several processes has it, with nothing but its metrics."""
    parts: Any = nn.Identity(), nn.Identity(), nn.Linear(1, 1)
    return around(SequenceModel(*parts), rank, world_size=world_size)


def around(model: nn.Module, rank: int, *, world_size: int) -> SequenceModule:
    """The module of a model in one of several processes."""
    task = SimpleNamespace(monitor="loss", metrics=dict, rollout=None, preprocessing=None, facts=dict)
    module = SequenceModule(model, task)  # type: ignore[arg-type]
    module._trainer = SimpleNamespace(world_size=world_size, global_rank=rank)  # type: ignore[assignment]
    return module


def compare(home: Path, model: str) -> float:
    """The largest relative difference between results of one process and of two, under DDP and under FSDP2."""
    command = runs.small("task=lra_listops", f"model={model}", "model.dropout=0", "task.data.val=9")
    finished = [runs.train(home, *command, "name=one")]
    for strategy in ("ddp", "fsdp"):
        finished += on_two_nodes(home, *command, f"trainer={strategy}", f"name={strategy}")
    for done in finished:
        assert (done.code, done.err) == (0, ""), done
    one, *others = (runs.run_of(home, "lra_listops", model, name).read_summary() for name in ("one", "ddp", "fsdp"))
    differences = [0.0]
    for other in others:
        for expected, found in ((one["test"], other["test"]), (one["best"]["val"], other["best"]["val"])):
            differences += [abs(found[name] - value) / max(abs(value), 1e-3) for name, value in expected.items()]
    return max(differences)


if __name__ == "__main__":
    runs.preload()
    for name in sys.argv[1:] or MODELS:
        with TemporaryDirectory() as folder:
            print(f"{name}: {compare(Path(folder), name):.1e}", flush=True)
