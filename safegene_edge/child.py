"""Python children: functions of this package in processes of their own.

A child takes the package from where its parent has it, whatever lies in the current folder, and
never runs the caller's own script. It answers on a channel of its own: what libraries print on
standard output goes to standard error. An error of the function is raised in the parent as it is.
A child ends with its parent, and leaves Ctrl-C to it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import ProcessLostError, SafeGeneError

# Where the package lies comes first, the parent's sys.path after it. The first line leaves out
# the current folder, which Python puts there for -c.
_BOOT = """\
import sys
sys.path[:] = sys.argv[2:]
from importlib.util import module_from_spec, spec_from_file_location
name, home = sys.argv[1].split("=", 1)
spec = spec_from_file_location(name, home + "/__init__.py", submodule_search_locations=[home])
package = sys.modules[name] = module_from_spec(spec)
spec.loader.exec_module(package)
from importlib import import_module
import_module(name + ".child").main()
"""
_READY = b"safegene-edge: the child answers from here on\n"


def can_start() -> bool:
    """Whether this Python can start another; a frozen program would start itself."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class _ChildError(Exception):
    """The traceback of an error in a child."""


class Child:
    """A process that runs `function(*args)`, of which everything must pickle by name.

    Args:
        environment: variables to set.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self._call = pickle.dumps((function, args))
        self._process = subprocess.Popen(
            _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a terminal sends Ctrl-C to every process of the session
        )  # fmt: skip

    def answers(self) -> Iterator[Any]:
        """What the function yields, as it comes; or the one thing that it returns.

        Raises:
            ProcessLostError: the process was killed, or crashed.
            Exception: whatever the function raised.
        """
        process = self._process
        assert process.stdin and process.stdout
        with contextlib.suppress(OSError):  # it died; what it said is still there
            process.stdin.write(self._call)
            process.stdin.flush()  # and stays open: its end tells the child that we are gone
        try:
            self._skip_noise(process.stdout)
            while True:
                kind, value = pickle.load(process.stdout)
                if kind == "end":
                    return
                if kind == "error":
                    error, shown = value
                    raise error from _ChildError(shown)
                yield value
        except (EOFError, pickle.UnpicklingError):
            raise self._lost() from None

    def _skip_noise(self, answers: IO[bytes]) -> None:
        """Pass on what was printed before the child had a channel of its own."""
        for line in iter(answers.readline, b""):
            if line == _READY:
                return
            if line.strip():
                with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed stderr
                    print(line.decode("utf-8", "replace").rstrip(), file=sys.stderr)

    def _lost(self) -> ProcessLostError:
        code = self._process.wait()
        if code >= 0:
            return ProcessLostError(f"a worker process ended with exit code {code}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        remedy = "Is there enough memory?" if name == "SIGKILL" else ""
        return ProcessLostError(f"a worker process was killed ({name})", remedy)

    def kill(self) -> None:
        """End it; again does nothing."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not sent
                if pipe is not None:
                    pipe.close()


def _command() -> list[str]:
    package = sys.modules[__package__]
    home = Path(next(iter(package.__path__))).absolute()
    paths = [path for path in sys.path if isinstance(path, str) and path]
    return [sys.executable, "-c", _BOOT, f"{__package__}={home}", *paths]


# -- in the child ---------------------------------------------------------


def main() -> None:
    """Run the call that comes on stdin, and answer it."""
    with contextlib.suppress(ValueError):  # not every system lets it be ignored
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = _own_channel()
    answers.write(b"\n" + _READY)
    answers.flush()
    try:
        try:
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(1)  # the parent is gone
        threading.Thread(target=_leave_with_the_parent, daemon=True).start()
        for value in _each(function(*args)):
            _send(answers, "value", value)
        _send(answers, "end", None)
    except BaseException as error:
        shown = "".join(traceback.format_exception(error))
        _send(answers, "error", (_picklable(error), shown))
    os._exit(0)  # the thread still holds stdin, which a tidy exit would wait for


def _own_channel() -> BinaryIO:
    """What was standard output; whatever is printed from now on goes to standard error."""
    channel = os.fdopen(os.dup(1), "wb")
    try:
        os.dup2(2, 1)
    except OSError:  # there is no standard error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)
    return channel


def _leave_with_the_parent() -> None:
    sys.stdin.buffer.read(1)  # comes back when the parent is gone
    os._exit(1)


def _each(found: Any) -> Iterable[Any]:
    return found if isinstance(found, Iterator) else (found,)


def _send(answers: BinaryIO, kind: str, value: Any) -> None:
    answers.write(pickle.dumps((kind, value)))  # all of it or nothing
    answers.flush()


def _picklable(error: BaseException) -> Exception:
    """The error itself; in words where it does not pickle, or would end the parent."""
    try:
        if isinstance(pickle.loads(pickle.dumps(error)), Exception):
            assert isinstance(error, Exception)
            return error
    except Exception:  # an error may be made of anything
        pass
    return SafeGeneError(traceback.format_exception_only(type(error), error)[-1])
