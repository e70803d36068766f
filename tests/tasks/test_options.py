"""Every option of every task, with values that make no sense: refused by its name, or harmless, and at once."""

import math
import re
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from data.systems import dynamics
from stu import resources
from stu.cli.check import calls, check_call
from stu.cli.composition import build
from stu.cli.usage import CONF, at_home, options_of
from stu.errors import OptionError
from tests import runs, sources
from tests.models import composed

SECONDS = 20
INTEGERS = (-1, 0, 10**12, 10**30)
REALS = (math.nan, -1.0, 0.0, math.inf, 1e300)
LISTS: tuple[list[Any], ...] = ([], [0], [-1], [1, 1], [100], [10**12], [None], [[1]], [math.nan])
OTHERS = (None, "abc", 1.5)


@cache
def written(name: str) -> dict[str, Any]:
    """The configuration of a task, unresolved."""
    folder = "${oc.env:STU_DATA}"
    return {
        "task": yaml.safe_load((CONF / f"task/{name}.yaml").read_text("utf-8")),
        "paths": {"data": folder, "runs": folder},
    }


def options(node: Mapping[str, Any], key: str) -> Iterator[tuple[tuple[str, str], str]]:
    """The options in a configuration, each as the class that has it and its name, and with its key."""
    for name, value in node.items():
        if name not in ("_target_", "data"):
            yield (node["_target_"], name), f"{key}.{name}"
        if isinstance(value, Mapping):
            yield from options(value, f"{key}.{name}")


def new_options() -> dict[str, list[str]]:
    """Task → the keys of those options that the classes of no other task before it have."""
    found: dict[str, list[str]] = {}
    known: set[tuple[str, str]] = set()
    for task in options_of("task"):
        all_of_it = dict(options(written(task)["task"], "task"))
        found[task] = [key for option, key in all_of_it.items() if option not in known]
        known |= set(all_of_it)
    return {task: keys for task, keys in found.items() if keys}


def wrong(value: Any) -> tuple[Any, ...]:
    """Values of the kind of `value`, and of others."""
    kinds = {bool: (), int: INTEGERS, float: REALS}
    return (*(LISTS if OmegaConf.is_list(value) else kinds.get(type(value), INTEGERS)), *OTHERS)


@pytest.fixture(autouse=True)
def _a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory", lambda: 2**34)


