"""Spectral filters against exact arithmetic, and what holds for eigenpairs at any length."""

import functools
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from torch import Tensor

from stu.errors import OptionError
from stu.ops import filter_store, filters
from stu.ops.filters import hankel_matrix, spectral_filters
from tests.golden import cases

KINDS = ("standard", "L")
kinds = pytest.mark.parametrize("hankel", KINDS)
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where files of filters go."""
    monkeypatch.setenv("STU_CACHE", str(tmp_path))
    return tmp_path / "filters"


@pytest.fixture
def stored(folder, monkeypatch):
    """Keep all filters in files, and return some as a new process would get them: computed, or read again."""
    monkeypatch.setattr(filter_store, "STORED", 0)
    computed = []
    compute = functools.cache(filters._computed)  # the same whenever it is asked for, which other tests show
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(filters, "_computed", lambda *key: computed.append(key) or compute(*key))

    def filters_of_new_process(*key) -> tuple[tuple[Tensor, Tensor], bool]:
        filters._eigenpairs.cache_clear()
        count = len(computed)
        return spectral_filters(*key), len(computed) > count

    yield filters_of_new_process
    filters._eigenpairs.cache_clear()


@pytest.fixture
def all_rows(monkeypatch):
    """Decompose the whole matrix, whatever its length."""
    filters._eigenpairs.cache_clear()
    monkeypatch.setattr(filters, "FIRST", 1 << 20)
    yield
    filters._eigenpairs.cache_clear()


def assert_eigenpairs(found: tuple[Tensor, Tensor], values: Tensor, vectors: Tensor) -> None:
    """To rounding: each eigenvalue relative to itself, each filter in its norm."""
    torch.testing.assert_close(found[0], values, rtol=5e-15, atol=0)
    assert (found[1] - vectors).norm(dim=0).max() < 1e-14


def assert_orthonormal(vectors: Tensor) -> None:
    """To rounding: that of long sums in the products of PyTorch is a hundred times larger than that of NumPy's."""
    products = vectors.numpy().T @ vectors.numpy()
    np.testing.assert_allclose(products, np.eye(len(products)), rtol=0, atol=1e-14)


def meaningful(seq_len: int, hankel: str) -> int:
    """How many filters of this length are offered, as the error message says."""
    try:
        spectral_filters(seq_len, seq_len, hankel)
    except OptionError as error:
        return int(re.search(r"in 1 … (\d+);", error.allowed)[1])
    return seq_len


def exact_eigenpairs(seq_len: int, hankel: str) -> tuple[Tensor, Tensor]:
    """All eigenpairs in 60-digit arithmetic, largest first, largest entries positive."""
    with mpmath.workdps(60):
        z = mpmath.matrix(seq_len, seq_len)
        for i in range(1, seq_len + 1):
            for j in range(1, seq_len + 1):
                s = mpmath.mpf(i + j)
                standard = 2 / (s**3 - s)
                other = (1 + (-1) ** (i + j)) * 8 / ((s + 3) * (s - 1) * (s + 1))
                z[i - 1, j - 1] = standard if hankel == "standard" else other
        values, vectors = mpmath.eigsy(z)
        order = sorted(range(seq_len), key=lambda k: -values[k])
        exact = np.array([[float(vectors[i, k]) for k in order] for i in range(seq_len)])
        sign = np.sign(exact[np.abs(exact).argmax(0), np.arange(seq_len)])
        return torch.tensor([float(values[k]) for k in order], dtype=torch.float64), torch.from_numpy(exact * sign)


def hankel_product(hankel: str, vectors: np.ndarray) -> np.ndarray:
    """Z V without Z: z depends on i + j, so that the product is a convolution."""
    length = len(vectors)
    s = np.arange(2, 2 * length + 1, dtype=np.float64)
    z = 2 / (s**3 - s) if hankel == "standard" else np.where(s % 2 == 0, 16 / ((s + 3) * (s - 1) * (s + 1)), 0)
    return fftconvolve(z[:, None], vectors[::-1], axes=0)[length - 1 : 2 * length - 1]


