"""Jobs of a sweep: each is a command of its own, and what became of it stands in its run directory."""

import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.compare.runs import is_locked
from experiments.sweep.executors.local import THREADS
from stu.cli.check import check
from stu.cli.composition import composed
from stu.cli.usage import CONF
from stu.errors import Busy, require
from stu.files import mapping_in, sealed, write_atomically
from stu.locks import Holder
from stu.training import names
from stu.training.lock import RunLock
from stu.training.records import PRUNED, Row, flatten, parse_row, summary_in

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "sweep"  # the group of what is swept: no job has it
T = TypeVar("T")


@dataclass
class Job:
    """The command `python train.py <overrides>` and its run directory `run`.

    code: the exit code of the last attempt. state: waiting, running, finished, failed, pruned or stopped, as far as
    this sweep has seen; reason: why it failed or was pruned; value: the best validation value; seconds: of all attempts
    of this sweep. title: what tells it from the others. replaces: the id of the run that `overwrite=true` asks to
    delete. differs: whether the run that is there was made with other settings, of which its own process knows whether
    they matter.
    """

    overrides: tuple[str, ...]
    run: Path
    devices: int = 1
    nodes: int = 1
    trial: int | None = None
    attempts: int = 0
    code: int | None = None
    state: str = "waiting"
    reason: str = ""
    value: float | None = None
    seconds: float = 0.0
    title: str = ""
    mode: str = "train"
    replaces: str | None = None
    differs: bool = False
    _claim: RunLock | None = field(default=None, repr=False)
    _rows: "Rows | None" = field(default=None, repr=False)

    @property
    def command(self) -> list[str]:
        """What to start. What `overwrite=true` has deleted once, it does not delete again."""
        again = ["overwrite=false"] if self.replaces is not None and self.id != self.replaces else []
        return [sys.executable, str(ROOT / "train.py"), *self.overrides, *again]

    @property
    def key(self) -> str:
        """What no other job of a sweep has: its run, of which there may be several tests."""
        return str(self.run) if self.mode == "train" else " ".join((str(self.run), *self.overrides))

    @property
    def id(self) -> str:
        """The id of the run that is there now, empty where there is none."""
        return str((self.manifest or {}).get("id", ""))

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings of the run that is there, as far as its manifest says them."""
        return (self.manifest or {}).get("settings")

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the run, None where it is absent or damaged."""
        return mapping_in(self.run / "manifest.json")

    @property
    def finished(self) -> bool:
        """Whether the run has its summary, and is not one to be overwritten; a test is never finished before."""
        outdated = self.differs or self._outdated or self.mode != "train"
        return not outdated and summary_in(self.run / "summary.json") is not None

    @property
    def pruned(self) -> bool:
        """Whether the run was given up, and has not been finished since."""
        return (self.run / PRUNED).exists() and not self.finished and not self._outdated

    @property
    def _outdated(self) -> bool:
        return self.replaces is not None and self.id == self.replaces

    @property
    def busy(self) -> bool:
        """Whether a process works in the run, or is about to."""
        place = self._place
        return self.mode == "train" and any(is_locked(place.parent / f".{place.name}.{k}") for k in ("lock", "claim"))

    @property
    def holder(self) -> str:
        """Which process that is, where it says so."""
        for kind in ("lock", "claim"):
            file = self._place.parent / f".{self._place.name}.{kind}"
            with suppress(OSError):
                if is_locked(file):
                    return f": {Holder.of(file)}"
        return ""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its process: a run goes on with as many threads as it began with, for equal last digits."""
        starts = (self.manifest or {}).get("starts") or [{}]
        threads = starts[0].get("threads")
        return {THREADS: str(threads)} if isinstance(threads, int) and THREADS not in os.environ else {}

    @property
    def _place(self) -> Path:
        return Path(os.path.realpath(self.run))

    def claim(self) -> bool:
        """Whether the run is this sweep's, from before its process starts until `release`; tests need no claim."""
        if self.mode != "train":
            return True
        claim = RunLock(self._place, "claim")
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            claim.acquire()
        except Busy:
            return False
        except OSError as error:
            require(False, "paths.runs", self.run, f"must be a folder to write to: {error.strerror}")
        self._claim = claim
        return True

    def release(self) -> None:
        """Give the claim back; folders made for a run that was refused are deleted again."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None
            for folder in () if self.run.exists() else (self.run.parent, self.run.parent.parent):
                with suppress(OSError):  # there are others
                    folder.rmdir()

    def clear(self) -> None:
        """Delete the claim that a killed sweep has left."""
        claim = RunLock(self._place, "claim")
        if claim.file.exists() and not is_locked(claim.file):
            with suppress(Busy, OSError):
                claim.acquire()
            claim.release()

    def result(self) -> float:
        """The best validation value of a finished run. Raises `OptionError` where there is no summary."""
        summary = summary_in(self.run / "summary.json")
        require(summary is not None, "name", self.run, "is no finished run: summary.json is absent or damaged")
        return float((summary or {})["best"]["value"])

    @property
    def rows(self) -> list[Row]:
        """The rows (step, epoch, metric, value) of metrics.csv so far; of the file, only what is new is read."""
        if self._rows is None:
            self._rows = Rows(self.run / "metrics.csv")
        return self._rows.read()

    @property
    def monitor(self) -> str:
        """The metric by which the task selects, as in metrics.csv; empty until the manifest says it."""
        monitor = (self.manifest or {}).get("monitor")
        return f"val/{str(monitor).removeprefix('val/')}" if monitor else ""

    def monitored(self) -> list[tuple[int, float]]:
        """(step, value) of each validation so far, of that metric."""
        monitor = self.monitor
        return [(step, value) for step, _, metric, value in self.rows if metric == monitor]

    def prune(self, reason: str) -> None:
        """Record that the run was given up; a command of its own can still finish it."""
        self.run.mkdir(parents=True, exist_ok=True)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomically(self.run / PRUNED, sealed({"reason": reason, "time": time}))


class Rows:
    """The rows of a metrics.csv that is still written, and may be replaced by a shorter one when a run resumes."""

    def __init__(self, file: Path) -> None:
        self.file, self._at, self._inode = file, 0, 0
        self._rows: list[Row] = []

    def read(self) -> list[Row]:
        """All rows so far."""
        try:
            with self.file.open("rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode or state.st_size < self._at:
                    self._at, self._inode, self._rows = 0, state.st_ino, []
                file.seek(self._at)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return self._rows
        self._at += len(whole) + len(newline)
        self._rows += [row for line in whole.decode(errors="replace").split("\n") if (row := parse_row(line))]
        return self._rows


class Jobs:
    """Makes jobs from words, `swept` being the keys by which they differ, with few compositions: each costs 50 ms.

    Jobs that differ in plain values alone are read from one configuration, in which these values are replaced.
    passed: words for Hydra that each job gets.
    """

    def __init__(self, swept: Collection[str], passed: Sequence[str] = ()) -> None:
        self.swept, self.passed = set(swept), list(passed)
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._checked: set[tuple[tuple[str, ...], str]] = set()
        self._count = 0

    def make(self, words: Sequence[str], trial: int | None = None) -> Job:
        """The job of these words. Raises what composing raises, and `OptionError` for a name that is none."""
        overrides = [override for override in parse(words) if override.key_or_group != SWEEP]
        words = [str(override.input_line) for override in overrides]
        config = self._config(overrides, self._count)
        self._count += 1
        choices = config.hydra.runtime.choices
        folder = Path(os.path.abspath(str(config.paths.runs)), choices["task"], choices["model"])
        if config.name is None:
            name = names.known_as(folder, names.run_name(words, self.swept))
            values = {"name": name} if name != names.run_name(words) else {}
        else:
            name = str(config.name)
            names.require_plain(name)
            given = {str(override.key_or_group): str(override.value()) for override in overrides}
            now = {"name": name, "paths.runs": os.path.abspath(str(config.paths.runs))}
            values = {key: now[key] for key in now if "${" in given.get(key, "")}  # may be others in another process
        devices = config.trainer.get("devices")
        job = Job(
            overrides=(*words, *(f"{key}={quoted(value)}" for key, value in values.items()), *self.passed),
            run=folder / name,
            devices=devices if isinstance(devices, int) and devices > 0 else 1,
            nodes=int(config.trainer.get("num_nodes") or 1),
            trial=trial,
            title=" ".join(word for word in words if names.key_of(word) in self.swept) or name,
            mode=str(config.mode),
        )
        if config.overwrite is True:
            job.replaces = job.id
        elif job.finished:
            job.differs = telling(job.settings) != telling(_plain(config))
        return job

    def check(self, jobs: Iterable[Job]) -> None:
        """Raise `Refused` where a constructor does not take what the configuration of a job gives it.

        Of jobs that differ in plain values, each value is looked at once.
        """
        for job in jobs:
            self._check(job)

    def _check(self, job: Job) -> None:
        overrides = parse(job.overrides)
        kind = self._kind(overrides)
        new = {(kind, str(override.input_line)) for override in overrides} - self._checked
        if new:
            self._checked |= new
            config = self._config(overrides, 0)
            check(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))

    def _config(self, overrides: Sequence[Override], number: int) -> DictConfig:
        """The configuration of a job; that of an earlier one, changed, where they differ in plain values alone."""
        words = [*(str(override.input_line) for override in overrides), *self.passed]
        kind = self._kind(overrides)
        config = self._composed.get(kind)
        if config is None:
            config = composed(words, with_hydra=True)
            if _refers_to_hydra(config):
                _resolve(config, number)
                return config
            if isinstance(OmegaConf.select(config, "model.mixer"), ListConfig):  # layers are made of several values
                return config
            self._composed[kind] = config
        for override in filter(self._is_plain, overrides):
            OmegaConf.update(config, str(override.key_or_group), override.value())
        return config

    def _kind(self, overrides: Sequence[Override]) -> tuple[str, ...]:
        return tuple(str(o.key_or_group if self._is_plain(o) else o.input_line) for o in overrides)

    def _is_plain(self, override: Override) -> bool:
        """Whether an override gives a swept key a number or a text, and chooses nothing."""
        key, value = str(override.key_or_group), override.value()
        simple = value is None or (isinstance(value, bool | int | float | str) and "${" not in str(value))
        changes = override.type is OverrideType.CHANGE and override.package is None
        return key in self.swept and changes and simple and not (CONF / key).is_dir()


def apart(call: Callable[[], T]) -> T:
    """What a call returns or raises, in a process of its own, with which what it imports is gone: PyTorch is 0.5 GB."""
    if sys.platform != "linux" or "ray" in sys.modules:  # whose threads and connections a fork would break
        return call()
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def answer() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # of a Ctrl-C, this process says enough
        said: tuple[Any, Exception | None, BaseException | None]
        try:
            said = call(), None, None
        except Exception as error:
            said = None, error, error.__cause__  # which is lost when an error is sent
        with suppress(BrokenPipeError):  # the sweep was killed
            sender.send(said)

    process = context.Process(target=answer)
    process.start()
    sender.close()
    try:
        result, error, reason = receiver.recv()
    except EOFError:
        raise MemoryError("the process that checks the jobs was killed") from None
    finally:
        process.join()
    if error is not None:
        raise error from reason
    return result


def parse(words: Sequence[str]) -> list[Override]:
    """Words in Hydra's grammar."""
    return [_parsed(word) for word in words]


