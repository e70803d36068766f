"""Layers by name: the configuration, the model and the optimiser that they make, and what is no layer."""

import re

import pytest
import torch
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf

from stu.cli.check import Refused, check
from stu.cli.composition import build
from stu.cli.layers import Loader, name_of
from stu.cli.usage import CONF
from tests import runs
from tests.models import composed, model_config, randomized


def plain(*overrides: str) -> dict:
    return OmegaConf.to_container(composed("task=lds", *overrides), resolve=True)


def test_layers_are_the_mixers_of_their_own_files_with_their_own_options():
    config = plain(
        "model=stu", "model.layers=[stu,stu,attention]", "model.mixers.attention.window=64", "model.norm=rms"
    )
    stu, attention = plain("model=stu")["model"], plain("model=transformer", "model.positions=none")["model"]
    expected = [stu["mixer"], stu["mixer"], attention["mixer"] | {"window": 64}]
    assert config["model"] == stu | {"mixer": expected, "norm": "rms"}  # neither layers nor mixers is left
    check(composed("task=lds", "model=stu", "model.layers=[stu,stu,attention]"))


def test_options_of_the_model_are_those_of_its_layer():
    config = plain("model=stu", "model.layers=[attention,stu]", "model.mixer.num_filters=7", "model.positions=rotary")
    assert config["model"]["mixer"][1]["num_filters"] == 7
    assert config["model"]["mixer"][0]["positions"] == "rotary"  # attention alone has them


def test_a_preset_can_have_other_layers():
    layers = plain("model=stu_attention", "model.layers=[lru,s5]")["model"]["mixer"]
    assert layers == [plain(f"model={name}")["model"]["mixer"] for name in ("lru", "s5")]
    changed = plain("model=stu_attention", "model.mixer.num_filters=5", "model.mixers.attention.window=9")["model"]
    assert [node.get("num_filters", node.get("window")) for node in changed["mixer"]] == [5, 9]


@pytest.mark.parametrize(("first", "second"), [("lru", "s5"), ("s4", "mamba2")])
def test_a_parameter_is_in_a_group_of_its_own_model(first: str, second: str):
    """Both models call theirs by the same names, or their patterns match parameters of the other."""
    hybrid = composed("task=lds", "model=gru", f"model.layers=[{first},{second}]")
    for block, name in enumerate((first, second, first, second)):
        alone = composed("task=lds", f"model={name}").optimizer.groups
        for parameter, _ in build(model_config(name, seq_len=16, depth=1)).named_parameters():
            here = f"backbone.{parameter}".replace("blocks.0", f"blocks.{block}")
            found, expected = (
                [
                    OmegaConf.to_container(group) | {"match": ""}
                    for group in groups.values()
                    if re.search(group.match, here)
                ]
                for groups in (hybrid.optimizer.groups, alone)
            )
            assert found == expected, here


def test_groups_that_are_given_change_those_of_the_layers():
    options = ("model.layers=[s4,mamba2]", "+optimizer.groups.mamba2_ssm.weight_decay=0.5", "model.depth=3")
    groups = plain("model=stu", *options, "+optimizer.groups.mine={match: head, lr: 1}")["optimizer"]["groups"]
    assert list(groups) == ["ssm", "mamba2_ssm", "mine"]
    assert groups["ssm"]["match"].startswith(r"blocks\.(0|2)\.")
    assert groups["mamba2_ssm"]["weight_decay"] == 0.5
    assert list(plain("model=mamba2", "model.layers=[stu,attention]")["optimizer"]["groups"]) == []
    shallow = plain("model=stu", "model.layers=[stu,attention,s4]", "model.depth=2")
    assert shallow["optimizer"]["groups"] == {}  # there is no block of s4


def test_every_way_to_a_configuration_lays_layers_out():
    """Hydra 1.4 composes that of a command without `load_configuration`."""
    loader = Loader(create_config_search_path(str(CONF)))
    words, known = (
        ["model=stu", "model.layers=[stu,attention]", "model.mixers.attention.window=3"],
        {"config_name": "config"},
    )
    found = [
        loader.load_configuration(**known, overrides=words, run_mode=RunMode.RUN),
        loader._load_configuration_impl(**known, overrides=words, run_mode=RunMode.RUN, from_shell=True),
    ]
    assert [config.hydra.runtime.choices.model for config in found] == ["stu-stu+attention"] * 2
    assert [len(config.model.mixer) for config in found] == [2, 2]
    assert found[0].hydra.overrides.task == words


