"""What a process of a distributed run does; a module of its own because every process imports it, which takes time."""

import torch
from torch import distributed, nn

from stu.norm import BatchNorm
from tests.models import small_backbone


def batch_norm(rank: int, folder: str) -> None:
    """What one of two processes computes with its share of the batch, left in `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    job = torch.load(f"{folder}/job.pt")
    norm = BatchNorm(job["x"].shape[-1]).double()
    norm.load_state_dict(job["state"])
    rows = slice(0, 3) if rank == 0 else slice(3, 5)
    x, mask = job["x"][rows].requires_grad_(), job["mask"][rows]
    y = norm(x, mask)
    (y * job["loss_w"][rows])[mask].sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    torch.save(found | {"state": norm.state_dict()}, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def compiled_and_not(rank: int, folder: str) -> None:
    """The gradients of a compiled model in one of two processes, and of the same model as it is, left in `folder`."""
    _with_and_without("compile", rank, folder)


def recomputed_and_not(rank: int, folder: str) -> None:
    """The same of a model whose blocks are computed again in the backward pass."""
    _with_and_without("checkpoint_blocks", rank, folder)


def _with_and_without(option: str, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    for chosen in (True, False):
        torch.manual_seed(0)
        backbone = small_backbone("stu_t", seq_len=24, depth=1, **{option: chosen})
        model = nn.parallel.DistributedDataParallel(backbone)
        torch.manual_seed(rank)
        x = torch.randn(3, 20 - rank, 8)
        model(x, torch.arange(20 - rank) < torch.tensor([[20], [4], [11]])).square().sum().backward()
        found.append({name: p.grad for name, p in model.module.named_parameters()} | dict(model.module.named_buffers()))
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()
