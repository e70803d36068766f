"""A run is a directory: its configuration, manifest, metrics, checkpoints and, written last, its summary."""

import hashlib
import json
import os
import pickle
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
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from stu.errors import OptionError

PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "datasets", "numpy", "scipy", "wandb")
# Keys that do not change what is computed: they may differ when a run is resumed.
FREE_KEYS = ("mode", "overwrite", "checkpoint", "logger", "paths", "name", "checkpoints.every_minutes",
             "loader.num_workers", "pictures", "task.data.dir")  # fmt: skip


class Run:
    """The directory `path` of one run.

    config.yaml      the resolved configuration
    manifest.json    versions, git state, hardware, data fingerprint, and every start
    metrics.csv      the numbers
    checkpoints/     best.ckpt, last.ckpt
    summary.json     written last: a run that has it is finished
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.manifest = path / "config.yaml", path / "manifest.json"
        self.metrics, self.summary = path / "metrics.csv", path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.best, self.last = self.checkpoints / "best.ckpt", self.checkpoints / "last.ckpt"
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.summary.exists()

    def open(self, config: Mapping[str, Any], *, overwrite: bool) -> None:
        """Claim the directory for `config`: begin it, or go on with it.

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
        """Let others have it."""
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)  # before it is free: another may lock its own at once
            self._lock.release()

    def _check_same(self, config: Mapping[str, Any]) -> None:
        if changed := self.changes(config):
            raise OptionError(
                "name",
                self.path,
                f"holds a run with other settings: {', '.join(changed[:4])}{' …' if len(changed) > 4 else ''}; "
                "choose another name, or overwrite=true to delete it",
            )

    def changes(self, config: Mapping[str, Any], within: tuple[str, ...] = ()) -> list[str]:
        """Settings of this run that `config` has otherwise, as "key (then → now)"; only below `within`, if given."""
        before = flatten(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        now = flatten(config)
        return [
            f"{key} ({_show(before, key)} → {_show(now, key)})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not is_free(key) and (not within or key.split(".")[0] in within)
        ]

    @property
    def id(self) -> str:
        """What tells this run from all others, also from an overwritten one in the same place."""
        return str(json.loads(self.manifest.read_text(encoding="utf-8"))["id"]) if self.manifest.exists() else ""

    @property
    def last_step(self) -> int:
        """Optimiser steps in the last checkpoint, 0 without one."""
        if not self.last.exists():
            return 0
        return int(torch.load(self.last, map_location="cpu", mmap=True, weights_only=True)["global_step"])

    def weights(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """The model's part of a checkpoint, on the CPU."""
        try:
            state: dict[str, torch.Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise OptionError("checkpoint", checkpoint, "is no checkpoint of a run, or not a whole one") from error
        return state

    @rank_zero_only
    def record_start(self, *, device: str, **facts: Any) -> None:
        """Add this start to the manifest, and what is known of the run: its seed, data, metric, steps and so on."""
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
        """Say in the manifest why this start ended."""
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
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary


def is_free(key: str) -> bool:
    """Whether a configuration key may change between the starts of one run."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"a": {"b": 1}} → {"a.b": 1}."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items()]
    return {key: value for part in parts for key, value in part.items()}


def run_name(overrides: list[str], choices: tuple[str, ...] = ("model", "task")) -> str:
    """A directory name from command-line overrides, so that the same command finds its run again.

    The choices that already name the parent directories and keys that do not change the result are left out.
    """
    telling = []
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]
        if key not in choices and not is_free(key) and not key.startswith("hydra"):
            telling.append(override.lstrip("+"))
    name = ",".join(sorted(telling)) or "default"
    safe = "".join(c if (c.isascii() and c.isalnum()) or c in "=,.-_" else "-" for c in name)
    if safe == name and len(name) <= 100:
        return name
    return f"{safe[:88]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"  # others may look like it now


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a checkout."""
    root = Path(__file__).parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_device(device: torch.device) -> str:
    """A processor or GPU in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


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
