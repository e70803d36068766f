"""Spectral state space models: the Spectral Transform Unit, its filters, and what it is compared with."""

from stu.backbone import Backbone, SequenceModel
from stu.mixer import Mixer
from stu.mixers.stu import STU
from stu.ops.filters import spectral_filters
from stu.task import Batch, Task

__all__ = ["STU", "Backbone", "Batch", "Mixer", "SequenceModel", "Task", "spectral_filters"]
