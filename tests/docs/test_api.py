"""The reference has every public name, and names nothing that is not there."""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import markdown
import pytest

import stu
import stu.mixers
import stu.training
from stu.cli.usage import options_of
from tests import pages
from tests.runs import ROOT

API = ROOT / "docs" / "api"


def documented() -> Iterator[str]:
    """The full names of all that the pages document."""
    for page in sorted(API.glob("*.md")):
        for name, options in re.findall(
            r"^::: ([\w.]+)\n((?: .*\n|\n(?= ))*)", page.read_text(encoding="utf-8") + "\n", re.M
        ):
            members = re.findall(r"^ {8}- (\w+)$", options, re.MULTILINE)
            yield from (f"{name}.{member}" for member in members) if members else (name,)


NAMES = list(documented())


def value(name: str) -> Any:
    """What has this full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", [stu, stu.mixers, stu.training], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: ModuleType):
    public = {name: getattr(module, name) for name in module.__all__}
    full = {f"{one.__module__}.{name}" for name, one in public.items() if not isinstance(one, ModuleType)}
    assert full <= set(NAMES), f"docs/api lacks {sorted(full - set(NAMES))}"
    modules = {one.__name__ for one in public.values() if isinstance(one, ModuleType)}
    assert modules <= {name.rpartition(".")[0] for name in NAMES}


def test_every_task_and_its_data_are_in_the_reference():
    targets = {
        name
        for task in options_of("task")
        for name in re.findall(r"^(?: *)_target_: (\S+)$", pages.file("task", task).read_text(encoding="utf-8"), re.M)
    }
    assert targets <= set(NAMES), (
        f"docs/api lacks {sorted(targets - set(NAMES))}: make generate adds them to docs/api/data.md"
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_the_reference_names_is_there_and_has_a_docstring(name: str):
    assert value(name).__doc__, name
    assert value(name).__module__ == name.rpartition(".")[0], f"{name} comes from {value(name).__module__}"


def test_docstrings_read_as_markdown_have_formulas_whole():
    """Underscores of formulas emphasise nothing: where they would, the formula stands between backticks."""
    texts = {name: inspect.getdoc(value(name)) or "" for name in NAMES}
    texts |= {module: importlib.import_module(module).__doc__ or "" for module in {n.rpartition(".")[0] for n in NAMES}}
    for name, text in texts.items():
        emphasised = re.findall(
            r"<(?:em|strong)\b[^>]*>(.*?)</", markdown.markdown(text, extensions=["attr_list"]), re.S
        )
        assert all(re.fullmatch(r"[\w ]+", words) for words in emphasised), (name, emphasised)


def test_no_name_is_there_twice():
    twice = {name for name in NAMES if NAMES.count(name) > 1}
    assert twice == {"stu.mixers.stu.STU", "stu.ops.filters.spectral_filters"}  # of which the first page has all
