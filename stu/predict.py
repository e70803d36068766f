"""Predictions of a trained model for the rows of tables: python -m stu.predict RUN INPUT…. See --help."""

import argparse
import fnmatch
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stu.errors import OptionError, brief, require
from stu.files import there
from stu.tables.cells import sequences, step_of, value_of
from stu.tables.rows import FORMS, WRITERS, Row, Source, Write, of_file, of_standard_input, of_texts, writing

if TYPE_CHECKING:  # takes seconds to import, which --help need not
    from stu.saved.loading import Prediction, Trained

EXAMPLES = """\
RUN is a run directory (its best weights), a checkpoint, or a folder that stu.export wrote. An INPUT is a file of csv,
tsv, jsonl, json, parquet, arrow, npz or npy, a save_to_disk folder, or - for what comes in. Every row is one input, and
comes out again with its prediction: a label with the probabilities of all labels, numbers in the units of the data, or
a list where each step has a prediction. Where a row is a step, as it was in the training or with --sequence, it comes
out with the prediction of that step, or of its sequence.

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
            rows, skipped = _predict(loaded, _sources(options, loaded), options, write)
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
    parser.add_argument("--sequence", metavar="NAME", help="of the column that says which sequence a row is a step of")
    parser.add_argument("--time", metavar="NAME", help="of the column that orders the steps of a sequence")
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
        require(not output.exists() or options.overwrite, "--output", output, "exists; --overwrite replaces it")
        require(not output.is_dir(), "--output", output, "is a folder")
        paths = [] if options.text else filter(None, map(there, options.inputs))
        itself = output.exists() and any(map(output.samefile, paths))
        require(not itself, "--output", output, "is an input; choose another file")
        require(output.absolute().parent.is_dir(), "--output", output, "must be in a folder that exists")
    twice = options.inputs.count("-") > 1 and not options.text
    require(not twice, "INPUT", "-", "can be read once only")
    for name in options.inputs:
        known = options.text or name == "-" or there(name) is not None
        require(known, "INPUT", name[:200], "no such file; --text reads texts themselves")


def _loaded(options: argparse.Namespace) -> "Trained":
    from stu.saved.loading import load

    if os.getcwd() not in sys.path:  # where data/ is found, if the run needs it
        sys.path.append(os.getcwd())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loaded = load(options.run, device=options.device, trust=options.trust)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return loaded


def _sources(options: argparse.Namespace, loaded: "Trained") -> Iterator[Source]:
    size = options.batch_size
    texts = (options.column or loaded.task.get("columns") or ["*"]) if loaded.reads_text else ()
    if options.text:
        yield of_texts(options.inputs, size)
        return
    for name in options.inputs:
        yield of_standard_input(options.format, size) if name == "-" else of_file(name, size, texts)


def _predict(
    loaded: "Trained", sources: Iterable[Source], options: argparse.Namespace, write: Write
) -> tuple[int, int]:
    """Write every row with its prediction; returns how many rows there were, and how many have none."""
    count = skipped = 0
    names: list[str] | None = None
    for source in sources:
        row, series = 0, _series(loaded, options)
        predict = _batch if series is None else partial(_steps, series)
        for batch in source.batches if series is None else _whole(source.batches):
            found = list(batch[0])
            columns = _chosen(found, options.column or (loaded.task.get("columns") if len(found) > 1 else None))
            names = names or found
            allowed = f"must have the columns {brief(', '.join(names))}, as before"
            require(found == names, "INPUT", "" if found == names else source.place(row), allowed)
            predicted = predict(loaded, batch, columns, partial(_place, source, row), options)
            skipped += sum(prediction is None for prediction in predicted)
            added = _columns(loaded, options.name, predicted)
            twice = [name for name in added[0] if name in names]
            require(not twice, "--name", options.name, f"the input has a column {', '.join(twice)}; choose another")
            write([{**old, **new} for old, new in zip(batch, added, strict=True)], source.schema)
            row += len(batch)
        count += row
    require(count > 0, "INPUT", " ".join(options.inputs), "has no rows")
    return count, skipped


def _whole(batches: Iterable[Sequence[Row]]) -> Iterator[Sequence[Row]]:
    """All rows at once: those of a sequence may be anywhere."""
    if rows := [row for batch in batches for row in batch]:
        yield rows


def _series(loaded: "Trained", options: argparse.Namespace) -> tuple[str | None, str | None] | None:
    """The columns of sequences and times, as given or as in the training; None where a row is a sequence."""
    kept = loaded.task.get("steps")
    if kept is None and options.sequence is None:
        require(options.time is None, "--time", options.time, "needs --sequence: a row is a whole sequence")
        return None
    return options.sequence or (kept or {}).get("sequence"), options.time or (kept or {}).get("time")


def _place(source: Source, first: int, number: int) -> str:
    return source.place(first + number)


def _chosen(names: Sequence[str], given: Any) -> list[str]:
    """The columns of the inputs: those given by names or patterns, or the only one."""
    known = isinstance(given, list) and all(isinstance(one, str) for one in given)
    require(known or len(names) == 1, "--column", "…", f"must name that of the inputs: {brief(', '.join(names))}")
    if not known:
        return list(names)
    chosen = [[one] if one in names else fnmatch.filter(names, one) for one in given]
    missing = next((one for one, found in zip(given, chosen, strict=True) if not found), None)
    require(missing is None, "--column", missing, f"no such column; there are {brief(', '.join(names))}")
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
            arrays[number] = loaded.encoded(value_of([row.get(name) for name in columns], text=loaded.reads_text))
        except OptionError as error:
            if not options.skip_invalid:
                empty = next((name for name in columns if row.get(name) is None), brief(", ".join(columns)))
                raise OptionError(f"{place(number)}, column {empty}", error.value, error.allowed) from error
    found = dict(zip(arrays, loaded.predict_encoded(list(arrays.values())) if arrays else (), strict=True))
    return [found.get(number) for number in range(len(batch))]


def _steps(
    series: tuple[str | None, str | None],
    loaded: "Trained",
    rows: Sequence[Row],
    columns: Sequence[str],
    place: Callable[[int], str],
    options: argparse.Namespace,
) -> list["Prediction | None"]:
    """The predictions for rows that are steps: of the step, or of its whole sequence."""
    arrays: list[tuple[list[int], Any]] = []
    for numbers in sequences(rows, *series, place):
        try:
            steps = [step_of([rows[number].get(name) for name in columns]) for number in numbers]
            arrays.append((numbers, loaded.encoded([one[0] for one in steps] if len(steps[0]) == 1 else steps)))
        except OptionError as error:
            if not options.skip_invalid:
                raise _located(error, loaded, rows, numbers, columns, place) from error
    found: list[Prediction | None] = [None] * len(rows)
    for start in range(0, len(arrays), options.batch_size):
        batch = arrays[start : start + options.batch_size]
        for (numbers, _), prediction in zip(batch, loaded.predict_encoded([one for _, one in batch]), strict=True):
            for step, number in enumerate(numbers):
                each = loaded.predicts_steps
                found[number] = prediction._replace(value=prediction.value[step]) if each else prediction
    return found


def _located(
    error: OptionError,
    loaded: "Trained",
    rows: Sequence[Row],
    numbers: Sequence[int],
    columns: Sequence[str],
    place: Callable[[int], str],
) -> OptionError:
    """The error of the first cell that is wrong by itself; else that of the whole sequence, at its first row."""
    from stu.preprocessing import Tokens

    tokens = loaded.preprocessing is not None and isinstance(loaded.preprocessing.inputs, Tokens)
    for number in numbers:
        for name in columns:
            try:
                step = step_of([rows[number].get(name)])
                if tokens and len(columns) == len(step) == 1:
                    loaded.encoded(step)
            except OptionError as wrong:
                return OptionError(f"{place(number)}, column {name}", wrong.value, wrong.allowed)
    where = f"{place(numbers[0])} and the rows of its sequence, column {brief(', '.join(columns))}"
    return OptionError(where, error.value, error.allowed)


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
