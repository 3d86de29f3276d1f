"""The strength that brings back most refusals within the bounds, from a few readings.

Every margin is taken to be linear in the strength between two readings, and beyond the last one.
So the readings made so far foretell every other strength; the best of them is read next, until
it is one that was read already. A race comes first: every fourth example foretells roughly, and
all examples decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .reading import Reading, Values
from .refusal_margin import refusal_loss

_RACE, _RACED = 4, 4  # every fourth example, read at so many strengths at most
_ENOUGH = 48  # of a kind, for a race to say something
_NEAR = 0.1  # of a strength: another one that near is the same
_MOST = 16.0  # the largest strength that is ever read
_GRID = 200  # strengths that are foretold
Look = Callable[[float, int], Reading]  # strength, every which example


@dataclass(frozen=True)
class Bounds:
    """What a point must keep to.

    Attributes:
        kl, task_kl: nats a token, on the harmless examples and on the task's prompts.
        over_refusal: smoothed share of the harmless examples that open with a refusal.
        goal: the aligned model's refusal loss; refusals beyond it gain nothing.
    """

    kl: float
    task_kl: float
    over_refusal: float
    goal: float = 0.0

    def broken(self, reading: Reading) -> list[str]:
        """The bounds that a reading does not keep, in words."""
        found = {
            "KL": (mean(reading.kl), self.kl),
            "task KL": (mean(reading.task_kl), self.task_kl),
            "over-refusal": (1 - refusal_loss(reading.harmless), self.over_refusal),
        }
        return [
            f"{name} {value:.3f} above {bound:.3f}"
            for name, (value, bound) in found.items()
            if value > bound
        ]


def mean(values: Values) -> float:
    """The mean; 0 of nothing."""
    return float(values.mean()) if values.size else 0.0


def objective(reading: Reading, weight: float, goal: float = 0.0) -> float:
    """J: the share of harmful examples that is not refused, smoothed, and the weighted KL."""
    return max(goal, refusal_loss(reading.harmful)) + weight * mean(reading.kl)


def search(
    look: Look, without: Reading, bounds: Bounds, weight: float, passes: int
) -> dict[float, Reading]:
    """Readings of all examples by strength; 0 and at most `passes` others."""
    strength = 1.0
    if min(len(without.harmful), len(without.harmless)) >= _ENOUGH:
        raced = {0.0: without.every(_RACE)}
        while len(raced) <= _RACED and not _seen(raced, strength):
            raced[strength] = look(strength, _RACE)
            strength = foretold(raced, bounds, weight)
    found = {0.0: without}
    while len(found) <= passes and not _seen(found, strength):
        found[strength] = look(strength, 1)
        strength = foretold(found, bounds, weight)
    return found


def _seen(found: Mapping[float, Reading], strength: float) -> bool:
    return any(abs(known - strength) <= _NEAR * strength for known in found if known)


def foretold(found: Mapping[float, Reading], bounds: Bounds, weight: float) -> float:
    """The strength whose reading would be best, as far as these readings tell."""
    most = min(_MOST, 2 * max(found))
    grid = np.linspace(0, most, _GRID + 1)[1:]
    readings = {float(strength): between(found, float(strength)) for strength in grid}
    kept = [strength for strength, reading in readings.items() if not bounds.broken(reading)]
    if not kept:
        return min(known for known in found if known) / 2
    return min(kept, key=lambda strength: objective(readings[strength], weight, bounds.goal))


def between(found: Mapping[float, Reading], strength: float) -> Reading:
    """What a reading would be, linear between its neighbours; beyond the last, as up to there."""
    known = sorted(found)
    above = min(max(1, int(np.searchsorted(known, strength))), len(known) - 1)
    low, high = known[above - 1], known[above]
    share = (strength - low) / (high - low)

    def mixed(one: Values, other: Values) -> Values:
        return one + share * (other - one)

    first, second = found[low], found[high]
    return Reading(
        mixed(first.harmful, second.harmful),
        mixed(first.harmless, second.harmless),
        mixed(first.kl, second.kl),
        mixed(first.task_kl, second.task_kl),
    )
