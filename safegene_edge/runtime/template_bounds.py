"""A chat template is a program from the internet: it may not run for ever, or fill the memory.

Jinja's sandbox keeps a template from the system, not from looping. Here a template's loops and
calls are counted, and so is what they write. What would make too much in a single step (a text
times a number, padding, a format with a width) is looked at before it is done.
"""

from __future__ import annotations

import functools
import re
import string
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

STEPS = 500_000  # passes through loops, and calls, of one chat
_MACRO = 10  # steps that a macro's call counts for: it takes as long as so many passes
WRITTEN = 50_000_000  # characters that these may write
LONGEST = 10_000_000  # characters or items of one value
_NUMBER = 100_000  # that is handed to a filter or a method: a width, a count
_EXPONENT = 1_000
_INDENT = 16  # of JSON
# A field of 10,000 and more, or of any width at all: of `%`, and in a field's own format.
_PERCENT = re.compile(r"%[-#0 +.\d]*(\*|\d{5})")
_NAMED_PERCENT = re.compile(r"\)[-#0 +.\d]*(\*|\d{5})")
_FIELD = re.compile(r"\d{5}|\{")
_WIDE = "it formats with a width that nobody needs"
_STEPS, _SIZE = "_counted", "_bounded"  # filters; no template can name one so
_GROWS = ("replace", "join", "wordwrap", "indent", "translate", "batch", "slice")


class TemplateTooLargeError(ValueError):
    """The template loops too often, or makes too much."""


class BoundedFormatter(Jinja2ChatFormatter):  # type: ignore[misc]
    """llama-cpp-python's formatter of a template, with bounds."""

    def __init__(self, template: str, **options: Any) -> None:
        super().__init__(template="", **options)
        self.template = template
        self._bounds = _Bounded(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, "jinja2.ext.loopcontrols"],
        )
        self._bounds.filters["tojson"] = _checked("tojson", self.tojson)
        self._environment = self._bounds.from_string(template)

    def __call__(self, **given: Any) -> Any:
        """As llama-cpp-python's.

        Raises:
            TemplateTooLargeError: a bound is met.
            UnicodeEncodeError: the template writes half of a character.
        """
        self._bounds.begin()
        response = super().__call__(**given)
        response.prompt.encode()
        return response


class _Bounded(ImmutableSandboxedEnvironment):
    """Counts what a template does since `begin`, in each thread for itself."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._finalized, **options)
        self._local = threading.local()
        self._macro = 0  # characters of plain text in the longest macro
        self.filters = {name: _checked(name, made) for name, made in self.filters.items()}
        self.filters |= {_STEPS: self._counted, _SIZE: _bounded}
        del self.globals["lipsum"]  # text that nobody wrote

    def begin(self) -> None:
        self._local.steps = self._local.written = 0

    def _step(self, writes: int, count: int = 1) -> None:
        local = self._local
        local.steps = getattr(local, "steps", 0) + count
        if local.steps > STEPS:
            raise TemplateTooLargeError(f"it loops more than {STEPS:,} times")
        self._write(writes)

    def _write(self, count: int) -> None:
        local = self._local
        local.written = getattr(local, "written", 0) + count
        if local.written > WRITTEN:
            raise TemplateTooLargeError(f"it writes more than {WRITTEN:,} characters")

    def _counted(self, items: Iterable[Any], writes: int) -> Iterator[Any]:
        for item in items:
            self._step(writes)
            yield item

    def _finalized(self, value: Any) -> Any:
        text = str(value)
        self._write(len(text))
        return text

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        self._macro = max(map(_own_text, tree.find_all(nodes.Macro)), default=0)
        for loop in tree.find_all(nodes.For):
            writes = [nodes.Const(_own_text(loop))]
            loop.iter = nodes.Filter(loop.iter, _STEPS, writes, [], None, None, lineno=loop.lineno)
        _bound_joins(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _require(right, _EXPONENT)
            _require(left, _NUMBER)
        elif operator == "*":
            _require_product(left, right)
        elif operator == "%" and isinstance(left, str):
            _require_narrow(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, /, *arguments: Any, **named: Any) -> Any:
        is_macro = hasattr(called, "caller")
        self._step(self._macro if is_macro else 0, _MACRO if is_macro else 1)
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
        subject = getattr(method, "__self__", None)
        if isinstance(subject, str):
            name = getattr(method, "__name__", "")
            _require_small(name, subject, (*arguments, *named.values()))
        return _bounded(super().call(context, called, *arguments, **named))


def _own_text(tree: nodes.Node) -> int:
    """Characters of plain text below a node."""
    return sum(len(text.data) for text in tree.find_all(nodes.TemplateData))


def _bound_joins(node: nodes.Node) -> None:
    """Put a bound behind each `~`, which no hook of jinja's sees."""
    for name, value in node.iter_fields():
        found = value if isinstance(value, list) else [value]
        for place, item in enumerate(found):
            if isinstance(item, nodes.Node):
                _bound_joins(item)
            if isinstance(item, nodes.Concat):
                found[place] = nodes.Filter(item, _SIZE, [], [], None, None, lineno=item.lineno)
        if not isinstance(value, list):
            setattr(node, name, found[0])


def _checked(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given before, and at what it made after."""

    @functools.wraps(made)  # with jinja's own marks
    def checked(*arguments: Any, **named: Any) -> Any:
        first = 1 if hasattr(made, "jinja_pass_arg") else 0
        if len(arguments) > first:
            _require_small(name, arguments[first], (*arguments[first + 1 :], *named.values()))
        return _bounded(made(*arguments, **named))

    return checked


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)):
        _require(len(value), LONGEST)
    return value


def _require_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)):
            _require(len(one) * other if isinstance(other, int) else 0, LONGEST)
        elif isinstance(one, int):
            _require(one.bit_length(), 8 * _EXPONENT)


def _require_small(name: str, subject: Any, arguments: Iterable[Any]) -> None:
    """Look at what a filter, or a method of a text, would make of its arguments."""
    length = len(subject) if isinstance(subject, (str, list, tuple)) else 1
    for argument in arguments:
        if isinstance(argument, int) and not isinstance(argument, bool):
            _require(argument, _INDENT if name == "tojson" else _NUMBER)
            if name in _GROWS:
                _require(length * argument, LONGEST)
        elif isinstance(argument, (str, list, tuple)) and name in _GROWS:
            _require((length + 1) * len(argument), LONGEST)
    if name in ("format", "format_map") and isinstance(subject, str):
        _require_narrow(subject)
        _require_narrow_fields(subject)


def _require_narrow(form: str) -> None:
    """Of `%`, and of the filter `format`."""
    if _PERCENT.search(form) or ("%(" in form and _NAMED_PERCENT.search(form)):
        raise TemplateTooLargeError(_WIDE)


def _require_narrow_fields(form: str) -> None:
    """Of a text's method `format`."""
    try:
        wide = any(spec and _FIELD.search(spec) for _, _, spec, _ in string.Formatter().parse(form))
    except ValueError:  # the method itself will say so
        return
    if wide:
        raise TemplateTooLargeError(_WIDE)


def _require(number: Any, most: int) -> None:
    if isinstance(number, (int, float)) and number > most:
        raise TemplateTooLargeError(f"it makes more than {most:,} of something at once")
