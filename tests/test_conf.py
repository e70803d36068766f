"""Every file under conf/ composes, passes the checks of the command line and builds what it names, in small."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

import train
from conf.cli import CONF, check, options_of
from stu import Backbone, SequenceModel, Task
from stu.training import SequenceData
from tests import runs
from tests.models import composed

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and options_of(folder.name))
OPTIONS = [(group, option) for group in GROUPS for option in options_of(group)]
TASKS, MODELS = options_of("task"), options_of("model")


def test_every_file_is_the_root_an_option_or_inherited_by_one():
    files = {path.relative_to(CONF) for path in CONF.rglob("*.y*ml")}
    options = {Path(group) / f"{option}.yaml" for group, option in OPTIONS}
    rest = files - options - {Path("config.yaml")}
    assert {path for path in rest if not path.name.startswith("_")} == set()
    for path in rest:
        siblings = [yaml.safe_load((CONF / option).read_text()) for option in options if option.parent == path.parent]
        assert any(path.stem in (sibling.get("defaults") or []) for sibling in siblings), f"{path} serves nobody"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_passes_the_checks(group: str, option: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = composed(f"{group}={option}", *([] if group in ("task", "experiment") else ["task=lds"]))
    check(config)  # rejects root keys that are no keys
    assert not OmegaConf.missing_keys(config)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_built_for_every_task(model: str, task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("STU_DATA", str(tmp_path))
    config = composed(*runs.small(f"task={task}", f"model={model}"))
    built, network = train.build(config)
    assert isinstance(built, Task)
    assert isinstance(network, SequenceModel)
    assert isinstance(network.backbone, Backbone)
    assert built.seq_len == config.task.seq_len
    assert built.monitor in {"loss", *built.metrics()}
    assert not list(tmp_path.iterdir())  # building a task makes no data


def test_the_seed_alone_draws_a_model():
    def weights(*overrides: str) -> list[torch.Tensor]:
        _, network = train.build(composed(*runs.small("task=lds", "model=stu", *overrides)))
        return list(network.parameters())

    torch.manual_seed(1)
    first = weights()
    torch.manual_seed(2)
    assert all(map(torch.equal, first, weights()))
    assert not all(map(torch.equal, first, weights("seed=1")))


@pytest.mark.parametrize("option", options_of("trainer"))
def test_every_trainer_is_one(option: str, tmp_path: Path):
    node = composed("task=lds", f"trainer={option}", "trainer.accelerator=cpu").trainer
    trainer = instantiate(node, devices=1, logger=False, default_root_dir=tmp_path, max_epochs=1)
    assert isinstance(trainer, L.Trainer)


@pytest.mark.parametrize("option", options_of("optimizer"))
def test_every_optimizer_is_made_from_parameters_and_a_budget(option: str):
    make = instantiate(composed("task=lds", f"optimizer={option}").optimizer)
    optimizer, schedule = make([("w", torch.nn.Parameter(torch.ones(2)))], 100)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert schedule.optimizer is optimizer


@pytest.mark.parametrize("option", options_of("logger"))
def test_every_logger_takes_what_a_run_tells_it(option: str, tmp_path: Path):
    make = instantiate(composed("task=lds", f"logger={option}", "logger.mode=disabled").logger)
    assert make(directory=tmp_path, run_id="a", name="b", group="c", default_tags=["d"]) is None


def test_the_nodes_of_the_root_are_calls():
    config = composed("task=lds")
    loader = instantiate(config.loader, _partial_=True)
    assert isinstance(loader, partial)
    data = loader(instantiate(config.task), seed=config.seed)
    assert isinstance(data, SequenceData)
    assert data.batch_size == config.loader.batch_size


def test_where_things_lie_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STU_RUNS", raising=False)
    monkeypatch.delenv("STU_DATA", raising=False)
    fresh = composed("task=lds", "seed=91").paths
    assert (fresh.runs, fresh.data) == ("runs", "~/.cache/stu")
    monkeypatch.setenv("STU_RUNS", "/elsewhere")
    monkeypatch.setenv("STU_DATA", "/there")
    moved = composed("task=lra_listops", "seed=92")
    assert (moved.paths.runs, moved.task.data.dir) == ("/elsewhere", "/there")
