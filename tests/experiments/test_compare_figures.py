"""Figures of a comparison: the numbers that they show, exactly, and that all of them are written, twice the same."""

import math
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.compare.figures import write
from experiments.compare.figures.data import (
    band,
    bands,
    baselines,
    by_task,
    curve,
    fraction,
    front,
    on_axis,
    ranking,
    short_names,
    spans_decades,
    spread,
)  # fmt: skip
from experiments.compare.groups import Group, grouped
from experiments.compare.history import Curve, History
from experiments.compare.runs import Mode, Row
from experiments.compare.sweeps import Axis
from stu.errors import OptionError
from tests.experiments.rows import row

ROOT = Path(__file__).resolve().parents[2]


def line(steps: Sequence[float], values: Sequence[float]) -> Curve:
    return Curve(np.array(steps), np.array(values, dtype=float))


def group(where: str, *tests: float | None, **other: object) -> Group:
    [made] = grouped([row(f"{where}/{seed}", test=test, seed=seed, **other) for seed, test in enumerate(tests)])
    return made


class TestBands:
    def test_at_the_steps_that_all_cover_by_lines_between(self):
        made = band([line([0, 10, 20], [0.0, 1.0, 3.0]), line([5, 15, 25], [2.0, 4.0, 0.0])])
        assert made.steps.tolist() == [5, 10, 15, 20]
        assert made.low.tolist() == [0.5, 1.0, 2.0, 2.0]
        assert made.mean.tolist() == [1.25, 2.0, 3.0, 2.5]
        assert made.high.tolist() == [2.0, 3.0, 4.0, 3.0]

    def test_of_one_run_and_of_none_in_common(self):
        one = band([line([3], [7.0])])
        assert [part.tolist() for part in one] == [[3.0], [7.0], [7.0], [7.0]]
        assert [len(part) for part in band([line([0, 1], [1, 1]), line([2, 3], [1, 1])])] == [0, 0, 0, 0]

    def test_of_many_steps_are_means_over_pieces(self):
        made = band([line(range(8), [0, 2, 4, 6, 8, 10, 12, 14])], points=2)
        assert made.steps.tolist() == [1.75, 5.25]  # the middles of two pieces
        assert made.mean.tolist() == [3.5, 10.5]  # between means 3 at 1.5 and 11 at 5.5
        gaps = band([line([0, 1, 98, 99], [0, 0, 1, 1])], points=3)
        assert gaps.mean.tolist() == [pytest.approx(x) for x in (16 / 98, 0.5, 82 / 98)]

    def test_of_runs(self, tmp_path: Path):
        for name, values in (("a", (1.0, 3.0)), ("b", (3.0, 5.0))):
            (tmp_path / name).mkdir()
            text = "".join(f"{k},{k},val/mse,{value}\n" for k, value in enumerate(values))
            (tmp_path / name / "metrics.csv").write_text(f"step,epoch,metric,value\n{text}")
        rows = [row(path=str(tmp_path / name)) for name in ("a", "b", "gone")]
        found = bands(rows, ["train/mse", "val/mse"])
        assert list(found) == ["val/mse"]
        assert found["val/mse"].mean.tolist() == [2.0, 4.0]

    def test_a_curve_is_finite_and_each_step_once(self):
        steps, values = ["1", "2", "3", "2", "4", "2"], ["5.0", "1.0", "nan", "2.0", "inf", "9.0"]
        made = curve(History(steps, ["a", "a", "a", "a", "a", "b"], values), "a")
        assert (made.steps.tolist(), made.values.tolist()) == ([1, 2], [5.0, 2.0])
        assert len(curve(History(), "a").steps) == 0
        assert curve(History(["1", "9" * 30], ["a"] * 2, ["1e308", "1.0"]), "a").steps.tolist() == [2**53]


