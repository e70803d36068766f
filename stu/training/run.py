"""A run is a directory: its configuration, manifest, metrics, checkpoints and, written last, its summary."""

import inspect
import json
import os
import platform
import secrets
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from stu.description import MOVED
from stu.errors import Busy, OptionError, require
from stu.files import DELETED, is_written, kept_name, mapping_in, remove_folder, sealed, sync, write_atomically
from stu.training import states
from stu.training.lock import RunLock
from stu.training.names import is_free, key_of, known_as, require_plain, run_name
from stu.training.records import SWEEP, flatten, git_state, summary_in, version_of

PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "datasets", "numpy", "scipy", "wandb")
SECONDS_TO_REPORT = 5.0  # that the first process of a run has to say how it ended, before another one does
NO_MATTER = ("hydra-core", "wandb")  # of these, for what is computed
# Keys that only checks depend on, and the test at the end: they may differ, the latter until the run has its result.
UNTRAINED_KEYS = ("trainer.num_sanity_val_steps", "trainer.detect_anomaly")
TEST_KEYS = ("trainer.limit_test_batches",)
# Options of models that may have other values in a test than in training: it says so.
TESTED_WITH = ("rate", "extension")
# How many devices compute the same, and how they share it: where that changes, a start says so.
DEVICE_KEYS = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
# Options that runs of earlier versions were made without, and may go on with any value of.
LATER_KEYS = ("trainer.matmul_precision", "precondition._target_", "pretrain._target_")


# Options that have another name now.
RENAMED = {"step_rescale": "rate"}


