"""Every mixer in its form for CPUs and in that for other devices, both on a CPU: the same outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stu.ops import forms
from tests.models import mixer_cases

D, SEQ_LEN = 8, 300
FORMS = ("cpu", "cuda")


def computed(mixer: Any, x: Tensor, mask: Tensor | None, form: str) -> list[Tensor]:
    """Output and gradients, of padding neither."""
    x = x.clone().requires_grad_()
    with forms.taken_for(form):
        y = mixer(x, mask)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        kept = (y * weight) if mask is None else (y * weight)[mask]
        return [kept.detach(), *torch.autograd.grad(kept.sum(), (x, *mixer.parameters()))]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("case", mixer_cases(), ids=str)
def test_both_forms_compute_the_same(case: Any, dtype: torch.dtype, tolerance: float, padded: bool):
    mixer = case.random(d_model=D, seq_len=SEQ_LEN, dtype=dtype)
    for length in (1, 2, 65, SEQ_LEN):
        x, mask = torch.randn(2, length, D, dtype=dtype), None
        if padded:
            mask = torch.arange(length) < torch.tensor([length, (length + 1) // 2])[:, None]
        for ours, theirs in zip(*(computed(mixer, x, mask, form) for form in FORMS), strict=True):
            scale = max(theirs.abs().max().item(), 1e-2)
            assert (ours - theirs).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("case", mixer_cases(), ids=str)
def test_both_forms_take_a_batch_of_no_sequence(case: Any):
    mixer = case.random(d_model=D, seq_len=SEQ_LEN, dtype=torch.float32)
    for form in FORMS:
        outputs = computed(mixer, torch.randn(0, 70, D), None, form)
        assert outputs[0].shape == (0, 70, D)
        assert not any(gradient.any() for gradient in outputs[2:])


@pytest.mark.parametrize("case", mixer_cases(), ids=str)
def test_little_memory_changes_nothing(case: Any):
    mixer, x = case.random(d_model=D, seq_len=SEQ_LEN, dtype=torch.float64), torch.randn(2, 130, D).double()
    whole = computed(mixer, x, None, "cuda")
    with forms.device_memory(1 << 14):
        for found, expected in zip(computed(mixer, x, None, "cuda"), whole, strict=True):
            assert (found - expected).abs().max() <= 1e-11 * max(expected.abs().max().item(), 1e-2)
