"""Predictions of a trained model for the rows of tables: python -m stu.predict RUN INPUT…. See --help."""

import argparse
import fnmatch
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stu.errors import OptionError, brief, require
from stu.rows import FORMS, WRITERS, Row, Source, Write, of_file, of_standard_input, of_texts, writing

if TYPE_CHECKING:  # takes seconds to import, which --help need not
    from stu.loading import Prediction, Trained

EXAMPLES = """\
RUN is a run directory (its best weights), a checkpoint, or a folder that stu.export wrote. An INPUT is a file of csv,
tsv, jsonl, json, parquet, arrow, npz or npy, a save_to_disk folder, or - for what comes in. Every row is one input, and
comes out again with its prediction: a label with the probabilities of all labels, numbers in the units of the data, or
a list where each step has a prediction.

  python -m stu.predict runs/digits/stu/name pictures.parquet --column pixels --output predicted.csv
  python -m stu.predict exported --text "[MAX 2 9 [MIN 4 7 ] 0 ]"
  cut -f 3 reviews.tsv | python -m stu.predict runs/lra_text/s5/name - --format text --output predicted.jsonl"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict, print or write; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _require_possible(options)
        loaded = _loaded(options)
        with writing(options.output) as write:
            rows, skipped = _predict(loaded, _sources(options), options, write)
    except OptionError as error:
        return _refuse(str(error), error.exit_code)
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _refuse("interrupted; nothing was written" if options.output else "interrupted", 130)
    if skipped:
        print(f"note: {skipped:,} of {rows:,} rows have no prediction", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m stu.predict", epilog=EXAMPLES, formatter_class=form, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="what was trained")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files, - for standard input, or texts with --text")
    parser.add_argument("--text", action="store_true", help="the inputs are texts themselves, no files")
    parser.add_argument(
        "--column", metavar="NAME", action="append", help="of the inputs, or a pattern; again for channels, or steps"
    )
    parser.add_argument("--format", choices=FORMS, default="csv", help="of standard input")
    parser.add_argument("--output", metavar="FILE", type=Path, help="a .csv, .jsonl or .parquet; else csv is printed")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file, if it is there")
    parser.add_argument("--name", default="prediction", help="of the column that is added (default: prediction)")
    parser.add_argument("--skip-invalid", action="store_true", help="rows that cannot be read get no prediction")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="rows at a time (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument("--trust", metavar="PACKAGE", action="append", default=[], help="whose classes may be called")
    return parser


def _require_possible(options: argparse.Namespace) -> None:
    """Raise `OptionError` for what can be seen before anything takes time."""
    require(options.batch_size >= 1, "--batch-size", options.batch_size, "must be at least 1")
    output: Path | None = options.output
    if output is not None:
        require(output.suffix in WRITERS, "--output", output, f"must end in {', '.join(WRITERS)}")
        there = output.exists()
        require(not there or options.overwrite, "--output", output, "exists; --overwrite replaces it")
        require(not output.is_dir(), "--output", output, "is a folder")
        itself = there and any(Path(name).exists() and output.samefile(name) for name in options.inputs)
        require(not itself, "--output", output, "is an input; choose another file")
        require(output.absolute().parent.is_dir(), "--output", output, "must be in a folder that exists")
    twice = options.inputs.count("-") > 1 and not options.text
    require(not twice, "INPUT", "-", "can be read once only")
    for name in options.inputs:
        there = options.text or name == "-" or Path(name).expanduser().exists()
        require(there, "INPUT", name, "no such file")


def _loaded(options: argparse.Namespace) -> "Trained":
    from stu.loading import load

    if os.getcwd() not in sys.path:  # where data/ is found, if the run needs it
        sys.path.append(os.getcwd())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loaded = load(options.run, device=options.device, trust=options.trust)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return loaded


def _sources(options: argparse.Namespace) -> Iterator[Source]:
    size = options.batch_size
    if options.text:
        yield of_texts(options.inputs, size)
        return
    for name in options.inputs:
        yield of_standard_input(options.format, size) if name == "-" else of_file(name, size)


def _predict(
    loaded: "Trained", sources: Iterable[Source], options: argparse.Namespace, write: Write
) -> tuple[int, int]:
    """Write every row with its prediction; returns how many rows there were, and how many have none."""
    count = skipped = 0
    names: list[str] | None = None
    for source in sources:
        row = 0
        for batch in source.batches:
            found = list(batch[0])
            columns = _chosen(found, options.column or loaded.task.get("columns"))
            names = names or found
            require(found == names, "INPUT", source.place(row), f"must have the columns {', '.join(names)}, as before")
            predicted = _batch(loaded, batch, columns, partial(_place, source, row), options)
            skipped += sum(prediction is None for prediction in predicted)
            added = _columns(loaded, options.name, predicted)
            twice = [name for name in added[0] if name in names]
            require(not twice, "--name", options.name, f"the input has a column {', '.join(twice)}; choose another")
            write([{**old, **new} for old, new in zip(batch, added, strict=True)], source.schema)
            row += len(batch)
        count += row
    require(count > 0, "INPUT", " ".join(options.inputs), "has no rows")
    return count, skipped


def _place(source: Source, first: int, number: int) -> str:
    return source.place(first + number)


def _chosen(names: Sequence[str], given: Any) -> list[str]:
    """The columns of the inputs: those given by names or patterns, or the only one."""
    known = isinstance(given, list) and all(isinstance(one, str) for one in given)
    require(known or len(names) == 1, "--column", "…", f"must name that of the inputs: {', '.join(names)}")
    if not known:
        return list(names)
    chosen = [[one] if one in names else fnmatch.filter(names, one) for one in given]
    missing = next((one for one, found in zip(given, chosen, strict=True) if not found), None)
    require(missing is None, "--column", missing, f"no such column; there are {', '.join(names)}")
    return [name for found in chosen for name in found]


def _batch(
    loaded: "Trained",
    batch: Sequence[Row],
    columns: Sequence[str],
    place: Callable[[int], str],
    options: argparse.Namespace,
) -> list["Prediction | None"]:
    """The predictions for some rows; None for those that are skipped."""
    arrays: dict[int, Any] = {}
    for number, row in enumerate(batch):
        try:
            arrays[number] = loaded.encoded(_value([row.get(name) for name in columns], loaded))
        except OptionError as error:
            if not options.skip_invalid:
                where = f"{place(number)}, column {', '.join(columns)}"
                raise OptionError(where, error.value, error.allowed) from error
    found = dict(zip(arrays, loaded.predict_encoded(list(arrays.values())) if arrays else (), strict=True))
    return [found.get(number) for number in range(len(batch))]


def _value(cells: Sequence[Any], loaded: "Trained") -> Any:
    """What the cells of a row say: a text, or numbers; several columns are channels, or the steps of one."""
    require(all(cell is not None for cell in cells), "input", "empty", "must have a value")
    if loaded.reads_text:
        require(len(cells) == 1, "--column", len(cells), "must be one for texts")
        return cells[0] if isinstance(cells[0], str) else str(cells[0])  # a column of digits is one of numbers
    values = [_numbers(cell) for cell in cells]
    if len(values) == 1:
        return values[0]
    several = all(isinstance(value, list) for value in values)
    return [list(step) for step in zip(*values, strict=True)] if several and _equal(values) else values


def _equal(values: Sequence[Any]) -> bool:
    same = len({len(value) for value in values}) == 1
    require(same, "input", [len(value) for value in values], "must have equally many steps in all columns")
    return True


def _numbers(cell: Any) -> Any:
    """A cell of a text file as the numbers that are written in it, as a JSON list or apart."""
    if not isinstance(cell, str):
        return cell
    try:
        if cell.lstrip().startswith("["):
            return json.loads(cell)
        numbers = [float(part) for part in re.split(r"[\s,;]+", cell.strip())]
    except ValueError as error:
        raise OptionError("input", brief(cell), "must be numbers") from error
    return [int(number) if number.is_integer() else number for number in numbers]


def _columns(loaded: "Trained", name: str, predicted: Sequence["Prediction | None"]) -> list[Row]:
    """The columns that are added to each row."""
    prefix = "probability" if name == "prediction" else f"{name}_probability"
    shares = [f"{prefix}_{label}" for label in loaded.labels]
    empty: Row = dict.fromkeys((name, *shares))
    rows = []
    for prediction in predicted:
        value: Any = None if prediction is None else prediction.value
        probabilities = None if prediction is None else prediction.probabilities
        plain = value.tolist() if hasattr(value, "tolist") else value
        rows.append(empty | {name: plain} | dict(zip(shares, (probabilities or {}).values(), strict=False)))
    return rows


def _refuse(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
