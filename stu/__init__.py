"""Spectral state space models: the Spectral Transform Unit, its filters, and what it is compared with.

Names are imported on first use, so that `import stu` alone (and with it `train.py --help`) costs no import of PyTorch.
"""

from typing import TYPE_CHECKING

from stu.lazy import attributes

if TYPE_CHECKING:
    from stu.backbone import Backbone, SequenceModel
    from stu.mixer import Mixer
    from stu.mixers.stu import STU
    from stu.ops.filters import spectral_filters
    from stu.saved.loading import load
    from stu.task import Batch, Classification, Regression, Task

__getattr__ = attributes(
    __name__,
    {
        **dict.fromkeys(("Backbone", "SequenceModel"), "backbone"),
        **dict.fromkeys(("Batch", "Classification", "Regression", "Task"), "task"),
        "Mixer": "mixer",
        "STU": "mixers.stu",
        "load": "saved.loading",
        "spectral_filters": "ops.filters",
    },
)
__all__ = ["STU", "Backbone", "Batch", "Classification", "Mixer", "Regression", "SequenceModel", "Task"]
__all__ += ["load", "spectral_filters"]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
