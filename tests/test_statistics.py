"""Intervals against values worked out elsewhere."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from safegene_edge.errors import SettingError
from safegene_edge.evals.statistics import (
    Count,
    Paired,
    detectable_difference,
    mcnemar,
    needed_pairs,
    power_note,
    recovered,
    wilson,
)


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


# -- pairs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "c", "exact", "mid"),
    [
        # Fagerland, Lydersen, Laake 2013: airway hyper-responsiveness, b = 1, c = 7
        (1, 7, 18 / 256, 10 / 256),
        (7, 1, 18 / 256, 10 / 256),
        (0, 5, 2 / 32, 1 / 32),
        (3, 3, 1.0, 1.0),
        (0, 0, 1.0, 1.0),
        (1, 2, 1.0, 8 / 8 - 3 / 8),
    ],
)
def test_mcnemar_by_hand(b: int, c: int, exact: float, mid: float) -> None:
    assert mcnemar(b, c) == pytest.approx((exact, mid))


def test_mcnemar_against_every_outcome_counted() -> None:
    """The exact p is the share of the 2^n sign patterns at least as one-sided as the one seen."""
    for b, c in product(range(5), range(5)):
        n, least = b + c, min(b, c)
        patterns = [sum(signs) for signs in product((0, 1), repeat=n)]
        as_far = sum(min(k, n - k) <= least for k in patterns)
        assert mcnemar(b, c)[0] == pytest.approx(as_far / 2**n)


def test_mcnemar_stands_thousands_of_pairs() -> None:
    exact, mid = mcnemar(1400, 1600)
    z = 199 / math.sqrt(3000)  # normal approximation with continuity correction
    assert exact == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mid < exact
    assert mcnemar(0, 3000)[0] == 0.0  # below the least float, not an overflow


def test_pairs_are_counted_by_direction() -> None:
    pairs = Paired.of([True, True, False, False, False], [True, False, True, True, False])
    assert pairs == Paired(n=5, before=2, after=3, only_before=1, only_after=2)
    assert pairs.difference == pytest.approx(0.2)
    with pytest.raises(SettingError):
        Paired.of([True], [])


def test_the_bounds_of_a_difference_are_where_the_score_test_rejects() -> None:
    """Tango's formula, written anew: lost 12, gained 2 of 50."""
    low, high = Paired(50, 48, 38, 12, 2).interval()
    for change in (low, high):
        a, b = 100.0, -14 + (100 - 2 + 12) * change
        share = (math.sqrt(b * b + 4 * a * 12 * change * (1 - change)) - b) / (2 * a)
        score = (2 - 12 - 50 * change) / math.sqrt(50 * (2 * share + change * (1 - change)))
        assert abs(score) == pytest.approx(1.959964, abs=1e-6)
    assert low < -0.2 < high


def test_an_interval_of_a_difference_covers() -> None:
    """Of 2,000 samples of 60 pairs, at most 5 % and a half miss the true change."""
    random, missed = np.random.default_rng(7), 0
    for lost, gained in random.multinomial(60, (0.05, 0.0, 0.95), 2000)[:, :2]:
        both = 50 - lost
        low, high = Paired(60, both + lost, both + gained, lost, gained).interval()
        missed += not low <= -0.05 <= high
    assert missed <= 110


def test_a_loss_never_narrows_the_interval_past_none() -> None:
    """One refusal lost of a hundred is not better than none lost."""
    none, one = Paired(100, 90, 90, 0, 0), Paired(100, 90, 89, 1, 0)
    assert one.interval()[0] < none.interval()[0] < 0
    assert Paired(30, 30, 0, 30, 0).interval()[1] > -1


def test_no_difference_is_no_certainty() -> None:
    same = Paired.of([True, False] * 10, [True, False] * 10)
    assert same.interval() == pytest.approx((-0.1611, 0.1611), abs=5e-5)
    assert Paired(0, 0, 0, 0, 0).interval() == (-1.0, 1.0)


def test_connor_by_hand() -> None:
    # psi = 0.3, delta = 0.2: (1.95996 * 0.547723 + 0.841621 * sqrt(0.26))^2 / 0.04 = 56.47
    assert needed_pairs(0.2, 0.3) == 57 == needed_pairs(-0.2, 0.3)
    assert needed_pairs(0.2, 0.1) == needed_pairs(0.2, 0.2)  # a difference needs that many
    assert needed_pairs(0.0, 0.3) is None


def test_the_detectable_difference_is_the_needed_number_turned_round() -> None:
    for n, discordant in ((57, 0.3), (200, 0.1), (30, 0.0)):
        least = detectable_difference(n, discordant)
        assert least is not None
        assert needed_pairs(least, discordant) == n
    assert detectable_difference(3, 1.0) is None


def test_power_is_what_connor_promises() -> None:
    """57 pairs of the case above: the plain McNemar test finds the difference four times in five"""
    drawn = np.random.default_rng(3).multinomial(57, [0.05, 0.70, 0.25], 4000)
    found = (drawn[:, 2] - drawn[:, 0]) ** 2 / (drawn[:, 2] + drawn[:, 0]) > 1.96**2
    assert found.mean() == pytest.approx(0.8, abs=0.05)


def test_power_notes() -> None:
    assert power_note(Paired(60, 10, 50, 0, 40)) == ""
    assert "too few" in power_note(Paired(3, 1, 2, 0, 1))
    note = power_note(Paired(40, 10, 12, 2, 4))
    assert note.startswith("not significant; with 40 prompts")
    assert f"about {needed_pairs(0.05, 0.15)} prompts" in note
    assert "no prompt" in power_note(Paired(0, 0, 0, 0, 0))


def test_recovered_by_hand() -> None:
    n = 100
    before = [i < 30 for i in range(n)]
    after = [i < 60 for i in range(n)]
    aligned = [i < 70 for i in range(n)]
    found = recovered(before, after, aligned)
    assert (found.aligned, found.share) == (70, pytest.approx(0.75))
    assert found.interval is not None
    # the ratio is Bin(40, 3/4) / 40 given 40 lost: 1.96 * sqrt(.75 * .25 / 40) = 0.134
    assert found.interval == pytest.approx((0.75 - 0.134, 0.75 + 0.134), abs=0.03)
    assert found == recovered(before, after, aligned)


def test_recovered_says_nothing_where_nothing_was_lost() -> None:
    assert recovered([True], [True], [True]).share is None
    assert recovered([True, True], [True, True], [True, False]).share is None
    noisy = recovered([True] * 9 + [False], [True] * 10, [False] + [True] * 9 + [])
    assert noisy.share is None
    one = recovered([False] + [True] * 5, [True] * 6, [True] * 6)
    assert (one.share, one.interval) == (1.0, None)  # a third of the resamples miss that one
    with pytest.raises(SettingError):
        recovered([True], [True], [])
