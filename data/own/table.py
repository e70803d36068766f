"""The data of a table: read and checked, normalised by the training split alone, stored once, and memory-mapped.

n examples, T steps of all sequences, C channels, O outputs
"""

import json
from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.own import baselines, columns, sequences, splits
from data.own.columns import Integers, Names, Reals
from data.own.sequences import NEXT, TEXT, Kind, Read, RowsAre, Sequences, Target, Targets
from data.own.sources import UNDECIDED, Part, Rows, identity, loaded, parts_of
from data.store.arrow import read_arrays, write_arrays
from data.store.cache import say
from data.store.sources import note_repeats
from data.store.stored import StoredData
from stu.errors import OptionError, brief, require
from stu.files import write_atomically
from stu.preprocessing import Classes, Inputs, Numbers, Preprocessing, Text, Tokens
from stu.task import Splits

VERSION = 3  # increment when the same options produce different examples, or the same examples different files

WORDS = 20_000  # of a vocabulary, unless the option says otherwise
MOST_TOKENS = 2**20  # that integers may be; more are quantities
FEW_SERIES = 10  # of which each is cut, rather than some of them being the test set
EVERY_STEP = ("steps", "forecast", "token")  # what has a target at every step, so that windows may be cut
OWN = ("sequence", "time", "split", "group")  # options that name columns