@cache  # most words are those of all jobs
def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


def quoted(text: str) -> str:
    """A text for Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def telling(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of settings, what a result depends on, flat."""
    return {key: value for key, value in flatten(settings).items() if not names.is_free(key)}


def _plain(config: DictConfig) -> Any:
    """The settings in a configuration that a result may depend on, as a manifest has them."""
    kept = [str(key) for key in config if key != "hydra" and not names.is_free(str(key))]
    nodes: dict[str, Any] = {key: config[key] for key in kept}
    plain = {key: OmegaConf.to_container(n, resolve=True) if OmegaConf.is_config(n) else n for key, n in nodes.items()}
    return json.loads(json.dumps(plain, default=str))


def _refers_to_hydra(config: DictConfig) -> bool:
    """Whether the place of a run depends on what Hydra says of the job, as in name='run-${hydra:job.num}'."""
    raw = OmegaConf.masked_copy(config, ["name", "paths"])
    return "${hydra" in str(OmegaConf.to_container(raw, resolve=False))


def _resolve(config: DictConfig, number: int) -> None:
    """Replace what refers to Hydra's own node in the place of a run, as in a process of its own."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.job.num = number
    hydra.set_config(config)
    try:
        place = {"name": config.name, "paths": OmegaConf.to_container(config.paths, resolve=True)}
    finally:
        hydra.cfg = before
    for key, value in place.items():
        OmegaConf.update(config, key, value)
