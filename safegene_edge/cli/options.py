"""What commands share: options that a settings class describes, examples, the next step.

An option's help is its field's entry under "Attributes:" in the class's docstring, its default is
the field's own. And the group of commands that shows its help when it is given alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from ..files import PathLike

Command = TypeVar("Command", bound=Callable[..., Any])
_ENTRY = re.compile(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)


_NEXT_FILE = re.compile(r"(?<=\.gguf),", re.IGNORECASE)


class HelpGroup(click.Group):
    """A group that, without a command, prints its help: a question, and no mistake.

    click 8.2 and later raise the whole help as an error.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)


def setting(
    of: type, name: str, *flags: str, preset: bool = False, **more: Any
) -> Callable[[Command], Command]:
    """A click option for a field of a settings class.

    Args:
        flags: as for `click.option`; default: the field's name.
        preset: the option is None where the user gives none, since a preset may choose then;
            the help shows the field's default all the same.
        more: further arguments of `click.option`.
    """
    default, text = default_of(of, name), described(of)[name]
    shown = default is not None and default is not False and default not in ((), "")
    if shown and (preset or isinstance(default, tuple)):  # click would put it in brackets
        words = ", ".join(default) if isinstance(default, tuple) else default
        text, shown = f"{text}  (default: {words})", False
    flags = flags or (f"--{name.replace('_', '-')}",)
    default = None if preset else default
    return click.option(*flags, help=text, default=default, show_default=shown, **more)


class _File(click.Path):
    """A file or a folder, which the shell completes; whether it exists is seen where it is read."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "":  # as a variable of the shell that is not set
            self.fail("a file's name is empty", param, ctx)
        return super().convert(value, param, ctx)


FILE = _File()


class _Finite(click.types.FloatParamType):
    """A number that is neither NaN nor infinite."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number", param, ctx)
        return found


class Number(_Finite, click.FloatRange):
    """The same, between bounds."""


FINITE = _Finite()


def file_option(*flags: str, **more: Any) -> Callable[[Command], Command]:
    """A click option for a file or a folder."""
    return click.option(*flags, type=FILE, **more)


def check_outputs(outputs: Iterable[str | None], inputs: Iterable[PathLike]) -> None:
    """Before the work, not after it: whether outputs can be written, and are no inputs.

    Raises:
        click.UsageError: two are the same file.
        OutputError: as `files.check_output`.
    """
    from ..files import check_output

    named, given = [path for path in outputs if path], list(inputs)
    if len({Path(path).resolve() for path in named}) < len(named):
        raise click.UsageError("two outputs are the same file")
    for path in named:
        check_output(path, given)


def examples(*lines: str) -> str:
    """A command's `epilog`: how it is typed. Each line follows "safegene-edge"."""
    typed = (f"  safegene-edge {line}" for line in lines)
    return "\n".join(("\b", "Examples:", *typed))


def require_used(wanted: Mapping[str, tuple[object, Iterable[str]]]) -> None:
    """UsageError for an option that was given, and that nothing would look at.

    Args:
        wanted: by what options go with: whether it is there, and their names as parameters.
    """
    for needed, (there, names) in wanted.items():
        for name in () if there else names:
            if was_given(name):
                raise click.UsageError(f"--{name.replace('_', '-')} goes with {needed}")


def was_given(name: str) -> bool:
    """Whether the user gave an option, by its name as a parameter, and not its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def say_next(*steps: str) -> None:
    """End a command: what to type next, on standard error."""
    click.echo("next:", err=True)
    for step in steps:
        click.echo(f"  {step}", err=True)


def with_adapters(adapters: Iterable[str]) -> list[str]:
    """The words of a command line that give a model's adapters."""
    return [word for adapter in adapters for word in ("--adapter", adapter)]


def files_of(text: str) -> list[str]:
    """The files of MODEL,LORA; UsageError where one has no name."""
    if Path(text).is_file():  # a path may have commas
        return [text]
    names = _NEXT_FILE.split(text) if ".gguf," in text.lower() else text.split(",")
    if not all(text.split(",")):
        raise click.UsageError(f"'{text}' names no file before or after a comma")
    return names


def comma_separated(value: Any) -> tuple[str, ...]:
    """An option's type: words, given as "one,two"."""
    return tuple(value.split(",")) if isinstance(value, str) else tuple(value)


def default_of(of: type, name: str) -> Any:
    """The default of a field."""
    return next(field.default for field in fields(of) if field.name == name)


@cache
def described(of: type) -> dict[str, str]:
    """Field to its description, as a sentence."""
    entries = [
        entry for kind in reversed(of.__mro__) for entry in _ENTRY.findall(kind.__doc__ or "")
    ]
    found = {name: " ".join(text.split()) for name, text in entries}
    return {name: f"{text[0].upper()}{text[1:].rstrip('.')}." for name, text in found.items()}
