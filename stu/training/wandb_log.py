"""Weights & Biases beside training: in a thread of its own, so that nothing it does ends a run or holds it up."""

import logging
import math
import os
import re
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from queue import Full, Queue
from subprocess import Popen
from threading import Event, Thread
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_only

from stu.errors import require
from stu.files import write_atomically
from stu.training.records import PRUNED, SWEEP, Row, flatten, parse_row
from stu.training.run import Run
from stu.training.signals import ANNOUNCED
from stu.training.trackers import RUNNING, Tracker, description

log = logging.getLogger(__name__)
WandbMode = Literal["auto", "online", "offline", "disabled"]
LONGEST = 24 * 3600.0  # seconds to wait for
GRACE = 3.0  # seconds to do what it was told, after which wandb-core counts as stuck
WAITING = 10_000  # calls that may wait for W&B: megabytes of rows
TAG, NAME = 64, 128  # characters that W&B takes in a tag, and in the names of runs, groups and projects
STEP = "trainer/global_step"  # the axis of all charts
CLOSED = "rows"  # a file in a folder of W&B that has all it was given: how many rows metrics.csv had by then
BEST: dict[str, Callable[..., float]] = {"min": min, "max": max}
PREEMPTING = (signal.SIGTERM, *ANNOUNCED)  # of clusters and sweeps, which start the command again
CHECKPOINTS: dict[str, tuple[str, ...]] = {"none": (), "best": ("best",), "all": ("best", "last")}


