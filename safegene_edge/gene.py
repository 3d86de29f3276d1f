"""Adapters and the safety gene.

A GGUF LoRA holds, for a weight W (out×in), a pair A (r×in) and B (out×r), and one
global alpha. llama.cpp applies  W x + s·(alpha / r)·B A x  with the user's scale s and r
taken from B; where alpha is 0 or missing, the factor is s alone
(llama.cpp, src/llama-adapter.h, `get_scale`).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from . import gene_facts
from .errors import FileFormatError, MismatchError, NoEffectError, SettingError, UnsupportedError
from .expression import Expression as Expression
from .files import PathLike
from .gguf_file import ArrayValue, GGUFFile, Value, write_gguf
from .gguf_file.values import FLOAT32

SHIPPED = "smollm2-135m.gene.gguf"
# Of SmolLM2, whose shape SmolLM has, too; the file is older than the rule that genes name theirs.
_TOKENIZER = "31898b96758d4244350987e26fe623cd8f27fc7e8bd9fb5c1a33bcde6bc89d18"
FORMAT_VERSION = 1
MAX_METADATA = 16 << 20  # bytes; all of it is decoded, and an adapter's is a few KB
_BLOCK = re.compile(r"blk\.([0-9]{1,9})\.")
_KEPT = ("safegene.peft.", "safegene.learn.")
INVOCATION = "adapter.alora.invocation_tokens"
_ALPHA = "adapter.lora.alpha"
_RESERVED = {"general.architecture", "general.type", "general.alignment", "adapter.type", _ALPHA}
_ROUNDING = 2.0**-11  # of a float16, relative, but for numbers near its smallest
AdapterT = TypeVar("AdapterT", bound="Adapter")


def layer_of(tensor: str) -> int:
    """The block that a GGUF tensor belongs to: "blk.7.attn_q.weight" is in 7."""
    match = _BLOCK.match(tensor)
    return int(match.group(1)) if match else gene_facts.OUTSIDE_BLOCKS


@dataclass(frozen=True, slots=True)
class Pair:
    """A low-rank update of one weight: a (r×in) and b (out×r), float32 or float16."""

    a: npt.NDArray[Any]
    b: npt.NDArray[Any]

    @property
    def rank(self) -> int:
        return int(self.b.shape[1])

    @property
    def n_parameters(self) -> int:
        return int(self.a.size + self.b.size)


@dataclass(frozen=True)
class Adapter:
    """A GGUF LoRA in memory.

    Attributes:
        architecture: GGUF's name of it, such as "llama".
        alpha: the file's global alpha; 0 means that B A is applied as it is.
        pairs: base tensor name ("blk.0.attn_q.weight") to its pair.
        extra: other metadata of the file, kept through load and save.
        types: the GGUF types of `extra`'s values (of a list its elements'), kept as well.
    """

    architecture: str
    alpha: float
    pairs: Mapping[str, Pair]
    extra: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=dict)

    # -- facts ------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that the adapter touches, ascending."""
        return tuple(sorted({layer_of(name) for name in self.pairs}))

    @property
    def is_alora(self) -> bool:
        """Whether the adapter is meant to work only behind its invocation tokens."""
        return any(key.startswith("adapter.alora.") for key in self.extra)

    @property
    def zero_pairs(self) -> int:
        """Pairs that change nothing, such as those that were never trained: B is 0 there."""
        return sum(not (pair.a.any() and pair.b.any()) for pair in self.pairs.values())

    def require_effect(self, name: object) -> None:
        """Raise NoEffectError where no pair changes anything."""
        if self.zero_pairs == len(self.pairs):
            raise NoEffectError(
                f"{name}: every update in it is zero, so that it would do nothing",
                "It may have been saved before it was trained: give the trained one",
            )

    @property
    def n_parameters(self) -> int:
        """Numbers in all A and B together."""
        return sum(pair.n_parameters for pair in self.pairs.values())

    def effective_scale(self, tensor: str) -> float:
        """The factor that llama.cpp puts before B A of this tensor at user scale 1."""
        return self.alpha / self.pairs[tensor].rank if self.alpha else 1.0

    def delta(self, tensor: str) -> npt.NDArray[np.float32]:
        """The dense update of one weight, out×in, in float32 (computed in float64)."""
        pair = self.pairs[tensor]
        dense = pair.b.astype(np.float64) @ pair.a.astype(np.float64)
        return (dense * self.effective_scale(tensor)).astype(np.float32)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of what the adapter does, in hexadecimal: architecture, scale and tensors.

        The same whether the adapter was read from a file or never was in one; other metadata
        does not count.
        """
        alpha = float(np.float32(self.alpha))  # as a file holds it
        digest = hashlib.sha256(f"{self.architecture} {alpha}".encode())
        for name, pair in sorted(self.pairs.items()):
            digest.update(f"{name} {pair.a.shape} {pair.b.shape}".encode())
            for half in (pair.a, pair.b):
                digest.update(half.dtype.str.encode() + np.ascontiguousarray(half).tobytes())
        return digest.hexdigest()

    # -- transformations --------------------------------------------------

    def scaled(self: AdapterT, factors: float | Mapping[int, float]) -> AdapterT:
        """The same adapter with a factor folded into B: one for all, or one a layer.

        Layers whose factor is 0 leave the adapter. Layers that `factors` does not name
        keep a factor of 1.

        Raises:
            SettingError: a factor is not finite or too large, or nothing is left.
        """
        pairs = {}
        for name, pair in self.pairs.items():
            factor = factors.get(layer_of(name), 1.0) if isinstance(factors, Mapping) else factors
            if not math.isfinite(factor):
                raise SettingError(f"the factor of '{name}' is {factor}", "Give a finite number")
            if factor:
                pairs[name] = Pair(pair.a, _times(pair.b, factor, name))
        if not pairs:
            raise SettingError("every layer has the factor 0: no adapter is left")
        return replace(self, pairs=pairs)

    def split(self: AdapterT) -> dict[int, AdapterT]:
        """One adapter a layer, so that each can have a scale of its own on a live model."""
        return {layer: self.only([layer]) for layer in self.layers}

    def only(self: AdapterT, layers: Iterable[int]) -> AdapterT:
        """The part of the adapter that lies in these layers."""
        wanted = set(layers)
        pairs = {name: pair for name, pair in self.pairs.items() if layer_of(name) in wanted}
        if not pairs:
            raise SettingError(f"the adapter has nothing in the layers {sorted(wanted)}")
        return replace(self, pairs=pairs)

    # -- files ------------------------------------------------------------

    @classmethod
    def load(cls: type[AdapterT], path: PathLike) -> AdapterT:
        """Read a GGUF LoRA file, checking all of it.

        Raises:
            FileFormatError: not a LoRA; a pair lacks a half, has ranks that differ, or holds
                a number that is not finite; a tensor that llama.cpp would silently skip.
        """
        file = GGUFFile(path)
        _require_lora(file)
        alpha = float(file.number(_ALPHA, 0.0))
        pairs = {name: _read_pair(file, name) for name in _pair_names(file)}
        extra = {
            key: value.values() if isinstance(value, ArrayValue) else value
            for key, value in file.metadata.items()
            if key not in _RESERVED
        }
        return cls._from_file(file, alpha, pairs, extra)

    @classmethod
    def _from_file(
        cls: type[AdapterT],
        file: GGUFFile,
        alpha: float,
        pairs: dict[str, Pair],
        extra: dict[str, Any],
    ) -> AdapterT:
        return cls(file.architecture, alpha, pairs, extra, file.types)

    def metadata(self) -> dict[str, Value]:
        """Everything that `save` writes beside the tensors and the architecture.

        Raises:
            SettingError: the alpha is no finite float32, the only type that llama.cpp reads.
        """
        with np.errstate(over="ignore"):
            alpha = float(np.float32(self.alpha))
        if not math.isfinite(alpha):
            raise SettingError(f"the alpha is {self.alpha}", "Give a finite float32")
        return {**self.extra, "general.type": "adapter", "adapter.type": "lora", _ALPHA: alpha}

    def save(self, path: PathLike, inputs: Iterable[PathLike] = ()) -> None:
        """Write a GGUF LoRA that stock llama.cpp loads; atomic, never over one of `inputs`."""
        types = {key: kind for key, kind in self.types.items() if key in self.extra}
        write_gguf(path, self.architecture, self.metadata(), self._tensors(), inputs, types)

    def _tensors(self) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        for name, pair in self.pairs.items():
            yield f"{name}.lora_a", pair.a
            yield f"{name}.lora_b", pair.b


AdapterLike: TypeAlias = PathLike | Adapter


@dataclass(frozen=True)
class SafetyGene(Adapter):
    """A reusable safety adapter and the facts it carries (`safegene.*` keys).

    Attributes:
        family: the models it serves, such as "SmolLM2-135M".
        sources: what it came from, name to SHA-256.
        scores: layer to selection score.
        coefficients: layer to the coefficient already folded into B.
        refusal_openers: how the aligned model opens a refusal.
        aligned_loss: the aligned model's own refusal loss on the shipped calibration examples,
            a share from 0 to 1 (see `recalibrate`); 0 where it was not measured.
        aligned_over_refusal: the share of the harmless ones that it refuses, in the same way.
        aligned_margins: its margin (nats) on each of them, in the order of
            `Examples.every_shipped`; empty where it was not measured.
        aligned_examples: those examples' digest, for they change from version to version.
        aligned_kl: KL(degraded ‖ aligned) on the harmless ones, nats a token, of the degraded
            model that is nearest to it; 0 where it was not measured.
        target: SHA-256 of the model that the folded coefficients were found for; may be empty.
        tokenizer: digest of the family's tokens of text (see `compat`); may be empty.
        guard_threshold: the margin (nats) from which on a guard ends an answer of `target`; None
            where it was not measured. See `recalibrate.guard`.
    """

    family: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[int, float] = field(default_factory=dict)
    coefficients: Mapping[int, float] = field(default_factory=dict)
    refusal_openers: tuple[str, ...] = ()
    aligned_loss: float = 0.0
    aligned_over_refusal: float = 0.0
    aligned_margins: tuple[float, ...] = ()
    aligned_examples: str = ""
    aligned_kl: float = 0.0
    target: str = ""
    tokenizer: str = ""
    guard_threshold: float | None = None

    PREFIX: ClassVar[str] = "safegene."

    @classmethod
    def shipped(cls) -> SafetyGene:
        """The gene of SmolLM2-135M that comes with the package."""
        with resources.as_file(resources.files("safegene_edge") / "data" / SHIPPED) as file:
            gene = cls.load(file)
        return replace(gene, tokenizer=gene.tokenizer or _TOKENIZER)

    def express(self, expression: Expression) -> SafetyGene:
        """The gene with an expression folded into B, for tools that know nothing of us.

        Raises:
            MismatchError: the expression is of another gene, or names a layer that this one lacks.
        """
        if expression.gene and expression.gene != self.sha256:
            raise MismatchError("the expression is of another gene", "Recalibrate with this gene")
        unknown = sorted(set(expression.coefficients) - set(self.layers))
        if unknown:
            raise MismatchError(
                f"the expression has coefficients for the layers {unknown}, "
                f"but the gene has only {list(self.layers)}",
                "Recalibrate with this gene",
            )
        folded = self.scaled(expression.coefficients)
        total = {
            layer: self.coefficients.get(layer, 1.0) * expression.coefficients.get(layer, 1.0)
            for layer in folded.layers
        }
        return replace(
            folded,
            coefficients=total,
            target=expression.target or self.target,
            guard_threshold=expression.guard_threshold,
        )

    @classmethod
    def _from_file(
        cls,
        file: GGUFFile,
        alpha: float,
        pairs: dict[str, Pair],
        extra: dict[str, Any],
    ) -> SafetyGene:
        version = file.number("safegene.version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise FileFormatError(
                f"{file.path}: the gene has format {version:g}, "
                f"this version reads {FORMAT_VERSION}",
                "Update safegene-edge",
            )
        aligned = {
            name: gene_facts.share(file, name) for name in ("aligned_loss", "aligned_over_refusal")
        }
        own = {key: extra.pop(key) for key in list(extra) if key.startswith(cls.PREFIX)}
        # How an adapter was converted, or a gene learnt, is not this class's to drop.
        extra.update({k: v for k, v in own.items() if k.startswith(_KEPT)})
        return cls(
            file.architecture,
            alpha,
            pairs,
            extra,
            file.types,
            family=file.text("safegene.family", ""),
            sources=gene_facts.keyed(
                file, "safegene.sources", file.strings("safegene.source_hashes")
            ),
            scores=gene_facts.by_layer(file, "safegene.scores"),
            coefficients=gene_facts.coefficients(file),
            refusal_openers=tuple(file.strings("safegene.refusal_openers")),
            aligned_margins=tuple(file.numbers("safegene.aligned_margins")),
            aligned_examples=file.text("safegene.aligned_examples", ""),
            aligned_kl=gene_facts.not_negative(file, "safegene.aligned_kl"),
            target=file.text("safegene.target", ""),
            tokenizer=file.text("safegene.text_tokens", ""),
            guard_threshold=gene_facts.given(file, "safegene.guard_threshold"),
            **aligned,
        )

    def metadata(self) -> dict[str, Value]:
        facts: dict[str, Value] = {
            "safegene.version": FORMAT_VERSION,
            "safegene.family": self.family,
            "safegene.sources": list(self.sources),
            "safegene.source_hashes": list(self.sources.values()),
            "safegene.layers": list(self.layers),
            "safegene.refusal_openers": list(self.refusal_openers),
            "safegene.aligned_loss": float(self.aligned_loss),
            "safegene.aligned_over_refusal": float(self.aligned_over_refusal),
            "safegene.aligned_margins": [float(margin) for margin in self.aligned_margins],
            "safegene.aligned_examples": self.aligned_examples,
            "safegene.aligned_kl": float(self.aligned_kl),
        }
        digests = {"target": self.target, "text_tokens": self.tokenizer}
        facts |= {f"safegene.{name}": digest for name, digest in digests.items() if digest}
        if self.guard_threshold is not None:
            facts["safegene.guard_threshold"] = float(self.guard_threshold)
        for key, values in (("scores", self.scores), ("coefficients", self.coefficients)):
            facts[f"safegene.{key}.layers"] = list(values)
            facts[f"safegene.{key}"] = [float(value) for value in values.values()]
        return {**super().metadata(), **facts}


# -- reading --------------------------------------------------------------


def _times(b: npt.NDArray[Any], factor: float, name: str) -> npt.NDArray[Any]:
    """B times a factor, in float32 where float16 would lose more of it than it rounds off."""
    with np.errstate(over="ignore", under="ignore"):
        wide = b.astype(np.float32) * np.float32(factor)
        narrow = wide.astype(b.dtype)
    if not np.isfinite(wide).all():
        raise SettingError(f"the factor of '{name}' is {factor}: too large", "Give a smaller one")
    if narrow.dtype == wide.dtype or not np.isfinite(narrow).all():
        return np.asarray(wide)  # whose norm float32 may not hold
    lost = np.linalg.norm(wide - narrow)
    return np.asarray(narrow if lost <= _ROUNDING * np.linalg.norm(wide) else wide)


def listed(adapters: Any) -> list[Any]:
    """Adapters as a list; SettingError for one alone, or a mapping, whose values would be lost."""
    if isinstance(adapters, (str, bytes, os.PathLike, Adapter, Mapping)):
        raise SettingError("the adapters are no list", "Give [adapter] or [(adapter, scale)]")
    return list(adapters)


def require_distinct(given: Sequence[tuple[str, Adapter]]) -> None:
    """SettingError where two of these adapters, each with its name, do the same.

    Both would count, which nobody means by giving a file twice.
    """
    seen: dict[tuple[str, bool], str] = {}
    for name, adapter in given:
        does = adapter.sha256, adapter.is_alora
        if does in seen:
            same = "given twice" if seen[does] == name else f"the same adapter as {seen[does]}"
            raise SettingError(f"{name}: is {same}", "Give it once, with the scale that you want")
        seen[does] = name


def is_lora(file: GGUFFile) -> bool:
    """Whether the file calls itself a LoRA adapter."""
    return (
        file.metadata.get("general.type") == "adapter"
        and file.metadata.get("adapter.type") == "lora"
    )


def _require_lora(file: GGUFFile) -> None:
    if not is_lora(file):
        what, which = (file.metadata.get(key) for key in ("general.type", "adapter.type"))
        for key, value, other in (("general.type", what, which), ("adapter.type", which, what)):
            if value is None and other in ("adapter", "lora"):
                raise FileFormatError(
                    f"{file.path}: has no '{key}', which says what it is",
                    "Convert the adapter again",
                )
        kind = which if what == "adapter" else what or "model"
        raise FileFormatError(
            f"{file.path}: is of the type '{kind}', not a LoRA adapter",
            "Give a gene or an adapter there; the model goes before it"
            if kind == "model"
            else "Give a GGUF LoRA, as `safegene-edge convert` writes it",
        )
    if file.types.get(_ALPHA, FLOAT32) != FLOAT32:  # llama.cpp aborts the process on another type
        raise FileFormatError(
            f"{file.path}: {_ALPHA} is not stored as float32", "Convert the adapter again"
        )
    size = max((end for _, end in file.spans.values()), default=0)
    if size > MAX_METADATA:
        raise FileFormatError(f"{file.path}: {size >> 20} MB of metadata are too much")


def _pair_names(file: GGUFFile) -> list[str]:
    """The base tensors that the file updates, in file order; every tensor must be half a pair."""
    stray = [name for name in file.tensors if not name.endswith((".lora_a", ".lora_b"))]
    if stray:
        raise FileFormatError(
            f"{file.path}: tensor '{stray[0]}' is no half of a LoRA pair"
            + (f" (nor are {len(stray) - 1} others)" if stray[1:] else ""),
            "llama.cpp refuses or silently skips such tensors: convert the adapter without them",
        )
    names = list(dict.fromkeys(name[: -len(".lora_a")] for name in file.tensors))
    if not names:
        raise FileFormatError(f"{file.path}: the adapter has no tensors")
    for name in names:
        for half in ("lora_a", "lora_b"):
            if f"{name}.{half}" not in file.tensors:
                raise FileFormatError(
                    f"{file.path}: tensor '{name}' lacks its {half} half", "Convert it again"
                )
    return names


def _read_pair(file: GGUFFile, name: str) -> Pair:
    if name == "token_embd.weight":  # its halves lie the other way round, see llama-adapter.cpp
        raise UnsupportedError(
            f"{file.path}: tensor '{name}.lora_a' adapts the embeddings, which is not supported",
            "Train the adapter without embed_tokens among its target modules",
        )
    halves = []
    for half in ("lora_a", "lora_b"):
        info = file.tensors[f"{name}.{half}"]
        if len(info.shape) != 2:
            raise FileFormatError(
                f"{file.path}: tensor '{info.name}' has the shape {list(info.shape)}, "
                "not two dimensions"
            )
        values = file.floats(info.name)
        if not np.isfinite(values).all():
            raise FileFormatError(
                f"{file.path}: tensor '{info.name}' holds NaN or infinity",
                "The training diverged or the file is corrupt: make the adapter again",
            )
        halves.append(values.astype(np.float16) if info.type_name == "F16" else values)
    a, b = halves
    if a.shape[0] != b.shape[1]:
        raise FileFormatError(
            f"{file.path}: tensor '{name}' has rank {a.shape[0]} in lora_a "
            f"and {b.shape[1]} in lora_b"
        )
    return Pair(a, b)
