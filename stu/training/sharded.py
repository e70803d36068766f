"""Weights divided over the processes of a run: FSDP2, with the checkpoints of one process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


class FullyShard(ModelParallelStrategy):
    """Every process holds its share of each weight, gradient and moment, and has a block whole while it computes it.

    All are kept in the precision of one process, since state-space parameters do not bear bfloat16. Checkpoints are
    those of one process, too: a run may go on under any strategy, on any number of devices.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """By `load_optimizer_state_dict`, as everywhere else."""
        return True

    def setup_environment(self) -> None:
        """Shares for all processes; by default there would be as many as nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, in the first process."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the optimiser of the whole weights, in the first process."""
        return self._whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it; what is to be loaded of it, the module may still change."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Keep this process's share."""
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep this process's share."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
            parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            state = {
                number: {name: _share(value, parameter) for name, value in saved["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same with whole tensors on the CPU; the other processes only take part in gathering them."""

        def gathered(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            whole = value.full_tensor()
            return whole.cpu() if self.is_global_zero else None

        return tree_map(gathered, state)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`module.load_state_dict` of whole weights, of which the module may hold a share."""
    own = module.state_dict()
    module.load_state_dict({name: _share(weight, own.get(name)) for name, weight in weights.items()}, strict=strict)


def local(x: Tensor) -> Tensor:
    """The share of a tensor that is in this process; all of it where it is not divided."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The weights of a model whole in every process, for what the processes do not do in step.

    Such as an evaluation, of which they have unlike numbers of batches, and other methods than `forward`.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def _share(value: Any, like: Any) -> Any:
    """What this process holds of a whole tensor, where `like` is divided and of its shape."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
