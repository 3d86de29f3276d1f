"""How far two raters agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters beyond chance: (p_o - p_e) / (1 - p_e).

    J. Cohen, Educational and Psychological Measurement 20:37-46, 1960. None where both always
    give the same single label (p_e = 1), or none.
    """
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    n, one, other = len(first), Counter(first), Counter(second)
    chance = sum(one[label] * other[label] for label in one)
    return None if n * n == chance else (n * agreed - chance) / (n * n - chance)
