"""Blocks, norms, channel mixers, encoders, positions and heads, and whole models made of them."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from torch import Tensor, multiprocessing, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from stu.backbone import Backbone, Block, SequenceModel
from stu.channel import GLU, MLP, HalfGLU
from stu.cli.composition import build
from stu.encoders import LearnedPositions, LinearEncoder, RotaryPositions, SinusoidalPositions, TokenEncoder
from stu.errors import OptionError
from stu.heads import PooledHead, StepHead, pooled
from stu.mixer import Mixer, map_state
from stu.norm import BatchNorm, PositionNorm, make_norm
from tests.distributed import batch_norm
from tests.mixers.test_contract import stepped
from tests.models import MODELS, model_config, randomized, small_backbone

SEQ_LEN = 24
D = 8
WIDE = torch.float64

models = pytest.mark.parametrize("model", MODELS)
causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])


def noise(*shape, dtype=WIDE):
    return torch.randn(*shape, dtype=dtype)


def right_padded(lengths, seq_len):
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


class Running(Mixer):
    """A mixer simple enough to be checked by eye: y_t = s·(x_1 + … + x_t) over the real positions."""

    causal = True

    def __init__(self, d_model: int, *, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.d_model = d_model

    def forward(self, x, mask=None):
        return self.scale * (x if mask is None else x * mask.unsqueeze(-1)).cumsum(1)

    def initial_state(self, batch_size):
        return self.scale.new_zeros(batch_size, self.d_model)

    def step(self, x, state):
        return self.scale * (state + x), state + x

    def prefill(self, x, mask=None, state=None):
        x = x if mask is None else x * mask.unsqueeze(-1)
        before = torch.zeros_like(x[:, 0]) if state is None else state
        return self.scale * (before.unsqueeze(1) + x.cumsum(1)), before + x.sum(1)


def trained(backbone: Backbone) -> Backbone:
    """Batch norms that have seen data, then eval mode."""
    backbone.double().train()
    with torch.no_grad():
        for _ in range(3):
            backbone(2 * noise(4, SEQ_LEN, D) + 0.5)
    return backbone.eval()


# --- blocks ---


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "none"])
@pytest.mark.parametrize("channel_residual", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_block_is_its_formula(prenorm, channel_residual, norm):
    block = Block(
        D,
        mixer=Running,
        channel_mixer=GLU,
        norm=norm,
        prenorm=prenorm,
        channel_residual=channel_residual,
        dropout=0.0,
    )
    block = randomized(block).double()
    mixer, channel, first, second = block.mixer, block.channel_mixer, block.norm, block.channel_norm
    x = noise(2, 5, D)
    if not channel_residual:
        expected = x + channel(mixer(first(x))) if prenorm else first(x + channel(mixer(x)))
    elif prenorm:
        middle = x + mixer(first(x))
        expected = middle + channel(second(middle))
    else:
        middle = first(x + mixer(x))
        expected = second(middle + channel(middle))
    assert_close(block(x), expected, rtol=0, atol=1e-12)
    assert (second is None) == (not channel_residual)


@pytest.mark.parametrize("channel_residual", [False, True])
def test_dropout_acts_on_the_branches_in_training_alone(channel_residual):
    block = Block(
        64,
        mixer=lambda d: Running(d, scale=1.0),
        channel_mixer=lambda d: nn.Identity(),
        norm="none",
        prenorm=True,
        channel_residual=channel_residual,
        dropout=0.25,
    )
    x = torch.ones(50, 1, 64)
    branches = block(x) - x
    if channel_residual:  # both branches drop on their own: (m)(1 + n) + n with m, n ∈ {0, 4/3}
        survivors = torch.tensor([0.0, 4 / 3, 4 / 3, 4 / 3 + (1 + 4 / 3) * 4 / 3])
        assert (branches.unsqueeze(-1) - survivors).abs().amin(-1).max() < 1e-5
        assert (branches == 0).float().mean().item() == pytest.approx(1 / 16, abs=0.02)
    else:
        assert_close(branches.unique(), torch.tensor([0.0, 4 / 3]))
        assert (branches == 0).float().mean().item() == pytest.approx(1 / 4, abs=0.03)
    block.eval()
    assert_close(block(x), torch.full_like(x, 4.0 if channel_residual else 2.0))


def test_mixers_are_cycled_over_depth():
    backbone = Backbone(
        D,
        depth=5,
        mixer=[lambda d: Running(d, scale=1.0), lambda d: Running(d, scale=2.0)],
        channel_mixer=GLU,
    )
    assert [block.mixer.scale.item() for block in backbone.blocks] == [1, 2, 1, 2, 1]
    parameters = [p for block in backbone.blocks for p in block.parameters()]
    assert len(parameters) == len({id(p) for p in parameters})  # nothing is shared


def test_backbone_is_its_blocks_and_norm():
    backbone = Backbone(D, depth=2, mixer=Running, channel_mixer=MLP, norm="layer", final_norm=True)
    randomized(backbone).double()
    x = noise(2, 6, D)
    expected = backbone.norm(backbone.blocks[1](backbone.blocks[0](x)))
    assert torch.equal(backbone(x), expected)
    assert isinstance(backbone.norm.norm, nn.LayerNorm)
    without = Backbone(D, depth=1, mixer=Running, channel_mixer=MLP, norm="layer").double()
    assert torch.equal(without(x), without.blocks[0](x))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_backbone_is_causal_where_all_mixers_are(position):
    class Free(Running):
        causal = False

    mixers = [Running, Running, Running]
    assert Backbone(D, depth=3, mixer=mixers, channel_mixer=GLU).causal
    mixers[position] = Free
    assert not Backbone(D, depth=3, mixer=mixers, channel_mixer=GLU).causal


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_model": 0}, "d_model"),
        ({"depth": 0}, "depth"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"mixer": []}, "mixer"),
        ({"norm": "group"}, "norm"),
        ({"positions": "learned"}, "seq_len"),
        ({"positions": "absolute"}, "positions"),
        ({"channel_mixer": "GLU"}, "channel_mixer"),
        ({"channel_mixer": None, "channel_residual": True}, "channel_residual"),
    ],
    ids=str,
)
def test_backbone_names_impossible_options(options, name):
    options = {"d_model": D, "depth": 1, "mixer": Running, "channel_mixer": GLU} | options
    with pytest.raises(OptionError) as caught:
        Backbone(options.pop("d_model"), **options)
    assert caught.value.name == name


def test_a_block_may_do_without_a_channel_mixer():
    block = Backbone(D, depth=1, mixer=Running, channel_mixer=None, norm="layer").double().blocks[0]
    x = noise(2, 5, D)
    assert_close(block(x), x + block.mixer(block.norm(x)), rtol=0, atol=1e-12)


# --- whole models ---


@models
def test_models_are_causal_where_the_task_is(model):
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN))
    assert backbone.causal
    x = noise(2, SEQ_LEN, D)
    for t in (0, 7, SEQ_LEN - 2):
        other = torch.cat((x[:, : t + 1], noise(2, SEQ_LEN - t - 1, D)), 1)
        assert_close(backbone(other)[:, : t + 1], backbone(x)[:, : t + 1], rtol=0, atol=1e-9)


@models
@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal", "rotary"])
def test_models_run_step_by_step(model, positions):
    if positions == "rotary" and "positions" not in str(model_config(model, seq_len=SEQ_LEN).mixer):
        with pytest.raises(InstantiationException, match="positions=rotary"):  # said, not silently skipped
            build(model_config(model, seq_len=SEQ_LEN, positions=positions))
        return
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN, positions=positions))
    x = noise(2, SEQ_LEN, D)
    y = backbone(x)
    for cut in (0, 1, 9):
        prefix, state = backbone.prefill(x[:, :cut]) if cut else (y[:, :0], backbone.initial_state(2))
        assert_close(prefix, y[:, :cut], rtol=0, atol=1e-10)
        for t in range(cut, SEQ_LEN):
            y_t, state = backbone.step(x[:, t], state)
            assert_close(y_t, y[:, t], rtol=0, atol=1e-10)
        assert state.position == SEQ_LEN


absolute = pytest.mark.parametrize("positions", ["none", "learned"])


@models
@absolute
def test_models_run_in_pieces(model, positions):
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN, positions=positions))
    x = noise(2, SEQ_LEN, D)
    pieces, state = [], None
    for piece in x.tensor_split((1, 2, 9, 16), 1):
        y, after = backbone.prefill(piece, state=state)
        assert_close(backbone(piece, state=state), y, rtol=0, atol=1e-10)
        pieces.append(y)
        state = after
    assert_close(torch.cat(pieces, 1), backbone(x), rtol=0, atol=1e-9)
    assert state.position == SEQ_LEN
    assert state.positions.tolist() == [SEQ_LEN, SEQ_LEN]


@models
@absolute
def test_packed_sequences_are_each_alone(model, positions):
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN, positions=positions))
    x = noise(1, 30, D)
    alone = torch.cat([backbone(x[:, start:stop]) for start, stop in ((0, 12), (12, 13), (13, 30))], 1)
    assert_close(backbone(x, cu_seqlens=torch.tensor([0, 12, 13, 13, 30])), alone, rtol=0, atol=1e-10)
    with pytest.raises(OptionError, match="cu_seqlens="):
        backbone(x, cu_seqlens=torch.tensor([0, 12]))


@models
@absolute
@pytest.mark.parametrize("reserved", [False, True], ids=["", "reserved"])
def test_each_sequence_continues_from_its_last_real_position(model, positions, reserved):
    """Its positions are the indices of a forward pass in which nothing follows them but the rest; gradients, too."""
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN, positions=positions))
    x, rest, weight = noise(4, 9, D).requires_grad_(), noise(4, 6, D).requires_grad_(), noise(4, 21, D)
    rows = ((0, 9), (0, 4), (5, 9), (2, 6))
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for row, (first, last) in enumerate(rows):
        mask[row, first:last] = True
    y, state = backbone.prefill(x, mask)
    assert state.position == 9
    assert state.positions.tolist() == [last for _, last in rows]
    if reserved:
        state = backbone.reserve(state, 3)
    found = torch.cat((y * mask.unsqueeze(-1), stepped(backbone, rest, state), backbone(rest, state=state)), 1)
    expected = []
    for row, (first, last) in enumerate(rows):
        whole = torch.cat((x[row, :last], rest[row]))[None]
        (prefix, after) = backbone(whole, (torch.arange(last + 6) >= first)[None])[0].tensor_split((last,))
        prefix = torch.cat((prefix, prefix.new_zeros(9 - last, D))) * mask[row].unsqueeze(-1)
        expected.append(torch.cat((prefix, after, after)))
    assert_close(found, torch.stack(expected), rtol=0, atol=1e-9)
    wanted = [x, rest, *backbone.parameters()]
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((torch.stack(expected) * weight).sum(), wanted),
        strict=True,
    ):
        assert_close(a, b, rtol=0, atol=1e-8 * (1 + b.abs().max().item()))


@models
@absolute
def test_models_step_in_place_and_from_states_of_some_sequences(model, positions):
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN, positions=positions))
    x, index = noise(3, SEQ_LEN, D), torch.tensor([2, 0, 0, 1])
    mask = right_padded([9, 4, 7], 9)
    _, first = backbone.prefill(x[:, :9], mask)
    rest = x[index, 9:]
    expected = stepped(backbone, rest, backbone.select(first, index))
    state = backbone.reserve(backbone.select(first, index), SEQ_LEN - 9)
    places = []
    map_state(lambda part: places.append(part.data_ptr()) or part, state)
    outputs = []
    for x_t in rest.unbind(1):
        y, state = backbone.step_(x_t, state)
        assert not y.requires_grad
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), expected, rtol=0, atol=1e-9)
    assert state.positions.tolist() == [SEQ_LEN - 2, SEQ_LEN, SEQ_LEN, SEQ_LEN - 5]
    map_state(lambda part: places.remove(part.data_ptr()) or part, state)
    assert not places
    assert first.positions.tolist() == [9, 4, 7]


@models
@causality
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_padding_changes_no_answer(model, causal, norm):
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN, causal=causal, norm=norm))
    encoder, lengths, inputs = LinearEncoder(D, d_input=2), [SEQ_LEN - 3, 10, 2, 1], noise(4, SEQ_LEN, 2)
    mask = right_padded(lengths, SEQ_LEN)
    for pool in ("mean", "first", "last"):
        network = SequenceModel(encoder, backbone, PooledHead(D, d_output=3, pool=pool)).double().eval()
        alone = torch.cat([network(inputs[i : i + 1, :length]) for i, length in enumerate(lengths)])
        assert alone.std(0).min() > 1e-3  # there is something to preserve
        for padding in (0.0, 1.0, 1e4):
            batch = inputs.where(mask.unsqueeze(-1), padding * noise(4, SEQ_LEN, 2))
            assert_close(network(batch, mask), alone, rtol=0, atol=1e-9)


@models
@causality
def test_padding_changes_no_answer_of_a_token_model(model, causal):
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN, causal=causal))
    network = SequenceModel(TokenEncoder(D, vocab_size=5), backbone, PooledHead(D, d_output=3)).double().eval()
    lengths = [SEQ_LEN, 10, 1]
    tokens = torch.randint(5, (3, SEQ_LEN))
    alone = torch.cat([network(tokens[i : i + 1, :length]) for i, length in enumerate(lengths)])
    mask = right_padded(lengths, SEQ_LEN)
    assert_close(network(tokens, mask), alone, rtol=0, atol=1e-9)
    assert_close(network(tokens.where(mask, 0), mask), alone, rtol=0, atol=1e-9)


@pytest.mark.slow
@models
@causality
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_padding_changes_no_training_step(model, causal, norm):
    """Outputs, gradients and running statistics are the same whatever the padding holds and however long it is."""
    backbone = small_backbone(model, seq_len=SEQ_LEN, causal=causal, norm=norm)
    network = SequenceModel(LinearEncoder(D, d_input=2), backbone, PooledHead(D, d_output=3)).double().train()
    lengths = [SEQ_LEN - 5, 10, 2, 1]
    inputs, loss_w = noise(4, SEQ_LEN, 2), noise(4, 3)

    def step(seq_len, padding):
        twin = copy.deepcopy(network)
        mask = right_padded(lengths, seq_len)
        batch = inputs[:, :seq_len].where(mask.unsqueeze(-1), padding * noise(4, seq_len, 2))
        prediction = twin(batch, mask)
        (prediction * loss_w).sum().backward()
        return [prediction, *(p.grad for p in twin.parameters()), *twin.buffers()]

    expected = step(max(lengths), 0.0)
    for seq_len, padding in ((SEQ_LEN, 0.0), (max(lengths), 1.0), (SEQ_LEN, 1e3)):
        for one, other in zip(step(seq_len, padding), expected, strict=True):
            assert_close(one, other, rtol=1e-9, atol=1e-9)


@models
def test_models_survive_saving_and_copying(model):
    backbone = trained(small_backbone(model, seq_len=SEQ_LEN))
    x = noise(2, SEQ_LEN, D)
    fresh = small_backbone(model, seq_len=SEQ_LEN).double().eval()
    fresh.load_state_dict(backbone.state_dict())
    for twin in (fresh, copy.deepcopy(backbone)):
        assert torch.equal(twin(x), backbone(x))


@models
def test_models_train_in_bfloat16(model):
    backbone = small_backbone(model, seq_len=128)
    x = noise(4, 128, D, dtype=torch.float32)
    mask = right_padded([128, 128, 60, 1], 128)
    exact = backbone(x, mask)[mask]
    with torch.autocast("cpu", torch.bfloat16):
        y = backbone(x, mask)[mask]
    assert (y - exact).norm() < 0.02 * exact.norm()
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


# --- norms ---


def test_batch_norm_without_mask_is_that_of_torch():
    ours, theirs = randomized(BatchNorm(D)).double(), nn.BatchNorm1d(D).double()
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias}, strict=False)
    x = 3 * noise(4, 7, D) + 1
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(first), theirs(second.flatten(0, 1)).view_as(x)
    assert_close(y, z, rtol=0, atol=1e-12)
    loss_w = torch.randn_like(x)
    (y * loss_w).sum().backward()
    (z * loss_w).sum().backward()
    for one, other in ((first, second), (ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_batch_norm_knows_real_positions_only():
    norm = randomized(BatchNorm(D)).double()
    mask = right_padded([6, 3, 1], 6)
    x = noise(3, 6, D)
    real = x[mask]
    y = norm(x, mask)
    expected = (real - real.mean(0)) / (real.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
    assert_close(y[mask], expected, rtol=0, atol=1e-12)
    assert_close(norm.hidden_mean, 0.1 * real.mean(0), rtol=0, atol=1e-12)
    assert_close(norm.hidden_var, 0.1 * real.var(0, correction=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.4])
def test_batch_norm_averages_are_debiased(momentum):
    norm = BatchNorm(D, momentum=momentum).double()
    hidden_mean = hidden_var = torch.zeros(D, dtype=WIDE)
    for count in range(1, 6):
        x = noise(5, D) * count + 1
        norm.train()(x)
        hidden_mean = (1 - momentum) * hidden_mean + momentum * x.mean(0)
        hidden_var = (1 - momentum) * hidden_var + momentum * x.var(0, correction=0)  # the biased variance
        debias = 1 - (1 - momentum) ** count
        assert norm.num_batches == count
        probe = noise(2, 3, D)
        expected = (probe - hidden_mean / debias) / (hidden_var / debias + 1e-5).sqrt()
        assert_close(norm.eval()(probe), expected, rtol=0, atol=1e-12)
    assert norm.num_batches == 5  # evaluating counts for nothing


def test_batch_norm_passes_over_a_batch_of_padding_alone():
    norm = randomized(BatchNorm(D)).double()
    norm(noise(2, 6, D))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = noise(2, 6, D).requires_grad_()
    y = norm(x, torch.zeros(2, 6, dtype=torch.bool))
    assert y.isfinite().all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])
    norm.half()  # in which the variance overflows
    norm(300 * noise(2, 6, D).half())
    norm(noise(2, 6, D).half(), torch.zeros(2, 6, dtype=torch.bool))
    assert not any(value.isnan().any() for value in norm.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nothing_is_counted_or_summed_in_half_precision(dtype):
    """70,000 positions: half precision neither counts so far nor keeps the digits of such sums."""
    x = (3 + noise(1, 70_000, D)).to(dtype)
    mask = torch.ones(1, 70_000, dtype=torch.bool)
    exact = x.double()
    eps = torch.finfo(dtype).eps
    norm = BatchNorm(D).to(dtype)
    expected = (exact - exact.mean(1)) * torch.rsqrt(exact.var(1, correction=0) + norm.eps)
    assert_close(norm(x, mask).double(), expected, rtol=eps, atol=eps)
    assert_close(pooled(x, mask).double(), exact.mean(1), rtol=eps, atol=0)
    assert_close(pooled(x, None).double(), exact.mean(1), rtol=eps, atol=0)
    for name in ("layer", "rms"):
        wide = make_norm(name, D).double()
        assert_close(make_norm(name, D).to(dtype)(x).double(), wide(exact), rtol=2 * eps, atol=2 * eps)
    positions = SinusoidalPositions(D)
    expected = positions(torch.arange(70_000))
    torch.set_default_dtype(dtype)  # as in a training step with trainer.precision=bf16-true
    try:
        assert torch.equal(positions.to(dtype)(torch.arange(70_000)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_batch_norm_before_any_batch_is_the_identity():
    norm = BatchNorm(D).double().eval()
    x = noise(2, 5, D).requires_grad_()
    y = norm(x)
    assert_close(y, x / math.sqrt(1 + 1e-5), rtol=0, atol=1e-12)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, norm.weight, norm.bias))


def test_batch_norm_of_a_single_constant_batch_is_its_bias():
    norm = BatchNorm(D)
    with torch.no_grad():
        norm.bias.fill_(0.5)
    y = norm(torch.full((2, 3, D), 7.0))
    assert_close(y, torch.full_like(y, 0.5))


def test_batch_norm_works_in_float32_inside_autocast():
    norm = BatchNorm(D)
    x = 100 + noise(8, 50, D, dtype=torch.float32)  # a variance of means far from zero is lost in bfloat16
    expected = copy.deepcopy(norm)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert torch.equal(y, expected)
    low = norm(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert norm.hidden_mean.dtype == torch.float32


def test_batch_norm_gradcheck():
    norm = BatchNorm(3).double()
    mask = right_padded([4, 2], 4)

    def outputs(x, weight, bias):
        return functional_call(copy.deepcopy(norm), {"weight": weight, "bias": bias}, (x, mask))[mask]

    assert torch.autograd.gradcheck(outputs, [noise(*s).requires_grad_() for s in ((2, 4, 3), (3,), (3,))])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("layer", lambda x: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()),
        ("rms", lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()),
        ("none", lambda x: x),
    ],
)
def test_other_norms_are_their_formulas(name, formula):
    norm = make_norm(name, D).double()
    assert isinstance(norm, PositionNorm)
    x = noise(2, 3, D)
    mask = right_padded([3, 1], 3)
    assert_close(norm(x, mask), formula(x), rtol=0, atol=1e-12)
    assert_close(norm(x[:, 0]), formula(x)[:, 0], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_batch_norm_of_two_processes_is_that_of_one(tmp_path: Path):
    norm = randomized(BatchNorm(D)).double()
    x = noise(5, 6, D).requires_grad_()
    mask, loss_w = right_padded([6, 2, 1, 5, 4], 6), noise(5, 6, D)
    job = {"state": norm.state_dict(), "x": x.detach(), "mask": mask, "loss_w": loss_w}
    torch.save(job, tmp_path / "job.pt")
    multiprocessing.spawn(batch_norm, (str(tmp_path),), nprocs=2)
    y = norm(x, mask)
    (y * loss_w)[mask].sum().backward()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]

    assert_close(torch.cat([rank["y"] for rank in ranks]), y.detach(), rtol=0, atol=1e-12)
    assert_close(torch.cat([rank["x"] for rank in ranks]), x.grad, rtol=0, atol=1e-12)
    for name, parameter in norm.named_parameters():  # a distributed trainer adds these up
        assert_close(sum(rank[name] for rank in ranks), parameter.grad, rtol=0, atol=1e-12)
    for rank in ranks:
        for name, value in norm.state_dict().items():
            assert_close(rank["state"][name], value, rtol=0, atol=1e-12)


# --- channel mixers ---


def gelu(x, form="tanh"):
    if form == "exact":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("form", ["tanh", "exact"])
def test_glu_is_its_formula(form):
    glu = GLU(D, gelu=form).double()
    x = noise(2, 3, D)
    value, gate = (gelu(x, form) @ glu.linear.weight.T + glu.linear.bias).split(D, -1)
    assert_close(glu(x), value * torch.sigmoid(gate), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", ["activated", "input"])
def test_half_glu_is_its_formula(gated):
    glu = HalfGLU(D, gated=gated).double()
    x = noise(2, 3, D)
    gate = torch.sigmoid(gelu(x) @ glu.linear.weight.T + glu.linear.bias)
    assert_close(glu(x), (gelu(x) if gated == "activated" else x) * gate, rtol=0, atol=1e-12)


def test_unknown_forms_are_named():
    with pytest.raises(OptionError, match="gelu"):
        GLU(D, gelu="sigmoid")
    with pytest.raises(OptionError, match="gated"):
        HalfGLU(D, gated="output")


@pytest.mark.parametrize(("expand", "hidden"), [(4.0, 32), (1.5, 12), (0.01, 1)])
def test_mlp_is_its_formula(expand, hidden):
    mlp = MLP(D, expand=expand).double()
    assert mlp.up.weight.shape == (hidden, D)
    x = noise(2, 3, D)
    inner = x @ mlp.up.weight.T + mlp.up.bias
    assert_close(mlp(x), gelu(inner, "exact") @ mlp.down.weight.T + mlp.down.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [GLU, HalfGLU, MLP])
def test_channel_mixers_drop_out_in_training_only(make):
    layer = make(D, dropout=0.5)
    x = noise(20, D, dtype=torch.float32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_mlp_names_an_impossible_option():
    with pytest.raises(OptionError, match="expand=0"):
        MLP(D, expand=0)


# --- encoders and positions ---


def test_token_encoder_looks_up():
    encoder = TokenEncoder(D, vocab_size=5)
    tokens = torch.tensor([[0, 4, 4], [1, 2, 3]])
    assert torch.equal(encoder(tokens), encoder.embedding.weight[tokens])
    assert TokenEncoder(1000, vocab_size=50).embedding.weight.std().item() == pytest.approx(1, rel=0.02)


def test_linear_encoder_maps_channels():
    encoder = LinearEncoder(D, d_input=3)
    x = noise(2, 5, 3, dtype=torch.float32)
    assert_close(encoder(x), x @ encoder.linear.weight.T + encoder.linear.bias)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TokenEncoder(D, vocab_size=0), "vocab_size"),
        (lambda: LinearEncoder(D, d_input=0), "d_input"),
        (lambda: PooledHead(D, d_output=1, pool="max"), "pool"),
    ],
)
def test_ends_name_impossible_options(make, name):
    with pytest.raises(OptionError) as caught:
        make()
    assert caught.value.name == name


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_sinusoidal_positions_are_those_of_the_transformer(width):
    found = SinusoidalPositions(width)(torch.tensor([0, 1, 5, 1000]))
    for row, position in enumerate((0, 1, 5, 1000)):
        for j in range(width):
            angle = position / 10_000 ** (2 * (j // 2) / width)
            assert found[row, j].item() == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=2e-4)
    assert torch.equal(SinusoidalPositions(width)(torch.tensor([[0, 1], [5, 1000]])).flatten(0, 1), found)
    assert not SinusoidalPositions(width).state_dict()


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal", "rotary"])
def test_positions_are_added_to_the_input(positions):
    class Nothing(Running):
        def __init__(self, d_model):
            super().__init__(d_model)
            self.rotary = RotaryPositions()

        def forward(self, x, mask=None):
            return 0 * x

    backbone = Backbone(
        D,
        depth=1,
        mixer=Nothing,
        channel_mixer=lambda d: nn.Identity(),
        norm="none",
        positions=positions,
        seq_len=6,
    )
    x = noise(2, 6, D, dtype=torch.float32)
    added = backbone(x) - x
    if positions in ("none", "rotary"):
        assert (added == 0).all()
        return
    expected = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}[positions]
    assert isinstance(backbone.positions, expected)
    assert_close(added, backbone.positions(torch.arange(6)).expand(2, -1, -1))
    assert added[0].unique(dim=0).shape[0] == 6
    assert backbone(x.bfloat16()).dtype == torch.bfloat16


def test_learned_positions_are_small_and_end_somewhere():
    positions = LearnedPositions(1000, seq_len=20)
    assert positions.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    backbone = Backbone(D, depth=1, mixer=Running, channel_mixer=GLU, positions="learned", seq_len=4).eval()
    x = noise(1, 5, D, dtype=torch.float32)
    _, state = backbone.prefill(x[:, :4])
    calls = (
        lambda: backbone(x),
        lambda: backbone.prefill(x),
        lambda: backbone.step(x[:, 4], state),
        lambda: backbone.step_(x[:, 4], state),
        lambda: backbone.prefill(x[:, 4:], state=state),
    )
    for call in calls:
        with pytest.raises(OptionError, match="seq_len=4"):
            call()
    _, state = backbone.prefill(x[:, :4], right_padded([2], 4))
    assert backbone.prefill(x[:, :2], state=state)[1].position == 4


# --- heads ---


def literal_pool(x: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """Sequence by sequence."""
    rows = []
    for row in range(len(x)):
        real = [x[row, t] for t in range(x.shape[1]) if mask is None or mask[row, t]]
        rows.append({"first": real[0], "last": real[-1], "mean": sum(real) / len(real)}[how])
    return torch.stack(rows)


@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        right_padded([6, 3, 1], 6),
        right_padded([6, 3, 1], 6).flip(1),
        torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool(),
    ],
    ids=["whole", "right", "left", "holes"],
)
def test_pooling_is_over_real_positions(how, mask):
    x = noise(3, 6, D)
    expected = literal_pool(x, mask, how)
    assert_close(pooled(x, mask, how), expected, rtol=0, atol=1e-12)
    if mask is None:
        return
    for bad in (torch.inf, -torch.inf, torch.nan):
        spoilt = x.masked_fill(~mask.unsqueeze(-1), bad).requires_grad_()
        y = pooled(spoilt, mask, how)
        assert_close(y, expected, rtol=0, atol=1e-12)
        y.sum().backward()
        assert (spoilt.grad[~mask] == 0).all()
        assert spoilt.grad.isfinite().all()


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_pooled_head_is_linear_behind_the_pool(pool):
    head = PooledHead(D, d_output=3, pool=pool).double()
    x, mask = noise(3, 6, D), right_padded([6, 3, 1], 6)
    expected = F.linear(literal_pool(x, mask, pool), head.linear.weight, head.linear.bias)
    assert_close(head(x, mask), expected, rtol=0, atol=1e-12)


def test_step_head_maps_every_step():
    head = StepHead(D, d_output=3).double()
    x = noise(2, 6, D)
    assert_close(head(x, right_padded([6, 3], 6)), F.linear(x, head.linear.weight, head.linear.bias))


def test_sequence_model_hands_the_mask_on():
    backbone = Backbone(D, depth=1, mixer=Running, channel_mixer=GLU).double()
    model = SequenceModel(LinearEncoder(D, d_input=2).double(), backbone, PooledHead(D, d_output=3).double())
    inputs, mask = noise(2, 5, 2), right_padded([5, 2], 5)
    expected = model.head(model.backbone(model.encoder(inputs), mask), mask)
    assert torch.equal(model(inputs, mask), expected)
    assert not torch.allclose(model(inputs), expected)
