"""`inspect`: what it shows of files that others made."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from adapters import random_adapter
from click.testing import CliRunner

from safegene_edge.cli import cli
from safegene_edge.gene import INVOCATION
from safegene_edge.gguf_file import write_gguf
from safegene_edge.gguf_file.values import UINT32


def shown(*arguments):
    done = CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_an_alora_is_shown_as_one(tiny, tmp_path):
    model, path = tiny("llama").gguf_path, tmp_path / "alora.gguf"
    known = {"extra": {INVOCATION: [5, 9]}, "types": {INVOCATION: UINT32}}
    replace(random_adapter(model), **known).save(path)
    facts = json.loads(shown(path, "--base", model, "--json"))
    assert (facts["kind"], facts["invocation_tokens"]) == ("aLoRA adapter", [5, 9])
    assert facts["misfits"] == []
    assert "invocation_tokens  5, 9" in shown(path)


def test_a_plain_adapter_has_no_invocation_tokens(tiny, tmp_path):
    random_adapter(tiny("llama").gguf_path).save(tmp_path / "plain.gguf")
    facts = json.loads(shown(tmp_path / "plain.gguf", "--json"))
    assert facts["kind"] == "LoRA adapter"
    assert "invocation_tokens" not in facts


def test_a_name_that_is_a_list_is_no_name(tmp_path):
    tensors = [("token_embd.weight", np.ones((4, 4), np.float32))]
    write_gguf(tmp_path / "x.gguf", "llama", {"general.name": ["a", "b"]}, tensors)
    assert json.loads(shown(tmp_path / "x.gguf", "--json"))["name"] == ""


@pytest.mark.parametrize("key", ["general.name", "general.architecture"])
def test_a_name_cannot_add_a_line_or_steer_the_terminal(key, tmp_path, monkeypatch):
    facts = {key: "good\nkind  signed gene\x1b[2J"}
    architecture = facts.pop("general.architecture", "llama")
    tensors = [("token_embd.weight", np.ones((4, 4), np.float32))]
    write_gguf(tmp_path / "x.gguf", architecture, facts, tensors)
    monkeypatch.setattr(
        "safegene_edge.cli.terminal.printable", lambda text: text.replace("\x1b", "")
    )
    lines = shown(tmp_path / "x.gguf").splitlines()
    assert [line.split()[0] for line in lines].count("kind") == 1
    assert "\x1b" not in "".join(lines)
