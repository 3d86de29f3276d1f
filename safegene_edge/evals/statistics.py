"""Counts and differences that carry their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..errors import SettingError

Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


def wilson(n: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for the share n/total, as two shares in 0..1.

    Unlike the normal approximation it stays inside 0..1 and keeps a width at n = 0
    and n = total (E. B. Wilson, 1927). With total = 0 nothing is known: (0, 1).

    Raises:
        SettingError: if not 0 <= n <= total.
    """
    if not 0 <= n <= total:
        raise SettingError(f"a count of {n} out of {total} is impossible")
    if total == 0:
        return 0.0, 1.0
    share, z2 = n / total, z * z
    centre = share + z2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    low = 0.0 if n == 0 else (centre - half) / scale  # exact where rounding would miss it
    high = 1.0 if n == total else (centre + half) / scale
    return low, high


@dataclass(frozen=True, slots=True)
class Count:
    """`n` of `total` prompts, shown as "n/N (p %, lo–hi)"."""

    n: int
    total: int

    @property
    def share(self) -> float | None:
        """n / total in 0..1, or None where nothing was counted."""
        return self.n / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval, in 0..1."""
        return wilson(self.n, self.total)

    def __str__(self) -> str:
        if self.share is None:
            return "0/0"
        low, high = self.interval
        return f"{self.n}/{self.total} ({percent(self.share)} %, {percent(low)}–{percent(high)})"


def percent(share: float) -> str:
    """One decimal below 10 % and above 90 %, where it matters; none between."""
    value = 100 * share
    return f"{value:.0f}" if 10 <= value <= 90 or value in (0, 100) else f"{value:.1f}"


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two raters beyond chance (J. Cohen, 1960); None where chance explains all."""
    n = len(first)
    if not n:
        return None
    same = sum(a == b for a, b in zip(first, second, strict=True)) / n
    one, other = sum(first) / n, sum(second) / n
    chance = one * other + (1 - one) * (1 - other)
    return None if chance == 1 else (same - chance) / (1 - chance)


# -- before and after ---------------------------------------------------------

Z_80 = 0.8416212335729143  # the 80 % point: the power that the notes on sample size assume
_RESAMPLES = 10_000
_HALVINGS = 50


@dataclass(frozen=True, slots=True)
class Paired:
    """The same prompts in two columns: how many show an outcome in which.

    Attributes:
        n: prompts judged in both columns.
        before, after: how many of them show the outcome.
        only_before, only_after: the pairs that differ, by direction.
    """

    n: int
    before: int
    after: int
    only_before: int
    only_after: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Count two columns of equal length.

        Raises:
            SettingError: their lengths differ.
        """
        if len(before) != len(after):
            raise SettingError(f"{len(before)} outcomes before, {len(after)} after")
        pairs = list(zip(before, after, strict=True))
        return cls(
            n=len(pairs),
            before=sum(before),
            after=sum(after),
            only_before=sum(b and not a for b, a in pairs),
            only_after=sum(a and not b for b, a in pairs),
        )

    @property
    def difference(self) -> float | None:
        """Share after minus share before, in -1..1; None without pairs."""
        return (self.only_after - self.only_before) / self.n if self.n else None

    @property
    def discordant(self) -> float:
        """The share of the pairs that differ, in 0..1."""
        return (self.only_after + self.only_before) / self.n if self.n else 0.0

    def interval(self) -> tuple[float, float]:
        """95 % score interval of the difference; (-1, 1) without pairs.

        The differences that a score test on the pairs does not reject (T. Tango, "Equivalence test
        and confidence interval for the difference in proportions for the paired-sample design",
        Statistics in Medicine 17, 1998). Where no pair differs it is ± Wilson's bound of 0/n.
        """
        if not self.n:
            return -1.0, 1.0
        found = (self.only_after - self.only_before) / self.n
        return self._bound(found, -1.0), self._bound(found, 1.0)

    def _bound(self, inside: float, outside: float) -> float:
        """Where, from the difference that was found outwards, the test begins to reject."""
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if abs(self._score(middle)) > Z_95:
                outside = middle
            else:
                inside = middle
        return inside

    def _score(self, change: float) -> float:
        """Tango's statistic of a difference, standard normal if it is the true one."""
        n, gained, lost = self.n, self.only_after, self.only_before
        apart = gained - lost - n * change
        # The likeliest share of pairs that are lost, given the difference.
        half = (2 * n - gained + lost) * change - gained - lost
        root = math.sqrt(max(0.0, half * half + 8 * n * lost * change * (1 - change)))
        variance = n * ((root - half) / (2 * n) + change * (1 - change))
        return apart / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, apart)


