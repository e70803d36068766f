"""Workspaces of Weights & Biases: what they show, by the names that runs log; saved on a server of our own."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from experiments.compare.runs import read
from experiments.compare.wandb import main
from stu.files import sealed
from tests.experiments.test_compare import make_run
from tests.wandb_server import Kept, serving

# wandb-workspaces 0.4 is written for both versions of pydantic
pytestmark = pytest.mark.filterwarnings("ignore:(Pydantic V1 style|.*is deprecated).*:DeprecationWarning")
KEY = "0" * 40


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """None; wandb forgets what it knew before and after."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def a_run(home: Path, where: str, test: float, **options: Any) -> None:
    """A finished run, with these options of `optimizer`."""
    run = make_run(home, where, test=test)
    manifest = run.read_manifest()
    manifest["settings"]["optimizer"] = options
    run.manifest.write_text(sealed(manifest))


@pytest.mark.parametrize(
    "logger", [{"mode": "auto", "tags": ["mine", "b"]}, {"wandb": {"tags": ["mine", "b"]}, "tensorboard": {"x": None}}]
)
def test_a_row_has_the_tags_of_its_logger(tmp_path: Path, logger: dict[str, Any]):
    """Of which there was one in earlier versions."""
    run = make_run(tmp_path)
    run.config.write_text(json.dumps({"logger": logger}))
    assert read(run.path).tags == ("mine", "b")


def specs(home: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json", str(home / "spec.json")]) == 0
    content: list[dict[str, Any]] = json.loads((home / "spec.json").read_text())
    return content


def sections(spec: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Of each section the panels of each kind."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for section in spec["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            found.setdefault(section["name"], {}).setdefault(panel["viewType"], []).append(panel["config"])
    return found


def runset(spec: dict[str, Any]) -> dict[str, Any]:
    [only] = spec["spec"]["section"]["runSets"]
    return dict(only)


def axes(panels: dict[str, list[dict[str, Any]]]) -> list[tuple[str, bool]]:
    [plot] = panels["Parallel Coordinates Plot"]
    return [(column["accessor"], column["log"]) for column in plot["columns"]]


def test_a_task_is_one_workspace_grouped_by_model(tmp_path: Path):
    a_run(tmp_path, "lds/stu/a", 0.1, lr=0.1, betas=[0.9, 0.99], schedule="cosine")
    a_run(tmp_path, "lds/stu/b", 0.2, lr=0.001, betas=[0.9, 0.999], schedule="cosine")
    a_run(tmp_path, "lds/s4/b", 0.2, lr=0.01, betas=[0.9, 0.99], schedule="linear")  # another model may have others
    a_run(tmp_path, "lds/s4/c", 0.2, lr=0.02, betas=[0.9, 0.99], schedule="linear")
    [spec] = specs(tmp_path, str(tmp_path), "--entity", "me", "--project", "p", "--sweep", "lr")
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("me", "p", "p")
    runs = runset(spec)
    assert [(one["key"], one["op"], one["value"]) for one in runs["filters"]["filters"]] == [
        ({"section": "config", "name": "task"}, "IN", ["lds"]),
        ({"section": "run", "name": "group"}, "=", "lr"),
    ]
    assert runs["grouping"] == [{"section": "config", "name": "model.value"}]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "test/mse"}, "ascending": True}]
    assert list(runs["runFeed"]["columnPinned"])[:3] == ["run:displayName", "summary:test/mse", "summary:best/val/mse"]
    [(name, panels)] = sections(spec).items()
    assert name == "lds"
    bars = [(one["metrics"], one["groupBy"], one["groupArea"]) for one in panels["Bar Chart"]]
    shown = ("test/mse", "tokens_per_second", "peak_memory")
    assert bars == [([metric], "model.value", "stddev") for metric in shown]
    curves = [(one["xAxis"], one["metrics"], one["groupAgg"]) for one in panels["Run History Line Plot"]]
    assert curves == [("trainer/global_step", [metric], "mean") for metric in ("val/mse", "train/mse")]
    points = [(one["xAxis"], one["yAxis"], one["xAxisLogScale"]) for one in panels["Scatter Plot"]]
    assert points == [(f"summary:{key}", "summary:test/mse", True) for key in ("parameters", "seconds")]
    assert axes(panels) == [
        ("config:model.value", False),
        ("config:settings.value.optimizer.lr", True),  # of most values
        ("config:settings.value.optimizer.betas", False),
        ("summary:test/mse", False),
    ]
    assert [one["targetKey"] for one in panels["Parameter Importance"]] == ["test/mse"]


