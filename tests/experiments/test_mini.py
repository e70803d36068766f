"""The board sweep=mini: how it is counted, and the committed results, which are what it promises."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.compare.runs import Row
from experiments.mini import __main__ as command
from experiments.mini import board
from experiments.mini.__main__ import HERE, draw, main
from experiments.mini.board import Result, added, entries, groups, problems, results_of, table
from stu.cli.usage import CONF, options_of

TASKS = [f"task{number}" for number in range(6)]
MODELS = [f"model{number}" for number in range(9)]


def result(task: str, model: str, seed: int, test: float, **changes: Any) -> Result:
    facts = {"status": "finished", "metric": "accuracy", "mode": "max", "trivial": 0.5, "test_sequences": 1000}
    return {"task": task, "model": model, "seed": seed, "test": test, **facts, **changes}


def whole_board(best: float = 0.9, **changes: Any) -> list[Result]:
    """Every model is at the trivial baseline, but for the first one."""
    tests = {MODELS[0]: best}
    return [result(t, m, seed, tests.get(m, 0.5), **changes) for t in TASKS for m in MODELS for seed in (0, 1)]


def test_the_error_is_that_of_the_seeds_and_of_the_test_set():
    [entry] = entries([result("t", "m", 0, 0.7), result("t", "m", 1, 0.8)])
    assert entry.mean == pytest.approx(0.75)
    assert entry.error == pytest.approx(math.sqrt(0.1**2 / 2 / 2 + 0.75 * 0.25 / 1000))
    assert entry.ahead == pytest.approx(0.25 / entry.error)


def test_an_error_that_is_to_fall_is_compared_downwards():
    facts = {"metric": "mse", "mode": "min", "trivial": 1.0}
    [entry] = entries([result("t", "m", 0, 0.2, **facts), result("t", "m", 1, 0.4, **facts)])
    assert entry.ahead == pytest.approx(0.7 / 0.1)
    [worse] = entries([result("t", "m", 0, 1.2, **facts), result("t", "m", 1, 1.4, **facts)])
    assert worse.ahead < 0


def test_one_seed_says_nothing_of_the_error():
    [entry] = entries([result("t", "m", 0, 0.9)])
    assert entry.ahead == 0


def test_a_whole_board_lacks_nothing():
    assert problems(whole_board()) == []


@pytest.mark.parametrize("status", ["failed", "running", "stopped"])
def test_every_run_must_be_finished(status: str):
    *rest, last = whole_board()
    lacking = problems([*rest, {**last, "status": status, "test": None}])
    assert lacking == [
        f"task5, model8, seed 1: {status}",
        "task5: 8 models with 2 seeds, must be at least 9",
    ]


def test_a_task_or_a_seed_that_is_missing_is_named():
    assert problems([r for r in whole_board() if r["task"] != "task3"]) == ["5 tasks, must be at least 6"]
    lacking = problems([r for r in whole_board() if (r["task"], r["model"], r["seed"]) != ("task3", "model4", 1)])
    assert lacking == ["task3: 8 models with 2 seeds, must be at least 9"]


def test_a_task_that_nobody_learns_is_named():
    found = problems(whole_board(0.53))  # two standard errors of a thousand sequences
    assert found == [f"{task}: no model is 3 standard errors better than the best trivial baseline" for task in TASKS]
    assert problems(whole_board(0.56)) == []


def test_the_table_is_sorted_by_mean_rank_and_the_best_is_bold():
    lines = table([*whole_board(), result("z", "model3", 0, 0.25)]).splitlines()
    assert lines[0] == "| model | " + " | ".join(f"`{task}`" for task in [*TASKS, "z"]) + " | mean rank |"
    assert lines[2] == "| `model3` | " + " | ".join(["50.0 ± 0.0"] * 6) + " | **25.0** | 1.9 |"  # ranks 2 and 1
    assert lines[3] == "| `model0` | " + " | ".join(["**90.0 ± 0.0**"] * 6) + " | – | – |"
    assert lines[-1] == "| *best trivial baseline* | " + " | ".join(["50.0"] * 7) + " |  |"


def test_equal_models_share_their_rank():
    lines = table([result("t", model, 0, test) for model, test in (("a", 0.9), ("b", 0.8), ("c", 0.9))]).splitlines()
    assert lines[2:5] == ["| `a` | **90.0** | 1.0 |", "| `c` | **90.0** | 1.0 |", "| `b` | 80.0 | 3.0 |"]


def test_what_an_earlier_board_had_and_what_others_have_is_named():
    results = [one for one in whole_board() if (one["task"], one["model"]) != ("task3", "model4")]
    more = [result("task3", "more", seed, 0.5) for seed in (0, 1)]
    assert problems(added(more, results), whole_board()) == [
        "task3, model4: in the board before, which --add keeps",
        *(f"{task}: no run of {'model4' if task == 'task3' else 'more'}" for task in TASKS),
    ]


def test_runs_that_are_added_replace_those_of_their_model_and_task_alone():
    earlier, new = whole_board(), [result("task0", "model1", 2, 0.8), result("task0", "another", 0, 0.7)]
    found = added(new, earlier)
    assert found == sorted(found, key=lambda one: (one["task"], one["model"], one["seed"]))
    assert [one for one in found if one in new] == [new[1], new[0]]
    assert [one for one in found if one not in new] == [
        one for one in earlier if (one["task"], one["model"]) != ("task0", "model1")
    ]


def test_only_runs_of_the_board_count():
    facts: dict[str, Any] = {
        "name": "r", "seed": 1, "metric": "mse", "mode": "min", "test": 0.1, "best_val": 0.2, "parameters": 5,
        "sequences_per_second": 1.0, "tokens_per_second": 2.0, "peak_memory": 3.0, "seconds": 4.0,
        "status": "finished", "step": 6, "total_steps": 6, "unreadable": (), "path": "p",
        "baselines": {"zero": 1.0, "truth": 0.0}, "trivial_names": ("zero",),
        "config": {"task": {"data": {"test": 50}}, "optimizer": {"lr": 0.01}},
    }  # fmt: skip
    rows = [Row(task="lds", model="stu", experiment=name, **facts) for name in ("mini/lds", "quick", None)]
    rows.append(Row(task="lds", model="stu", experiment="mini/lds", **{**facts, "status": "stopped"}))  # of one seed
    rows.append(Row(task="lds", model="s4", experiment="mini/lds", **{**facts, "test": math.nan}))
    for words in ("pretrain=masked", "trainer.max_steps=600", "~model.mixer.k_u", "logger=csv log_every=2 name=r"):
        rows.append(Row(task="lds", model="s5", experiment="mini/lds", command=f"train.py seed=1 {words}", **facts))
    damaged, other, only = results_of(rows)
    assert (only["task"], only["trivial"], only["lr"], only["test_sequences"]) == ("lds", 1.0, 0.01, 50)
    assert (only["status"], other["model"]) == ("finished", "s5")
    assert (damaged["model"], damaged["status"], damaged["test"]) == ("s4", "damaged", None)


def test_a_part_of_a_board_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    unknown = ("best_val", "parameters", "seconds", "tokens_per_second", "peak_memory", "steps")
    part = whole_board(**dict.fromkeys(unknown))[:-1]
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command, "find", lambda folders: [])
    monkeypatch.setattr(command, "results_of", lambda rows: part)
    (tmp_path / "results.json").write_text("[]")
    assert main([str(tmp_path)]) == 1
    assert (tmp_path / "results.json").read_text() == "[]"
    assert f"{tmp_path} stays as it is; --out FOLDER writes elsewhere" in capsys.readouterr().err
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == len(part)


def test_a_folder_without_the_board_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: FOLDER={tmp_path}: has no run of a preset experiment=mini/… as it is\n"
    assert main([str(tmp_path / "none")]) == 2
    assert not (tmp_path / "out").exists()


# The committed files


TUNED = sorted({name.rpartition("/")[2] for name in options_of("tuned")})


def rate(task: str, model: str) -> float:
    """The learning rate with which a model of the board is trained."""
    return float(yaml.safe_load((CONF / f"tuned/mini/{task}/{model}.yaml").read_text())["optimizer"]["lr"])


def committed(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def test_the_committed_board_lacks_nothing():
    results = committed("results.json")
    assert problems(results) == []
    assert table(results) in (HERE / "README.md").read_text(encoding="utf-8")
    assert {f"{board.PRESETS}{result['task']}" for result in results} <= set(options_of("experiment"))
    assert {result["model"] for result in results} == set(TUNED)
    for one in results:
        assert one["seconds"] < 180, one
        assert one["lr"] == rate(one["task"], one["model"]), one


def test_the_figure_has_what_the_table_has(tmp_path: Path):
    results = committed("results.json")
    drawn = {(group.task, group.model): (group.mean, group.trivial, group.metric) for group in groups(results)}
    assert drawn == {(one.task, one.model): (one.mean, one.trivial, one.metric) for one in entries(results)}
    draw(groups(results), tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_the_rates_are_the_best_of_those_that_were_tried():
    rates = committed("rates.json")
    for task, models in rates["results"].items():
        better = min if rates["modes"][task] == "min" else max
        assert set(models) == set(TUNED)
        for model, found in models.items():
            assert len(found) >= 3, (task, model)
            assert rate(task, model) == float(better(found, key=found.get)), (task, model, found)
    digits, permuted = ([rate(task, model) for model in TUNED] for task in ("digits", "permuted_digits"))
    assert digits == permuted
