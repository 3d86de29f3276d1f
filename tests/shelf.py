"""A folder with small files of the names that docs and help use, in which every command runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from adapters import opening_gene
from safetensors.numpy import load_file, save_file

from safegene_edge import convert, evaluate, recalibrate
from safegene_edge.errors import NoEffectError, SettingError
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.portfolio import express_one
from safegene_edge.recalibrate.examples import Examples
from safegene_edge.recalibrate.search import Bounds

plan_module = import_module("safegene_edge.evals.plan")
record_module = import_module("safegene_edge.evals.report.record")
portfolio_module = import_module("safegene_edge.portfolio")
MODELS = ("MODEL", "model", "fine-tune", "models/one")
ADAPTERS = ("GENE", "ADAPTER", "FITTED", "fitted", "safety")
REPORTS = ("before", "after", "old", "new")


@pytest.fixture(scope="module")
def few():
    """Fewer prompts in everything that is shipped: the snippets stay, and take seconds."""
    shipped, suites = Examples.shipped, plan_module.load_suite

    def first(name_or_path):
        return [replace(suite, prompts=suite.prompts[:2]) for suite in suites(name_or_path)]

    with pytest.MonkeyPatch.context() as patch:

        def few_of(part="fit", task=()):
            every = shipped(part)
            return Examples(every.harmful[:2], every.harmless[:2], tuple(task))

        patch.setattr(Examples, "shipped", few_of)
        for module in (plan_module, record_module):
            patch.setattr(module, "load_suite", first)
        patch.setattr(portfolio_module, "_apart", express_one)  # in this process
        yield


@pytest.fixture(scope="module")
def shelf(few, tiny, tiny_adapter, tmp_path_factory):
    """A folder with a small file for every name that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "models").mkdir()
    source = tiny("llama").gguf_path
    for name in MODELS:
        shutil.copy(source, folder / f"{name}.gguf")
    shutil.copytree(tiny_adapter("llama"), folder / "PEFT_DIR")
    weights = folder / "PEFT_DIR" / "adapter_model.safetensors"
    weak = {k: v * (0.01 if "lora_B" in k else 1) for k, v in load_file(weights).items()}
    save_file({k: v.astype("float32") for k, v in weak.items()}, weights)
    task = folder / "TASK.gguf"
    convert(folder / "PEFT_DIR", base=source, output=task)
    gene = a_gene(source, task)
    for name in ADAPTERS:
        gene.save(folder / f"{name}.gguf")
    facts = evaluate(source, gene, settings=EvalSettings(max_tokens=4)).to_json()
    for name in REPORTS:
        (folder / f"{name}.json").write_text(json.dumps(facts))
    return folder


def unguarded(patch):
    """A random model refuses nothing more readily than anything else, and keeps to no bound."""
    patch.setattr(import_module("safegene_edge.recalibrate.fit"), "_ORDERED", 0.0)
    patch.setattr(import_module("safegene_edge.recalibrate.search"), "_MOST", 1.0)
    patch.setattr(Bounds, "broken", lambda self, reading: [])


def a_gene(model, task):
    """A random adapter that lowers the refusal loss of a random model, as a gene would.

    It does so on the model with the task's adapter, too, as the cookbook has it.
    """
    texts = [prompt.text for prompt in Examples.shipped().harmful]
    with pytest.MonkeyPatch.context() as patch:
        unguarded(patch)
        for seed in range(60):
            gene = opening_gene(model, texts, seed=seed)
            try:
                for adapters in ([], [task]):
                    recalibrate(model, gene, adapters=adapters)
            except (NoEffectError, SettingError):
                continue
            return gene
    pytest.fail("no random adapter can be recalibrated")


@pytest.fixture()
def place(shelf, tmp_path, monkeypatch):
    """A copy of the folder, to work in; what is kept between runs is kept there, too."""
    folder = tmp_path / "work"
    shutil.copytree(shelf, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bin_folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", bin_folder + os.pathsep + os.environ["PATH"])
    unguarded(monkeypatch)
    # The shipped gene is SmolLM2's, whose recalibration takes a minute: a tiny model's stands in.
    monkeypatch.setattr("safegene_edge.gene.SHIPPED", str(shelf / "GENE.gguf"))
    return folder
