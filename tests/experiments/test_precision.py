"""Errors by the precision of products: the emulation of tensor cores, and what mixers make of it."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from experiments.speed.precision import MANTISSA, QUANTITIES, SETTINGS, _products, _rounded, emulated, main
from stu import STU
from tests.versions import newer_than_2_7

CPU = torch.device("cpu")


@torch.library.custom_op("tests::product", mutates_args=())
def hidden_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product inside of an operator, where no dispatch mode looks."""
    return a @ b


def test_inputs_are_rounded_to_the_nearest_and_ties_to_even():
    steps = 1 + torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0, 1.5, 2.5]) * 2**-10
    expected = 1 + torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64) * 2**-10
    assert_close(torch.from_numpy(_rounded(steps, 10)), expected, rtol=0, atol=0)
    x = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    assert torch.equal(torch.from_numpy(_rounded(x, 7)), x.bfloat16().double())


@newer_than_2_7
@pytest.mark.parametrize("bits", [10, 7])
def test_every_product_of_float32_is_emulated_and_no_other(bits: int):
    a, b, c = torch.randn(3, 2, 6, 6)
    products = {
        "mm": lambda a, b, c: a[0] @ b[0],
        "bmm": lambda a, b, c: a @ b,
        "addmm": lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2) / 2 - c[0] / 4,
        "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b) - c,
        "in place": lambda a, b, c: c.clone().baddbmm_(a, b, beta=0),
        "out": lambda a, b, c: torch.mm(a[0], b[0], out=torch.empty(6, 6, dtype=a.dtype)),
        "linear": lambda a, b, c: torch.nn.functional.linear(a, b[0].mT, c[0, 0]) - c[0, 0],
        "einsum": lambda a, b, c: torch.einsum("bij,bjk->bik", a, b),
        "operator": lambda a, b, c: hidden_product(a, b),
        "complex": lambda a, b, c: torch.bmm(torch.complex(a, b), torch.complex(b, c * 0)).imag,
    }
    rounded = [torch.from_numpy(_rounded(x, bits)) for x in (a, b)]
    for name, product in products.items():
        exact, wide = product(*rounded, c.double()), product(a.double(), b.double(), c.double())
        with emulated(bits):
            found, float64 = product(a, b, c), product(a.double(), b.double(), c.double())
        assert_close(found.double(), exact, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert (found - wide).abs().max() > 2 ** -(bits + 3), name
        assert_close(float64, wide, rtol=1e-14, atol=1e-14)
        assert_close(product(a, b, c).double(), wide, rtol=0, atol=1e-5)  # and PyTorch's own is back


def test_at_highest_nothing_is_replaced():
    layer, x = STU(4, seq_len=16, num_filters=4), torch.randn(2, 16, 4)
    with _products("highest", CPU):
        found = layer(x)
    assert_close(found, layer(x), rtol=1e-6, atol=1e-6)


@newer_than_2_7
@pytest.mark.slow
def test_the_command_orders_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "new" / "errors.json"
    assert main(["--models", "stu", "s4", "--length", "48", "--width", "8", "--device", "cpu", "--out", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["emulated"]
    for model, settings in found["errors"].items():
        assert f"| `{model}` | " in capsys.readouterr().out or model == "s4"
        assert tuple(settings) == SETTINGS
        assert all(set(of) == set(QUANTITIES) for of in settings.values())
    stu, s4 = (found["errors"][name] for name in ("stu", "s4"))
    for quantity in QUANTITIES:
        highest, high, medium = (stu[setting][quantity]["rms"] for setting in MANTISSA)
        assert highest < 1e-6 < 50 * highest < high < 1e-3
        assert high < medium < 1e-2
        assert s4["medium"][quantity]["rms"] < 1e-5  # FFTs alone


def test_unknown_models_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["--models", "stuu"]) == 2
    assert capsys.readouterr().err.startswith("error: --models=stuu: no such model; choose from")
