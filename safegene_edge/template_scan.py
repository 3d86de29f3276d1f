"""What is suspicious in a chat template: a program that comes with a model from the internet.

The template is read, never run. It renders in jinja's sandbox anyway (`runtime.chat`), but the
sandbox does not keep it from changing what a person wrote, or from adding an instruction where a
certain word occurs. Nothing here proves that a template is harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

DEEPEST = 100  # brackets and blocks within each other; jinja's parser calls itself for each
_NESTED = re.compile(
    r"(?P<open>[(\[{])|(?P<shut>[)\]}])|(?<=\{%)[-+]?\s*(?P<end>end)?(?:if|for|macro|call|filter)\b"
)
_LONG = 2000  # characters of one piece of text; the longest instruction on tools has 1,500
_CODED = re.compile(r"[A-Za-z0-9+/=\\]{120,}")
# Names that chat templates get, from those who render them and from jinja itself.
_GIVEN = frozenset(
    ("caller", "cycler", "dict", "joiner", "lipsum", "loop", "namespace", "raise_exception",
     "range", "strftime_now", "super")
)  # fmt: skip
_METHODS = frozenset(
    ("append", "capitalize", "count", "endswith", "extend", "find", "format", "get", "index",
     "insert", "isalnum", "isalpha", "isdigit", "islower", "isupper", "items", "join", "keys",
     "lower", "lstrip", "partition", "pop", "removeprefix", "removesuffix", "replace", "rfind",
     "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title",
     "update", "upper", "values")
)  # fmt: skip
_TEXTS = frozenset(("content", "text", "reasoning_content", "thinking"))
_MARKUP = re.compile(r"<[^<>]*>|\[/?[A-Z_]+\]|[\W\d_]+|(?:image|video|audio|text)(?:_url)?$")


def nesting(template: str) -> int:
    """How many brackets and blocks are open at once, at most."""
    depth = deepest = 0
    for found in _NESTED.finditer(template):
        depth += -1 if found["shut"] or found["end"] else 1
        deepest = max(deepest, depth)
    return deepest


def suspicious(template: str) -> list[str]:
    """One line for each suspicious part, with its line number; empty where there is none."""
    from jinja2 import Environment

    if nesting(template) > DEEPEST:
        return [f"more than {DEEPEST} brackets and blocks within each other: it was not read"]
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    # Those who train mark what the assistant wrote with a block of its own.
    plain = re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", r"{%\1 \2if true \3%}", template)
    plain = plain.replace("endif true", "endif")
    try:
        tree = environment.parse(plain)
    except Exception as error:  # its own family, and what its parser runs into
        return [f"it cannot be read ({error}): what is in it is not known"]
    found = dict.fromkeys(_Scan(tree).lines())
    return [f"line {line}: {what}" for line, what in sorted(found, key=lambda pair: pair[0])]


class _Scan:
    """One walk over a template's tree."""

    def __init__(self, tree: Any) -> None:
        from jinja2 import nodes

        self._n, self._tree = nodes, tree
        self._macros = {node.name for node in tree.find_all(nodes.Macro)}
        self._texts = self._names_of_texts()

    def _names_of_texts(self) -> set[str]:
        """Variables that hold what people wrote, or a part of it; fields of a namespace, too."""
        n, names = self._n, set[str]()
        given = [(node.target, node.node) for node in self._tree.find_all(n.Assign)]
        given += [(node.target, node.iter) for node in self._tree.find_all(n.For)]
        macros = {node.name: node for node in self._tree.find_all(n.Macro)}
        for call in self._tree.find_all(n.Call):
            if macro := macros.get(getattr(call.node, "name", "")):
                given += [(name, value) for name in macro.args for value in _arguments(call)]
        while True:
            before = len(names)
            for target, value in given:
                if self._of_text(value, names):
                    names |= {_name(node) for node in _all(target, (n.Name, n.NSRef))}
            if len(names) == before:
                return names

    def _of_text(self, node: Any, names: set[str]) -> bool:
        """Whether an expression reads a message's text."""
        n = self._n
        for one in _all(node, (n.Name, n.Getattr, n.Getitem)):
            if _name(one) in names or getattr(one, "attr", None) in _TEXTS:
                return True
            if getattr(getattr(one, "arg", None), "value", None) in _TEXTS:
                return True
        return False

    def lines(self) -> Iterator[tuple[int, str]]:
        n = self._n
        for node in _all(self._tree, n.Node):
            look = {
                n.Getattr: self._attribute, n.Getitem: self._item, n.Call: self._call,
                n.Filter: self._filter, n.Const: self._constant, n.TemplateData: self._constant,
                n.If: self._condition, n.CondExpr: self._condition, n.For: self._condition,
            }.get(type(node))  # fmt: skip
            if isinstance(node, (n.Import, n.FromImport, n.Include, n.Extends)):
                yield node.lineno, "loads another template"
            elif look is not None:
                for what in look(node):
                    yield node.lineno, what

    def _attribute(self, node: Any) -> Iterator[str]:
        if node.attr.startswith("_"):
            yield f"reads the attribute {node.attr!r}"

    def _item(self, node: Any) -> Iterator[str]:
        value = getattr(node.arg, "value", None)
        if isinstance(value, str) and value.startswith("__"):
            yield f"reads the attribute {value!r}"
        if isinstance(node.arg, (self._n.Concat, self._n.Add)) and _words(node.arg, self._n):
            yield "reads a field whose name it puts together"
        if not isinstance(node.arg, self._n.Slice) and self._of_text(node.arg, self._texts):
            yield "looks something up by what a message says"

    def _call(self, node: Any) -> Iterator[str]:
        n, called = self._n, node.node
        if isinstance(called, n.Name) and called.name not in _GIVEN | self._macros:
            yield f"calls {called.name!r}, which chat templates are not given"
        if isinstance(called, n.Getattr) and called.attr not in _METHODS:
            yield f"calls the method {called.attr!r}"
        if not isinstance(called, (n.Name, n.Getattr)):
            yield "calls what an expression gives"
        if isinstance(called, n.Getattr) and called.attr == "replace":
            yield from self._replaced(called.node, node.args)

    def _filter(self, node: Any) -> Iterator[str]:
        if node.name == "attr":
            yield "reads an attribute by the filter 'attr'"
        if node.name == "replace" and node.node is not None:
            yield from self._replaced(node.node, node.args)

    def _replaced(self, changed: Any, args: list[Any]) -> Iterator[str]:
        words = [word for one in args for word in _words(one, self._n)]
        if words and self._of_text(changed, self._texts):
            yield f"changes {_shown(words[0])} in what a message says"

    def _constant(self, node: Any) -> Iterator[str]:
        text = node.data if isinstance(node, self._n.TemplateData) else node.value
        if not isinstance(text, str):
            return
        if len(text) > _LONG:
            yield f"a text of {len(text):,} characters: {_shown(text)}"
        elif found := _CODED.search(text):
            yield f"{len(found[0])} characters without a space: {_shown(found[0])}"

    def _condition(self, node: Any) -> Iterator[str]:
        """Text that is there only where a message says something certain, or on some days."""
        n, test = self._n, node.test
        if test is None:
            return
        for one in _all(test, n.Call):
            if getattr(one.node, "name", "") == "strftime_now":
                yield "what it writes depends on the date"
        for one in _all(test, (n.Compare, n.Call, n.Test)):
            words = [] if _asks_the_type(one) else _words(one, n)
            if words and self._of_text(one, self._texts):
                yield f"what it writes depends on whether a message says {_shown(words[0])}"


