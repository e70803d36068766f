"""Formulas of the documentation, TeX between dollar signs, as MathML: browsers draw it without scripts or network."""

from html import unescape
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor


class _MathML(Treeprocessor):
    """`pymdownx.arithmatex` finds formulas and marks them; here they are translated."""

    def run(self, root: Element) -> None:
        for element in root.iter():
            if element.get("class") == "arithmatex":
                formula = unescape(element.text or "").strip()[2:-2].strip()  # without \( … \) or \[ … \]
                element.text = None
                display = "block" if element.tag == "div" else "inline"
                element.append(convert_to_element(formula, display=display))


class MathML(Extension):
    """To be listed after `pymdownx.arithmatex: {generic: true}`."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """After all else that reads inline text."""
        md.treeprocessors.register(_MathML(md), "mathml", 15)


def makeExtension(**options: Any) -> MathML:  # noqa: N802
    """For Markdown, which looks for this name."""
    return MathML(**options)
