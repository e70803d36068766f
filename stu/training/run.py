"""A run is a directory: its configuration, manifest, metrics, checkpoints and, written last, its summary."""

import hashlib
import inspect
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from stu.errors import OptionError, require
from stu.files import write_atomically

PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "datasets", "numpy", "scipy", "wandb")
# Keys that do not change what is computed: they may differ when a run is resumed. `model.compile` changes the rounding,
# as does another machine; a run of compiled blocks can so be resumed and tested where there is no compiler.
FREE_KEYS = (
    "mode",
    "overwrite",
    "checkpoint",
    "logger",
    "paths",
    "name",
    "checkpoints.every_minutes",
    "loader.num_workers",
    "loader.device_resident",
    "figures",
    "pictures",  # what earlier runs call figures
    "task.data.dir",
    "model.compile",
)
# Options that runs of earlier versions were made without, and may go on with any value of.
LATER_KEYS = ("trainer.matmul_precision",)
# Modules that have moved: the names in configurations of earlier runs, and the names now.
MOVED = {
    **{f"data.lra_{name}": f"data.lra.{name}" for name in ("image", "listops", "pathfinder", "retrieval", "text")},
    **{f"data.{name}": f"data.memory.{name}" for name in ("adding", "associative_recall", "copying")},
    **{f"data.{name}": f"data.memory.{name}" for name in ("induction_heads", "mqar", "recall")},
    **{f"data.{name}": f"data.systems.{name}" for name in ("dynamics", "forecast", "lds")},
}


