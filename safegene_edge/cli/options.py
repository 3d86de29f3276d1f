"""Options that a settings class describes: one place for a setting, its field.

The help is the field's entry under "Attributes:" in the class's docstring, the default is the
field's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
_ENTRY = re.compile(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)


def setting(of: type, name: str, *flags: str, help: str = "", **more: Any) -> Callable[[F], F]:
    """A click option for a field of a settings class.

    Args:
        flags: as for `click.option`; default: the field's name.
        help: what only the command line has to add.
        more: further arguments of `click.option`; `default` replaces the field's.
    """
    default = more.pop("default", default_of(of, name))
    words = [described(of).get(name, ""), help]
    return click.option(
        *(flags or (f"--{name.replace('_', '-')}",)),
        default=default,
        show_default=default not in (None, False, ()),
        help=" ".join(filter(None, words)),
        **more,
    )


def default_of(of: type, name: str) -> Any:
    """The default of a field."""
    return next(field.default for field in fields(of) if field.name == name)


@cache
def described(of: type) -> dict[str, str]:
    """Field to its description."""
    return {name: " ".join(text.split()) for name, text in _ENTRY.findall(of.__doc__ or "")}
