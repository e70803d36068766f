"""The layers and the network against numbers of the public reference code (tests/golden/README.md, or $GOLDEN_DIR).

Cases, sizes and settings are read from the files. The golden parameters are laid out as their sources have them:
m_u [out, in, lag], m_y [out, lag, in], m_phi with rows filter · d_in + in; eigenpairs ascending.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stu.backbone import Backbone, SequenceModel
from stu.channel import GLU
from stu.encoders import LinearEncoder
from stu.heads import PooledHead
from stu.mixers.stu import STU
from stu.norm import BatchNorm
from stu.ops.bank import FilterBank, filter_bank
from stu.ops.convolution import filter_convolution
from stu.ops.filters import spectral_filters
from stu.ops.recurrence import linear_recurrence
from tests.golden import cases, path

TOLERANCE = 1e-10  # absolute, of outputs and gradients; the files were checked to about 1e-14


def assert_equal(actual: Tensor, golden: Tensor, what: str) -> None:
    assert actual.shape == golden.shape, what
    assert_close(actual.detach(), golden, rtol=0, atol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def scaled_filters(arrays: dict[str, Tensor]) -> Tensor:
    """σ_k^{1/4} φ_k of the stored eigenpairs, (L, K)."""
    return arrays["eig_vecs"] * arrays["eig_vals"] ** 0.25


def our_phi(m_phi: Tensor, num_filters: int) -> Tensor:
    """Rows filter · d_in + in → [filter, in, out]."""
    return m_phi.reshape(num_filters, -1, m_phi.shape[1])


def golden_phi(m_phi: Tensor) -> Tensor:
    """And back."""
    return m_phi.reshape(-1, m_phi.shape[2])


def our_u(m_u: Tensor) -> Tensor:
    """[out, in, lag] → [lag, in, out]; its own inverse."""
    return m_u.permute(2, 1, 0)


def our_y(m_y: Tensor) -> Tensor:
    """[out, lag, in] → [lag, in, out]."""
    return m_y.permute(1, 2, 0)


def golden_y(m_y: Tensor) -> Tensor:
    """And back."""
    return m_y.permute(2, 0, 1)


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter of the very shape of `value`."""
    assert parameter.shape == value.shape
    with torch.no_grad():
        parameter.copy_(value)


def stu_layer(arrays: dict[str, Tensor]) -> STU:
    """An STU of the official code (d_in = d_out) with the stored filters; without output lags where m_y is missing."""
    seq_len, num_filters = arrays["eig_vecs"].shape
    width, _, k_u = arrays["m_u"].shape
    k_y = arrays["m_y"].shape[1] if "m_y" in arrays else 0
    layer = STU(
        width, seq_len=seq_len, num_filters=num_filters, two_sided=False, k_u=k_u, k_y=k_y, recurrence="learned"
    ).double()
    layer.bank = FilterBank(filter_bank(scaled_filters(arrays), k_u=k_u))
    assign(layer.m_phi, our_phi(arrays["m_phi"], num_filters))
    assign(layer.m_u, our_u(arrays["m_u"]))
    if layer.m_y is not None:
        assign(layer.m_y, our_y(arrays["m_y"]))
    return layer


@pytest.mark.parametrize(("case", "variant"), cases("stu_layer", r"(.+?)__(ar|noar)__y"))
def test_layer_by_its_functions(case, variant, golden):
    """Rectangular matrices too: one convolution with all fixed responses, then the recurrence."""
    arrays = part(golden("stu_layer"), f"{case}__")
    wanted = part(arrays, f"{variant}__")
    num_filters, k_u = arrays["eig_vecs"].shape[1], arrays["m_u"].shape[2]
    x = arrays["x"].clone().requires_grad_()
    m_phi = arrays["m_phi"].clone().requires_grad_()
    m_u = arrays["m_u"].clone().requires_grad_()
    m_y = (arrays["m_y"] if variant == "ar" else torch.zeros_like(arrays["m_y"])).clone().requires_grad_()
    weight = torch.cat((our_phi(m_phi, num_filters), our_u(m_u)))
    drive = filter_convolution(x, filter_bank(scaled_filters(arrays), k_u=k_u), weight)
    y = linear_recurrence(drive, our_y(m_y))
    assert_equal(y, wanted["y"], "y")
    (y * arrays["loss_w"]).sum().backward()
    for name, variable in {"x": x, "m_phi": m_phi, "m_u": m_u, "m_y": m_y}.items():
        assert_equal(variable.grad, wanted[f"g_{name}"], f"gradient of {name}")


def has_one_width(case: str) -> bool:
    """Whether inputs and outputs are equally wide, as those of the module are."""
    with np.load(path("stu_layer")) as file:
        return file[f"{case}__x"].shape[2] == file[f"{case}__loss_w"].shape[2]


