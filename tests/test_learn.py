"""Learning by forward passes: the pass that writes back, and the whole of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import random_adapter
from tiny import ARCHITECTURES

from safegene_edge import Engine, SafeLlama, SafetyGene, learn
from safegene_edge.compat import tokenizer_digest
from safegene_edge.errors import (
    LlamaCppError,
    MismatchError,
    SettingError,
)
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf
from safegene_edge.learn import LearnSettings, teachers
from safegene_edge.learn.fit import Fit, Target
from safegene_edge.learn.run import _Learning
from safegene_edge.learn.samples import choose
from safegene_edge.learn.states import Captured, Sample, capture, header_goals
from safegene_edge.recalibrate.aligned import _reader
from safegene_edge.recalibrate.reading import _Kept
from safegene_edge.runtime import lockstep
from safegene_edge.runtime.lockstep import WRITER, Lane, run

LAYERS = [1, 2, 3]


# -- the pass -------------------------------------------------------------


def sequences(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [
        [7, 8, 9, *map(int, random.integers(10, 200, int(random.integers(8, 20))))]
        for _ in range(count)
    ]


class Model:
    """A tiny model, with an adapter or without."""

    def __init__(self, stack: ExitStack, path: Path, adapter: SafetyGene | None = None) -> None:
        self.stack = stack
        self.llama = stack.enter_context(SafeLlama(str(path), n_ctx=256))
        self.scales = {self.llama.attach(adapter, 1.0): 1.0} if adapter else {}

    def captured(self, prompts: list[list[int]], tokens: int = 3, **more: Any) -> Captured:
        found = capture(
            self.llama, self.scales, prompts, LAYERS, header=3, tokens=tokens, lanes=2, **more
        )
        self.stack.enter_context(found.goals)
        return found


def writer_change(path: Path, size: float, seed: int = 0) -> SafetyGene:
    """A random change of the tensors that a fit may change, and of these layers alone."""
    gene = random_adapter(path, rank=4, size=size, seed=seed, alpha=0.0)
    pairs = {n: p for n, p in gene.pairs.items() if WRITER in n and int(n.split(".")[1]) in LAYERS}
    return SafetyGene(gene.architecture, 0.0, pairs)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def target_of(
    degraded: Model, aligned: Model, taught: int, own: int = 0, *, text: bool = False
) -> Target:
    """So many prompts whose answers (and text) are the aligned model's, and so many others."""
    prompts = sequences(taught + own)
    harmful, harmless = prompts[:taught], prompts[taught:]
    theirs = aligned.captured(prompts, text=text)
    mine = degraded.captured(harmless + harmful, text=True)
    headers = {True: degraded.captured(prompts, 0), False: aligned.captured(harmless + harmful, 0)}
    samples = [
        one.sample(n, prompt, taught=is_taught, other=header_goals(headers[is_taught], n))
        for one, asked, is_taught in ((theirs, harmful, True), (mine, harmless, False))
        for n, prompt in enumerate(asked)
    ]
    if text:  # what all prompts open with would stay as it is
        mine = replace(mine, prefix=0)
    return Target(degraded.llama, degraded.scales, mine, theirs, samples, headers)


def states_along(model: Model, samples: Sequence[Sample]) -> dict[int, Any]:
    """The stream's rows that samples are taught in, sample by sample."""
    texts = [sample.tokens for sample in samples]
    lane, found = Lane(model.llama, texts, model.scales), {}
    rows = [lane.row(n, len(sample.prompt) + int(offset))
            for n, sample in enumerate(samples) for offset in sample.offsets]  # fmt: skip

    def visit(layer: int, lanes: list[Any]) -> None:
        found[layer] = lanes[0].stream[rows]

    run([lane], LAYERS, visit)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_answers_and_states_are_those_of_a_plain_pass(
    arch: str, tiny: Callable[..., Any], stack: ExitStack
) -> None:
    path = tiny(arch, num_hidden_layers=5).gguf_path
    model, prompts = Model(stack, path, writer_change(path, 0.3)), sequences(20)
    found = model.captured(prompts, look=5, text=True)
    with Engine(model.llama, n_parallel=4, flash_attn=True) as engine:
        said = engine.generate(prompts, max_tokens=5, adapters=model.scales)
    own = [one.tokens for one in said]
    same = [a[: len(b)] == b for a, b in zip(found.answers, own, strict=True)]
    assert np.mean(same) > 0.8  # ties of a random model fall either way
    samples = [found.sample(n, prompt, taught=True) for n, prompt in enumerate(prompts)]
    assert all(len(sample.answer) <= 3 for sample in samples)
    places = np.concatenate([sample.goals for sample in samples])
    for layer, rows in states_along(model, samples).items():
        kept = found.goals.get(layer, places)[:, :-1]
        assert np.abs(kept - rows).max() < 1e-2 * np.abs(rows).max()