class Run:
    """The directory `path` of one run.

    config.yaml      the resolved configuration
    manifest.json    versions, git state, hardware, data fingerprint, every start, and the configuration again
    metrics.csv      all metrics
    checkpoints/     best.ckpt, last.ckpt; until it is finished also those that replace them after damage
    checkpoints/pretrain/, pretrain.csv   the same of pretraining, where there is such a phase; it has ended when
                     summary.json is in that folder
    figures/         PNG files, where there are any
    summary.json     written last: a run that has it is finished

    A damaged file is no end of a run: an empty one counts as absent, another is kept as <name>.damaged, and what it
    held is taken from the others. `remarks` says so, and what else this start has found.
    """

    _overwritten: ClassVar[set[Path]] = set()  # by this process, whose later jobs must not delete them again

    @classmethod
    def named(cls, parent: Path, name: object, overrides: Sequence[str] = (), *, testing: bool = False) -> "Run":
        """The run `name` in the folder `parent`, None: what the overrides of its command make of it.

        testing: where that was not trained, without the overrides that may concern the test alone.

        Raises `OptionError` unless the name is that of a plain folder.
        """
        chosen = known_as(parent, run_name(overrides)) if name is None else str(name)
        require_plain(chosen)
        run = cls(parent / chosen)
        if name is None and testing and not run.trained:
            trained = cls.named(parent, None, [one for one in overrides if cls.concerns_training(key_of(one))])
            return trained if trained.trained else run
        return run

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.manifest = path / "config.yaml", path / "manifest.json"
        self.metrics, self.summary = path / "metrics.csv", path / "summary.json"
        self.checkpoints, self.figures = path / "checkpoints", path / "figures"
        self.best, self.last = self.checkpoints / states.BEST, self.checkpoints / states.LAST
        self.pretraining, self.pretrain_metrics = self.checkpoints / "pretrain", path / "pretrain.csv"
        self.pretrain_summary = self.pretraining / "summary.json"
        self.remarks: list[str] = []
        self.overwrites = False  # whether the command asks to delete what there is
        self.deleted = self.recorded = False  # whether this start has deleted what there was, and is in the manifest
        self._made: list[Path] = []  # folders that this start has made, the innermost first
        self._place = Path(os.path.realpath(path))  # where a link leads: there a run has its one lock, and is deleted
        self._lock = RunLock(self._place)

    @property
    def finished(self) -> bool:
        """Whether the run has its summary, undamaged."""
        return self._summary() is not None

    @property
    def trained(self) -> bool:
        """Whether it has a checkpoint, of any phase, be it damaged; one of 0 bytes counts as none."""
        return self.pretrains or _has_checkpoints(self.checkpoints)

    @property
    def pretrains(self) -> bool:
        """Whether it has a checkpoint of pretraining."""
        return _has_checkpoints(self.pretraining)

    @property
    def pretrained(self) -> dict[str, Any] | None:
        """What became of pretraining; None where there was none, or it has not ended."""
        return mapping_in(self.pretrain_summary)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The configuration of the run, by the manifest, which has a checksum, or by config.yaml; None: not known."""
        settings = (self._manifest() or {}).get("settings")
        return settings if isinstance(settings, dict) else mapping_in(self.config, yaml.safe_load)

    def check(self, config: Mapping[str, Any], *, data: str | None = None) -> None:
        """Raise `OptionError` if the run has results that others would be mixed with: of other settings or other data.

        data: the fingerprint of the data now.
        """
        if not (self.trained or self.finished):
            return
        if self.settings is None:
            write = f"the same command with --cfg job --resolve > '{self.config}' writes them"
            unknown = "config.yaml and manifest.json are absent or damaged, so nothing says what its settings were"
            raise OptionError("name", self.path, f"{unknown}; if they were these, {write}; or choose another name")
        if changed := self.changes(config):
            difference = ", ".join(changed[:4]) + " …" * (len(changed) > 4)
            advice = "choose another name, or overwrite=true to delete it"
            raise OptionError("name", self.path, f"holds a run with other settings: {difference}; {advice}")
        if data and (other := self.other_data(data)):
            advice = "bring back the files that they were made from, or choose another name"
            raise OptionError("name", self.path, f"{other}; {advice}")

    def require_writable(self) -> None:
        """Raise `OptionError` where nothing could be written into the directory, as far as one can tell beforehand."""
        there = next((folder for folder in (self._place, *self._place.parents) if folder.exists()), self._place)
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        require(writable, "paths.runs", self.path, f"must be a folder to write to, and {there} is none")

    def open(self, config: Mapping[str, Any], *, overwrite: bool, data: str | None = None) -> None:
        """Claim the directory for `config`: start the run, or resume it. All that can be refused should have been.

        Raises `OptionError` if another process works in it or it holds a run of another configuration or other data
        (their fingerprint is `data`), where `overwrite` does not delete it.
        """
        if rank() != 0:
            if not overwrite:
                self.check(config, data=data)  # or this process would wait for a first one that has been refused
            return
        self.overwrites = overwrite
        try:
            missing = [folder for folder in (self._place, *self._place.parents) if not folder.exists()]
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._made = missing[1:]
            self._lock.acquire()
            shutil.rmtree(self._place.with_name(f".{self._place.name}{DELETED}"), ignore_errors=True)
            if overwrite:
                self._delete()
            self.check(config, data=data)
            new = not self._place.exists()
            self._place.mkdir(exist_ok=True)
            self._made = [self._place, *missing[1:]] if new else []
            for folder in self._made:
                sync(folder.parent)
            self._begin(_plain(config))
        except OSError as error:
            self.discard()
            raise OptionError("paths.runs", self.path, f"must be a folder to write to: {error.strerror}") from error
        except BaseException:
            self.discard()
            raise

    def close(self) -> None:
        """Release the directory."""
        self._lock.release()

    def discard(self) -> None:
        """Release the directory after a start that was refused: where the start has made it, delete it again."""
        if self._place in self._made and not (self.trained or is_written(self.metrics)):
            remove_folder(self._place)
        self.close()
        for folder in self._made:
            with suppress(OSError):  # others have filled it since
                folder.rmdir()

    def _delete(self) -> None:
        """Delete the run, if this is one; what a killed process leaves of it has another name."""
        again = self._place in self._overwritten
        require(not again, "overwrite", True, f"an earlier job of this command made {self.path}; name its jobs apart")
        self._overwritten.add(self._place)
        self.deleted = True
        if self.trained or any(path.exists() for path in (self.config, self.manifest, self.summary)):
            remove_folder(self._place)

    def _begin(self, config: dict[str, Any]) -> None:
        """Write configuration and manifest, of a new run or again; keep what was there and is damaged."""
        manifest, written, known = self._manifest(), mapping_in(self.config, yaml.safe_load), self.settings
        if manifest is None:
            self._replaced(self.manifest, "its id, the fingerprint of its data and its earlier starts are lost")
            manifest = {"id": secrets.token_hex(6), "starts": []}
        if json.dumps(_plain(written or {})) != json.dumps(_plain(known or {})):
            self._replaced(self.config, "the manifest has the same")
        if self.summary.exists() and not self.finished:
            self._replaced(self.summary, "the best weights are tested again")
        write_atomically(self.manifest, sealed(manifest | {"settings": config}))
        write_atomically(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def _replaced(self, file: Path, instead: str) -> None:
        """Keep a damaged file under another name, and remark that it is written anew."""
        if is_written(file):
            kept = file.replace(kept_name(file))
            self.remarks.append(f"{file} was damaged, and is now {kept.name}: {instead}")
        elif self.trained or file.exists():
            self.remarks.append(f"{file} was {'empty' if file.exists() else 'missing'}: {instead}")

    def changes(self, config: Mapping[str, Any], within: tuple[str, ...] = ()) -> list[str]:
        """Settings of this run that differ in `config`, as "key (then → now)"; only below `within`, if given.

        An option that the run was made without differs unless it has its default: earlier versions may not have had it.
        """
        free = UNTRAINED_KEYS if self.finished else (*UNTRAINED_KEYS, *TEST_KEYS)
        before, now = relocated(flatten(_plain(self.settings or {}))), flatten(_plain(config))
        return [
            f"{key} ({_show(before, key)} → {_show(now, key)})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and not (is_free(key) or key in free or key.startswith(DEVICE_KEYS))
            and (not within or key.split(".")[0] in within)
            and (key in before or not is_default(now, key))
        ]

    @staticmethod
    def concerns_training(change: str) -> bool:
        """Whether one of `changes` makes another model or task, and not only another test."""
        key = change.partition(" ")[0]
        return not (key.startswith("model.") and key.rpartition(".")[2] in TESTED_WITH)

    @property
    def id(self) -> str:
        """A name unique to this run: an overwritten run in the same place had another one."""
        return (self._manifest() or {"id": ""})["id"]

    @property
    def resumes_from(self) -> Path | None:
        """The checkpoint from which training goes on; None at its start."""
        # not whether it is there: another process may still be about to mend it, or to delete it
        trained = _has_checkpoints(self.checkpoints) and not self.overwrites
        return self.last if trained else None  # `mend` has made it whole

    @property
    def last_step(self) -> int:
        """Optimiser steps in the last checkpoint, 0 without one."""
        return states.latest_step(self.checkpoints)

    @property
    def latest(self) -> Path:
        """The last checkpoint of the phase that the run is in."""
        pretrains = self.pretrains and not _has_checkpoints(self.checkpoints)
        return self.pretraining / states.LAST if pretrains else self.last

    def mend(self) -> list[str]:
        """Replace damaged checkpoints by whole ones, before they are read, and remark it; returns these remarks.

        Raises `OptionError` where a damaged one cannot be replaced.
        """
        remarks = states.mend(self.checkpoints) if rank() == 0 else []
        self.remarks += remarks
        return remarks

    @staticmethod
    def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
        """The weights in a checkpoint, on the CPU, after its checksums were compared."""
        try:
            weights = states.read(checkpoint)["state_dict"]
            require(isinstance(weights, Mapping), "checkpoint", checkpoint, "has no weights")
            return weights
        except OSError as error:
            raise OptionError("checkpoint", checkpoint, f"cannot be read: {error.strerror}") from error
        except (states.Damaged, KeyError, TypeError) as error:
            allowed = f"is not a checkpoint of a run, or is damaged ({error})"
            raise OptionError("checkpoint", checkpoint, allowed) from error

    def record_start(self, *, device: str, world_size: int = 1, **facts: Any) -> None:
        """Add this start to the manifest, with facts of the run: its seed, data, metric, steps and so on.

        world_size: how many processes train it together.

        A start that goes on under other conditions than the run began with says which in `remarks`.
        """
        self.recorded = True  # by the first process
        if rank() != 0:
            return
        manifest = self._manifest() or {"id": "", "starts": []}
        manifest |= facts
        start = conditions_now(device) | {"world_size": world_size, "resumed": self.trained}
        if start["resumed"] and (other := self.other_conditions(start)):
            self.remarks.append(f"resumed under other conditions than the run began with: {', '.join(other)}")
        manifest["starts"].append(start | ({"remarks": self.remarks} if self.remarks else {}))
        write_atomically(self.manifest, sealed(manifest))

    def other_data(self, now: str) -> str:
        """In words, that this run was trained on data of another fingerprint; empty where it was not, or not known."""
        before = str((self._manifest() or {}).get("data", now))
        return "" if before == now else f"was trained on other data (fingerprint {before[:16]} → {now[:16]})"

    def other_conditions(self, now: Mapping[str, Any]) -> list[str]:
        """What a result depends on besides settings and data, where it differs from how this run began."""
        starts = (self._manifest() or {"starts": []})["starts"]
        first = next((start for start in reversed(starts) if not start.get("resumed")), None)
        if first is None:
            return []
        before, after = _deciding(first), _deciding(now)
        return [f"{key} {before[key]} → {after[key]}" for key in before if key in after and before[key] != after[key]]

    def record_failure(self, reason: str) -> None:
        """Record in the manifest why this start ended; of several processes, the first that fails does."""
        if not self.ended:
            self._record_end(failed=reason if rank() == 0 else f"process {rank()}: {reason}")

    @rank_zero_only
    def record_stop(self, reason: str) -> None:
        """Record in the manifest which signal ended this start."""
        self._record_end(stopped=reason)

    def record_loss(self, reason: str) -> str:
        """Record that a process of the run is gone, and return why: `reason`, or what that process has recorded.

        One of those that are left does so, the first one if it is among them; the others get an empty text. Where no
        start is recorded, as for a test, nothing is.
        """
        if not self.recorded:
            return reason if rank() == 0 else ""
        if rank() != 0:
            with suppress(Busy, OSError):
                self._lock.acquire(seconds=SECONDS_TO_REPORT)  # the first one has given it back, or is gone
                if not self.ended:
                    self._record_end(failed=reason)
                    return reason
            return ""
        if not self.ended:
            self._record_end(failed=reason)
        return self.ended or reason

    @property
    def ended(self) -> str:
        """Why the latest start has ended before it was finished; empty where nothing is recorded."""
        start = ((self._manifest() or {}).get("starts") or [{}])[-1]
        return str(start.get("failed") or start.get("stopped") or "") if self.recorded else ""

    def _record_end(self, **how: str) -> None:
        manifest = self._manifest()
        if self.recorded and manifest and manifest["starts"]:
            manifest["starts"][-1] |= how
            write_atomically(self.manifest, sealed(manifest))

    @rank_zero_only
    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: the run is finished."""
        write_atomically(self.summary, sealed(summary))

    def read_manifest(self) -> dict[str, Any]:
        """What the manifest says. Raises `OptionError` where it is absent or damaged."""
        manifest = self._manifest()
        require(manifest is not None, "name", self.path, "is no run: manifest.json is absent or damaged")
        return manifest or {}

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run. Raises `OptionError` where there is none."""
        summary = self._summary()
        require(summary is not None, "name", self.path, "is no finished run: summary.json is absent or damaged")
        return summary or {}

    def _summary(self) -> dict[str, Any] | None:
        return summary_in(self.summary)

    def _manifest(self) -> dict[str, Any] | None:
        """The manifest, None where it is absent or damaged."""
        manifest = mapping_in(self.manifest)
        starts = (manifest or {}).setdefault("starts", [])
        whole = manifest and isinstance(manifest.get("id"), str) and isinstance(starts, list)
        return manifest if whole and all(isinstance(start, dict) for start in starts) else None


def _has_checkpoints(folder: Path) -> bool:
    return any(is_written(folder / name) for name in states.NAMES)


def rank() -> int:
    """Which process of the run this is."""
    return getattr(rank_zero_only, "rank", 0)


def conditions_now(device: str) -> dict[str, Any]:
    """What a start of a run says of itself: time and place, code and versions."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        **({"sweep": sweep} if (sweep := os.environ.get(SWEEP)) else {}),
        "git": git_state(),
        "host": socket.gethostname(),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := version_of(name))},
    }