@pytest.mark.parametrize(
    ("case", "variant"), [p for p in cases("stu_layer", r"(.+?)__(ar|noar)__y") if has_one_width(p.values[0])]
)
def test_layer_by_its_module(case, variant, golden):
    arrays = part(golden("stu_layer"), f"{case}__")
    wanted = part(arrays, f"{variant}__")
    if variant == "noar":
        del arrays["m_y"]
    layer = stu_layer(arrays)
    x = arrays["x"].clone().requires_grad_()
    y = layer(x)
    assert_equal(y, wanted["y"], "y")
    (y * arrays["loss_w"]).sum().backward()
    assert_equal(x.grad, wanted["g_x"], "gradient of x")
    assert_equal(golden_phi(layer.m_phi.grad), wanted["g_m_phi"], "gradient of m_phi")
    assert_equal(our_u(layer.m_u.grad), wanted["g_m_u"], "gradient of m_u")
    if layer.m_y is not None:
        assert_equal(golden_y(layer.m_y.grad), wanted["g_m_y"], "gradient of m_y")
    _, state = layer.prefill(x[:, :-1])
    assert_equal(layer.step(x[:, -1], state)[0], wanted["y"][:, -1], "last step")


@pytest.mark.parametrize(("case", "variant"), cases("stu_layer", r"(.+?)__(ar|noar)__y"))
def test_layer_in_float32(case, variant, golden):
    arrays = part(golden("stu_layer"), f"{case}__")
    wanted = part(arrays, f"{variant}__")
    num_filters, k_u = arrays["eig_vecs"].shape[1], arrays["m_u"].shape[2]
    m_y = arrays["m_y"] if variant == "ar" else torch.zeros_like(arrays["m_y"])
    x, m_phi, m_u, m_y = (v.float().requires_grad_() for v in (arrays["x"], arrays["m_phi"], arrays["m_u"], m_y))
    weight = torch.cat((our_phi(m_phi, num_filters), our_u(m_u)))
    y = linear_recurrence(filter_convolution(x, filter_bank(scaled_filters(arrays), k_u=k_u), weight), our_y(m_y))
    (y * arrays["loss_w"].float()).sum().backward()
    got = {"y": y, "g_x": x.grad, "g_m_phi": m_phi.grad, "g_m_u": m_u.grad, "g_m_y": m_y.grad}
    for name, tensor in got.items():
        error = (tensor.double() - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-5, (name, float(error))


@pytest.mark.parametrize("case", cases("stu_layer", r"(.+?)__x_tilde", optional=True))
def test_layer_features(case, golden):
    arrays = part(golden("stu_layer"), f"{case}__")
    x = arrays["x"][:1]
    num_filters, width = arrays["eig_vecs"].shape[1], x.shape[2]
    one_hot = torch.eye(num_filters * width, dtype=torch.float64)  # every feature by itself
    features = filter_convolution(x, filter_bank(scaled_filters(arrays)), our_phi(one_hot, num_filters))
    assert_equal(features, arrays["x_tilde"], "x_tilde")


class Stack:
    """The network of the golden file, and its parameters and statistics under their golden names."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        p = part(arrays, "p__")
        d_input, width = p["embed_w"].shape
        seq_len, num_filters = arrays["eig_vecs"].shape
        k_u, k_y = p["block0_m_u"].shape[2], p["block0_m_y"].shape[1]
        self.model = SequenceModel(
            LinearEncoder(width, d_input=d_input),
            Backbone(
                width,
                depth=sum(name.endswith("_m_phi") for name in p),
                mixer=lambda d: STU(
                    d, seq_len=seq_len, num_filters=num_filters, two_sided=False, k_u=k_u, k_y=k_y, recurrence="learned"
                ),
                channel_mixer=GLU,
                norm="batch",
            ),
            PooledHead(width, d_output=p["head_w"].shape[1]),
        ).double()
        for block in self.model.backbone.blocks:
            block.mixer.bank = FilterBank(filter_bank(scaled_filters(arrays), k_u=k_u))
        statistics = part(arrays, "s__")
        for index, norm in enumerate(self.norms()):
            norm.hidden_mean.copy_(statistics[f"block{index}_bn_mean_hidden"])
            norm.hidden_var.copy_(statistics[f"block{index}_bn_var_hidden"])
            norm.num_batches.copy_(arrays["bn_counter"])
        named = self.parameters()
        assert named.keys() == p.keys()
        assert len(named) == len(list(self.model.parameters()))
        for name, (parameter, ours, _) in named.items():
            assign(parameter, ours(p[name], num_filters) if ours is our_phi else ours(p[name]))

    def norms(self) -> list[BatchNorm]:
        return [block.norm for block in self.model.backbone.blocks]

    def parameters(self) -> dict:
        """Golden name → (parameter, layout from golden to ours, and back)."""

        def linear(name, layer):
            return {
                name + "_w": (layer.weight, Tensor.t, Tensor.t),
                name + "_b": (layer.bias, Tensor.clone, Tensor.clone),
            }

        named = linear("embed", self.model.encoder.linear) | linear("head", self.model.head.linear)
        for index, block in enumerate(self.model.backbone.blocks):
            named |= {
                f"block{index}_bn_scale": (block.norm.weight, Tensor.clone, Tensor.clone),
                f"block{index}_bn_offset": (block.norm.bias, Tensor.clone, Tensor.clone),
                f"block{index}_m_y": (block.mixer.m_y, our_y, golden_y),
                f"block{index}_m_u": (block.mixer.m_u, our_u, our_u),
                f"block{index}_m_phi": (block.mixer.m_phi, our_phi, golden_phi),
            } | linear(f"block{index}_mix", block.channel_mixer.linear)
        return named


@pytest.mark.parametrize("mode", cases("stu_stack", r"logits_(eval|train)"))
def test_stack(mode, golden):
    arrays = golden("stu_stack")
    stack = Stack(arrays)
    stack.model.train(mode == "train")
    x = arrays["x"].clone().requires_grad_()
    logits = stack.model(x)
    assert_equal(logits.unsqueeze(1), arrays[f"logits_{mode}"], "logits")
    (logits.unsqueeze(1) * arrays["loss_w"]).sum().backward()
    wanted = part(arrays, f"g_{mode}__")
    assert_equal(x.grad, wanted.pop("x"), "gradient of x")
    named = stack.parameters()
    assert named.keys() == wanted.keys()
    for name, (parameter, _, golden_layout) in named.items():
        assert_equal(golden_layout(parameter.grad), wanted[name], f"gradient of {name}")

    statistics = part(arrays, "s_new__" if mode == "train" else "s__")
    for index, norm in enumerate(stack.norms()):
        assert norm.num_batches == arrays["bn_counter"] + (mode == "train")
        mean, var = norm._averages()
        for name, value in {
            "mean_hidden": norm.hidden_mean,
            "var_hidden": norm.hidden_var,
            "mean_average": mean,
            "var_average": var,
        }.items():
            assert_equal(value, statistics[f"block{index}_bn_{name}"], f"block {index}, {name}")


@pytest.mark.parametrize(("case", "kind"), cases("stu_two_sided", r"(.+?)__(std|L)__full__y"))
def test_two_sided_layer(case, kind, golden):
    """The purely spectral unit of Flash STU: no lags, no delay; two branches with the standard matrix."""
    arrays = part(golden("stu_two_sided"), f"{case}__")
    phi = arrays[f"{kind}__phi"]
    seq_len, num_filters = phi.shape
    layer = STU(
        arrays["x"].shape[2],
        seq_len=seq_len,
        num_filters=num_filters,
        two_sided=kind == "std",
        k_u=0,
        k_y=0,
        hankel="standard" if kind == "std" else "L",
        delay=0,
    ).double()
    layer.bank = FilterBank(filter_bank(phi, two_sided=kind == "std", delay=0))
    branches = ["plus", "minus"] if kind == "std" else ["plus"]
    assign(layer.m_phi, torch.cat([arrays[f"M_phi_{branch}"] for branch in branches]))
    x = arrays["x"].clone().requires_grad_()
    y = layer(x)
    wanted = part(arrays, f"{kind}__full__")
    assert_equal(y, wanted["y"], "y")
    (y * arrays["loss_w"]).sum().backward()
    assert_equal(x.grad, wanted["g_x"], "gradient of x")
    for branch, grad in zip(branches, layer.m_phi.grad.split(num_filters), strict=True):
        assert_equal(grad, wanted[f"g_M_phi_{branch}"], f"gradient of M_phi_{branch}")


@pytest.mark.parametrize(
    ("case", "kind", "branch"), cases("stu_two_sided", r"(.+?)__(std|L)__U_(plus|minus)", optional=True)
)
def test_two_sided_features(case, kind, branch, golden):
    arrays = part(golden("stu_two_sided"), f"{case}__")
    phi, x = arrays[f"{kind}__phi"], arrays["x"]
    num_filters, width = phi.shape[1], x.shape[2]
    bank = filter_bank(phi, two_sided=True, delay=0)
    bank = bank[:, :num_filters] if branch == "plus" else bank[:, num_filters:]
    one_hot = torch.eye(num_filters * width, dtype=torch.float64)
    features = filter_convolution(x, bank, our_phi(one_hot, num_filters))
    assert_equal(features.unflatten(-1, (num_filters, width)), arrays[f"{kind}__U_{branch}"], f"U_{branch}")


@pytest.mark.parametrize(
    ("kind", "seq_len", "num_filters"), cases("stu_filters", r"f64__(std|L)_L(\d+)_K(\d+)__eig_vals")
)
def test_filters_are_those_of_the_references_as_far_as_float64_eigh_goes(kind, seq_len, num_filters, golden):
    """`eigh` errs by ε·σ_1/σ_k; where it is still right, we agree, signs included."""
    arrays = part(golden("stu_filters"), f"f64__{kind}_L{seq_len}_K{num_filters}__")
    values, vectors = spectral_filters(int(seq_len), int(num_filters), "standard" if kind == "std" else "L")
    eigh = 10 * torch.finfo(torch.float64).eps * values[0] / values
    assert ((arrays["eig_vals"].flip(0) / values - 1).abs() < eigh).all()
    good = eigh < 1e-6
    assert good.any()
    distance = (arrays["eig_vecs"].flip(1) - vectors).norm(dim=0)
    assert (distance[good] < 10 * eigh[good] + 1e-12).all()
