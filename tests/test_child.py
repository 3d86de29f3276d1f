"""Children: the package from where the parent has it, a clean channel, errors as they are."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safegene_edge.child import Child
from safegene_edge.errors import FileFormatError, ProcessLostError, SafeGeneError

# -- what children run ----------------------------------------------------


def count(n):
    yield from range(n)


def add(a, b):
    return a + b


def where():
    import safegene_edge

    return safegene_edge.__file__, list(sys.path), os.getsid(0), os.environ.get("MARK")


def chatter():
    print("printed")
    os.write(1, b"written\n")
    subprocess.run(["echo", "of a child"], check=True)
    yield 1
    print("printed again", flush=True)
    yield 2


class OddError(Exception):
    def __init__(self, one, two):  # pickles, and does not come back
        super().__init__(f"{one} and {two}")


def fail(kind):
    yield "first"
    if kind == "format":
        raise FileFormatError("a.gguf: is broken", "Mend it")
    if kind == "disk":
        raise OSError(28, "No space left on device", "out.gguf")
    if kind == "key":
        raise KeyError("blk.0")
    if kind == "odd":
        raise OddError("this", "that")
    if kind == "exit":
        sys.exit(0)
    if kind == "answer":
        yield lambda: None
    if kind == "code":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, kind))


def sleep(seconds):
    yield os.getpid()
    time.sleep(seconds)


# -- and what comes of it -------------------------------------------------


def answers(function, *args, **options):
    with Child(function, *args, **options) as child:
        return list(child.answers())


def test_answers_come_in_order_from_generators_and_functions():
    assert answers(count, 4) == [0, 1, 2, 3]
    assert answers(add, "a", "b") == ["ab"]


def test_the_package_is_the_parents_and_the_current_folder_is_not_on_the_path(
    tmp_path, monkeypatch
):
    import safegene_edge

    (tmp_path / "safegene_edge").mkdir()
    (tmp_path / "safegene_edge" / "__init__.py").write_text("raise SystemExit('executed')")
    (tmp_path / "json.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    ((file, path, session, mark),) = answers(where, environment={"MARK": "set"})
    assert Path(file).samefile(safegene_edge.__file__)
    assert path == sys.path[1:] and mark == "set"
    assert session != os.getsid(0)  # a terminal's Ctrl-C is the parent's alone


def test_what_is_printed_goes_to_standard_error(capfd):
    assert answers(chatter) == [1, 2]
    said = capfd.readouterr()
    assert said.out == ""
    assert sorted(said.err.split("\n")) == ["", "of a child", "printed", "printed again", "written"]


def test_what_is_printed_while_python_starts_is_skipped(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(1, b'\\xff one\\ntwo')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert answers(add, 1, 2) == [3]
    said = capfd.readouterr()
    assert said.out == "" and said.err == "\ufffd one\ntwo\n"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("format", FileFormatError, r"a\.gguf: is broken\. Mend it"),
        ("disk", OSError, r"No space left on device: 'out\.gguf'"),
        ("key", KeyError, r"blk\.0"),
        ("odd", SafeGeneError, "OddError: this and that"),
        ("exit", SafeGeneError, "SystemExit: 0"),
        ("answer", Exception, "pickle"),
        ("code", ProcessLostError, r"ended with exit code 3"),
        ("SIGKILL", ProcessLostError, r"killed \(SIGKILL\)\. Is there enough memory\?"),
        ("SIGSEGV", ProcessLostError, r"killed \(SIGSEGV\)$"),
    ],
)
def test_an_error_is_the_parents(kind, error, message):
    with Child(fail, kind) as child:
        found = child.answers()
        assert next(found) == "first"
        with pytest.raises(error, match=message) as caught:
            next(found)
    if not isinstance(caught.value, ProcessLostError):
        assert "in fail" in str(caught.value.__cause__) or kind == "answer"


def test_a_child_that_cannot_start_its_call_says_why(monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "tests" not in p])
    with pytest.raises(ModuleNotFoundError, match="test_child"):
        answers(add, 1, 2)


def test_a_child_leaves_with_its_parent_and_leaves_an_interrupt_to_it():
    program = (
        "import sys, time, test_child\n"
        "from safegene_edge.child import Child\n"
        "child = Child(test_child.sleep, 600)\n"
        "print(next(child.answers()), flush=True)\n"
        "time.sleep(600)\n"
    )
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": here},
    )
    number = int(parent.stdout.readline())
    os.kill(number, signal.SIGINT)
    time.sleep(0.3)
    os.kill(number, 0)  # it is still there
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            status = Path(f"/proc/{number}/stat")
            if status.exists() and status.read_text().split()[2] == "Z":
                break  # ended; nobody has asked how
            os.kill(number, 0)
            time.sleep(0.05)
        else:
            pytest.fail("the child outlives its parent")


def test_leaving_the_block_ends_it():
    with Child(sleep, 600) as child:
        next(child.answers())
    assert child._process.returncode == -signal.SIGKILL
