"""From what a user has, texts, tokens and numbers, to the arrays of a model, and from its predictions back.

L length, C channels, V vocabulary

All of it is plain data: what was fitted to the training split goes into checkpoints and exported folders as JSON.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from stu.errors import OptionError, brief, require

Label = str | int | float | bool

PADDING, OTHER = 0, 1  # tokens of text that no text has, and of what is in no vocabulary


@final
@dataclass(frozen=True)
class Text:
    """Texts as tokens: 0 is padding; then UTF-8 bytes, b + 1, or 1 for what is in no vocabulary, and the vocabulary.

    units: words are what white space separates. vocabulary: the known characters or words; of bytes there is none.
    other: whether there is a token for what is not in the vocabulary; without one it is refused, and the vocabulary
    begins at 1. Raises `OptionError` for other units, and for what is no text.
    """

    units: Literal["bytes", "characters", "words"] = "bytes"
    vocabulary: tuple[str, ...] = ()
    other: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        known = self.units in ("bytes", "characters", "words")
        require(known, "units", self.units, "must be bytes, characters or words")
        fits = bool(self.vocabulary) == (self.units != "bytes") and len(set(self.vocabulary)) == len(self.vocabulary)
        require(fits, "vocabulary", len(self.vocabulary), "must be of different characters or words, and none of bytes")
        known = self.other is True or (self.other is False and self.units != "bytes")
        require(known, "other", self.other, "must be true or false, and true for bytes, of which all are known")
        object.__setattr__(self, "_tokens", {unit: token for token, unit in enumerate(self.vocabulary, self._first)})

    @property
    def _first(self) -> int:
        """The token of the first of the vocabulary."""
        return OTHER + self.other

    @property
    def vocab_size(self) -> int:
        """V."""
        return 257 if self.units == "bytes" else self._first + len(self.vocabulary)

    @property
    def alphabet(self) -> range:
        """The tokens that texts are made of: all but padding."""
        return range(PADDING + 1, self.vocab_size)

    def encode(self, value: Any) -> NDArray[np.int64]:
        """A text as tokens (L,)."""
        require(isinstance(value, str), "input", brief(value), "must be a text")
        if self.units == "bytes":
            return np.frombuffer(value.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int64) + 1
        units, tokens = value.split() if self.units == "words" else value, vars(self)["_tokens"]
        if not self.other:
            unknown = next((unit for unit in units if unit not in tokens), None)
            require(unknown is None, "input", brief(unknown), f"must be of the {self.units} {brief(self.vocabulary)}")
        return np.array([tokens.get(unit, OTHER) for unit in units], np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as a text; padding is left out, and U+FFFD stands for bytes that are none and for other units."""
        real = [int(token) for token in tokens if token != PADDING]
        if self.units == "bytes":
            return bytes(token - 1 for token in real).decode("utf-8", "replace")
        units = (*["\ufffd"] * self.other, *self.vocabulary)
        return (" " if self.units == "words" else "").join(units[token - OTHER] for token in real)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """`decode` of tokens as they come, which together give the same text: a character waits for its last byte."""
        decoder, space = codecs.getincrementaldecoder("utf-8")("replace"), ""
        for token in tokens:
            if token == PADDING:
                yield ""
            elif self.units == "bytes":
                yield decoder.decode(bytes([token - 1]))
            else:
                yield space + self.decode([token])
                space = " " if self.units == "words" else ""
        yield decoder.decode(b"", final=True)


