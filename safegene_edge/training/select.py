"""Which layers of a gene matter: those that bring back refusals of harm, and not of the rest.

With r(c) the share of prompts that a degraded model refuses, smoothed by a nat of the margin
(`runtime.refusal_margin`), layer l gains

    dr / dc_l   at c = 1/2 in all layers, the mean over the degraded models:

h_l on harmful prompts, b_l on borderline ones. Its score is

    s_l = h_l / (mean over layers of |b| + max(0, b_l))

The mean keeps a layer that does next to nothing from winning by a ratio of noises.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import SettingError
from .models import GENE, LiveModel, Source
from .recipe import remaining

if TYPE_CHECKING:
    from ..runtime.refusal_margin import Openers, Tokens
    from .settings import Log, Recipe

Gain: TypeAlias = Mapping[int, float]  # a layer's, by layer
_STRENGTH = 0.5
_MOST = 3.0  # times that the kept layers are strengthened, for those left out


@dataclass(frozen=True, slots=True)
class Gains:
    """What every layer's coefficient adds to the smoothed share refused: dr/dc by layer."""

    harmful: Gain
    harmless: Gain

    @classmethod
    def mean(cls, parts: Sequence[Gain]) -> Gains:
        """Over the degraded models: those on harmful prompts are first, then on harmless ones."""
        kinds = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        return cls(*({layer: fmean(gain[layer] for gain in kind) for layer in kind[0]}
                     for kind in kinds))  # fmt: skip

    def scores(self) -> dict[int, float]:
        """Layer to score; the larger, the sooner it is kept."""
        floor = fmean(map(abs, self.harmless.values())) or 1e-12
        return {
            layer: gain / (floor + max(0.0, self.harmless[layer]))
            for layer, gain in self.harmful.items()
        }

    def makes_up(self, kept: Iterable[int]) -> float:
        """The factor, 1 to 3, by which the kept layers do what all layers did, to first order."""
        whole, held = sum(self.harmful.values()), sum(self.harmful[layer] for layer in kept)
        return min(_MOST, max(1.0, whole / held)) if held > 0 else 1.0


def layer_gains(
    live: LiveModel,
    sources: Sequence[Source],
    harmful: Sequence[Tokens],
    harmless: Sequence[Tokens],
    openers: Openers,
    recipe: Recipe,
    report: Log = lambda line: None,
    known: Sequence[Gain] = (),
) -> Iterator[Gain]:
    """What every layer gains, one degraded model after the other: on harmful prompts, then on
    harmless ones, in the order that `Gains.mean` takes. Prompts are token sequences.

    Args:
        known: what an earlier run has already measured, in that order.
    """
    if not harmful or not harmless:
        raise SettingError("selection needs harmful and harmless prompts")
    parts = [(source, prompts) for prompts in (harmful, harmless) for source in sources]
    started, left = time.monotonic(), len(parts) - len(known)
    for number, (source, prompts) in enumerate(parts[len(known) :], 1):
        yield _gains(live, source, prompts, openers, recipe)
        done = f"measured {len(known) + number}/{len(parts)}"
        report(f"{done}  {remaining(started, number, left)}")


def _gains(
    live: LiveModel, source: Source, prompts: Sequence[Tokens], openers: Openers, recipe: Recipe
) -> Gain:
    """dr/dc of every layer, of one degraded model."""
    import torch

    from .refusals import margins

    step = max(1, recipe.batch // len(openers.paths))
    with live.as_source(source, gene=True) as model:
        values = torch.full((len(live.blocks()),), _STRENGTH, device=model.device)
        values.requires_grad_(True)
        total = torch.zeros_like(values)
        for start in range(0, len(prompts), step):
            with strengths(live, values):
                found = margins(model, prompts[start : start + step], openers, recipe)
                share = found.sigmoid().sum() / len(prompts)
                total += torch.autograd.grad(share, values)[0]
    return dict(enumerate(total.tolist()))


@contextmanager
def strengths(live: LiveModel, values: Any) -> Iterator[None]:
    """The gene at values[l] (a tensor's, so that gradients reach it) times itself in layer l."""
    before = []
    for layer, block in enumerate(live.blocks()):
        for module in block.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and GENE in scaling:
                before.append((scaling, scaling[GENE]))
                scaling[GENE] = scaling[GENE] * values[layer]
    try:
        yield
    finally:
        for scaling, value in before:
            scaling[GENE] = value


def select(scores: Mapping[int, float], sizes: Mapping[int, int], budget: int) -> tuple[int, ...]:
    """The layers to keep: best score first, as long as their parameters fit the budget.

    Args:
        scores: layer to score; sizes: layer to the gene's parameters in it.

    Raises:
        SettingError: not even one layer fits.
    """
    kept: list[int] = []
    left = budget
    for layer in sorted(sizes, key=lambda number: (-scores.get(number, 0.0), number)):
        if sizes[layer] <= left:
            kept.append(layer)
            left -= sizes[layer]
    if not kept:
        raise SettingError(
            f"no layer of the gene fits {budget:,} parameters (the smallest has "
            f"{min(sizes.values()):,})",
            "Lower the rank or raise the budget",
        )
    return tuple(sorted(kept))
