"""Constants are made once: a second pass makes no tensor from numbers of the host, and reads none back from the device.

On a GPU each of the two would wait for the device. The profiler sees them on a CPU, too, also inside of operators;
copies to the host, as of the lengths of padded sequences for PyTorch's LSTM and GRU, it cannot.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from stu.cli.layers import of_one_mixer
from stu.heads import PooledHead, TwoTowerHead
from stu.ops import long_convolution
from tests.models import MODELS, small_backbone

WAITS = ("aten::lift_fresh", "aten::item", "aten::is_nonzero", "aten::_local_scalar_dense", "aten::nonzero")
# What LAPACK checks, for which a GPU need not be waited for.
HARMLESS = {"s4": {"aten::item", "aten::_local_scalar_dense"}}


class Whole(nn.Module):
    """A backbone with heads."""

    def __init__(self, model: str, causal: bool) -> None:
        super().__init__()
        shallow = {"depth": 1} if model in of_one_mixer() else {}
        self.backbone = small_backbone(model, seq_len=40, causal=causal, **shallow)
        self.heads = nn.ModuleList(PooledHead(8, d_output=2, pool=pool) for pool in ("mean", "first", "last"))
        self.heads.append(TwoTowerHead(8, d_output=2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.backbone(x, mask)
        return torch.stack([head(y, mask).sum() for head in self.heads]).sum()


def waits(model: nn.Module, mask: Tensor | None) -> set[str]:
    """What of `WAITS` a second pass, forward and backward, does."""
    x = torch.randn(2, 30, 8)
    model(x, mask).backward()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(x, mask).backward()
    return {event.name for event in found.events()} & set(WAITS)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize("model", MODELS)
def test_a_second_pass_makes_no_constants(model: str, causal: bool, masked: bool):
    mask = torch.arange(30) < torch.tensor([[30], [12]]) if masked else None
    assert waits(Whole(model, causal), mask) <= HARMLESS.get(model, set())


@pytest.mark.parametrize("fault", [lambda y: y * torch.tensor(1.0), lambda y: y + 0 * y.real.sum().item()])
def test_they_are_seen_inside_of_an_operator(fault: Callable[[Tensor], Tensor]):
    plan = long_convolution.at_least_float32
    with mock.patch.object(long_convolution, "at_least_float32", lambda *inputs: (fault(inputs[0]), plan(*inputs))[1]):
        assert waits(Whole("stu_t", causal=True), None)
