"""Hugging Face module names and row order, against those of a base model in GGUF.

Everything is read from the base GGUF: its architecture, blocks, heads and tensor shapes.
The names come from gguf-py's own map.

For the `llama` architecture the rows of Q and K are stored in another order: a head's rows
are two halves in Hugging Face (rotation pairs row i with row i + d/2) and interleaved in
GGUF (it pairs 2i with 2i+1). A row order belongs to B alone: permuting the rows of B A
permutes the rows of B.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileFormatError, UnsupportedError
from ..gene import layer_of
from ..gguf_file import GGUFFile
from .keys import of_senses

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
MAX_BLOCKS = 10_000
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o"))
_FEED_FORWARD = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_PERMUTED = re.compile(r"blk\.\d+\.attn_([qk])\.weight")
_NESTED = re.compile(r"(?:(?:^|(?<=\.))(?:language_model|text_model)\.)")
_LAYER = re.compile(r"(?:^|(?<=\.))layers\.([0-9]{1,9})\.")


def is_linear_layer(module: str) -> bool:
    """Whether a module is named as the linear layers of the supported families are."""
    return module.endswith((*_ATTENTION, *_FEED_FORWARD, *_FUSED))


class BaseNames:
    """The names and row order of one base model.

    Raises:
        UnsupportedError: the architecture is not one of `ARCHITECTURES`.
        FileFormatError: the file's own facts contradict each other.
    """

    def __init__(self, model: GGUFFile) -> None:
        self.model = model
        self.architecture = model.architecture
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{model.path}: adapters for the architecture '{self.architecture}' cannot be "
                f"converted, only {', '.join(ARCHITECTURES)}",
                "Convert with llama.cpp's convert_lora_to_gguf.py and check the result",
            )
        self.n_blocks = model.whole(f"{self.architecture}.block_count")
        if not 1 <= self.n_blocks <= MAX_BLOCKS:
            raise FileFormatError(f"{model.path}: it counts {self.n_blocks} blocks")

    def tensor(self, module: str) -> str | None:
        """The GGUF tensor of a module such as "model.layers.0.self_attn.q_proj".

        None where GGUF knows no such module. The tensor need not be in this base: a larger
        model of the family has more blocks, and a tied output has no tensor of its own.
        """
        if of_senses(module):
            return None
        plain = re.sub(r"^(?:model\.){2,}", "model.", _NESTED.sub("", module))
        block = _LAYER.search(plain)
        number = int(block.group(1)) if block else 0
        # gguf-py's map is made for a number of blocks: ask about block 0, then put the number in.
        first = _LAYER.sub("layers.0.", plain, count=1)
        for candidate in (first, f"model.{first}"):
            name = self._map.get_name(f"{candidate}.weight", try_suffixes=(".weight",))
            if name:
                return str(name).replace("blk.0.", f"blk.{number}.", 1)
        return None

    @cached_property
    def modules(self) -> dict[str, str]:
        """GGUF tensor to transformers' module name, for all linear layers of this base."""
        kinds = _FUSED if self.architecture == "phi3" else _ATTENTION + _FEED_FORWARD
        paths = [f"model.layers.{n}.{kind}" for n in range(self.n_blocks) for kind in kinds]
        known = {self.tensor(path): path for path in (*paths, "lm_head")}
        return {name: path for name, path in known.items() if name in self.model.tensors}

    def to_gguf_rows(self, tensor: str, b: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """B (out×r) with its rows in GGUF's order."""
        heads = self._heads(tensor, b.shape[0])
        if not heads:
            return b
        halves = b.reshape(heads, 2, -1, b.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(b.shape))

    def to_hf_rows(self, tensor: str, b: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """B (out×r) with its rows in Hugging Face's order."""
        heads = self._heads(tensor, b.shape[0])
        if not heads:
            return b
        interleaved = b.reshape(heads, -1, 2, b.shape[1])
        return np.ascontiguousarray(interleaved.swapaxes(1, 2).reshape(b.shape))

    @cached_property
    def _map(self) -> Any:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        return get_tensor_name_map(kinds[self.architecture], 1)

    def _heads(self, tensor: str, rows: int) -> int:
        """The heads whose rows are interleaved in this tensor; 0 where the order is the same."""
        match = _PERMUTED.fullmatch(tensor)
        if self.architecture != "llama" or not match:
            return 0
        key = f"{self.architecture}.attention.head_count"
        counts = self.model.numbers(key)
        if match.group(1) == "k":
            counts = self.model.numbers(f"{key}_kv") or counts
        block = layer_of(tensor) if len(counts) > 1 else 0  # one number for all, or one a block
        heads = int(counts[block]) if block < len(counts) else 0
        if heads < 1 or rows % (2 * heads):
            raise FileFormatError(
                f"{self.model.path}: its head counts {counts[:4]} do not divide the {rows} rows "
                f"of '{tensor}'"
            )
        return heads
