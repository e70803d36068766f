"""Rates and groups: number by number against a closed form, and as a real Trainer applies them."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from data.systems.lds import LDS, LDSData
from stu.backbone import SequenceModel
from stu.cli.composition import build
from stu.errors import OptionError
from stu.training.optim import adamw, learning_rate, warmup_steps
from tests.models import MODELS, composed, small_backbone
from tests.runs import Training

SCHEDULES = ("cosine", "linear", "rsqrt", "constant")


def closed_form(total: int, warmup: int, peak: float, floor: float, schedule: str) -> np.ndarray:
    """The rates of steps 0 … total, written down in another way than the code does."""
    steps = np.arange(total + 1)
    if schedule == "cosine":
        angle = np.clip((steps - warmup) / (total - warmup), 0, 1) * np.pi / 2
        decay = floor + (peak - floor) * np.cos(angle) ** 2
    elif schedule == "rsqrt":
        decay = np.maximum(floor, peak * np.sqrt(np.fmax(1, warmup) / np.fmax(1, steps)))
    else:
        decay = np.interp(steps, [warmup, total], [peak, floor if schedule == "linear" else peak])
    rise = np.interp(steps, [0, warmup], [floor, peak]) if warmup else decay
    return np.where(steps < warmup, rise, decay)


def test_rates_by_hand():
    linear = [learning_rate(step, 10, 2, 1.0, 0.0, "linear") for step in range(11)]
    assert linear == pytest.approx([0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0], abs=1e-15)
    cosine = [learning_rate(step, 5, 1, 3.0, 1.0, "cosine") for step in range(6)]
    assert cosine == pytest.approx([1, 3, 2 + math.sqrt(0.5), 2, 2 - math.sqrt(0.5), 1], abs=1e-14)
    assert [learning_rate(step, 5, 2, 4.0, 2.0, "constant") for step in range(6)] == [2, 3, 4, 4, 4, 4]
    assert [learning_rate(step, 9, 1, 1.0, 0.4, "rsqrt") for step in (0, 1, 4, 9)] == [0.4, 1, 0.5, 0.4]
    assert [learning_rate(step, 4, 0, 1.0, 0.0, "linear") for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (7, 1), (100, 10), (101, 100)])
def test_rates_are_the_closed_form(schedule: str, total: int, warmup: int):
    rates = [learning_rate(step, total, warmup, 3e-3, 1e-5, schedule) for step in range(total + 1)]
    np.testing.assert_allclose(rates, closed_form(total, warmup, 3e-3, 1e-5, schedule), rtol=1e-12)


@given(st.integers(2, 200), st.floats(0, 0.9), st.floats(1e-6, 1), st.floats(0, 1), st.sampled_from(SCHEDULES))
def test_rates_rise_once_and_then_never_again(total: int, share: float, peak: float, ratio: float, schedule: str):
    warmup, floor = warmup_steps(share, total), ratio * peak
    rates = np.array([learning_rate(step, total, warmup, peak, floor, schedule) for step in range(total + 1)])
    slack = 1e-12 * peak
    assert rates[warmup] == pytest.approx(peak)
    assert (np.diff(rates[: warmup + 1]) >= -slack).all()
    assert (np.diff(rates[warmup:]) <= slack).all()
    assert rates.min() >= floor - slack
    assert rates.max() <= peak + slack


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (0, 100, 0),
        (0.0, 100, 0),
        (0.1, 100, 10),
        (0.25, 10, 2),
        (0.999, 1000, 999),
        (1, 100, 1),
        (5, 100, 5),
        (5.0, 9, 5),
    ],
)
def test_warmup_is_a_share_below_one_and_steps_from_one_on(warmup: float, total: int, steps: int):
    assert warmup_steps(warmup, total) == steps


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("warmup", value) for value in (-0.1, 10, 11, math.nan)),
        *(("lr", value) for value in (0, -1, math.nan)),
        *(("min_lr", value) for value in (-1e-9, 1.1e-3, math.nan)),
        *(("weight_decay", value) for value in (-1e-9, math.nan)),
        ("betas", (0.9, 1.0)),
        ("eps", -1e-8),
        ("schedule", "cosin"),
    ],
)
def test_options_out_of_range_are_named(option: str, value: object):
    with pytest.raises(OptionError) as error:
        adamw(net().named_parameters(), 10, **{option: value})
    assert error.value.name == option
    assert error.value.value is value


def built(module: nn.Module, total_steps: int, make: Any = adamw, **options: object) -> Any:
    """Optimiser and schedule of a module."""
    return make(module.named_parameters(), total_steps, **options).build(module.named_parameters())


def net() -> nn.Module:
    """first.weight, first.bias, second.weight, second.bias."""
    parts = {"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)}
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def members(module: nn.Module, **options: object) -> dict[str, list[str]]:
    """Group → the names of its parameters."""
    optimizer, _ = built(module, 10, **options)
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {group["name"]: [names[p] for p in group["params"]] for group in optimizer.param_groups}


def test_the_first_match_wins_and_the_rest_is_default():
    groups = {"bias": {"match": r"bias$"}, "second": {"match": "^second"}}
    assert members(net(), groups=groups) == {
        "bias": ["first.bias", "second.bias"],
        "second": ["second.weight"],
        "default": ["first.weight"],
    }
    turned = dict(reversed(groups.items()))
    assert members(net(), groups=turned)["second"] == ["second.weight", "second.bias"]
    assert members(net(), groups=turned)["bias"] == ["first.bias"]


def test_no_default_group_where_nothing_is_left_for_it():
    assert members(net(), groups={"all": {"match": ""}}).keys() == {"all"}


@pytest.mark.parametrize(
    ("groups", "key"),
    [
        ({"a": {"match": "third"}}, "groups.a.match"),
        ({"all": {"match": "."}, "a": {"match": "bias"}}, "groups.a.match"),  # nothing is left by the group before
        ({"a": {"match": "["}}, "groups.a.match"),
        ({"a": {"match": 3}}, "groups.a.match"),
        ({"a": {"match": "bias", "decay": 0.1}}, "groups.a.decay"),
        ({"a": {"match": "bias", "lr": -1}}, "groups.a.lr"),
        ({"a": {"match": "bias", "lr_scale": "0.1"}}, "groups.a.lr_scale"),
        ({"a": {"match": "bias", "weight_decay": True}}, "groups.a.weight_decay"),
        ({"a": {"match": "bias", "lr": 1e-3, "lr_scale": 1}}, "groups.a"),
        ({"a": {"lr": 1e-3}}, "groups.a"),
        ({"a": "bias"}, "groups.a"),
        ({"default": {"match": "bias"}}, "groups.default"),
    ],
)
def test_a_group_that_cannot_work_is_named(groups: dict, key: str):
    with pytest.raises(OptionError) as error:
        adamw(net().named_parameters(), 10, groups=groups)
    assert error.value.name == key


def test_a_pattern_that_matches_nothing_says_what_names_look_like():
    with pytest.raises(OptionError, match=r"groups\.a\.match=third.*first\.weight"):
        adamw(net().named_parameters(), 10, groups={"a": {"match": "third"}})


def test_a_recipe_is_for_the_parameters_that_it_was_made_for():
    module = net()
    recipe = adamw(module.named_parameters(), 10, groups={"own": {"match": "first"}})
    renamed = ((f"module.{name}", parameter) for name, parameter in module.named_parameters())
    with pytest.raises(ValueError, match="parameters of other names: first"):
        recipe.build(renamed)
    for wrapped in ("_orig_mod.{}", "_fsdp_wrapped_module.{}", "_checkpoint_wrapped_module._orig_mod.{}"):
        named = ((wrapped.format(name), parameter) for name, parameter in module.named_parameters())
        groups = recipe.build(named)[0].param_groups
        assert [len(group["params"]) for group in groups] == [2, 2]


def test_weight_decay_and_rate_of_a_group_reach_its_parameters():
    """Without a gradient a step of AdamW is the decay alone: p ← p (1 − rate · decay)."""
    module = net()
    groups = {
        "own": {"match": "first.weight", "lr": 0.5, "weight_decay": 0.1},
        "scaled": {"match": "first.bias", "lr_scale": 0.25},
        "frozen": {"match": "second.bias", "lr_scale": 0},
    }
    optimizer, schedule = built(
        module, 10, lr=0.2, weight_decay=0.3, groups=groups, schedule="linear", warmup=0, min_lr=0.0
    )
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    factors = {
        "first.weight": (0.5, 0.1),
        "first.bias": (0.05, 0.3),
        "second.weight": (0.2, 0.3),
        "second.bias": (0, 0),
    }
    for name, parameter in module.named_parameters():
        rate, decay = factors[name]
        expected = before[name] * (1 - rate * decay) * (1 - 0.9 * rate * decay)  # the second rate is 9/10 of the first
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_every_model_is_in_exactly_one_group(model: str):
    optimizer = build(composed(f"model={model}", "task=lds").optimizer)
    backbone = small_backbone(model, seq_len=32)
    made, _ = built(backbone, 100, optimizer)
    grouped = [parameter for group in made.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, backbone.parameters()))


def test_official_settings_of_the_autoregressive_stu():
    """google-deepmind/spectral_ssm: M^y learns ten times slower than the rest and does not decay."""
    optimizer = build(composed("model=stu_ar", "task=lds").optimizer)
    backbone = small_backbone("stu_ar", seq_len=32)
    made, _ = built(backbone, 100, optimizer)
    m_y, default = made.param_groups
    assert (m_y["name"], default["name"]) == ("m_y", "default")
    assert {id(p) for p in m_y["params"]} == {id(block.mixer.m_y) for block in backbone.blocks}
    assert m_y["initial_lr"] == pytest.approx(0.1 * default["initial_lr"])
    assert (m_y["weight_decay"], default["weight_decay"]) == (0.0, 0.05)


class Rates(L.Callback):
    """The rates with which each optimiser step is really made."""

    def __init__(self) -> None:
        self.used: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
        self.used.append({group["name"]: group["lr"] for group in optimizer.param_groups})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_real_trainer_steps_by_the_formula(tmp_path: Path, schedule: str, accumulate: int):
    task = LDS(seq_len=4, causal=True, data=LDSData(seq_len=4, train=16, val=2, test=1))
    model = SequenceModel(task.encoder(4), small_backbone("transformer", seq_len=4, d_model=4), task.head(4))
    groups = {"slow": {"match": "encoder", "lr_scale": 0.1}, "head": {"match": "head", "lr": 5e-3}}
    options = {"lr": 2e-3, "min_lr": 1e-4, "warmup": 0.25, "schedule": schedule, "groups": groups}
    rates = Rates()
    training = Training(
        tmp_path,
        task,
        model,
        optimizer=partial(adamw, **options),
        batch_size=2,
        max_epochs=1.5,
        accumulate_grad_batches=accumulate,
        callbacks=[rates],
    ).fit()
    assert training.plan.total_steps == len(rates.used) == training.trainer.global_step == 12
    for name, peak in (("slow", 2e-4), ("head", 5e-3), ("default", 2e-3)):
        expected = closed_form(12, 3, peak, 1e-4, schedule)[:12]
        np.testing.assert_allclose([used[name] for used in rates.used], expected, rtol=1e-12)
        logged = training.rows(f"lr/{name}")
        assert list(logged) == list(range(1, 13))
        np.testing.assert_allclose(list(logged.values()), expected, rtol=1e-12)  # the row of step n: of the n-th step
