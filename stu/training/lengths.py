"""One checkpoint at several lengths: the tests of `task.test_lengths`."""

from collections.abc import Mapping

import lightning as L

from stu.backbone import SequenceModel
from stu.errors import OptionError
from stu.training.data import SequenceData
from stu.training.figures import Figures
from stu.training.module import SequenceModule
from stu.training.records import AT


def at_lengths(data: SequenceData, model: SequenceModel) -> dict[int, SequenceData]:
    """The loaders of the task at each of its `test_lengths`, prepared.

    Raises `OptionError` where the task has no such length, or the model cannot take it.
    """
    found: dict[int, SequenceData] = {}
    for length in data.task.test_lengths:
        try:
            task = data.task.at_length(length)
            with model.backbone.resized(task.seq_len):
                task.prepare()
        except OptionError as error:
            raise OptionError("test_lengths", list(data.task.test_lengths), f"cannot have {length}: {error}") from error
        found[length] = data.of(task)
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