def undone(
    arch: str,
    tiny: Callable[..., Any],
    stack: ExitStack,
    *,
    taught: bool = True,
    text: bool = False,
    text_weight: float = 1e-10,
    **more: float,
) -> tuple[Any, Any, Any, Any]:
    """States along a target's samples, of A, of D = A + a change, and of D with a gene; header."""
    path = tiny(arch, num_hidden_layers=5).gguf_path
    change = writer_change(path, 0.3)
    aligned, degraded = Model(stack, path), Model(stack, path, change)
    target = target_of(degraded, aligned, 60 * taught, 60 * (not taught), text=text)
    settings = LearnSettings(ridge=1e-9, text_weight=text_weight, **more)
    found = Fit([target], settings.for_teacher(itself=False), 64, lanes=2).run(LAYERS)
    wanted, before = (states_along(model, target.samples) for model in (aligned, degraded))
    gene = degraded.llama.attach(SafetyGene(change.architecture, 0.0, found.pairs))
    degraded.scales = {**degraded.scales, gene: 1.0}
    header = np.concatenate([sample.offsets < 0 for sample in target.samples])
    return wanted, before, states_along(degraded, target.samples), header


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_change_of_the_fitted_tensors_is_undone(
    arch: str, text: bool, tiny: Callable[..., Any], stack: ExitStack
) -> None:
    """At full rank, without a ridge and an overshoot, D's states become A's, the text's as well."""
    weight = 1.0 if text else 1e-10
    wanted, before, after, _ = undone(
        arch, tiny, stack, text=text, text_weight=weight, overshoot=1.0
    )
    for layer, goal in wanted.items():
        distance = [
            float(np.linalg.norm(one[layer] - goal) / np.linalg.norm(goal))
            for one in (before, after)
        ]
        assert distance[0] > 1e-2
        assert distance[1] < 1e-3, f"layer {layer}: {distance}"


NO_NORM = ["llama", "qwen3"]  # a norm behind attn_output, as Gemma's, bounds how far an update goes


def gone(arch: str, tiny: Callable[..., Any], stack: ExitStack, **more: Any) -> Iterator[float]:
    """How far the header's states went, layer by layer: 0 are D's own, 1 are A's."""
    wanted, before, after, header = undone(arch, tiny, stack, **more)
    for layer, there in wanted.items():
        way = (there - before[layer])[header]
        yield float(((after[layer] - before[layer])[header] * way).sum() / (way * way).sum())


def test_text_that_the_teacher_read_otherwise_is_left_out(
    tiny: Callable[..., Any], stack: ExitStack
) -> None:
    """Behind another system prompt the text's states are others; what decides is still there."""
    model, prompts = Model(stack, tiny("llama", num_hidden_layers=5).gguf_path), sequences(4)
    found = model.captured(prompts, text=True)
    for number, prompt in enumerate(prompts):
        same = found.sample(number, prompt, taught=True)
        other = found.sample(number, [5, 6, *prompt], taught=True)
        assert same.text > 0 and other.text == 0
        assert other.offsets.tolist() == same.offsets[same.text :].tolist()
        assert other.goals.tolist() == same.goals[same.text :].tolist()


