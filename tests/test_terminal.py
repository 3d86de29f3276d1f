"""What the command line shows of its progress, and how it reads names of files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from safegene_edge.cli import terminal
from safegene_edge.cli.learn import said_on
from safegene_edge.cli.options import files_of


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_step_that_ends_early_leaves_its_line() -> None:
    screen, pipe = Screen(), io.StringIO()
    for stream in (screen, pipe):
        say = said_on(stream)
        for what, done, total in (("fit", 1, 8), ("fit", 6, 8), ("ask", 0, 2), ("ask", 2, 2)):
            say(what, done, total)
    assert screen.getvalue() == "\rfit: 1/8\rfit: 6/8\nask: 0/2\rask: 2/2\n"
    assert pipe.getvalue() == "fit\nask\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress("evaluating") as advance:
        for done in range(100):
            now[0] += 1
            advance(done, 100)
    assert capsys.readouterr().err.splitlines() == [
        f"evaluating: {done} of 100" for done in (30, 61, 92)
    ]


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("a.gguf", ["a.gguf"]),
        ("a.gguf,b.gguf", ["a.gguf", "b.gguf"]),
        ("/models, old/a.GGUF,b.gguf", ["/models, old/a.GGUF", "b.gguf"]),
        ("we,ird.gguf", ["we,ird.gguf"]),
        ("a,b", ["a", "b"]),
    ],
)
def test_a_comma_parts_files_and_may_be_in_one(
    tmp_path: Path, monkeypatch: Any, text: str, files: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("we,ird.gguf").touch()
    assert files_of(text) == files
