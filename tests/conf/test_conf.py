"""Every file under conf/ composes, passes the checks of the command line and builds what it names, in small sizes."""

import inspect
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import lightning as L
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

import train
from stu import Backbone, SequenceModel, Task
from stu.cli.check import calls, check
from stu.cli.composition import build
from stu.cli.usage import BY_OTHERS, CONF, PRESETS, options_of
from stu.training import SequenceData, StepPlan, Tracker
from stu.training.plan import make_trainer
from stu.training.run import LATER_KEYS
from tests import runs, sources
from tests.models import MODELS, TASKS, composed

OF_HYDRA = ("hydra/launcher", "hydra/sweeper")
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.name != "hydra" and options_of(folder.name))
GROUPS += OF_HYDRA
OPTIONS = [(group, option) for group in GROUPS if group not in BY_OTHERS for option in options_of(group)]
KINDS, THOROUGH = ("language", "lra_image", "lra_listops", "lra_retrieval", "own"), pytest.mark.thorough


def test_every_file_is_the_root_an_option_or_inherited_by_one():
    files = {path.relative_to(CONF) for path in CONF.rglob("*.y*ml")}
    options = {Path(group) / f"{option}.yaml" for group in GROUPS for option in options_of(group)}
    rest = files - options - {Path("config.yaml")}
    assert {path for path in rest if not path.name.startswith("_")} == set()
    for path in rest:
        siblings = [yaml.safe_load((CONF / option).read_text()) for option in options if option.parent == path.parent]
        assert any(path.stem in (sibling.get("defaults") or []) for sibling in siblings), f"{path} serves nobody"


