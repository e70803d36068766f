"""Build the data of tasks unless the cache has them, check them, and show their cards: python -m data.prepare --help.

The configuration is that of train.py, composed and checked in the same way.
"""

# ruff: noqa: E402
import sys

from stu.cli import output
from stu.cli.usage import options_of

HELP = """\
Build the data of tasks unless the cache has them; check all examples; show what is in them.

  python -m data.prepare [task=NAME,...|all] [KEY=VALUE ...] [card=FILE] [figures=FOLDER]

  task         {tasks};
               several, separated by commas; all: data that must be downloaded and are missing are named and skipped
  KEY=VALUE    what train.py takes: task.data.train=1000, paths.data=<folder>, experiment=quick
  card         also write the cards as a table in Markdown
  figures      draw <task>.png in this folder: some examples, or lengths and labels (needs matplotlib)

Examples:
  python -m data.prepare task=lra_listops
  python -m data.prepare task=lra_listops,lds card=cards.md
  python -m data.prepare task=lra_pathfinder task.data.train=1000 task.data.val=100 task.data.test=100 figures=.
  python -m data.prepare task=all"""

if __name__ == "__main__":
    output.guard()
    if {"-h", "--help"} & set(sys.argv[1:]):  # before the imports that take seconds
        print(HELP.format(tasks=", ".join(options_of("task"))))
        raise SystemExit(0)

import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from data.prepare.cards import Card, InvalidData, card_of, format_baselines, markdown, rows_of
from stu.cli import composition, errors
from stu.cli.check import check
from stu.errors import OptionError, require
from stu.task import Task

OWN = ("task", "card", "figures")  # keys of this command; all others belong to the configuration
RENAMED = {"pictures": "figures"}  # former keys of this command, and their present names
SOURCE = "task.data.source"  # the key that names the folder of the files, in every task that reads files


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    task: names separated by commas, "all", or None: the task that the other arguments choose.
    """

    task: str | None
    overrides: Sequence[str]
    card: Path | None
    figures: Path | None

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Request":
        """Raises `OptionError` for an argument that is not KEY=VALUE, and for a key of this command given twice."""
        own: dict[str, str] = {}
        overrides = []
        for argument in arguments:
            key, equals, value = argument.partition("=")
            require(equals != "", "argument", argument, "must be KEY=VALUE; see --help")
            require(key not in RENAMED, key, value, f"no such key; it is {RENAMED.get(key)} now")
            if key not in OWN:
                overrides.append(argument)
                continue
            require(key not in own, key, value, f"must be given once; is {own.get(key)} already")
            require(value.strip(",") != "", key, value, "must not be empty")
            own[key] = value
        card, figures = (Path(own[key]).expanduser() if key in own else None for key in ("card", "figures"))
        return cls(own.get("task"), overrides, card, figures)

    def check(self) -> None:
        """Raise `OptionError` for what would otherwise fail only after the data are built."""
        if self.card is not None:
            fits = self.card.absolute().parent.is_dir() and not self.card.is_dir()
            require(fits, "card", self.card, "must be a file, in a folder that exists")
        if self.figures is not None:
            require(find_spec("matplotlib") is not None, "figures", self.figures, "needs matplotlib; pip install it")
            try:
                self.figures.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OptionError("figures", self.figures, f"must be a folder: {error.strerror}") from error

    @property
    def names(self) -> Sequence[str | None]:
        """The names of the tasks; None stands for the one that the configuration chooses."""
        if self.task is None:
            return [None]
        return options_of("task") if self.task == "all" else [name for name in self.task.split(",") if name]


def main() -> None:
    """Do what the command line asks for; exit with the worst code of all tasks."""
    try:
        request = Request.parse(sys.argv[1:])
        request.check()
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(errors.USAGE) from None
    configs = dict(composed(name, request.overrides) for name in request.names)
    for config in configs.values():  # before any data are built
        errors.reports_errors(check)(config)
    cards: list[Card] = []
    codes = [0]
    for name, config in configs.items():
        try:
            errors.reports_errors(partial(prepare, name=name, request=request, cards=cards))(config)
        except SystemExit as end:  # the error is printed already
            codes.append(int(end.code or 0))
        except Exception:  # the other tasks are still built
            traceback.print_exc()
            codes.append(1)
    if request.card is not None and cards:
        codes.append(write(request.card, cards))
    raise SystemExit(max(codes))


def composed(name: str | None, overrides: Sequence[str]) -> tuple[str, DictConfig]:
    """The name of the task, and the configuration of `python train.py [task=name] overrides`."""
    chosen = [] if name is None else [f"task={name}"]
    config = composition.composed([*chosen, *overrides], with_hydra=True)
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return config.hydra.runtime.choices.task, plain


def prepare(config: DictConfig, *, name: str, request: Request, cards: list[Card]) -> None:
    """Build, check and show the data of one task; append its card to `cards`."""
    try:
        task: Task = composition.build(config.task)
        task.prepare()
    except (OptionError, InstantiationException) as error:
        refused = error if isinstance(error, OptionError) else error.__cause__
        missing = isinstance(refused, OptionError) and refused.name == "source" and refused.value is None
        if not (missing and request.task == "all"):  # where all are asked for, missing downloads are skipped
            raise
        assert isinstance(refused, OptionError)
        print(f"{name} is not here: {SOURCE}={refused.value}: {refused.allowed}", file=sys.stderr, flush=True)
        return
    try:
        card = card_of(name, task, composition.build(config.task))
    except InvalidData as error:
        remedy = f"remove the folder {task.fingerprint()} from the cache to have them rebuilt"
        raise OptionError("task", name, f"the data are invalid: {error}; {remedy}") from error
    show(card)
    cards.append(card)
    if request.figures is not None:
        draw(card, task, request.figures)


def show(card: Card) -> None:
    """Print a table of the splits, and the trivial baselines."""
    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("")
    for split in card.splits:
        table.add_column(split, justify="right", no_wrap=True)
    for title, entries in rows_of(card):
        table.add_row(title, *entries)
    console.print(f"{card.name}, {card.fingerprint}", style="bold", soft_wrap=True)
    console.print(table)
    console.print(f"trivial baselines: {format_baselines(card)}", end="\n\n", soft_wrap=True)


def draw(card: Card, task: Task, folder: Path) -> None:
    """Write <task>.png into this folder."""
    from data.prepare import figures  # imports matplotlib, which is optional

    try:
        figures.draw(card, task, folder / f"{card.name}.png")
    except OSError as error:
        raise OptionError("figures", folder, f"cannot be written to: {error.strerror}") from error


def write(file: Path, cards: Sequence[Card]) -> int:
    """Write the cards as a table in Markdown, below the command that makes it; returns the exit code."""
    command = f"<!-- python -m data.prepare {shlex.join(sys.argv[1:])} -->"
    try:
        file.write_text(f"{command}\n\n{markdown(cards)}", encoding="utf-8")
    except OSError as error:
        print(f"error: card={file}: {error.strerror}", file=sys.stderr)
        return errors.USAGE
    return 0


if __name__ == "__main__":
    errors.run(main, list)  # `Request` checks its words