def mcnemar(only_before: int, only_after: int) -> tuple[float, float]:
    """McNemar's test on the pairs that differ: two-sided exact and mid-p values.

    Under the null each such pair falls either way with probability 1/2, so with
    X ~ Bin(b + c, 1/2) and m = min(b, c) the exact p is min(1, 2 P(X ≤ m)), and the
    mid-p is 2 P(X ≤ m) - P(X = m), which is less conservative and nearly keeps the level
    (Fagerland, Lydersen, Laake, BMC Medical Research Methodology 13:91, 2013).
    """
    if only_before < 0 or only_after < 0:
        raise SettingError(f"{only_before} and {only_after} pairs cannot differ")
    n, least = only_before + only_after, min(only_before, only_after)
    tail = sum(math.comb(n, k) for k in range(least + 1))  # exact: Python's integers grow
    exact = min(Fraction(1), Fraction(2 * tail, 2**n))
    mid = Fraction(2 * tail - math.comb(n, least), 2**n)
    return float(exact), float(mid)


def needed_pairs(difference: float, discordant: float) -> int | None:
    """Pairs that show a difference at the 5 % level with 80 % power; None if it is 0.

    n = (z_.975 √ψ + z_.8 √(ψ - δ²))² / δ², ψ the share of pairs that differ, at least |δ|
    (R. J. Connor, Biometrics 43:207-211, 1987).
    """
    if not difference:
        return None
    share = max(discordant, abs(difference))
    spread = Z_95 * math.sqrt(share) + Z_80 * math.sqrt(share - difference * difference)
    return math.ceil(spread * spread / (difference * difference) - 1e-9)


def detectable_difference(n: int, discordant: float) -> float | None:
    """The smallest difference in 0..1 that n pairs show with 80 % power; None if none is.

    `needed_pairs` solved for δ by bisection; it falls as δ grows.
    """

    def enough(difference: float) -> bool:
        needed = needed_pairs(difference, discordant)
        return needed is not None and needed <= n

    low, high = 0.0, 1.0
    if not enough(high):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def power_note(pairs: Paired) -> str:
    """What a test on so few pairs could have missed; empty where it found a difference."""
    if not pairs.n:
        return "no prompt was judged in both columns"
    if mcnemar(pairs.only_before, pairs.only_after)[1] < 0.05:
        return ""
    least = detectable_difference(pairs.n, pairs.discordant)
    if least is None:
        return f"{pairs.n} prompts are too few to show any difference with 80 % power"
    note = (
        f"not significant; with {pairs.n} prompts a difference below "
        f"{percent(least)} points would be missed more often than one time in five"
    )
    needed = needed_pairs(pairs.difference or 0.0, pairs.discordant)
    if needed is not None and needed > pairs.n:
        note += f"; to show the difference seen takes about {needed} prompts"
    return note


@dataclass(frozen=True, slots=True)
class Recovered:
    """The part of what was lost that came back: (after - before) / (aligned - before).

    `share` and `interval` are None where nothing was lost to begin with, or where the loss is
    so small beside the noise that the ratio says nothing.
    """

    aligned: int
    share: float | None
    interval: tuple[float, float] | None


def recovered(
    before: Sequence[bool],
    after: Sequence[bool],
    aligned: Sequence[bool],
    seed: int = 0,
    resamples: int = _RESAMPLES,
) -> Recovered:
    """Recovered share of an outcome over the same prompts in three columns.

    The interval is the 95 % percentile bootstrap over prompts. A resample in which the
    aligned model is not ahead has no meaningful ratio; where more than 2.5 % are so, an end
    of the interval would be arbitrary, and there is none.

    Raises:
        SettingError: the columns differ in length.
    """
    if not len(before) == len(after) == len(aligned):
        raise SettingError("before, after and aligned hold different numbers of prompts")
    lost = sum(aligned) - sum(before)
    if lost <= 0:
        return Recovered(sum(aligned), None, None)
    share = (sum(after) - sum(before)) / lost
    columns = np.array([before, after, aligned], dtype=np.int64)
    cells = np.bincount(columns.T @ (4, 2, 1), minlength=8)
    drawn = np.random.default_rng(seed).multinomial(len(before), cells / len(before), resamples)
    b, a, g = (drawn @ [(cell >> bit) & 1 for cell in range(8)] for bit in (2, 1, 0))
    sound = g > b
    if np.mean(~sound) > 0.025:
        return Recovered(sum(aligned), share, None)
    low, high = np.quantile((a - b)[sound] / (g - b)[sound], (0.025, 0.975))
    return Recovered(sum(aligned), share, (float(low), float(high)))
