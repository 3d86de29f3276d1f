"""One base error, so that a caller can catch every error of this package in one place.

Every message names the file (and the tensor, where there is one) and the cause;
`remedy` says what the user can do about it. The command line prints `str(error)`
on one line and exits with 2.
"""

from __future__ import annotations

import shlex


class SafeGeneError(Exception):
    """Something the user can act on: what went wrong, and what to do.

    Args:
        message: the cause, naming the file and the tensor.
        remedy: what to do about it; may be empty.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = _one_line(message)
        self.remedy = _one_line(remedy)

    def __str__(self) -> str:
        if not self.remedy:
            return self.message
        return f"{self.message.rstrip('.')}. {self.remedy}"


def command(*words: object) -> str:
    """A command line of this package as a user types it, for remedies and next steps."""
    return shlex.join(("safegene-edge", *map(str, words)))


def _one_line(text: str) -> str:
    """The text without line breaks and control characters: names in a hostile file hold them."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


class SafeGeneWarning(UserWarning):
    """Something that goes on, but perhaps otherwise than the user thinks."""


class FileFormatError(SafeGeneError):
    """A file is missing, truncated, malformed, or not what its name says."""


class MismatchError(SafeGeneError):
    """An adapter does not fit the model that it was given with."""


class UnsupportedError(SafeGeneError):
    """A valid input holds something that a GGUF LoRA cannot represent."""


class OutputError(SafeGeneError):
    """An output cannot be written where the user asked for it."""


class SettingError(SafeGeneError):
    """A setting has a value that makes no sense."""


class LlamaCppError(SafeGeneError):
    """llama.cpp refused or failed."""


class ProcessLostError(SafeGeneError):
    """A process that did a part of the work was killed, or crashed."""


class NoEffectError(SafeGeneError):
    """An adapter was attached and changed nothing."""


class SignatureError(SafeGeneError):
    """A file is not signed by the key that was asked for."""


class MissingExtraError(SafeGeneError):
    """An optional package is needed; the remedy is the command that installs it."""
