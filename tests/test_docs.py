"""What README, CONTRIBUTING and docs/ say is tried: commands, Python, errors, links, names of files."""

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown import Markdown
from markdown.extensions.toc import slugify

from data.prepare.__main__ import Request
from experiments.shared.study import MARKERS
from experiments.sweep import wandb_yaml
from experiments.sweep.spaces import Space
from stu.cli import output
from stu.cli.arguments import checked
from stu.cli.check import check
from stu.cli.composition import composed
from stu.cli.usage import EXAMPLES, GROUPS, options_of
from stu.errors import OptionError
from stu.ops.filters import spectral_filters
from tests import generate
from tests.generate import BOARD_END, BOARD_START, END, START, board, table
from tests.runs import ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = {page: page.read_text(encoding="utf-8") for page in [README, ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]}
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
FENCE = re.compile(r"^```(\w*).*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(
    r"[…|{]|<[a-z ]+>|(^|[=/ ])[A-Z]{2,}\b|\.$"
)  # of words that stand for others: NAME, <file>, a|b, …
ADDED = {"ema", "test_ema", "parity"}  # by CONTRIBUTING, whose own tests try them
OURS = ("experiments", "data", "stu", "tests", "docs")


class Command(tuple[str, ...]):
    """The words after `python`, as they stand on one of the pages."""

    def __str__(self) -> str:
        return shlex.join(self)


def lines(text: str) -> Iterator[str]:
    """What a reader may copy: lines of shell, the continued ones joined, and code within sentences."""
    for language, code in FENCE.findall(text):
        if language in ("bash", "console"):
            prompted = [line.removeprefix("$ ") for line in joined(code) if language == "bash" or line.startswith("$ ")]
            yield from prompted
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)))


def joined(code: str) -> list[str]:
    """Lines of which those that end with a backslash go on."""
    return re.sub(r"\\\n\s*", "", code).splitlines()


def commands() -> list[Command]:
    """Every command of Python's, once; without those whose words stand for others."""
    text = [line for page in PAGES.values() for line in lines(page)] + EXAMPLES.replace(
        "  python", "\npython"
    ).splitlines()
    found = [
        re.search(r"\bpython (.*)|torchrun .*?(train\.py .*)", re.split(r" > | {2,}#? ?", line)[0]) for line in text
    ]
    calls = [match[1] or match[2] for match in found if match]
    made = {Command(shlex.split(call, comments=True)) for call in calls if not PLACEHOLDER.search(call)}
    return sorted(command for command in made if not ADDED & {word.rpartition("=")[2] for word in command})


COMMANDS = commands()
TRAINING = [Command(words[1:]) for words in COMMANDS if words[0] == "train.py" and words[1:] != ("--help",)]
TRAINING.remove(Command(["model=stu", "task=lra_listops", "model.mixer.num_filters=5000"]))  # refused on purpose
MODULES = [Command(words[1:]) for words in COMMANDS if words[0] == "-m" and words[1].split(".")[0] in OURS]


class Accepted(Exception):
    """argparse took the words; what the command would do next is not done."""


def accept(parser: argparse.ArgumentParser, words: Sequence[str] | None = None, namespace: Any = None) -> Any:
    """In place of `parse_args`."""
    _, others = parser.parse_known_args(words, namespace)
    assert not others, others
    raise Accepted


@pytest.fixture(autouse=True, scope="module")
def _plain_output() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "guard", lambda: None)
        yield


def more_than_choices(command: Command) -> bool:
    """tests/conf composes every model and every task."""
    return any(not word.startswith(("model=", "task=")) for word in command)


@pytest.mark.parametrize("command", TRAINING, ids=str)
def test_a_command_that_trains_has_words_of_ours(command: Command):
    assert checked(command)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*filter(more_than_choices, TRAINING)], ids=str)
