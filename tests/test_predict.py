"""`python -m stu.predict`: every row of any table comes out again with its prediction, or one line says why not."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import stu
from stu.encoders import LinearEncoder, TokenEncoder
from stu.errors import OptionError
from stu.heads import PooledHead, StepHead
from stu.mixers.lru import LRU
from stu.predict import main
from stu.preprocessing import Classes, Numbers, Preprocessing, Text, Tokens
from stu.saved.exported import write_folder
from stu.tables.cells import sequences
from stu.tables.rows import of_file, of_standard_input, writing
from tests.models import randomized

pytest.importorskip("safetensors")
KINDS = {
    "words": (Preprocessing(Text("words", ("a", "b"), other=False), Classes(("yes", "no"))), PooledHead(8, d_output=2)),
    "numbers": (Preprocessing(Numbers((1, 2), (1, 2)), Numbers((5,), (10,))), StepHead(8, d_output=1)),
    "number": (Preprocessing(Numbers((0,), (1,))), PooledHead(8, d_output=1)),
    "tokens": (Preprocessing(Tokens(7), Tokens(7)), StepHead(8, d_output=7)),
}
Written = Callable[..., Path]
approx = partial(pytest.approx, rel=1e-4, abs=1e-5)  # float32, whose sums have another order in another batch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, one of each kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, (preprocessing, head) in KINDS.items():
        inputs = preprocessing.inputs
        numbers = isinstance(inputs, Numbers)
        encoder = (
            LinearEncoder(8, d_input=inputs.channels) if numbers else TokenEncoder(8, vocab_size=inputs.vocab_size)
        )
        backbone = stu.Backbone(8, depth=1, mixer=partial(LRU, d_state=4), channel_mixer=None)
        model = randomized(stu.SequenceModel(encoder, backbone, head)).eval()
        task = {"name": name, "seq_len": 8, "causal": True}
        write_folder(folder / name, model, preprocessing.as_dict(), task, {})
    return folder


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(name: str, content: str) -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return write


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which a command is refused."""

    def run(*arguments: object) -> str:
        assert main(list(map(str, arguments))) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def printed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def values(folder: Path, inputs: Sequence[Any]) -> list[Any]:
    found = [prediction.value for prediction in stu.load(folder).predict(inputs)]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in found]


def test_texts_get_labels_and_probabilities(models: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(models / "words"), "--text", "a b", "b"]) == 0
    out, err = capsys.readouterr()
    rows = printed(out)
    assert (list(rows[0]), err) == (["text", "prediction", "probability_yes", "probability_no"], "")
    assert [row["text"] for row in rows] == ["a b", "b"]
    expected = stu.load(models / "words").predict(["a b", "b"])
    assert [row["prediction"] for row in rows] == [one.value for one in expected]
    assert float(rows[1]["probability_no"]) == approx(expected[1].probabilities["no"])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_files_in_and_out(models: Path, tmp_path: Path, ending: str):
    """All columns and the order of the rows stay, in batches; predictions are those of the rows alone."""
    table = pa.table({"id": ["x", "y", "z"], "at": [[[1, 2]], [[3, 4], [5, 6]], [[7, 8]] * 8], "n": [1, 2, 3]})
    source, output = tmp_path / "in.parquet", tmp_path / f"out.{ending}"
    parquet.write_table(table, source)
    command = [str(models / "numbers"), str(source), "--column", "at", "--output", str(output), "--batch-size", "2"]
    assert main(command) == 0
    if ending == "parquet":
        rows = parquet.read_table(output).to_pylist()
        assert parquet.read_table(output).schema.field("at").type == table.schema.field("at").type
    elif ending == "jsonl":
        rows = list(map(json.loads, output.read_text().splitlines()))
    else:
        rows = [
            {"id": row["id"], **{k: json.loads(v) for k, v in row.items() if k != "id"}}
            for row in printed(output.read_text())
        ]
    found = [row.pop("prediction") for row in rows]
    assert rows == table.to_pylist()
    for one, inputs in zip(found, table["at"].to_pylist(), strict=True):
        assert one == approx(values(models / "numbers", [inputs])[0])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 3.0], pa.int64()),
        ([1.5, 2], pa.float64()),
        ([None, None, "a"], pa.string()),
        ([[], None, [1.5], [2]], pa.list_(pa.float64())),
        ([None, None], pa.null()),
    ],
)
def test_parquet_has_one_type_for_all_rows(values: list[Any], kind: pa.DataType, tmp_path: Path):
    """Of which one is written at a time; a column waits for its first value."""
    with writing(tmp_path / "out.parquet") as write:
        for number, value in enumerate(values):
            write([{"id": number, "x": value}], None)
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.to_pydict() == {"id": list(range(len(values))), "x": values}
    assert pa.types.is_list(kind) or found.schema.field("x").type == kind


