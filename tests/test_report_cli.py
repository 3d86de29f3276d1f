"""`safegene-edge report`: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import reports
from click.testing import CliRunner

from safegene_edge.cli import cli
from safegene_edge.files import sha256

PROGRAM = [sys.executable, "-m", "safegene_edge", "report"]


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.json"
    path.write_text(json.dumps(reports.large()))
    return path


def run(*arguments):
    """The command in this process, its errors as exceptions."""
    return CliRunner().invoke(cli, ["report", *map(str, arguments)], catch_exceptions=True)


def test_verify_says_one_line_each_and_exits_with_0(large, tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"weights")
    report = reports.large()
    report["model"] = {"name": "m.gguf", "sha256": sha256(model)}
    large.write_text(json.dumps(reports.sealed(report)))
    done = run("verify", large, "--model", model)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert f"ok: model m.gguf: sha256 {sha256(model)}" in lines
    assert "not checked: gene safety.gguf: give the file with --gene" in lines
    assert not [line for line in lines if line.startswith("differs")]


def test_verify_exits_with_2_and_the_cause(large, tmp_path):
    large.write_text(large.read_text().replace('"refused": 185', '"refused": 186', 1))
    model = tmp_path / "m.gguf"
    model.write_bytes(b"other weights")
    command = [*PROGRAM, "verify", str(large), "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "differs: result: the report says" in done.stdout
    assert "differs: model smollm2-agnews-q4_k_m.gguf" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: result: the report says")
    assert sha256(model) in line


@pytest.mark.parametrize(("name", "start"), [("r.html", "<!DOCTYPE html>"), ("r.md", "# Safety")])
def test_render(large, tmp_path, name, start):
    output = tmp_path / name
    assert run("render", large, "-o", output).exit_code == 0
    text = output.read_text(encoding="utf-8")
    assert text.startswith(start)
    assert "185/199" in text


@pytest.mark.parametrize("arguments", [("render", "-o", "r.pdf"), ("record", "-o", "r.html")])
def test_outputs_of_an_unknown_kind(large, arguments):
    command, *rest = arguments
    done = run(command, large, *rest)
    assert done.exit_code == 2
    assert "ends" in done.output


def test_an_output_does_not_replace_its_input(large):
    renamed = large.rename(large.with_suffix(".md"))
    before = renamed.read_bytes()
    assert run("render", renamed, "-o", renamed).exit_code != 0
    assert renamed.read_bytes() == before


def test_the_record_as_json_and_markdown(large, tmp_path):
    printed = json.loads(run("record", large).stdout)
    assert printed["result_sha256"] == reports.large()["record"]["result_sha256"]
    output = tmp_path / "record.md"
    assert run("record", large, "-o", output).exit_code == 0
    text = output.read_text(encoding="utf-8")
    for part in ("# Safety record", printed["result_sha256"], "d" * 64, *printed["limits"]):
        assert part.replace("_", r"\_") in text or part in text


def test_compare(large, tmp_path):
    other = tmp_path / "other.json"
    report = reports.large()
    report["settings"]["max_tokens"] = 24
    other.write_text(json.dumps(reports.sealed(report)))
    same = run("compare", large, large).output
    assert "harmful, after, refused: 185/199 (93.0 %, 89–95.8) → 185/199" in same
    assert "McNemar p = 1.00, n = 199" in same
    assert "not comparable" not in same
    text = run("compare", large, other).output
    assert "not comparable: max_tokens is 48 in the first and 24 in the second" in text
    assert "McNemar" not in text
    found = json.loads(run("compare", large, other, "--json").stdout)
    assert found["comparable"] is False
    assert found["suites"][1]["b"] == {"n": 185, "total": 199}


def test_broken_reports_give_one_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"safegene_edge_report": 1}')
    for command in ("verify", "render -o x.html", "record", f"compare {path}"):
        name, *rest = command.split()
        done = subprocess.run(
            [*PROGRAM, name, str(path), *rest], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, command
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {path}: the report has no 'model'")
