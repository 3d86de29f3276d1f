"""Targets and baselines: weight updates added to the float base, then quantised by llama.cpp.

Baselines, each from its paper; S is what alignment put into the weights, per tensor (aligned
minus unaligned), D what the fine-tune did:

- RESTA (Bhardwaj et al. 2024): D + S, plain task arithmetic.
- SafeLoRA (Hsu et al. 2024): C = S S^T / |S|_F; where the cosine of C D and D is under 0.35, D
  becomes C D.
- SafeMERGE (Djuhera et al. 2025): where that cosine, the mean over a layer, is under 0.35, the
  layer becomes the mean of D and S.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from finetunes import Family

from safegene_edge import convert
from safegene_edge.files import atomic_output
from safegene_edge.gene import layer_of
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.runtime.requantise import requantise
from safegene_edge.training.models import Source

Update: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
THRESHOLD = 0.35


def update(base: Path, adapters: Sequence[Path]) -> dict[str, npt.NDArray[np.float32]]:
    """The dense update (out×in) of every tensor that the PEFT folders touch."""
    total: dict[str, npt.NDArray[np.float32]] = {}
    for folder in adapters:
        adapter = convert(folder, base=base)
        for tensor in adapter.pairs:
            total[tensor] = total.get(tensor, np.float32(0)) + adapter.delta(tensor)
    return total


def added(*updates: Update) -> dict[str, npt.NDArray[np.float32]]:
    """The sum of several updates."""
    names = dict.fromkeys(name for one in updates for name in one)
    return {name: sum(one[name] for one in updates if name in one) for name in names}  # type: ignore[misc]


class Builder:
    """Makes the quantised GGUFs of one family, once each."""

    def __init__(self, made: Family, unaligned: Callable[[], Sequence[Source]]) -> None:
        # Only the baselines need the unaligned models, which may have to be trained first.
        self.family, self.unaligned = made, unaligned
        self.base = made.aligned.base

    def build(self, name: str, changes: Update, kind: str = "Q4_K_M") -> Path:
        """The aligned model plus `changes`, as a GGUF."""
        folder = self.family.work / "targets"
        folder.mkdir(exist_ok=True)
        output = folder / f"{name}.{kind}.gguf"
        if not output.exists():
            whole = added(self.own, changes)
            with atomic_output(folder / f"{name}.f16.tmp") as draft:
                shutil.copyfile(self.float_base, draft)
                _add(draft, whole)
                requantise(draft, output, kind)
            (folder / f"{name}.f16.tmp").unlink()
        return output

    @cached_property
    def float_base(self) -> Path:
        path = self.family.work / "base.F16.gguf"
        if not path.exists():
            requantise(self.base, path, "F16")
        return path

    @cached_property
    def own(self) -> Update:
        """What the aligned model's own adapters add to the base."""
        return update(self.base, self.family.aligned.adapters)

    @cached_property
    def safety(self) -> Update:
        """S: aligned minus unaligned, the mean over the unaligned models."""
        unaligned = self.unaligned()
        count = len(unaligned)
        parts = [self.own] + [
            {name: -d / count for name, d in update(self.base, source.adapters).items()}
            for source in unaligned
        ]
        return added(*parts)

    def task(self, source: Source) -> Update:
        """D: what a fine-tune changed."""
        own = len(self.family.aligned.adapters)
        return update(self.base, source.adapters[own:])

    # -- baselines --------------------------------------------------------

    def resta(self, task: Update) -> Update:
        return added(task, self.safety)

    def safe_lora(self, task: Update) -> Update:
        return {name: self._judged(name, delta)[0] for name, delta in task.items()}

    def safe_merge(self, task: Update) -> Update:
        cosines: dict[int, list[float]] = {}
        for name, delta in task.items():
            cosines.setdefault(layer_of(name), []).append(self._judged(name, delta)[1])
        unsafe = {layer for layer, found in cosines.items() if np.mean(found) < THRESHOLD}
        half = np.float32(0.5)
        kept = {n: d * half if layer_of(n) in unsafe else d for n, d in task.items()}
        mixed = {n: d * half for n, d in self.safety.items() if layer_of(n) in unsafe}
        return added(kept, mixed)

    def _judged(
        self, name: str, delta: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], float]:
        """SafeLoRA's choice for one tensor, and the cosine that it was made by."""
        safety = self.safety.get(name)
        if safety is None:
            return delta, 1.0
        projected = safety @ (safety.T @ delta) / np.linalg.norm(safety)
        size = np.linalg.norm(projected) * np.linalg.norm(delta)
        cosine = float((projected * delta).sum() / size) if size else 0.0
        return (projected if cosine < THRESHOLD else delta), cosine


def _add(path: Path, changes: Update) -> None:
    """Add updates to the tensors of an F16 or F32 GGUF, in place."""
    file = GGUFFile(path)
    for name, delta in changes.items():
        info = file.tensors[name]
        dtype = {"F16": "<f2", "F32": "<f4"}[info.type_name]
        weights = np.memmap(path, dtype, "r+", info.offset, info.shape)
        weights[:] = (weights.astype(np.float32) + delta).astype(dtype)
        weights.flush()