def test_parquet_takes_categories_and_texts_together(tmp_path: Path):
    categories, texts = (pa.schema([("x", kind)]) for kind in (pa.dictionary(pa.int32(), pa.string()), pa.string()))
    for schemas in ((categories, texts), (texts, categories)):
        with writing(tmp_path / "out.parquet") as write:
            for schema, value in zip(schemas, "ab", strict=True):
                write([{"x": value}], schema)
        assert parquet.read_table(tmp_path / "out.parquet")["x"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([1, 1.75], "column x has other numbers than the rows before, try .jsonl: Float value 1.75"),
        (
            [1.5, 2**53 + 1],
            "column x has other numbers than the rows before, try .jsonl: Integer value 9007199254740993",
        ),
        ([None, "a", 1], "rows have different types, try .jsonl: "),
        ([True, 1], "rows have different types, try .jsonl: "),
        ([{}], "a column has a type that parquet has not, try .jsonl: "),
        ([2**70], "column x has values that parquet cannot hold, try .jsonl: "),
    ],
)
def test_parquet_that_would_lose_something_is_refused(values: list[Any], why: str, tmp_path: Path):
    output = tmp_path / "out.parquet"

    def attempt() -> None:
        with writing(output) as write:
            for value in values:
                write([{"x": value}], None)

    with pytest.raises(OptionError) as error:
        attempt()
    assert str(error.value).startswith(f"--output={output}: {why}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "form", "lines", "inputs"),
    [
        ("words", "text", "a b\nb\n", ["a b", "b"]),
        ("tokens", "jsonl", '{"t": [1, 2, 3]}\n\n{"t": [4]}\n', [[1, 2, 3], [4]]),
        ("tokens", "csv", 't\n1 2 3\n"[4]"\n', [[1, 2, 3], [4]]),
        ("number", "csv", 'x\n"1.5, 2"\n3;4\n', [[1.5, 2], [3, 4]]),
    ],
)
def test_standard_input(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, form: str,
    lines: str, inputs: list,
):  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main([str(models / kind), "-", "--format", form]) == 0
    found = [row["prediction"] for row in printed(capsys.readouterr().out)]
    expected = values(models / kind, inputs)
    read = [one if kind == "words" else json.loads(one) for one in found]
    assert read == (approx(expected) if kind == "number" else expected)


@pytest.mark.parametrize("lines", ["w\na\n\nb\n", 'w\n\n\na\n""\nb\n\n\n', "w,id\na,1\n\nb,2\n"])
def test_empty_lines_of_standard_input_are_those_of_a_file(
    written: Written, monkeypatch: pytest.MonkeyPatch, lines: str
):
    expected = list(chain(*of_file(str(written("a.csv", lines)), 2, ["*"]).batches))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert list(chain(*of_standard_input("csv", 2).batches)) == expected


def test_columns_are_channels_or_steps(models: Path, written: Written, capsys: pytest.CaptureFixture[str]):
    channels = written("a.jsonl", '{"u": [1, 2, 3], "v": [4, 5, 6]}\n')
    assert main([str(models / "numbers"), str(channels), "--column", "u", "--column", "v"]) == 0
    [row] = printed(capsys.readouterr().out)
    assert json.loads(row["prediction"]) == approx(values(models / "numbers", [[[1, 4], [2, 5], [3, 6]]])[0])
    steps = written("b.csv", "first,second\n1,2.5\n")
    for columns in (["--column", "first", "--column", "second"], ["--column", "*s*"]):
        assert main([str(models / "number"), str(steps), *columns]) == 0
        [row] = printed(capsys.readouterr().out)
        assert float(row["prediction"]) == approx(values(models / "number", [[1, 2.5]])[0])


def test_rows_of_standard_input_have_the_columns_of_the_first(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
):
    def given(lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))

    command = [str(models / "words"), "-", "--column", "w", "--format"]
    given('{"id": 1, "w": "a"}\n{"w": "b", "id": 2}\n{"w": "b"}\n')
    assert main([*command, "jsonl"]) == 0
    rows = printed(capsys.readouterr().out)
    assert [(row["id"], row["w"]) for row in rows] == [("1", "a"), ("2", "b"), ("", "b")]
    given(",w\n0,a\n")  # an index without a name, as pandas writes it
    assert main([*command, "csv"]) == 0
    capsys.readouterr()
    for form, lines, line in (
        ("jsonl", '{"w": "a"}\n{"w": "a", "x": 1}\n', "-: line 2: has a column x, which the first row has not"),
        ("jsonl", '{"w": ' + "[" * 100_000 + "\n", "-: line 1: is no JSON"),
        ("csv", "w,w\na,b\n", "-: has the column 'w' twice"),
        ("csv", "w,x\na\n", "-: line 2: has not as many values"),
        ("csv", "w,x\na,b,c\n", "-: line 2: has not as many values"),
    ):
        given(lines)
        assert refused(*command, form).startswith(f"error: INPUT={line}")


