"""Training with Lightning: the one module, the one data module, optimiser groups, the run directory, callbacks.

Names are imported on first use: a command that trains nothing itself, such as a sweep, imports neither PyTorch nor
Lightning.
"""

from typing import TYPE_CHECKING

from stu.lazy import attributes

if TYPE_CHECKING:
    from stu.training import evaluate, lengths, names, report
    from stu.training.callbacks import Checkpoints, Diverged, MetricsLog, Stopped
    from stu.training.data import SequenceData
    from stu.training.figures import Figures
    from stu.training.fitting import Fitting, Parts
    from stu.training.loggers import MetricsCSV
    from stu.training.memory import within_memory
    from stu.training.module import SequenceModule, model_for, seed_everything
    from stu.training.optional import EMA, DeviceStats, EarlyStopping, check_callbacks
    from stu.training.plan import StepPlan, check_trainer, make_trainer
    from stu.training.pretrain import Phase, Pretraining
    from stu.training.run import Run, rank
    from stu.training.sharded import FullyShard
    from stu.training.signals import leaving
    from stu.training.start import test, train
    from stu.training.tensorboard_log import TensorBoardLog
    from stu.training.trackers import Tracker
    from stu.training.trackio_log import TrackioLog
    from stu.training.wandb_log import WandbLog
    from stu.training.writing import Continuation, continued

__getattr__ = attributes(
    __name__,
    {
        **dict.fromkeys(("Checkpoints", "Diverged", "MetricsLog", "Stopped"), "callbacks"),
        "SequenceData": "data",
        "Figures": "figures",
        **dict.fromkeys(("Fitting", "Parts"), "fitting"),
        "MetricsCSV": "loggers",
        "within_memory": "memory",
        **dict.fromkeys(("SequenceModule", "model_for", "seed_everything"), "module"),
        **dict.fromkeys(("EMA", "DeviceStats", "EarlyStopping", "check_callbacks"), "optional"),
        **dict.fromkeys(("StepPlan", "check_trainer", "make_trainer"), "plan"),
        **dict.fromkeys(("Phase", "Pretraining"), "pretrain"),
        **dict.fromkeys(("Run", "rank"), "run"),
        "FullyShard": "sharded",
        "leaving": "signals",
        **dict.fromkeys(("test", "train"), "start"),
        "TensorBoardLog": "tensorboard_log",
        "Tracker": "trackers",
        "TrackioLog": "trackio_log",
        "WandbLog": "wandb_log",
        **dict.fromkeys(("Continuation", "continued"), "writing"),
    },
)
__all__ = ["Checkpoints", "Diverged", "Figures", "FullyShard", "MetricsCSV", "MetricsLog", "Run", "SequenceData"]
__all__ += [
    "SequenceModule",
    "StepPlan",
    "Stopped",
    "TensorBoardLog",
    "Tracker",
    "TrackioLog",
    "WandbLog",
    "check_trainer",
    "evaluate",
    "leaving",
    "make_trainer",
]
__all__ += ["EMA", "DeviceStats", "EarlyStopping", "check_callbacks"]
__all__ += ["Continuation", "Fitting", "Parts", "Phase", "Pretraining", "continued", "lengths", "model_for", "names"]
__all__ += ["rank", "report", "seed_everything", "test", "train", "within_memory"]
