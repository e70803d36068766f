"""What the README says is tried: its Python, its commands and its one-line error."""

import re
import shlex

import pytest

from stu.cli.check import check
from stu.cli.usage import EXAMPLES
from stu.errors import OptionError
from stu.ops.filters import spectral_filters
from tests.generate import END, START, table
from tests.models import composed
from tests.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python train\.py ([^`\n#]+?)(?:`| {2,}|\n)", README + EXAMPLES + "\n")))


@pytest.mark.slow
def test_its_python_runs():
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["filters"].shape == (4096, 24)
    assert names["y_t"].shape == (3, 128)
    assert names["y"].shape == (1, 4800, 128)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "--" not in c and "num_filters=5000" not in c])
def test_its_commands_compose(command: str):
    sweep, *overrides = shlex.split(command) if command.startswith("-m ") else ("", *shlex.split(command))
    single = [override.split(",")[0] if sweep else override for override in overrides]
    check(composed(*single))


def test_there_are_commands():
    assert len(COMMANDS) >= 4


def test_its_error_is_the_real_one():
    [line] = re.findall(r"^error: model\.mixer\.(.*)$", README, re.MULTILINE)
    with pytest.raises(OptionError) as refused:
        spectral_filters(2048, 5000)
    assert str(refused.value) == line


@pytest.mark.slow
def test_the_table_of_models_is_generated():
    assert README.partition(START)[2].partition(END)[0] == table(), "make generate writes it"


def test_every_file_it_names_exists():
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path
