"""Published results, from published.json: they stand beside ours of the same task and model at full size alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.compare.groups import LIMITS, Group, described, tells_data, told
from experiments.compare.runs import Row
from experiments.compare.select import ABSENT, value
from stu.training.records import flatten

FILE = Path(__file__).with_name("published.json")
CONF = Path(__file__).resolve().parents[2] / "conf"
SIZES = ("model.d_model", "model.depth", "trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches")
CHANCE = "chance"
SECOND_HAND = "*"  # the mark of a number that was not read in a work of the model's authors


@dataclass(frozen=True)
class Published:
    """A published test accuracy. written: in percent as published, or "chance"; model: ours of that kind, if any."""

    task: str
    name: str
    model: str | None
    written: str
    source: str
    second_hand: bool
    remark: str

    @property
    def percent(self) -> float | None:
        """The number; None for chance."""
        return None if self.written == CHANCE else float(self.written)

    @property
    def text(self) -> str:
        """The number with its mark."""
        return f"{self.written}{SECOND_HAND * self.second_hand}"


@cache
def published() -> tuple[Published, ...]:
    """All published results."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        Published(
            task=task,
            name=result["name"],
            model=result["model"],
            written=written,
            source=content["sources"][result["source"]],
            second_hand=result["second_hand"],
            remark=result["remark"].get(task, ""),
        )
        for result in content["results"]
        for task, written in result["accuracy"].items()
    )


def published_of(task: str, model: str | None) -> Published | None:
    """The published result of one of our models on a task."""
    return next((one for one in published() if (one.task, one.model) == (task, model) and model), None)


def reduced(group: Group) -> str | None:
    """What makes the runs of a group smaller than the published ones, in words; None where nothing does.

    They are of full size where the data are those of conf/task/<task>.yaml, all of the test set counts, and width,
    depth, steps and epochs are those of the preset `experiment=lra/…` of the command.
    """
    return next((words for row in group.rows if (words := _reduced(row))), None)


def _reduced(row: Row) -> str | None:
    if value(row, "task.seq_len") is ABSENT:
        return "options that cannot be read"
    if data := _differences(row, {key: wanted for key, wanted in _defaults(row.task).items() if tells_data(key)}):
        return f"data with {data}"
    if limits := _differences(row, dict(zip(LIMITS, (1.0, 0), strict=True))):
        return limits
    preset = _preset(row.experiment or "")
    return "not by a preset experiment=lra/…" if preset is None else _differences(row, preset) or None


def _differences(row: Row, wanted: Mapping[str, Any]) -> str:
    """What a run has otherwise than wanted, in words; a key that it does not have, as in earlier versions, is none."""
    found = {key: told(key, content) for key in wanted if (content := value(row, key)) is not ABSENT}
    return described({key: content for key, content in found.items() if content != told(key, wanted[key])})


@cache
def _defaults(task: str) -> dict[str, Any]:
    """The options of a task as in conf/task, but for those that are made from others and where the data come from."""
    content = flatten(_yaml(CONF / "task" / f"{task}.yaml"), "task")
    return {
        key: given
        for key, given in content.items()
        if "${" not in str(given) and key not in ("task.data.source", "task.data.seed")
    }


@cache
def _presets() -> frozenset[str]:
    folder = CONF / "experiment"
    return frozenset(str(file.relative_to(folder).with_suffix("")) for file in folder.glob("lra/*/*.yaml"))


@cache
def _preset(name: str) -> dict[str, Any] | None:
    """The sizes of a preset of published settings, its own or the defaults; None of another."""
    if name not in _presets():
        return None
    content: dict[str, Any] = {}
    for file, prefix in (("trainer/auto", "trainer"), ("model/_backbone", "model"), (f"experiment/{name}", "")):
        content |= flatten(_yaml(CONF / f"{file}.yaml"), prefix)
    return {key: content[key] for key in SIZES if key in content}


def _yaml(file: Path) -> dict[str, Any]:
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
