"""S5 against the numbers of the published code, its equations written out, and the claims of its options."""

import math
import re
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from stu.errors import OptionError
from stu.mixers.s5 import S5, hippo_modes, input_modes, output_modes, truncated_normal
from stu.ops import irregular
from stu.ops.hippo import hippo_legs
from tests.golden import cases
from tests.models import composed, randomized

D = 3


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def small(**options):
    """Far from its initialisation."""
    return randomized(S5(D, **({"d_state": 8, "num_blocks": 2} | options))).double()


def literal(layer, u, factors=None):
    """The equations of the paper (2208.04933, section 2 and appendix), one step after the other; (L, D) → (L, D).

    factors: those of dt, one for each step.
    """
    factors = torch.ones(len(u)).double() if factors is None else factors
    real, imaginary = layer.Lambda.unbind(-1)
    if layer.clip_eigs:
        real = real.clamp(max=-1e-4)
    A, dt = torch.complex(real, imaginary), layer.rate * torch.exp(layer.log_dt)
    B, C = torch.complex(*layer.B.unbind(-1)), torch.complex(*layer.C.unbind(-1))

    def discretized(dt):
        if layer.discretization == "zoh":
            A_bar = torch.exp(A * dt)
            return A_bar, torch.diag((A_bar - 1) / A) @ B
        return (1 + dt / 2 * A) / (1 - dt / 2 * A), torch.diag(dt / (1 - dt / 2 * A)) @ B

    def states(inputs, factors):
        x = torch.zeros_like(A)
        for u_t, factor in zip(inputs, factors, strict=True):
            A_bar, B_bar = discretized(factor * dt)
            x = A_bar * x + B_bar @ u_t.to(B.dtype)
            yield x

    y = torch.stack([C[0] @ x for x in states(u, factors)])
    if len(C) == 2:
        y = y + torch.stack([C[1] @ z for z in [*states(u.flip(0), factors.flip(0))][::-1]])
    return (2 if layer.conj_sym else 1) * y.real + layer.D * u


# --- the published code ---


@pytest.mark.parametrize(("case", "method", "directions"), cases("s5", r"([^_]+)__(zoh|bilinear)__(uni|bidir)__y"))
def test_s5_is_the_published_one(case, method, directions, golden):
    arrays = golden("s5")
    get = lambda name: arrays[f"{case}__{name}"]  # noqa: E731
    conj_sym, modes = get("conj_sym").item(), get("Lambda").numel()
    layer = S5(
        get("D").numel(),
        causal=directions == "uni",
        d_state=2 * modes if conj_sym else modes,
        num_blocks=1,
        conj_sym=conj_sym,
        discretization=method,
        clip_eigs=get("clip_eigs").item(),
        rate=get("step_rescale").item(),
    ).double()
    C = torch.stack((get("C"), get("C_rev"))[: len(layer.C)])
    values = {"Lambda": get("Lambda"), "B": get("B"), "C": C}
    values = {name: torch.view_as_real(value) for name, value in values.items()}
    layer.load_state_dict(values | {"log_dt": get("log_step"), "D": get("D")})
    decay, B, _ = layer._system()
    assert_close(decay.detach(), get(f"{method}__Lambda_bar"), rtol=0, atol=1e-13)
    assert_close(B.detach(), get(f"{method}__B_bar"), rtol=0, atol=1e-13)
    y = layer(get("u").unsqueeze(0)).squeeze(0)
    assert_close(y.detach(), get(f"{method}__{directions}__y"), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("blocks", "d_state"), cases("s5", r"init_J(\d+)_N(\d+)__Lambda"))
