"""Build the data of tasks, or find them in the cache; check them, show their cards: python -m data.prepare. See --help.

The configuration is that of train.py, composed and checked in the same way.
"""

# ruff: noqa: E402
import sys

from conf.usage import CONF, options_of

HELP = """\
Build the data of tasks, or find them in the cache; check all examples; show what is in them.

  python -m data.prepare [task=NAME,...|all] [KEY=VALUE ...] [card=FILE] [pictures=FOLDER]

  task         {tasks};
               several with commas between them; all: what has to be fetched and is not here is named, and no failure
  KEY=VALUE    what train.py takes: task.data.train=1000, paths.data=<folder>, experiment=quick
  card         write the cards as a table in Markdown, too
  pictures     draw <task>.png in this folder: some examples, or lengths and labels (needs matplotlib)

Examples:
  python -m data.prepare task=lra_listops
  python -m data.prepare task=lra_listops,lds card=cards.md
  python -m data.prepare task=lra_pathfinder task.data.train=1000 task.data.val=100 task.data.test=100 pictures=.
  python -m data.prepare task=all"""

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):  # before the imports that take seconds
    print(HELP.format(tasks=", ".join(options_of("task"))))
    raise SystemExit(0)

import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from conf import cli
from data.cards import Card, Faulty, baselines_in_words, card_of, markdown, rows_of
from stu.errors import OptionError, require
from stu.task import Task

OWN = ("task", "card", "pictures")  # keys that are for this command; all others are the configuration's
SOURCE = "task.data.source"  # where every task that reads files has their folder


@dataclass(frozen=True)
class Request:
    """What the command line asks for. task: names with commas between them, "all", or None: what the rest chooses."""

    task: str | None
    overrides: Sequence[str]
    card: Path | None
    pictures: Path | None

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Request":
        """Raises `OptionError` for what is no KEY=VALUE, and for what is given twice."""
        own: dict[str, str] = {}
        overrides = []
        for argument in arguments:
            key, equals, value = argument.partition("=")
            require(equals != "", "argument", argument, "must be KEY=VALUE; see --help")
            if key not in OWN:
                overrides.append(argument)
                continue
            require(key not in own, key, value, f"must be given once; is {own.get(key)} already")
            require(value.strip(",") != "", key, value, "must not be empty")
            own[key] = value
        card, pictures = (Path(own[key]).expanduser() if key in own else None for key in ("card", "pictures"))
        return cls(own.get("task"), overrides, card, pictures)

    def check(self) -> None:
        """Raise `OptionError` for what would else fail only when the data are built."""
        if self.card is not None:
            fits = self.card.absolute().parent.is_dir() and not self.card.is_dir()
            require(fits, "card", self.card, "must be a file, in a folder that exists")
        if self.pictures is not None:
            require(find_spec("matplotlib") is not None, "pictures", self.pictures, "needs matplotlib; pip install it")
            try:
                self.pictures.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OptionError("pictures", self.pictures, f"must be a folder: {error.strerror}") from error

    @property
    def everything(self) -> bool:
        """Whether what cannot be had is no failure."""
        return self.task == "all"

    @property
    def names(self) -> Sequence[str | None]:
        """The tasks; None for the one that the configuration chooses."""
        if self.task is None:
            return [None]
        return options_of("task") if self.everything else [name for name in self.task.split(",") if name]


def main() -> None:
    """Do what the command line asks for; the exit code is not 0 if something failed."""
    try:
        request = Request.parse(sys.argv[1:])
        request.check()
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(cli.USAGE) from None
    configs = dict(composed(name, request.overrides) for name in request.names)
    for config in configs.values():  # all of them, before the first is built
        cli.reports_errors(cli.check)(config)
    cards: list[Card] = []
    codes = [0]
    for name, config in configs.items():
        try:
            cli.reports_errors(partial(prepare, name=name, request=request, cards=cards))(config)
        except SystemExit as end:  # reported
            codes.append(int(end.code or 0))
        except Exception:  # no reason to leave out the others
            traceback.print_exc()
            codes.append(1)
    if request.card is not None and cards:
        codes.append(write(request.card, cards))
    raise SystemExit(max(codes))


def composed(name: str | None, overrides: Sequence[str]) -> tuple[str, DictConfig]:
    """The name of the task, and the configuration of `python train.py [task=name] overrides`."""
    chosen = [] if name is None else [f"task={name}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*chosen, *overrides], return_hydra_config=True)
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return config.hydra.runtime.choices.task, plain


def prepare(config: DictConfig, *, name: str, request: Request, cards: list[Card]) -> None:
    """Build, check and show the data of one task; its card joins `cards`."""
    task: Task = instantiate(config.task)
    try:
        task.prepare()
    except OptionError as error:
        if not (request.everything and error.name == "source" and error.value is None):
            raise
        print(f"{name} is not here: {SOURCE}={error.value}: {error.allowed}", file=sys.stderr, flush=True)
        return
    try:
        card = card_of(name, task, instantiate(config.task))
    except Faulty as fault:
        cure = f"without the folder {task.fingerprint()} in the cache they are built anew"
        raise OptionError("task", name, f"the data are faulty: {fault}; {cure}") from fault
    show(card)
    cards.append(card)
    if request.pictures is not None:
        draw(card, task, request.pictures)


def show(card: Card) -> None:
    """A table of the splits, and what needs no model."""
    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("")
    for split in card.splits:
        table.add_column(split, justify="right", no_wrap=True)
    for title, entries in rows_of(card):
        table.add_row(title, *entries)
    console.print(f"{card.name}, {card.fingerprint}", style="bold", soft_wrap=True)
    console.print(table)
    console.print(f"no achievement: {baselines_in_words(card)}", end="\n\n", soft_wrap=True)


def draw(card: Card, task: Task, folder: Path) -> None:
    """<task>.png in this folder."""
    from data import pictures  # matplotlib is there, but loaded only for this

    try:
        pictures.draw(card, task, folder / f"{card.name}.png")
    except OSError as error:
        raise OptionError("pictures", folder, f"cannot be written to: {error.strerror}") from error


def write(file: Path, cards: Sequence[Card]) -> int:
    """The cards as a table in Markdown, below the command that makes it; returns the exit code."""
    command = f"<!-- python -m data.prepare {shlex.join(sys.argv[1:])} -->"
    try:
        file.write_text(f"{command}\n\n{markdown(cards)}", encoding="utf-8")
    except OSError as error:
        print(f"error: card={file}: {error.strerror}", file=sys.stderr)
        return cli.USAGE
    return 0


if __name__ == "__main__":
    cli.run(main)
