"""Faults at the n-th call of the system on a file below a folder, in this process."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens at which call on a file, 1 being the first; 0: nothing, they are counted."""

    kind: str
    at: int = 0

    def happens(self, path: str) -> None:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "Ctrl-C":
            raise KeyboardInterrupt
        if self.kind == "vanishing input":
            with suppress(OSError):
                Path(path).unlink()
            return
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number), path or None)


_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_CALLS = ("write", "pwrite", "pread", "fsync", "posix_fallocate", "copy_file_range")


class Armed:
    """From now on calls on files under the root are counted, and the fault comes at its own.

    Args:
        victim: the input that vanishes.
        note: told of each call.
    """

    def __init__(
        self, fault: Fault, root: Path, victim: str = "", note: Callable[[str], None] | None = None
    ) -> None:
        self._fault, self._victim, self._note = fault, victim, note
        self._base, self._count, self._busy = f"{root}/", 0, False
        sys.addaudithook(self._audited)
        for name in _CALLS:
            if hasattr(os, name):
                setattr(os, name, self._watched(getattr(os, name)))

    def _called(self, what: str, path: str) -> None:
        if self._busy or not path.startswith(self._base):
            return
        self._count += 1
        if self._note is not None:
            self._note(f"{what} {path.removeprefix(self._base)}")
        if self._count == self._fault.at and self._fault.kind != "file limit":
            self._busy = True
            self._fault.happens(self._victim if self._fault.kind == "vanishing input" else path)
            self._busy = False

    def _audited(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and isinstance(args[0], (str, bytes, os.PathLike)):
            self._called(event, str(Path.cwd() / os.fsdecode(args[0])))

    def _watched(self, real: Any) -> Any:
        def call(file: int, *args: Any, **more: Any) -> Any:
            path = ""
            with suppress(OSError):
                path = str(Path(f"/proc/self/fd/{file}").readlink())
            self._called(real.__name__, path)
            return real(file, *args, **more)

        return call


def steady() -> None:
    """The same date and no seconds in every report."""
    import datetime

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 1, 1, tzinfo=tz)

    datetime.datetime = Fixed  # type: ignore[misc]
    if plan := sys.modules.get("safegene_edge.evals.plan"):
        plan.datetime = Fixed  # type: ignore[attr-defined]
    time.perf_counter = lambda: 0.0


def from_environment() -> None:
    """In a child of a command; the folder of `sitecustomize` is on its path."""
    steady()
    kind, at, root, victim = json.loads(os.environ["SAFEGENE_FAULT"])
    Armed(Fault(kind, at), Path(root), victim)
