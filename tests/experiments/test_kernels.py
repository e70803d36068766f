"""The trace of a layer: shares of its time by kernels."""

import pytest

from experiments.speed import kernels
from experiments.speed.bench import Bench, Data, Settings
from experiments.speed.candidates import Size, find
from tests.experiments.commands import assert_refused

SMALL = ("--length", "64", "--batch", "2", "--width", "4", "--device", "cpu")


def test_shares_add_up_and_calls_are_per_pass():
    size, settings = Size(64, 2, 4, None), Settings(device="cpu")
    [candidate] = find(["stu:two_sided=false"], causal=True, size=size)
    rows = kernels.kernels(Bench(candidate.node(size), Data.draw(size, settings), settings))
    shares = [share for share, _, _ in rows]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    calls = {name: count for _, count, name in rows}
    assert calls["stu::filter_convolution"] == calls["stu::filter_convolution_backward"] == 1


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert kernels.main([*SMALL, "--models", "stu", "s4d", "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[::3]] == ["stu", "s4d"]
    assert len(lines) == 6
    assert_refused(kernels.main, [*SMALL, "--models", "nope"], "error: ", capsys)
    assert_refused(kernels.main, [*SMALL, "--rows", "0"], "error: --rows=0: must be at least 1", capsys)