@pytest.mark.parametrize(
    ("kind", "seq_len", "num_filters"), cases("stu_filters", r"hp__(std|L)_L(\d+)_K(\d+)__eig_vals")
)
def test_eigenpairs_equal_exact_ones(kind, seq_len, num_filters, golden):
    name = f"hp__{kind}_L{seq_len}_K{num_filters}__"
    arrays = golden("stu_filters")
    values, vectors = arrays[name + "eig_vals"].flip(0), arrays[name + "eig_vecs"].flip(1)
    found = spectral_filters(int(seq_len), int(num_filters), "standard" if kind == "std" else "L")
    assert_eigenpairs(found, values, vectors)


@kinds
@pytest.mark.parametrize("seq_len", [1, 2, 3, 8, 13, 24])
def test_all_offered_filters_are_exact(seq_len, hankel):
    count = meaningful(seq_len, hankel)
    values, vectors = exact_eigenpairs(seq_len, hankel)
    found = spectral_filters(seq_len, count, hankel)
    assert_eigenpairs(found, values[:count], vectors[:, :count])
    if count < seq_len:
        assert values[count] < filters.SMALLEST * values[0] <= values[count - 1]


@kinds
@pytest.mark.parametrize("seq_len", [1, 2, 3, 31, 64, 127, 500])
def test_filters_are_eigenvectors_in_order(seq_len, hankel):
    count = min(24, meaningful(seq_len, hankel))
    values, vectors = spectral_filters(seq_len, count, hankel)
    assert values.dtype == vectors.dtype == torch.float64
    assert (values.shape, vectors.shape) == ((count,), (seq_len, count))
    z = hankel_matrix(seq_len, hankel)
    assert (z @ vectors - vectors * values).abs().max() < 1e-14
    assert_orthonormal(vectors)
    assert (values[:-1] > values[1:]).all()
    assert values[-1] > 0
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hankel", "seq_len"),
    [("standard", 4097), ("standard", 10007), ("L", 8193), ("standard", 65536), ("L", 65536), ("standard", 131072)],
)
def test_long_filters_are_eigenvectors(hankel, seq_len):
    values, vectors = spectral_filters(seq_len, 24, hankel)
    residual = torch.from_numpy(hankel_product(hankel, vectors.numpy())) - vectors * values
    assert residual.norm(dim=0).max() < 1e-14
    diagonal = 2 * torch.arange(1, seq_len + 1, dtype=torch.float64)
    trace = 2 / (diagonal**3 - diagonal) if hankel == "standard" else 16 / ((diagonal + 3) * (diagonal**2 - 1))
    missing = trace.sum() - values.sum()  # the eigenvalues after the last
    assert -1e-14 < missing < (2 if hankel == "standard" else 4) * values[-1]
    assert (values[:-1] > values[1:]).all()
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("hankel", "seq_len"), [("standard", 257), ("standard", 1000), ("L", 513), pytest.param("L", 2500, marks=SLOW)]
)
def test_a_sample_of_the_rows_stands_for_all(seq_len, hankel, request):
    count = meaningful(seq_len, hankel)
    sampled = spectral_filters(seq_len, count, hankel)
    request.getfixturevalue("all_rows")
    assert meaningful(seq_len, hankel) == count
    found = spectral_filters(seq_len, count, hankel)
    assert not torch.equal(found[1], sampled[1])
    assert_eigenpairs(found, *sampled)


@pytest.mark.parametrize(
    ("hankel", "seq_len"),
    [(hankel, length) for hankel in KINDS for length in (5, 100, 3000)]
    + [pytest.param(hankel, length, marks=SLOW) for hankel in KINDS for length in (511, 4097)]
    + [pytest.param(hankel, 131072, marks=pytest.mark.thorough) for hankel in KINDS],
)
def test_all_offered_filters_are_orthonormal(hankel, seq_len):
    _, vectors = spectral_filters(seq_len, meaningful(seq_len, hankel), hankel)
    assert_orthonormal(vectors)


@pytest.mark.thorough
def test_filters_do_not_depend_on_threads_or_processors():
    """Bit for bit: whatever number of threads BLAS has, and whatever processor it chooses its code for."""
    keys = [(64, 12, "standard"), (300, 20, "L"), (1024, 24, "standard"), (3000, 40, "L"), (9000, 48, "standard")]
    program = f"""
from hashlib import sha256
from stu.ops.filters import spectral_filters
for key in {keys}:
    print([sha256(array.numpy().tobytes()).hexdigest() for array in spectral_filters(*key)])
"""
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    one, two, four = (dict.fromkeys(threads, count) for count in "124")
    variants = [one, four, two | {"OPENBLAS_CORETYPE": "Prescott"}]
    command = [sys.executable, "-c", program]
    found = {subprocess.check_output(command, env={**os.environ, **variant}) for variant in variants}
    assert len(found) == 1


