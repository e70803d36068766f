"""Sweeps as a comparison sees them: whose jobs runs are, what was varied, on which axes, and how important it was."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.compare.runs import Row
from experiments.compare.sweeps import LEAST, Axis, Sweep, importance, is_logarithmic, sweeps
from tests.experiments.rows import row


def ledger(home: Path, name: str, swept: dict[str, str] | None, jobs: dict[str, str]) -> None:
    """jobs: <task>/<model>/<name> → its words."""
    folder = home / ".sweeps" / name
    folder.mkdir(parents=True)
    if swept is not None:
        (folder / "sweep.yaml").write_text(
            yaml.safe_dump({"command": f"train.py {name}", "swept": swept}, sort_keys=False)
        )
    line = {"title": "", "state": "finished", "reason": ""}
    lines = [json.dumps({**line, "job": words, "run": f"/elsewhere/{where}"}) for where, words in jobs.items()]
    (folder / "jobs.jsonl").write_text("\n".join([*lines, '{"half": ']))


def searched(count: int, mode: str = "min") -> Sweep:
    """Runs whose result the rate decides, the width hardly, and the dropout not at all."""
    rows, settings = [], {}
    for k in range(count):
        lr, width, dropout = 10.0 ** -(k % 5), 2 ** (k // 5 % 4 + 3), (k * 7 % 11) / 11
        loss = (k % 5 - 2) ** 2 + 0.01 * (k // 5 % 4)
        rows.append(row(f"lds/stu/{k}", test=loss if mode == "min" else -loss, mode=mode))
        settings[rows[-1].path] = {"optimizer.lr": lr, "model.d_model": width, "model.dropout": dropout}
    return Sweep("s", "lds", None, ("optimizer.lr", "model.d_model", "model.dropout"), tuple(rows), settings)


class TestWhoseJobsRunsAre:
    def test_by_the_manifest_or_by_a_ledger_that_was_moved(self, tmp_path: Path):
        swept = {"model": "stu,lru", "+optimizer.lr": "tag(log,interval(1e-4,1e-2))", "seed": "0,1"}
        jobs = {f"lds/{model}/x": f"model={model} +optimizer.lr=1e-3 seed=0 name=x" for model in ("stu", "lru")}
        ledger(tmp_path, "a", swept, jobs)
        ledger(tmp_path, "b", swept, jobs)
        config = {"optimizer": {"lr": 0.001}}
        old, new = (
            row("lds/stu/x", home=tmp_path, config=config),
            row("lds/lru/x", home=tmp_path, sweep="a", config=config),
        )
        other, elsewhere = row("lds/stu/y", home=tmp_path), row("lds/stu/x", home=tmp_path / "other")
        found = sweeps([other, old, elsewhere, new])
        assert [(sweep.name, sweep.task, list(sweep.rows)) for sweep in found] == [
            ("a", "lds", [old, new]),
            ("b", "lds", [old, new]),
        ]
        first = found[0]
        assert (first.command, first.keys, first.ledger) == (
            "train.py a", ("model", "optimizer.lr", "seed"), tmp_path / ".sweeps" / "a"
        )  # fmt: skip
        assert first.settings[old.path] == {"model": "stu", "optimizer.lr": 0.001, "seed": 0}
        assert first.logarithmic == {"optimizer.lr"}
        assert first.study is None
        (tmp_path / ".sweeps" / "a" / "optuna.jsonl").touch()
        assert first.study == tmp_path / ".sweeps" / "a" / "optuna.jsonl"

    def test_tasks_are_apart(self):
        rows = [row(f"{task}/stu/x", sweep="both", metric=metric, mode=mode) for task, metric, mode in
                (("lds", "mse", "min"), ("copying", "accuracy", "max"))]  # fmt: skip
        found = [(sweep.task, sweep.metric, sweep.mode, len(sweep.rows)) for sweep in sweeps(rows)]
        assert found == [("copying", "accuracy", "max", 1), ("lds", "mse", "min", 1)]

    def test_other_data_are_another_task(self):
        rows = [row(f"digits/stu/{k}", sweep="s", config={"task": {"permuted": bool(k)}}) for k in range(2)]
        assert [sweep.task for sweep in sweeps(rows)] == ["digits (permuted=false)", "digits (permuted=true)"]

    def test_without_a_ledger_what_differs_between_the_commands_was_swept(self):
        def run(name: str, words: str, **optimizer: Any) -> Row:
            command = f"train.py task=lds {words} log_every=5 name={name}"
            return row(f"lds/stu/{name}", sweep="gone", command=command, config={"optimizer": optimizer})

        rows = [run("x", "optimizer=adamw optimizer.lr=1e-3", lr=0.001), run("y", "optimizer=sgd", lr=0.5)]
        [sweep] = sweeps(rows)
        assert sweep.keys == ("optimizer", "optimizer.lr")
        assert [sweep.settings[one.path] for one in rows] == [
            {"optimizer": "adamw", "optimizer.lr": 0.001},  # the name of a choice; the value of an option
            {"optimizer": "sgd"},  # the rate of the second is not of the sweep
        ]
        damaged = row(sweep="gone", command='train.py "task=lds')
        assert sweeps([damaged])[0].keys == ()

    def test_a_key_under_several_conditions_is_one(self, tmp_path: Path):
        swept = {"model": "s4,s5", "model.mixer.d_state | model=s4": "16,32", "model.mixer.d_state | model=s5": "64"}
        words = shlex.join(["model=s5", "model.mixer.d_state=64"])
        ledger(tmp_path, "a", swept, {"lds/s5/x": words})
        [sweep] = sweeps([row("lds/s5/x", home=tmp_path, config={"model": {"mixer": {"d_state": 64}}})])
        assert sweep.keys == ("model", "model.mixer.d_state")

    def test_no_sweeps(self, tmp_path: Path):
        assert sweeps([]) == sweeps([row(home=tmp_path)]) == []


class TestAxes:
    def test_of_numbers_categories_and_what_only_some_have(self):
        values = [
            {"lr": 0.1, "depth": 1, "norm": "layer", "clip": None, "bias": True, "state": 16, "seed": 0, "only": 3},
            {"lr": 0.01, "depth": 2, "norm": "batch", "clip": 0.5, "bias": False, "seed": 1, "only": 3},
            {"lr": 0.001, "depth": 3, "norm": "batch", "clip": 10, "bias": True, "state": 32, "seed": 2},
        ]
        rows = [row(f"lds/stu/{k}") for k in range(3)]
        settings = {one.path: of for one, of in zip(rows, values, strict=True)}
        assert Sweep("s", "lds", None, tuple(values[0]), tuple(rows), settings).axes == [
            Axis("lr", (0.1, 0.01, 0.001), log=True),
            Axis("depth", (1, 2, 3)),
            Axis("norm", (1, 0, 0), ("batch", "layer")),
            Axis("clip", (2, 0, 1), ("0.5", "10", "null")),
            Axis("bias", (1, 0, 1), ("false", "true")),
            Axis("state", (16, None, 32)),
        ]

    @pytest.mark.parametrize(
        ("numbers", "expected"),
        [
            ([1, 3, 10], True), ([16, 32, 64], True), ([1e-4, 1e-2], True), ([1e-5, 0.05, 0.1], True),
            ([8, 16, 24], False), ([0.0, 1e-3, 1.0], False), ([1, 2], False), ([5], False), (range(1, 13), False),
        ],
    )  # fmt: skip
    def test_of_orders_of_magnitude(self, numbers: list[float], expected: bool):
        assert is_logarithmic(numbers) == expected

    def test_a_key_that_was_searched_on_a_logarithmic_scale(self):
        rows = [row(f"lds/stu/{k}") for k in range(2)]
        settings = {one.path: {"lr": k + 1.0} for k, one in enumerate(rows)}
        [axis] = Sweep("s", "lds", None, ("lr",), tuple(rows), settings, frozenset({"lr"})).axes
        assert axis.log


class TestImportance:
    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_of_what_decides(self, mode: str):
        shares = importance(searched(60, mode))
        assert next(iter(shares)) == "optimizer.lr"
        assert shares["optimizer.lr"] > 0.8
        assert sum(shares.values()) == pytest.approx(1)

    def test_needs_runs(self):
        assert importance(searched(LEAST - 1)) == {}
        assert importance(searched(LEAST)) != {}
