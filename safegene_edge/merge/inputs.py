"""What a merge is given: adapters with their scales, the sum of their updates, their origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..aliases import Floats
from ..errors import MismatchError, SettingError
from ..files import sha256
from ..gene import Adapter, AdapterLike, Expression, Pair, SafetyGene, listed, require_distinct
from ..gguf_file import GGUFFile, Value, kernels
from .rounding import Update

How: TypeAlias = float | Expression
Given: TypeAlias = AdapterLike | tuple[AdapterLike, How]
KEY = "safegene.merge."


@dataclass(frozen=True, slots=True)
class Folded:
    """An adapter with its scale or expression folded into B.

    Attributes:
        name: for messages; source: the file, None for an adapter in memory.
        how: what was folded.
    """

    content: Adapter
    name: str
    source: Path | None
    how: How


def fold(given: Iterable[Given]) -> list[Folded]:
    """Load adapters and fold their scales or expressions.

    Raises:
        SettingError: there is none, one is given twice, a scale is not finite, or an expression
            has no gene.
        MismatchError: an expression is of another gene.
        NoEffectError: all that an adapter holds is zero.
    """
    items = [item if isinstance(item, tuple) else (item, 1.0) for item in listed(given)]
    if not items:
        raise SettingError("no adapter is given", "Name at least one")
    loaded = [item if isinstance(item, Adapter) else SafetyGene.load(item) for item, _ in items]
    sources = [None if isinstance(item, Adapter) else Path(item) for item, _ in items]
    names = [str(source or "an adapter in memory") for source in sources]
    for name, adapter in zip(names, loaded, strict=True):
        adapter.require_effect(name)
    require_distinct(list(zip(names, loaded, strict=True)))
    hows = [how for _, how in items]
    return [_folded(*one) for one in zip(loaded, names, sources, hows, strict=True)]


def _folded(content: Adapter, name: str, source: Path | None, how: How) -> Folded:
    if isinstance(how, Expression):
        if not isinstance(content, SafetyGene):
            raise SettingError(f"{name}: an expression belongs to a gene", "Give a scale")
        try:
            return Folded(content.express(how), name, source, how)
        except MismatchError as error:
            raise MismatchError(f"{name}: {error.message}", error.remedy) from error
    if not np.isfinite(how):
        raise SettingError(f"{name}: the scale is {how}", "Give a finite number")
    if how == 1.0:
        return Folded(content, name, source, how)
    scaled = content.scaled(float(how))
    if isinstance(scaled, SafetyGene):  # its strength, and a guard that was measured at another
        strengths = {layer: how * value for layer, value in scaled.coefficients.items()}
        scaled = replace(scaled, coefficients=strengths, guard_threshold=None)
    return Folded(scaled, name, source, how)


def updates_of(
    adapters: Iterable[Adapter], directions: Mapping[str, Floats] | None = None
) -> dict[str, Update]:
    """The sum of several adapters' updates, tensor by tensor.

    Args:
        directions: tensor to what its inputs lie along (k×in).
    """
    halves: dict[str, list[tuple[Floats, Floats]]] = {}
    for adapter in adapters:
        for name, pair in adapter.pairs.items():
            b = pair.b.astype(np.float32) * np.float32(adapter.effective_scale(name))
            halves.setdefault(name, []).append((pair.a.astype(np.float32), b))
    found = {}
    for name, parts in halves.items():
        a = np.concatenate([part[0] for part in parts])
        b = np.concatenate([part[1] for part in parts], axis=1)
        found[name] = Update.of(a, b, (directions or {}).get(name))
    return found


def require_mergeable(model: GGUFFile, name: str, importance: Mapping[str, Floats]) -> None:
    """Raise unless ggml can write the tensor's type with what is given."""
    info = model.tensors[name]
    where = f"{model.path}: tensor '{name}'"
    if len(info.shape) != 2:
        raise MismatchError(f"{where} has {len(info.shape)} dimensions, not two")
    kernels.require_writable(info.ggml_type, info.type_name, where)
    columns = info.shape[1]
    if name in importance and importance[name].size != columns:
        raise MismatchError(
            f"{where} has {columns} columns, the importance matrix {importance[name].size}",
            "Give the one made for this model",
        )
    if kernels.needs_imatrix(info.ggml_type) and name not in importance:
        raise SettingError(
            f"{where} has the type {info.type_name}, which needs an importance matrix",
            "Give --imatrix FILE, as llama-imatrix writes it, or side-load the adapter",
        )


def provenance(hashes: Sequence[str], model: Path, adapters: Sequence[Folded]) -> dict[str, Value]:
    """What a merged file says of where it came from."""
    from .._version import __version__

    scales = [1.0 if isinstance(one.how, Expression) else float(one.how) for one in adapters]
    facts: dict[str, Value] = {
        f"{KEY}version": __version__,
        f"{KEY}model": model.name,
        f"{KEY}model_hashes": list(hashes),
        f"{KEY}adapters": [Path(one.name).name for one in adapters],
        f"{KEY}adapter_hashes": [sha256(one.source) if one.source else "" for one in adapters],
        f"{KEY}scales": scales,
    }
    for number, one in enumerate(adapters):
        if isinstance(one.content, SafetyGene) and one.content.coefficients:
            values = one.content.coefficients
            facts[f"{KEY}{number}.layers"] = [float(layer) for layer in values]
            facts[f"{KEY}{number}.coefficients"] = [float(v) for v in values.values()]
    return facts


def combined(adapters: Sequence[Folded]) -> Adapter:
    """One adapter that does what all do together, for tools that take one file and no scale."""
    first = adapters[0].content
    if len(adapters) == 1:
        return first
    pairs = {n: Pair(u.a, u.b) for n, u in updates_of(one.content for one in adapters).items()}
    return Adapter(first.architecture, 0.0, pairs)  # alpha 0: B A is applied as it is
