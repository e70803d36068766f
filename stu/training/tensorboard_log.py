"""Event files of TensorBoard."""

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from stu.errors import require
from stu.training.records import flatten
from stu.training.run import Run
from stu.training.trackers import RUNNING, Direct, description, softly


class TensorBoardLog(Direct):
    """A file of each start in the folder tensorboard/ of the run, written by tensorboardX: `tensorboard --logdir runs`.

    A start that goes on says from which step on TensorBoard is to forget what the ones before have written. Options and
    facts of the run are its hyperparameters. Raises `OptionError` where tensorboardX is not installed.
    """

    title = "tensorboard"

    def __init__(self) -> None:
        super().__init__()
        needed = 'needs tensorboardX: pip install -e ".[tensorboard]"'
        require(find_spec("tensorboardX") is not None, "logger", self.title, needed)

    @softly
    def start(self, run: Run, choices: Mapping[str, Any], baselines: Mapping[str, float]) -> None:
        """Open the file."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        manifest, folder = run.read_manifest(), run.path / "tensorboard"
        starts = len(manifest["starts"])
        folder.mkdir(exist_ok=True)
        # not SummaryWriter, whose queue blocks for ever once its thread has met a full disk
        self.writer = EventsWriter(str(folder / "events"), f".{starts}")
        RUNNING.append(self)
        if starts > 1:  # also where those before have left no checkpoint
            self._write(run.last_step + 1, session_log=SessionLog(status=SessionLog.START))
        options = description(run, choices, baselines) | {"settings": run.settings}
        self._describe(options, (f"test/{manifest['monitor']}", f"best/val/{manifest['monitor']}"))

    def _describe(self, options: Mapping[str, Any], results: tuple[str, ...]) -> None:
        """Hyperparameters, and which metrics are the results beside them."""
        from tensorboardX.summary import hparams

        flat = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in flatten(options).items()}
        experiment, beginning, _ = hparams(flat, dict.fromkeys(results, 0.0))
        self._write(0, summary=experiment)
        self._write(0, summary=beginning)

    @softly
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._write(step or 0, summary=Summary(value=values))

    @softly
    def log_image(self, name: str, file: Path, step: int) -> None:
        """The PNG as it is."""
        from tensorboardX.proto.summary_pb2 import Summary

        with Image.open(file) as image:
            width, height = image.size
        picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=file.read_bytes())
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=picture)]))

    @softly
    def save(self) -> None:
        """Send what was written to the disk, as before a checkpoint."""
        self.writer.flush()

    @softly
    def close(self, exit_code: int) -> None:
        """Close the file."""
        self.writer.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writer.write_event(Event(wall_time=time.time(), step=step, **content))
