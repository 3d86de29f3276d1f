"""HTML and SVG that cannot be broken out of: whatever is not `Markup` already is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

_VOID = {"meta", "link", "br", "hr"}
_BIDI = "\u202a-\u202e\u2066-\u2069"  # overrides could turn the figures beside a name around
_UNPRINTABLE = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff{_BIDI}]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Node: TypeAlias = "str | int | float | Iterable[Node] | None"
Attribute: TypeAlias = str | int | float | bool | None


def escape(value: object) -> Markup:
    """The one way from text to HTML; control characters become U+FFFD."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True))


def join(*nodes: Node) -> Markup:
    """Nodes one after the other; None is nothing."""
    parts: list[str] = []
    for node in nodes:
        if isinstance(node, (str, int, float)):
            parts.append(escape(node))
        elif node is not None:
            parts.append(join(*node))
    return Markup("".join(parts))


def tag(name: str, /, *children: Node, **attributes: Attribute) -> Markup:
    """An element. In an attribute's name "_" stands for "-", and `class_` for "class".

    None and False leave an attribute out; True gives one without a value.
    """
    listed = "".join(
        _attribute(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{listed}>")
    return Markup(f"<{name}{listed}>{join(*children)}</{name}>")


def _attribute(name: str, value: Attribute) -> str:
    return f" {name}" if value is True else f' {name}="{escape(value)}"'