def test_a_hybrid_is_no_hybrid_without_layers():
    with pytest.raises(
        Refused, match=r"model.layers=null: must be a list of names, as model=stu_attention is a hybrid"
    ):
        composed("task=lds", "model=stu_attention", "model.layers=null")


def test_a_model_with_other_layers_has_a_name_of_its_own():
    assert name_of("s4", ["stu", "stu", "attention"]) == "s4-stux2+attention"
    long = [name_of("s4", ["stu", "attention"] * count + ["lru"]) for count in (20, 21)]
    assert long[0][:88] == long[1][:88]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 100


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("model.layers=[stuu]", "model.layers=stuu: no such layer; did you mean stu? choose from"),
        ("model.layers=stu", "model.layers=stu: must be a list of names"),
        ("model.layers=[]", "model.layers=[]: must be a list of names"),
        ("model.layers=[stu,3]", "must be a list of names"),
        ("model.layers=[stu_attention]", "model.layers=stu_attention: no such layer"),
        ("model.mixers.stu.k_u=1", "model.mixers={'stu': {'k_u': 1}}: must have options of model.layers"),
        ("model.layers=[stu] model.mixers=3", "model.mixers=3: must have options of model.layers"),
        (
            "model.layers=[stu] model.mixers.s4.d_state=2",
            "model.mixers.s4={'d_state': 2}: is none of model.layers=[stu]",
        ),
        ("model.layers=[stu] model.mixers.stu.k_uu=2", "model.mixers.stu.k_uu=2: no such key; did you mean k_u?"),
        ("model.layers=[stu] model.mixers.stu=2", "model.mixers.stu=2: must have options: seq_len, causal"),
        ("model.layers=[s4] model.mixer.k_u=2", "model.mixer.k_u=2: is of a mixer that is none of the layers s4"),
        ("model.layers=[stu,s4] +optimizer.groups.ssm=3", "optimizer.groups.ssm=3: must have options"),
        ("model.layers=[stu,attention] model.mixers.attention.window=x", "model.mixer[1].window=x: must be an integer"),
    ],
)
def test_what_is_no_layer_is_refused_in_one_line(given: str, line: str):
    with pytest.raises(Refused) as caught:
        check(composed("task=lds", "model=stu", *given.split()))
    assert line in str(caught.value)


def test_a_hybrid_streams_as_it_computes_all_at_once():
    config = composed(
        "task=lds", "task.seq_len=24", "model=mamba2", "model.layers=[mamba2,attention,stu,lstm]", "model.d_model=8",
        "model.mixers.attention.positions=rotary", "model.mixers.attention.window=5", "model.mixers.stu.num_filters=6",
    )  # fmt: skip
    backbone = randomized(build(config.model)).double().eval()
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    y, state = backbone.prefill(x[:, :10])
    steps = [y]
    for t in range(10, 24):
        y_t, state = backbone.step(x[:, t], state)
        steps.append(y_t.unsqueeze(1))
    torch.testing.assert_close(torch.cat(steps, 1), backbone(x), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_hybrid_is_trained_resumed_and_tested_by_its_plain_configuration(tmp_path):
    words = runs.small("task=lds", "model=stu", "model.layers=[stu,attention]", "model.depth=2", "name=x")
    assert runs.train(tmp_path, *words, "trainer.max_epochs=1").code == 0
    run = runs.run_of(tmp_path, "lds", "stu-stu+attention", "x")
    assert [node["_target_"] for node in run.settings["model"]["mixer"]] == [
        "stu.STU",
        "stu.mixers.attention.Attention",
    ]
    assert not {"layers", "mixers"} & set(run.settings["model"])
    other = runs.train(tmp_path, *words, "trainer.max_epochs=1", "model.mixers.attention.window=3")
    assert other.code == 2
    assert "model.mixer.1.window (None → 3)" in other.err
