"""What is generated for every model of conf/model: python -m tests.generate, or make generate.

Golden trajectories, 20 losses each, in tests/golden/trajectories.json: those of new models are added. One that a change
alters on purpose is written again where the model is named: python -m tests.generate stu s4. The table of models in
README.md, from the first lines of each file of conf/model. And what the documentation has from conf/ and from its tour:
docs/models.md, docs/tasks.md, docs/api/data.md (`tests.pages`), docs/tour.md and docs/tour.ipynb (`tests.tour`).
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.shared.study import MARKERS
from stu.backbone import SequenceModel
from stu.cli.composition import build
from stu.cli.usage import CONF, options_of
from stu.errors import OptionError, require
from stu.mixer import Mixer, map_state
from stu.training import report
from tests import pages, tour
from tests.models import composed, model_config
from tests.runs import ROOT, Training

TRAJECTORIES = Path(__file__).with_name("golden") / "trajectories.json"
README = ROOT / "README.md"
START, END = "<!-- models: make generate -->\n", "<!-- end of models -->\n"
COLUMNS = ("`model=`", "what it is", "parameters", "work in L", "state")
WIDTH = 128  # of every model
BOARD = ROOT / "experiments" / "mini" / "README.md"
BOARD_START, BOARD_END = "<!-- board: make generate -->\n", "<!-- end of board -->\n"
BOARD_FIGURE = "![All models on small versions of the tasks, and trivial baselines](experiments/mini/board.png)\n\n"
BOARD_TEXT = """\
All models on small versions of the tasks, about 50,000 parameters each, under three minutes a run on one core:
accuracy on the test set in percent (LDS: mean squared error), mean ± standard deviation of two seeds. This is no Long
Range Arena; [experiments/mini](experiments/mini/README.md) has the one command behind it, budgets and rates.

"""


def main(rewritten: Sequence[str]) -> None:
    """Add the trajectories of new models, write those of the models named, and write the table."""
    for name in rewritten:
        require(name in options_of("model"), "model", name, f"must be one of {', '.join(options_of('model'))}")
    rows = table()
    golden = {name: losses for name, losses in read_trajectories().items() if name not in rewritten}
    for name in options_of("model"):
        if name not in golden:
            with TemporaryDirectory() as folder:
                golden[name] = trajectory(Path(folder), name)
            print(f"{TRAJECTORIES.relative_to(ROOT)}: {name} written")
    kept = {name: golden[name] for name in options_of("model")}
    TRAJECTORIES.write_text(json.dumps(kept, indent=1) + "\n")
    text = between(README.read_text(encoding="utf-8"), BOARD_START, BOARD_END, board())
    README.write_text(between(text, START, END, rows), encoding="utf-8")
    print("README.md: the table of models is up to date")
    for group, page in pages.PAGES.items():
        page.write_text(pages.updated(page.read_text(encoding="utf-8"), group, cells(rows)), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: the {group}s are up to date")
    pages.REFERENCE.write_text(pages.referenced(pages.REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
    tour.write()


def read_trajectories() -> dict[str, list[float]]:
    """The losses of every model that has some."""
    trajectories: dict[str, list[float]] = json.loads(TRAJECTORIES.read_text())
    return trajectories


def trajectory(folder: Path, name: str) -> list[float]:
    """The losses of 20 steps of a small model of conf/model on a small system, from the seed 0."""
    config = composed(
        f"model={name}", "task=lds", "task.seq_len=32", "task.data.train=40", "task.data.val=2",
        "task.data.test=1", "optimizer.lr=1e-2",
    )  # fmt: skip
    task = build(config.task)
    torch.manual_seed(0)
    backbone = build(model_config(name, seq_len=32, dropout=0.1))
    network = SequenceModel(task.encoder(backbone.d_model), backbone, task.head(backbone.d_model))
    training = Training(folder, task, network, optimizer=build(config.optimizer), max_steps=20, max_epochs=None)
    return list(training.fit().rows("train/loss").values())


def table() -> str:
    """The table of models in Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(row, options_of("model"))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def cells(rows: str) -> dict[str, list[str]]:
    """The cells of every model's row in the table, by its name."""
    split = ([cell.strip() for cell in line.split(" | ")] for line in rows.splitlines()[2:])
    return {first.strip("|` "): [first, *others[:-1], others[-1].removesuffix(" |")] for first, *others in split}


def row(name: str) -> list[str]:
    """One model: its description, parameters on ListOps, work, and state at 2048 steps."""
    description, work = header(name)
    backbone = build(model(name, composed("task=lra_listops").task))
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return [f"`{name}`", pages.linked(description), f"{parameters:,}", work, state(name)]


def header(name: str) -> tuple[str, str]:
    """The description of a model and its work in L, from the comments at the head of its file."""
    file = CONF / "model" / f"{name}.yaml"
    found = re.fullmatch(r"(.+)\. Work: (.+)\.", pages.head(file))
    must = "must start with '# <what it is>.' and '# Work: <in terms of L>.'"
    require(found is not None, "header", file.relative_to(ROOT), must)
    assert found is not None
    return found[1], found[2]


def state(name: str) -> str:
    """The size of a layer's state for one sequence of 2048 steps in float32, or what a step adds to it; of a hybrid, of
    every kind of layer."""
    backbone = build(model(name, composed("task=lds", "task.seq_len=2048").task))
    kinds = {type(block.mixer): block.mixer.requires_grad_(False) for block in backbone.blocks}
    return ", ".join(map(state_of, kinds.values()))


def state_of(mixer: Mixer) -> str:
    """That of one mixer."""
    first, second = (size(mixer.prefill(torch.zeros(1, steps, WIDTH))[1]) for steps in (2047, 2048))
    return f"{second:.3g} KiB" if first == second else f"{second - first:.3g} KiB per step"


def model(name: str, task: DictConfig) -> DictConfig:
    """The node of a model for a task, without composing each pair of them, which takes longer than what it is for."""
    config = composed(f"model={name}", "task=lds").copy()
    config.task = task
    return config.model


def size(state: Any) -> float:
    """The size of all tensors of a state, but for a system that all sequences share, in KiB."""
    found: list[Tensor] = []
    map_state(lambda part: found.append(part) or part, state)
    return sum(part.numel() * part.element_size() for part in found) / 1024


def board() -> str:
    """What README shows of experiments/mini: its figure and the table of its own README, if they are there."""
    start, end = MARKERS
    text = BOARD.read_text(encoding="utf-8") if BOARD.exists() else ""
    rows = text.partition(start)[2].partition(end)[0].strip()
    figure = BOARD_FIGURE * BOARD.with_name("board.png").exists()
    return figure + BOARD_TEXT + rows + "\n" if rows else ""


def between(text: str, start: str, end: str, content: str) -> str:
    """The text with other content between two of its lines."""
    before, _, after = text.partition(start)
    return before + start + content + end + after.partition(end)[2]


if __name__ == "__main__":
    report.quiet()
    try:
        main(sys.argv[1:])
    except OptionError as error:
        raise SystemExit(f"error: {error}") from None
