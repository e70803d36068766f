"""conf/tuned: what a preset sets for each model; the models of the board sweep=mini have equally many parameters."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import train
from stu.cli.arguments import expanded
from stu.cli.check import check
from stu.cli.composition import build
from stu.cli.usage import CONF, options_of
from stu.errors import OptionError
from tests.models import composed

TUNED = options_of("tuned")
BOARD, MODELS = (sorted({name.rpartition("/")[side] for name in TUNED}) for side in (0, 2))
WORDS = {name: (f"experiment={name.rpartition('/')[0]}", f"model={name.rpartition('/')[2]}") for name in TUNED}
BUDGET = 50_000  # parameters of each model
ONE_OF_EACH = {f"mini/{task}/{model}" for task, model in zip(["lds", "listops"] * len(MODELS), MODELS, strict=False)}


def test_every_preset_of_the_board_is_tuned_for_the_same_models():
    """A new model has its default sizes there until it has files, too."""
    assert [name for name in options_of("experiment") if name.startswith("mini/")] == BOARD
    assert len(BOARD) == 7
    assert len(MODELS) >= 11
    assert set(MODELS) <= set(options_of("model"))
    assert {f"{preset}/{model}" for preset in BOARD for model in MODELS} == set(TUNED)


def test_the_experiment_and_the_model_choose_together():
    chosen = composed("experiment=mini/lds", "model=s5")
    own = OmegaConf.load(CONF / "tuned" / "mini" / "lds" / "s5.yaml")
    assert chosen.model.d_model == own.model.d_model
    assert chosen.model.mixer.d_state == own.model.mixer.d_state
    assert chosen.optimizer.lr == own.optimizer.lr
    assert chosen.task == composed("experiment=mini/lds").task
    assert composed("model=s5").model.d_model != own.model.d_model
    assert composed("model=s5", "experiment=mini/lds") == chosen


@pytest.mark.parametrize("word", ["tuned=mini/lds/stu", "tuned=nope", "tuned=null", "+tuned=nope", "~tuned"])
def test_nobody_else_chooses(word: str):
    with pytest.raises(OptionError, match=r"^tuned=.*: cannot be chosen: experiment and model choose it"):
        expanded(word, swept=False)


def test_words_of_the_command_count_more():
    words = ("experiment=mini/lds", "model=s5", "model.d_model=7", "optimizer.lr=0.5")
    assert (composed(*words).model.d_model, composed(*words).optimizer.lr) == (7, 0.5)


def test_presets_and_models_that_are_not_tuned_compose_as_before():
    assert composed("experiment=quick", "model=s5").model.mixer.d_state == 256
    assert "tuned" not in composed("experiment=mini/lds")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ONE_OF_EACH else pytest.mark.thorough) for name in TUNED]
)
def test_the_models_of_the_board_have_equally_many_parameters(name: str):
    config = composed(*WORDS[name])
    check(config)
    _, network = train.task_and_model(config)
    build(config.optimizer)(network.named_parameters(), 1000)  # refuses groups that match nothing
    assert sum(p.numel() for p in network.backbone.parameters()) == pytest.approx(BUDGET, rel=0.07)


def test_a_file_sets_sizes_and_the_rate_alone():
    for name in TUNED:
        content = yaml.safe_load(Path(CONF, "tuned", f"{name}.yaml").read_text())
        assert set(content) == {"model", "optimizer"}, name
        assert {"d_model", "depth"} <= set(content["model"]) <= {"d_model", "depth", "mixer"}, name
        assert set(content["model"].get("mixer", {})) <= {"num_filters", "d_state"}, name
        assert set(content["optimizer"]) == {"lr"}, name
        assert content["optimizer"]["lr"] in (1e-3, 3e-3, 1e-2, 3e-2), name
