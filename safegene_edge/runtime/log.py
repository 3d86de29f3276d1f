"""llama.cpp's own words for why it refused something.

Its functions return a null pointer or a number and write the reason to their log, one callback for
the whole process. This module's callback is set once; it hands every line on to the one before it,
and keeps the errors of a thread that asks for them. Ctrl-C waits until llama.cpp is back: in a
callback that it calls, Python would print the interrupt and go on.
"""

from __future__ import annotations

import ctypes
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

_ERROR, _CONTINUED = 4, 5  # ggml/include/ggml.h, `enum ggml_log_level`
_MOST = 400  # characters of a reason
_FUNCTION = re.compile(r"^\w+: ")
_thread = threading.local()


class Reason:
    """What llama.cpp logged as errors, as one line; empty where it logged none."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.lines: list[str] = []

    def __str__(self) -> str:
        found = (_FUNCTION.sub("", " ".join(line.split())) for line in self.lines)
        text = "; ".join(dict.fromkeys(line for line in found if line))
        return text if len(text) <= _MOST else f"{text[:_MOST]} …"

    def after(self, message: str) -> str:
        """The message with the reason behind it, if there is one."""
        return f"{message}: {self}" if str(self) else message


@contextmanager
def reason(*, quiet: bool = False) -> Iterator[Reason]:
    """Keep the errors that llama.cpp logs in this thread while the block runs.

    Args:
        quiet: nothing that the thread logs meanwhile is shown, warnings neither.
    """
    _install()
    outer = getattr(_thread, "kept", None)
    _thread.kept = Reason(quiet)
    try:
        with interrupts_deferred():
            yield _thread.kept
    finally:
        _thread.kept = outer


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C in the block comes behind it; only the main thread gets any."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *given: came.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[-1])


_installed: list[Any] = []  # callbacks that the library holds: they must never be freed
_installing = threading.Lock()


def _install() -> None:
    """Put the callback before the one that is set now, unless it is set already."""
    with _installing:
        before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
        if _installed and _address(before) == _address(_installed[-1]):
            return
        _installed.extend((before, _callback(before, data)))
        llama_cpp.llama_log_set(_installed[-1], ctypes.c_void_p())


def _callback(before: Any, data: ctypes.c_void_p) -> Any:
    last = [0]

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: Any) -> None:
        kept = getattr(_thread, "kept", None)
        if kept is not None and level == _ERROR:
            kept.lines.append(text.decode("utf-8", "replace"))
        elif kept is not None and level == _CONTINUED and last[0] == _ERROR and kept.lines:
            kept.lines[-1] += text.decode("utf-8", "replace")
        last[0] = level if level != _CONTINUED else last[0]
        if before and not (kept and kept.quiet):
            before(level, text, data)

    return log


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value
