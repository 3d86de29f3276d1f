"""Preflight: does this adapter fit that model? Answered from the two headers alone.

llama.cpp answers the same question with one generic error, after it has loaded the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import FileFormatError, MismatchError, UnsupportedError
from .files import PathLike, sha256
from .gene import INVOCATION, Adapter, SafetyGene
from .gguf_file import GGUFFile

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_TEXT = (1, 6)  # gguf.TokenType: NORMAL, BYTE
_HASHED = 2 << 30  # bytes; a larger model is not hashed for a warning
SHOWN = 5  # problems named in an error message; `check` returns all


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why an adapter does not fit; `tensor` is empty where it concerns the whole."""

    tensor: str
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.reason}" if self.tensor else self.reason


def open_model(path: PathLike) -> GGUFFile:
    """A GGUF file that holds a model, with the tensors of its other parts if it is split.

    Raises:
        FileFormatError: an adapter, a control vector, a later part, or a part is missing.
    """
    file = GGUFFile(path)
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise FileFormatError(
            f"{file.path}: is of the type '{kind}', not a model",
            "Give a model there; this file goes behind it, or after --gene or --adapter",
        )
    for part in other_parts(file, Path(path)):
        if twice := sorted(file.tensors.keys() & part.tensors.keys()):
            raise FileFormatError(f"{part.path}: tensor '{twice[0]}' is in another part, too")
        file.tensors.update(part.tensors)
    if not file.tensors:  # of a split model the first part may hold none
        raise FileFormatError(f"{file.path}: has no tensors", "Give a whole model")
    return file


def model_hashes(path: PathLike) -> list[str]:
    """SHA-256 of each file of a model: the first part of a split one may hold no tensors."""
    file = open_model(path)
    return [sha256(part.path) for part in (file, *other_parts(file, Path(path)))]


def model_hash(path: PathLike) -> str:
    """A model's SHA-256, or that of all parts' hashes, in hexadecimal."""
    return whole_hash(model_hashes(path))


def whole_hash(hashes: list[str]) -> str:
    """One hash of those of a model's files."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def other_parts(file: GGUFFile, given: Path | None = None) -> list[GGUFFile]:
    """The other files of a split model, in order: name-00002-of-00003.gguf and so on.

    Their names follow from the name as it was given: of an `hf:` path, each is fetched.
    """
    count = file.whole("split.count", 1)
    if count < 2:
        return []
    match = SHARD.fullmatch(file.path.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        raise FileFormatError(
            f"{file.path}: is a part of a model split into {count} files, but not the first",
            f"Give the file that ends in -00001-of-{count:05d}.gguf, under its own name",
        )
    named = given or file.path
    return [
        GGUFFile(named.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf"))
        for number in range(2, count + 1)
    ]


def check(adapter: Adapter, model: GGUFFile) -> list[Problem]:
    """Every reason why llama.cpp would refuse, or silently ignore, a part of the adapter.

    Args:
        adapter: A r×in and B out×r for each tensor.
        model: the header of the target; weights are out×in.
    """
    if adapter.architecture != model.architecture:
        return [
            Problem(
                "",
                f"the adapter is for the architecture '{adapter.architecture}', "
                f"the model is '{model.architecture}'",
            )
        ]
    shapes = {name: info.shape for name, info in model.tensors.items()}
    return [
        Problem(name, reason)
        for name, pair in adapter.pairs.items()
        if (reason := _misfit(name, (pair.b.shape[0], pair.a.shape[1]), shapes))
    ]


def _misfit(name: str, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> str:
    if name not in shapes:
        if name == "output.weight" and "token_embd.weight" in shapes:
            return "the model's output is tied to its embeddings and cannot be changed alone"
        return "the model has no such tensor"
    if name == "token_embd.weight":
        return "adapters on the embeddings are not supported"
    if shapes[name] != shape:
        return f"the adapter is for {_show(shape)}, the model has {_show(shapes[name])}"
    return ""


def require_fit(adapter: Adapter, model: GGUFFile, source: PathLike = "the adapter") -> None:
    """Raise MismatchError, naming each tensor that does not fit.

    Args:
        source: the adapter's file, for the message.

    Raises:
        UnsupportedError: an aLoRA, which would be always on.
    """
    if adapter.is_alora:
        raise UnsupportedError(
            f"{source} is an aLoRA: it is meant to work only behind its invocation tokens "
            f"{adapter.extra.get(INVOCATION, '')}, and here it would be always on",
            "Run it with llama-server, or train a plain LoRA",
        )
    problems = check(adapter, model)
    if not problems:
        return
    named = "; ".join(str(problem) for problem in problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise MismatchError(
        f"{source} does not fit {model.path}: {named}{more}",
        "Use one made for this model's family and size; `safegene-edge restore` learns a gene",
    )


def tokenizer_digest(model: GGUFFile) -> str:
    """SHA-256 of what a model reads text by: the same in a model and its fine-tunes."""
    read_by = [text_tokens(model), model.strings("tokenizer.ggml.merges")]
    return hashlib.sha256(json.dumps(read_by).encode()).hexdigest()


def same_tokenizer(one: GGUFFile, other: GGUFFile) -> bool:
    """Whether two models read text alike, as far as their files say."""
    lists = [
        [file.strings(f"tokenizer.ggml.{key}") for key in ("tokens", "merges")]
        for file in (one, other)
    ]
    return lists[0] == lists[1] or tokenizer_digest(one) == tokenizer_digest(other)


def text_tokens(model: GGUFFile) -> list[str]:
    """A model's tokens in their order, with "" for special, added and unused ones.

    Fine-tunes add such tokens, or rename them, to pad or to mark turns; all that is read without
    them is read as before.
    """
    tokens = model.strings("tokenizer.ggml.tokens")
    types = model.numbers("tokenizer.ggml.token_type")
    words = [
        token if number >= len(types) or types[number] in _TEXT else ""
        for number, token in enumerate(tokens)
    ]
    while words and not words[-1]:
        words.pop()
    return words


def unfitted(gene: PathLike, model: PathLike) -> str:
    """Why a gene's strength is not this model's; empty where it is, as far as is known.

    A LoRA that is no gene has no strength to find. Files do not say of each gene for which model
    it was fitted; and of a model above 2 GiB only whether the gene was fitted at all is looked at.
    """
    found = SafetyGene.load(gene)
    if not found.family or check(found, open_model(model)):  # one that does not fit is refused
        return ""
    if not found.coefficients:
        return f"{gene} was never fitted to {model}, so its strength there is a guess"
    file = open_model(model)
    parts = [part.path for part in (file, *other_parts(file, Path(model)))]
    small = sum(part.stat().st_size for part in parts) <= _HASHED
    if found.target and small and model_hash(model) != found.target:
        return f"{gene} was fitted to another model than {model}"
    return ""


def _show(shape: tuple[int, ...]) -> str:
    return "×".join(str(extent) for extent in shape)
