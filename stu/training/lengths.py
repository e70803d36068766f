"""One checkpoint at several lengths: the tests of `task.test_lengths`."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from stu.backbone import SequenceModel
from stu.errors import OptionError, require
from stu.preprocessing import Numbers
from stu.task import Task
from stu.training.data import SequenceData
from stu.training.figures import Figures
from stu.training.module import SequenceModule
from stu.training.records import AT


def at_lengths(
    data: SequenceData, model: SequenceModel, arguments: Mapping[str, Any], world_size: int
) -> dict[int, SequenceData]:
    """The loaders of the task at each of its `test_lengths`, prepared. arguments: of the Trainer.

    Raises `OptionError` where the task has no such length, the model cannot take it, or a device has nothing to test.
    """
    found: dict[int, SequenceData] = {}
    for length in data.task.test_lengths:
        try:
            require(length >= 1, "seq_len", length, "must be at least 1")
            task = data.task.at_length(length)
            with model.backbone.resized(task.seq_len):
                task.prepare()
            allowed = "they depend on the length, and the model knows those of its own"
            require(_reads_alike(data.task, task), "tokens", "others", allowed)
            found[length] = data.of(task)
            found[length].require_tests(arguments, world_size)
        except OptionError as error:
            raise OptionError("test_lengths", list(data.task.test_lengths), f"cannot have {length}: {error}") from error
    return found


def test(
    trainer: L.Trainer, module: SequenceModule, data: SequenceData, others: Mapping[int, SequenceData]
) -> dict[str, float]:
    """The metrics of the test set, and those at other lengths as NAME@LENGTH; a figure, where figures are drawn."""
    trainer.test(module, data, verbose=False)
    found, monitor, trained = module.evaluated, module.task.monitor, module.task.seq_len
    monitored = {trained: found[monitor]}
    for length, loaders in others.items():
        with module.at(loaders.task):
            trainer.test(module, loaders, verbose=False)
        found = found | {f"{name}{AT}{length}": value for name, value in module.evaluated.items()}
        monitored[length] = module.evaluated[monitor]
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, Figures):
            callback.draw_lengths(trainer, monitor, monitored, trained)
    return found


def _reads_alike(task: Task, other: Task) -> bool:
    """Whether tokens mean the same in both tasks; the units of numbers may differ a little."""
    here, there = task.preprocessing, other.preprocessing
    return here is None or there is None or isinstance(here.inputs, Numbers) or here.as_dict() == there.as_dict()
