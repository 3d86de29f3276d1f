"""Recalibration: the whole of it, on random models."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from adapters import opening_gene, random_adapter
from click.testing import CliRunner
from readings import BEE, FREE, OTHERS, SONG

from safegene_edge.cli import cli
from safegene_edge.converters import convert
from safegene_edge.errors import (
    FileFormatError,
    MismatchError,
    NoEffectError,
    OutputError,
    SettingError,
)
from safegene_edge.gene import SafetyGene
from safegene_edge.merge import merge
from safegene_edge.recalibrate import Bounds, Examples, RecalibrationSettings, fit, recalibrate
from safegene_edge.recalibrate.reading import Reader
from safegene_edge.runtime.llama import SafeLlama

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
