"""What the README says is tried: its Python, its commands and its one-line error."""

import re
import shlex

import pytest
import torch
from hydra.utils import instantiate

from conf import cli
from conf.usage import EXAMPLES
from stu.errors import OptionError
from stu.ops.filters import spectral_filters
from tests.models import MODELS, composed
from tests.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python train\.py ([^`\n#]+?)(?:`| {2,}|\n)", README + EXAMPLES + "\n")))


def test_its_python_runs():
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["filters"].shape == (4096, 24)
    assert names["y_t"].shape == (8, 128)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--" not in c and "num_filters=5000" not in c])
def test_its_commands_compose(command: str):
    sweep, *overrides = shlex.split(command) if command.startswith("-m ") else ("", *shlex.split(command))
    single = [override.split(",")[0] if sweep else override for override in overrides]
    cli.check(composed(*single))


def test_there_are_commands():
    assert len(COMMANDS) >= 4


def test_its_error_is_the_real_one():
    [line] = re.findall(r"^error: model\.mixer\.(.*)$", README, re.MULTILINE)
    with pytest.raises(OptionError) as refused:
        spectral_filters(2048, 5000)
    assert str(refused.value) == line


def cards() -> list[tuple[str, str, str]]:
    """Model, parameters and state (KiB) of every model in the README's table."""
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if "KiB" in line]
    return [
        card
        for models, _, parameters, _, state in rows
        for card in zip(
            re.findall(r"`(\w+)`", models),
            re.findall(r"\d[\d,]*\d", parameters),
            re.findall(r"([\d.]+) KiB", state),
            strict=True,
        )
    ]


def test_every_model_has_its_card():
    assert sorted(name for name, *_ in cards()) == sorted(MODELS)


@pytest.mark.parametrize(("model", "parameters", "state"), cards())
def test_cards_are_true(model: str, parameters: str, state: str):
    backbone = instantiate(composed(f"model={model}", "task=lra_listops").model)
    assert sum(p.numel() for p in backbone.parameters()) == int(parameters.replace(",", ""))
    causal = instantiate(composed(f"model={model}", "task=lds", "task.seq_len=2048").model)
    mixer = causal.blocks[0].mixer
    *_, remembered = mixer.prefill(torch.zeros(1, 1, 128)) if model == "transformer" else (mixer.initial_state(1),)
    size = sum(x.numel() * x.element_size() for x in remembered if isinstance(x, torch.Tensor))
    assert size / 1024 == pytest.approx(float(state), abs=0.5)


def test_every_file_it_names_exists():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