def _arguments(call: Any) -> list[Any]:
    return [*call.args, *(pair.value for pair in call.kwargs)]


def _name(node: Any) -> str:
    """A variable as "name", a namespace's field as "name.field"; "" for others."""
    attr = getattr(node, "attr", None)
    name = getattr(getattr(node, "node", node) if attr else node, "name", "")
    return f"{name}.{attr}" if attr else str(name)


def _all(node: Any, kinds: Any) -> Iterator[Any]:
    """The node itself, where it is of these kinds, and all such below it."""
    if isinstance(node, kinds):
        yield node
    yield from node.find_all(kinds)


def _asks_the_type(node: Any) -> bool:
    """Whether it compares the kind of a part, as in `item.type == "text"`."""
    first = getattr(node, "expr", None)
    arg = getattr(getattr(first, "arg", None), "value", None)
    return "type" in (getattr(first, "attr", None), arg)


def _words(node: Any, nodes: Any) -> list[str]:
    """Texts in an expression that are words: no markup, no punctuation, no name of a field."""
    fields = {id(one.arg) for one in _all(node, nodes.Getitem)}
    texts = (one.value for one in _all(node, nodes.Const) if id(one) not in fields)
    return [text for text in texts if isinstance(text, str) and _MARKUP.sub("", text)]


def _shown(text: str) -> str:
    """The beginning of a text, on one line."""
    plain = " ".join(text.split())
    return repr(plain if len(plain) <= 60 else f"{plain[:59]}…")
