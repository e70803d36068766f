"""What `model.checkpoint_blocks` saves and costs in a training step: python -m experiments.speed.recomputation."""

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from stu.backbone import Backbone
from stu.cli.composition import build, composed


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per model: what a forward pass keeps, peak (on a GPU) and time of a step; each without and with."""
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.recomputation", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["stu", "mamba2", "transformer"])
    parser.add_argument("--length", type=int, default=2048, metavar="L", help="(default: 2048)")
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="(default: 4)")
    parser.add_argument("--width", type=int, default=64, metavar="D", help="(default: 64)")
    parser.add_argument("--depth", type=int, default=4, metavar="N", help="blocks (default: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is shown (default: 5)")
    options = parser.parse_args(arguments)
    x = torch.randn(options.batch, options.length, options.width, device=options.device)
    print("| | kept MiB | with | peak MiB | with | step ms | with |\n|---|---|---|---|---|---|---|")
    for name in options.models:
        node = composed([f"model={name}", "task=lds", f"task.seq_len={options.length}"]).model
        sizes = {"d_model": options.width, "depth": options.depth, "dropout": 0.1}
        models = [build(node, **sizes, checkpoint_blocks=chosen).to(x.device) for chosen in (False, True)]
        steps = [step(model, x, options.repeats) for model in models]
        columns = [[kept(model, x) / 2**20 for model in models], *zip(*steps, strict=True)]
        print(f"| {name} | {' | '.join(f'{value:,.0f}' for column in columns for value in column)} |", flush=True)


def kept(model: Backbone, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without the parameters."""
    sizes: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = []  # alive, so that no two have one address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(sizes.values())


def step(model: Backbone, x: Tensor, repeats: int) -> tuple[float, float]:
    """Peak memory in MiB of a forward and a backward pass, not a number on a CPU, and milliseconds."""
    times, on_gpu = [], x.device.type == "cuda"
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(x).square().mean().backward()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan"), median(times[1:])


if __name__ == "__main__":
    main()
