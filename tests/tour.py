"""The tour, docs/tour.py, as a page and as a notebook: docs/tour.md, with what its cells print, and docs/tour.ipynb."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from typing import Any, NamedTuple

from tests.runs import ROOT

TOUR, PAGE, NOTEBOOK = (ROOT / "docs" / f"tour.{suffix}" for suffix in ("py", "md", "ipynb"))


class Cell(NamedTuple):
    """Text, or code."""

    is_code: bool
    source: str


def write() -> None:
    """Write the notebook, and the page where the tour has changed: its cells print times, which are never the same."""
    NOTEBOOK.write_text(notebook(cells()), encoding="utf-8")
    if not PAGE.exists() or without_output(PAGE.read_text(encoding="utf-8")) != page(cells()):
        PAGE.write_text(page(cells(), printed(cells())), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} and {NOTEBOOK.name}: the tour is up to date")


def cells() -> list[Cell]:
    """The cells of the tour, which begin with a line # %%."""
    parts = re.split(r"^# %%(.*)\n", TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [Cell("markdown" not in kind, source.strip("\n")) for kind, source in pairwise(parts[1:])][::2]
    return [cell if cell.is_code else Cell(False, re.sub("^# ?", "", cell.source, flags=re.M)) for cell in found]


def printed(cells: list[Cell]) -> list[str]:
    """What every cell prints; each sees the names of those before it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for cell in cells:
        with redirect_stdout(StringIO()) as output:
            if cell.is_code:
                exec(compile(cell.source, str(TOUR), "exec"), names)
        outputs.append(output.getvalue())
    return outputs


def page(cells: list[Cell], outputs: list[str] | None = None) -> str:
    """The tour in Markdown, code and output in blocks."""
    parts = []
    for cell, output in zip(cells, outputs or [""] * len(cells), strict=True):
        parts.append(f"```python\n{cell.source}\n```\n" if cell.is_code else f"{cell.source}\n")
        if output:
            parts.append(f"```text\n{output}```\n")
    return "\n".join(parts)


def without_output(text: str) -> str:
    """A page without what its cells print."""
    return re.sub(r"\n```text\n.*?```\n", "", text, flags=re.DOTALL)


def notebook(cells: list[Cell]) -> str:
    """The tour in the format of Jupyter, version 4.5, without outputs."""
    content = {
        "cells": [
            {
                "cell_type": "code" if cell.is_code else "markdown",
                "id": f"cell-{number}",
                "metadata": {},
                "source": cell.source.splitlines(keepends=True),
                **({"execution_count": None, "outputs": []} if cell.is_code else {}),
            }
            for number, cell in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