@final
@dataclass(frozen=True, kw_only=True)
class TableData(StoredData["TableExamples"]):
    """A table of sequences; conf/task/own.yaml explains the options."""

    name = "own"

    seq_len: int
    inputs: Names | None
    target: Names | None
    source: str | None = None
    read: Read = "auto"
    vocabulary: int | None = None
    kind: Kind = "auto"
    rows: RowsAre = "auto"
    sequence: str | None = None
    time: str | None = None
    stride: int | None = None
    split: str | None = None
    group: str | None = None
    divide: Literal["auto", "random", "time"] = "auto"
    train: float | None = None
    val: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_at_least(seq_len=1, seed=0)
        for name, least in (("vocabulary", 1), ("stride", 1)):
            if getattr(self, name) is not None:
                self.require_least(name, least)
        if self.vocabulary is not None:
            self.require_memory(8 * self.vocabulary, "vocabulary")
        for name in Splits._fields:
            size = getattr(self, name)
            fits = size is None or 0 < size < 1 or (1 <= size < 2**40 and size == int(size))
            require(fits, name, size, "must be a fraction between 0 and 1, or a number")
        if self.divide == "time" and self.group is not None:
            raise OptionError("group", self.group, "must be null where divide=time")

    @cached_property
    def parts(self) -> list[Part]:
        """The files of the source."""
        return parts_of(self.source)

    @cached_property
    def spec(self) -> dict[str, object]:
        """The options, and the checksums of the contents of the source."""
        options = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("dir", "source")}
        names = {
            key: value if isinstance(value, str) or value is None else list(value)
            for key, value in options.items()
            if key in ("inputs", "target")
        }
        return {"version": VERSION, **options, **names, "contents": identity(self.parts)}

    def build(self, folder: Path) -> None:
        """Write train.arrow, val.arrow and test.arrow, each with its steps, and facts.json."""
        rows, inputs, target = self.loaded()
        try:
            self._build(folder, rows, inputs, target)
        except pa.ArrowException as error:  # types of columns that Arrow has no conversion for
            raise OptionError("source", rows.name, f"has a column of a type that cannot be read: {error}") from error

    def _build(self, folder: Path, rows: Rows, inputs: list[str], target: list[str] | None) -> None:
        of, targets, split = self.in_splits(rows, inputs, target)
        encoding = self.fitted(rows, of, split)
        of = _encoded(encoding, of)
        targets, decoding = self.decoded(rows, of, targets, split, encoding)
        sizes = [
            self.write(folder, name, rows, of, targets, split == number) for number, name in enumerate(Splits._fields)
        ]
        _note_repeats(of, split)
        season = None
        if targets.kind == "forecast":
            parts = np.split(of.values, np.cumsum(of.lengths)[:-1])
            season = baselines.season_of([one for one, at in zip(parts, split, strict=True) if at == splits.TRAIN])
        facts: dict[str, Any] = {"season": season, "kind": targets.kind}
        facts |= {"preprocessing": Preprocessing(encoding, decoding).as_dict()}
        facts |= {"columns": inputs, "steps": of.order is not None}
        write_atomically(folder / "facts.json", json.dumps(facts) + "\n")
        say(f"{rows.name}: {_described(of, targets, encoding)}; {' / '.join(f'{size:,}' for size in sizes)} sequences")

    def loaded(self) -> tuple[Rows, list[str], list[str] | None]:
        """The rows with the columns that are needed, and the names of inputs and target; None: the next step."""
        chosen: dict[str, Any] = {}

        def choose(names: list[str]) -> tuple[list[str], list[str]]:
            others = [columns.found(names, key, getattr(self, key))[0] for key in OWN if getattr(self, key) is not None]
            require(
                self.target != NEXT or NEXT not in names,
                "target",
                NEXT,
                "is the next step, and also a column: rename that",
            )
            target = None if self.target == NEXT else columns.found(names, "target", self.target)
            chosen.update(target=target, inputs=columns.found(names, "inputs", self.inputs, [*others, *(target or [])]))
            _require_apart(self, [*chosen["inputs"], *(target or [])])
            texts = chosen["inputs"] if self.read in TEXT else []
            return list(dict.fromkeys([*chosen["inputs"], *(target or []), *others])), texts

        rows = loaded(self.parts, choose)
        if self.split is not None:
            given = np.flatnonzero(rows.split != UNDECIDED)
            require(not given.size, "split", self.split, "must be null where the names of files say the splits")
            rows = Rows(rows.table, rows.files, rows.starts, splits.by_column(rows, self.split))
        return rows, chosen["inputs"], chosen["target"]

    def in_splits(
        self, rows: Rows, inputs: list[str], target: list[str] | None
    ) -> tuple[Sequences, Targets, NDArray[np.int8]]:
        """The sequences, their targets and their splits."""
        are = self.rows
        if are == "auto":
            are = sequences.rows_are(rows, inputs, self.target, self.sequence, self.time, self.read)
        require(
            are == "steps" or self.sequence is None, "rows", are, "must be steps where there is a column `sequence`"
        )
        ordered = self.time is None or are == "steps" or self.divide == "time"
        require(ordered, "time", self.time, "orders nothing: a row is a sequence, and divide is not time")
        series = sequences.series(rows, self.sequence, self.time) if are == "steps" else None
        of = sequences.read_inputs(rows, inputs, sequences.read_as(rows, inputs, self.read, are), series)
        targets = sequences.read_targets(rows, target, self.kind, of)
        split = rows.split[of.first]
        wanted = splits.missing(split)
        sizes = {name: getattr(self, name) for name in Splits._fields}
        every_step = targets.kind in EVERY_STEP
        few = len(of) < FEW_SERIES and bool(wanted)
        whole = every_step or self.stride is None
        require(whole, "stride", self.stride, "must be null: sequences are whole, as the target is one per sequence")
        if every_step and wanted and (self.divide == "time" or (self.divide == "auto" and few and self.group is None)):
            require(self.group is None, "group", self.group, "must be null where every series is cut")
            require(self.train is None, "train", self.train, "must be null where every series is cut")
            pieces, split = splits.cuts(of.lengths, sizes, split)
            return of.cut(pieces), targets, split
        groups = (
            None if self.group is None else self.per_sequence(rows, of, self.group, columns.labels(rows, self.group)[0])
        )
        by_time = None
        if self.divide == "time":
            require(self.time is not None, "divide", "time", "needs a column: set time")
            by_time = sequences.times(rows, str(self.time))[of.first]
        labels = targets.values if targets.kind == "class" else None
        return of, targets, splits.divided(split, sizes, seed=self.seed, labels=labels, groups=groups, times=by_time)

    @staticmethod
    def per_sequence(rows: Rows, of: Sequences, column: str, values: Integers) -> Integers:
        """(rows,) → (n,)."""
        return values if of.order is None else sequences.one_value(rows, column, values, of.order, of.lengths)

    def fitted(self, rows: Rows, of: Sequences, split: NDArray[np.int8]) -> Inputs:
        """The encoding of the inputs, fitted to the training split."""
        train = split == splits.TRAIN
        if of.read == "bytes":
            require(self.vocabulary is None, "vocabulary", self.vocabulary, "must be null: bytes have none")
            return Text("bytes")
        if of.read == "characters" or of.read == "words":
            texts = [text for text, here in zip(of.values, train, strict=True) if here]
            return Text(of.read, _vocabulary(texts, of.read, self.vocabulary))
        steps = of.values[of.repeated(train)]
        if of.read == "numbers":
            require(self.vocabulary is None, "vocabulary", self.vocabulary, "must be null: numbers have none")
            return _normalisation(rows, of.columns, steps)
        size = int(steps.max()) + 1 if self.vocabulary is None else self.vocabulary
        allowed = f"so many different tokens are quantities: set read=numbers (largest is {size - 1:,} in {rows.name})"
        require(size <= MOST_TOKENS or self.vocabulary is not None, "read", self.read, allowed)
        if (bad := np.flatnonzero(of.values >= size)).size:
            problem = f"the token {of.values[bad[0]]} is above {size - 1}, the largest of train: set vocabulary"
            if self.vocabulary is not None:
                problem = f"the token {of.values[bad[0]]} must be below vocabulary={size}"
            rows.refuse(of.row_of(int(bad[0])), of.columns[0], problem)
        single = steps.min() == steps.max()
        require(not single, "source", rows.name, f"column {of.columns[0]}: is {steps[0]} in all of train, must vary")
        return Tokens(size)

    def decoded(
        self, rows: Rows, of: Sequences, targets: Targets, split: NDArray[np.int8], encoding: Inputs
    ) -> tuple[Targets, Any]:
        """The targets as models are trained on them, and what predictions mean."""
        train = split == splits.TRAIN
        if targets.kind in ("forecast", "token"):
            return targets, encoding
        if targets.kind == "class":
            present = np.unique(targets.values[train])
            unknown = ~np.isin(targets.values, present) & (split != splits.UNUSED)
            if (bad := np.flatnonzero(unknown)).size:
                place, where = int(bad[0]), Splits._fields[split[bad[0]]]
                problem = f"the class {targets.labels[targets.values[place]]!r} is in {where}, not in train"
                rows.refuse(int(of.first[place]), targets.columns[0], problem)
            classes = np.searchsorted(present, targets.values)
            require(
                len(present) > 1,
                "target",
                targets.columns[0],
                f"has a single class in train of {rows.name}, must have two",
            )
            return Targets("class", targets.columns, classes), Classes(tuple(targets.labels[code] for code in present))
        shown = targets.values[of.repeated(train) if targets.kind == "steps" else train]
        numbers = _normalisation(rows, targets.columns, shown)
        return Targets(targets.kind, targets.columns, numbers.encode(targets.values)), numbers

    def write(
        self, folder: Path, name: str, rows: Rows, of: Sequences, targets: Targets, here: NDArray[np.bool_]
    ) -> int:
        """The examples of one split; returns how many there are."""
        ahead = int(targets.kind in ("forecast", "token"))
        every_step = targets.kind in EVERY_STEP
        lengths = of.lengths[here]
        require(len(lengths) > 0, "source", rows.name, f"{name} has no sequence")
        if (bad := np.flatnonzero(lengths <= ahead)).size:
            rows.refuse(
                int(of.first[here][bad[0]]),
                of.columns[0],
                f"a sequence of {lengths[bad[0]]} steps in {name}, must have 2",
            )
        if not every_step and (bad := np.flatnonzero(lengths > self.seq_len)).size:
            file, place = rows.place(int(of.first[here][bad[0]]))
            longest = f"the longest has {of.lengths.max():,}"
            raise OptionError(
                "seq_len",
                self.seq_len,
                f"{file}, {place}, column {of.columns[0]}: a sequence has {lengths[bad[0]]:,} steps, {longest}",
            )
        steps = of.repeated(here)
        arrays = {"inputs": of.values[steps]}
        if targets.kind == "steps":
            arrays["targets"] = targets.values[steps]
        write_arrays(folder / f"{name}.steps.arrow", arrays)
        starts, sizes = _windows(
            lengths, self.seq_len, self.stride or self.seq_len, ahead, overlap=targets.kind != "token"
        )
        index = {"start": starts, "length": sizes}
        if not every_step:
            index["targets"] = targets.values[here]
        write_arrays(folder / f"{name}.arrow", index)
        return len(starts)

    def opened(self, folder: Path, split: str) -> "TableExamples":
        """The examples of one split."""
        return TableExamples(folder, split, self.facts(folder)[0])

    def facts(self, folder: Path | None = None) -> tuple[Target, Preprocessing]:
        """What is predicted, and the encodings of inputs and targets."""
        found = _facts(folder or self.prepare())
        return found["kind"], Preprocessing.read(found["preprocessing"])

    def columns(self) -> dict[str, Any]:
        """The columns of the inputs and, where a row is a step, those of its sequence and its time, if there are."""
        found = _facts(self.prepare())
        return {"columns": found["columns"]} | (
            {"steps": {"sequence": self.sequence, "time": self.time}} if found["steps"] else {}
        )

    def season(self) -> int | None:
        """In steps, of the training split; None where there is none."""
        return _facts(self.prepare())["season"]

    def probe(self, folder: Path) -> None:
        """Open all that is read of `folder`."""
        super().probe(folder)
        self.facts(folder)