class TestNumbers:
    @pytest.mark.parametrize(("mode", "best"), [("max", [(1, 0.5), (2, 0.7)]), ("min", [(1, 0.4), (3, 0.2)])])
    def test_what_nothing_is_beyond(self, mode: Mode, best: list[tuple[float, float]]):
        points = [(3, 0.2), (2, 0.7), (1, 0.4), (1, 0.5), (3, 0.7), (2, 0.6)]
        assert front(points, mode) == best
        assert front([], mode) == []

    def test_models_in_the_order_of_their_mean_places(self):
        lds = [group("lds/a", 3.0), group("lds/b", 1.0), group("lds/c", 2.0), group("lds/d", None)]
        copying = [group("copying/c", 0.9, mode="max"), group("copying/b", 0.8, mode="max")]
        assert ranking([*lds, *copying]) == ["c", "b", "a"]  # places 0.5 and 0; 0 and 1; 1; d has no result
        assert [[one.model for one in own] for own in by_task([*lds, *copying])] == [["c", "b"], ["b", "c", "a", "d"]]

    def test_metrics_and_data_are_apart(self):
        data = grouped(row(f"lds/stu/{k}", config={"task": {"data": {"noise": k}}}) for k in range(2))
        assert [[one.title for one in own] for own in by_task(data)] == [["lds (noise=0)"], ["lds (noise=1)"]]
        groups = [group("lds/a", 1.0), group("lds/b", 1.0, metric="mae"), group("lds/c", 1.0, metric=None)]
        assert [[one.model for one in own] for own in by_task(groups)] == [["b"], ["a"]]

    @pytest.mark.parametrize(
        ("places", "expected"),
        [
            ([0.5, 0.1, 0.9], [0.5, 0.1, 0.9]),
            ([0.5, 0.5], [0.4, pytest.approx(0.6)]),
            ([0.5, 0.55, 0.5], [pytest.approx(x) for x in (19 / 60, 43 / 60, 31 / 60)]),
            ([], []),
        ],
    )
    def test_labels_give_way(self, places: list[float], expected: list[float]):
        assert spread(places, 0.2) == expected

    def test_labels_are_apart_and_moved_as_little_as_possible(self):
        places = np.random.default_rng(0).uniform(size=12).tolist()
        found = spread(places, 0.1)
        ordered = [found[k] for k in np.argsort(places)]
        assert min(np.diff(ordered)) >= 0.1 - 1e-12
        assert sum(found) == pytest.approx(sum(places))

    def test_baselines(self):
        first = {"baselines": {"zero": 1.0, "fir": 0.5}, "trivial_names": ("zero",)}
        other = {"baselines": {"zero": 2.0}}
        assert baselines(
            [group("lds/a", 0.1, **first), group("lds/b", 0.2, **first), group("lds/c", 0.1, **other)]
        ) == [1, 2]
        assert baselines([group("lds/a", 0.1, baselines={"a": math.nan, "b": 0.3})]) == [0.3]

    def test_places_on_axes(self):
        assert on_axis(Axis("lr", (1.0, 10.0, 100.0), log=True)) == [0.0, pytest.approx(0.5), 1.0]
        assert on_axis(Axis("depth", (1.0, None, 2.0, 5.0))) == [0.0, None, 0.25, 1.0]
        assert on_axis(Axis("model", (1.0, 0.0, 0.0), ("lru", "s4", "stu"))) == [0.5, 0.0, 0.0]
        assert fraction(3, 3, 3) == 0.5

    @pytest.mark.parametrize(
        ("values", "mode", "expected"),
        [
            ([0.01, 1.0], "min", True), ([0.01, math.inf, 1.0, math.nan], "min", True), ([0.2, 1.0], "min", False),
            ([0.0, 1.0], "min", False), ([0.01, 1.0], "max", False), ([math.nan], "min", False),
        ],
    )  # fmt: skip
    def test_errors_of_different_magnitudes(self, values: list[float], mode: Mode, expected: bool):
        assert spans_decades(values, mode) == expected

    def test_names_of_keys(self):
        keys = ["model", "optimizer.lr", "optimizer.groups.ssm.lr", "optimizer.groups.b.lr", "task.data.lr_model"]
        assert list(short_names(keys).values()) == ["model", "optimizer.lr", "ssm.lr", "b.lr", "lr_model"]


