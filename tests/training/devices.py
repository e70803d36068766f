"""What one of two processes does; a module of its own because both import it."""

from types import SimpleNamespace

import torch
from torch import distributed, nn

from stu.training.module import SequenceModule, compute


def half_filled_metrics(rank: int, folder: str) -> None:
    """What one of two processes counts in five steps, interrupted after the third, in the eyes of a row of the log."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
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
    distributed.destroy_process_group()


def counting(rank: int, *, world_size: int) -> SequenceModule:
    """A module as one of several processes has it, with nothing but its metrics."""
    task = SimpleNamespace(monitor="loss", metrics=dict, rollout=None)
    module = SequenceModule(nn.Linear(1, 1), task)  # type: ignore[arg-type]
    module._trainer = SimpleNamespace(world_size=world_size, global_rank=rank)  # type: ignore[assignment]
    return module
