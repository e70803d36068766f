"""Figures of a comparison for a paper: PNG, and PDF and SVG with text that stays text.

data.py     what is drawn, in numbers
style.py    sizes, colours, axes, files
tasks.py    of one task: learning curves; the metric against parameters and time
board.py    all tasks and models
sweep.py    of one sweep: parallel coordinates; the metric against each key
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.compare.groups import Group, chosen
from experiments.compare.runs import Row
from experiments.compare.sweeps import sweeps
from stu.errors import OptionError, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 200  # characters of a name
FORMATS = ("png", "pdf", "svg")


def write(groups: Sequence[Group], rows: Sequence[Row], folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw all there is to see and return the files, of which others with the same names are replaced.

    groups: of each task and model the one of `chosen` is drawn. rows: whose sweeps are drawn. Equal input gives equal
    files. Raises `OptionError` for another format, or without matplotlib, and `OSError` where nothing can be written.
    """
    require(len(formats) > 0, "--format", "", f"choose of {', '.join(FORMATS)}")
    for form in formats:
        require(form in FORMATS, "--format", form, f"choose of {', '.join(FORMATS)}")
    try:
        from experiments.compare.figures.style import save, styled
    except ModuleNotFoundError as error:
        raise OptionError("--figures", folder, f'needs {error.name}: pip install ".[plot]"') from None
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    with styled():
        for name, draw in _figures(chosen(groups), rows):
            figure = draw()
            if figure is not None:
                files += [save(figure, folder / f"{name}.{form}") for form in dict.fromkeys(formats)]
    return files


def _figures(groups: Sequence[Group], rows: Sequence[Row]) -> Iterator[tuple[str, Callable[[], "Figure | None"]]]:
    """The name of each figure and what draws it, or finds that there is nothing to see."""
    from experiments.compare.figures import board, sweep, tasks
    from experiments.compare.figures.data import by_task

    models = sorted({group.model for group in groups})
    yield "board", partial(board.board, groups, models)
    parts = by_task(groups)
    for own in parts:
        metrics = {one[0].metric for one in parts if one[0].title == own[0].title}
        name = _plain("-".join([own[0].title, *[str(own[0].metric)] * (len(metrics) > 1)]))
        yield f"curves-{name}", partial(tasks.curves, own, models)
        yield f"costs-{name}", partial(tasks.costs, own, models)
    for one in sweeps(rows):
        name = _plain(f"{one.name}-{one.task}")
        yield f"sweep-{name}-parallel", partial(sweep.parallel, one)
        yield f"sweep-{name}-keys", partial(sweep.keys, one)


def _plain(name: str) -> str:
    """As the name of a file."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-")[:LONGEST]
