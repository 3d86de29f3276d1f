"""A GGUF of Llama 7B's shapes and of Q4_K_M's types, with random weights: 4 GB of real blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from safegene_edge.gene import Adapter, Pair
from safegene_edge.gguf_file import ArrayValue, GGUFFile, kernels

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS = 32, 4096, 11008, 32, 32
_SHAPES = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
}  # fmt: skip


def model_of(path: Path, donor: Path) -> None:
    """Write the model; the vocabulary is the donor's."""
    source, writer = GGUFFile(donor), GGUFWriter(path, "llama", use_temp_file=False)
    vocabulary = source.tensors["token_embd.weight"].shape[0]
    for key, value in source.metadata.items():
        if key.startswith("tokenizer."):
            if isinstance(value, ArrayValue):
                writer.add_array(key, value.values())
            else:
                add = {str: writer.add_string, bool: writer.add_bool}
                add.get(type(value), writer.add_uint32)(key, value)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(15)
    tiles: dict[tuple[int, str], np.ndarray] = {}

    def weight(name: str, shape: tuple[int, int], kind: str) -> None:
        """Random rows, quantised once and repeated: real blocks, made in seconds."""
        key = shape[1], kind
        if key not in tiles:
            values = np.random.default_rng(len(tiles)).normal(0, 0.02, (64, shape[1]))
            tiles[key] = kernels.quantise(
                values.astype(np.float32), int(GGMLQuantizationType[kind])
            )
        rows = np.resize(tiles[key], (shape[0], tiles[key].shape[1]))
        writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[kind])

    weight("token_embd.weight", (vocabulary, WIDTH), "Q4_K")
    for layer in range(LAYERS):
        for name, shape in _SHAPES.items():
            # llama.cpp's mixture: V and down in Q6_K in half of the layers
            more = name in ("attn_v", "ffn_down") and layer % 2 == 0
            weight(f"blk.{layer}.{name}.weight", shape, "Q6_K" if more else "Q4_K")
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    weight("output.weight", (vocabulary, WIDTH), "Q6_K")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def adapter_of(path: Path, model: Path) -> None:
    """A gene of the default budget: rank 4 on q, v, o and down of four layers, 0.57 million."""
    file, random = GGUFFile(model), np.random.default_rng(1)
    pairs = {}
    for layer in range(12, 16):
        for name in ("attn_q", "attn_v", "attn_output", "ffn_down"):
            tensor = f"blk.{layer}.{name}.weight"
            rows, columns = file.tensors[tensor].shape
            a = random.normal(0, columns**-0.5, (4, columns)).astype(np.float16)
            b = random.normal(0, 0.01, (rows, 4)).astype(np.float16)
            pairs[tensor] = Pair(a, b)
    Adapter(file.architecture, 8.0, pairs).save(path)
