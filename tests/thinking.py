"""Models that say what they are made to say, thoughts included, and templates that think.

A real llama.cpp model whose blocks add nothing, so that each token follows from the one before it.
Every piece of its speech is one token of its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tiny
from gguf import TokenType

from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
# What matters of each template: who opens the thought, and the switch.
TEMPLATES = {
    "Qwen3": _TURNS + "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "R1 distill": "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "SmolLM3": "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    + _TURNS + "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}",
    "none": _TURNS + "{% endif %}",
}  # fmt: skip
_LOUD = 20.0  # by how much the next token leads, nats


def speaking(model: Path, output: Path, template: str, *pieces: str, loop: bool = False) -> Path:
    """A copy of a float32 tiny model that always answers with these pieces, and then ends.

    Args:
        pieces: tokens of their own, none of which the tiny vocabulary has already.
        loop: never end: say the last piece over and over.
    """
    file = GGUFFile(model)
    facts = {
        key: value.values() if isinstance(value, ArrayValue) else value
        for key, value in file.metadata.items()
        if key != "general.architecture"
    }
    known = list(facts["tokenizer.ggml.tokens"])
    first = len(known)
    facts["tokenizer.ggml.tokens"] = [*known, *pieces]
    types = list(facts["tokenizer.ggml.token_type"])
    facts["tokenizer.ggml.token_type"] = types + [int(TokenType.USER_DEFINED)] * len(pieces)
    facts["tokenizer.chat_template"] = template
    for key in [key for key in facts if key.endswith(".vocab_size")]:
        facts[key] = first + len(pieces)
    said = list(range(first, first + len(pieces)))
    end = said[-1] if loop else tiny.IM_END
    chain = [(tiny.byte_token(0x0A), said[0]), *zip(said, [*said[1:], end], strict=True)]
    tensors = {name: np.array(file.floats(name)) for name in file.tensors}
    _make_speak(tensors, first + len(pieces), chain)
    write_gguf(output, file.architecture, facts, tensors.items())
    return output


def _make_speak(
    tensors: dict[str, np.ndarray], vocabulary: int, chain: Sequence[tuple[int, int]]
) -> None:
    width = tensors["token_embd.weight"].shape[1]
    for name, values in tensors.items():
        if name.split(".")[-2] in ("attn_output", "ffn_down"):
            values[:] = 0  # a block adds nothing to what it reads
    tensors["output_norm.weight"][:] = 1
    embedded = np.random.default_rng(0).normal(size=(vocabulary, width)).astype(np.float32)
    embedded *= (width**0.5) / np.linalg.norm(embedded, axis=1, keepdims=True)
    tensors["token_embd.weight"] = embedded
    out = np.zeros((vocabulary, width), np.float32)
    for before, after in chain:
        out[after] += _LOUD * embedded[before] / width
    tensors["output.weight"] = out
