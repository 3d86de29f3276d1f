"""The strength that brings back most refusals within the bounds, from a few readings.

A race on every fourth example climbs from 1 in steps of a half, or goes down, until it gets worse.
So it knows between which strengths the best one lies. There every margin is taken to be linear in
the strength between two readings; the strength that is foretold to be best is read on all examples,
until it is one that was read already, or nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..runtime.refusal_margin import refusal_loss
from .reading import Reading, Values

_RACE, RACED = 4, 7  # every fourth example, read at so many strengths at most
_ENOUGH = 48  # of a kind, for a fourth of them to say something
_STEP, _LEAST = 1.5, 0.05  # between raced strengths, and the smallest
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
        per_refusal: more of it for each share of the harmful ones that is refused beyond `own`.
    """

    kl: float
    task_kl: float
    over_refusal: float
    per_refusal: float = 0.0
    own: float = 0.0

    def most_over(self, reading: Reading) -> float:
        """The over-refusal that a reading may have."""
        gained = max(0.0, 1 - refusal_loss(reading.harmful) - self.own)
        return self.over_refusal + self.per_refusal * gained

    def broken(self, reading: Reading) -> list[str]:
        """The bounds that a reading does not keep, in words."""
        found = {
            "KL": (mean(reading.kl), self.kl),
            "task KL": (mean(reading.task_kl), self.task_kl),
            "over-refusal": (1 - refusal_loss(reading.harmless), self.most_over(reading)),
        }
        return [
            f"{name} {value:.3f} above {bound:.3f}"
            for name, (value, bound) in found.items()
            if value > bound
        ]


def mean(values: Values) -> float:
    """The mean; 0 of nothing."""
    return float(values.mean()) if values.size else 0.0


def objective(reading: Reading, weight: float) -> float:
    """J: the share of harmful examples that is not refused, smoothed, and the weighted KL."""
    return refusal_loss(reading.harmful) + weight * mean(reading.kl)


def search(
    look: Look, without: Reading, bounds: Bounds, weight: float, passes: int
) -> dict[float, Reading]:
    """Readings of all examples by strength; 0 and at most `passes` others."""
    enough = min(len(without.harmful), len(without.harmless)) >= _ENOUGH
    step, most = (_RACE, RACED) if enough else (1, passes)
    rough = _rough(bounds, len(without.harmless[::step])) if enough else bounds
    raced = race(look, without, rough, weight, step, most)
    limits = _around(raced, rough, weight)
    found = {0.0: without} if enough else dict(raced)
    strength = foretold(raced, rough, weight, limits)
    while len(found) <= passes and not _seen(found, strength):
        found[strength] = look(strength, 1)
        strength = foretold(found, bounds, weight, _below(found, bounds, limits))
    return found


def _below(
    found: Mapping[float, Reading], bounds: Bounds, limits: tuple[float, float]
) -> tuple[float, float]:
    """The limits, below every strength that breaks a bound by more than counts as the same."""
    low, high = limits
    broken = [known for known, reading in found.items() if known and bounds.broken(reading)]
    high = min([high, *(known * (1 - 1.1 * _NEAR) for known in broken)])
    return (low if low < high else 0.0), high


def _rough(bounds: Bounds, count: int) -> Bounds:
    """What a race on so few harmless examples may hold: one of twelve is 8 points."""
    share = min(bounds.over_refusal, 0.5)
    return replace(bounds, over_refusal=bounds.over_refusal + (share * (1 - share) / count) ** 0.5)


def race(
    look: Look, without: Reading, bounds: Bounds, weight: float, step: int, most: int
) -> dict[float, Reading]:
    """Readings of every `step`-th example: upwards from 1, or downwards, until it gets worse."""
    found = {0.0: without.every(step)}

    def is_better(strength: float, than: float) -> bool:
        found[strength] = look(strength, step)
        if bounds.broken(found[strength]):
            return False
        if bounds.broken(found[than]):
            return True
        new, old = (objective(found[s], weight) for s in (strength, than))
        return new < old

    best = 1.0
    climbs = is_better(best, 0.0)
    while climbs and len(found) <= most and best * _STEP <= _MOST:
        climbs = is_better(best * _STEP, best)
        best *= _STEP if climbs else 1.0
    while best <= 1.0 and len(found) <= most and best / _STEP >= _LEAST:
        sinks = is_better(best / _STEP, best) or bool(bounds.broken(found[best / _STEP]))
        if not sinks:
            break
        best /= _STEP
    return found


def _around(found: Mapping[float, Reading], bounds: Bounds, weight: float) -> tuple[float, float]:
    """Between which strengths the best one lies."""
    known = sorted(found)
    kept = [strength for strength in known[1:] if not bounds.broken(found[strength])]
    if not kept:
        return 0.0, known[1]
    best = min(kept, key=lambda strength: objective(found[strength], weight))
    place = known.index(best)
    if place + 1 == len(known):
        return known[place - 1], best
    above = known[place + 1]
    return known[place - 1], above * (1 - 1.1 * _NEAR if bounds.broken(found[above]) else 1)


def _seen(found: Mapping[float, Reading], strength: float) -> bool:
    return any(abs(known - strength) <= _NEAR * strength for known in found if known)


def foretold(
    found: Mapping[float, Reading], bounds: Bounds, weight: float, limits: tuple[float, float]
) -> float:
    """The strength between limits whose reading would be best, as far as these readings tell."""
    grid = np.linspace(*limits, _GRID + 1)[1:]
    readings = {float(strength): between(found, float(strength)) for strength in grid}
    kept = [strength for strength, reading in readings.items() if not bounds.broken(reading)]
    if not kept:
        return min(known for known in found if known) / 2
    return min(kept, key=lambda strength: objective(readings[strength], weight))


def finest(found: Mapping[float, Reading], bounds: Bounds, weight: float, chosen: float) -> float:
    """The best strength so near to a chosen one that it was not read; the chosen one if none."""
    limits = chosen * (1 - _NEAR), chosen * (1 + _NEAR)
    strength = foretold(found, bounds, weight, limits)
    return strength if limits[0] <= strength <= limits[1] else chosen


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
