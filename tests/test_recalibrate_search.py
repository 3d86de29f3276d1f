"""Recalibration: which strengths are read, and which one is taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from readings import FREE, OTHERS, read

from safegene_edge.errors import (
    NoEffectError,
    SettingError,
)
from safegene_edge.gene import SafetyGene
from safegene_edge.recalibrate import Bounds, Examples, RecalibrationSettings, fit
from safegene_edge.recalibrate.aligned import AlignedModel
from safegene_edge.recalibrate.fit import choose
from safegene_edge.recalibrate.reading import Reading
from safegene_edge.recalibrate.search import between, finest, foretold, search
from safegene_edge.runtime.refusal_margin import refusal_loss


def test_the_smallest_objective_within_the_bounds_is_taken():
    found = {0.0: read(-4), 1.0: read(0, kl=0.05), 2.0: read(4, kl=0.5)}
    assert choose(found, FREE, 0.2) == 2.0
    assert choose(found, replace(FREE, kl=0.1), 0.2) == 1.0
    assert choose(found, FREE, 2.0) == 1.0  # 0.5 nats cost more than half of the refusals


def test_every_bound_holds():
    assert FREE.broken(read(0)) == []
    bounds = Bounds(kl=0.1, task_kl=0.2, over_refusal=0.3)
    broken = bounds.broken(read(0, harmless=9, kl=0.11, task=[0.1, 0.5]))
    assert broken == [
        "KL 0.110 above 0.100", "task KL 0.300 above 0.200", "over-refusal 1.000 above 0.300"
    ]  # fmt: skip
    with pytest.raises(NoEffectError, match=r"at 1 .*with KL 0\.110 above 0\.100"):
        choose({0.0: read(-4), 1.0: read(0, kl=0.11)}, bounds, 0.2)


def test_a_refusal_gained_allows_a_little_over_refusal():
    """Three in four refused instead of none, a quarter for each: 0.05 + 0.75 / 4."""
    bounds = replace(FREE, over_refusal=0.05, per_refusal=0.25)
    gained = read([9, 9, 9, -9], harmless=[9, -9, -9, -9])
    assert bounds.most_over(gained) == pytest.approx(0.2375)
    assert bounds.broken(gained) == ["over-refusal 0.250 above 0.237"]
    assert bounds.broken(read(9, harmless=[9, -9, -9, -9])) == []
    assert replace(bounds, own=0.75).most_over(read(-9)) == 0.05  # refusals lost allow no less


def test_the_bound_is_a_standard_error_below_what_other_prompts_shall_keep(tiny):
    """Of four examples and one of the validation, half refused by the aligned model."""
    gene = SafetyGene("llama", 1.0, {}, aligned_loss=0.2, aligned_over_refusal=0.5, aligned_kl=0.3)
    examples = Examples(("a",), ("b", "c", "d", "e"))
    work = fit._Work(gene, examples, OTHERS, None, None, RecalibrationSettings(), None)
    count = 4 + len(OTHERS.harmless)
    most = 0.5 + 0.03 - (0.25 / count) ** 0.5
    assert work._bounds(AlignedModel.of(gene), read(0)) == Bounds(0.3, 0.1, pytest.approx(most))


def test_prompts_that_are_worded_like_harm_have_a_bound_of_their_own():
    """Refusals of these are not paid for by few refusals of plain ones."""
    bounds = replace(FREE, over_refusal=0.5, borderline=0.5)
    plain = replace(read(0, harmless=[9, -9, -9, -9]), borderline=np.array([9.0, -9.0]))
    worded = replace(plain, borderline=np.array([9.0, 9.0]))
    assert bounds.broken(plain) == []
    assert bounds.broken(worded) == [
        "over-refusal of borderline prompts 1.000 above 0.500"
    ]  # fmt: skip
    found = {0.0: replace(plain, borderline=np.array([-9.0, -9.0])), 1.0: worded}
    assert between(found, 0.75).borderline == pytest.approx([4.5, 4.5])


def test_the_bound_of_borderline_prompts_is_the_aligned_models_share():
    """Of the fit's own 34, about half; and what is allowed beyond."""
    shipped = Examples.every_shipped()
    margins = [9.0] * len(shipped.harmful)
    margins += [9.0 if number % 2 else -9.0 for number in range(len(shipped.harmless))]
    gene = SafetyGene("llama", 1.0, {}, aligned_loss=0.1, aligned_over_refusal=0.5,
                      aligned_margins=tuple(margins), aligned_examples=shipped.digest)  # fmt: skip
    aligned, fit_part = AlignedModel.of(gene), Examples.shipped()
    worded = [prompt for prompt in fit_part.harmless if prompt.borderline]
    share = aligned.share_of(worded, None)
    for allowed, own, expected in ((0.03, -9, share + 0.03), (0.1, -9, share + 0.1), (0, 9, 1.0)):
        settings = RecalibrationSettings(over_refusal=allowed)
        work = fit._Work(gene, fit_part, Examples.shipped("validation"), None, None, settings, None)
        without = replace(read(0), borderline=np.full(len(worded), float(own)))
        assert work._bounds(aligned, without).borderline == pytest.approx(expected)


