"""The check of the docs' prose: this repository passes, and each fault is found."""

from __future__ import annotations

from pathlib import Path

import prose
import pytest

ROOT = Path(__file__).parent.parent
GOOD = "# A page\n\nIt says what to do. [More](#a-page), and [code](code.py).\n"


def test_the_pages_of_this_repository():
    found = prose.examine(ROOT)
    assert found.faults == []
    assert len(found.lengths) > 500 and sum(found.lengths) / len(found.lengths) < 15


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "code.py").touch()
    (tmp_path / "docs" / "page.md").write_text(GOOD)
    return tmp_path


def test_a_good_page(root):
    found = prose.examine(root)
    assert found.faults == [] and found.lengths == [5, 3]


FAULTS = {
    "word " * 41 + "end.": "42 words",
    "| a | b |\n|---|---|\n| x | " + "word " * 41 + "|": "41 words",
    "- " + "word " * 31 + "\n- another item": "1 sentences have over 30",
    "The gene of ours.": "'ours' stays out",
    "[gone](gone.md)": "nothing at gone.md",
    "![gone](gone.svg)": "nothing at gone.svg",
    "[gone](#gone)": "nothing at #gone",
    "[gone](../README.md#usage)": "nothing at ../README.md#usage",
    "[outside](../../x.md)": "nothing at ../../x.md",
    "[no page](code.py#a)": "nothing at code.py#a",
}


@pytest.mark.parametrize("text", FAULTS, ids=FAULTS.values())
def test_a_fault_is_found(text, root):
    (root / "docs" / "bad.md").write_text(f"# Bad\n\n{text}\n")
    assert FAULTS[text] in " ".join(prose.examine(root).faults)


def test_code_and_generated_parts_are_no_prose(root):
    long = "ours " * 50
    text = f"```\n{long}\n```\n\n<!-- begin x -->\n{long}\n<!-- end x -->\n\n`{long}` is code.\n"
    (root / "docs" / "code.md").write_text(text)
    assert prose.examine(root).faults == []


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# `--run` and `--plain`\n\n## What, why?\n\n## What, why?\n\n## [A](b.md) Z_z\n"
    )
    assert prose.anchors(page) == {"--run-and---plain", "what-why", "what-why-1", "a-z_z"}


def test_a_word_in_the_commands_help_is_found(root):
    folder = root / "tests" / "data" / "cli"
    folder.mkdir(parents=True)
    (folder / "eval.txt").write_text("the examples of ours")
    assert "'ours' stays out" in " ".join(prose.examine(root).faults)
