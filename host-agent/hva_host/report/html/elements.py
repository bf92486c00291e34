"""A page as a tree: whatever text goes into it is escaped when it is written, and what nobody sees is made visible."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from hvaqemu.qemu.logs import printable

#: A part of a page; None leaves nothing.
Part = Element | str | None


def element(tag: str, attributes: Mapping[str, object] | None = None, *parts: Part) -> Element:
    """An element with what is in it, in order. Texts are data: nothing in them acts."""
    made = Element(tag, {name: printable(str(value)) for name, value in (attributes or {}).items()})
    append(made, parts)
    return made


def append(parent: Element, parts: Iterable[Part]) -> None:
    """Put parts behind those that ``parent`` has."""
    for part in parts:
        if isinstance(part, Element):
            parent.append(part)
        elif part is not None:
            text = printable(part)
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + text
            else:
                parent.text = (parent.text or "") + text


def raw(tag: str, attributes: Mapping[str, str], content: str) -> Element:
    """A ``script`` or ``style``, whose content is written as it is: ours alone, or :func:`script_json`."""
    made = Element(tag, dict(attributes))
    made.text = content
    return made


def script_json(value: Any) -> str:
    """A value as JSON that can not end the ``script`` it is in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def document(root: Element) -> str:
    """The page."""
    return "<!doctype html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[Part]], kind: str = "") -> Element:
    """A table whose first column names its rows."""
    titles = element("tr", {}, *(element("th", {"scope": "col"}, title) for title in head))
    body = element("tbody")
    for row in rows:
        first, *rest = row
        name = element("th", {"scope": "row"}, first)
        body.append(element("tr", {}, name, *(element("td", {}, cell) for cell in rest)))
    made = element("table", {"class": kind} if kind else {}, element("thead", {}, titles), body)
    return element("div", {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": "table"}, made)


def in_words(title: str, figure: Element) -> Element:
    """What a figure shows as a table, for who does not see it."""
    return element("details", {}, element("summary", {}, title), figure)


def legend(looks: Mapping[str, str]) -> Element:
    """The colours of a figure.

    :param looks: by what a reader sees, the class that gives the colour.
    """
    items = (
        element("li", {}, element("span", {"class": f"swatch {look}", "aria-hidden": "true"}), label)
        for label, look in looks.items()
    )
    return element("ul", {"class": "legend"}, *items)