@pytest.mark.parametrize("arch", NO_NORM)
def test_the_header_goes_beyond_the_teacher_where_asked(
    arch: str, tiny: Callable[..., Any], stack: ExitStack
) -> None:
    """By no exact amount: the answers' rows, which one map serves as well, shall not."""
    assert all(0.99 < share < 1.01 for share in gone(arch, tiny, stack, overshoot=1.0))
    assert all(1.5 < share < 3 for share in gone(arch, tiny, stack, overshoot=3.0))


@pytest.mark.parametrize("arch", NO_NORM)
def test_harmless_headers_go_away_from_the_teacher_where_asked(
    arch: str, tiny: Callable[..., Any], stack: ExitStack
) -> None:
    assert all(abs(share) < 0.01 for share in gone(arch, tiny, stack, taught=False))
    found = gone(arch, tiny, stack, taught=False, contrast=1.0)
    assert all(-1.5 < share < -0.4 for share in found)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_written_back_is_what_the_gene_does(
    arch: str, tiny: Callable[..., Any], stack: ExitStack, tmp_path: Path
) -> None:
    path, file = tiny(arch, num_hidden_layers=5).gguf_path, tmp_path / "gene.gguf"
    change = writer_change(path, 0.3)
    degraded = Model(stack, path, change)
    target = target_of(degraded, Model(stack, path), 30, 30)
    fit = Fit([target], LearnSettings().for_teacher(itself=False), 4, lanes=2, outputs=True)
    plain = run(fit.lanes, [1], lambda *_: None)
    written = fit.run(LAYERS).logits
    SafetyGene(change.architecture, 0.0, fit.pairs).save(file)
    handle = degraded.llama.attach(file)
    for lane in fit.lanes:
        lane.scales = {**degraded.scales, handle: 1.0}
    attached = run(fit.lanes, [1], lambda *_: None)
    for one, two, three in zip(plain, written, attached, strict=True):
        assert np.abs(two - one).max() > 1e-2
        assert np.abs(two - three).max() < 1e-3


def test_a_layer_without_the_node_is_named(
    tiny: Callable[..., Any], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "_BELOW", "elsewhere-{}")
    model = Model(stack, tiny("llama", num_hidden_layers=5).gguf_path)
    lane = Lane(model.llama, sequences(3), {})
    with pytest.raises(LlamaCppError, match=r"in layer 1 no node adds what attn_output"):
        run([lane, Lane(model.llama, sequences(3), {})], LAYERS, lambda *_: None)
    with pytest.raises(LlamaCppError, match=r"in layer 1 no node"):
        model.captured(sequences(3))


def test_a_scaled_residual_is_refused(
    tiny: Callable[..., Any], stack: ExitStack, tmp_path: Path
) -> None:
    """Granite scales what a layer adds: an update would be worth less than the fit takes it for."""
    file = GGUFFile(tiny("llama", num_hidden_layers=5).gguf_path)
    facts = {key.replace("llama.", "granite."): value.values() if isinstance(value, ArrayValue)
             else value for key, value in file.metadata.items()}  # fmt: skip
    facts |= {"granite.logit_scale": 1.0}
    del facts["general.architecture"]
    tensors = [(name, np.array(file.floats(name))) for name in file.tensors]
    for scale in (0.0, 0.5):  # 0: none
        path = tmp_path / f"{scale}.gguf"
        write_gguf(path, "granite", {**facts, "granite.residual_scale": scale}, tensors)
        lanes = [Lane(Model(stack, path).llama, sequences(3), {})]
        if not scale:
            run(lanes, LAYERS, lambda *_: None)
            continue
        with pytest.raises(LlamaCppError, match=r"in layer 1 .* goes through SCALE before it is"):
            run(lanes, LAYERS, lambda *_: None)


def test_ctrl_c_waits_for_the_lanes(tiny: Callable[..., Any], stack: ExitStack) -> None:
    """CPython 3.11 takes a thread for ended where its join was interrupted."""
    model = Model(stack, tiny("llama", num_hidden_layers=5).gguf_path)
    seen: list[int] = []

    def interrupts(layer: int, _: list[Any]) -> None:
        if not seen:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        seen.append(layer)

    with pytest.raises(KeyboardInterrupt):
        run([Lane(model.llama, sequences(3), {})], LAYERS, interrupts)
    assert seen
    model.llama.close()  # else: "a gene is being learnt from the model"


