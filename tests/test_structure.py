"""Loading parameters into a module of another function is refused; what was saved before that was checked is loaded."""

import copy
import io
from functools import partial

import pytest
import torch

from stu.backbone import Backbone
from stu.channel import GLU, HalfGLU
from stu.heads import PooledHead, StepHead, TwoTowerHead
from stu.mixers.attention import Attention
from stu.mixers.gated_deltanet import GatedDeltaNet
from stu.mixers.linoss import LinOSS
from stu.mixers.lru import LRU
from stu.mixers.mamba2 import Mamba2
from stu.mixers.mega import Mega
from stu.mixers.s4 import S4
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from stu.norm import BatchNorm
from stu.structure import KEY

D = 4
stu = partial(STU, D, seq_len=16, num_filters=4)
stu_t = partial(STUT, D, seq_len=16, num_filters=4)
selective = partial(Mamba2, D, d_state=4, num_heads=2)
averaging = partial(Mega, D, seq_len=9)
attention = partial(Attention, D, num_heads=2)
mixer = partial(STU, seq_len=16, num_filters=4)
backbone = partial(Backbone, D, depth=1, mixer=mixer, channel_mixer=GLU, seq_len=16)

# Modules whose parameters have the same names and shapes, but that compute something else, and what tells them apart.
PAIRS = {
    "delay": (stu, partial(stu, delay=0), "delay=0: what was saved is of delay=2"),
    "fixed recurrence": (stu, partial(stu, k_y=2), "recurrence=2: what was saved is of recurrence=0"),
    "length": (stu, partial(stu, seq_len=17), "seq_len=17: what was saved is of seq_len=16"),
    "Hankel kind": (partial(stu, two_sided=False), partial(stu, two_sided=False, hankel="L"), "hankel=L: what was"),
    "bandwidth": (partial(stu, hankel="slepian"), partial(stu, hankel="slepian", bandwidth=0.2), "bandwidth=0.2: what"),
    "branches": (partial(stu, two_sided=False), partial(stu, num_filters=2), "two_sided=True: what was"),
    "direction of one mixer": (partial(attention, causal=True), partial(attention, causal=False), "causal=False: what"),
    "STU-T, delay": (stu_t, partial(stu_t, delay=1), "delay=1: what was saved is of delay=0"),
    "STU-T, branches": (
        stu_t,
        partial(stu_t, num_filters=8, two_sided=False),
        "two_sided=False: what was saved is of two_sided=True",
    ),
    "S4, discretization": (
        partial(S4, D, d_state=4),
        partial(S4, D, d_state=4, discretization="zoh"),
        "discretization=zoh: what was saved is of discretization=bilinear",
    ),
    "S4D, discretization": (
        partial(S4D, D, d_state=4),
        partial(S4D, D, d_state=4, discretization="bilinear"),
        "discretization=bilinear: what was saved is of discretization=zoh",
    ),
    "S4D, time of the poles": (
        partial(S4D, D, d_state=4),
        partial(S4D, D, d_state=4, init="dfout"),
        "in_steps=True: what was saved is of in_steps=False",
    ),
    "S5, discretization": (
        partial(S5, D, d_state=4, num_blocks=1),
        partial(S5, D, d_state=4, num_blocks=1, discretization="bilinear"),
        "discretization=bilinear",
    ),
    "LinOSS, discretization": (
        partial(LinOSS, D, d_state=4),
        partial(LinOSS, D, d_state=4, discretization="imex"),
        "discretization=imex: what was saved is of discretization=im",
    ),
    "S5, conjugates": (
        partial(S5, D, d_state=4, num_blocks=1),
        partial(S5, D, d_state=2, num_blocks=1, conj_sym=False),
        "conj_sym=False",
    ),
    "S5, clipping": (
        partial(S5, D, d_state=4, num_blocks=1),
        partial(S5, D, d_state=4, num_blocks=1, clip_eigs=True),
        "clip_eigs=True",
    ),
    "Mamba-2, groups": (selective, partial(selective, d_state=2, num_groups=2), "num_groups=2"),
    "Mamba-2, limits of the time step": (selective, partial(selective, dt_limit=(0.0, 0.1)), "dt_limit="),
    "gated DeltaNet, eigenvalues": (
        partial(GatedDeltaNet, D, d_state=4, allow_negative_eigenvalues=True),
        partial(GatedDeltaNet, D, d_state=4),
        "allow_negative_eigenvalues=False: what was saved is of allow_negative_eigenvalues=True",
    ),
    "Mega, attention": (averaging, partial(averaging, attention="laplace"), "attention=laplace: what was"),
    "Mega, chunks": (averaging, partial(averaging, chunk_size=9), "chunk_size=9: what was saved is of chunk_size=None"),
    "attention, heads": (
        attention,
        partial(Attention, D, num_heads=1),
        "num_heads=1: what was saved is of num_heads=2",
    ),
    "attention, window": (attention, partial(attention, window=3), "window=3: what was saved is of window=None"),
    "attention, positions": (attention, partial(attention, positions="rotary"), "positions=rotary: what was"),
    "gelu": (partial(GLU, D), partial(GLU, D, gelu="exact"), "approximate=none: what was saved is of approximate=tanh"),
    "gate": (partial(HalfGLU, D), partial(HalfGLU, D, gated="input"), "gated=input: what was saved"),
    "pool": (partial(PooledHead, D, d_output=2), partial(PooledHead, D, d_output=2, pool="last"), "pool=last"),
    "pool of two towers": (
        partial(TwoTowerHead, D, d_output=2),
        partial(TwoTowerHead, D, d_output=2, pool="first"),
        "pool=first",
    ),
    "head": (
        partial(StepHead, D, d_output=2),
        partial(PooledHead, D, d_output=2),
        "pool=mean: what was saved is of po",
    ),
    "batch norm": (partial(BatchNorm, D), partial(BatchNorm, D, eps=1e-3), "eps=0.001: what was saved is of eps=1e-05"),
    "norm before or after": (backbone, partial(backbone, prenorm=False), "blocks.0.prenorm=False: what was saved"),
    "positions": (
        backbone,
        partial(backbone, positions="sinusoidal"),
        "position_kind=sinusoidal: what was saved",
    ),
    "inside a backbone": (
        backbone,
        partial(backbone, mixer=partial(mixer, delay=1)),
        "blocks.0.mixer.delay=1: what was saved is of delay=2",
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_another_function_is_refused(pair):
    saved, other, line = PAIRS[pair]
    for strict in (True, False):
        for first, second, expected in ((saved, saved, None), (other, other, None), (saved, other, line)):
            module, states = second(), first().state_dict()
            if expected is None:
                assert str(module.load_state_dict(states, strict=strict)) == "<All keys matched successfully>"
                continue
            with pytest.raises(RuntimeError) as refused:
                module.load_state_dict(states, strict=strict)
            assert expected in str(refused.value)
            assert "size mismatch" not in str(refused.value)  # the shapes alone would not have told
            with pytest.raises(RuntimeError, match="what was saved"):
                first().load_state_dict(second().state_dict(), strict=strict)


@pytest.mark.parametrize("pair", PAIRS)
def test_states_of_before_are_loaded(pair):
    for build in PAIRS[pair][:2]:
        module, states = build(), build().state_dict()
        old = type(states)((key, value) for key, value in states.items() if not key.endswith(KEY))
        assert 0 < len(old) < len(states)
        assert str(module.load_state_dict(old)) == "<All keys matched successfully>"
        with pytest.raises(RuntimeError, match="Missing key"):
            module.load_state_dict(dict(list(old.items())[1:]))


def test_saved_structure_is_tensors_and_needs_no_pickle():
    module, file = backbone(), io.BytesIO()
    states = module.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in states.values())
    torch.save(states, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for target in (backbone(), copy.deepcopy(module)):
        target.load_state_dict(loaded)
        for key, value in target.state_dict().items():
            assert torch.equal(value, states[key])


def test_what_may_differ_is_no_structure():
    """How something is computed, and what training alone uses."""
    states = stu().state_dict()
    partial(stu, algorithm="features", streaming="window")().load_state_dict(states)
    partial(attention, dropout=0.5)().load_state_dict(attention().state_dict())
    partial(S5, D, d_state=4, num_blocks=2, rate=2.0)().load_state_dict(S5(D, d_state=4, num_blocks=1).state_dict())
    partial(LRU, D, d_state=4, r_min=0.5)().load_state_dict(LRU(D, d_state=4).state_dict())


def test_a_structure_that_arithmetic_has_damaged_is_none():
    states = backbone().state_dict()
    for change in (lambda v: v.to(torch.bfloat16), lambda v: 0.9 * v + 0.1 * v, torch.zeros_like):
        backbone().load_state_dict({key: change(value) for key, value in states.items()})
    with pytest.raises(RuntimeError, match="delay=1: what was saved is of delay=2"):
        partial(backbone, mixer=partial(mixer, delay=1))().load_state_dict({k: (v + v) / 2 for k, v in states.items()})
