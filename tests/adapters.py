"""Random adapters made from a model's own header, copies of models and of PEFT folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from safegene_edge.gene import Pair, SafetyGene
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf
from safegene_edge.merge import MergeSettings, merge
from safegene_edge.runtime.engine import Engine
from safegene_edge.runtime.llama import SafeLlama

MATRICES = ("attn_q", "attn_v", "attn_output", "ffn_down")


def random_adapter(
    model: Path, *, rank: int = 4, alpha: float = 8.0, size: float = 0.2, seed: int = 0, **facts
) -> SafetyGene:
    """Random A and B for some matrices of every block; `size` is B's standard deviation."""
    file, random = GGUFFile(model), np.random.default_rng(seed)
    pairs = {}
    for name, info in file.tensors.items():
        if name.split(".")[-2] in MATRICES and name.endswith(".weight"):
            rows, columns = info.shape
            a = random.normal(0, columns**-0.5, (rank, columns)).astype(np.float32)
            b = random.normal(0, size, (rows, rank)).astype(np.float32)
            pairs[name] = Pair(a, b)
    return SafetyGene(file.architecture, alpha, pairs, **facts)


def opening_gene(
    model: Path, texts: Iterable[str], adapters: Iterable[Path] = (), **facts: Any
) -> SafetyGene:
    """A random gene that makes a random model refuse these texts, by its own openers.

    It says that its aligned model refuses all, at a KL of 5 nats, so that no bound is in its way.
    """
    wide = {"aligned_loss": 1e-3, "aligned_over_refusal": 1.0, "aligned_kl": 5.0}
    gene = random_adapter(model, **{"family": "tiny", "size": 0.3} | wide | facts)
    with SafeLlama(str(model), n_ctx=256) as llama, Engine(llama, n_parallel=2) as engine:
        for adapter in adapters:
            llama.attach(adapter)
        scales = {handle: handle.scale for handle in (*llama.adapters, llama.attach(gene))}
        asked = [llama.render([{"role": "user", "content": text}]) for text in texts]
        said = engine.generate(asked, max_tokens=1, adapters=scales)
        return replace(gene, refusal_openers=tuple({llama.text(one.tokens) for one in said}))


def adapter_for(model: Path, folder: Path, **facts: Any) -> Path:
    """A small random adapter's file in `folder`; `facts` as of `random_adapter`."""
    gene = folder / "gene.gguf"
    random_adapter(model, **{"size": 0.05, **facts}).save(gene)
    return gene


def with_template(model: Path, output: Path, template: str | None, **named: str) -> Path:
    """A copy of a float32 model with another chat template, or none; `named` ones beside it."""
    facts = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    return with_facts(model, output, {**facts, "tokenizer.chat_template": template})


def with_facts(model: Path, output: Path, facts: dict[str, Any]) -> Path:
    """A copy of a float32 model with other metadata; None leaves a key out."""
    file = GGUFFile(model)
    whole = {
        key: value.values() if isinstance(value, ArrayValue) else value
        for key, value in file.metadata.items()
        if key != "general.architecture"
    }
    kept = {key: value for key, value in {**whole, **facts}.items() if value is not None}
    write_gguf(
        output, file.architecture, kept, ((name, file.floats(name)) for name in file.tensors)
    )
    return output


def stored_tensors(folder: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "peft"))


def merge_plain(model, adapters, output, settings=None, **more):
    """A merge that does not run the model: what the update alone tells."""
    settings = replace(settings or MergeSettings(), run=False)
    return merge(model, adapters, output, settings=settings, **more)