@final
class TableExamples:
    """One split of `TableData`, as `stu.task.Examples`, in memory-mapped form; pickled as its arguments.

    values: (T,) tokens or (T, C) reals. lengths: (n,), None if all are equal.
    """

    def __init__(self, folder: Path, split: str, kind: Target) -> None:
        self.arguments, self.kind = (folder, split, kind), kind
        steps, index = read_arrays(folder / f"{split}.steps.arrow"), read_arrays(folder / f"{split}.arrow")
        self.values, self.starts, self.sizes = steps["inputs"], index["start"], index["length"]
        self.targets: np.ndarray | None = steps.get("targets", index.get("targets"))
        self.lengths: Integers | None = None if len(np.unique(self.sizes)) == 1 else self.sizes

    def __reduce__(self) -> tuple[type["TableExamples"], tuple[Path, str, Target]]:
        return TableExamples, self.arguments

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        start, stop = self.starts[index], self.starts[index] + self.sizes[index]
        inputs = self.values[start:stop].copy()  # torch wants it writable
        if self.kind in ("forecast", "token"):
            return inputs, self.values[start + 1 : stop + 1].copy()
        assert self.targets is not None
        return inputs, self.targets[start:stop].copy() if self.kind == "steps" else self.targets[index].copy()


def _require_apart(of: TableData, names: list[str]) -> None:
    """Refuse columns that say which rows belong together as inputs or targets."""
    for key in ("sequence", "split", "group"):
        name = getattr(of, key)
        require(name is None or name not in names, key, name, "is an input or a target, too, must be another column")


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def _vocabulary(texts: list[str], units: str, most: int | None) -> tuple[str, ...]:
    """The most frequent words or characters of texts, in their order."""
    counts = Counter(unit for text in texts for unit in (text.split() if units == "words" else text))
    limit = most or (WORDS if units == "words" else len(counts))
    return tuple(sorted(sorted(counts, key=lambda unit: (-counts[unit], unit))[:limit]))


