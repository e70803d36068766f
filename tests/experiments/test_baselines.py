"""The literal forms of experiments.speed.literal against the layers they hold; and the command that times both."""

import json

import pytest
import torch
from torch.testing import assert_close

from experiments.speed import baselines
from experiments.speed.baselines import main
from experiments.speed.literal import LITERAL
from tests.models import build, composed, model_config, randomized

D = 6
SIZES = {
    "d_model": D,
    "expand": 2,
    "d_state": 8,
    "num_blocks": 2,
    "num_heads": 4,
    "num_groups": 2,
    "chunk_size": 5,
    "n_ssm": 2,
}


def layer_of(model, length):
    """A small layer of conf/model, its parameters far from their initial values."""
    return randomized(build(model_config(model, seq_len=length, **SIZES).mixer)(D), 0.05).double()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 5, 15, 40])
@pytest.mark.parametrize("model", LITERAL)
def test_the_literal_form_is_the_layer(model, length):
    layer = layer_of(model, length)
    other = LITERAL[model](layer, length)
    u = torch.randn(3, length, D, dtype=torch.float64, requires_grad=True)
    weight, inputs = torch.randn_like(u), [u]
    # The literal S4 learns C (1 − Ā^L) instead of C, so that the gradients of Ā differ as well.
    inputs += [layer.D] if model == "s4" else layer.parameters()
    assert_close(other(u), layer(u), rtol=1e-9, atol=1e-10)
    losses = ((form(u) * weight).sum() for form in (layer, other))
    grads = (torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True) for loss in losses)
    for ours, theirs in zip(*grads, strict=True):
        assert_close(theirs, ours, rtol=1e-8, atol=1e-9)


def test_the_literal_s4_learns_all_but_the_output_matrix_of_the_layer():
    form, u = LITERAL["s4"](layer_of("s4", 12), 12), torch.randn(2, 12, D, dtype=torch.float64)
    names, parameters = zip(*form.named_parameters(), strict=True)
    grads = torch.autograd.grad(form(u).square().sum(), parameters, allow_unused=True)
    assert [name for name, grad in zip(names, grads, strict=True) if grad is None] == ["layer.C"]


def test_both_forms_are_those_of_conf():
    """What is timed is the model of the file: its size of the state, its discretisation."""
    for model in LITERAL:
        name = model.replace("_", "")
        assert type(layer_of(model, 8)).__name__.lower() == name
        assert LITERAL[model].__name__.lower() == f"literal{name}"
    assert composed("model=s4", "task=lds").model.mixer.discretization == "bilinear"
    assert composed("model=s4d", "task=lds").model.mixer.discretization == "zoh"


@pytest.mark.slow
def test_the_command_times_all_and_writes_the_results(tmp_path, capsys):
    threads = torch.get_num_threads()
    main(["--lengths", "64", "128", "--batch", "1", "--width", "8", "--min-s", "1e-3", "--threads", "1",
          "--out", str(tmp_path)])  # fmt: skip
    torch.set_num_threads(threads)
    content = json.loads((tmp_path / baselines.FILE).read_text())
    assert [(row["model"], row["length"]) for row in content["rows"]] == [(m, n) for n in (64, 128) for m in LITERAL]
    assert content["command"].startswith("python -m experiments.speed.baselines --lengths 64")
    for row in content["rows"]:
        assert row["ratio"] == row["ours"]["median"] / row["literal"]["median"] > 0
        assert row["ours"]["count"] >= 2
    shown = capsys.readouterr().out
    assert all(model in shown for model in LITERAL)
    assert "L = 128, B = 1, D = 8" in shown