def test_a_command_that_trains_composes(command: Command):
    words = [word for word in checked(command) if not word.startswith("-") and word != "job"]
    if "-m" in command:
        swept = [word for word in words if word.startswith(("hydra", "sweep="))]
        options: Any = composed(swept, with_hydra=True).hydra.sweeper if swept else {}
        words = next(Space.of(words, options.get("params"), options.get("when")).examples())
    check(composed(words))


@pytest.mark.parametrize("command", MODULES, ids=str)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_module_takes_its_arguments(command: Command, monkeypatch):
    module, *words = command
    if module == "data.prepare":
        request = Request.parse(words)
        assert {*request.names} <= {None, *options_of("task")}
        if request.overrides:
            check(composed([*(f"task={name}" for name in request.names[:1] if name), *request.overrides]))
    elif module == "experiments.sweep.wandb_yaml" and words:
        assert wandb_yaml.configuration(words[0], words[1:])["parameters"]
    elif module.startswith("tests.") or not words:
        assert find_spec(module)
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accept)
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Accepted):
            runpy.run_module(module, run_name="__main__", alter_sys=False)


def test_there_are_commands():
    assert len(TRAINING) > 20
    assert len(MODULES) > 15


def has_python(page: Path) -> bool:
    """That nothing else tries: CONTRIBUTING has tests of its own, and so have pages that are programs."""
    return "```python\n" in PAGES[page] and page.name != "CONTRIBUTING.md" and not page.with_suffix(".py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", [*filter(has_python, PAGES)], ids=lambda page: page.stem)
def test_its_python_runs(page: Path):
    names: dict[str, object] = {}
    for language, code in FENCE.findall(PAGES[page]):
        if language == "python":
            exec(code, names)
    if page.stem == "library":
        assert names["filters"].shape == (4096, 24)
        assert names["y_t"].shape == (3, 128)
        assert names["y"].shape == (1, 4800, 128)


def test_its_error_is_the_real_one():
    """The one-line error of a number of filters; the others are told by their tests."""
    said = {line for text in PAGES.values() for line in re.findall(r"^error: model\.mixer\.(.*)$", text, re.MULTILINE)}
    with pytest.raises(OptionError) as refused:
        spectral_filters(2048, 5000)
    assert said == {str(refused.value)}


@pytest.mark.slow
def test_the_table_of_models_is_generated():
    assert PAGES[README].partition(START)[2].partition(END)[0] == table(), "make generate writes it"


def test_the_board_is_that_of_its_study():
    assert PAGES[README].partition(BOARD_START)[2].partition(BOARD_END)[0] == board(), "make generate writes it"


def test_a_board_is_a_figure_a_sentence_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BOARD", tmp_path / "README.md")
    assert board() == ""
    generate.BOARD.write_text("# Board\n" + "\n| model |\n| --- |\n".join(MARKERS) + "\n", encoding="utf-8")
    assert board() == generate.BOARD_TEXT + "| model |\n| --- |\n"
    (tmp_path / "board.png").touch()
    assert board() == generate.BOARD_FIGURE + generate.BOARD_TEXT + "| model |\n| --- |\n"


def test_every_group_of_the_configuration_is_described():
    _, first, *_ = PAGES[DOCS / "configuration.md"].split("\n## ")
    assert {*re.findall(r"^\| `(\w+)` \| ", first, re.MULTILINE)} == {*GROUPS}


