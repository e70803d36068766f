"""Models that are too large are refused while they are built."""

import pytest
import torch
from torch import nn

from stu.training import memory

LAYER = 4 * 4 * (100 * 100 + 100)  # bytes of weights, gradients and two moments of `nn.Linear(100, 100)`


def test_a_model_fits_up_to_the_memory_there_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "memory", lambda: 2 * LAYER)
    with memory.within_memory():
        nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    with pytest.raises(MemoryError, match="training needs over 0 GB, and there are 0 GB"), memory.within_memory():
        nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100), nn.Linear(1, 1))
    nn.Sequential(*(nn.Linear(100, 100) for _ in range(3)))  # outside of it nothing is counted


def test_what_is_refused_has_not_been_written(monkeypatch: pytest.MonkeyPatch):
    """The values of so many parameters are never drawn: their pages would have to exist."""
    monkeypatch.setattr(memory, "memory", lambda: LAYER)
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: pytest.fail("written"))
    with pytest.raises(MemoryError), memory.within_memory():
        nn.Linear(101, 100)


def test_the_memory_of_this_machine_is_counted():
    assert memory.memory() > torch.zeros(1000).nbytes