def test_s5_begins_as_the_published_one(blocks, d_state, golden):
    arrays = golden("s5")
    get = lambda name: arrays[f"init_J{blocks}_N{d_state}__{name}"]  # noqa: E731
    size = int(d_state) // int(blocks)
    assert_close(hippo_legs(size)[0], get("A_hippo"), rtol=0, atol=1e-12)
    assert_close(hippo_modes(size, conj_sym=False)[0], get("block_Lambda_full"), rtol=0, atol=1e-12)
    eigenvalues, V = hippo_modes(size, conj_sym=True)
    layer = S5(D, d_state=int(d_state), num_blocks=int(blocks))
    assert_close(eigenvalues.repeat(int(blocks)), get("Lambda"), rtol=0, atol=1e-12)
    assert torch.equal(torch.view_as_complex(layer.Lambda.detach()), get("Lambda").to(torch.complex64))
    theirs = get("block_V_half")
    phase = (V.conj() * theirs).sum(0)  # free, and 1 in modulus only where V is the same
    assert_close(theirs, V * phase, rtol=0, atol=1e-12)
    assert_close(input_modes(get("B_draw"), theirs), get("B_tilde"), rtol=0, atol=1e-12)
    assert_close(output_modes(get("C_draw"), theirs), get("C_tilde"), rtol=0, atol=1e-12)


# --- the equations ---


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_s5_is_its_equation(method, causal):
    for conj_sym, clip_eigs in product((True, False), (True, False)):
        layer = small(
            causal=causal, conj_sym=conj_sym, discretization=method, clip_eigs=clip_eigs, dt_max=1.0, rate=1.7
        )
        with torch.no_grad():
            layer.Lambda[:2, 0] = 0.01  # to be clipped
        u, weights = noise(2, 23, D), noise(2, 23, D)
        y, expected = layer(u), torch.stack([literal(layer, u_b) for u_b in u])
        assert_close(y, expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad((y * weights).sum(), [*layer.parameters()]),
            torch.autograd.grad((expected * weights).sum(), [*layer.parameters()]),
            strict=True,
        ):
            assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
def test_half_the_modes_are_the_whole_with_their_conjugates(causal):
    half = small(causal=causal)
    whole = S5(D, d_state=8, num_blocks=2, conj_sym=False, causal=causal).double()
    mirror = torch.tensor([1.0, -1.0]).double()
    values = dict(half.named_parameters())
    values |= {name: torch.cat((values[name], values[name] * mirror)) for name in ("Lambda", "B")}
    values |= {"C": torch.cat((values["C"], values["C"] * mirror), 2), "log_dt": values["log_dt"].repeat(2)}
    whole.load_state_dict(values)
    u = noise(2, 30, D)
    assert_close(half(u), whole(u), rtol=0, atol=1e-12)


def test_zoh_is_exact_for_inputs_that_stay_the_same_over_a_step():
    layer = small(conj_sym=False)
    decay, B, _ = layer._system()
    for mode, dt in enumerate(layer.log_dt.exp()):
        eigenvalue, row = torch.view_as_complex(layer.Lambda)[mode], torch.view_as_complex(layer.B)[mode]
        joint = torch.zeros(1 + D, 1 + D, dtype=torch.complex128)  # (x, u)' = (Λ x + B u, 0)
        joint[0, 0], joint[0, 1:] = eigenvalue, row
        flow = torch.linalg.matrix_exp(joint * dt)
        assert_close(torch.cat((decay[mode : mode + 1], B[mode])), flow[0], rtol=1e-8, atol=0)  # as far as torch goes


@pytest.mark.parametrize("blocks", [1, 2])
def test_initial_modes_are_the_dense_system(blocks):
    """C exp(k A) B of the block-diagonal HiPPO-N equals 2 Re of the half of its modes, in its own basis."""
    size = 8 // blocks
    A, B_legs = hippo_legs(size)
    P = B_legs / math.sqrt(2)
    dense = torch.block_diag(*[A + torch.outer(P, P)] * blocks)
    B, C = noise(8, D), noise(D, 8)
    eigenvalues, V = hippo_modes(size, conj_sym=True)
    eigenvalues = eigenvalues.repeat(blocks)
    for time in (0.0, 0.1, 1.0, 5.0):
        expected = C @ torch.linalg.matrix_exp(dense * time) @ B
        modal = 2 * (output_modes(C, V) * torch.exp(eigenvalues * time) @ input_modes(B, V)).real
        assert_close(modal, expected, rtol=0, atol=1e-12)


def test_a_step_rescaled_is_a_step_of_that_length():
    layer = small(rate=2.0)
    other = small()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.log_dt += math.log(2)
    u = noise(1, 20, D)
    assert_close(layer(u), other(u), rtol=0, atol=1e-12)


