"""How large the tensors are that operations make."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sizes(TorchDispatchMode):
    """How many entries the largest tensor has that any operation makes, not counting what it changes in place."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(each) for each in args}
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor) and id(each) not in given]
        self.largest = max([self.largest, *(each.numel() for each in made if not each._is_view())])
        return result
