"""Trackio: a tracker whose runs lie in a SQLite file, shown by `trackio show`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from stu.errors import require
from stu.training.records import SWEEP, flatten
from stu.training.run import Run
from stu.training.trackers import RUNNING, Direct, description, softly


class TrackioLog(Direct):
    """A run of trackio, in the folder $TRACKIO_DIR, or else in the folder trackio/ of the run.

    Trackio decides on its folder once in a process: where one trains several runs, all go to that of the first.
    project: to which the run belongs. Raises `OptionError` where trackio is not installed.
    """

    title = "trackio"

    def __init__(self, *, project: str = "stu") -> None:
        super().__init__()
        needed = 'needs trackio: pip install -e ".[trackio]"'
        require(find_spec("trackio") is not None, "logger", self.title, needed)
        require(bool(project.strip()), "project", repr(project), "must have a character, at least")
        self.project = project

    @softly
    def start(self, run: Run, choices: Mapping[str, Any], baselines: Mapping[str, float]) -> None:
        """Begin, or go on with the run of an earlier start."""
        os.environ.setdefault("TRACKIO_DIR", os.path.abspath(run.path / "trackio"))
        with in_silence():
            import trackio

            self.run = trackio.init(
                project=self.project,
                # by which trackio finds it again: another folder may have a run of the same path, or have had one here
                name="-".join((str(choices["task"]), str(choices["model"]), run.path.name, run.id[:6])),
                group=os.environ.get(SWEEP) or str(choices["task"]),
                config=flatten(description(run, choices, baselines) | {"settings": run.settings}),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        RUNNING.append(self)

    @softly
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row."""
        self.run.log({name: float(value) for name, value in metrics.items()}, step=step)

    @softly
    def log_image(self, name: str, file: Path, step: int) -> None:
        """A copy of the PNG."""
        import trackio

        self.run.log({name: trackio.Image(str(file))}, step=step)

    @softly
    def close(self, exit_code: int) -> None:
        """Wait until all is written, half a minute at most."""
        import trackio

        with in_silence():
            trackio.finish()  # not the run's own, which would be called again, and talk, at the exit of Python


@contextmanager
def in_silence() -> Iterator[None]:
    """Without what trackio prints of itself."""
    with redirect_stdout(StringIO()):
        yield