# --- time steps of a call ---


def steps(*shape):
    """Factors of dt, far from each other."""
    return torch.exp(noise(*shape))


@pytest.mark.parametrize("chunk", [1, 1 << 6, 1 << 22])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_irregular_steps_are_their_equation(method, causal, chunk, monkeypatch):
    monkeypatch.setattr(irregular, "CHUNK", chunk)
    for options in ({}, {"conj_sym": False, "clip_eigs": True, "rate": 1.7}):
        layer = small(causal=causal, discretization=method, dt_max=1.0, **options)
        u, factors, weights = noise(2, 13, D).requires_grad_(), steps(2, 13).requires_grad_(), noise(2, 13, D)
        y = layer(u, step_rescale=factors)
        expected = torch.stack([literal(layer, *row) for row in zip(u, factors, strict=True)])
        assert_close(y, expected, rtol=1e-11, atol=1e-11)
        inputs = [u, factors, *layer.parameters()]
        for one, other in zip(
            torch.autograd.grad((y * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
            strict=True,
        ):
            assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_equal_factors_are_one_number(method, causal):
    layer = small(causal=causal, discretization=method, rate=0.8)
    other = small(causal=causal, discretization=method, rate=0.8 * 2.5)
    other.load_state_dict(layer.state_dict())
    u, equal = noise(3, 20, D), torch.full((3, 20), 2.5, dtype=torch.float64)
    for mask in (None, torch.rand(3, 20) < 0.6):
        real = slice(None) if mask is None else mask
        for number in (2.5, equal):
            assert_close(layer(u, mask, step_rescale=number)[real], other(u, mask)[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
def test_padding_takes_no_time(causal):
    layer, rows = small(causal=causal), ((0, 12), (0, 5), (8, 12), (3, 9), (4, 4))
    mask = torch.stack([(torch.arange(12) >= a) & (torch.arange(12) < b) for a, b in rows])
    for padding in (0.0, -1e3, torch.nan, torch.inf):
        u = noise(len(rows), 12, D).masked_fill(~mask.unsqueeze(-1), padding).requires_grad_()
        factors = steps(len(rows), 12).masked_fill(~mask, padding).requires_grad_()
        y = layer(u, mask, step_rescale=factors)
        for row, (a, b) in enumerate(rows[:-1]):
            alone = layer(u[row : row + 1, a:b], step_rescale=factors[row : row + 1, a:b])
            assert_close(y[row, a:b], alone[0], rtol=0, atol=1e-12)
        for grad in torch.autograd.grad(y[mask].square().sum(), (u, factors)):
            assert grad.isfinite().all()
            assert (grad[~mask] == 0).all()


def test_time_passes_where_an_observation_is_missing():
    layer, u, factors = small(), noise(2, 9, D), steps(2, 9)
    mask = torch.tensor([True, True, False, False, True, True, False, True, True]).expand(2, -1)
    missing = u.masked_fill(~mask.unsqueeze(-1), 0)
    assert_close(layer(u, mask, step_rescale=factors), layer(missing, step_rescale=factors), rtol=0, atol=1e-13)


def test_irregular_sequences_in_pieces_and_steps():
    layer, u, factors = small(rate=0.7), noise(3, 24, D), steps(3, 24)
    factors[:, 18:] = 1.3
    factors[:, 21:] = 1.0
    expected = layer(u, step_rescale=factors)
    state, outputs = layer.initial_state(3), []
    for start, stop in ((0, 5), (5, 6), (6, 14)):
        piece = {"state": state, "step_rescale": factors[:, start:stop]}
        assert_close(layer(u[:, start:stop], **piece), layer.prefill(u[:, start:stop], **piece)[0], rtol=0, atol=1e-13)
        y, state = layer.prefill(u[:, start:stop], **piece)
        outputs.append(y)
    for t in range(14, 24):
        number = factors[:, t] if t < 18 else 1.3 if t < 21 else 1.0
        y_t, state = layer.step(u[:, t], state, step_rescale=number)
        outputs.append(y_t.unsqueeze(1))
    assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-12)
    y, _ = layer.prefill(u[:, 18:21], state=layer.prefill(u[:, :18], step_rescale=factors[:, :18])[1], step_rescale=1.3)
    assert_close(y, expected[:, 18:21], rtol=0, atol=1e-12)


def test_padded_pieces_of_irregular_sequences():
    layer, rows = small(), ((0, 12), (0, 5), (8, 12), (3, 9), (4, 4))
    mask = torch.stack([(torch.arange(12) >= a) & (torch.arange(12) < b) for a, b in rows])
    u, factors = noise(len(rows), 18, D), steps(len(rows), 18)
    _, state = layer.prefill(u[:, :4], step_rescale=factors[:, :4])
    y, state = layer.prefill(u[:, 4:16], mask, state, step_rescale=factors[:, 4:16])
    end = layer(u[:, 16:], state=state, step_rescale=factors[:, 16:])
    for row, (a, b) in enumerate(rows):
        taken = torch.tensor([*range(4), *range(4 + a, 4 + b), 16, 17])
        alone = layer(u[row : row + 1, taken], step_rescale=factors[row : row + 1, taken])[0]
        assert_close(torch.cat((y[row, a:b], end[row])), alone[4:], rtol=0, atol=1e-12)


def test_packed_sequences_have_their_own_steps():
    layer, u, factors = small(causal=False), noise(1, 12, D), steps(1, 12).requires_grad_()
    y = layer(u, cu_seqlens=torch.tensor([0, 5, 12]), step_rescale=factors)
    alone = torch.cat([layer(u[:, a:b], step_rescale=factors[:, a:b]) for a, b in ((0, 5), (5, 12))], 1)
    assert_close(y, alone, rtol=0, atol=1e-12)
    assert_close(*(torch.autograd.grad(z.square().sum(), factors)[0] for z in (y, alone)), rtol=0, atol=1e-11)
    y = layer(u, cu_seqlens=torch.tensor([0, 5, 12]), step_rescale=2.0)
    assert_close(y[:, :5], layer(u[:, :5], step_rescale=2.0), rtol=0, atol=1e-12)


def test_states_are_discretised_for_the_factor_of_the_call():
    layer, u = small(), noise(2, 10, D)
    _, state = layer.prefill(u, step_rescale=3.0)
    assert state.step_rescale == 3.0
    layer._system = None  # not called again
    assert layer.step(u[:, 0], state, step_rescale=3.0)[1].system is state.system


def test_no_states_of_irregular_sequences_are_stored():
    layer, u, stored = S5(D, d_state=32, num_blocks=1), noise(1, 4000, D, dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        _, state = layer.prefill(u, step_rescale=torch.ones(1, 4000))
    assert max(stored) == u.numel() < 4000 * 16
    assert state.modes.untyped_storage().nbytes() == state.modes.nbytes


def test_irregular_steps_in_low_precision():
    layer = S5(D, d_state=32, num_blocks=2, dt_min=1e-4, dt_max=1e-3)
    x, factors = noise(1, 16384, D), steps(1, 16384)
    exact = layer.double()(x, step_rescale=factors)
    assert (layer.float()(x.float(), step_rescale=factors) - exact).norm() < 1e-6 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x.float(), step_rescale=factors) - exact).norm() < 1e-6 * exact.norm()
    y = layer.bfloat16()(x.bfloat16(), step_rescale=factors.bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_impossible_factors_are_refused(wrong):
    layer, x = small(), noise(2, 5, D)
    state = layer.initial_state(2)
    for call in (
        lambda: layer(x, step_rescale=wrong),
        lambda: layer.prefill(x, step_rescale=wrong),
        lambda: layer.step(x[:, 0], state, step_rescale=wrong),
    ):
        with pytest.raises(OptionError, match=r"^step_rescale=.*: must be above 0 and finite$"):
            call()


def test_factors_of_another_shape_are_refused():
    layer, x = small(), noise(2, 5, D)
    state = layer.initial_state(2)
    for wrong in (torch.ones(5), torch.ones(2, 4), torch.ones(2, 5, 1), torch.ones(()), torch.ones(2, 5).int()):
        for call in (
            lambda wrong=wrong: layer(x, step_rescale=wrong),
            lambda wrong=wrong: layer(x, state=state, step_rescale=wrong),
            lambda wrong=wrong: layer.prefill(x, step_rescale=wrong),
        ):
            with pytest.raises(OptionError, match=r"must be a number, or floating-point \(2, 5\)"):
                call()
        with pytest.raises(OptionError, match=r"must be a number, or floating-point \(2,\)"):
            layer.step(x[:, 0], state, step_rescale=wrong)


def test_clipped_eigenvalues_never_grow():
    layer = small(clip_eigs=True)
    with torch.no_grad():
        layer.Lambda[:, 0] = 3.0
    assert (layer._system()[0].abs() < 1).all()
    assert (small()._system()[0].abs() < 1).all()


# --- initialisation ---


@pytest.mark.parametrize(
    ("C_init", "variance"), [("trunc_standard_normal", 2 / 512), ("lecun_normal", 2 / 512 / 8), ("complex_normal", 1.0)]
)
def test_initial_variances(C_init, variance):
    layer = S5(8, d_state=512, num_blocks=4, C_init=C_init, causal=False, dt_min=1e-4, dt_max=0.5)
    assert layer.C.square().sum(-1).mean().item() == pytest.approx(variance, rel=0.1)
    assert layer.B.square().sum(-1).mean().item() == pytest.approx(1 / 512, rel=0.1)
    uniform = ((layer.log_dt - math.log(1e-4)) / math.log(5e3)).sort().values
    assert_close(uniform, torch.linspace(0, 1, 256), rtol=0, atol=0.12)
    assert not torch.equal(layer.C[0], layer.C[1])


def test_truncated_normal_has_the_variance_it_says():
    draws = truncated_normal(200, 200, variance=0.25)
    assert draws.std().item() == pytest.approx(0.5, rel=0.02)
    assert 0.98 < draws.abs().max() / (2 * 0.5 / 0.87962566) <= 1


# --- numbers ---


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("log_dt", [-30.0, -12.0, 5.0, 12.0])
def test_extreme_steps_give_finite_numbers(log_dt, method):
    layer = S5(D, d_state=8, num_blocks=1, discretization=method, causal=False)
    with torch.no_grad():
        layer.log_dt.fill_(log_dt)
    y = layer(noise(2, 300, D, dtype=torch.float32))
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [*layer.parameters()]))


def test_long_memory_survives_low_precision():
    layer = S5(D, d_state=32, num_blocks=2, dt_min=1e-4, dt_max=1e-3)
    x = noise(1, 16384, D)
    exact = layer.double()(x)
    assert (layer.float()(x.float()) - exact).norm() < 1e-6 * exact.norm()
    assert (layer(x.bfloat16()) - layer(x.bfloat16().float())).norm() < 2**-8 * exact.norm()
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.slow
def test_s5_compiles_without_a_break():
    layer, x = S5(D, d_state=8, num_blocks=1, clip_eigs=True), noise(2, 9, D, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), layer(x))
    factors = torch.rand(2, 9)
    assert_close(compiled(x, step_rescale=factors), layer(x, step_rescale=factors))


# --- options ---


def test_the_system_learns_at_its_own_rate_and_does_not_decay():
    group = composed("model=s5", "task=lds").optimizer.groups.ssm
    names = [name for name, _ in S5(D, d_state=8, num_blocks=1).named_parameters()]
    own = {name for name in names if re.search(group.match, f"blocks.0.mixer.{name}")}
    assert own == {"Lambda", "log_dt", "B"} == {*names} - {"C", "D"}
    assert (group.lr, group.weight_decay) == (1e-3, 0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_state": 0}, "d_state"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 3}, "num_blocks"),
        ({"num_blocks": 8}, "num_blocks"),
        ({"discretization": "euler"}, "discretization"),
        ({"C_init": "zeros"}, "C_init"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_min": 1.0, "dt_max": 0.1}, "dt_min"),
        ({"rate": 0.0}, "rate"),
    ],
    ids=str,
)
def test_s5_names_impossible_options(options, name):
    with pytest.raises(OptionError) as caught:
        S5(D, **({"d_state": 8, "num_blocks": 2} | options))
    assert caught.value.name == name
