"""Which runs, by what they are and by their configurations: `task=lds`, `optimizer.lr>=1e-3`, `model=stu*`."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import yaml

from experiments.compare.runs import Row
from stu.errors import require
from stu.training.records import flatten

FIELDS = (*(field.name for field in fields(Row) if field.name != "config"), "trivial", "state")
WORD = re.compile(r"([^=<>!]+)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
ABSENT = object()
TEST = "test/"


def value(row: Row, key: str) -> Any:
    """What a run has under a key; `ABSENT` where it has none.

    A key is a field of `Row`, an option as on the command line, or a metric of the test, such as test/accuracy@512.
    """
    if key in FIELDS:
        return getattr(row, key)
    if key.startswith(TEST):
        return row.tests.get(key.removeprefix(TEST), ABSENT)
    content: Any = {**row.config, "baselines": row.baselines}
    for part in key.split("."):
        if isinstance(content, list) and part.isdecimal() and int(part) < len(content):
            content = content[int(part)]
        elif isinstance(content, Mapping) and part in content:
            content = content[part]
        else:
            return ABSENT
    return content


def where(rows: Sequence[Row], words: Iterable[str]) -> list[Row]:
    """The runs for which all words hold: KEY=VALUE[,VALUE…], KEY!=VALUE[,VALUE…], KEY<NUMBER, <=, >, >=.

    Texts may have the wildcards * and ?. A run without the key is left out, also by !=. Raises `OptionError` for what
    is no such word, and for a key that no run has.
    """
    kept = list(rows)
    for word in words:
        found = WORD.fullmatch(word)
        require(found is not None, "--where", word, "must be KEY=VALUE, or with !=, <, <=, > or >=")
        key, sign, text = (part.strip() for part in found.groups()) if found else ("", "", "")
        require_key(rows, "--where", key)
        _require_no_group(rows, key)
        holds = _condition(key, sign, text)
        kept = [row for row in kept if (found_value := value(row, key)) is not ABSENT and holds(found_value)]
    return kept


def require_key(rows: Sequence[Row], option: str, key: str) -> None:
    """Raise `OptionError` unless one of the runs has this key; without runs every key is right."""
    if not rows or any(value(row, key) is not ABSENT for row in rows):
        return
    known = {*FIELDS, *(name for row in rows for name in (*flatten(row.config), *(TEST + name for name in row.tests)))}
    close = sorted(name for name in known if name.endswith(f".{key}")) or get_close_matches(key, known, cutoff=0.7)
    hint = f"did you mean {' or '.join(close[:3])}?" if close else f"a run has {', '.join(FIELDS[:4])}, …"
    require(False, option, key, f"no run has such a key; {hint}")


def _require_no_group(rows: Sequence[Row], key: str) -> None:
    """Raise `OptionError` for a key that has options of its own in all runs, such as optimizer."""
    found = [content for row in rows if (content := value(row, key)) is not ABSENT]
    if any(found) and all(isinstance(content, Mapping) for content in found):
        names = dict.fromkeys(f"{key}.{name}" for content in found for name in content)
        require(False, "--where", key, f"is a group of options: {', '.join([*names][:4])}")


def _condition(key: str, sign: str, text: str) -> Callable[[Any], bool]:
    if sign in ORDERS:
        limit = _parsed(text)
        require(_is_number(limit), "--where", f"{key}{sign}{text}", f"{sign} compares with a number")
        return lambda content: _is_number(content) and ORDERS[sign](content, limit)
    wanted = [text, *(part.strip() for part in text.split(","))]  # a name or a list may have commas
    return lambda content: any(_equal(content, one) for one in wanted) == (sign == "=")


def _equal(content: Any, text: str) -> bool:
    """Whether a value is what a text means, as a number, a text or a pattern; of a list, it or one item."""
    parsed = _parsed(text)
    if content is None and text == "none":  # as options call it
        return True
    if isinstance(content, list | tuple):
        return parsed == list(content) or any(_equal(item, text) for item in content)
    if _is_number(content) and _is_number(parsed):
        return bool(content == parsed)
    if isinstance(content, str):
        return content == text or fnmatchcase(content, text.replace("[", "[[]"))
    return type(content) is type(parsed) and bool(content == parsed)


def _parsed(text: str) -> Any:
    """A word as on the command line: 1e-3 is a number, too."""
    try:
        return (
            float(text)
            if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|[-+]?inf", text, re.IGNORECASE)
            else yaml.safe_load(text)
        )
    except (ValueError, yaml.YAMLError):
        return text


def _is_number(content: Any) -> bool:
    return isinstance(content, int | float) and not isinstance(content, bool)
