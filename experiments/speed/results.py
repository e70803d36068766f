"""What was measured, on what machine, and the file that keeps it."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from experiments.speed.bench import Settings
from experiments.speed.contenders import LITERAL
from experiments.speed.floor import Peak, Work

ROOT = Path(__file__).resolve().parents[2]
FILE = "results.json"
DECISIVE = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_")  # how environment variables begin that times depend on


@dataclass(frozen=True)
class Timing:
    """Of one call, in seconds."""

    median: float
    min: float
    mean: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The summary of these calls."""
        return cls(statistics.median(seconds), min(seconds), statistics.fmean(seconds), len(seconds))


@dataclass(frozen=True)
class Facts:
    """What a mixer is, whatever time it takes."""

    parameters: int
    causal: bool
    streams: bool
    forward_floor: Work | None  # the least work it can be done with, where that is known
    forward_backward_floor: Work | None


@dataclass(frozen=True)
class Row:
    """One mixer at one size; None is what was not measured, and `failures` says why, by stage."""

    model: str
    length: int
    batch: int
    width: int
    filters: int | None  # as asked for; None: as the model's file says
    facts: Facts | None
    forward: Timing | None
    forward_backward: Timing | None
    step: Timing | None  # of the whole batch
    forward_bytes: int | None  # the peak of memory, beyond parameters and input
    forward_backward_bytes: int | None
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, D, K, L: in this order sizes are measured and shown; K = 0 is each model's own."""
        return self.batch, self.width, self.filters or 0, self.length


@dataclass(frozen=True)
class Results:
    """A run of the benchmark."""

    command: str
    date: str
    commit: str | None
    machine: Mapping[str, Any]
    settings: Settings
    peak: Peak
    rows: Sequence[Row] = ()

    @property
    def sizes(self) -> list[list[Row]]:
        """The rows of each size, in the order of measurement."""
        return [[row for row in self.rows if row.size == size] for size in dict.fromkeys(row.size for row in self.rows)]

    def derived(self, row: Row) -> dict[str, float | None]:
        """What follows from a row, from its neighbours and from the peak of the device; of medians, shares as ratios.

        speedup: over the literal STU, forward and backward. floor_share: how near forward and backward come to the
        least time that their work needs. step_share: a streamed step's part of a whole forward pass.
        """
        both, forward, facts = row.forward_backward, row.forward, row.facts
        literal = next(
            (other.forward_backward for other in self.rows if is_literal(other) and other.size == row.size), None
        )
        floor = facts.forward_backward_floor if facts else None
        return {
            "tokens_per_second": row.batch * row.length / both.median if both else None,
            "speedup": literal.median / both.median if literal and both else None,
            "floor_share": self.peak.seconds(floor) / both.median if floor and both else None,
            "step_share": row.step.median / forward.median if row.step and forward else None,
        }

    def write(self, folder: Path) -> None:
        """Into `folder`/results.json, whole or not at all."""
        content = asdict(self)
        for row, plain in zip(self.rows, content["rows"], strict=True):
            plain["derived"] = self.derived(row)
        fresh = folder / f".{FILE}.tmp"
        fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        fresh.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """What `write` wrote."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(
            **content
            | {
                "settings": Settings(**content["settings"]),
                "peak": Peak(**content["peak"]),
                "rows": tuple(map(_row, content["rows"])),
            }
        )


def is_literal(row: Row) -> bool:
    """Whether this is the baseline: the literal STU, with whatever options."""
    return row.model.partition(":")[0] == LITERAL


def describe_machine(settings: Settings) -> dict[str, Any]:
    """The device and what runs on it; no names of hosts or users."""
    device = torch.device(settings.device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_of(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(DECISIVE)},
    }


def memory_of(device: torch.device) -> int:
    """All of a device's memory, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def commit() -> str | None:
    """The commit, and whether files differ from it; None outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """The time, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _row(plain: Mapping[str, Any]) -> Row:
    def whole(kind: Any, value: Any) -> Any:
        return None if value is None else kind(**value)

    facts = plain["facts"]
    if facts is not None:
        facts = facts | {key: whole(Work, facts[key]) for key in ("forward_floor", "forward_backward_floor")}
    timings = {key: whole(Timing, plain[key]) for key in ("forward", "forward_backward", "step")}
    others = {key: value for key, value in plain.items() if key != "derived"}
    return Row(**others | timings | {"facts": whole(Facts, facts)})
