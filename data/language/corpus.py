"""The text that every Python installation has: the docstrings of its standard library, and its language reference.

About 1.7 MB of English, of the same order everywhere; another version of Python has another text.
"""

import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

# Modules that some distributions leave out, or that are no documentation.
LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle", "turtledemo"}
LEFT_OUT |= {"venv", "sitecustomize", "usercustomize"}
STRING = re.compile("(\"{3}|'{3})(.*?)\\1", re.DOTALL)
SHORTEST = 80  # characters of a docstring that is more than a name in words


@cache
def corpus() -> bytes:
    """All of it in UTF-8; takes less than half a second."""
    parts = [*docstrings(), *(topics[name].strip() for name in sorted(topics))]
    return "\n\n\n".join(parts).encode()


def docstrings() -> Iterator[str]:
    """The longer docstrings of the standard library, without indentation, module by module."""
    for file in sources():
        source = file.read_text("utf-8", "replace")
        for string in STRING.finditer(source):
            before = source[source.rfind("\n", 0, string.start()) + 1 : string.start()]
            if not before.strip(" \trR") and len(text := inspect.cleandoc(string[2])) >= SHORTEST:
                yield text


def sources() -> Iterator[Path]:
    """The public modules, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(name for name in sys.stdlib_module_names - LEFT_OUT if not name.startswith("_")):
        module = root / f"{name}.py"
        found = [module] if module.is_file() else sorted((root / name).rglob("*.py"))
        yield from (file for file in found if not {"test", "tests"} & set(file.relative_to(root).parts))
