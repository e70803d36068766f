"""Training with Lightning: the one module, the one data module, optimiser groups, the run directory, callbacks."""

from stu.training.callbacks import Checkpoints, Diverged, MetricsLog, Stopped
from stu.training.data import SequenceData
from stu.training.figures import Figures
from stu.training.loggers import MetricsCSV
from stu.training.module import SequenceModule
from stu.training.plan import StepPlan
from stu.training.run import Run
from stu.training.wandb_log import WandbLog

__all__ = ["Checkpoints", "Diverged", "Figures", "MetricsCSV", "MetricsLog", "Run", "SequenceData", "SequenceModule"]
__all__ += ["StepPlan", "Stopped", "WandbLog"]
