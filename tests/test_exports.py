"""What other tools are given: files in their documented form, adapters that do the same."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapters import adapter_for, random_adapter, with_template
from click.testing import CliRunner
from test_merge import logits, split

from safegene_edge.cli import cli
from safegene_edge.errors import OutputError, SafeGeneError, SettingError
from safegene_edge.export import TOOLS, export, safe_name
from safegene_edge.gene import Adapter, Expression, SafetyGene
from safegene_edge.merge import MergeSettings

__all__ = ["split"]  # a fixture


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


def commands_of(modelfile):
    """Commands and values by the rules of Ollama's parser: letters that cannot be printed are
    dropped, and quotes come off where the value has them at both ends."""
    found = []
    for line in modelfile.read_text().splitlines():
        command, _, value = "".join(c for c in line if c.isprintable()).strip().partition(" ")
        assert command in ("FROM", "ADAPTER")
        if value.startswith('"'):
            assert value.endswith('"') and len(value) > 1 and '"' not in value[1:-1]
            value = value[1:-1]
        found.append((command, value))
    return found


def test_ollama_gets_a_merged_model(model, tmp_path):
    """Ollama refuses ADAPTER from 0.34.1 on ("LoRA adapters are no longer supported")."""
    gene = gene_for(model, tmp_path)
    made = export("ollama", model, [gene], tmp_path / "out", merged=True)
    file, merged = made.files
    assert commands_of(file) == [("FROM", f"./{merged.name}")]
    assert merged.parent == file.parent == tmp_path / "out"
    assert made.merged is not None and made.merged.survived > 0.99 and not made.warnings
    assert np.abs(logits(merged) - logits(model, [gene])).max() < 1e-3
    assert {path.name for path in file.parent.iterdir()} == {"Modelfile", merged.name}
    with_adapter = export("ollama", model, [gene], tmp_path / "old")
    assert "0.34.1" in with_adapter.warnings[0] and "--merged" in with_adapter.warnings[0]


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}Hi"


@pytest.mark.parametrize(
    ("template", "said"),
    [(SMOLLM2, "You are a helpful AI assistant named SmolLM"), (NO_SYSTEM, ""), (None, ""),
     ("{% for m in messages %}{{ m.content }}{% endfor %}", ""), ("{% if", "")],
)  # fmt: skip
@pytest.mark.parametrize("merged", [False, True])
def test_ollama_gets_the_system_message_that_a_template_adds(
    model, tmp_path, template, said, merged
):
    """Ollama may take a template of its own in place of the file's, without it."""
    own = with_template(model, tmp_path / "own.gguf", template)
    made = export("ollama", own, [gene_for(model, tmp_path)], tmp_path / "out", merged=merged)
    text = next(path for path in made.files if path.name == "Modelfile").read_text()
    assert text.endswith(f'SYSTEM """{said}"""\n') if said else "SYSTEM" not in text


def test_a_gene_that_is_exported_at_a_scale_says_so(model, tmp_path):
    gene = replace(random_adapter(model), guard_threshold=2.0)
    fitted = gene.express(Expression(dict.fromkeys(gene.split(), 1.25), gene.sha256, "0" * 64))
    fitted.save(tmp_path / "fitted.gguf")
    made = export("llama-server", model, [(tmp_path / "fitted.gguf", 0.5)], tmp_path / "out")
    written = SafetyGene.load(next(path for path in made.files if path.suffix == ".gguf"))
    assert set(written.coefficients.values()) == {0.625} and written.guard_threshold is None


@pytest.mark.parametrize(
    "settings", [MergeSettings(promote=1), MergeSettings(run=False), MergeSettings(imatrix="i")]
)
def test_settings_of_a_merge_need_one(model, tmp_path, settings):
    with pytest.raises(SettingError, match="are for a merged model"):
        export("ollama", model, [gene_for(model, tmp_path)], tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [["--plain"], ["--promote", "1"], ["--run"]])