class Run:
    """The directory `path` of one run.

    config.yaml      the resolved configuration
    manifest.json    versions, git state, hardware, data fingerprint, and every start
    metrics.csv      all metrics
    checkpoints/     best.ckpt, last.ckpt
    figures/         PNG files, where there are any
    summary.json     written last: a run that has it is finished
    """

    @classmethod
    def named(cls, parent: Path, name: str) -> "Run":
        """The run `name` in the folder `parent`; raises `OptionError` unless the name is that of a plain folder."""
        plain = name.strip() not in ("", ".", "..") and not set(name) & set("/\\")
        require(plain, "name", repr(name), "must be a plain folder name")
        return cls(parent / name)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.manifest = path / "config.yaml", path / "manifest.json"
        self.metrics, self.summary = path / "metrics.csv", path / "summary.json"
        self.checkpoints, self.figures = path / "checkpoints", path / "figures"
        self.best, self.last = self.checkpoints / "best.ckpt", self.checkpoints / "last.ckpt"
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)

    @property
    def finished(self) -> bool:
        """Whether the run has its summary."""
        return self.summary.exists()

    def open(self, config: Mapping[str, Any], *, overwrite: bool) -> None:
        """Claim the directory for `config`: start the run, or resume it.

        Raises `OptionError` if another process works in it or it holds a run of another configuration.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise OptionError("name", self.path, "another process is training this run; choose another name") from None
        except OSError as error:
            raise OptionError("paths.runs", self.path, f"must be a folder to write to: {error.strerror}") from error
        if overwrite and self.config.exists():
            shutil.rmtree(self.path)
        if self.last.exists() or self.finished:
            try:
                self._check_same(config)
            except OptionError:
                self.close()
                raise
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.manifest.exists():
            write_atomically(self.manifest, json.dumps({"id": secrets.token_hex(6), "starts": []}))
        write_atomically(self.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def close(self) -> None:
        """Release the directory."""
        if self._lock.is_locked:
            # before the release: after it, another process may already hold a lock of its own there
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _check_same(self, config: Mapping[str, Any]) -> None:
        if changed := self.changes(config):
            difference = ", ".join(changed[:4]) + " …" * (len(changed) > 4)
            advice = "choose another name, or overwrite=true to delete it"
            raise OptionError("name", self.path, f"holds a run with other settings: {difference}; {advice}")

    def changes(self, config: Mapping[str, Any], within: tuple[str, ...] = ()) -> list[str]:
        """Settings of this run that differ in `config`, as "key (then → now)"; only below `within`, if given.

        An option that the run was made without differs unless it has its default: earlier versions may not have had it.
        """
        before = relocated(flatten(yaml.safe_load(self.config.read_text(encoding="utf-8"))))
        now = flatten(config)
        return [
            f"{key} ({_show(before, key)} → {_show(now, key)})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and not is_free(key)
            and (not within or key.split(".")[0] in within)
            and (key in before or not is_default(now, key))
        ]

    @property
    def id(self) -> str:
        """A name unique to this run: an overwritten run in the same place had another one."""
        return str(json.loads(self.manifest.read_text(encoding="utf-8"))["id"]) if self.manifest.exists() else ""

    @property
    def last_step(self) -> int:
        """Optimiser steps in the last checkpoint, 0 without one."""
        if not self.last.exists():
            return 0
        return int(torch.load(self.last, map_location="cpu", mmap=True, weights_only=True)["global_step"])

    @staticmethod
    def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
        """The weights in a checkpoint, on the CPU."""
        try:
            return torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        except Exception as error:  # other files raise errors of many kinds
            raise OptionError("checkpoint", checkpoint, "is not a checkpoint of a run, or is incomplete") from error

    @rank_zero_only
    def record_start(self, *, device: str, **facts: Any) -> None:
        """Add this start to the manifest, with facts of the run: its seed, data, metric, steps and so on."""
        manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        manifest |= facts
        manifest["starts"].append(
            {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": " ".join(sys.argv),
                "resumed": self.last.exists(),
                "git": git_state(),
                "host": socket.gethostname(),
                "device": device,
                "python": platform.python_version(),
                "packages": {name: v for name in PACKAGES if (v := _version(name))},
            }
        )
        write_atomically(self.manifest, json.dumps(manifest, indent=2))

    @rank_zero_only
    def record_failure(self, reason: str) -> None:
        """Record in the manifest why this start ended."""
        manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        if manifest["starts"]:
            manifest["starts"][-1]["failed"] = reason
            write_atomically(self.manifest, json.dumps(manifest, indent=2))

    @rank_zero_only
    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: the run is finished."""
        write_atomically(self.summary, json.dumps(summary, indent=2))

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run."""
        return json.loads(self.summary.read_text(encoding="utf-8"))


def is_free(key: str) -> bool:
    """Whether a configuration key may change between the starts of one run."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def is_default(flat: Mapping[str, Any], key: str) -> bool:
    """Whether an option of a flat configuration has the default of the constructor that takes it, or any will do."""
    if key in LATER_KEYS:
        return True
    node, _, option = key.rpartition(".")
    constructor = locate(flat.get(f"{node}._target_", ""))
    if not callable(constructor):
        return False
    parameter = inspect.signature(constructor).parameters.get(option)
    default = None if parameter is None else parameter.default
    return parameter is not None and flat[key] == (list(default) if isinstance(default, tuple) else default)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"a": {"b": 1}} → {"a.b": 1}."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items()]
    return {key: value for part in parts for key, value in part.items()}


def relocated(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same flat configuration, `_target_`s by the present names of their modules."""

    def present(target: str) -> str:
        module, _, name = target.rpartition(".")
        return f"{MOVED.get(module, module)}.{name}"

    return {key: present(value) if key.endswith("_target_") else value for key, value in flat.items()}


def run_name(overrides: list[str], choices: tuple[str, ...] = ("model", "task")) -> str:
    """A directory name from command-line overrides, so that the same command finds its run again.

    The choices that name the parent directories, and keys that do not change the result, are left out.
    """
    kept = []
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]
        if key not in choices and not is_free(key) and not key.startswith("hydra"):
            kept.append(override.lstrip("+"))
    name = ",".join(sorted(kept)) or "default"
    safe = "".join(c if (c.isascii() and c.isalnum()) or c in "=,.-_" else "-" for c in name)
    if safe == name and len(name) <= 100:
        return name
    return f"{safe[:88]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"  # other names may be simplified to the same


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a checkout."""
    root = Path(__file__).parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_device(device: torch.device) -> str:
    """Name of a CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(flat: Mapping[str, Any], key: str) -> str:
    return str(flat[key]) if key in flat else "absent"
