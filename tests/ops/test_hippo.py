"""HiPPO-LegS and the initialisations of diagonal state spaces: definitions, properties and golden numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre
from torch.testing import assert_close

from stu.errors import OptionError
from stu.ops.hippo import clipped_input, diagonal_init, hippo_legs, nplr_legs
from tests.golden import cases

SIZES = (1, 2, 3, 5, 16, 64, 256)


def in_phase_but_for_signs(actual, golden, atol):
    """Equal up to one sign for each eigenvector, the last axis: LAPACK makes first entries real, of either sign."""
    overlap = (actual.conj() * golden).real
    sign = (overlap.sum(0) if golden.ndim == 2 else overlap).sgn()
    assert_close(actual * sign, golden, rtol=0, atol=atol)


# --- HiPPO-LegS ---


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 3.0])
def test_the_impulse_response_of_legs_is_a_legendre_polynomial(t):
    """(e^{tA} B)_n = √(2n+1) e^{−t} P_n(2e^{−t} − 1): A and B are made for these."""
    A, B = hippo_legs(8)
    degree = np.arange(8)
    expected = np.sqrt(2 * degree + 1) * math.exp(-t) * eval_legendre(degree, 2 * math.exp(-t) - 1)
    assert_close(torch.matrix_exp(t * A) @ B, torch.from_numpy(expected), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_the_normal_plus_low_rank_form_is_the_same_system(size):
    A, B = hippo_legs(size)
    eigenvalues, P, B_modes, V = nplr_legs(size)
    scale = A.abs().max().item()
    assert_close(V.mH @ V, torch.eye(size, dtype=V.dtype), rtol=0, atol=1e-13 * size)
    rebuilt = V @ (torch.diag(eigenvalues) - torch.outer(P, P.conj())) @ V.mH
    assert_close(rebuilt, A.to(V), rtol=0, atol=1e-13 * scale)
    assert_close(V @ B_modes, B.to(V), rtol=0, atol=1e-12 * scale)
    assert_close(B_modes, math.sqrt(2) * P, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("size", SIZES)
def test_eigenvalues_come_in_conjugate_pairs_from_both_ends(size):
    eigenvalues, P, _, V = nplr_legs(size)
    assert (eigenvalues.real == -0.5).all()
    assert (eigenvalues.imag.diff() > 0).all()
    assert (eigenvalues.imag[: size // 2] < 0).all()
    tolerance = {"rtol": 0, "atol": 1e-12 * size**2}
    assert_close(eigenvalues.flip(0), eigenvalues.conj().resolve_conj(), **tolerance)
    assert_close(P.flip(0), P.conj().resolve_conj(), **tolerance)
    assert_close(V[0].imag, torch.zeros(size).double(), rtol=0, atol=1e-15)
    assert (V[0].real > 0).all()


# --- diagonal initialisations ---


def test_closed_forms_of_diagonal_initialisations():
    modes = {"lin": [-0.5, -0.5 - 1j * math.pi], "inv": [-0.5 - 12j / math.pi, -0.5 - 1j * (4 / math.pi) * (4 / 3 - 1)]}
    for init, expected in modes.items():
        A, B = diagonal_init(init, 4)
        assert_close(A, torch.tensor(expected, dtype=torch.complex128), rtol=0, atol=1e-15)
        assert (B == 1).all()
    with pytest.raises(OptionError, match="init=foo: must be legs, inv, lin or dfout"):
        diagonal_init("foo", 4)


def test_clipping_touches_imaginary_parts_beyond_two_only():
    B = torch.tensor([3 + 5j, -3 - 5j, 1 + 2j, -9 + 0.5j], dtype=torch.complex128)
    assert clipped_input(B).tolist() == [3 + 2j, -3 - 2j, 1 + 2j, -9 + 0.5j]


# --- golden numbers ---


@pytest.mark.parametrize("name", cases("s4_dplr", r"(legs\d+)__Lambda"))
def test_legs_against_golden_numbers(golden, name):
    arrays = golden("s4_dplr")
    size = len(arrays[f"{name}__B_hippo"])
    half = size // 2
    A, B = hippo_legs(size)
    assert_close(A, arrays[f"{name}__A_hippo"], rtol=1e-14, atol=0)
    assert_close(B, arrays[f"{name}__B_hippo"], rtol=1e-14, atol=0)
    assert_close(B / math.sqrt(2), arrays[f"{name}__P_real"], rtol=1e-14, atol=0)
    eigenvalues, P, B_modes, V = (part[..., :half] for part in nplr_legs(size))
    assert_close(eigenvalues, arrays[f"{name}__Lambda"], rtol=0, atol=1e-11)
    assert_close(P.abs(), arrays[f"{name}__absP"], rtol=0, atol=1e-11)
    assert_close(B_modes.abs(), arrays[f"{name}__absB"], rtol=0, atol=1e-11)
    assert_close(P.conj() * B_modes, arrays[f"{name}__conjP_B"], rtol=0, atol=1e-10)
    in_phase_but_for_signs(P, arrays[f"{name}__P"], 1e-11)
    in_phase_but_for_signs(B_modes, arrays[f"{name}__B"], 1e-11)
    in_phase_but_for_signs(clipped_input(B_modes), arrays[f"{name}__B_clipped"], 1e-11)
    if f"{name}__V" in arrays:
        in_phase_but_for_signs(V, arrays[f"{name}__V"], 1e-12)


@pytest.mark.parametrize(("case", "init"), cases("s4d", r"(\w+)__(\w+)__A_init"))
def test_diagonal_initialisations_against_golden_numbers(golden, case, init):
    arrays = golden("s4d")
    golden_A, golden_B = arrays[f"{case}__{init}__A_init"], arrays[f"{case}__{init}__B_init"]
    A, B = diagonal_init(init, 2 * golden_A.shape[1])
    for channel in range(len(golden_A)):
        assert_close(A, golden_A[channel], rtol=0, atol=1e-11)
        in_phase_but_for_signs(B, golden_B[channel], 1e-11)


@pytest.mark.parametrize("name", cases("s5", r"(init_J\d+_N\d+)__A_hippo"))
def test_blocks_of_hippo_against_golden_numbers(golden, name):
    arrays = golden("s5")
    golden_V = arrays[f"{name}__block_V_half"]
    size, half = golden_V.shape
    eigenvalues, _, _, V = nplr_legs(size)
    assert_close(hippo_legs(size)[0], arrays[f"{name}__A_hippo"], rtol=1e-13, atol=0)
    assert_close(eigenvalues, arrays[f"{name}__block_Lambda_full"], rtol=0, atol=1e-11)
    in_phase_but_for_signs(V[:, :half], golden_V, 1e-12)