def _deciding(start: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the conditions of a start that its results depend on, by name."""
    git, packages = start.get("git"), start.get("packages")
    found = {key: start.get(key) for key in ("device", "python")}
    found |= {key: start[key] for key in ("world_size",) if key in start}  # not in earlier versions
    if isinstance(git, dict):
        found["commit"] = f"{git.get('commit', '')!s:.10}{' with changes' if git.get('dirty') else ''}"
    if isinstance(packages, dict):
        found |= {name: packages[name] for name in packages if name not in NO_MATTER}
    return found


def is_default(flat: Mapping[str, Any], key: str) -> bool:
    """Whether an option of a flat configuration has the default of the constructor that takes it, or any will do."""
    if key in LATER_KEYS or flat[key] == {}:  # nothing
        return True
    node, _, option = key.rpartition(".")
    constructor = locate(flat.get(f"{node}._target_", ""))
    if not callable(constructor):
        return False
    parameter = inspect.signature(constructor).parameters.get(option)
    default = None if parameter is None else parameter.default
    return parameter is not None and flat[key] == (list(default) if isinstance(default, tuple) else default)


def relocated(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same flat configuration, `_target_`s and options of models by their present names."""

    def present(target: str) -> str:
        module, _, name = target.rpartition(".")
        return f"{MOVED.get(module, module)}.{name}"

    def named(key: str) -> str:
        node, dot, option = key.rpartition(".")
        return f"{node}{dot}{RENAMED.get(option, option)}"

    return {named(key): present(value) if key.endswith("_target_") else value for key, value in flat.items()}


def describe_device(device: torch.device) -> str:
    """Name of a CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back, with keys that are texts; dates, which only damage makes, as text."""
    return json.loads(json.dumps(config, default=str))


def _show(flat: Mapping[str, Any], key: str) -> str:
    return str(flat[key]) if key in flat else "absent"
