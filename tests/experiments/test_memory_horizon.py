"""How far models remember: the tasks, sizes and climbs of the study, and its quick command."""

import json

import pytest
import torch
from torch import Tensor, nn

from data.memory.induction_heads import TRIGGER
from experiments.memory_horizon import study
from experiments.memory_horizon.study import (
    MODELS,
    SOLVED,
    TASKS,
    Attempt,
    best_attempt,
    build,
    error_on,
    horizon,
)
from experiments.shared.grid import to_json
from experiments.shared.study import FILE, Study

CELL = {
    "task": "copying",
    "model": "lstm",
    "seed": 0,
    "lengths": [16, 32, 64],
    "lrs": [3, 1, 2],
    "steps": 3,
    "batch_size": 2,
}


@pytest.mark.slow
def test_all_models_are_about_as_large():
    for task in TASKS:
        sizes = [sum(p.numel() for p in build(task, model, 16, train=1, seed=0)[1].parameters()) for model in MODELS]
        assert max(sizes) <= 1.06 * min(sizes)
        assert 14_000 < min(sizes) < max(sizes) < 16_000


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_at_every_length(task: str, model: str):
    """Without looking ahead, and with a gradient for every parameter."""
    built, network = build(task, model, 33, train=4, seed=0)
    assert built.causal
    assert network.backbone.causal
    inputs, targets = study.batch_of(built, "train", range(4))
    built.loss(*study.scored(built, network(inputs), targets)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_seed_draws_data_and_model():
    def drawn(seed: int) -> list[Tensor]:
        task, model = build("adding", "lru", 16, train=4, seed=seed)
        return [*study.batch_of(task, "train", range(4)), *model.parameters()]

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert not any(map(torch.equal, drawn(1)[:2], drawn(2)[:2]))


class Oracle(nn.Module):
    """Right in all but every `wrong`-th sequence of induction heads."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, inputs: Tensor) -> Tensor:
        place = (inputs == TRIGGER).int().argmax(1)
        answer = inputs.gather(1, place[:, None] + 1)[:, 0]
        answer[:: self.wrong] = TRIGGER
        logits = torch.zeros(*inputs.shape, 8)
        logits[range(len(inputs)), -1, answer] = 1.0
        return logits


@pytest.mark.parametrize("wrong", [2, 100])
def test_the_error_is_the_share_of_wrong_answers(wrong: int):
    task, _ = build("induction_heads", "lstm", 16, train=1, seed=0)
    assert error_on(task, "test", Oracle(wrong)) == pytest.approx(1 / wrong)


def test_the_error_of_adding_is_the_mean_square():
    class One(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs[..., 0] * inputs[..., 1]).sum(1, keepdim=True) + 0.1

    task, _ = build("adding", "lstm", 16, train=1, seed=0)
    assert error_on(task, "val", One()) == pytest.approx(0.01, rel=1e-4)


def result(validation: float, test: float, lr: float = 0.0) -> Attempt:
    return Attempt(validation, test, lr, 8, 15_000)


def test_the_first_rate_that_solves_is_the_last(monkeypatch: pytest.MonkeyPatch):
    errors = {3: 0.2, 1: SOLVED, 2: 0.0}
    monkeypatch.setattr(study, "attempt", lambda cell, length, lr: result(errors[lr], 0.5, lr))
    assert best_attempt(CELL, 16).lr == 1
    errors[1] = 0.1
    errors[2] = 0.05
    assert best_attempt(CELL, 16).lr == 2
    errors[2] = 0.3
    assert best_attempt(CELL, 16).lr == 1


@pytest.mark.parametrize(
    ("errors", "climbed", "expected"),
    [
        ([0.0, 0.005, 0.01], 3, 64),
        ([0.0, 0.02, 0.0], 2, 16),
        ([float("inf"), 0, 0], 1, 0),
        ([float("nan"), 0, 0], 1, 0),
    ],
)
def test_a_climb_ends_where_a_test_fails(monkeypatch: pytest.MonkeyPatch, errors: list, climbed: int, expected: int):
    by_length = dict(zip(CELL["lengths"], errors, strict=True))
    monkeypatch.setattr(study, "best_attempt", lambda cell, length: result(0.0, by_length[length]))
    found = to_json(study.work(CELL))
    assert len(found["test_error"]) == len(found["lr"]) == climbed
    assert horizon({**CELL, **found}) == expected


@pytest.mark.slow
def test_a_short_task_is_solved():
    """The trainer, the tasks and the errors fit together."""
    cell = {**CELL, "model": "s4d", "lengths": [12], "lrs": [0.005], "steps": 150, "batch_size": 16}
    found = study.work(cell)
    assert horizon({**cell, **found}) == 12
    assert found["sequences"][0] < 150 * 16


def test_the_table_and_the_figure_show_all_seeds(tmp_path):
    from matplotlib.figure import Figure

    rows = [
        {"task": "adding", "model": model, "lengths": [16, 32], "test_error": errors, "parameters": [size]}
        for model, size, climbs in (("stu", 1500, [[0, 0], [0.5], [0, 0.3]]), ("lru", 1400, [[0.0, 0.0]] * 3))
        for errors in climbs
    ]
    settings = {"models": ["stu", "lru"], "lengths": [16, 32]}
    about = {"command": "c", "cell_seconds": 60, "date": "2000-01-01", "commit": "abc"}
    about |= {"machine": {"device": "d"}, "versions": {"torch": "2"}}
    results = {"summary": study.summarize(rows), "settings": settings, **about}
    table = study.report(results)
    assert "| `stu` | 16 (< 16, 16, ≥ 32) | 1,500 to 1,500 |" in table
    assert "| `lru` | ≥ 32 | 1,400 to 1,400 |" in table
    figure = Figure()
    study.draw(results, figure)
    [axes] = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[8, 16, 32], [32, 32, 32]]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([16, 32])


@pytest.mark.slow
def test_the_command_runs_in_small(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STU_RUNS", str(tmp_path / "runs"))
    assert Study(study).main(["--quick", "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / FILE).read_text(encoding="utf-8"))
    assert len(results["rows"]) == 3 * 2
    assert (tmp_path / "out" / "memory_horizon.png").exists()


def test_its_cells_are_distinct():
    cells = [json.dumps(cell) for cell in study.cells(study.SETTINGS)]
    assert len(set(cells)) == len(cells) == 3 * 7 * 3
