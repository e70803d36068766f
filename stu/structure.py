"""What decides a module's function beside its parameters: saved with them, and compared on loading."""

import json
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stu.description import Described

KEY = "_extra_state"  # PyTorch's name for what a module saves beside its parameters


class Structured(Described, nn.Module):
    """A module whose parameters do not say all of what it computes.

    `structure` names the attributes that say the rest. They are part of the `state_dict`, and `load_state_dict` raises
    its `RuntimeError` where they differ, as for parameters of another shape: the shapes alone often fit. States saved
    without them are loaded unseen. The name of an attribute that is a dict stands for all its items.
    """

    structure: ClassVar[tuple[str, ...]] = ()

    def get_extra_state(self) -> Tensor:
        """The structure as the bytes of a JSON object, so that a `state_dict` holds nothing but tensors."""
        return torch.tensor(list(json.dumps(self._structure()).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is taken over: `load_state_dict` has compared it."""

    def _structure(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self.structure:
            value = attrgetter(name)(self)
            found |= value if isinstance(value, dict) else {name: value}
        return found

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key != prefix + KEY]
        theirs, ours = _read(state_dict.get(prefix + KEY)), json.loads(json.dumps(self._structure()))
        error_msgs.extend(
            f"{prefix}{name}={ours[name]}: what was saved is of {name}={theirs[name]}"
            for name in ours
            if name in theirs and theirs[name] != ours[name]
        )


def _read(saved: Tensor | None) -> dict[str, Any]:
    """A structure; nothing where there is none, or what was done to all entries of a `state_dict` has damaged it."""
    try:
        return dict(json.loads(bytes(int(byte) for byte in saved.tolist()))) if saved is not None else {}
    except Exception:  # of many kinds: of the meta device, cast to half precision, averaged with others
        return {}
