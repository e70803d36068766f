"""Blocks that are computed again in the backward pass: the same results to the last bit, with less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from stu import recomputation
from stu.backbone import Backbone
from stu.norm import BatchNorm
from tests.distributed import recomputed_and_not
from tests.models import MODELS, small_backbone
from tests.runs import assert_identical

SEQ_LEN, D = 40, 8


def both(model: str, **options: Any) -> tuple[Backbone, Backbone]:
    """A model that recomputes, and the same as it is."""
    models = []
    for recomputes in (True, False):
        torch.manual_seed(1)
        models.append(small_backbone(model, seq_len=SEQ_LEN, checkpoint_blocks=recomputes, **options).train())
    return models[0], models[1]


def trained(model: Backbone, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """All that two training steps leave, and what random number comes next."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    outputs = [model(x, mask) for _ in range(2)]  # whose backward passes come after both, as with two micro-batches
    for y in outputs:
        y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": outputs, "x": x.grad, "p": gradients, "state": model.state_dict(), "next": torch.rand(1)}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_computes_the_same_to_the_last_bit(model: str):
    mask = torch.arange(30) < torch.tensor([[30], [7], [22]])
    again, plain = both(model, dropout=0.25, causal=model not in ("stu", "transformer"), norm="batch")
    x = torch.randn(3, 30, D)
    assert_identical(trained(again, x, mask), trained(plain, x, mask))
    counts = [int(norm.num_batches) for norm in again.modules() if isinstance(norm, BatchNorm)]
    assert set(counts) == {2}


def test_in_lower_precision_too():
    x, (again, plain) = torch.randn(2, 30, D), both("stu", dropout=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(trained(again, x), trained(plain, x))


def test_only_the_inputs_of_blocks_are_kept():
    def kept(model: Backbone) -> int:
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x).sum()
        return size

    x = torch.randn(4, SEQ_LEN, D)
    for depth in (2, 4):
        again, plain = (kept(model) for model in both("stu", depth=depth))
        assert again == depth * x.nbytes
        assert plain > 5 * again


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
def test_a_block_runs_again_only_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch):
    again, plain = both("stu", norm="layer")
    calls = list[int]()
    monkeypatch.setattr("stu.backbone.recomputed", lambda *a: calls.append(1) or recomputation.recomputed(*a))
    x = torch.randn(2, 30, D)
    with torch.no_grad():
        assert torch.equal(again(x), plain(x))
    assert torch.equal(again.eval()(x), plain.eval()(x))
    states = again.prefill(x)[1]
    assert torch.equal(again.step(x[:, 0], states)[0], plain.step(x[:, 0], plain.prefill(x)[1])[0])
    again.train(), plain.train()

    def loss(model: Backbone, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    assert_close(*(grad(loss, argnums=1)(model, dict(model.named_parameters())) for model in (again, plain)))
    assert_close(*(jvp(model, (x,), (x,)) for model in (again, plain)))
    assert_close(*(vmap(lambda one, model=model: model(one[None])[0])(x) for model in (again, plain)))
    assert calls == []
    assert_close(checkpoint(again, x, use_reentrant=False), plain(x))
    assert len(calls) == len(again.blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
def test_compiled_blocks_too():
    x = torch.randn(3, 30, D)
    mask = torch.arange(30) < torch.tensor([[30], [7], [22]])
    again, plain = both("stu_t", depth=1, dropout=0.25, compile=True)
    assert_close(trained(again, x, mask), trained(plain, x, mask))
    assert {int(norm.num_batches) for norm in again.modules() if isinstance(norm, BatchNorm)} == {2}
    torch._dynamo.reset()


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path):
    multiprocessing.start_processes(recomputed_and_not, (str(tmp_path),), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for found, expected in ranks:
        assert_identical(found, expected)
    assert_identical(ranks[0][0], ranks[1][0])  # gradients and statistics are those of both
