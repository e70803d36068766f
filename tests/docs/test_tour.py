"""The tour runs, and its page and its notebook are the same tour."""

import ast
import json

import pytest

from tests import tour


@pytest.mark.slow
def test_it_runs_and_prints():
    outputs = tour.printed(tour.cells())  # whose assertions hold
    code = [output for cell, output in zip(tour.cells(), outputs, strict=True) if cell.is_code]
    assert sum(map(bool, code)) == 5


def test_its_page_is_up_to_date():
    text = tour.PAGE.read_text(encoding="utf-8")
    assert tour.without_output(text) == tour.page(tour.cells()), "make generate writes docs/tour.md"
    assert text.count("```text\n") == 5


def test_its_notebook_is_up_to_date():
    content = json.loads(tour.NOTEBOOK.read_text(encoding="utf-8"))
    assert json.dumps(content) == json.dumps(json.loads(tour.notebook(tour.cells()))), "make generate writes it"
    kinds = {cell["cell_type"] for cell in content["cells"]}
    assert kinds == {"code", "markdown"}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))


def test_it_needs_the_library_alone():
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(tour.TOUR.read_text(encoding="utf-8")))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        )
    }
    assert imported == {"math", "time", "torch", "stu"}
