"""Whether llama.cpp can be handed a model: on some it ends the whole process."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import FileFormatError
from ..gguf_file import GGUFFile

_TEMPLATE = "tokenizer.chat_template"
_MOST = {"context_length": 1 << 31, "embedding_length": 1 << 20,
         "attention.head_count": 1 << 16, "attention.head_count_kv": 1 << 16}  # fmt: skip
_SCALINGS = ("none", "linear", "yarn", "longrope")
# Those that only encode; llama.cpp aborts where logits are asked of one.
_ENCODERS = ("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2",
             "jina-bert-v3", "eurobert", "gemma-embedding", "llama-embed", "t5encoder", "clip",
             "wavtokenizer-dec")  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d+)\.")


def require_loadable(model: GGUFFile) -> None:
    """Raise FileFormatError for a model on which llama.cpp would end the whole process.

    It asserts, or runs out of memory, where the header holds what no model has, and on models that
    only encode text.
    """
    if model.architecture in _ENCODERS:
        raise FileFormatError(
            f"{model.path}: is a model of {model.architecture}, which encodes text and answers "
            "nothing", "Give a chat model",
        )  # fmt: skip
    for key, why in _absurd(model):
        raise FileFormatError(f"{model.path}: {key} {why}", "Download or convert the model again")
    _require_vocabulary(model)


def _absurd(model: GGUFFile) -> Iterator[tuple[str, str]]:
    """Keys of the header that no model can have as they are, and why."""
    facts, name = model.metadata, model.architecture
    layers = facts.get(f"{name}.block_count")
    there = {int(found[1]) for tensor in model.tensors if (found := _BLOCK.match(tensor))}
    if isinstance(layers, int) and (layers < 1 or (there and layers > max(there) + 1)):
        yield f"{name}.block_count", f"is {layers}, and its tensors are of {len(there)} layers"
    for key, most in _MOST.items():
        value = facts.get(f"{name}.{key}")
        if isinstance(value, int) and not 0 <= value < most:
            yield f"{name}.{key}", f"is {value}, which is no size of a model"
    yield from _absurd_numbers(facts, f"{name}.")
    scaling = facts.get(f"{name}.rope.scaling.type", "none")
    if scaling not in _SCALINGS:
        yield f"{name}.rope.scaling.type", f"is {scaling!r}, none of {', '.join(_SCALINGS)}"
    if facts.get("tokenizer.ggml.model") in ("none", "no_vocab"):
        yield "tokenizer.ggml.model", "says that it has no vocabulary"
    if not isinstance(facts.get(_TEMPLATE, ""), str):
        yield _TEMPLATE, "is no text"


def _absurd_numbers(facts: Mapping[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if not isinstance(value, float) or not key.startswith(prefix):
            continue
        if not math.isfinite(value):
            yield key, f"is {value}"
        if value < 0 and key.endswith("_epsilon"):
            yield key, f"is {value}, and must not be negative"


def _require_vocabulary(model: GGUFFile) -> None:
    listed = model.strings("tokenizer.ggml.tokens")
    # llama.cpp reads a token up to its first NUL, and names those that are empty by their number.
    tokens = [text for token in listed if (text := token.partition("\0")[0])]
    if len(set(tokens)) == len(tokens):
        return
    twice = Counter(tokens).most_common(1)[0][0]
    raise FileFormatError(
        f"{model.path}: its vocabulary has the token {twice[:40]!r} twice",
        "Download or convert the model again",
    )
