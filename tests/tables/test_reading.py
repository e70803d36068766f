"""One table from every format, the types of all rows, and where in a file something is wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence
from pyarrow import parquet

from stu.errors import OptionError
from stu.tables import text
from stu.tables.reading import place_of, read_table

ROWS = [
    {"text": "a, b", "series": [1.0, 2.0], "label": 3},
    {"text": "ü\n", "series": [0.5, -1.0], "label": 4},
]
NAMES = ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet", "t.arrow", "t.feather", "t.npz", "saved"]


def written(folder: Path, name: str) -> Path:
    """`ROWS` in the format that the name says; in csv and tsv without the nested column, in npz without the text."""
    path, table = folder / name, pa.Table.from_pylist(ROWS)
    columns = table.to_pydict()
    if name.endswith((".csv", ".tsv")):
        mark = "," if name.endswith("csv") else "\t"
        path.write_text(f"text{mark}label\n" + "".join(f'"{row["text"]}"{mark}{row["label"]}\n' for row in ROWS))
    elif name.endswith(".jsonl"):
        path.write_text("\n\n".join(map(json.dumps, ROWS)))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1))
    elif name.endswith(".parquet"):
        parquet.write_table(table, path)
    elif name.endswith((".arrow", ".feather")):
        new = pa.ipc.new_stream if name.endswith(".arrow") else pa.ipc.new_file
        with new(str(path), table.schema) as file:
            file.write_table(table)
    elif name.endswith(".npz"):
        np.savez(path, series=columns["series"], label=columns["label"])
    elif name.endswith(".npy"):
        np.save(path, np.array(columns["series"]))
    else:
        Dataset(table).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_all_formats_give_the_same_rows(name: str, tmp_path: Path):
    table = read_table(written(tmp_path, name))
    assert set(table.column_names) >= ({"label", "series"} if name == "t.npz" else {"label", "text"})
    assert table.to_pylist() == [{column: row[column] for column in table.column_names} for row in ROWS]
    assert pa.types.is_int64(table.schema.field("label").type)


def test_an_array_is_the_column_values(tmp_path: Path):
    assert read_table(written(tmp_path, "t.npy")).to_pydict() == {"values": [row["series"] for row in ROWS]}
    np.save(tmp_path / "fields.npy", np.array([(1, 2.5)], [("a", "i4"), ("b", "f2")]))
    assert read_table(tmp_path / "fields.npy").to_pylist() == [{"a": 1, "b": 2.5}]


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        ("1 2", [1, 2]),
        ("1 2.5", [1.0, 2.5]),
        ("1 NA", [1, None]),
        ("true False", [True, False]),
        ("007 8", ["007", "8"]),
        ("+1 -2", [1, -2]),
        ("1 nan", [1, None]),
        ("9007199254740993 9223372036854775807", [2**53 + 1, 2**63 - 1]),
        ("9223372036854775807 +9223372036854775808", ["9223372036854775807", "+9223372036854775808"]),
        ("12345678901234567890 NA", ["12345678901234567890", "NA"]),
        ("01100110011001100110011001100110 1", ["01100110011001100110011001100110", "1"]),
        ("12345678901234567890 0.5", [12345678901234567890.0, 0.5]),
        ("0x1 2", ["0x1", "2"]),
        ("2020-01-01 2020-01-02", ["2020-01-01", "2020-01-02"]),
        ("1 b", ["1", "b"]),
        ("NA NA", ["NA", "NA"]),
    ],
)
def test_types_are_those_of_all_rows_of_a_csv(
    cells: str, values: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, last = cells.split()
    many = 100
    monkeypatch.setattr(text, "BLOCKS", (64, 1 << 20))  # so that they are not parsed at once
    (tmp_path / "t.csv").write_text("x\n" + f"{first}\n" * many + f"{last}\n")
    column = read_table(tmp_path / "t.csv")["x"]
    found = [column[0].as_py(), column[many].as_py()]
    assert (found, len(column)) == (values, many + 1)
    assert list(map(type, found)) == list(map(type, values))


def test_times_of_json_are_text_as_written(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"t": "2020-01-01", "u": ["2020-01-01"]}\n')
    assert read_table(tmp_path / "t.jsonl").to_pylist() == [{"t": "2020-01-01", "u": ["2020-01-01"]}]


def test_compressed_text_and_its_lines(tmp_path: Path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbfx,y\r\n"a\nb",1\r\n\r\nc,2\r\n'))
    assert read_table(path).to_pylist() == [{"x": "a\nb", "y": 1}, {"x": "c", "y": 2}]
    assert [place_of(path, row) for row in (0, 1)] == ["line 2", "line 5"]
    assert [place_of(written(tmp_path, "t.jsonl"), 1), place_of(written(tmp_path, "t.json"), 1)] == ["line 3", "row 2"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", "", "has no header: the first line must name the columns"),
        ("t.csv", "x,y\n", "has no rows"),
        ("t.csv", "x,x\n1,2\n", "has the column 'x' twice"),
        ("t.csv", "x;y\n1;2\n", "line 1 has ';' between names, must have what its ending says"),
        ("t.csv", "x,y\n1,2\n\n3\n", "line 4 has 1 values, must have 2 as the header"),
        ("t.csv", 'x,y\n1,2\n3,"4\n5,6\n', "line 3: unexpected end of data"),
        ("t.csv", 'x,y\n"1,2\n3,"4"\n', "line 2: ',' expected after '\"'"),
        ("t.jsonl", '{"x": 1}\n{"x": \n', "line 2 is no JSON: Expecting value"),
        ("t.jsonl", '{"x": 1}\n[2]\n', "line 2 is no object, as {column: value, …}"),
        ("t.jsonl", '{"x": [1]}\n{"x": 2}\n', "line 2, column x: 2 is of another type than before"),
        ("t.jsonl", '{"x": [1]}\n{"x": [1, "a"]}\n', "line 2, column x: [1, 'a'] is of another type than before"),
        ("t.json", '[{"x": 1}, {"x": "b"}]', "row 2, column x: b is of another type than before"),
        ("t.parquet", "no", "cannot be read, or not to its end: "),
        ("t.npz", "no", "cannot be read, or not to its end: "),
        ("t.arrow", "no", "is damaged: it has no end"),
        ("t.xlsx", "no", "must end in .parquet, .csv"),
        ("t.csv.gz", "no", "cannot be read, or not to its end: "),
    ],
)
def test_what_is_wrong_is_one_line_that_says_where(name: str, content: str, problem: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(OptionError) as error:
        read_table(tmp_path / name)
    assert str(error.value).startswith(f"source={tmp_path / name}: {problem}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_bytes_that_are_no_text_are_found(name: str, tmp_path: Path):
    path = written(tmp_path, name)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], lines[2] + b"\xff", *lines[3:]]))
    with pytest.raises(OptionError, match="line 3: is no text in UTF-8"):
        read_table(path)


def test_what_is_no_single_table_is_refused(tmp_path: Path):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "dict")
    np.savez(tmp_path / "ragged.npz", x=np.zeros(3), y=np.zeros(4))
    np.savez(tmp_path / "objects.npz", x=np.array([None, 1]))
    np.save(tmp_path / "complex.npy", np.zeros(3, complex))
    for name, problem in {
        "dict": "must be a file, or one split that save_to_disk wrote",
        "missing.csv": "must be a file that can be read: No such file",
        "ragged.npz": "has arrays of different lengths: x 3, y 4",
        "objects.npz": "cannot be read, or not to its end: Object arrays",
        "complex.npy": "values has the type complex128",
    }.items():
        with pytest.raises(OptionError, match=problem):
            read_table(tmp_path / name)


def test_class_labels_have_their_names(tmp_path: Path):
    features = Features(label=ClassLabel(names=["no", "yes"]), tags=Sequence(ClassLabel(names=["a", "b"])))
    codes = {"label": [1, 0, -1, None], "tags": [[0], [1], [], None]}
    Dataset.from_dict(codes, features).save_to_disk(tmp_path / "d")
    table = read_table(tmp_path / "d")
    assert table["label"].to_pylist() == ["yes", "no", None, None]
    assert table["tags"].to_pylist() == codes["tags"]  # of steps, which are tokens


def test_a_stream_that_ends_between_batches_is_damaged(tmp_path: Path):
    path = written(tmp_path, "t.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OptionError, match="it has no end"):
        read_table(path)
