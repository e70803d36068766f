"""Where the host would wait for a device, found without one: a run whose model and batches are on "meta".

Meta tensors have no values, so nothing can be read from them; what a GPU would make wait shows as an error.
"""

import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("meta")
BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostWait(AssertionError):
    """An operation for which the host waits, and the line of Python that asks for it."""


class Watched(Exception):
    """All is watched that should be: the run need not go on."""


class NoHostWaits(TorchDispatchMode):
    """Raises `HostWait` where a GPU would make the host wait, also inside of our custom operators.

    These are operations whose result on the host, or whose shape, depends on values of the device, and copies between
    the two, but for those to the device that are `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = _Calls(self)

    def __enter__(self) -> "NoHostWaits":
        self.calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def check(self, what: Any, why: str | None) -> None:
        """Raise `HostWait` for an operation and a reason, if there is one."""
        if why:
            raise HostWait(f"{what}: {why}, at {_line()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "stu":  # run its body as on a device; on meta only its shapes would be computed
            composite = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
            with torch.no_grad(), composite, self:  # so that operations made of others arrive as those
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.check(func, _why_it_waits(func, args, kwargs))
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """What is called from Python and never becomes an operation on meta."""

    def __init__(self, mode: NoHostWaits) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor", "asarray", "new_tensor"):
            given = args[-1] if args else None
            made = result.device == DEVICE and not isinstance(given, Tensor)
            self.mode.check(name, "numbers of Python are copied to the device" if made else None)
        elif name in ("__getitem__", "__setitem__") and args[0].device == DEVICE:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            listed = any(isinstance(part, list | np.ndarray) for part in index)
            self.mode.check(name, "a list of indices is copied to the device" if listed else None)
        elif name in ("__format__", "__repr__") and args[0].device == DEVICE:
            self.mode.check(name, "the value is read from the device")
        return result


def _why_it_waits(func: Any, args: Any, kwargs: Any) -> str | None:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not any(x.device == DEVICE for x in tensors) and torch.device(kwargs.get("device") or "cpu") != DEVICE:
        return None
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        selects = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if selects and (name == "index" or args[2].numel() > 1):  # one value is a masked_fill
            return "how many are selected is counted on the device"
    elif BY_VALUE & set(func.tags):
        return "the value is read from the device"
    if name in ("_to_copy", "copy_"):
        source = args[-1] if name == "copy_" and isinstance(args[-1], Tensor) else args[name == "copy_"]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        quick = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if source.device != target and not (quick and target == DEVICE):
            return f"a copy from {source.device} to {target}"
        return None
    if any(x.device != DEVICE and x.ndim > 0 for x in tensors):
        return "a tensor of the host is used on the device"
    return None


def _line() -> str:
    """The innermost line of ours, or of whoever calls PyTorch."""
    frames = [f for f in traceback.extract_stack() if f.filename != __file__]
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename]
    others = [f for f in frames if "/torch/" not in f.filename]
    for frame in reversed(ours):
        if not frame.filename.endswith(("tests/runs.py", "train.py")):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}: {frame.line}"
    return f"{others[-1].filename}:{others[-1].lineno}: {others[-1].line}"


class OnMeta(SingleDeviceStrategy):
    """Trains on meta tensors, watched from the first training step to the end of the first validation after it.

    steps, validation_batches: watched so far.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.mode, self.watching = NoHostWaits(), False
        self.steps = self.validation_batches = 0

    def model_to_device(self) -> None:
        self.model.to(DEVICE)

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(DEVICE, non_blocking=True), batch)

    def on_train_start(self) -> None:
        self.watching = True
        self.mode.__enter__()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1

    def validation_step(self, *arguments: Any) -> Any:
        self.validation_batches += self.watching
        return super().validation_step(*arguments)

    def results(self, metrics: nn.ModuleDict) -> dict[str, float]:
        """In place of `stu.training.module.compute`, which reads the results of the validation: the end."""
        raise Watched

    def teardown(self) -> None:
        if self.watching:
            self.mode.__exit__(None, None, None)
            self.watching = False
