"""Sheets as Markdown and as LaTeX; whatever a name or a value contains is text there."""

import re
from collections.abc import Sequence

from experiments.compare.leaderboard import Sheet

MARKDOWN = {**{sign: f"\\{sign}" for sign in "\\`*_{}[]|~$#!^"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"}
LATEX = {
    **{sign: f"\\{sign}" for sign in "#$%&_{}"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "`": r"\textasciigrave{}"},
    **{"[": "{[}", "*": "{*}"},  # which rules and ends of lines would take for their own
    **{"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "…": r"\ldots{}", "×": r"$\times$", "−": "$-$"},
}
DASHES = re.compile("-(?=-)")  # two of them would be a long one


def markdown(sheets: Sequence[Sheet]) -> str:
    """The sheets as pipe tables."""
    return "\n".join(_markdown(sheet) for sheet in sheets)


def _markdown(sheet: Sheet) -> str:
    rule = ["---" if name in sheet.texts else "---:" for name in sheet.columns]
    lines = [_escaped(line, MARKDOWN) for line in (sheet.columns, *sheet.lines)]
    table = [f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:])]
    title, *notes = _escaped([sheet.title, *sheet.notes], MARKDOWN)
    return "\n".join([f"### {title}", "", *table, *(f"\n{note}" for note in notes), ""])


def latex(sheets: Sequence[Sheet]) -> str:
    """The sheets as tabulars with the rules of the package booktabs."""
    return "% \\usepackage{booktabs}\n" + "\n".join(_latex(sheet) for sheet in sheets)


def _latex(sheet: Sheet) -> str:
    head, *lines = (" & ".join(_escaped(line, LATEX)) + r" \\" for line in (sheet.columns, *sheet.lines))
    title, *notes = _escaped([sheet.title, *sheet.notes], LATEX)
    form = "".join("l" if name in sheet.texts else "r" for name in sheet.columns)
    table = [rf"\begin{{tabular}}{{{form}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([rf"\paragraph{{{title}}}\par", *table, *(rf"\par {note}" for note in notes), ""])


def _escaped(texts: Sequence[str], signs: dict[str, str]) -> list[str]:
    escaped = ("".join(_sign(sign, signs) for sign in " ".join(text.split())) for text in texts)
    return [DASHES.sub("-{}", text) if signs is LATEX else text for text in escaped]


def _sign(sign: str, signs: dict[str, str]) -> str:
    if signs is LATEX and sign not in signs and ord(sign) > 0xFF:
        return f"U+{ord(sign):04X}"  # fonts of LaTeX do not have it
    return signs.get(sign, sign)