def test_the_validations_borderline_prompts_are_counted_by_themselves():
    shipped, part = Examples.every_shipped(), Examples.shipped("validation")
    worded = np.array([prompt.borderline for prompt in part.harmless])
    margins = (9.0,) * len(shipped.harmful) + (-9.0,) * len(shipped.harmless)
    gene = SafetyGene("llama", 1.0, {}, aligned_loss=0.1, aligned_over_refusal=0.5,
                      aligned_margins=margins, aligned_examples=shipped.digest)  # fmt: skip
    work = fit._Work(gene, Examples.shipped(), part, None, None, RecalibrationSettings(), None)
    own = np.where(np.arange(len(worded)) < 3, 9.0, -9.0)
    limits = work._limits(own, 0.03, AlignedModel.of(gene))
    assert [of.sum() for of, _ in limits] == [len(worded), worded.sum()]
    least = [3, own[worded].tolist().count(9.0)]
    shares = [0.03 * of.sum() for of, _ in limits]
    assert [most for _, most in limits] == pytest.approx(list(map(max, least, shares)))
    none = SafetyGene("llama", 1.0, {})
    assert len(work._limits(own, 0.03, AlignedModel.of(none))) == 1


def test_without_an_aligned_model_the_bound_goes_with_the_refusals_gained(tiny):
    """Five points above its own half, and a quarter of what is refused beyond its own half."""
    work = fit._Work(None, Examples(("a",), ("b",)), OTHERS, None, None,
                     RecalibrationSettings(), None)  # fmt: skip
    found = work._bounds(AlignedModel.of(SafetyGene("llama", 1.0, {})), read(0, harmless=0))
    assert found == Bounds(0.2, 0.1, pytest.approx(0.55), 0.25, pytest.approx(0.5))


def test_a_strength_that_lowers_refusals_is_never_taken():
    with pytest.raises(NoEffectError, match=r"is 1\.000 instead of 0\.500"):
        choose({0.0: read(0), 1.0: read(-9), 2.0: read(-9)}, FREE, 0.2)


def test_between_two_readings_all_is_linear_and_beyond_the_last_goes_on():
    found = {0.0: read(-4, -8, 0, [0.0]), 2.0: read(0, -4, 0.2, [0.4])}
    for strength, values in {1.0: (-2, -6, 0.1, 0.2), 4.0: (4, 0, 0.4, 0.8)}.items():
        middle = between(found, strength)
        every = (middle.harmful, middle.harmless, middle.kl, middle.task_kl)
        assert [float(v[0]) for v in every] == pytest.approx(values)
    for known, reading in found.items():
        assert between(found, known).harmful == pytest.approx(reading.harmful)


def model_of(slopes, harmless=-9.0, bend=0.0):
    """Something to search in: margins that grow with the strength, and fall off behind it."""
    looked = []

    def look(strength: float) -> Reading:
        looked.append(strength)
        slope = np.array(slopes, float)
        margins = -1 + slope * strength - bend * strength**2
        over = np.full(len(slope), harmless) + 2 * strength
        return Reading(margins, over, np.full(len(slope), 0.02 * strength**2), np.zeros(0))

    return look, looked


@pytest.mark.parametrize("kl", [0.005, 0.02, 0.5, 4.0])
def test_the_search_goes_as_far_as_the_bounds(kl):
    """Refusals grow with the strength without end: the KL's bound is what stops it."""
    look, looked = model_of([1.0] * 8)
    found = search(look, look(0.0), replace(FREE, kl=kl), 0.0, 8)
    best = choose(found, replace(FREE, kl=kl), 0.0)
    assert 0.02 * best**2 <= kl
    goal = min((kl / 0.02) ** 0.5, 5.5)  # beyond that all is refused, more or less
    assert best == pytest.approx(goal, rel=0.15) or best > goal
    assert len(looked) <= 9