def test_of_several_tasks_each_is_a_section_and_a_workspace_of_its_own(tmp_path: Path):
    a_run(tmp_path, "lds/stu/a", 0.1)
    a_run(tmp_path, "lra_listops/stu/a", 0.5)
    every, lds, listops = specs(tmp_path, str(tmp_path), "--name", "mine")
    assert [one["displayName"] for one in (every, lds, listops)] == ["mine", "mine: lds", "mine: lra_listops"]
    assert [list(sections(one)) for one in (every, lds)] == [["lds", "lra_listops"], ["lds"]]
    assert [key["name"] for key in runset(every)["grouping"]] == ["task.value", "model.value"]
    assert "groupBy" not in sections(every)["lds"]["Bar Chart"][0]  # or runs of both tasks would be one bar
    assert runset(listops)["sort"]["keys"][0]["ascending"] is False  # accuracy
    assert len(specs(tmp_path, str(tmp_path), "--tasks", "lds")) == 1


def test_tasks_are_known_without_runs(tmp_path: Path):
    [spec] = specs(tmp_path, "--tasks", "lds")
    assert sections(spec)["lds"]["Bar Chart"][0]["metrics"] == ["test/mse"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--entity", "me"], "--entity=me: no login at W&B: `wandb login`, or --json FILE with folders of runs or"),
        (["--json", "x.json"], "--entity=None: no login at W&B: "),
        (["nowhere", "--json", "x.json"], "folder=nowhere: no such folder"),
        ([".", "--json", "x.json"], "folder=.: has no runs that say their task"),
        (["runs", "--json", "x.json", "--tasks", "mqar"], "--tasks=mqar: runs has no runs of it; choose of lds"),
        (["--json", "x.json", "--tasks", "ld"], "--tasks=ld: no such task; choose of adding, "),
        (["--json", "x.json", "--tasks", "own"], "--tasks own: source=None: must be a file, a folder, or owner/name"),
        (["runs", "--json", "no/x.json"], "no/x.json: No such file or directory"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    account: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
):
    if "runs" in arguments:
        a_run(tmp_path / "runs", "lds/stu/a", 0.1)
    account.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[: len(line) + 7]) == ("", 1, f"error: {line}")


def test_without_the_package_a_line_says_how_to_get_it(account: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    account.setitem(sys.modules, "wandb_workspaces", None)
    account.delitem(sys.modules, "wandb_workspaces.workspaces", raising=False)
    assert main(["--tasks", "lds"]) == 2
    needed = 'error: wandb_workspaces is not installed: pip install -e ".[workspace]"\n'
    assert capsys.readouterr() == ("", needed)


def test_the_project_says_what_there_is_and_takes_the_workspaces(
    account: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    about = {"task": "lds", "model": "stu", "monitor": "mse", "mode": "min"}
    with serving() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        account.setenv("WANDB_API_KEY", KEY)
        for lr in (0.1, 0.001):
            server.runs[f"lr{lr}"] = Kept(config=about | {"settings": {"optimizer": {"lr": lr}}})
        server.runs["other"] = Kept(config={"of": "another project's code"})
        assert main(["--project", "p"]) == 0
        [view] = server.views
        named = {"entityName": "e", "projectName": "p", "displayName": "p", "type": "project-view"}
        assert {key: view[key] for key in named} == named
        [panels] = sections({"spec": json.loads(view["spec"])}).values()
        assert axes(panels)[1] == ("config:settings.value.optimizer.lr", True)
        out, err = capsys.readouterr()
        assert (out, err) == (f"{server.url}/e/p?nw={view['name'].removeprefix('nw-').removesuffix('-v')}\n", "")
        server.fault, server.failing = "403", True
        assert main([]) == 2
        assert capsys.readouterr().err.startswith("error: W&B: ")