def _normalisation(rows: Rows, names: tuple[str, ...], values: Reals) -> Numbers:
    """Mean and standard deviation per channel of (T, C); columns that are steps of one channel are all its names."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = values.mean(0), values.std(0)
    for channel, one in enumerate(std):
        name = names[channel] if len(names) == len(std) else brief(", ".join(names))
        where = f"column {name}"
        require(bool(np.isfinite(one)) and one < 1e30, "source", rows.name, f"{where}: its numbers are too large")
        same = values[0, channel] == values[:, channel]
        require(
            one > 0 and not same.all(),
            "source",
            rows.name,
            f"{where}: is {values[0, channel]:g} in all of train, must vary",
        )
    return Numbers(tuple(mean), tuple(std))


def _encoded(encoding: Inputs, of: Sequences) -> Sequences:
    """The sequences with values as models get them."""
    if not isinstance(encoding, Text):
        values: Any = encoding.encode(of.values)
        return Sequences(of.read, of.columns, _smallest(values), of.lengths, of.first, of.order)
    texts = [encoding.encode(text) for text in of.values]
    lengths = np.array([len(text) for text in texts])
    return Sequences(of.read, of.columns, _smallest(np.concatenate(texts)), lengths, of.first, None)


def _note_repeats(of: Sequences, split: NDArray[np.int8]) -> None:
    """Say how many sequences of val and test are in train, too."""
    digests = [hash(one.tobytes()) for one in np.split(of.values, np.cumsum(of.lengths)[:-1])]
    by_split = [[digest for digest, one in zip(digests, split, strict=True) if one == number] for number in range(3)]
    known = set(by_split[splits.TRAIN])
    for number in (splits.VAL, splits.TEST):
        note_repeats(Splits._fields[number], sum(digest in known for digest in by_split[number]), len(by_split[number]))


def _smallest(values: NDArray[Any]) -> NDArray[Any]:
    """Integers in the smallest type that holds them, and that torch has."""
    if values.dtype.kind == "f":
        return values
    kinds = (np.uint8, np.int16, np.int32)
    return values.astype(next((kind for kind in kinds if values.max() <= np.iinfo(kind).max), np.int64))


def _windows(lengths: Integers, seq_len: int, stride: int, ahead: int, *, overlap: bool) -> tuple[Integers, Integers]:
    """Starts and lengths of the examples in sequences that lie one after the other: whole, or in windows.

    ahead: steps after an example that it needs. overlap: the last window of a sequence is as long as the others.
    """
    offsets = np.cumsum(lengths) - lengths
    usable = lengths - ahead
    if usable.max() <= seq_len:
        return offsets, usable
    starts, sizes = [], []
    for offset, size in zip(offsets, usable, strict=True):
        begin = np.arange(0, max(1, size - seq_len + 1), stride)
        rest = size - seq_len if overlap else begin[-1] + min(stride, seq_len)
        if begin[-1] + seq_len < size and begin[-1] + stride < size:  # what no window has yet
            begin = np.append(begin, rest)
        starts.append(offset + begin)
        sizes.append(np.minimum(seq_len, size - begin))
    return np.concatenate(starts), np.concatenate(sizes)


def _described(of: Sequences, targets: Targets, encoding: Inputs) -> str:
    """What the data were taken for, in a line."""
    low, high = of.lengths.min(), of.lengths.max()
    steps = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    match encoding:
        case Text():
            what = f"{encoding.units} of {of.columns[0]}, {encoding.vocab_size:,} tokens"
        case Tokens():
            what = f"tokens, {encoding.vocab_size:,} different ones"
        case Numbers():
            what = f"numbers, {encoding.channels} channel{'s' * (encoding.channels > 1)}"
    predicted = {
        "class": f"the class {brief(', '.join(targets.columns))}",
        "number": f"one number per sequence ({brief(', '.join(targets.columns))})",
        "steps": f"a number at every step ({brief(', '.join(targets.columns))})",
        "forecast": "the next step",
        "token": "the next token",
    }[targets.kind]
    return f"inputs are {what}, {steps} steps; predicted is {predicted}"
