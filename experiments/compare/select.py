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

FIELDS = tuple(field.name for field in fields(Row) if field.name != "config")
WORD = re.compile(r"([^=<>!]+)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
ABSENT = object()


def value(row: Row, key: str) -> Any:
    """What a run has under a key: a field of `Row`, or an option as on the command line; `ABSENT` where it has none."""
    if key in FIELDS:
        return getattr(row, key)
    content: Any = row.config
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
        holds = _condition(key, sign, text)
        kept = [row for row in kept if (found_value := value(row, key)) is not ABSENT and holds(found_value)]
    return kept


def require_key(rows: Sequence[Row], option: str, key: str) -> None:
    """Raise `OptionError` unless one of the runs has this key; without runs every key is right."""
    if not rows or any(value(row, key) is not ABSENT for row in rows):
        return
    known = {*FIELDS, *(name for row in rows for name in options(row.config))}
    close = [*get_close_matches(key, known, n=3), *sorted(name for name in known if name.endswith(f".{key}"))][:3]
    hint = (
        f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else f"; a run has {', '.join(FIELDS[:4])}, …"
    )
    require(False, option, key, f"no run has such a key{hint}")


def options(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration flat: dotted key → value; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, content in config.items():
        name = f"{prefix}{key}"
        flat |= options(content, f"{name}.") if isinstance(content, Mapping) and content else {name: content}
    return flat


def _condition(key: str, sign: str, text: str) -> Callable[[Any], bool]:
    if sign in ORDERS:
        limit = _parsed(text)
        require(_is_number(limit), "--where", f"{key}{sign}{text}", f"{sign} compares with a number")
        return lambda content: _is_number(content) and ORDERS[sign](content, limit)
    wanted = [part.strip() for part in text.split(",")]
    return lambda content: any(_equal(content, one) for one in wanted) == (sign == "=")


def _equal(content: Any, text: str) -> bool:
    """Whether a value is what a text means, as a number, as a text, or as a pattern; a list: whether one item is."""
    if isinstance(content, list | tuple):
        return any(_equal(item, text) for item in content)
    parsed = _parsed(text)
    if _is_number(content) and _is_number(parsed):
        return bool(content == parsed)
    if isinstance(content, str):
        return content == text or fnmatchcase(content, text)
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
