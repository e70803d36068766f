"""Weights & Biases beside training: in a thread of its own, so that nothing it does ends a run or holds it up."""

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from subprocess import Popen
from threading import Event, Thread
from typing import Any, Literal, get_args

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from stu.errors import require
from stu.training.run import Run

log = logging.getLogger(__name__)
WandbMode = Literal["auto", "online", "offline", "disabled"]
LONGEST = 24 * 3600.0  # seconds to wait for
GRACE = 3.0  # seconds to do what it was told, after which wandb-core counts as stuck
WAITING = 10_000  # calls that may wait for W&B: megabytes of rows
TAG, NAME = 64, 128  # characters that W&B takes in a tag, and in the names of runs, groups and projects

_running: list["WandbLog"] = []


class WandbLog(Logger):
    """A Weights & Biases run. Whatever W&B, its server or its disk does, training goes on; `metrics.csv` is complete.

    A thread works off what is logged. Its first failure ends it and is said in one line, with the command that uploads
    later what was written. The start is waited for `init_timeout` seconds, the end `finish_timeout`.

    mode: "auto": online where wandb has credentials (environment, settings or netrc), else offline in the run
    directory; never a prompt. Nothing starts before `start`. Raises `OptionError` for what W&B would refuse.
    """

    def __init__(
        self,
        *,
        mode: WandbMode = "auto",
        project: str = "stu",
        entity: str | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 30.0,
        finish_timeout: float = 20.0,
    ) -> None:
        super().__init__()
        require(mode in get_args(WandbMode), "mode", mode, f"must be one of {', '.join(get_args(WandbMode))}")
        fits = 0 < len(project) <= NAME and not set(project) & set("/\\#?%:")
        require(fits, "project", repr(project), rf"must have 1 … {NAME} characters, none of them / \ # ? % :")
        named = entity is None or re.fullmatch(r"[\w.-]+", entity) is not None
        require(named, "entity", repr(entity), "must be a user or a team: letters, digits and - _ . only")
        for tag in tags:
            require(0 < len(tag) <= TAG, "tags", repr(tag), f"a tag has 1 … {TAG} characters; this one has {len(tag)}")
        for name, seconds in (("init_timeout", init_timeout), ("finish_timeout", finish_timeout)):
            require(0 < seconds <= LONGEST, name, seconds, "must be seconds, above 0 and at most a day")
        self.mode, self.project, self.entity, self.tags = mode, project, entity, tuple(tags)
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self._calls: Queue[Callable[[Any], object] | None] = Queue(WAITING)
        self._started, self._ended = Event(), Event()
        self._works = self._said = False
        self._gave_up = ""  # what W&B said when it stopped uploading
        self._folder: Path | None = None  # where W&B writes
        self._core: Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """Lightning's name for this logger."""
        return "wandb"

    @property
    def version(self) -> str:
        """One run, one version."""
        return ""

    @rank_zero_only
    def start(self, run: Run, names: tuple[str, str]) -> None:
        """Begin, or continue after an earlier start of the same run directory.

        names: of task and model, the group and the first tags of the W&B run.
        """
        if "disabled" in (self.mode, os.environ.get("WANDB_MODE")):
            return
        arguments = {
            "dir": run.path,
            "id": run.id,
            "name": f"{names[1]}/{run.path.name}"[:NAME],
            "group": names[0][:NAME],
            "tags": list(dict.fromkeys([*(name[:TAG] for name in names), *self.tags])),
            "project": self.project,
            "entity": self.entity,
            "resume": "allow",
        }
        # W&B's reports on itself, which the interpreter would send, and wait for, at its exit.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        logging.raiseExceptions = False  # on a full disk, each line of its own log would be a traceback
        self._works = True
        _running.append(self)
        Thread(target=self._work, args=(arguments,), name="wandb", daemon=True).start()
        # Processes that load data fork after it: not while W&B starts one itself, if that can be helped.
        self._started.wait(self.init_timeout)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration of the run."""
        self._call(lambda run: run.config.update(params, allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row."""
        row = {name: float(value) for name, value in metrics.items()} | {"trainer/global_step": step}
        self._call(lambda run: run.log(row))

    @rank_zero_only
    def log_image(self, name: str, file: Path, step: int) -> None:
        """A PNG file, read later."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: [wandb.Image(str(file))], "trainer/global_step": step})

        self._call(send)

    def close(self, exit_code: int) -> None:
        """End the W&B run, as failed unless the exit code is 0; what doesn't answer any more is killed."""
        self._call(lambda run: run.finish(exit_code=exit_code))
        self._call(None)
        with suppress(KeyboardInterrupt):  # a user who doesn't wait
            self._ended.wait(self.finish_timeout + GRACE)
        if not self._ended.is_set():
            self._say("was stopped before it had everything")
            if self._core:
                self._core.kill()
            self._ended.wait(GRACE)

    def _call(self, call: Callable[[Any], object] | None) -> None:
        """Let the thread call this with the W&B run, in turn; None ends it."""
        if not self._works:
            return
        try:
            self._calls.put_nowait(call)
        except Full:
            self._works = False
            self._say(f"does not answer: {WAITING} calls wait for it")

    def _work(self, arguments: dict[str, Any]) -> None:
        """The thread."""
        try:
            run = self._begin(arguments)
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            self._started.set()
            while (call := self._calls.get()) is not None:
                call(run)
                if self._gave_up:
                    self._say(self._gave_up)
        except Exception as error:  # of any kind: logging must never end a run
            self._say(f"failed: {_flat(error)}")
        finally:
            self._works = False
            self._started.set()
            _end_service()
            self._ended.set()

    def _begin(self, arguments: dict[str, Any]) -> Any:
        """The W&B run, offline where it can't be online."""
        failure = None
        try:
            if (mode := self._where()) != "offline":
                return self._init(mode, arguments)
        except Exception as error:  # of any kind, as above
            failure = error
            _end_service()  # a half-started one would keep the run's id
            os.environ.pop("WANDB_SERVICE", None)  # one of another process, which may be the reason
        run = self._init("offline", arguments)
        if failure:
            self._say(f"did not start online: {_flat(failure)}")
        return run

    def _where(self) -> Literal["online", "offline", "disabled"]:
        """The mode; of "auto", what wandb's own settings and credentials say."""
        if self.mode != "auto":
            return self.mode
        import wandb

        if self._set_up().settings.mode == "disabled":
            return "disabled"
        try:
            return "online" if wandb.login(verify=False) else "offline"
        except wandb.errors.UsageError:  # no credentials, and nobody to ask
            return "offline"

    def _init(self, mode: Literal["online", "offline", "disabled"], arguments: dict[str, Any]) -> Any:
        import wandb

        self._set_up()
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )
        run = wandb.init(mode=mode, settings=settings, **arguments)
        if folder := run.settings.sync_dir:
            self._folder = Path(folder)
        return run

    def _set_up(self) -> Any:
        """The library of wandb, its messages sent to `_heed`: on a terminal, it would ask for a key."""
        import wandb

        silent = wandb.Settings(silent=True)
        library = wandb.setup(silent)  # which starts wandb-core; there is no public name for the process
        connection = getattr(library, "_connection", None)
        self._core = getattr(getattr(connection, "_proc", None), "_process", None)
        heard = logging.Logger("wandb")
        heard.addFilter(self._heed)
        wandb.termsetup(silent, heard)
        return library

    def _heed(self, record: logging.LogRecord) -> bool:
        """Of all that W&B says: that it stopped uploading, a permission or a quota missing. It raises nothing then."""
        if "wandb sync" in (text := record.getMessage()):
            self._gave_up = f"gave up: {_flat(text).rpartition('WARNING ')[2].partition('. ')[0]}"
        return False

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            command = f"wandb sync --include-online {shlex.quote(str(self._folder))}"
            later = f", and `{command}` uploads what is missing" if self._folder else ""
            log.warning("Weights & Biases %s; metrics.csv has everything%s", what, later)


def log_figure(logger: Logger, name: str, file: Path, step: int) -> None:
    """Log a PNG to W&B; other loggers do not take images."""
    if isinstance(logger, WandbLog):
        logger.log_image(name, file, step)


def close_wandb() -> None:
    """End the W&B runs of this process, as failed where an exception is under way (`finally`): with its exit code."""
    match sys.exc_info()[1]:
        case None | SystemExit(code=None):
            code = 0
        case SystemExit(code=int(given)):
            code = given
        case _:
            code = 1
    while _running:
        _running.pop().close(code)


def _end_service() -> None:
    """End wandb-core, for which the interpreter would wait, and what is left of a run, as failed."""
    with suppress(Exception, SystemExit):  # what a dead one raises, or its exit code, says nothing that was not said
        import wandb

        wandb.run = None  # which would keep the next run of a sweep from logging in
        wandb.teardown(exit_code=1)


def _flat(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")