def test_an_export_takes_the_settings_of_its_merge(model, tmp_path, how):
    """Messages of a merge name them."""
    command = ["export", "lm-studio", str(model), str(gene_for(model, tmp_path)), *how]
    done = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and list((tmp_path / "out").rglob("*.gguf"))


def test_llama_server_gets_a_merged_model_too(model, tmp_path):
    gene = gene_for(model, tmp_path)
    made = export("llama-server", model, [gene], tmp_path / "out", merged=True)
    (merged,) = made.files
    assert shlex.split(made.commands[0]) == ["llama-server", "-m", str(merged)]
    assert np.abs(logits(merged) - logits(model, [gene])).max() < 1e-3


NAMES = {
    "My Model (1).Q4_K_M": "My-Model-1-.Q4_K_M-safe",
    "smollm2": "smollm2-safe",
    ".hidden..model.": "hidden.model-safe",
    "-_-": "model-safe",
    "模型": "model-safe",
    "a:b\\c": "a-b-c-safe",
    "x" * 120: "x" * 75 + "-safe",
    f"{'x' * 74}.y": "x" * 74 + "-safe",
    "big-00001-of-00003": "big-safe",
}


@pytest.mark.parametrize("stem", NAMES)
def test_the_new_models_name_is_one_that_every_tool_takes(stem):
    name = safe_name(Path(f"{stem}.gguf"))
    assert name == NAMES[stem]
    # Ollama's types/model: 1 to 80 bytes, a letter, digit or _ first, then also - and .
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name)
    # lms import: no full stop at either end, none of /<>:"\|?*, 100 letters at most
    assert name.strip(" .") == name and not re.search(r'[/<>:"\\|?*]', name) and len(name) <= 100


@pytest.mark.parametrize("tool", TOOLS)
def test_a_model_of_any_name_is_exported(tool, model, tmp_path):
    named = tmp_path / "Modèle à moi (1) 'x'.Q8_0.gguf"
    shutil.copy(model, named)
    gene = gene_for(model, tmp_path)
    for merged in (False, True):
        folder = tmp_path / f"{tool} {merged}"
        made = export(tool, named, [gene], folder, merged=merged)
        words = shlex.split(made.commands[0])
        if tool == "ollama":
            assert words[2] == "mod-le-moi-1-x-.q8_0-safe"
            for command, value in commands_of(folder / "Modelfile"):
                assert (folder / value).exists(), command
        if tool == "lm-studio":
            user, _, repository = words[words.index("--user-repo") + 1].partition("/")
            kept = made.files[0].relative_to(folder)
            assert kept.parts[:2] == (user, repository) and "--copy" in words
        assert Path(words[-1] if tool != "llama-server" else words[2]).exists()


@pytest.mark.parametrize("letter", ['"', "\n", "\u00a0", "\u200b", "\t"])
def test_ollama_cannot_read_every_path_but_every_model_can_be_merged(letter, model, tmp_path):
    """Its parser drops what is not printable, and knows no escape for a quote."""
    named = tmp_path / f"a{letter}b.gguf"
    shutil.copy(model, named)
    gene = gene_for(model, tmp_path)
    with pytest.raises(SettingError, match="Ollama cannot read"):
        export("ollama", named, [gene], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export("ollama", named, [gene], tmp_path / "out", merged=True)
    assert commands_of(tmp_path / "out" / "Modelfile") == [("FROM", "./a-b-safe.gguf")]


def test_ollama_gets_a_split_model_merged_alone(quantised, split, tmp_path):
    """It takes split models from 0.35.0 on, and adapters before 0.34.1."""
    gene = adapter_for(quantised("Q8_0"), tmp_path)
    with pytest.raises(SettingError, match="--merged"):
        export("ollama", split[0], [gene], tmp_path / "out")
    made = export(
        "ollama", split[0], [gene], tmp_path / "out", merged=True,
        settings=MergeSettings(run=False),
    )  # fmt: skip
    assert [path.name for path in made.files] == ["Modelfile", "split-safe.gguf"]


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
