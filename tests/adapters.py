"""Random adapters made from a model's own header, and copies of PEFT folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from safegene_edge.gene import Pair, SafetyGene
from safegene_edge.gguf_file import GGUFFile

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


def adapter_for(model: Path, folder: Path, **facts: Any) -> Path:
    """A small random adapter's file in `folder`; `facts` as of `random_adapter`."""
    gene = folder / "gene.gguf"
    random_adapter(model, **{"size": 0.05, **facts}).save(gene)
    return gene


def stored_tensors(folder: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "peft"))
