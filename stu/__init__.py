"""Spectral state space models: the Spectral Transform Unit, its filters, and what it is compared with.

Names are imported on first use, so that `import stu` alone (and with it `train.py --help`) costs no import of PyTorch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stu.backbone import Backbone, SequenceModel
    from stu.mixer import Mixer
    from stu.mixers.stu import STU
    from stu.ops.filters import spectral_filters
    from stu.task import Batch, Classification, Regression, Task

_MODULES = {
    **dict.fromkeys(("Backbone", "SequenceModel"), "stu.backbone"),
    **dict.fromkeys(("Batch", "Classification", "Regression", "Task"), "stu.task"),
    "Mixer": "stu.mixer",
    "STU": "stu.mixers.stu",
    "spectral_filters": "stu.ops.filters",
}
__all__ = ["STU", "Backbone", "Batch", "Classification", "Mixer", "Regression", "SequenceModel", "Task"]
__all__ += ["spectral_filters"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if "." not in name and find_spec(f"stu.{name}"):
        return import_module(f"stu.{name}")
    raise AttributeError(f"module 'stu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
