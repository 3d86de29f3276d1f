"""What other tools are given: files in their documented form, adapters that do the same."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from adapters import random_adapter
from test_merge import logits

from safegene_edge.errors import OutputError, SafeGeneError, SettingError
from safegene_edge.export import TOOLS, export
from safegene_edge.gene import Adapter, Expression, SafetyGene


@pytest.fixture
def model(tiny):
    return tiny("llama").gguf_path


def gene_for(model, folder, name="gene.gguf", **facts):
    path = folder / name
    random_adapter(model, **facts).save(path)
    return path


def test_ollama_gets_a_modelfile_and_one_adapter(model, tmp_path):
    """https://docs.ollama.com/modelfile: FROM a GGUF's path, ADAPTER one relative to the file."""
    gene = gene_for(model, tmp_path, family="tiny")
    made = export("ollama", model, [(gene, Expression({0: 0.5, 1: 1.0, 2: 0.0}))], tmp_path / "out")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["FROM", "ADAPTER"]
    source, adapter = (line.split(" ", 1)[1].strip('"') for line in lines)
    assert Path(source).samefile(model)
    loaded = SafetyGene.load(tmp_path / "out" / adapter)
    assert loaded.layers == (0, 1)
    assert dict(loaded.coefficients) == {0: 0.5, 1: 1.0}
    assert made.commands[0].startswith("ollama create ")


def test_several_adapters_become_one_that_does_the_same(model, tmp_path):
    one = gene_for(model, tmp_path, "one.gguf", seed=1)
    two = gene_for(model, tmp_path, "two.gguf", seed=2, rank=3, alpha=5.0)
    made = export("llama-server", model, [(one, 0.5), (two, -2.0)], tmp_path / "out")
    side = logits(model, [(one, 0.5), (two, -2.0)])
    assert np.abs(logits(model, [str(made.files[0])]) - side).max() < 1e-4


def test_lm_studio_gets_a_merged_model_where_it_looks_for_one(model, tmp_path):
    """https://lmstudio.ai/docs/app/advanced/import-model: models/publisher/model/file.gguf."""
    gene = gene_for(model, tmp_path)
    made = export("lm-studio", model, [gene], tmp_path / "out")
    (file,) = made.files
    assert file.relative_to(tmp_path / "out").parts[0] == "safegene"
    assert len(file.relative_to(tmp_path / "out").parts) == 3
    assert made.merged is not None and made.merged.survived > 0.99
    assert np.abs(logits(file) - logits(model, [gene])).max() < 1e-3


def test_an_unknown_tool_is_refused(model, tmp_path):
    with pytest.raises(SettingError, match="unknown tool"):
        export("emacs", model, [gene_for(model, tmp_path)], tmp_path / "out")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_failed_export_leaves_no_folder_behind(tool, model, tmp_path):
    other = tmp_path / "other.gguf"
    Adapter("gpt2", 8.0, random_adapter(model).pairs).save(other)
    kept = tmp_path / "kept"
    kept.mkdir()
    for wrong in ([], [tmp_path / "none.gguf"], [other]):
        for folder in (tmp_path / "new" / "deep", kept):
            with pytest.raises(SafeGeneError):
                export(tool, model, wrong, folder)
    assert not (tmp_path / "new").exists()
    assert list(kept.iterdir()) == []
    with pytest.raises(OutputError):
        export(tool, model, [gene_for(model, tmp_path)], other / "folder")


@pytest.mark.parametrize("tool", TOOLS)
def test_the_command_line_prints_what_to_run(tool, model, tmp_path):
    gene = gene_for(model, tmp_path)
    command = [sys.executable, "-m", "safegene_edge", "export", tool, model, gene, "-o"]
    shown = subprocess.run([*command, tmp_path / "a b"], capture_output=True, text=True, check=True)
    assert shlex.split(shown.stdout.splitlines()[0])[0] in ("ollama", "llama-server", "lms")


@pytest.mark.skipif("LLAMA_SERVER" not in os.environ, reason="LLAMA_SERVER names no llama-server")
def test_llama_server_takes_the_flags_and_the_body(model, tmp_path):
    """The real llama-server, built from the sources that llama-cpp-python ships."""
    made = export("llama-server", model, [gene_for(model, tmp_path)], tmp_path / "out")
    _, *flags = shlex.split(made.commands[0])
    port = 18123
    command = [os.environ["LLAMA_SERVER"], *flags, "--port", str(port), "-c", "256", "--no-webui"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}/lora-adapters"
            for _ in range(100):
                try:
                    found = json.load(urllib.request.urlopen(url))
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.1)
            assert [(a["id"], a["scale"]) for a in found] == [(0, 1.0)]
            assert Path(found[0]["path"]).samefile(made.files[0])
            body = made.files[1].read_bytes().replace(b"1.0", b"0.25")
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request).read()
            assert json.load(urllib.request.urlopen(url))[0]["scale"] == 0.25
        finally:
            server.kill()
