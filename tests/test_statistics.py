"""Intervals against values worked out elsewhere."""

from __future__ import annotations

import pytest

from safegene_edge.errors import SettingError
from safegene_edge.evals.statistics import Count, wilson


@pytest.mark.parametrize(
    ("n", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score interval)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # z² / (n + z²) above and its mirror below
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson_known_values(n: int, total: int, low: float, high: float) -> None:
    assert wilson(n, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_inside_the_unit_interval() -> None:
    for total in range(1, 60):
        for n in range(total + 1):
            low, high = wilson(n, total)
            assert 0 <= low <= n / total <= high <= 1
            assert wilson(total - n, total) == pytest.approx((1 - high, 1 - low))


def test_nothing_counted_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert str(Count(0, 0)) == "0/0"
    assert Count(0, 0).share is None


@pytest.mark.parametrize(("n", "total"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(n: int, total: int) -> None:
    with pytest.raises(SettingError, match="impossible"):
        wilson(n, total)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (Count(3, 96), "3/96 (3.1 %, 1.1–8.8)"),
        (Count(48, 96), "48/96 (50 %, 40–60)"),
        (Count(96, 96), "96/96 (100 %, 96.2–100)"),
        (Count(0, 96), "0/96 (0 %, 0–3.8)"),
    ],
)
def test_rendering(count: Count, shown: str) -> None:
    assert str(count) == shown