def test_the_readme_is_short():
    assert len(PAGES[README].splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_exists(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path):
    """Else its last ones are not shown: a bar within a cell needs a backslash."""
    for text in re.findall(r"(?:^\|.*\n)+", PAGES[page], re.MULTILINE):
        rows = text.splitlines()
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
        assert len(set(cells)) == 1, rows[cells.index(max(cells))]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, which are the same here and where the repository is shown."""
    text = re.sub(r'--8<-- "([^":]+)[^"]*"', lambda part: (ROOT / part[1]).read_text("utf-8"), page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {slugify(re.sub(r"[`*\[\]]|\(.*?\)", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(page: Path):
    roots = "conf|data|docs|experiments|stu|tests"
    for path in re.findall(rf"`((?:{roots})/[\w/.-]+)`", FENCE.sub("", PAGES[page])):
        assert (ROOT / path).exists() or Path(path).stem in ADDED, path


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        target for text in PAGES.values() for line in lines(text) for target in re.findall(r"^make ([a-z0-9-]+)", line)
    }
    assert {"train", "test", "docs"} <= named <= targets


def test_building_the_pages_leaves_an_environment_that_has_what_is_needed(tmp_path: Path):
    """It may be another clone's, which an installation would let import this one."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$1 $2" >> {shlex.quote(str(tmp_path))}/calls\n')
    python.chmod(0o755)
    subprocess.run(["make", "-s", "docs", f"VENV={tmp_path}"], cwd=ROOT, check=True, capture_output=True)
    first, *others = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("-c import")
    assert others == ["-m zensical"]


def test_every_page_has_its_place():
    """In the navigation, each once; and every page that it names is there."""
    placed = [page for entry in SITE["nav"] for page in pages(entry)]
    assert sorted(placed) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS))


def pages(entry: Any) -> Iterator[str]:
    """The files of an entry of the navigation."""
    if isinstance(entry, str):
        yield entry
    for one in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from pages(one)


def test_parts_of_other_files_are_there():
    """What pages include: `file:section`, both of whose marks stand in the file."""
    parts = [part for text in PAGES.values() for part in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE)]
    assert len(parts) > 8
    for file, _, section in (part.partition(":") for part in parts):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not section or all(text.count(f"--8<-- [{mark}:{section}]") == 1 for mark in ("start", "end")), file


def test_formulas_are_drawn_without_scripts():
    """And dollars that are none are left alone."""
    names = ["pymdownx.arithmatex", "docs.mathml"]
    page = Markdown(extensions=names, extension_configs={names[0]: {"generic": True}})
    html = page.convert(
        "It costs $5, $STU_RUNS, `$x$`; $a_k < b$.\n\n$$\nZ = \\begin{bmatrix} a & b \\end{bmatrix}\n$$\n"
    )
    assert html.count("<math") == 2
    assert "It costs $5, $STU_RUNS, <code>$x$</code>; " in html
    assert "<msub><mi>a</mi><mi>k</mi></msub><mo>&#x0003C;</mo><mi>b</mi>" in html
    assert "<mtd><mi>a</mi></mtd><mtd><mi>b</mi></mtd>" in html


def test_numbers_of_results_are_those_of_their_studies():
    """In the README's table of results."""
    rows = [line for line in PAGES[README].splitlines() if line.startswith("| ") and "](experiments/" in line]
    assert len(rows) >= 7
    for row in rows:
        [link] = re.findall(r"\]\((experiments/[\w/]+README\.md)\)", row)
        study = (ROOT / link).read_text(encoding="utf-8")
        for number in re.findall(r"(?<![\w.])\d[\d,.]*(?:e-?\d+)?(?=[ ;,|]|\.\s|$)", row):
            assert re.search(rf"(?<![\d.,]){re.escape(number.rstrip(',.'))}(?![\d.])", study), (
                f"{number} is not in {link}"
            )


def test_citations_agree():
    """The README's BibTeX has what CITATION.cff says of the paper; of the software, it is CITATION.cff that says it."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper, bibtex = cff["preferred-citation"], PAGES[README].partition("```bibtex")[2].partition("```")[0]
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    said = {**{key: paper[key] for key in ("title", "journal", "year")}, "author": names}
    for key, value in said.items():
        assert re.search(rf"{key} += " + re.escape(f"{{{value}}}"), bibtex), key
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cff["version"], cff["license"]) == (project["version"], project["license"])


def test_modules_of_the_site_are_installed():
    """What mkdocs.yml asks of Markdown can be imported."""
    for extension in SITE["markdown_extensions"]:
        name = extension if isinstance(extension, str) else next(iter(extension))
        assert importlib.import_module(name if "." in name else f"markdown.extensions.{name}")
