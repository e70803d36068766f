"""The studies: their trainer, grid, files and helpers; what they train; every quick command; README = results."""

import importlib
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from data.systems.system import StateSpace, respond
from experiments.complex_spectra.study import FILTERS, bank
from experiments.lds_sample_efficiency.study import REFERENCES, identified, largest_rise, squared_error
from experiments.preconditioning.study import VARIANTS, Past
from experiments.shared.banks import BANKS, best_error, leading, responses, with_filters
from experiments.shared.fit import checkpoints, fit
from experiments.shared.grid import run_cells, to_json
from experiments.shared.learners import LEARNERS, Problem, error, impulse_response, stu
from experiments.shared.machine import ROOT
from experiments.shared.plots import plot_band, short
from experiments.shared.statistics import at_best_rate, distinct, final_error, median, quartiles, reached, select
from experiments.shared.study import FILE, MARKERS, Study, with_report
from stu.errors import OptionError

STUDIES = {path.parent.name for path in (ROOT / "experiments").glob("*/study.py")} - {"shared"}
OURS = ("complex_spectra", "filter_count", "lds_sample_efficiency", "length_generalization", "preconditioning")
OURS += ("random_filters", "spectral_gap")
CELL = {"seed": 3, "seq_len": 24, "samples": 4, "evaluated": 3, "delta": 1e-4, "spectrum": "signs"}


