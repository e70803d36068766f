"""What every test runs under: one order, few threads, a fixed seed, and NaN in all memory that nobody wrote."""

import gc
import os
import signal
from collections.abc import Callable, Iterator

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: its spinning threads get in each other's way

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from tests.golden import path

# A shell may have started us, and our children, without the one, and nohup without the other.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)
settings.register_profile("stu", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("stu")


# Modules that take longest, of which a process gets a whole class or all: they start first, longest first.
LONGEST = [
    "mixers.test_transforms", "training.test_e2e", "test_contributing", "experiments.test_speed", "ops.test_transforms",
    "mixers.test_contract", "ops.test_filters", "test_compilation", "conf.test_cli", "conf.test_conf",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no process is left alone with it at the end: these modules, slow tests."""
    place = {f"tests.{name}": number for number, name in enumerate(LONGEST)}

    def key(item: pytest.Item) -> tuple[int, bool]:
        module = getattr(item, "module", None)
        return place.get(getattr(module, "__name__", ""), len(place)), item.get_closest_marker("slow") is None

    items.sort(key=key)


def pytest_collection_finish() -> None:
    """The collector need not look through the libraries again and again; what tests make, it still collects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Filters that tests make do not go to the user's cache."""
    os.environ["STU_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _server_of_processes() -> None:
    """After collection, in which the last import would decide."""
    from tests import runs

    runs.preload()


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One seed per test; under deterministic algorithms `torch.empty` is NaN, so unwritten parameters show."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Load one golden file: array name → tensor (strings are left out)."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(path(name)) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "biufc"}

    return load
