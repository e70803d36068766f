"""Compressed spectra of filters against the spectra themselves."""

import copy
import gc
import itertools
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT
from stu.ops import bank
from stu.ops.bank import FilterBank, filter_bank
from stu.ops.convolution import filter_convolution
from stu.ops.filters import spectral_filters
from stu.ops.streaming import streaming_memory

CPU = torch.device("cpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def spectral_bank(seq_len, num_filters, **options):
    eigenvalues, filters = spectral_filters(seq_len, num_filters)
    return filter_bank(eigenvalues**0.25 * filters, **options)


def restored(bands, n):
    """Σ_r basis_r mix_rk, all bands: (F, K) complex; NaN where no band is."""
    spectra = torch.full((n // 2 + 1, bands[0].mix.shape[1]), torch.nan, dtype=torch.complex128)
    for band in bands:
        assert spectra[band.frequencies].isnan().all()  # no frequency belongs to two bands
        spectra[band.frequencies] = torch.complex(*(band.basis.double() @ band.mix.double()))
    return spectra


@dtypes
@pytest.mark.parametrize("n", [1, 2, 3, 60, 63, 64, 65, 200, 1999, 2000, 2400])
def test_no_filter_loses_more_than_the_rounding_of_the_dtype(n, dtype):
    filters = spectral_bank(1000, 16, two_sided=True, k_u=3)
    exact = torch.fft.rfft(filters[: (n + 1) // 2], n=n, dim=0)
    bands = FilterBank(filters).bands(n, dtype, CPU)
    error = (restored(bands, n) - exact).norm(dim=0)
    allowed = 4 if dtype == torch.float32 else 40  # float64: the rounding of the decomposition itself
    assert (error <= allowed * torch.finfo(dtype).eps * exact.norm(dim=0)).all()


def test_few_functions_make_up_the_filters():
    """The ranks that the module's docstring names."""
    for options, expected in (({}, 14), ({"two_sided": True}, 20)):
        filters = spectral_bank(1024, 24, **options)
        bands = FilterBank(filters).bands(2048, torch.float32, CPU)
        mean = sum(len(band.mix) * band.basis.shape[1] for band in bands) / 1025
        assert expected - 0.5 < mean < expected + 0.5
        assert all(len(band.mix) <= filters.shape[1] for band in bands)


def test_filters_of_zeros_stay_zeros():
    filters = torch.zeros(10, 3, dtype=torch.float64)
    filters[:, 1] = 1
    spectra = restored(FilterBank(filters).bands(20, torch.float32, CPU), 20)
    assert torch.equal(spectra[:, [0, 2]], torch.zeros(11, 2, dtype=torch.complex128))
    assert_close(spectra[0, 1].real.item(), 10.0)


def test_random_filters_are_not_compressed_away():
    filters = torch.randn(300, 7, dtype=torch.float64)
    bands = FilterBank(filters).bands(600, torch.float64, CPU)
    assert {len(band.mix) for band in bands} == {7}


def test_bands_are_made_once_and_only_so_many_are_kept(monkeypatch):
    filters = FilterBank(spectral_bank(64, 4))
    assert filters.bands(128, torch.float32, CPU) is filters.bands(128, torch.float32, CPU)
    first = filters.bands(128, torch.float32, CPU)
    monkeypatch.setattr(bank, "CACHED_LENGTHS", 2)
    filters.bands(126, torch.float32, CPU)
    filters.bands(128, torch.float32, CPU)
    filters.bands(120, torch.float32, CPU)
    assert filters.bands(128, torch.float32, CPU) is first  # used last but one
    assert len(filters._spectra) == 2
    monkeypatch.setattr(bank, "CACHED_BYTES", 1)
    filters.spectra(128, torch.float32, CPU)
    assert len(filters._spectra) == 1


def test_threads_that_build_the_same_filters_at_once_share_them():
    with ThreadPoolExecutor(4) as pool:
        for seq_len in range(300, 310):  # of other tests
            layers = list(pool.map(lambda _, seq_len=seq_len: STUT(4, seq_len=seq_len, num_filters=3), range(4)))
            assert len({layer.bank for layer in layers}) == 1
            for layer in layers:
                assert layer(torch.randn(1, 9, 4)).isfinite().all()


def test_threads_may_share_a_bank(monkeypatch):
    monkeypatch.setattr(bank, "CACHED_LENGTHS", 1)
    filters = FilterBank(torch.randn(6, 2, dtype=torch.float64))
    expected = {n: filters.bands(n, torch.float64, CPU)[0].basis.clone() for n in (6, 8, 10)}

    def ask(first):
        for n in itertools.islice(itertools.cycle(expected), first, first + 100):
            assert torch.equal(filters.bands(n, torch.float64, CPU)[0].basis, expected[n])
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as often as can be
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(4)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_is_a_bank_of_its_own(duplicate):
    original = FilterBank(spectral_bank(20, 3))
    other = duplicate(original)
    assert other.name != original.name
    assert FilterBank.of(other.name) is other
    assert torch.equal(other.filters, original.filters)


def test_layers_with_the_same_options_share_a_bank_while_they_live():
    first, second = (STU(4, seq_len=20, num_filters=3) for _ in range(2))
    assert first.bank is second.bank
    assert STU(4, seq_len=20, num_filters=3, delay=1).bank is not first.bank
    name, filters, living = first.bank.name, first.bank.filters, weakref.ref(first.bank)
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert copied.bank is first.bank
    both = STU(4, seq_len=20, num_filters=3, causal=False)
    assert both.bank is both.reverse.bank is first.bank
    del copied, both
    gc.collect()
    assert FilterBank.of(name) is first.bank
    del first, second
    gc.collect()
    assert living() is None
    assert torch.equal(FilterBank.of(name).filters, filters)  # as a saved program asks for it


def test_a_name_of_another_process_is_not_taken_for_one_of_this():
    with pytest.raises(KeyError, match="only spectral filters can be found by a saved program"):
        FilterBank.of("0 of process 1")


def test_a_traced_program_leaves_no_fake_filters_behind():
    plain = FilterBank(spectral_bank(20, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert plain.on(CPU, torch.float32).shape == (20, 3)
        built = bank.spectral_bank(21, 3, "standard", two_sided=True, delay=2)
        streaming_memory(built, "window", CPU, torch.float32)
    assert type(plain.on(CPU, torch.float32)) is torch.Tensor
    assert type(built.filters) is torch.Tensor
    assert type(streaming_memory(built, "window", CPU, torch.float32).filters) is torch.Tensor


@pytest.mark.parametrize("streaming", ["window", "states"])
def test_a_transform_leaves_nothing_of_its_own_behind(streaming):
    """What is made once in a process is first made within one."""
    layer, x = STUT(4, seq_len=513, num_filters=3, streaming=streaming), torch.randn(3, 2, 5, 4)

    def last(x: torch.Tensor) -> torch.Tensor:
        _, state = layer.prefill(x)
        return layer.step(x[:, 0], state)[0].sum()

    found = torch.func.vmap(torch.func.grad(last))(x)
    expected = torch.stack([torch.func.grad(last)(each) for each in x])
    torch.testing.assert_close(found, expected)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(layer.bank.on(CPU, torch.float32))
    x.requires_grad_()
    (plain,) = torch.autograd.grad(sum(last(each) for each in x), x)
    torch.testing.assert_close(plain, expected)


def test_a_bank_of_an_evaluation_can_be_trained_with():
    with torch.inference_mode():
        first = STUT(4, seq_len=22, num_filters=3)
    second = STUT(4, seq_len=22, num_filters=3).double()
    assert second.bank is first.bank
    second(torch.randn(1, 22, 4, dtype=torch.float64)).sum().backward()
    assert second.m_filters.grad.isfinite().all()


@pytest.mark.slow
def test_a_copy_that_is_gone_leaves_the_bank_for_compiled_layers():
    layer, x = STU(4, seq_len=23, num_filters=3), torch.randn(1, 23, 4)
    pickle.loads(pickle.dumps(layer))
    gc.collect()
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager")(x).sum().backward()
    assert STU(4, seq_len=23, num_filters=3)(x).isfinite().all()


@pytest.mark.slow
def test_a_bank_lives_as_long_as_a_graph_needs_it():
    weight = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    filters = FilterBank(spectral_bank(20, 3))
    name = filters.name
    y = filter_convolution(torch.randn(2, 20, 2, dtype=torch.float64), filters, weight)
    del filters
    gc.collect()
    y.sum().backward()
    assert weight.grad is not None
    del y
    gc.collect()
    with pytest.raises(KeyError):
        FilterBank.of(name)
