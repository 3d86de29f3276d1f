"""Counts that carry their uncertainty, with nothing but the standard library."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
