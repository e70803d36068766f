"""The comparison as one HTML file that needs no network: its data, its scripts and plotly's are in it."""

import base64
import gzip
import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from experiments.compare.groups import Group
from experiments.compare.report import content, static
from experiments.compare.runs import Row
from stu.files import write_atomically

PAGE = Path(__file__).with_name("page")
SCRIPTS = (  # in this order: what a script does at once needs those before it
    "dom.js", "numbers.js", "state.js", "filters.js", "look.js", "leaderboard.js", "runs.js", "sketch.js", "plots.js",
    "views.js", "curves.js", "costs.js", "parallel.js", "panel.js", "page.js",
)  # fmt: skip


def write(
    rows: Sequence[Row],
    groups: Sequence[Group],
    file: Path,
    *,
    title: str | None = None,
    refresh: float | None = None,
    columns: Sequence[str] = (),
) -> None:
    """Write the report of these runs, and of these groups of them, whole or not at all.

    refresh: seconds after which the open page loads itself again; columns: keys shown besides the usual ones.
    Raises `OSError` where there is no room.
    """
    text = build(rows, groups, folder=file.parent, title=title, refresh=refresh, columns=columns)
    write_atomically(file, text)


def build(
    rows: Sequence[Row],
    groups: Sequence[Group],
    *,
    folder: Path,
    title: str | None = None,
    refresh: float | None = None,
    columns: Sequence[str] = (),
) -> str:
    """The page, for a file in `folder`, to which its links are relative."""
    title = title or f"{len(rows)} runs compared"
    data = content.collected(rows, groups, folder) | {"refresh": refresh, "columns": list(columns)}
    library, script = plotly(), f'"use strict";\n(() => {{\n{"".join(map(_part, SCRIPTS))}}})();\n'
    return _filled(
        _part("page.html"),
        {
            "policy": policy(library, script),
            "title": html.escape(title),
            "style": _part("page.css"),
            "again": f'<noscript><meta http-equiv="refresh" content="{refresh:g}"></noscript>' if refresh else "",
            "heading": html.escape(title),
            "static": static.leaderboard(groups),
            "data": content.as_json(data),
            "plotly": base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode("ascii"),
            "script": script,
        },
    )


def plotly() -> str:
    """Plotly's JavaScript."""
    return str(get_plotlyjs())


def policy(*scripts: str) -> str:
    """A Content-Security-Policy: nothing from a network, and no script but these.

    Parallel coordinates are drawn by WebGL programs that plotly composes as functions: 'unsafe-eval'.
    """
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with each <!--name--> replaced, once: what is put in is not searched again."""
    pieces = []
    for name, part in parts.items():
        before, mark, template = template.partition(f"<!--{name}-->")
        assert mark, f"page.html has no {name} in this place"
        pieces += [before, part]
    return "".join([*pieces, template])


def _part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
