"""Make a model without its refusal direction, to see whether `scan` knows it.

    python bench/scan/direction.py MODEL.gguf OUT.gguf LAYER

The direction r is the difference of what a layer's attention reads at the last token of harmful
and of harmless prompts, in the mean (Arditi et al., arXiv 2406.11717). What writes into the
residual stream loses it by a rank-one change, W - r r^T W; the output is Q4_K_M.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from safegene_edge.aliases import Floats
from safegene_edge.files import scratch_file, scratch_folder
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf
from safegene_edge.recalibrate.examples import Examples
from safegene_edge.runtime.activations import _Watch
from safegene_edge.runtime.engine import Engine
from safegene_edge.runtime.llama import SafeLlama
from safegene_edge.runtime.requantise import requantise

WRITERS = ("attn_output", "ffn_down")


def direction(model: str, layer: int) -> Floats:
    """The unit vector that harmful prompts add to the stream before a layer."""
    name, examples = f"blk.{layer}.attn_q.weight", Examples.shipped("fit")
    means = []
    # One thread: where each node calls back, a second one mostly waits.
    with SafeLlama(model, n_ctx=512, n_threads=1) as llama, scratch_file() as file:
        watch = _Watch([name], file)
        with Engine(llama, n_parallel=1, n_ctx=1024, watch=watch, flash_attn=True) as engine:
            for prompts in (examples.harmful, examples.harmless):
                rows = []
                for prompt in prompts:
                    watch.seen.clear()
                    engine.generate([llama.render_answer(prompt.as_dicts())], max_tokens=1)
                    rows.append(watch.read(name)[-1])
                means.append(np.mean(rows, axis=0))
    norm = GGUFFile(model).floats(f"blk.{layer}.attn_norm.weight")
    found = (means[0] - means[1]) / norm
    return np.asarray(found / np.linalg.norm(found), np.float32)


def without(file: GGUFFile, r: Floats) -> Iterator[tuple[str, Floats]]:
    """The tensors, those that write into the stream without the direction."""
    for name in file.tensors:
        values = file.floats(name)
        if name == "token_embd.weight":
            values -= np.outer(values @ r, r)
        elif name.split(".")[-2] in WRITERS:
            values -= np.outer(r, r @ values)
        yield name, values


def main(model: str, output: str, layer: str) -> None:
    file = GGUFFile(model)
    facts = {
        key: value.values() if isinstance(value, ArrayValue) else value
        for key, value in file.metadata.items()
        if key != "general.architecture"
    }
    with scratch_folder() as folder:
        whole = Path(folder) / "f32.gguf"
        write_gguf(whole, file.architecture, facts, without(file, direction(model, int(layer))))
        requantise(whole, output, "Q4_K_M")


if __name__ == "__main__":
    main(*sys.argv[1:])
