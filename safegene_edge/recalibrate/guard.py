"""From which margin on a guard ends an answer: measured on answers that should go on.

The target with its gene answers the harmless examples, greedily, but for those that it refuses at
once. The guard's question is put behind several places of each answer, and an answer counts with
its largest margin, since one look ends it. The threshold is the largest of all, and some room: of
n + 1 answers one passes the largest of the other n by chance, and the room is for the rest. It is
never below 0, where the model would go on by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..runtime.guard import Guard

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from .reading import Reader

PLACES = (8, 16, 32, 64)  # tokens of an answer behind which it is looked at
ROOM = 1.0  # nats


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


def measured(reader: Reader, strength: float) -> GuardThreshold | None:
    """The threshold on a reader's harmless examples; None where no guard can look."""
    engine = reader.engine
    try:
        guard = engine.llama.make_guard()
    except UnsupportedError:
        return None
    scales, at_once = reader.scales(strength), reader.over_refusals(strength)
    return guard_threshold(engine, guard, reader.asked.harmless, scales, at_once.tolist())


def guard_threshold(
    engine: Engine,
    guard: Guard,
    prompts: Sequence[Sequence[int]],
    scales: Any,
    at_once: Sequence[float] | None = None,
) -> GuardThreshold | None:
    """Measure the threshold on a target's own answers; None where none is long enough.

    Args:
        prompts: as tokens, up to where the answer begins.
        scales: the adapters' scales, with the gene at its strength.
        at_once: the margin (nats) by which each is refused at once, if that was read already.
    """
    if at_once is None:
        at_once = engine.margins(prompts, guard.openers, adapters=scales)
    kept = [prompt for prompt, margin in zip(prompts, at_once, strict=True) if margin <= 0]
    said = engine.generate(kept, max_tokens=max(PLACES), adapters=scales)
    places = [
        (number, [*prompt, *answer.tokens[:place], *guard.header])
        for number, (prompt, answer) in enumerate(zip(kept, said, strict=True))
        for place in PLACES
        if place <= len(answer.tokens) and len(prompt) + place + guard.room <= engine.n_ctx
    ]
    looks = [tokens for _, tokens in places]
    largest: dict[int, float] = {}
    for (number, _), margin in zip(
        places, engine.margins(looks, guard.openers, adapters=scales), strict=True
    ):
        largest[number] = max(margin, largest.get(number, margin))
    if not largest:
        return None
    values = largest.values()
    threshold = max(max(values), 0.0) + ROOM
    return GuardThreshold(threshold, len(values), sum(value > 0 for value in values))