def test_what_was_nearly_read_is_not_read_again_but_taken():
    """Read at 1.0 and 1.2, where the KL's bound lies at 1.06: linear between the two."""
    look, _ = model_of([1.0] * 8)
    found = {strength: look(strength) for strength in (0.0, 1.0, 1.2)}
    low, high = (float(found[strength].kl.mean()) for strength in (1.0, 1.2))
    bounds = replace(FREE, kl=low + 0.3 * (high - low))
    assert choose(found, bounds, 0.0) == 1.0
    assert finest(found, bounds, 0.0, 1.0) == pytest.approx(1.06, abs=0.002)
    assert finest(found, replace(FREE, kl=-1.0), 0.0, 1.0) == 1.0  # nothing is kept


@pytest.mark.parametrize("bound", [0.1, 0.3, 0.45])
def test_two_or_three_readings_find_where_over_refusals_begin(bound):
    """Margins that go up by strength, less and less: what a line foretells is a little too far."""
    spread = np.linspace(-6, 1, 48)

    def look(strength: float) -> Reading:
        looked.append(strength)
        grown = 4 * strength - 0.5 * strength**2
        return Reading(spread + grown - 1, spread + grown - 4, np.zeros(48), np.zeros(0))

    looked: list[float] = []
    bounds = replace(FREE, over_refusal=bound)
    found = search(look, look(0.0), bounds, 0.05, 4)
    chosen = finest(found, bounds, 0.05, choose(found, bounds, 0.05))
    assert looked[1] == 1.0 and len(looked) <= 4
    assert bound - 0.06 < 1 - refusal_loss(look(chosen).harmless) < bound + 0.01


def test_where_a_reading_breaks_a_bound_the_search_goes_on_below():
    """Over-refusals set in at once, from 0.7 on."""

    def look(strength: float) -> Reading:
        over = np.full(48, -9.0)
        over[1::4] = 30 * (strength - 0.7)
        return Reading(np.full(48, -3.0) + 5 * strength, over, np.full(48, 1e-3), np.zeros(0))

    bounds = replace(FREE, over_refusal=0.2)
    found = search(look, look(0.0), bounds, 0.05, 4)
    assert bounds.broken(found[1.0])  # or it would show nothing
    assert 0.45 < choose(found, bounds, 0.05) < 0.75


def test_nothing_is_read_that_lies_far_beyond_what_keeps_the_bounds():
    """A gene that is right at 1.4 and breaks at 2, where nothing at 1 tells of it."""

    def look(strength: float) -> Reading:
        looked.append(strength)
        broken = strength > 1.9
        harmful = np.full(48, -9.0 if broken else 2 * strength - 3)
        return Reading(harmful, np.full(48, -9.0), np.full(48, 5.0 * broken), np.zeros(0))

    looked: list[float] = []
    found = search(look, look(0.0), FREE, 0.05, 4)
    assert looked[1:3] == [1.0, 1.5] and 1.5 <= choose(found, FREE, 0.05) <= 1.9


@pytest.mark.parametrize("bend", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("kl", [0.001, 0.1, 5.0])
def test_a_search_reads_no_more_than_it_may(kl, bend):
    look, looked = model_of(np.linspace(1, 3, 48), bend=bend)
    search(look, look(0.0), replace(FREE, kl=kl), 0.2, 4)
    assert len(looked) <= 1 + 4


def test_nothing_within_the_bounds_halves_the_strength():
    assert (
        foretold(
            {0.0: read(-4, 9), 1.0: read(0, 9)}, replace(FREE, over_refusal=0.1), 0.2, (0.0, 1.0)
        )
        == 0.5
    )


@pytest.mark.parametrize("change", [{"passes": 100}, {"passes": 0}, {"over_refusal": 1.5},
                                    {"weight": float("nan")}, {"kl_budget": float("inf")},
                                    {"task_budget": 0.0}, {"tokens": 0}, {"n_ctx": 8}])  # fmt: skip
def test_settings_make_sense(change):
    with pytest.raises(SettingError):
        RecalibrationSettings(**change)