def test_an_error_of_the_visitor_ends_all_lanes(tiny: Callable[..., Any], stack: ExitStack) -> None:
    model = Model(stack, tiny("llama", num_hidden_layers=5).gguf_path)

    def fails(layer: int, lanes: list[Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([Lane(model.llama, sequences(3), {}) for _ in range(3)], LAYERS, fails)


# -- the whole of it ------------------------------------------------------


@pytest.fixture
def everything_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's words are no refusals: what learning does with some is looked at here."""
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(_Learning, "_require_lost", lambda *_: None)


def facts_of(gene: SafetyGene) -> dict[str, Any]:
    return {key.removeprefix("safegene.learn."): value for key, value in gene.extra.items()}


def test_more_prompts_than_there_are_are_refused(tiny: Callable[..., Any]) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(
        SettingError, match=r"1000 prompts of a kind .* Give at most (\d+)"
    ) as found:
        learn(path, path, settings=LearnSettings(prompts=1000))
    most = int(found.value.remedy.split()[-1])
    chosen = choose(most, 0.2)
    assert len(chosen.harmful) == len(chosen.harmless) == most > 300
    with pytest.raises(SettingError):
        choose(most + 1, 0.2)


@pytest.mark.usefixtures("everything_refuses")
def test_learn_gives_a_gene_that_a_stock_loader_takes(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    path, file = tiny("llama", num_hidden_layers=5).gguf_path, tmp_path / "gene.gguf"
    task = tmp_path / "degraded.gguf"
    writer_change(path, 0.3).save(task)
    seen: list[str] = []
    made = LearnSettings(prompts=20, rank=2)
    gene = learn(
        [[path, task]], path, task=["One two three"], family="tiny", settings=made,
        progress=lambda what, *_: seen.append(what),
    )  # fmt: skip
    gene.save(file)
    again = SafetyGene.load(file)
    assert again.sha256 == gene.sha256 and again.layers == (1, 2, 3)
    assert again.family == "tiny" and set(again.sources) == {"aligned", "degraded", "degraded+1"}
    assert again.refusal_openers and again.aligned_margins and again.aligned_kl > 0
    known = facts_of(again)
    assert known["teacher"] == "aligned" and known["refused"] == known["asked"] == 20
    assert known["harmless"] == 20 + 20 // 4 + 1
    assert "fitting" in seen and seen[-1] == "measuring the aligned model"
    with SafeLlama(str(path), n_ctx=256) as llama:
        llama.attach(file)  # which proves that the logits moved
    learn([[path, task]], path, task=["One two three"], settings=made).save(tmp_path / "b.gguf")
    assert SafetyGene.load(tmp_path / "b.gguf").sha256 == gene.sha256


def with_added_token(
    model: Path, output: Path, size: float, token: str = "<|added|>", kind: int = 3
) -> Path:
    """A fine-tune that has a token more, as one to pad with, and says it as often as size asks.

    Args:
        kind: 3, a control token; 4, one that is found in text.
    """
    file = GGUFFile(model)
    facts = {
        key: value.values() if isinstance(value, ArrayValue) else value
        for key, value in file.metadata.items()
        if key != "general.architecture"
    }
    facts["tokenizer.ggml.tokens"] = [*facts["tokenizer.ggml.tokens"], token]
    facts["tokenizer.ggml.token_type"] = [*facts["tokenizer.ggml.token_type"], kind]
    facts["llama.vocab_size"] = len(facts["tokenizer.ggml.tokens"])
    tensors = {name: np.array(file.floats(name)) for name in file.tensors}
    row = np.random.default_rng(0).normal(size=(1, tensors["output.weight"].shape[1]))
    for name, times in (("token_embd.weight", 0.0), ("output.weight", size)):
        tensors[name] = np.concatenate([tensors[name], (times * row).astype(np.float32)])
    write_gguf(output, file.architecture, facts, tensors.items())
    return output


@pytest.mark.usefixtures("everything_refuses")
@pytest.mark.parametrize("longer", ["degraded", "aligned"])
def test_a_fine_tune_may_have_added_a_token(
    longer: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, task = tiny("llama", num_hidden_layers=5).gguf_path, tmp_path / "task.gguf"
    writer_change(path, 0.3).save(task)
    loud = longer == "degraded"
    added = with_added_token(path, tmp_path / "added.gguf", 5.0 * loud)
    said: list[bool] = []
    take = _Kept.take

    def watched(self: _Kept, answers: Sequence[list[int]], n_vocab: int) -> None:
        take(self, answers, n_vocab)
        said.append(any(max(answer, default=0) >= n_vocab for answer in answers))

    monkeypatch.setattr(_Kept, "take", watched)
    model, teacher = (added, path) if loud else (path, added)
    gene = learn([[model, task]], teacher, settings=LearnSettings(prompts=16, rank=2))
    assert np.isfinite(gene.aligned_kl) and said == [loud]
    assert gene.tokenizer == tokenizer_digest(GGUFFile(path)) == tokenizer_digest(GGUFFile(added))


@pytest.mark.usefixtures("everything_refuses")
def test_a_teacher_may_not_say_what_the_target_lacks(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    teacher = with_added_token(path, tmp_path / "added.gguf", 5.0)
    with pytest.raises(MismatchError, match=r"lacks the token 300, which the aligned model's"):
        learn([path], teacher, settings=LearnSettings(prompts=16, rank=2))


@pytest.mark.parametrize("loud", ["one", "other"])
def test_an_added_token_is_no_difference(
    loud: str, tiny: Callable[..., Any], tmp_path: Path, stack: ExitStack
) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    gene = replace(writer_change(path, 0.3), refusal_openers=("I cannot",))
    added = with_added_token(path, tmp_path / "added.gguf", 1.0)
    files = [added, path] if loud == "one" else [path, added]
    one, other = (_reader(stack, gene, [file], 4) for file in files)
    found = one.kl_to(other)
    assert len(found) and found.max() < 1e-4


def test_prompts_with_an_added_token_are_not_compared(
    tiny: Callable[..., Any], tmp_path: Path, stack: ExitStack
) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    gene = replace(writer_change(path, 0.3), refusal_openers=("I cannot",))
    for number, word in enumerate(["you", "user"]):  # in some prompts, in all
        added = with_added_token(path, tmp_path / f"{number}.gguf", 0.0, word, 4)
        one, other = (_reader(stack, gene, [file], 4) for file in (added, path))
        count, left = len(one.asked.harmless[::4]), len(one.kl_to(other))
        assert (0 < left < count) if number == 0 else left == 0
        assert len(other.kl_to(one)) == count


@pytest.mark.usefixtures("everything_refuses")
def test_headers_are_compared_on_the_same_prompts(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a contrast, the teacher's header of each harmless prompt that the target reads."""
    path, task = tiny("llama", num_hidden_layers=5).gguf_path, tmp_path / "task.gguf"
    writer_change(path, 0.3).save(task)
    seen: list[Target] = []
    make = _Learning._target

    def watched(self: _Learning, *given: Any) -> Target:
        seen.append(make(self, *given))
        return seen[-1]

    monkeypatch.setattr(_Learning, "_target", watched)
    made = LearnSettings(prompts=16, rank=2, contrast=1.0)
    learn([[path, task]], path, task=["One two three"], settings=made)
    target = seen[0]
    header = target.headers[False]
    assert header is not None
    own = [sample.prompt for sample in target.samples if not sample.taught][: len(header.prompts)]
    assert [list(one) for one in own] == [list(one) for one in header.prompts]


def test_reading_says_how_far_it_is(stack, tiny):
    told: list[tuple[int, int]] = []
    model = Model(stack, tiny("llama", num_hidden_layers=5).gguf_path)
    model.captured([[1, 5, 6, 7 + n] for n in range(4)], tell=lambda *step: told.append(step))
    total = told[0][1]
    assert told[0] == (0, total) and told[-1] == (total, total) and total > len(LAYERS)
    assert told == sorted(told) and {step[1] for step in told} == {total}