def test_texts_are_as_they_are_written(models: Path, written: Written, capsys: pytest.CaptureFixture[str]):
    """Where all of a column could be numbers, or true and false; other columns keep their types."""
    source, output = written("in.csv", "n,text\n1,1.50\n2,true\n"), models / "texts.jsonl"
    columns = {"name": "t", "seq_len": 8, "causal": True, "columns": ["text"]}
    preprocessing = Preprocessing(Text("words", ("1.50", "true"), other=False), None)
    loaded = stu.load(models / "words")
    write_folder(models / "texts", loaded.model, preprocessing.as_dict(), columns, {})
    for rows in ("n,text\n1,1.50\n", "n,text\n1,true\n"):
        source = written("in.csv", rows)
        assert main([str(models / "texts"), str(source), "--output", str(output), "--overwrite"]) == 0
        [row] = map(json.loads, output.read_text().splitlines())
        assert (row["n"], row["text"]) == (1, rows[9:-1])
    assert main([str(models / "texts"), "--text", "true"]) == 0  # whatever the column was called
    assert len(printed(capsys.readouterr().out)) == 1


def test_places_are_looked_up_for_errors_alone(
    models: Path, written: Written, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """They take a whole reading of the file each."""
    monkeypatch.setattr("stu.tables.reading.place_of", lambda *arguments: pytest.fail("looked up"))
    assert main([str(models / "words"), str(written("in.csv", "w\na\nb\na\n")), "--batch-size", "1"]) == 0
    assert len(printed(capsys.readouterr().out)) == 3


class TestSteps:
    """Rows that are steps."""

    ROWS = (("p", 2, 5, 6), ("q", 1, 7, 8), ("p", 1, 1, 2), ("p", 10, 3, 4))

    def source(self, written: Written) -> Path:
        return written("steps.csv", "\n".join(["id,t,u,v", *(",".join(map(str, row)) for row in self.ROWS), ""]))

    def test_each_has_its_prediction(self, models: Path, written: Written, capsys: pytest.CaptureFixture[str]):
        command = [str(models / "numbers"), str(self.source(written)), "--column", "u", "--column", "v"]
        assert main([*command, "--sequence", "id", "--time", "t", "--batch-size", "1"]) == 0
        rows = printed(capsys.readouterr().out)
        assert [row["id"] for row in rows] == ["p", "q", "p", "p"]
        first, second = values(models / "numbers", [[[1, 2], [5, 6], [3, 4]], [[7, 8]]])
        assert [float(row["prediction"]) for row in rows] == approx([first[1], second[0], first[0], first[2]])

    def test_as_in_the_training(self, models: Path, written: Written, capsys: pytest.CaptureFixture[str]):
        """And one prediction of a sequence is that of all its rows; times are numbers in text, too."""
        task = {"name": "t", "seq_len": 8, "causal": True, "columns": ["u"], "steps": {"sequence": "id", "time": "t"}}
        loaded = stu.load(models / "number")
        write_folder(models / "steps", loaded.model, loaded.preprocessing.as_dict(), task, {})
        assert main([str(models / "steps"), str(self.source(written))]) == 0
        found = [float(row["prediction"]) for row in printed(capsys.readouterr().out)]
        first, second = values(models / "number", [[1, 5, 3], [7]])
        assert found == approx([first, second, first, first])

    @pytest.mark.parametrize("kind", [int, str])
    def test_large_times_are_told_apart(self, kind: type):
        rows = [{"id": "a", "t": kind(2**53 + offset)} for offset in (1, 0, 2)]
        assert sequences(rows, "id", "t", str) == [[1, 0, 2]]

    def test_what_is_wrong_is_one_line(self, models: Path, written: Written, refused: Callable[..., str]):
        model, source = models / "numbers", self.source(written)
        u, v = ("--column", "u"), ("--column", "v")
        twice = written("twice.csv", "id,t,u,v\na,1,1,2\na,1,3,4\n")
        for arguments, line in (
            ((model, source, *u, *v, "--sequence", "x"), "--sequence=x: no such column; there are id, t, u, v"),
            ((model, source, *u, *v, "--time", "t"), "--time=t: needs --sequence"),
            ((model, source, *u, "--sequence", "id"), f"{source}: line 2 and the rows of its sequence, column u="),
            ((model, twice, *u, *v, "--sequence", "id", "--time", "t"), f"{twice}: line 3, column t=1: a time of the"),
            *(
                (
                    (model, written(name, f"id,u,v\na,1,2\nb,1,2\na,1,{cell}\n"), *u, *v, "--sequence", "id"),
                    f"{source.parent}/{name}: line 4, column v={problem}",
                )
                for name, cell, problem in (
                    ("b.csv", "x", "x: must be numbers"),
                    ("c.csv", "", "empty: must have a value"),
                    ("d.csv", "inf", "inf: must be finite"),
                )
            ),
            (
                (models / "tokens", written("t.csv", "id,v\na,1\na,9\n"), *v, "--sequence", "id"),
                f"{source.parent}/t.csv: line 3, column v=[9]: must be in 0 … 6",
            ),
            (
                (model, written("e.csv", "id,u,v\na,1,2\n,1,2\n"), *u, *v, "--sequence", "id"),
                f"{source.parent}/e.csv: line 3",
            ),
        ):
            assert refused(*arguments).startswith(f"error: {line}")


def test_a_wrong_row_is_one_line_or_has_no_prediction(
    models: Path, written: Written, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    source = written("in.csv", 'id,words\n1,a\n2,"a\nb"\n3,a c\n4,\n5,b\n')
    output = tmp_path / "out.jsonl"
    command = [models / "words", source, "--column", "words", "--output", output]
    line = refused(*command)
    assert line == f"error: {source}: line 5, column words=c: must be of the words ('a', 'b')"
    assert not output.exists()
    assert main([*map(str, command), "--skip-invalid", "--batch-size", "2"]) == 0
    assert capsys.readouterr().err == "note: 2 of 5 rows have no prediction\n"
    rows = list(map(json.loads, output.read_text().splitlines()))
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["prediction"] is None for row in rows] == [False, False, True, True, False]


def test_what_cannot_be_is_one_line(
    models: Path, written: Written, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words, source = models / "words", written("in.csv", "x,y\na,b\n")
    other, kept = written("other.csv", "x,z\na,b\n"), written("out.csv", "kept")
    x = ("--column", "x")
    for arguments, line in (
        ((words, source), "--column=…: must name that of the inputs: x, y"),
        ((words, source, "--column", "z"), "--column=z: no such column; there are x, y"),
        ((words, source, other, *x), "INPUT=…/other.csv: line 2: must have the columns x, y, as before"),
        ((words, source, *x, "--name", "y"), "--name=y: the input has a column y; choose another"),
        ((words, source, *x, "--output", kept), "--output=…/out.csv: exists; --overwrite replaces it"),
        ((words, source, *x, "--output", source, "--overwrite"), "--output=…/in.csv: is an input; choose another file"),
        ((words, source, *x, "--output", "out.txt"), "--output=out.txt: must end in .csv, .jsonl, .parquet"),
        ((words, source, *x, "--output", "no/out.csv"), "--output=no/out.csv: must be in a folder that exists"),
        ((words, source, *x, "--batch-size", 0), "--batch-size=0: must be at least 1"),
        ((words, source, *x, "--device", "tpu"), "device=tpu: is not available"),
        ((words, "nothing.csv"), "INPUT=nothing.csv: no such file"),
        ((words, "a " * 200), "INPUT=a a"),
        (("~nobody_of_this_name/run", source), "run=~nobody_of_this_name/run: no such run or folder"),
        ((words, "-", "-"), "INPUT=-: can be read once only"),
        ((words, "-"), "INPUT=-: has no rows"),
        ((tmp_path / "nothing", source), "run=…/nothing: no such run or folder"),
        ((models / "number", source, *x), "…/in.csv: line 2, column x=a: must be numbers"),
        ((models / "tokens", written("t.csv", "t\n1 9\n")), "…/t.csv: line 2, column t=[9]: must be in 0 … 6"),
    ):
        found = refused(*arguments)
        assert found.replace(f"{tmp_path}/", "…/").startswith(f"error: {line}"), found
    assert kept.read_text() == "kept"


@pytest.mark.slow
def test_nobody_reads_on(models: Path):
    """As in `… | head -1`."""
    code = "import sys; from stu.predict import main; sys.exit(main(sys.argv[1:]))"
    words = ["a"] * 20_000  # more than a pipe holds
    command = [sys.executable, "-c", code, str(models / "words"), "--text", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_help_imports_nothing_slow():
    code = "import sys; from stu.predict import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pyarrow"} & set(done.stdout.splitlines()[-1].split())