class WandbLog(Tracker):
    """A Weights & Biases run. Whatever W&B, its server or its disk does, training goes on; `metrics.csv` is complete.

    A thread works off what is logged. Its first failure ends it and is said in one line, with the command that uploads
    later what was written. The start is waited for `init_timeout` seconds, the end `finish_timeout`.

    mode: "auto": online where wandb has credentials (environment, settings or netrc), else offline in the run
    directory; never a prompt. Nothing starts before `start`. Raises `OptionError` for what W&B would refuse.
    checkpoints: which of a finished run are uploaded, each an artifact: "none", "best", or "all": the last one, too.

    Its config has the chosen options by their names (`model`, `task`, `experiment`, …), the facts of the manifest, the
    baselines, the directory, and all options in full below `settings`. The summary has of losses the least and of the
    monitored metric the best value, over all starts of the run, of other metrics the last one, and at the end all of
    summary.json.
    """

    title = "wandb"

    def __init__(
        self,
        *,
        mode: WandbMode = "auto",
        project: str = "stu",
        entity: str | None = None,
        tags: Sequence[str] = (),
        group: str | None = None,
        job_type: str | None = None,
        checkpoints: Literal["none", "best", "all"] = "none",
        init_timeout: float = 30.0,
        finish_timeout: float = 20.0,
    ) -> None:
        super().__init__()
        require(mode in get_args(WandbMode), "mode", mode, f"must be one of {', '.join(get_args(WandbMode))}")
        fits = 0 < len(project) <= NAME and not set(project) & set("/\\#?%:")
        require(fits, "project", repr(project), rf"must have 1 … {NAME} characters, none of them / \ # ? % :")
        allowed = f"must be one of {', '.join(CHECKPOINTS)}"
        require(checkpoints in CHECKPOINTS, "checkpoints", checkpoints, allowed)
        named = entity is None or re.fullmatch(r"[\w.-]+", entity) is not None
        require(named, "entity", repr(entity), "must be a user or a team: letters, digits and - _ . only")
        for tag in tags:
            require(0 < len(tag) <= TAG, "tags", repr(tag), f"a tag has 1 … {TAG} characters; this one has {len(tag)}")
        for name, given in (("group", group), ("job_type", job_type)):
            length = given is None or 0 < len(given) <= NAME
            require(length, name, repr(given), f"must have 1 … {NAME} characters, or be null")
        for name, seconds in (("init_timeout", init_timeout), ("finish_timeout", finish_timeout)):
            require(0 < seconds <= LONGEST, name, seconds, "must be seconds, above 0 and at most a day")
        self.mode, self.project, self.entity, self.tags = mode, project, entity, tuple(tags)
        self.group, self.job_type, self.checkpoints = group, job_type, checkpoints
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self._calls: Queue[Callable[[Any], object] | None] = Queue(WAITING)
        self._started, self._ended = Event(), Event()
        self._works = self._said = False
        self._gave_up = ""  # what W&B said when it stopped uploading
        self._folder: Path | None = None  # where W&B writes
        self._core: Popen[bytes] | None = None
        self._run: Run | None = None
        self._goes_on = self._offline = False  # whether there were earlier starts; whether W&B is offline
        self._resumes_after = 0  # optimiser steps in the checkpoint that the run goes on from
        self._extremes: dict[str, str] = {}  # metrics of which the least or greatest value counts: "min" or "max"

    @rank_zero_only
    def start(self, run: Run, choices: Mapping[str, Any], baselines: Mapping[str, float]) -> None:
        """Begin, or continue after an earlier start of the same run directory.

        run: with its manifest, this start included. choices: the option of each group, of `task` and `model` at least.
        """
        if "disabled" in (self.mode, os.environ.get("WANDB_MODE")):
            return
        manifest = run.read_manifest()
        names, sweep = (choices["task"], choices["model"]), os.environ.get(SWEEP)
        losses, monitored = ("loss", "min"), (manifest.get("monitor", "loss"), manifest.get("mode", "min"))
        self._run, self._resumes_after, self._goes_on = run, run.last_step, len(manifest["starts"]) > 1
        self._extremes = {f"{part}/{name}": best for part in ("train", "val") for name, best in (losses, monitored)}
        arguments = {
            "dir": run.path,
            "id": run.id,
            "name": f"{names[1]}/{run.path.name}"[:NAME],
            "group": (self.group or os.environ.get("WANDB_RUN_GROUP") or sweep or names[0])[:NAME],
            "job_type": self.job_type or os.environ.get("WANDB_JOB_TYPE") or ("sweep" if _in_sweep() else "train"),
            "tags": list(dict.fromkeys([*(name[:TAG] for name in names), *self.tags])),
            "project": self.project,
            "entity": self.entity,
            "resume": "allow",
        }
        if "WANDB_SWEEP_ID" in os.environ:  # under `wandb agent`, which chooses project, entity, and the id by this:
            os.environ["WANDB_RUN_ID"] = (not sweep and os.environ.get("WANDB_RUN_ID")) or run.id
        # W&B's reports on itself, which the interpreter would send, and wait for, at its exit.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        logging.raiseExceptions = False  # on a full disk, each line of its own log would be a traceback
        self._works = True
        RUNNING.append(self)
        Thread(target=self._work, args=(arguments,), name="wandb", daemon=True).start()
        self._describe(description(run, choices, baselines))
        # Processes that load data fork after it: not while W&B starts one itself, if that can be helped.
        self._started.wait(self.init_timeout)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration of the run."""
        self._describe({"settings": params})

    def _describe(self, config: dict[str, Any]) -> None:
        self._call(lambda run: run.config.update(config, allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row."""
        row = {name: float(value) for name, value in metrics.items()} | {STEP: step}
        self._call(lambda run: run.log(row))

    @rank_zero_only
    def log_image(self, name: str, file: Path, step: int) -> None:
        """A PNG file, read later."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: [wandb.Image(str(file))], STEP: step})

        self._call(send)

    @rank_zero_only
    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """The summary of a finished run, its nested names joined by /."""
        best = summary["best"]
        flat = flatten(summary, separator="/") | {f"best/{best['metric']}": best["value"]}
        self._call(lambda run: run.summary.update(flat))
        for name in CHECKPOINTS[self.checkpoints]:
            at = {"step": best["step"], "epoch": best["epoch"], best["metric"]: best["value"]}
            self._upload(name, at if name == "best" else {"step": summary["steps"]})

    def _upload(self, name: str, metadata: Mapping[str, Any]) -> None:
        """A checkpoint as an artifact, read where it lies: nothing is copied."""

        def send(run: Any) -> None:
            import wandb

            assert self._run is not None
            artifact = wandb.Artifact(f"{self._run.id}-{name}", "model", metadata=dict(metadata))
            artifact.add_file(os.path.abspath(self._run.checkpoints / f"{name}.ckpt"), policy="immutable")
            run.log_artifact(artifact, aliases=[name, "latest"])

        self._call(send)

    def close(self, exit_code: int) -> None:
        """End the W&B run, as failed unless the exit code is 0; what doesn't answer any more is killed.

        A run that was stopped to go on later, rather than pruned, is marked so.
        """
        self._call(self._recount)
        if exit_code - 128 in PREEMPTING and self._run and not (self._run.path / PRUNED).exists():
            self._call(lambda run: run.mark_preempting())
        self._call(lambda run: run.finish(exit_code=exit_code))
        self._call(None)
        with suppress(KeyboardInterrupt):  # a user who doesn't wait
            self._ended.wait(self.finish_timeout + GRACE)
        if not self._ended.is_set():
            self._say("was stopped before it had everything")
            if self._core:
                self._core.kill()
            self._ended.wait(GRACE)

    def _catch_up(self, run: Any, rows: Sequence[Row]) -> None:
        """Log again what an earlier start that was killed has not left in W&B, which writes and sends rows later."""
        sent, last = {}, -1
        if run.resumed:
            sent = {name: run.summary.get(name) for name in run.summary.keys()}  # noqa: SIM118  # of W&B's own kind
            last = sent.get(STEP, last)
        else:
            known = self._set_aside()
            rows = [] if known is None else rows[known:]
        rows = [row for row in rows if row[0] <= self._resumes_after]
        for (step, epoch, _), same in groupby(rows, lambda row: (*row[:2], row[2].startswith("val/"))):
            values = {name: value for _, _, name, value in same}
            if step > last or (step == last and not self._are_sent(values, sent)):
                run.log(values | {"epoch": epoch, STEP: step})

    def _set_aside(self) -> int | None:
        """Rename the folders of killed starts, at which `wandb sync` would end; how many rows other folders have.

        None: none is missing, or nobody knows which.
        """
        if not self._offline or self._run is None or self._folder is None:
            return None
        earlier = [folder for folder in self._folder.parent.glob(f"offline-run-*-{self._run.id}") if folder.is_dir()]
        closed = {folder: folder / CLOSED for folder in earlier if (folder / CLOSED).exists()}
        killed = [folder for folder in earlier if folder not in closed and folder.name != self._folder.name]
        for folder in killed:
            folder.rename(folder.with_name(f"killed-{folder.name}"))
        return max((int(file.read_text()) for file in closed.values()), default=0) if killed else None

    def _rows(self) -> list[Row]:
        """Those of metrics.csv that can be read, while more are appended."""
        if self._run is None or not self._run.metrics.exists():
            return []
        lines = self._run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        return [row for line in lines if (row := parse_row(line))]

    def _are_sent(self, values: Mapping[str, float], summary: Mapping[str, Any]) -> bool:
        """Whether the summary could be that after a row of these values."""

        def is_sent(name: str, value: float) -> bool:
            best, had = self._extremes.get(name), summary.get(name)
            if best is None or had is None or isinstance(had, int | float):
                return bool(had == value)
            return bool(BEST[best](had[best], value) == had[best])

        return all(is_sent(name, value) for name, value in values.items())

    def _recount(self, run: Any) -> None:
        """The summary of all starts of the run: by itself, W&B counts anew in each."""
        if self._goes_on:
            run.summary.update(self._totals(self._rows()))

    def _totals(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Of each metric what W&B shows: {"min": …}, {"max": …} or the last value."""
        values: dict[str, list[float]] = {}
        for _, _, name, value in rows:
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
        return {
            name: {best: BEST[best](found)} if (best := self._extremes.get(name)) else found[-1]
            for name, found in values.items()
        }

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
            run.define_metric(STEP)
            for name, best in {"*": None, **self._extremes}.items():
                run.define_metric(name, summary=best, step_metric=STEP, step_sync=True)
            rows = self._rows() if self._goes_on else []  # before this start writes any
            self._started.set()
            if self._goes_on:
                self._catch_up(run, rows)
            while (call := self._calls.get()) is not None:
                call(run)
                if self._gave_up:
                    self._say(self._gave_up)
            if self._folder and self._folder.is_dir() and self._works and not self._gave_up:
                write_atomically(self._folder / CLOSED, str(len(self._rows())))
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
        self._offline = mode == "offline"
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


def _in_sweep() -> bool:
    """Whether a sweep has started this command, ours or one of W&B."""
    return bool(os.environ.get(SWEEP) or os.environ.get("WANDB_SWEEP_ID"))


def _end_service() -> None:
    """End wandb-core, for which the interpreter would wait, and what is left of a run, as failed."""
    with suppress(Exception, SystemExit):  # what a dead one raises, or its exit code, says nothing that was not said
        import wandb

        wandb.run = None  # which would keep the next run of a sweep from logging in
        wandb.teardown(exit_code=1)


def _flat(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")