def runs(home: Path) -> list[Row]:
    """Two models and two rates, a sweep with a failed and a pruned run."""
    made = []
    for k, model in enumerate(("stu", "new_$_model")):
        for rate in (0.001, 0.01):
            path = home / "lds" / model / f"lr={rate}"
            path.mkdir(parents=True)
            lines = [
                f"{step},1,{split}/mse,{1 + rate + k / step}" for split in ("train", "val") for step in range(1, 9)
            ]
            (path / "metrics.csv").write_text("\n".join(["step,epoch,metric,value", *lines, ""]))
            one = row(
                f"lds/{model}/{path.name}", home=home, test=0.1 + k + rate, sweep="s", parameters=1000 + k,
                config={"optimizer": {"lr": rate}}, baselines={"zero": 2.0},
                command=f"train.py task=lds model={model} optimizer.lr={rate}",
            )  # fmt: skip
            made.append(one)
    made[0] = replace(made[0], status="pruned", test=None)
    made[3] = replace(made[3], status="failed", test=None, best_val=math.nan)
    return made


def size(file: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    return struct.unpack(">II", file.read_bytes()[16:24])


class TestWriting:
    def test_all_figures_twice_the_same(self, tmp_path: Path):
        rows = runs(tmp_path / "runs")
        files = write(grouped(rows), rows, tmp_path / "a")
        assert [file.name for file in files] == [
            "board.png", "curves-lds.png", "costs-lds.png", "sweep-s-lds-parallel.png", "sweep-s-lds-keys.png"
        ]  # fmt: skip
        write(grouped(rows), rows, tmp_path / "b")
        for file in files:
            width, height = size(file)
            assert 600 <= width <= 2000, file.name
            assert 200 <= height <= 1000, file.name
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name

    def test_text_of_a_pdf_is_text(self, tmp_path: Path):
        [board, *_] = write([group("lds/stu", 0.5)], [], tmp_path, ("pdf",))
        content = board.read_bytes()
        assert b"/FontFile2" in content  # TrueType, embedded
        assert not re.search(rb"/Type3|CreationDate", content)

    def test_nothing_to_see(self, tmp_path: Path):
        assert write([], [], tmp_path / "a") == []
        for test in (None, 0.5):  # of no metric
            empty = [row(home=tmp_path, test=test, metric=None, best_val=None)]
            assert write(grouped(empty), empty, tmp_path / "b") == []

    def test_names_that_are_long_and_results_that_are_infinite(self, tmp_path: Path):
        with warnings.catch_warnings(action="error"):
            rows = [
                row(f"lds/{'m' * 100}/a", test=math.inf),
                row("lds/stu/a", test=0.0),
                row("lds/lru/a", test=math.nan),
                *(row(f"lds/s4/{seed}", test=test, seed=seed) for seed, test in enumerate((1e308, -1e308, math.inf))),
            ]
            assert [file.name for file in write(grouped(rows), rows, tmp_path)] == ["board.png", "costs-lds.png"]

    def test_another_format(self, tmp_path: Path):
        for formats in ((), ("png", "gif")):
            with pytest.raises(OptionError, match=r"--format.*png, pdf, svg"):
                write([], [], tmp_path / "a", formats)
        assert not (tmp_path / "a").exists()

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.delitem(sys.modules, "experiments.compare.figures.style", raising=False)
        with pytest.raises(OptionError, match=r'needs matplotlib: pip install "\.\[plot\]"'):
            write([], [], tmp_path)

    def test_nothing_slow_is_imported(self):
        slow = {"torch", "matplotlib", "numpy", "hydra", "optuna"}
        code = f"import sys, experiments.compare.figures; print({slow} & {{*sys.modules}})"
        assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


def test_the_caption_of_the_board_counts_seeds_and_not_runs():
    from matplotlib.text import Text

    from experiments.compare.figures.board import board

    rows = [row(f"lds/stu/{k}", seed=seed, test=0.5) for k, seed in enumerate((0, 0, 1))]
    figure = board(grouped(rows), ["stu"])
    assert figure is not None
    assert any("standard deviations of 2 seeds" in text.get_text() for text in figure.findobj(Text))
