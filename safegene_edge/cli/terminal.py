"""What `chat` needs of a terminal: lines with a history, long messages, colours, safe output.

Through a pipe the same class reads the same messages, without prompts, history or colours.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import click

QUOTES = '"""'
_HALF_A_MINUTE = 30.0  # seconds
_KEPT = 1000  # lines of history
_BLANK = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))


class Lines:
    """Messages from standard input.

    A line that ends in a backslash goes on in the next; between two lines of three double
    quotes everything is one message.

    Args:
        history: a file of earlier lines, readable by its owner alone; None keeps nothing.
    """

    def __init__(self, history: Path | None = None) -> None:
        self.at_keyboard = sys.stdin.isatty()
        self._edits = self.at_keyboard and sys.stdout.isatty()
        self._history = history
        self._readline = _readline(history) if self._edits else None
        for stream in (sys.stdin, sys.stdout):  # a stray byte or letter shall not end the chat
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def message(self, prompt: str) -> str:
        """The next message, its line breaks kept.

        Raises:
            EOFError: there is none.
        """
        line = self._line(prompt)
        if line.lstrip().startswith(QUOTES):
            return self._block(line.lstrip()[len(QUOTES) :])
        parts = []
        while line.endswith("\\"):
            parts.append(line[:-1])
            try:
                line = self._line("... ")
            except EOFError:
                line = ""
        return "\n".join([*parts, line])

    def _block(self, line: str) -> str:
        parts = []
        while not line.rstrip().endswith(QUOTES):
            parts.append(line)
            try:
                line = self._line("... ")
            except EOFError:
                click.echo(f"(no closing {QUOTES}: the message ends here)", err=True)
                return "\n".join(parts).strip("\n")
        return "\n".join([*parts, line.rstrip()[: -len(QUOTES)]]).strip("\n")

    def _line(self, prompt: str) -> str:
        if self._edits:  # readline draws the prompt itself, or it could not redraw it
            line = input(paint(prompt, in_prompt=self._readline is not None))
            self._remember()
        else:
            if self.at_keyboard:
                click.echo(prompt, nl=False, err=True)
            line = input()
        return line.encode("utf-8", "replace").decode()  # no half of a surrogate pair

    def _remember(self) -> None:
        if self._readline is None or self._history is None:
            return
        with suppress(OSError):
            if hasattr(self._readline, "append_history_file"):
                self._readline.append_history_file(1, self._history)
            else:  # editline, on macOS
                self._readline.write_history_file(self._history)


def _readline(history: Path | None) -> Any:
    """The readline module with the history loaded; None where Python has none (Windows)."""
    try:
        import readline
    except ImportError:
        return None
    readline.set_history_length(_KEPT)
    if history is not None:
        with suppress(OSError):  # an unwritable home is no reason not to chat
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_RDWR, 0o600))
            readline.read_history_file(history)
    return readline


def colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal, and neither NO_COLOR (no-color.org) nor TERM says no."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def paint(text: str, colour: str = "cyan", *, in_prompt: bool = False) -> str:
    """Coloured text for the terminal, or the text itself.

    Args:
        in_prompt: mark the codes as taking no width, as readline wants it.
    """
    if not colours(sys.stdout if in_prompt else sys.stderr):
        return text
    start, end = click.style("\0", fg=colour).split("\0")
    return f"\1{start}\2{text}\1{end}\2" if in_prompt else f"{start}{text}{end}"


class progress:  # noqa: N801 - reads as the function it is used as
    """A bar on stderr; where that is no terminal, a line every half minute.

    What it gives, `advance(done, total)`, may be called often.
    """

    def __init__(self, label: str) -> None:
        self.label, self._last = label, time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Any:
        return self._advance if sys.stderr.isatty() else self._tell

    def _advance(self, done: int, total: int) -> None:
        if self._bar is None:
            bar: Any = click.progressbar(length=total, label=self.label, file=sys.stderr)
            self._bar = bar.__enter__()
        self._bar.update(done - self._bar.pos)

    def _tell(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > _HALF_A_MINUTE:
            self._last = time.monotonic()
            click.echo(f"{self.label}: {done} of {total}", err=True)

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)


def printable(text: str) -> str:
    """The text without control characters: a model must not steer the terminal."""
    return text.translate(_BLANK) if sys.stdout.isatty() else text
