"""From which margin on a guard ends an answer: measured on answers that should go on.

The target with its gene answers the harmless examples, greedily, and the guard's question is put
behind several places of each answer. An answer counts with its largest margin, since one look
ends it. The threshold is the larger of two bounds on a new answer's: the largest that was seen,
which one of n + 1 answers passes by chance, and the mean with three standard deviations, which
holds where n is small. It is never below 0: there the model would go on by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedError
from ..runtime.guard import Guard

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from .reading import Reader

PLACES = (4, 16, 32, 64)  # tokens of an answer behind which it is looked at
_DEVIATIONS = 3.0


@dataclass(frozen=True)
class GuardThreshold:
    """What was measured.

    Attributes:
        threshold: nats.
        answers: harmless answers that were looked at.
        ended: of these, how many a guard at 0 would have ended: what the threshold is for.
    """

    threshold: float
    answers: int
    ended: int


def measured(readers: Sequence[Reader], strength: float) -> GuardThreshold | None:
    """The threshold on the readers' harmless examples; None where no guard can look."""
    engine = readers[0].engine
    try:
        guard = engine.llama.make_guard()
    except UnsupportedError:
        return None
    prompts = [prompt for reader in readers for prompt in reader.asked.harmless]
    return guard_threshold(engine, guard, prompts, readers[0].scales(strength))


def guard_threshold(
    engine: Engine, guard: Guard, prompts: Sequence[Sequence[int]], scales: Any
) -> GuardThreshold | None:
    """Measure the threshold on a target's own answers; None where none is long enough.

    Args:
        prompts: as tokens, up to where the answer begins.
        scales: the adapters' scales, with the gene at its strength.
    """
    said = engine.generate(prompts, max_tokens=max(PLACES), adapters=scales)
    places = [
        (number, [*prompt, *answer.tokens[:place], *guard.header])
        for number, (prompt, answer) in enumerate(zip(prompts, said, strict=True))
        for place in PLACES
        if place <= len(answer.tokens) and len(prompt) + place + guard.room <= engine.n_ctx
    ]
    margins = engine.margins([tokens for _, tokens in places], guard.openers, adapters=scales)
    largest: dict[int, float] = {}
    for (number, _), margin in zip(places, margins, strict=True):
        largest[number] = max(margin, largest.get(number, margin))
    return threshold_of(list(largest.values())) if largest else None


def threshold_of(margins: Sequence[float]) -> GuardThreshold:
    """The threshold from each answer's largest margin, nats."""
    values = np.array(margins)
    bounds = (0.0, float(values.max()), float(values.mean() + _DEVIATIONS * values.std()))
    return GuardThreshold(max(bounds), values.size, int((values > 0).sum()))