@kinds
def test_row_quadrature_sums_decaying_exponentials(hankel):
    rows = 5000
    index, weight = filters.row_quadrature(rows)
    assert len(index) < rows / 10
    for rate in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 0.0):
        exact = np.exp(-rate * np.arange(rows)).sum()
        assert abs(weight @ np.exp(-rate * index) / exact - 1) < 1e-12


def test_hankel_matrices_are_moments():
    node, weight = np.polynomial.legendre.leggauss(20)
    power = np.arange(9)[:, None] + np.arange(9)
    left, right = (node + 1) / 2, weight / 2  # on [0, 1]
    moments = ((1 - left) ** 2 * right * left ** power[..., None]).sum(-1)
    np.testing.assert_allclose(hankel_matrix(9), moments, rtol=1e-12)
    moments = ((1 - node**2) ** 2 * weight * node ** power[..., None]).sum(-1)
    np.testing.assert_allclose(hankel_matrix(9, "L"), moments, rtol=1e-12, atol=1e-16)


def test_hankel_l_filters_live_on_one_parity():
    _, vectors = spectral_filters(65, 20, "L")
    norms = torch.stack((vectors[::2].norm(dim=0), vectors[1::2].norm(dim=0)))
    assert (norms.min(0).values == 0).all()


@kinds
def test_fewer_filters_are_the_first_of_more(hankel):
    values, vectors = spectral_filters(100, 20, hankel)
    few_values, few_vectors = spectral_filters(100, 7, hankel)
    assert_eigenpairs((few_values, few_vectors), values[:7], vectors[:, :7])


