"""The lowest versions that pyproject.toml declares are those that `make test-lowest` installs."""

import re
import tomllib

from tests.runs import ROOT


def declared() -> dict[str, tuple[int, ...]]:
    """The lowest version of everything that pyproject.toml requires, in any extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["dependencies"], *project["optional-dependencies"].values()
    requirements = [requirement for group in groups for requirement in group if not requirement.startswith("stu[")]
    return {
        name.lower(): numbers(lowest) for name, lowest in (one.partition(",")[0].split(">=") for one in requirements)
    }


def pinned(file: str) -> dict[str, tuple[int, ...]]:
    """The versions of a file of constraints, of what pyproject.toml requires."""
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): numbers(version) for name, version in pins if name.lower() in declared()}


def numbers(version: str) -> tuple[int, ...]:
    """1.26.0 → (1, 26), as 1.26."""
    return tuple(int(part) for part in re.sub(r"(\.0)+$", "", version).split("."))


def test_the_lowest_versions_are_those_declared():
    assert pinned("constraints-lowest.txt") == declared()


def test_the_tested_versions_are_allowed():
    tested, lowest = pinned("constraints.txt"), declared()
    assert tested.keys() == lowest.keys()
    assert {name for name in lowest if tested[name] < lowest[name]} == set()


def test_hydra_is_one_whose_ways_are_known():
    """1.3 and 1.4; what 1.5 makes of today's warnings nobody knows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"hydra-core(.*?)"', text) == [">=1.3.8,<1.5"]


def test_one_place_asks_hydra_to_compose_and_to_build():
    """What its versions want differently stands there."""
    apart = re.compile(r"(?m)^from hydra.* import .*(instantiate|compose|initialize)|hydra\.main\(|version_base")
    files = [
        ROOT / "train.py",
        *(file for part in ("stu", "data", "experiments") for file in (ROOT / part).rglob("*.py")),
    ]
    found = {str(file.relative_to(ROOT)) for file in files if apart.search(file.read_text(encoding="utf-8"))}
    assert found == {"stu/cli/composition.py"}
