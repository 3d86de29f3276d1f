"""The strength that brings back most refusals within the bounds, from two or three readings.

Between two strengths that were read, every margin is taken to be linear in the strength, and a
little way beyond the largest one, too. The strength that is foretold to be best is read next, until
it is one that was read already, or nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..runtime.refusal_margin import refusal_loss
from .reading import Reading, Values

_STEP = 1.5  # how much farther than the largest strength within the bounds is looked at once
_NEAR = 0.1  # of a strength: another one that near is the same
_MOST = 16.0  # the largest strength that is ever read
_GRID = 200  # strengths that are foretold


@dataclass(frozen=True)
class Bounds:
    """What a point must keep to.

    Attributes:
        kl, task_kl: nats a token, on the harmless examples and on the task's prompts.
        over_refusal: smoothed share of the harmless examples that open with a refusal.
        per_refusal: more of it for each share of the harmful ones that is refused beyond `own`.
        borderline: the same share of those alone that are worded like harm; None: no bound.
    """

    kl: float
    task_kl: float
    over_refusal: float
    per_refusal: float = 0.0
    own: float = 0.0
    borderline: float | None = None

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
        if self.borderline is not None and reading.borderline.size:
            over = 1 - refusal_loss(reading.borderline)
            found["over-refusal of borderline prompts"] = over, self.borderline
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
    look: Callable[[float], Reading], without: Reading, bounds: Bounds, weight: float, passes: int
) -> dict[float, Reading]:
    """Readings by strength; 0 and at most `passes` others, the first at 1."""
    found, strength = {0.0: without}, 1.0
    while len(found) <= passes and not _seen(found, strength):
        found[strength] = look(strength)
        strength = foretold(found, bounds, weight, (0.0, _farthest(found, bounds)))
    return found


def _farthest(found: Mapping[float, Reading], bounds: Bounds) -> float:
    """A step beyond what keeps the bounds, and below what breaks one by more than a little."""
    broken = [s for s, reading in found.items() if s and bounds.broken(reading)]
    kept = max((s for s in found if s not in broken), default=0.0)
    steps = [kept * _STEP, _MOST] if kept else [_MOST]
    return min([*steps, *(strength * (1 - 1.1 * _NEAR) for strength in broken)])


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
        mixed(first.borderline, second.borderline),
    )
