"""Preprocessing: what goes in comes out again, as plain JSON too, and what is not allowed is one line."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stu.errors import OptionError
from stu.preprocessing import Classes, Numbers, Preprocessing, Text, Tokens

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts)
def test_bytes_come_back(text: str):
    tokens = Text().encode(text)
    assert (tokens - 1).tolist() == list(text.encode())
    assert Text().decode(tokens) == text


def test_units_outside_the_vocabulary():
    words = Text("words", ("b", "a"))
    assert words.encode("a\n b  c").tolist() == [3, 2, 1]
    assert words.decode([3, 2, 1, 0, 0]) == "a b \ufffd"
    assert words.vocab_size == 4
    assert Text("characters", ("b", " ")).encode("b c").tolist() == [2, 3, 1]


def test_numbers_are_normalised_per_channel():
    numbers = Numbers((1, 2), (2, 4))
    encoded = numbers.encode([[1, 2], [3, -2]])
    assert encoded.tolist() == [[0, 0], [1, -1]]
    assert encoded.dtype == np.float32
    assert numbers.decode(encoded).tolist() == [[1, 2], [3, -2]]
    assert Numbers((0,), (1,)).encode([1, 2]).shape == (2, 1)


def test_labels_of_any_type_are_told_apart():
    classes = Classes(("1", 1, True, -0.5))
    assert [classes.encode(label) for label in ("1", 1, 1.0, True, np.float32(-0.5))] == [0, 1, 1, 2, 3]
    assert classes.decode(2) is True
    large = Classes((2**53, 2**53 + 1))  # one as reals
    assert [large.encode(label) for label in (2**53 + 1, np.int64(2**53 + 1), 2.0**53)] == [1, 1, 0]


def test_tokens_may_be_whole_reals():
    """As some formats write integers, and as training takes them."""
    tokens = Tokens(7).encode([4.0, 6.0])
    assert (tokens.tolist(), tokens.dtype) == ([4, 6], np.int64)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(Text("words", ("a", "b")), Classes(("x", 2, False))),
        Preprocessing(Numbers((0.5,), (2,)), Numbers((1, 2), (3, 4))),
        Preprocessing(Tokens(5)),
    ],
)
def test_it_is_plain_json(preprocessing: Preprocessing):
    assert Preprocessing.read(json.loads(json.dumps(preprocessing.as_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("encoding", "value", "message"),
    [
        (Text(), 3, "input=3: must be a text"),
        (Tokens(3), [0, 3], r"input=\[3\]: must be in 0 … 2"),
        (Tokens(3), [0.5], "must be a list of integers"),
        (Tokens(3), [1.0, float("nan")], "must be a list of integers"),
        (Tokens(3), [[1], [1, 2]], "must be a list of integers"),
        (Tokens(3), [float("inf")], r"input=\[inf\]: must be in 0 … 2"),
        (Numbers((0,), (1,)), [1, float("nan")], r"input=\[nan\]: must be finite"),
        (Numbers((0,), (1,)), [[1, 2]], r"must be numbers \(L, 1\)"),
        (Numbers((0, 0), (1, 1)), [[1], [1, 2]], "equally many in every step"),
        (Classes(("a", "b")), "c", "label='c': must be one of"),
    ],
)
def test_what_is_not_allowed_is_one_line(encoding, value, message):
    with pytest.raises(OptionError, match=message):
        encoding.encode(value)


@pytest.mark.parametrize(
    "values", [{}, {"inputs": None}, {"inputs": {"kind": "os"}}, {"inputs": {"kind": "numbers", "mean": [0]}}]
)
def test_what_is_no_preprocessing_is_refused(values):
    with pytest.raises(OptionError, match=r"preprocessing\.inputs"):
        Preprocessing.read(values)