@final
@dataclass(frozen=True)
class Tokens:
    """Integers 0 … V − 1, as they are. Raises `OptionError` for others."""

    vocab_size: int

    def __post_init__(self) -> None:
        require(self.vocab_size >= 1, "vocab_size", self.vocab_size, "must be at least 1")

    @property
    def alphabet(self) -> range:
        """All tokens."""
        return range(self.vocab_size)

    def encode(self, value: Any) -> NDArray[np.int64]:
        """Integers (L,), as reals too, or a text of them with spaces between, as tokens (L,)."""
        given = _integers(value) if isinstance(value, str) else value
        try:
            tokens = np.asarray(given)
        except ValueError as error:  # lists of several lengths
            raise OptionError("input", brief(value), "must be a list of integers") from error
        kind = tokens.dtype.kind
        whole = tokens.ndim == 1 and (kind in "iu" or (kind == "f" and bool((tokens == np.floor(tokens)).all())))
        require(whole, "input", brief(value), "must be a list of integers")
        inside = (tokens >= 0) & (tokens < self.vocab_size)
        allowed = f"must be in 0 … {self.vocab_size - 1}"
        require(bool(inside.all()), "input", tokens[~inside][:1].tolist(), allowed)
        return tokens.astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> list[int]:
        """The integers themselves."""
        return [int(token) for token in tokens]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Tokens as they come, as a text with spaces between."""
        space = ""
        for token in tokens:
            yield f"{space}{int(token)}"
            space = " "


@final
@dataclass(frozen=True)
class Numbers:
    """Numbers, normalised per channel: (x − mean) / std. Raises `OptionError` for others, and no numbers.

    mean, std: (C,), std above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        fits = len(self.mean) == len(self.std) >= 1 and bool(np.isfinite(self.mean + self.std).all())
        require(fits and min(self.std) > 0, "std", self.std, "must be above 0, one per mean, all finite")

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    def encode(self, value: Any) -> NDArray[np.float32]:
        """Numbers (L, C), or (L,) where C = 1, → (L, C)."""
        try:
            numbers = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise OptionError("input", brief(value), "must be numbers, equally many in every step") from error
        numbers = numbers[:, None] if numbers.ndim == 1 else numbers
        fits = numbers.ndim == 2 and numbers.shape[1] == self.channels
        require(fits, "input", numbers.shape, f"must be numbers (L, {self.channels})")
        bad = ~np.isfinite(numbers)
        require(not bad.any(), "input", numbers[bad][:1].tolist(), "must be finite")
        return ((numbers - self.mean) / self.std).astype(np.float32)

    def decode(self, values: Any) -> NDArray[np.float64]:
        """Normalised values (…, C) → numbers (…, C)."""
        return np.asarray(values, np.float64) * self.std + self.mean


@final
@dataclass(frozen=True)
class Classes:
    """Labels of any type; class i is labels[i]. Raises `OptionError` for a label that is not among them."""

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        odd = [label for label in self.labels if not isinstance(label, str | int | float | np.bool_ | np.number)]
        require(not odd, "labels", brief(odd[:1]), "must be texts, numbers, true or false")
        keys = [_key(label) for label in self.labels]
        fits = len(set(keys)) == len(keys) >= 1
        require(fits, "labels", brief(self.labels), "must be different ones")
        object.__setattr__(self, "_classes", {key: index for index, key in enumerate(keys)})

    def encode(self, value: Any) -> int:
        """The class of a label."""
        found = vars(self)["_classes"].get(_key(value))
        require(found is not None, "label", repr(value), f"must be one of {brief(self.labels)}")
        return int(found)

    def decode(self, index: int) -> Label:
        """The label of a class."""
        return self.labels[index]


Inputs = Text | Tokens | Numbers
Targets = Text | Tokens | Numbers | Classes
KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Text, Tokens, Numbers, Classes)}


class Preprocessing(NamedTuple):
    """How a task reads the inputs of a user, and what its predictions mean; None: they are real numbers as they are."""

    inputs: Inputs
    targets: Targets | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which `read` makes it again."""
        return {name: None if part is None else _as_dict(part) for name, part in self._asdict().items()}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """That of `as_dict`. Raises `OptionError` for what is none."""
        inputs, targets = _read("inputs", values.get("inputs")), values.get("targets")
        require(
            isinstance(inputs, Inputs), "preprocessing.inputs", values.get("inputs"), "must be an encoding of inputs"
        )
        return cls(inputs, None if targets is None else _read("targets", targets))


def _as_dict(part: Any) -> dict[str, Any]:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(part).items()}
    return {"kind": type(part).__name__.lower(), **plain}


def _read(name: str, values: Any) -> Any:
    """One encoding from its plain values."""
    known = isinstance(values, Mapping) and values.get("kind") in KINDS
    require(known, f"preprocessing.{name}", brief(values), f"must have a kind: {', '.join(KINDS)}")
    options = {key: value for key, value in values.items() if key != "kind"}
    try:
        return KINDS[values["kind"]](**options)
    except (TypeError, ValueError) as error:
        raise OptionError(f"preprocessing.{name}", brief(values), f"is damaged: {error}") from error


def _integers(text: str) -> NDArray[np.int64]:
    try:
        return np.array([int(word) for word in text.split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise OptionError("input", brief(text), "must be integers, with spaces between") from error


def _key(label: Any) -> tuple[str, Any]:
    """What tells labels apart: 1, "1" and true are three; 1 and 1.0 are one."""
    if isinstance(label, bool | np.bool_):
        return "bool", bool(label)
    if isinstance(label, int | float | np.number):
        return "number", label.item() if isinstance(label, np.number) else label  # integers exactly, however large
    return "text", str(label)