@pytest.mark.parametrize(("name", "keys"), new_options().items())
def test_an_option_is_refused_by_its_name_or_does_no_harm(
    name: str, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STU_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # some values are names of folders
    config = OmegaConf.create(written(name))
    at_once = name in sources.COLUMNS  # the data say what the task is
    told = sources.overrides(name, tmp_path.parent / f"{name}_source") if at_once else []
    for key in keys:
        for given in wrong(OmegaConf.select(config, key)):
            before = time.monotonic()
            line = refusal(name, {**dict(override.split("=", 1) for override in told), key: given})
            assert line is None or (key.rpartition(".")[2] in line and "\n" not in line), f"{key}={given}: {line}"
            assert time.monotonic() - before < SECONDS, f"{key}={given}"
    assert at_once or not list(tmp_path.iterdir()), "nothing is built"


def refusal(name: str, values: Mapping[str, Any]) -> str | None:
    """What is said of values of some keys; None where a task with its encoder is built."""
    config = OmegaConf.create(written(name))
    for key, value in values.items():
        OmegaConf.update(config, key, value, merge=False)
    plain = OmegaConf.to_container(config, resolve=True)
    try:
        for key, node in calls(plain):
            check_call(key, node)
        build(plain["task"]).encoder(64)
    except OptionError as error:
        return str(error)
    except InstantiationException as error:
        return str(error.__cause__) if isinstance(error.__cause__, OptionError) else f"\n{error}"
    return None


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("copying", {"data.train": 10**12}, "train=1000000000000: needs 7,450.6 GiB of memory; "),
        ("mqar", {"data.vocab_size": 10**11}, "vocab_size=100000000000: needs "),
        ("lds", {"seq_len": 10**12}, "seq_len=1000000000000: needs "),
        ("lds", {"data.d_state": 10**6}, "d_state=1000000: needs "),
        ("lra_listops", {"data.test": 10**12}, "test=1000000000000: needs "),
        (
            "lra_listops",
            {"data.max_length": 10**9, "seq_len": 10**9, "data.max_args": 1000},
            "max_length=1000000000: n",
        ),
        ("lra_text", {"seq_len": 10**12}, "seq_len=1000000000000: needs 7,450.6 GiB of memory"),
        ("lra_text", {"vocab_size": 10**11}, "vocab_size=100000000000: needs "),
        ("lra_pathfinder", {"data.val": 10**12}, r"val=1000000000000: needs [\d,]+.\d GiB on the disk"),
        ("lra_pathfinder", {"data.side": 10**6, "seq_len": 10**12}, "side=1000000: needs "),
        ("lra_pathfinder", {"data.margins": [100]}, r"margins=\[100\]: must be at most 48, to fit in"),
        ("lra_pathfinder", {"data.paddle_length": 100}, "paddle_length=100: must be below 50, to fit in"),
        (
            "lra_pathfinder",
            {"data.marker_radius": 1000},
            "marker_radius=1000: must be above 0 and at most half of side",
        ),
        ("lra_pathfinder", {"data.target_contrast": 1e39}, "target_contrast=1e.39: must be above 1/255"),
        ("lorenz63", {"data.transient": 1e12}, "transient=1000000000000.0: needs .* where dt=0.02; "),
        ("lorenz63", {"data.windows": 10**9}, "windows=1000000000: needs "),
        ("pendulum", {"data.force": 1.0, "data.hold": 10**12}, "hold=1000000000000: needs "),
        ("lorenz96", {"data.system.sites": 10**9}, "sites=1000000000: needs "),
        ("lorenz96", {"data.system": None}, "task.data.system=None: must be "),
    ],
    ids=str,
)
def test_what_is_too_large_is_said(
    name: str, values: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STU_DATA", str(tmp_path))
    assert re.match(problem, refusal(name, {f"task.{key}": value for key, value in values.items()}) or "accepted")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("pendulum", "dt=1e9"),
        ("pendulum", "system.gravity=1e300"),
        ("double_pendulum", "system.gravity=1e12"),
        ("lorenz63", "system.rho=1e200"),
        ("lorenz63", "system.sigma=-1000"),
        ("lorenz96", "system.forcing=1e6"),
        ("van_der_pol", "system.mu=-1e9"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_simulated_is_said_in_time(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dynamics, "EVALUATIONS", 1000)
    monkeypatch.setenv("STU_DATA", str(tmp_path))
    task = build(composed(*runs.small(f"task={name}", f"task.data.{option}")).task)
    with pytest.raises(
        OptionError, match=r"^dt=.*: .*: choose a shorter dt, weaker terms of the system, or a weaker f"
    ):
        task.prepare()
    assert not list(tmp_path.glob("*/*/"))


def test_memory_is_at_most_what_a_container_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    monkeypatch.setattr(resources, "LIMITS", (str(limit), str(tmp_path / "none")))
    all_of_it = resources.memory()
    limit.write_text(f"{all_of_it // 2}\n")
    assert resources.memory() == all_of_it // 2


def test_a_disk_is_measured_where_a_folder_will_be(tmp_path: Path):
    free = {"train": 5}
    resources.require_disk(1, free, tmp_path / "a/b", free=True)
    resources.require_disk(10**40, free, "x" * 5000, free=True)  # its maker says what is wrong with it
    with pytest.raises(OptionError, match=rf"train=5: needs 9e\+20 GiB on the disk of {tmp_path}; there are"):
        resources.require_disk(10**40, free, tmp_path / "a/b", free=True)


def test_a_home_directory_on_the_command_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = {
        "task.data.source=~/x": "task.data.source='/home/me/x'",
        "paths.data=~/a,~/b": "paths.data='/home/me/a','/home/me/b'",
        "a=~nobody-there/x": "a='~nobody-there/x'",
        "~seed": "~seed",
        "a='~/x'": "a='~/x'",
        "a=x~y": "a=x~y",
    }
    assert {word: at_home(word) for word in words} == words
