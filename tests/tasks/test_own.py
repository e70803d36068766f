"""A user's table: every format gives the same examples, splits are what they say, nothing wrong is taken silently."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

import stu
from data.own import sources, splits
from data.own.table import TableExamples, _windows
from stu.errors import OptionError
from stu.mixers.lru import LRU
from stu.preconditioning import Preconditioner
from stu.preprocessing import Classes, Numbers, Preprocessing, Text, Tokens
from stu.saved.loading import Trained
from stu.training import model_for
from tests import runs
from tests.models import randomized
from tests.tasks import own_variants
from tests.tasks.own_variants import NESTED, SCALAR, Columns, attempt, write

VARIANTS = int(os.environ.get("STU_VARIANTS", "60"))


def table(rows: int = 30, seed: int = 0) -> Columns:
    """Four numbers a row, a text, a class, a number and a group."""
    random = np.random.default_rng(seed)
    columns: Columns = {f"x{step}": random.standard_normal(rows).round(4).tolist() for step in range(4)}
    words = [" ".join(random.choice(["good", "bad", "film"], 3)) for _ in range(rows)]
    return columns | {
        "text": words,
        "label": ["b" if row % 3 else "a" for row in range(rows)],
        "y": random.standard_normal(rows).round(4).tolist(),
        "group": [row // 3 for row in range(rows)],
    }


def examples(task: Any) -> list[list[tuple[Any, Any]]]:
    return [[tuple(np.asarray(part).tolist() for part in one) for one in split] for split in task.datasets()]


def everything(task: Any) -> list[Any]:
    """The inputs of all sequences, in the units of the file, sorted."""
    inputs = task.preprocessing.inputs
    found = [inputs.decode(one) for split in task.datasets() for one, _ in split]
    return sorted(
        np.asarray(one).reshape(-1).round(4).tolist() if isinstance(inputs, Numbers) else one for one in found
    )


def long_table(series: int, steps: int, value: Callable[[int, int], float] = lambda i, t: np.sin(t + i)) -> Columns:
    pairs = [(i, t) for i in range(series) for t in range(steps)]
    return {
        "id": [i for i, _ in pairs],
        "time": [f"2024-01-{t + 1:02}" for _, t in pairs],
        "u": [round(float(value(*pair)), 6) for pair in pairs],
        "v": [float(i * t % 7) for i, t in pairs],
        "kind": [i % 2 for i, _ in pairs],
    }


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class TestFormats:
    @pytest.mark.parametrize(("inputs", "target"), [("x*", "label"), ("text", "y")])
    def test_all_give_the_same_examples(self, inputs: str, target: str, tmp_path: Path):
        found = [
            examples(attempt(tmp_path / kind, write(tmp_path / f"t.{kind}", table()), inputs=inputs, target=target))
            for kind in SCALAR
        ]
        assert all(one == found[0] for one in found)
        assert [len(split) for split in found[0]] == [24, 3, 3]

    def test_nested_lists_and_arrays_are_those_of_columns(self, tmp_path: Path):
        columns = table()
        nested = [list(row) for row in zip(*(columns[f"x{step}"] for step in range(4)), strict=True)]
        wide = examples(attempt(tmp_path, write(tmp_path / "t.csv", columns), inputs="x*", target="label"))
        for kind in NESTED:
            path = write(tmp_path / f"n.{kind}", {"x": nested, "label": columns["label"]})
            assert examples(attempt(tmp_path, path, inputs="x", target="label")) == wide
        np.savez(tmp_path / "a.npz", x=nested, label=columns["label"])
        assert examples(attempt(tmp_path, tmp_path / "a.npz", inputs="x", target="label")) == wide
        np.save(tmp_path / "a.npy", nested)
        forecast = attempt(tmp_path, tmp_path / "a.npy", inputs="values", target="next")
        assert [one.shape for one in forecast.datasets().train[0]] == [(3, 1), (3, 1)]

    def test_a_fingerprint_covers_the_contents_not_the_place(self, tmp_path: Path):
        first, second = (write(tmp_path / f"{name}.csv", table()) for name in "ab")
        of = [attempt(tmp_path, path, inputs="x*", target="y").fingerprint() for path in (first, second)]
        assert of[0] == of[1]
        write(second, table(seed=1))
        assert attempt(tmp_path, second, inputs="x*", target="y").fingerprint() != of[0]


class TestInputs:
    @pytest.mark.parametrize(
        ("read", "text", "tokens"),
        [
            ("bytes", "bad é", [99, 98, 101, 33, 196, 170]),
            ("words", "good bad é", [4, 2, 1]),
            ("characters", "éa", [1, 3]),
        ],
    )
    def test_a_text_is_encoded_as_in_training(self, read: str, text: str, tokens: list[int], tmp_path: Path):
        columns = table()
        task = attempt(tmp_path, write(tmp_path / "t.csv", columns), inputs="text", target="label", read=read)
        encoding = task.preprocessing.inputs
        assert isinstance(encoding, Text)
        assert encoding.encode(text).tolist() == tokens
        assert everything(task) == sorted(columns["text"])
        assert Preprocessing.read(json.loads(json.dumps(task.preprocessing.as_dict()))) == task.preprocessing

    def test_a_vocabulary_is_that_of_train_and_limited(self, tmp_path: Path):
        columns = table()
        columns["text"][0] = "never rare"
        columns["part"] = ["test", "val", *["train"] * 28]
        options = {"inputs": "text", "target": "label", "read": "words", "split": "part"}
        path = write(tmp_path / "t.csv", columns)
        assert attempt(tmp_path, path, **options).preprocessing.inputs.vocabulary == ("bad", "film", "good")
        assert len(attempt(tmp_path, path, **options, vocabulary=2).preprocessing.inputs.vocabulary) == 2

    def test_normalisation_is_fitted_to_train_alone(self, tmp_path: Path):
        columns = table() | {"part": ["train"] * 20 + ["val"] * 5 + ["test"] * 5}
        options = {"inputs": ["x0", "x1"], "target": ["y", "x2"], "split": "part"}
        task = attempt(tmp_path, write(tmp_path / "t.parquet", columns), **options)
        inputs, targets = task.preprocessing
        assert isinstance(inputs, Numbers) and isinstance(targets, Numbers)  # noqa: PT018
        shown = np.array([columns["x0"][:20], columns["x1"][:20]])
        assert (inputs.mean, inputs.std) == (pytest.approx((shown.mean(),)), pytest.approx((shown.std(),)))
        assert targets.mean == pytest.approx((np.mean(columns["y"][:20]), np.mean(columns["x2"][:20])))
        last = task.datasets().test[4]
        assert inputs.decode(last[0])[:, 0] == pytest.approx([columns["x0"][-1], columns["x1"][-1]], abs=1e-6)
        assert targets.decode(last[1]) == pytest.approx([columns["y"][-1], columns["x2"][-1]], abs=1e-6)

    def test_labels_of_any_type_are_kept(self, tmp_path: Path):
        for values in ([3, 7], ["a b", "7"], [True, False]):
            columns = table() | {"label": [values[row % 2] for row in range(30)]}
            task = attempt(tmp_path, write(tmp_path / "t.parquet", columns), inputs="x*", target="label", kind="class")
            assert task.preprocessing.targets == Classes(tuple(sorted(values)))
            assert {type(label) for label in task.preprocessing.targets.labels} == {type(values[0])}

    @pytest.mark.parametrize(("row", "label"), [(0, "b "), (4, " b")])
    def test_labels_that_differ_by_white_space_alone_are_refused(self, row: int, label: str, tmp_path: Path):
        columns = table()
        columns["label"][row] = label
        with pytest.raises(OptionError, match=f"line {row + 2}, column label: '{label}' differs from another label"):
            attempt(tmp_path, write(tmp_path / "t.csv", columns), inputs="x*", target="label")

    def test_numbers_may_be_read_as_text(self, tmp_path: Path):
        columns = table() | {"text": list(range(1000, 1030))}
        task = attempt(tmp_path, write(tmp_path / "t.csv", columns), inputs="text", target="label", read="bytes")
        assert everything(task) == [str(number) for number in range(1000, 1030)]

    @pytest.mark.parametrize("cells", [("1.50", "+2"), (" 3", "4 "), ("true", "False"), ("NA", "5")])
    def test_texts_are_as_they_stand_in_every_file(self, cells: tuple[str, str], tmp_path: Path):
        """Whatever all of a column could be; a target that the pattern fits is none of them."""
        (tmp_path / "s").mkdir()
        for name in ("train", "val", "test"):
            columns = {"text": [cells[row % 2] for row in range(6)], "texts": [row / 2 for row in range(6)]}
            write(tmp_path / "s" / f"{name}.csv", columns | ({"text": list("ab") * 3} if name == "test" else {}))
        task = attempt(tmp_path, tmp_path / "s", inputs="text*", target="texts", read="bytes")
        assert everything(task) == sorted([*cells * 6, *"ab" * 3])
        assert isinstance(task.preprocessing.targets, Numbers)

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"inputs": "listed"}, "line 2, column listed: is a list written as text"),
            ({"inputs": "text", "target": "y", "group": "y"}, "group=y: is an input or a target, too"),
            ({"inputs": "x*", "divide": "time"}, "divide=time: needs a column: set time"),
            ({"inputs": "x*", "target": "next"}, "rows=auto: must be steps .* or sequences"),
            ({"inputs": "x0"}, "inputs=x0: has one number a row, which is no sequence"),
            ({"inputs": "x*", "horizon": 3}, "horizon=3: is of forecasts of numbers"),
            ({"inputs": "x*", "split": "label"}, "split=label: is an input or a target, too"),
            ({"inputs": "text", "vocabulary": 5}, "vocabulary=5: must be null: bytes have none"),
            ({"inputs": "x*", "vocabulary": 5}, "vocabulary=5: must be null: numbers have none"),
            ({"inputs": "x*", "stride": 5}, "stride=5: must be null: sequences are whole"),
            ({"inputs": "x*", "time": "y"}, "time=y: orders nothing: a row is a sequence"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, options: dict[str, Any], problem: str, tmp_path: Path):
        columns = table() | {"listed": [f"[{row}, 0.5, -1e3]" for row in range(30)]}
        path = write(tmp_path / "t.csv", columns)
        with pytest.raises(OptionError, match=problem):
            attempt(tmp_path, path, **{"target": "label", **options})

    def test_integers_are_classes_where_they_are_few(self, tmp_path: Path):
        columns = table() | {"few": [row % 4 for row in range(30)], "many": list(range(30))}
        path = write(tmp_path / "t.csv", columns)
        kinds = {
            target: type(attempt(tmp_path, path, inputs="x*", target=target).preprocessing.targets)
            for target in ("few", "many")
        }
        assert kinds == {"few": Classes, "many": Numbers}
        forced = attempt(tmp_path, path, inputs="x*", target="few", kind="number")
        assert isinstance(forced.preprocessing.targets, Numbers)

    def test_a_row_is_a_step(self, tmp_path: Path):
        columns = long_table(12, 5)
        order = np.random.default_rng(0).permutation(60)
        mixed = {name: [values[row] for row in order] for name, values in columns.items()}
        path = write(tmp_path / "t.csv", mixed)
        for target, kind in {"kind": Classes, "v": Numbers, "next": Numbers}.items():
            task = attempt(tmp_path, path, inputs="u", target=target, sequence="id", time="time")
            assert isinstance(task.preprocessing.targets, kind)
            steps = 4 if target == "next" else 5
            expected = sorted(columns["u"][start : start + steps] for start in range(0, 60, 5))
            assert everything(task) == [[round(x, 4) for x in one] for one in expected]
        assert task.datasets().train[0][1].shape == (4, 1)

    def test_variable_lengths_are_padded_and_masked(self, tmp_path: Path):
        columns = {"s": [[float(step) for step in range(1 + row % 5)] for row in range(30)], "y": list(range(30))}
        task = attempt(tmp_path, write(tmp_path / "t.jsonl", columns), inputs="s", target="y")
        train = task.datasets().train
        batch = task.collate([train[index] for index in range(8)])
        assert batch.mask is not None
        assert batch.mask.sum(1).tolist() == train.lengths[:8].tolist()
        assert batch.targets.shape == (8, 1)

    def test_targets_of_every_step_may_be_lists(self, tmp_path: Path):
        columns = {
            "s": [[0.5, row, 2.0] for row in range(30)],
            "z": [[[row, 1.0 * k] for k in range(3)] for row in range(30)],
        }
        task = attempt(tmp_path, write(tmp_path / "t.parquet", columns), inputs="s", target="z")
        assert task.datasets().train[0][1].shape == (3, 2)
        columns["z"] = [[float(row), 1.0 * row**2] for row in range(30)]
        assert attempt(tmp_path, write(tmp_path / "t.parquet", columns), inputs="s", target="z").d_output == 2

    def test_what_python_reads_as_a_number_is_one(self, tmp_path: Path):
        columns = table() | {"x1": ["+1.5", "\u0662 ", *range(28)]}
        task = attempt(tmp_path, write(tmp_path / "t.csv", columns), inputs=["x0", "x1"], target="y")
        assert {2.0, 1.5} <= {one for pair in everything(task) for one in pair}

    @pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.date32(), pa.date64(), pa.time64("ns"), pa.duration("s")])
    def test_times_of_any_type_order_the_rows(self, kind: pa.DataType, tmp_path: Path):
        columns = long_table(12, 5)
        times = pa.array([86_400_001 * (4 - row % 5) for row in range(60)]).cast(pa.int64())
        typed = pa.array(range(4, -1, -1), pa.int32()).cast(kind) if kind == pa.date32() else None
        when = pa.chunked_array([typed] * 12).combine_chunks() if typed else times.cast(kind)
        path = tmp_path / "t.parquet"
        own_variants.binary(path, "parquet", pa.table(columns | {"time": when}))
        task = attempt(tmp_path, path, inputs="u", target="kind", sequence="id", time="time")
        expected = sorted([round(x, 4) for x in columns["u"][start : start + 5]][::-1] for start in range(0, 60, 5))
        assert everything(task) == expected

    @pytest.mark.parametrize("ending", ["csv", "parquet"])
    def test_large_integers_order_the_rows(self, ending: str, tmp_path: Path):
        """Which as reals are the same."""
        columns = long_table(12, 5)
        columns["time"] = [2**53 + row % 5 for row in range(60)]
        task = attempt(
            tmp_path, write(tmp_path / f"t.{ending}", columns), inputs="u", target="kind", sequence="id", time="time"
        )
        assert [one[0] for one in everything(task)] == sorted(round(x, 4) for x in columns["u"][::5])
        columns = table() | {"when": [2**53 + (row * 7) % 30 for row in range(30)]}
        path = write(tmp_path / f"d.{ending}", columns)
        task = attempt(tmp_path, path, inputs="x*", target="y", time="when", divide="time")
        last = sorted(range(30), key=columns["when"].__getitem__)[-3:]
        found = sorted(task.preprocessing.targets.decode(one[1]).item() for one in task.datasets().test)
        assert found == pytest.approx(sorted(columns["y"][row] for row in last), abs=1e-6)


class TestUse:
    """What a task says of its columns, of its predictions and of other lengths."""

    @staticmethod
    def forecast(folder: Path, **options: Any) -> Any:
        np.save(folder / "t.npy", np.random.default_rng(0).standard_normal((300, 2)).cumsum(0))
        common: dict[str, Any] = {"inputs": "values", "target": "next", "seq_len": 16, "rows": "steps"}
        return attempt(folder, folder / "t.npy", **common, **options)

    @staticmethod
    def trained(task: Any) -> Trained:
        backbone = stu.Backbone(8, depth=1, mixer=partial(LRU, d_state=4), channel_mixer=None)
        return Trained(randomized(model_for(task, backbone)).eval(), task.preprocessing, task.facts(), {})

    def test_windows_have_other_lengths(self, tmp_path: Path):
        task = self.forecast(tmp_path)
        longer = task.at_length(24)
        assert (longer.seq_len, longer.preprocessing) == (24, task.preprocessing)
        assert longer.rollout[:2] == (12, 13)
        with pytest.raises(OptionError, match="seq_len=999: the longest test sequence has 29 steps"):
            task.at_length(999)

    def test_predictions_of_a_preconditioned_forecast_are_those_that_are_scored(self, tmp_path: Path):
        task = self.forecast(tmp_path)
        task.precondition(Preconditioner("chebyshev", 3))
        loaded = self.trained(task)
        batch = task.collate([task.datasets().test[number] for number in range(2)])
        prediction = task.scored(loaded.model(batch.inputs, batch.mask), batch)[0].detach().double().numpy()
        found = loaded.predict([task.preprocessing.inputs.decode(one) for one in batch.inputs])
        expected = task.preprocessing.targets.decode(prediction)
        assert np.concatenate([one.value for one in found]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        loaded.task["precondition"]["inputs"] = False
        with pytest.raises(OptionError, match="precondition=chebyshev: predictions need the outputs before"):
            loaded.predict([[[1, 2]]])

    def test_the_next_token_is_generated(self, tmp_path: Path):
        columns = {"s": [[row % 3, 1, 2, 0] for row in range(30)]}
        task = attempt(tmp_path, write(tmp_path / "t.jsonl", columns), inputs="s", target="next")
        drawn = "".join(self.trained(task).generate("0 1", max_tokens=5)).split()
        assert len(drawn) == 5
        assert set(drawn) <= set("012")

    def test_columns_are_those_that_a_pattern_has_found(self, tmp_path: Path):
        """Not the target, which it fits as well."""
        columns = table() | {"xy": list(range(30))}
        task = attempt(tmp_path, write(tmp_path / "t.csv", columns), inputs="x*", target="xy")
        assert task.facts()["columns"] == ["x0", "x1", "x2", "x3"]
        path = write(tmp_path / "l.csv", long_table(12, 5))
        task = attempt(tmp_path, path, inputs=["u", "v"], target="kind", sequence="id", time="time")
        assert task.facts()["steps"] == {"sequence": "id", "time": "time"}


class TestSplits:
    def test_files_say_them(self, tmp_path: Path):
        folder = tmp_path / "source"
        for seed, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation", "test"]):
            (folder / "data").mkdir(parents=True, exist_ok=True)
            write(folder / "data" / f"{name}.parquet", table(10, seed))
        (folder / "README.md").write_text("no table")
        task = attempt(tmp_path, folder, inputs="x*", target="label")
        assert [len(split) for split in task.datasets()] == [20, 10, 10]
        (folder / "data" / "train-00001-of-00002.parquet").unlink()
        with pytest.raises(OptionError, match="1 of 2 files are there"):
            attempt(tmp_path, folder, inputs="x*", target="label")

    def test_what_no_file_says_is_divided_off_train(self, tmp_path: Path):
        DatasetDict(train=Dataset.from_dict(table(20)), test=Dataset.from_dict(table(7, 1))).save_to_disk(
            tmp_path / "d"
        )
        task = attempt(tmp_path, tmp_path / "d", inputs="x*", target="y", val=0.2)
        assert [len(split) for split in task.datasets()] == [16, 4, 7]

    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            (["train.csv", "other.csv"], "other.csv is of no split"),
            (["train.tsv", "train.csv"], "has one split in several formats"),
            (["a.txt"], "has no table"),
        ],
    )
    def test_a_folder_that_is_unclear_is_refused(self, names: list[str], problem: str, tmp_path: Path):
        (tmp_path / "s").mkdir()
        for name in names:
            write((tmp_path / "s" / name).with_suffix(".csv"), table()).rename(tmp_path / "s" / name)
        with pytest.raises(OptionError, match=problem):
            attempt(tmp_path, tmp_path / "s", inputs="x*", target="y")

    def test_columns_and_types_that_differ_between_files(self, tmp_path: Path):
        (tmp_path / "s").mkdir()
        write(tmp_path / "s" / "train.csv", table())
        for change, problem in {
            "label": "has no column label",
            "x1": "column x1 is string, in .*train.csv double",
        }.items():
            other = table() | {"x1": ["q"] * 30}
            write(
                tmp_path / "s" / "val.csv",
                {name: v for name, v in other.items() if change != "label" or name != "label"},
            )
            with pytest.raises(OptionError, match=f"val.csv: {problem}"):
                attempt(tmp_path, tmp_path / "s", inputs="x*", target="label")

    def test_no_group_is_in_two(self, tmp_path: Path):
        columns = table() | {"x0": [float(row // 3) for row in range(30)]}
        task = attempt(
            tmp_path, write(tmp_path / "t.csv", columns), inputs="x*", target="y", group="group", val=0.2, test=0.3
        )
        of = [{round(float(task.preprocessing.inputs.decode(x)[0, 0])) for x, _ in split} for split in task.datasets()]
        assert [len(groups) for groups in of] == [5, 2, 3]
        assert len(set.union(*of)) == 10

    def test_the_last_are_the_test_set(self, tmp_path: Path):
        columns = table() | {"x0": [float(row) for row in range(30)], "when": [100 - row for row in range(30)]}
        path = write(tmp_path / "t.csv", columns)
        task = attempt(tmp_path, path, inputs="x*", target="y", time="when", divide="time")
        rows = [
            [round(float(task.preprocessing.inputs.decode(x)[0, 0])) for x, _ in split] for split in task.datasets()
        ]
        assert [sorted(split) for split in rows] == [list(range(6, 30)), [3, 4, 5], [0, 1, 2]]

    def test_every_class_is_in_every_split_in_proportion(self, tmp_path: Path):
        columns = table(90)
        task = attempt(
            tmp_path, write(tmp_path / "t.csv", columns), inputs="x*", target="label", val=0.2, test=30, train=0.3
        )
        assert [np.bincount([y for _, y in split]).tolist() for split in task.datasets()] == [
            [9, 18],
            [6, 12],
            [10, 20],
        ]

    def test_one_long_series_is_cut_by_time_and_into_windows(self, tmp_path: Path):
        columns = {"value": [float(np.sin(step / 3)) for step in range(400)], "noise": list(range(400))}
        path = write(tmp_path / "t.csv", columns)
        task = attempt(tmp_path, path, inputs="value", target="next", seq_len=20, context=12, horizon=4)
        assert [len(split) for split in task.datasets()] == [16, 2, 2]
        assert task.rollout[:2] == (12, 4)
        decode = task.preprocessing.inputs.decode
        inputs, targets = task.datasets().test[1]
        assert decode(inputs)[:, 0] == pytest.approx(columns["value"][-21:-1], abs=1e-6)
        assert decode(targets)[:, 0] == pytest.approx(columns["value"][-20:], abs=1e-6)
        assert {*task.baselines()} == {
            "mean", "last value", "seasonal", "rollout: last value",
        }  # fmt: skip  # the season, 19, is longer than the context

    def test_a_series_of_train_is_cut_where_a_file_is_the_test_set(self, tmp_path: Path):
        (tmp_path / "s").mkdir()
        for name, steps in {"train": 100, "test": 30}.items():
            write(tmp_path / "s" / f"{name}.csv", {"value": [float(np.sin(step)) for step in range(steps)]})
        task = attempt(tmp_path, tmp_path / "s", inputs="value", target="next", seq_len=100)
        assert [split[0][0].shape for split in task.datasets()] == [(89, 1), (9, 1), (29, 1)]
        undecided = np.full(1, sources.UNDECIDED, np.int8)
        pieces, _ = splits.cuts(np.array([600]), {"val": 50, "test": 50}, undecided)
        assert pieces.tolist() == [[500, 50, 50]]
        with pytest.raises(OptionError, match=r"val=1.5: must be .*, or a number of steps below 600"):
            splits.cuts(np.array([600]), {"val": 1.5, "test": 50}, undecided)

    def test_a_long_text_is_cut(self, tmp_path: Path):
        text = "ü0123456789" * 10
        path = write(tmp_path / "t.jsonl", {"text": [text]})
        for read in ("bytes", "characters"):
            task = attempt(tmp_path, path, inputs="text", target="next", read=read, seq_len=50)
            parts = [[task.preprocessing.inputs.decode(x) for x, _ in split] for split in task.datasets()]
            assert "".join(parts[2]) == text[-11:-1]

    def test_windows_cover_every_step(self):
        lengths = np.array([1, 7, 20, 21, 43])
        for stride in (5, 7, 10):
            for overlap in (True, False):
                starts, sizes = _windows(lengths, 10, stride, 0, overlap=overlap)
                steps = np.concatenate(
                    [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
                )
                assert np.unique(steps).tolist() == list(range(lengths.sum()))
                assert sizes.max() == 10
                owner = np.searchsorted(np.cumsum(lengths), [starts, starts + sizes - 1], "right")
                assert (owner[0] == owner[1]).all()

    def test_groups_and_sizes_that_cannot_be(self):
        undecided = np.full(10, sources.UNDECIDED, np.int8)
        with pytest.raises(OptionError, match="val=5: leaves no sequence for train"):
            splits.divided(undecided, {"train": None, "val": 5, "test": 5}, seed=0)
        with pytest.raises(OptionError, match="leaves no group for train"):
            splits.divided(undecided, {"train": None, "val": 1, "test": 1}, seed=0, groups=np.arange(10) // 5)


class TestHub:
    def test_a_name_is_loaded_with_its_splits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        found = {"train": table(), "test": table(5, 1), "other": table()}
        saved = DatasetDict({name: Dataset.from_dict(one) for name, one in found.items()})
        saved.class_encode_column("label").save_to_disk(tmp_path / "d")
        asked = []

        def load(*arguments: Any, **options: Any) -> Any:
            asked.append((*arguments, options["revision"]))
            return datasets.load_from_disk(str(tmp_path / "d"))

        monkeypatch.setattr(sources, "answers", lambda url: True)
        monkeypatch.setattr(sources, "datasets", SimpleNamespace(load_dataset=load, config=datasets.config))
        task = attempt(tmp_path, "owner/name:plain@v1", inputs="x*", target="label")
        assert asked[0] == ("owner/name", "plain", "v1")
        assert [len(split) for split in task.datasets()] == [27, 3, 5]
        assert task.preprocessing.targets == Classes(("a", "b"))

    @pytest.mark.parametrize(
        ("source", "problem"),
        [
            ("owner/name", "owner/name: is no file or folder here, and cannot be fetched: .* does not answer"),
            ("nothing.csv", "nothing.csv: is not there; must be a file, a folder"),
            ("a/b/c", "a/b/c: is not there; must be a file, a folder"),
            ("", ": must be a file, a folder"),
        ],
    )
    def test_what_is_not_there_is_named(
        self, source: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sources, "answers", lambda url: False)
        with pytest.raises(OptionError, match=f"^source={problem}"):
            attempt(tmp_path, source, inputs="x*", target="label")


class TestBaselines:
    def test_seasons(self, tmp_path: Path):
        pattern = np.random.default_rng(0).standard_normal(12)
        columns = {"value": np.tile(pattern, 30).tolist()}
        task = attempt(tmp_path, write(tmp_path / "t.jsonl", columns), inputs="value", target="next", seq_len=35)
        assert task.data.season() == 12
        found = task.baselines()
        assert found["seasonal"] == found["rollout: seasonal"] == 0 < found["last value"]
        inputs, targets = (np.concatenate(part) for part in zip(*task.datasets().test, strict=True))
        assert found["last value"] == pytest.approx(np.square(targets - inputs, dtype=np.float64).mean(), rel=1e-5)
        assert found["mean"] == pytest.approx(np.square(targets, dtype=np.float64).mean())

    def test_of_tokens(self, tmp_path: Path):
        columns = {"s": [[0, 1, 2, 0, 1, 2, 0, 1]] * 29 + [[0, 2, 2, 0, 1, 2, 0, 1]]}
        columns |= {"part": ["train"] * 28 + ["val", "test"]}
        task = attempt(tmp_path, write(tmp_path / "t.jsonl", columns), inputs="s", target="next", split="part")
        assert isinstance(task.preprocessing.inputs, Tokens)
        assert task.baselines() == {"most frequent": 2 / 7, "bigram": 5 / 7}

    def test_of_classes(self, tmp_path: Path):
        task = attempt(tmp_path, write(tmp_path / "t.csv", table()), inputs="x*", target="label")
        assert task.baselines() == {"majority": 2 / 3}


def test_a_sample_of_wrong_tables_is_refused_in_one_line_each(tmp_path: Path):
    assert own_variants.faults(VARIANTS, tmp_path) == []


def test_duplicates_across_splits_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    columns = table(30)
    for name in columns:
        columns[name][29] = columns[name][0]
    columns["part"] = ["train"] * 20 + ["val"] * 5 + ["test"] * 5
    attempt(tmp_path, write(tmp_path / "t.csv", columns), inputs="x*", target="label", split="part")
    assert "1 of 5 examples of test are in train, too" in capsys.readouterr().err


def test_examples_are_pickled_as_their_place(tmp_path: Path):
    task = attempt(tmp_path, write(tmp_path / "t.csv", table()), inputs="x*", target="label")
    kind, arguments = task.datasets().test.__reduce__()
    assert kind is TableExamples
    assert [len(arguments), len(kind(*arguments))] == [3, 3]


def series(folder: Path) -> tuple[Path, list[str]]:
    np.save(folder / "t.npy", np.random.default_rng(0).standard_normal((300, 2)).cumsum(0))
    return folder / "t.npy", ["task.inputs=values", "task.target=next", "task.seq_len=16", "task.data.rows=steps"]


def reviews(folder: Path) -> tuple[Path, list[str]]:
    return write(folder / "t.jsonl", table()), ["task.inputs=text", "task.target=label"]


def values(folder: Path) -> tuple[Path, list[str]]:
    return write(folder / "t.parquet", table()), ["task.inputs=[x0,x1,x2]", "task.target=y", "task.causal=false"]


def rows(folder: Path) -> tuple[Path, list[str]]:
    ids = ["task.inputs=[u,v]", "task.target=kind", "task.data.sequence=id", "task.data.time=time"]
    return write(folder / "t.csv", long_table(12, 5)), ids


@pytest.mark.parametrize(
    "make", [rows, *(pytest.param(one, marks=pytest.mark.slow) for one in (series, reviews, values))]
)
def test_a_model_is_trained(make: Callable[[Path], tuple[Path, list[str]]], tmp_path: Path):
    source, options = make(tmp_path)
    command = runs.small("task=own", "model=stu", f"task.data.source={source}", *options, "name=run")
    sizes = ("task.data.train=", "task.data.val=", "task.data.test=")
    done = runs.train(tmp_path, *(override for override in command if not override.startswith(sizes)))
    assert done.code == 0, done.err
    summary = runs.run_of(tmp_path, "own", "stu", "run").read_summary()
    assert ("rollout_mse" in summary["test"]) == (make is series)
    assert summary["baselines"]


def test_what_is_wrong_is_one_line_of_the_command(tmp_path: Path):
    columns = table()
    columns["x2"][4] = "none"
    source = write(tmp_path / "t.csv", columns)
    done = runs.train(
        tmp_path, "task=own", "model=stu", f"task.data.source={source}", "task.inputs=x*", "task.target=y"
    )
    assert done.code == 2
    assert done.err == f"error: task.data.source={source}: line 6, column x2: 'none' is no number\n"
