"""The leaderboard as plain HTML, for a browser without scripts and for whoever reads the file."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from experiments.compare.groups import Group

HEADER = ("model", "settings", "mean", "std", "n", "best", "parameters", "tokens/s", "minutes")


def leaderboard(groups: Sequence[Group]) -> str:
    """A table per task."""
    return "\n".join(_table(title, list(some)) for title, some in groupby(groups, key=lambda group: group.title))


def _table(title: str, groups: list[Group]) -> str:
    best, trivial = groups[0], _text(groups[0].trivial)
    caption = f"{title}: test {best.metric or 'metric'}, best first; best trivial baseline {trivial}"
    head = _line("th", HEADER)
    return (
        f"<table><caption>{escape(caption)}</caption><thead>{head}</thead>"
        f"<tbody>{''.join(_line('td', _cells(group)) for group in groups)}</tbody></table>"
    )


def _cells(group: Group) -> Sequence[str]:
    seconds = group.median(lambda row: row.seconds)
    return (
        group.model,
        group.label,
        _text(group.mean),
        _text(group.std),
        f"{group.n}{f' of {len(group.rows)}' * bool(group.missing)}",
        _text(group.best),
        _text(group.median(lambda row: row.parameters), ",.0f"),
        _text(group.median(lambda row: row.tokens_per_second), ",.0f"),
        _text(None if seconds is None else seconds / 60, ".1f"),
    )


def _line(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
