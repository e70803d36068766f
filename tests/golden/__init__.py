"""Where the golden files are, and which cases they hold: everything is read from the files, nothing is listed here."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

DIRECTORY = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent)


def path(name: str) -> Path:
    """The file of one kind of golden vectors."""
    return DIRECTORY / f"{name}.npz"


def cases(name: str, pattern: str, *, optional: bool = False) -> list:
    """Every distinct match of the groups of `pattern` among the array names of a file, as test parameters.

    optional: a set of golden files may hold none of them (large cases leave out their intermediate results).
    """
    with np.load(path(name)) as file:
        found = {match.groups() for key in file.files if (match := re.fullmatch(pattern, key))}
    if optional and not found:
        reason = f"{path(name)} holds nothing like {pattern}"
        return [pytest.param(*[None] * re.compile(pattern).groups, marks=pytest.mark.skip(reason=reason), id="none")]
    assert found, f"{path(name)} holds nothing like {pattern}"
    return [pytest.param(*groups, id="-".join(groups)) for groups in sorted(found)]