@pytest.mark.parametrize(
    ("group", "option"), [pytest.param(*o, marks=[pytest.mark.slow] * (o[0] == "experiment")) for o in OPTIONS]
)
def test_every_option_composes_and_passes_the_checks(group: str, option: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = composed(f"{group}={option}", *([] if group in ("task", "experiment") else ["task=lds"]))
    check(config)  # rejects root keys that are no keys
    assert not OmegaConf.missing_keys(config)


# Options whose value in the yaml differs from the constructor's default, and why.
SETTLING = "a trajectory starts at its initial state unless it must first settle on its attractor"
TRANSFORMER = "the original architecture; the backbone's defaults are those of the state space models"
OFFICIAL = "as in the official models"
NOTHING = "the constructor's changes nothing, as runs of earlier versions have it"
DIFFERENT = {
    "adamw": {"optimizer.groups": "each model adds its own"},
    "chebyshev": {"precondition.degree": NOTHING},
    "legendre": dict.fromkeys(("precondition.polynomial", "precondition.degree"), NOTHING),
    "gated_deltanet": dict.fromkeys(("model.norm", "model.final_norm", "model.channel_residual"), OFFICIAL),
    "lorenz63": {"task.data.transient": SETTLING},
    "lorenz96": {"task.data.transient": SETTLING},
    "lru": {"model.mixer.max_phase": "2π to ten digits, as written in the configurations of earlier runs"},
    "mamba2": dict.fromkeys(("model.norm", "model.final_norm"), OFFICIAL),
    "mamba2_attention": {
        **dict.fromkeys(("model.norm", "model.final_norm"), OFFICIAL),
        "model.mixer[3].positions": OFFICIAL,
    },
    **{name: {"pretrain.objective": "what the option is for"} for name in ("masked", "next")},
    "mega": dict.fromkeys(
        ("model.norm", "model.prenorm", "model.channel_residual", "model.channel_mixer.expand"), OFFICIAL
    ),
    "s4": {"model.channel_mixer.gelu": "as in the official code"},
    "s4d": {"model.channel_mixer.gelu": "as in the official code"},
    "s4d_dfout": {
        "model.channel_mixer.gelu": "as in the official code",
        "model.mixer.init": "what it is",
    },
    "stu_ar": dict.fromkeys(("model.mixer.two_sided", "model.mixer.k_y", "model.mixer.recurrence"), "the AR-STU"),
    "stu_attention": dict.fromkeys(
        (
            "model.norm",
            "model.final_norm",
            "model.channel_residual",
            "model.mixer[1].window",
            "model.mixer[1].positions",
        ),
        "as in Flash STU",
    ),
    "transformer": dict.fromkeys(
        ("model.norm", "model.final_norm", "model.channel_residual", "model.positions"), TRANSFORMER
    ),
    "van_der_pol": {"task.data.transient": SETTLING},
}


@pytest.mark.parametrize(
    ("group", "option"), [("trainer", "auto"), *((g, o) for g, o in OPTIONS if g not in (*PRESETS, *OF_HYDRA))]
)
def test_a_default_is_the_same_in_yaml_and_python(group: str, option: str, monkeypatch: pytest.MonkeyPatch):
    """An option is equal to the default of the constructor, or is required there, or differs for a reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = composed(f"{group}={option}", *([] if group == "task" else ["task=lds"]))
    own = [group, *(("loader", "checkpoints", "figures", "generate") if group == "trainer" else ())]
    different = set()
    for key, node in calls({name: OmegaConf.to_container(config, resolve=True)[name] for name in own}):
        target = resolve_name(node["_target_"])
        if target is L.Trainer:
            continue  # not ours to change
        for name, parameter in inspect.signature(target).parameters.items():
            written = OmegaConf.select(config, key)
            if name not in node or parameter.default is parameter.empty or OmegaConf.is_interpolation(written, name):
                continue
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            if default != node[name] and not (isinstance(node[name], dict) and "_target_" in node[name]):
                different.add(f"{key}.{name}")
    assert different == set(DIFFERENT.get(option, ()))


def small_pair(model: str, task: str) -> DictConfig:
    """A model for a task: as composed for the first of each, for all others made of these, which is much faster."""
    if model == "stu" or task == "lds":
        return composed(*runs.small(f"task={task}", f"model={model}"))
    config = small_pair("stu", task).copy()
    config.model = small_pair(model, "lds").model  # refers to the task, whichever it is
    return config


@pytest.mark.parametrize(
    ("model", "task"),
    [
        pytest.param(
            model,
            task,
            marks=() if model == "stu" or task == "lds" else pytest.mark.slow if task in KINDS else THOROUGH,
        )
        for model in MODELS
        for task in TASKS
    ],
)
def test_every_model_is_built_for_every_task(model: str, task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("STU_DATA", str(tmp_path))
    config = small_pair(model, task)
    told = sources.overrides(task, tmp_path.parent) if task in sources.COLUMNS else []  # the data say what the task is
    for override in told:
        OmegaConf.update(config, *override.split("=", 1))
    built, network = train.task_and_model(config)
    assert isinstance(built, Task)
    assert isinstance(network, SequenceModel)
    assert isinstance(network.backbone, Backbone)
    assert built.seq_len == config.task.seq_len
    assert built.monitor in {"loss", *built.metrics()}
    assert told or not list(tmp_path.iterdir())  # building a task makes no data


def test_the_seed_alone_draws_a_model():
    def weights(*overrides: str) -> list[torch.Tensor]:
        _, network = train.task_and_model(composed(*runs.small("task=lds", "model=stu", *overrides)))
        return list(network.parameters())

    torch.manual_seed(1)
    first = weights()
    torch.manual_seed(2)
    assert all(map(torch.equal, first, weights()))
    assert not all(map(torch.equal, first, weights("seed=1")))


@pytest.mark.parametrize("option", options_of("trainer"))
def test_every_trainer_is_one(option: str, tmp_path: Path):
    node = composed("task=lds", f"trainer={option}", "trainer.accelerator=cpu").trainer
    trainer = make_trainer(build(node, _partial_=True, devices=1), logger=False, default_root_dir=tmp_path)
    assert isinstance(trainer, L.Trainer)


def test_later_options_are_those_of_the_yaml():
    for key in LATER_KEYS:
        assert OmegaConf.select(composed("task=lds"), key) is not None


@pytest.mark.parametrize("option", options_of("optimizer"))
def test_every_optimizer_is_made_from_parameters_and_a_budget(option: str):
    make = build(composed("task=lds", f"optimizer={option}").optimizer)
    parameters = [("w", torch.nn.Parameter(torch.ones(2)))]
    optimizer, schedule = make(parameters, 100).build(parameters)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert schedule.optimizer is optimizer


@pytest.mark.parametrize("option", options_of("logger"))
def test_every_logger_is_made(option: str, monkeypatch: pytest.MonkeyPatch):
    stands_in = ModuleType("trackio")  # whether it is installed or not
    stands_in.__spec__ = ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", stands_in)
    made = [build(node) for node in composed("task=lds", f"logger={option}").logger.values()]
    assert [isinstance(logger, Tracker) for logger in made] == [True] * (option != "csv")


def test_a_logger_of_a_library_is_a_node():
    """Also one whose annotations are names that its module imports for checkers of types alone."""
    check(composed("task=lds", "logger=csv", "+logger.mine={_target_: lightning.pytorch.loggers.WandbLogger}"))


def test_the_nodes_of_the_root_are_calls():
    config = composed("task=lds")
    loader = build(config.loader, _partial_=True)
    assert isinstance(loader, partial)
    task = build(config.task)
    data = loader(task, task.datasets(), StepPlan(1, 1, 1, 1), seed=config.seed)
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
