"""Mixers at other lengths than those they were built for: resized, and built again."""

from operator import ne
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stu.backbone import Backbone
from stu.errors import OptionError
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from tests.mixers.test_contract import noise, stepped
from tests.models import MODELS, Case, mixer_cases, randomized, small_backbone

BUILT, LONG, D = 12, 29, 8
CASES = pytest.mark.parametrize("case", mixer_cases(), ids=str)
UNITS = pytest.mark.parametrize("unit", [STU, STUT])


@CASES
@torch.no_grad()
def test_a_resized_mixer_is_one_built_for_that_length(case: Case):
    """With filters computed again, the default, where it has filters of one length."""
    mixer, longer = case.random(seq_len=BUILT), case.build(seq_len=LONG).double().eval()
    if any(map(ne, *(map(Tensor.numel, layer.parameters()) for layer in (mixer, longer)))):  # learned for each distance
        with pytest.raises(OptionError, match="seq_len=12"), mixer.resized(LONG):
            pass
        return
    for parameter, own in zip(longer.parameters(), mixer.parameters(), strict=True):
        parameter.copy_(own)
    x = noise(2, LONG, D)
    with mixer.resized(LONG):
        assert_close(mixer(x), longer(x), rtol=0, atol=1e-11)
        if mixer.causal:
            assert_close(stepped(mixer, x, mixer.initial_state(2)), longer(x), rtol=0, atol=1e-9)
    short = mixer(x[:, :BUILT])
    with mixer.resized(BUILT - 3):  # which changes nothing
        assert torch.equal(mixer(x[:, :BUILT]), short)
    if hasattr(mixer, "seq_len"):
        with pytest.raises(OptionError, match="seq_len=12"):
            mixer(x)


@UNITS
@torch.no_grad()
def test_continued_filters_are_those_of_an_extended_layer(unit: type[STU] | type[STUT]):
    layer = randomized(unit(D, seq_len=BUILT, num_filters=6, extension="continued")).double()
    x = noise(2, LONG, D)
    with layer.resized(LONG):
        assert torch.equal(layer(x), layer.extended(LONG)(x))


@UNITS
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_truncated_filters_forget_what_is_further_away(unit: type[STU] | type[STUT], causal: bool):
    options = {"seq_len": BUILT, "num_filters": 6, "delay": 0, "extension": "truncated", "causal": causal}
    layer = randomized(unit(D, **options)).double()  # type: ignore[arg-type]
    first = torch.zeros(1, LONG, D).double()
    first[:, 0] = 1
    with layer.resized(LONG):
        ahead, back = layer(first), layer(first.flip(1)).flip(1)
        assert ahead[:, BUILT:].abs().max() < 1e-12
        assert back[:, BUILT:].abs().max() < 1e-12
        if causal:
            assert_close(stepped(layer, first, layer.initial_state(1)), ahead, rtol=0, atol=1e-12)
    assert_close(ahead[:, :BUILT], layer(first[:, :BUILT]), rtol=0, atol=1e-12)


def test_truncated_filters_are_no_sums():
    layer = STU(D, seq_len=BUILT, num_filters=6, extension="truncated", streaming="states")
    with layer.resized(LONG), pytest.raises(OptionError, match="streaming=states: cannot end filters"):
        layer.initial_state(1)


@UNITS
@torch.no_grad()
def test_waves_do_not_go_on(unit: type[STU] | type[STUT]):
    """Slepian filters have no exponentials that decay: refused when the layer is made, not when it is tested."""
    options: dict[str, Any] = {"seq_len": BUILT, "num_filters": 4, "hankel": "slepian"}
    line = "extension=continued: must be recomputed or truncated with hankel=slepian"
    with pytest.raises(OptionError, match=line):
        unit(D, **options, extension="continued")
    with pytest.raises(OptionError, match=line):
        unit(D, **options).extended(LONG)
    layer, x = randomized(unit(D, **options, extension="truncated")).double(), noise(1, LONG, D)
    short = layer(x[:, :BUILT])
    with layer.resized(LONG):
        assert_close(layer(x)[:, :BUILT], short, rtol=0, atol=1e-12)
        assert_close(stepped(layer, x, layer.initial_state(1)), layer(x), rtol=0, atol=1e-12)


@UNITS
def test_other_extensions_are_refused(unit: type[STU] | type[STUT]):
    with pytest.raises(OptionError, match="extension=mirrored: must be one of recomputed, continued, truncated"):
        unit(D, seq_len=BUILT, extension="mirrored")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_model_does_not_remember_that_it_was_resized(model: str):
    backbone = small_backbone(model, seq_len=BUILT, relative_bias="rotary")  # Mega's default ends
    saved = backbone.state_dict()
    with backbone.resized(LONG):
        pass
    assert all(map(torch.equal, saved.values(), backbone.state_dict().values()))


def test_learned_positions_end():
    def factory(d_model: int) -> STU:
        return STU(d_model, seq_len=BUILT, num_filters=2)

    backbone = Backbone(D, depth=1, mixer=factory, channel_mixer=None, positions="learned", seq_len=BUILT)
    with pytest.raises(OptionError, match="positions=learned: there are none beyond 12 steps"), backbone.resized(LONG):
        pass
    assert backbone.blocks[0].mixer.seq_len == BUILT