def study_of(name: str) -> Study:
    return Study(importlib.import_module(f"experiments.{name}.study"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STU_RUNS", str(tmp_path / "runs"))


# --- the trainer ---


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_checkpoints_are_log_spaced_and_end_at_the_last_step(steps):
    counts = checkpoints(steps)
    assert (counts[0], counts[-1]) == (1, steps)
    assert sorted(set(counts)) == counts
    assert steps < 100 or {10, 100} <= set(counts)


def line(index: int, batch: int = 1):
    x = torch.randn(batch, 5, 1, generator=torch.Generator().manual_seed(index))
    return x, 2 * x


def slope_error(module) -> float:
    assert not module.training
    assert not torch.is_grad_enabled()
    return abs(module.weight.item() - 2)


def test_training_learns_and_counts_sequences():
    module, training = nn.Linear(1, 1, bias=False), []

    def loss(prediction, target):
        training.append(module.training)
        return nn.functional.mse_loss(prediction, target)

    curve = fit(module, lambda i: line(i, 3), slope_error, lr=0.1, steps=100, loss=loss)
    assert training == [True] * 100
    assert curve.samples == [3 * count for count in checkpoints(100)]
    assert curve.errors[0] > 0.1 > 0.02 > curve.errors[-1]
    with torch.no_grad():
        assert curve.errors[-1] == slope_error(module.eval())


def test_a_step_is_adam_s():
    module = nn.Linear(1, 1, bias=False)
    before = module.weight.item()
    fit(module, line, lambda _: 0.0, lr=0.25, steps=1)
    assert abs(module.weight.item() - before) == pytest.approx(0.25, rel=1e-3)


def test_the_rate_falls_at_the_end():
    """Adam's steps along a constant gradient are as long as the rate: 1 four times, then 3/4, 1/2 and 1/4."""
    module, weights = nn.Linear(1, 1, bias=False), []

    def sample(index):
        weights.append(module.weight.item())
        return torch.ones(1, 1), torch.zeros(1, 1)

    fit(module, sample, lambda _: 0.0, lr=1.0, steps=8, decay=0.5, loss=lambda prediction, target: prediction.sum())
    assert np.diff(weights) == pytest.approx([-1, -1, -1, -1, -1, -0.75, -0.5], rel=1e-3)


def test_divergence_is_recorded_and_ends_it():
    seen = []

    def sample(index):
        seen.append(index)
        x, y = line(index)
        return x, y * (math.inf if index == 5 else 1)

    curve = fit(nn.Linear(1, 1), sample, lambda _: 1.0, lr=0.1, steps=50)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert curve.samples == checkpoints(50)
    assert curve.errors == [1.0 if count <= 5 else math.inf for count in checkpoints(50)]


def test_an_error_that_is_no_number_is_infinite():
    curve = fit(nn.Linear(1, 1), line, lambda _: math.nan, lr=0.1, steps=10)
    assert curve.errors == [math.inf] * len(checkpoints(10))


def test_training_ends_when_it_is_enough():
    curve = fit(nn.Linear(1, 1, bias=False), line, slope_error, lr=0.1, steps=1000, enough=0.05)
    assert curve.errors[-1] <= 0.05 < curve.errors[-2]
    assert curve.samples[-1] < 1000


# --- the grid ---


def square(cell):
    if cell["x"] == "fails":
        raise RuntimeError("it failed")
    if "log" in cell:
        time.sleep(0.2)
        with Path(cell["log"]).open("a") as log:
            log.write("started\n")
    return {"y": cell["x"] ** 2, "threads": torch.get_num_threads()}


def explode(cell):
    raise AssertionError("was finished before")


CELLS = [{"x": x} for x in (3, 1, 2)]


def test_rows_come_in_the_order_of_the_cells(tmp_path):
    rows = run_cells(square, CELLS, tmp_path / "new" / "journal", 1)
    assert [(row["x"], row["y"], row["threads"]) for row in rows] == [(3, 9, 1), (1, 1, 1), (2, 4, 1)]
    assert all(row["seconds"] >= 0 for row in rows)
    assert run_cells(explode, CELLS[::-1], tmp_path / "new" / "journal", 1) == rows[::-1]  # from the journal


@pytest.mark.thorough
def test_workers_stop_at_an_error_and_lose_nothing(tmp_path):
    journal = tmp_path / "journal"
    slow = [{"x": 101 + i, "log": str(tmp_path / "log")} for i in range(40)]
    with pytest.raises(RuntimeError, match="it failed"):
        run_cells(square, [*CELLS, *slow[:8], {"x": "fails"}, *slow[8:]], journal, 2)
    rows = run_cells(explode, CELLS, journal, 1)
    assert [(row["x"], row["y"], row["threads"]) for row in rows] == [(3, 9, 1), (1, 1, 1), (2, 4, 1)]
    assert len((tmp_path / "log").read_text().splitlines()) < 25


def test_an_interrupted_grid_goes_on(tmp_path):
    journal = tmp_path / "journal"
    with pytest.raises(RuntimeError, match="it failed"):
        run_cells(square, [*CELLS[:2], {"x": "fails"}, CELLS[2]], journal, 1)
    with journal.open("a") as file:
        file.write('{"cell": {"x": 2}, "row": {"x"')  # killed while it wrote
    done = []
    rows = run_cells(lambda cell: done.append(cell["x"]) or square(cell), CELLS, journal, 1)
    assert done == [2]
    assert [row["y"] for row in rows] == [9, 1, 4]
    assert run_cells(explode, CELLS, journal, 1) == rows


def test_equal_cells_are_a_mistake(tmp_path):
    with pytest.raises(AssertionError, match="two cells"):
        run_cells(square, [{"x": 1}, {"x": 1}], tmp_path / "journal", 1)


# --- numbers ---


def test_plain_numbers():
    given = {"a": np.float64(1 / 3), "b": (math.inf, math.nan, 2), 3: np.arange(2), "c": [True, None, "x"]}
    expected = {"a": 0.333333, "b": [None, None, 2], "3": [0, 1], "c": [True, None, "x"]}
    assert json.dumps(to_json(given)) == json.dumps(expected)


def test_quartiles_are_values_and_know_infinity():
    assert quartiles([5, 1, 4, 2, 3]) == [2, 3, 4]
    assert quartiles([1, None, 2, None, 3]) == [2, 3, math.inf]
    assert median([None, None, 1]) == math.inf


def test_rows_are_selected_and_the_best_chosen():
    runs = [(1, 0, 5.0), (1, 1, 6.0), (2, 0, 1.0), (2, 1, None)]
    rows = [{"lr": lr, "seed": seed, "val": val} for lr, seed, val in runs]
    assert select(rows, lr=2, seed=0) == [rows[2]]
    assert distinct(rows, "lr") == [1, 2]
    assert at_best_rate(rows) == rows[2:]  # of two values the median is the lower one
    assert at_best_rate([*rows, {"lr": 2, "seed": 2, "val": None}]) == rows[:2]


def test_what_was_reached_when():
    row = {"samples": [1, 10, 100], "errors": [None, 0.1, 0.2]}
    assert (reached(row, 1.0), reached(row, 0.1), reached(row, 0.05)) == (10, 10, None)
    assert final_error(row) == 0.2
    assert final_error({"errors": [0.1, None]}) == math.inf


def test_short_numbers():
    assert [short(x) for x in (None, 0.012345, 1234.0, 3.0, 1.5e-9)] == ["∞", "0.012", "1,234", "3", "1.5e-09"]


def test_the_rise_of_a_median_curve():
    rows = [{"errors": errors} for errors in ([4, 2, 3, 1], [4, 2, 3, 1], [9, 9, 9, None])]
    assert largest_rise(rows) == 1.5


# --- files ---


def tiny(folder: Path, work=square, **settings) -> Study:
    return Study(
        SimpleNamespace(
            __file__=str(folder / "study.py"),
            SETTINGS={"xs": [1, 2], **settings},
            QUICK={"xs": [1]},
            cells=lambda settings: [{"x": x} for x in settings["xs"]],
            work=work,
            summarize=lambda rows: {"sum": sum(row["y"] for row in rows)},
            report=lambda results: f"The sum is {results['summary']['sum']}.",
            draw=lambda results, figure: figure.subplots().plot([row["y"] for row in results["rows"]]),
        )
    )


def run(study: Study, *arguments: str) -> int:
    return study.main(["--workers", "1", *arguments])


def test_a_run_writes_everything_and_then_starts_over(tmp_path, capsys):
    study = tiny(tmp_path / "squares")
    study.folder.mkdir()
    (study.folder / "README.md").write_text(f"# Squares\n{MARKERS[0]}\nold\n{MARKERS[1]}\nend\n")
    assert run(study) == 0
    results = json.loads((study.folder / FILE).read_text())
    assert (results["study"], results["settings"], results["summary"]) == ("squares", {"xs": [1, 2]}, {"sum": 5})
    assert [row["y"] for row in results["rows"]] == [1, 4]
    assert {"command", "date", "commit", "machine", "versions", "seconds", "cell_seconds"} <= set(results)
    assert {"python", "torch", "numpy", "scipy"} <= set(results["versions"])
    expected = f"# Squares\n{MARKERS[0]}\nThe sum is 5.\n{MARKERS[1]}\nend\n"
    assert (study.folder / "README.md").read_text() == expected
    assert (study.folder / "squares.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "runs/studies").glob("*"))  # the journal is deleted
    assert "The sum is 5." in capsys.readouterr().out


@pytest.mark.slow
def test_results_of_other_settings_are_not_lost(tmp_path, capsys):
    assert run(tiny(tmp_path / "squares")) == 0
    before = (tmp_path / "squares" / FILE).read_text()
    other = tiny(tmp_path / "squares", xs=[5])
    assert run(other) == 2
    assert capsys.readouterr().err.strip().endswith("has results of other settings; --force replaces them")
    assert (tmp_path / "squares" / FILE).read_text() == before
    assert run(tiny(tmp_path / "squares")) == 0  # the same settings
    assert run(other, "--force") == 0
    assert json.loads((tmp_path / "squares" / FILE).read_text())["summary"] == {"sum": 25}


def test_a_quick_run_goes_elsewhere(tmp_path):
    assert run(tiny(tmp_path / "squares"), "--quick") == 0
    assert not (tmp_path / "squares").exists()
    assert json.loads((tmp_path / "runs/studies/squares-quick" / FILE).read_text())["settings"] == {"xs": [1]}


def test_redrawing_runs_nothing(tmp_path, capsys):
    study = tiny(tmp_path / "squares")
    assert run(study, "--redraw") == 2
    assert "has no results.json that can be read" in capsys.readouterr().err
    run(study)
    (study.folder / "squares.png").unlink()
    assert run(tiny(tmp_path / "squares", work=explode), "--redraw") == 0
    assert (study.folder / "squares.png").exists()


def test_without_matplotlib_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(tiny(tmp_path / "squares")) == 0
    assert "no figure: " in capsys.readouterr().err
    assert (tmp_path / "squares" / FILE).exists()


def test_a_readme_without_markers_is_refused():
    with pytest.raises(OptionError, match=r"README\.md"):
        with_report("# Squares\n", "text")


def test_bands_leave_out_what_diverged():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    plot_band(axis, [1, 2, 3], [[1.0, 2.0, None], [3.0, None, None], [2.0, 3.0, None]], label="x")
    assert axis.lines[0].get_ydata()[:2].tolist() == [2, 3]
    assert math.isnan(axis.lines[0].get_ydata()[2])


# --- what is trained ---


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_are_layers_of_about_equal_size(name):
    layer = LEARNERS[name](16, 4)
    inputs = torch.randn(2, 16, 3)
    assert layer(inputs).shape == (2, 16, 3)
    with torch.no_grad():
        changed = inputs.clone()
        changed[:, 8:] += 1
        assert_close(layer(changed)[:, :8], layer(inputs)[:, :8], rtol=0, atol=1e-5)  # causal
    count = sum(parameter.numel() for parameter in LEARNERS[name](256, 25).parameters())
    assert 450 <= count <= (650 if name == "Transformer" else 500)


def test_a_problem_is_its_system():
    problem = Problem(CELL)
    inputs, targets = problem.sample(2)
    assert inputs.shape == targets.shape == (1, 24, 3)
    truth = problem.data.system.impulse_response(24) / problem.data.scale
    np.testing.assert_allclose(respond(truth, inputs.numpy()), targets.numpy(), rtol=0, atol=1e-5)
    zero = error(lambda inputs: torch.zeros_like(inputs), problem.test)
    assert zero == pytest.approx(float(problem.test[1].square().mean()), rel=1e-5)
    assert not torch.equal(problem.val[0], problem.test[0])
    assert (np.abs(problem.data.system.modes) == 1 - 1e-4).all()


def test_a_sector_and_noise_of_a_problem():
    cell = {**CELL, "spectrum": "complex", "sector": 1 / 8, "d_state": 64}
    angles = np.abs(np.angle(Problem(cell).data.system.modes))
    assert np.pi / 9 < angles.max() <= np.pi / 8
    problem, noisy = (Problem({**cell, "seq_len": 500, **noise}) for noise in ({}, {"noise": 0.5}))
    assert (problem.data.system.modes == noisy.data.system.modes).all()
    difference = noisy.test[1] * noisy.data.scale / problem.data.scale - problem.test[1]
    assert difference.std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_past_is_added(variant):
    past, outputs = Past(variant), torch.randn(2, 30, 3)
    if past.learned is not None:
        assert not past(outputs).any()
        torch.nn.init.normal_(past.learned)
    lag, count = torch.zeros(1, 30, 3), VARIANTS[variant]
    lag[:, 4] = 1.0
    response = past(lag)[0]
    assert not response[:5].any()
    assert not response[5 + count :].any()
    if past.learned is not None and past.learned.ndim == 1:
        assert_close(response[5 : 5 + count], past.learned[:, None].expand(-1, 3))


def test_the_impulse_response_of_a_learner_is_what_it_does():
    layer, inputs = LEARNERS["S4D"](24, 4), torch.randn(2, 24, 3)
    expected = layer(inputs).detach().numpy()
    np.testing.assert_allclose(respond(impulse_response(layer, 24), inputs.numpy()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REFERENCES)
def test_references_find_the_system(name):
    problem = Problem({**CELL, "samples": 8})
    response = REFERENCES[name](*problem.arrays("train"), 4)
    assert squared_error(response, problem.arrays("test")) < 1e-8
    found = identified(response, problem)
    assert found["impulse_response_error"] < 1e-4
    assert found["mode_error"] < 1e-3


def test_identification_of_a_wrong_or_broken_response():
    problem = Problem(CELL)
    truth = StateSpace.of(problem.data.system).impulse_response(24) / problem.data.scale
    assert identified(0.5 * truth, problem)["impulse_response_error"] == pytest.approx(0.5)
    assert identified(0.5 * truth, problem)["mode_error"] < 1e-9  # the gain is wrong, not the modes
    assert identified(truth * np.nan, problem) == {"impulse_response_error": np.inf, "mode_error": np.inf}


# --- filters ---


@pytest.mark.parametrize("kind", BANKS)
def test_every_bank_has_as_many_responses(kind):
    bank = responses(kind, seq_len=32, num_filters=5, seed=1)
    assert bank.shape == (32, 13)
    assert bank.dtype == torch.float64
    assert torch.equal(bank[:, 10:], torch.eye(32, 3, dtype=torch.float64))
    assert not bank[:2, :10].any()  # delayed by two steps
    assert torch.linalg.matrix_rank(bank) == 13
    layer = with_filters(stu(32, 5, k_y=0), bank)
    assert torch.equal(layer.bank.filters, bank)
    assert layer(torch.randn(1, 32, 3)).shape == (1, 32, 3)


@pytest.mark.parametrize("kind", [kind for kind in BANKS if kind != "random"])  # others would be drawn
def test_fewer_filters_are_the_first(kind):
    options = {"seq_len": 32, "seed": 1, "recurrence": 2}
    most, fewer = (responses(kind, num_filters=count, **options) for count in (6, 4))
    assert_close(leading(most, 4), fewer, rtol=0, atol=1e-12)


def test_our_hankel_responses_are_the_layer_s():
    for k_y in (0, 2):
        layer = stu(32, 5, k_y=k_y, recurrence="fixed")
        assert_close(responses("Hankel", seq_len=32, num_filters=5, seed=0, recurrence=k_y), layer.bank.filters)


def test_a_dense_eigh_agrees_where_it_has_digits():
    exact, dense = (responses(kind, seq_len=64, num_filters=20, seed=0) for kind in ("Hankel", "Hankel, dense eigh"))
    signs = torch.sign((exact * dense).sum(0))
    difference = (exact - signs * dense).norm(dim=0) / exact.norm(dim=0)
    assert difference[:8].max() < 1e-8
    assert difference[18:20].max() > 1e-3


def test_the_least_error_is_what_no_filter_reaches():
    """Of unit impulses: the energy of the other lags, each as often as it occurs in a sequence."""
    truth = np.random.default_rng(0).standard_normal((20, 2, 3))
    bank = responses("lags", seq_len=20, num_filters=4, seed=0)  # lags 0 … 2 and 3 … 10
    energy = np.arange(20, 0, -1) * np.square(truth).sum((1, 2))
    assert best_error(bank, truth) == pytest.approx(energy[11:].sum() / energy.sum(), rel=1e-10)


def test_the_least_error_of_a_response_within_reach_is_zero():
    bank = responses("Hankel", seq_len=40, num_filters=5, seed=0, recurrence=2)
    truth = np.einsum("lk,koc->loc", bank.numpy(), np.random.default_rng(0).standard_normal((13, 3, 3)))
    assert best_error(bank, truth) < 1e-24


@pytest.mark.parametrize("kind", FILTERS)
def test_banks_of_the_complex_spectra_are_of_one_size(kind):
    found = bank(kind, seq_len=64, num_filters=20, seed=0, sector=1 / 8)
    assert found.shape == (64, 23)
    assert torch.linalg.matrix_rank(found) == 23


# --- the commands and the READMEs ---


QUICKEST = ("complex_spectra", "filter_count", "length_generalization")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICKEST else pytest.param(name, marks=pytest.mark.thorough) for name in OURS]
)
def test_every_study_runs_in_small(name, tmp_path):
    assert study_of(name).main(["--quick", "--workers", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    results = json.loads((tmp_path / FILE).read_text(), parse_constant=pytest.fail)
    assert results["rows"]
    assert study_of(name).definition.report(results)


@pytest.mark.parametrize("name", OURS)
def test_the_cells_of_a_study_are_distinct_and_plain(name):
    definition = study_of(name).definition
    cells = definition.cells(definition.SETTINGS)
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells) > 50
    assert json.loads(json.dumps(cells)) == cells


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_the_readme_is_the_report_of_the_results(name):
    folder, definition = study_of(name).folder, study_of(name).definition
    readme = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder / FILE).read_text(encoding="utf-8"))
    assert results["settings"] == json.loads(json.dumps(definition.SETTINGS)), "not of these settings"
    assert results["summary"] == json.loads(json.dumps(to_json(definition.summarize(results["rows"]))))
    assert with_report(readme, definition.report(results)) == readme
    assert (folder / f"{name}.png").exists()
    assert f"]({name}.png)" in readme


@pytest.mark.parametrize("readme", sorted((ROOT / "experiments").rglob("README.md")), ids=lambda path: path.parent.name)
def test_every_file_a_readme_links_to_exists(readme):
    for path in re.findall(r"\]\(([\w/.-]+)\)", readme.read_text(encoding="utf-8")):
        assert (readme.parent / path).exists(), path