@kinds
def test_filters_come_out_the_same_again(hankel):
    first = spectral_filters(77, 12, hankel)
    filters._eigenpairs.cache_clear()
    second = spectral_filters(77, 12, hankel)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changing_what_was_returned_leaves_the_cache_alone():
    values, vectors = spectral_filters(40, 5)
    before = values.clone(), vectors.clone()
    values.fill_(torch.nan)
    vectors.fill_(torch.nan)
    after = spectral_filters(40, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@kinds
@pytest.mark.parametrize("seq_len", [40, 200, 600])
def test_more_filters_than_float64_can_tell_are_refused(seq_len, hankel):
    count = meaningful(seq_len, hankel)
    values, _ = spectral_filters(seq_len, count, hankel)
    assert values[-1] > filters.SMALLEST * values[0]
    with pytest.raises(OptionError, match=f"num_filters={count + 1}: .*1 … {count};.* {seq_len} ") as caught:
        spectral_filters(seq_len, count + 1, hankel)
    assert caught.value.name == "num_filters"


@pytest.mark.slow
def test_more_filters_than_there_are_take_no_memory():
    with pytest.raises(OptionError, match=r"^num_filters=100000: must be in 1 … \d+; .* length 131072 [^\n]*$"):
        spectral_filters(1 << 17, 100_000)


@pytest.mark.thorough
def test_memory_is_that_of_the_filters():
    """Far from that of the matrix (32 GB) and of its factor (0.25 GB), which is 20 times that of the filters."""
    filters._eigenpairs.cache_clear()
    tracemalloc.start()  # NumPy tells it of its arrays
    try:
        _, vectors = spectral_filters(1 << 16, 24)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * vectors.nbytes


# --- files of filters ---


@kinds
def test_stored_filters_are_the_computed_ones(stored, folder, hankel):
    plain = [torch.from_numpy(array) for array in filters._computed(300, 9, hankel)]
    first, computed = stored(300, 9, hankel)
    assert computed
    again, computed = stored(300, 9, hankel)
    assert not computed
    for found in (first, again):
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    (file,) = folder.iterdir()  # and nothing half written beside it
    assert file.stat().st_size < 8 * (300 * 9 + 9) + 1000


def test_all_that_determines_filters_is_in_the_name_of_their_file(stored, folder, monkeypatch, tmp_path):
    keys = [(40, 5, "standard"), (40, 5, "L"), (40, 6, "standard"), (41, 5, "standard")]
    assert all(stored(*key)[1] for key in keys)
    assert not any(stored(*key)[1] for key in keys)
    changed = tmp_path / "filters.py"
    changed.write_bytes(Path(filters.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(filters, "__file__", str(changed))
    assert all(stored(*key)[1] for key in keys)
    assert len(list(folder.iterdir())) == 2 * len(keys)


@pytest.mark.slow
def test_damaged_files_are_replaced(stored, folder):
    whole, _ = stored(40, 5)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    damaged = [b"", b"PK", b"\x93NUMPY", content[:-1], content[: len(content) // 2], content[1:]]
    for place in range(0, len(content), 7):
        damaged.append(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
    recomputed = 0
    for damage in damaged:
        file.write_bytes(damage)
        found, computed = stored(40, 5)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
        assert not stored(40, 5)[1]  # whole again
        recomputed += computed
    assert recomputed > 0.8 * len(damaged)  # dates and the like may be anything


def test_no_damage_of_a_file_gives_other_filters(monkeypatch, tmp_path):
    """Truncations, emptyings and flipped bits, anywhere in the file."""
    monkeypatch.setenv("STU_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(filter_store, "STORED", 1)
    random, (rows, columns) = np.random.default_rng(0), (40, 5)
    whole = random.standard_normal(columns), random.standard_normal((rows, columns))

    def read():
        return filter_store.stored("x", filters.__file__, (rows, columns), lambda: whole)

    read()
    (file,) = (tmp_path / "filters").iterdir()
    content = file.read_bytes()
    for number in range(60):
        place = int(random.integers(len(content)))
        flipped = content[:place] + bytes([content[place] ^ (1 << int(random.integers(8)))]) + content[place + 1 :]
        file.write_bytes([flipped, flipped, content[:place], content[:place] + bytes(len(content) - place)][number % 4])
        for _ in range(2):
            assert all(np.array_equal(found, right) for found, right in zip(read(), whole, strict=True))
        if number % 4 > 1:
            assert file.read_bytes()[-22:] == content[-22:], "the file is whole again"


@pytest.mark.parametrize(
    "arrays",
    [
        {"eigenvalues": np.ones(5)},
        {"eigenvalues": np.ones(5), "filters": np.ones((41, 5))},
        {"eigenvalues": np.ones(5), "filters": np.ones((40, 4))},
        {"eigenvalues": np.ones(5), "filters": np.ones((40, 5), dtype=np.float32)},
        {"eigenvalues": np.ones(5), "filters": np.full((40, 5), None)},
    ],
)
def test_files_of_something_else_are_replaced(stored, folder, arrays):
    whole, _ = stored(40, 5)
    (file,) = folder.iterdir()
    np.savez(file, **arrays)
    found, computed = stored(40, 5)
    assert computed
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert not stored(40, 5)[1]


def test_filters_need_no_folder(stored, folder, monkeypatch):
    plain = [torch.from_numpy(array) for array in filters._computed(40, 5, "standard")]
    folder.write_text("a file where the folder should be")
    for _ in range(2):
        found, computed = stored(40, 5)
        assert computed
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    monkeypatch.setattr(filters, "__file__", "/nowhere/filters.py")
    assert stored(40, 5)[1]


def test_a_write_that_fails_leaves_nothing(stored, folder, monkeypatch):
    def full(stream, **arrays):
        stream.write(b"PK")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        assert stored(40, 5)[1]
    assert list(folder.iterdir()) == []
    assert stored(40, 5)[1]
    assert not stored(40, 5)[1]


def test_short_filters_make_no_files(folder):
    spectral_filters(4096, 24)
    assert not folder.exists()


def test_long_filters_make_files(folder):
    filters._eigenpairs.cache_clear()
    spectral_filters(filter_store.STORED // 24 + 1, 24)
    (file,) = folder.iterdir()
    assert file.name.startswith(f"standard-{filter_store.STORED // 24 + 1}-24-float64-")


def test_files_lie_in_the_cache_of_the_user(monkeypatch, tmp_path):
    def folder():
        return filter_store._file("L-9-2", filters.__file__).parent

    assert folder() == tmp_path / "filters"
    monkeypatch.delenv("STU_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg/stu/filters"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache/stu/filters"


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 1), "seq_len"),
        ((5, 0), "num_filters"),
        ((5, 6), "num_filters"),
        ((5, 2, "l"), "hankel"),
    ],
)
def test_impossible_options_are_named(arguments, name):
    with pytest.raises(OptionError) as caught:
        spectral_filters(*arguments)
    assert caught.value.name == name
