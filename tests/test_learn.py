"""Learning by forward passes: the pass that writes back, and the whole of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import random_adapter, with_facts
from tiny import ARCHITECTURES, CHAT_TEMPLATE

from safegene_edge import Engine, SafeLlama, SafetyGene, learn
from safegene_edge.errors import (
    FileFormatError,
    LlamaCppError,
    MismatchError,
    NoEffectError,
    OutputError,
    SettingError,
)
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf
from safegene_edge.learn import LearnSettings, states, teachers
from safegene_edge.learn.base import find_base
from safegene_edge.learn.fit import Fit, Target
from safegene_edge.learn.run import _Learning, plan
from safegene_edge.learn.samples import choose
from safegene_edge.learn.states import Captured, Sample, capture, header_goals
from safegene_edge.prompts import load_prompts
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


def target_of(degraded: Model, aligned: Model, taught: int, own: int = 0) -> Target:
    """So many prompts whose answers are the aligned model's, and so many others."""
    prompts = sequences(taught + own)
    harmful, harmless = prompts[:taught], prompts[taught:]
    theirs, mine = aligned.captured(prompts), degraded.captured(harmless + harmful, text=True)
    headers = {True: degraded.captured(prompts, 0), False: aligned.captured(harmless + harmful, 0)}
    samples = [
        one.sample(n, prompt, taught=is_taught, other=header_goals(headers[is_taught], n))
        for one, asked, is_taught in ((theirs, harmful, True), (mine, harmless, False))
        for n, prompt in enumerate(asked)
    ]
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
    arch: str, tiny: Callable[..., Any], stack: ExitStack, *, taught: bool = True, **more: float
) -> tuple[Any, Any, Any, Any]:
    """States along a target's samples, of A, of D = A + a change, and of D with a gene; header."""
    path = tiny(arch, num_hidden_layers=5).gguf_path
    change = writer_change(path, 0.3)
    aligned, degraded = Model(stack, path), Model(stack, path, change)
    target = target_of(degraded, aligned, 60 * taught, 60 * (not taught))
    settings = LearnSettings(ridge=1e-9, text_weight=1e-10, **more)
    found = Fit([target], settings.for_teacher(itself=False), 64, lanes=2).run(LAYERS)
    wanted, before = (states_along(model, target.samples) for model in (aligned, degraded))
    gene = degraded.llama.attach(SafetyGene(change.architecture, 0.0, found.pairs))
    degraded.scales = {**degraded.scales, gene: 1.0}
    header = np.concatenate([sample.offsets < 0 for sample in target.samples])
    return wanted, before, states_along(degraded, target.samples), header


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_change_of_the_fitted_tensors_is_undone(
    arch: str, tiny: Callable[..., Any], stack: ExitStack
) -> None:
    """At full rank, without a ridge and an overshoot, D's states become A's."""
    wanted, before, after, _ = undone(arch, tiny, stack, overshoot=1.0)
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


# -- what cannot be learnt from -------------------------------------------


def changed(model: Path, folder: Path, **metadata: Any) -> Path:
    """A copy with other metadata; None leaves a key out."""
    return with_facts(model, folder / "changed.gguf", {**metadata, "granite.logit_scale": 1.0})


FEW = LearnSettings(prompts=16, rank=2)


def test_models_of_two_families_are_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    llama = tiny("llama", num_hidden_layers=5).gguf_path
    for other, what in ((tiny("qwen2").gguf_path, "architecture"),
                        (tiny("llama").gguf_path, "shapes")):  # fmt: skip
        with pytest.raises(MismatchError, match=f"{other}.*not of the family.*another {what}"):
            learn([llama], other, settings=FEW)
    tokens = [f"{n}" for n in range(300)]
    other = changed(llama, tmp_path, **{"tokenizer.ggml.tokens": tokens})
    with pytest.raises(MismatchError, match=r"another tokenizer \(token 0 is '0' in place of '"):
        learn([llama], other, settings=FEW)
    tokens = GGUFFile(llama).strings("tokenizer.ggml.tokens")[:-1]
    other = changed(llama, tmp_path, **{"tokenizer.ggml.tokens": [*tokens, "<pad>"]})
    with pytest.raises(MismatchError, match=r"token 299 is '<pad>' in place of '<\|pad\|>'"):
        learn([llama], other, settings=FEW)


def test_a_teacher_must_refuse(tiny: Callable[..., Any]) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(NoEffectError, match=r"refuses only 0 of 16 harmful prompts"):
        learn([path], path, settings=FEW)
    for one in ([path], path, str(path)):
        with pytest.raises(NoEffectError, match=r"hardly moves it: .* 0% without and 0% with"):
            learn(one, settings=FEW)


def test_a_teacher_must_refuse_more_than_the_target(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(NoEffectError, match=r"refuses no more than .*: 100% and 100% of 16"):
        learn([path], path, settings=FEW)


def test_where_a_few_prompts_show_no_loss_all_are_asked(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def share(engine: Engine, tried: Sequence[Any], scales: Any) -> float:
        asked.append(len(tried))
        return 1.0 if len(tried) == teachers.TRIED else 0.9

    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(sys.modules["safegene_edge.learn.run"], "share_refused", share)
    monkeypatch.setattr(_Learning, "with_aligned_facts", lambda self, gene, teacher: gene)
    path = tiny("llama", num_hidden_layers=5).gguf_path
    assert learn([path], path, settings=LearnSettings(prompts=32, rank=2)).layers
    assert asked == [teachers.TRIED, 32]


def test_a_template_that_opens_answers_otherwise_is_refused(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are counted from where an answer begins: another header would shift them."""
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(_Learning, "_require_lost", lambda *_: None)
    path = tiny("llama", num_hidden_layers=5).gguf_path
    for name in ("<|im_start|>model\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "A"):
        template = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", name)
        assert template != CHAT_TEMPLATE
        other = changed(path, tmp_path, **{"tokenizer.chat_template": template})
        with pytest.raises(MismatchError, match="opens an answer otherwise"):
            learn([path], other, settings=FEW)


def test_task_prompts_that_do_not_fit_are_named(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(_Learning, "_require_lost", lambda *_: None)
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(SettingError, match=r"a prompt to learn from needs \d+ .* has 512"):
        learn([path], path, task=["a" * 600], settings=FEW)
    monkeypatch.setattr(sys.modules["safegene_edge.learn.run"], "memory_bytes", lambda: 1 << 20)
    with pytest.raises(SettingError, match=r"take \d+\.\d GiB .* shorter or fewer task prompts"):
        learn([path], path, settings=FEW)


def test_a_base_model_and_a_template_without_system_prompts_are_named(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    base = changed(path, tmp_path, **{"tokenizer.chat_template": None})
    with pytest.raises(SettingError, match="has no chat template: a base model"):
        learn([base], settings=FEW)
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    other = changed(path, tmp_path, **{"tokenizer.chat_template": strict})
    with pytest.raises(SettingError, match="its template takes no system prompt"):
        learn([other], settings=FEW)


def test_a_full_disk_is_named(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(states.tempfile, "TemporaryFile", lambda **_: Full())
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    path = tiny("llama", num_hidden_layers=5).gguf_path
    with pytest.raises(OutputError, match=r"cannot hold the states.*No space left"):
        learn([path], path, settings=FEW)


def test_layers_that_cannot_be_fitted_are_named(tiny: Callable[..., Any]) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    for layers in ((0, 2), (1, 4), (3, 2)):
        with pytest.raises(SettingError, match=r"Give layers from 1 to 3"):
            learn([path], path, settings=LearnSettings(layers=layers))
    with pytest.raises(SettingError, match="no degraded model"):
        learn([], path)


def test_the_budget_bounds_the_rank(tiny: Callable[..., Any]) -> None:
    file = GGUFFile(tiny("llama", num_hidden_layers=5).gguf_path)
    size = sum(info.n_elements for info in file.tensors.values())
    layers, rank = plan(file, LearnSettings())
    assert layers == [1, 2, 3] and 1 < rank < 8
    per_rank = sum(sum(file.tensors[f"blk.{n}.attn_output.weight"].shape) for n in layers)
    assert rank * per_rank <= size / 100 < (rank + 1) * per_rank
    assert plan(file, LearnSettings(rank=5, layers=(2, 2))) == ([2], 5)


def test_the_command_says_it_in_one_line(tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n")
    given = ["learn", "--degraded", str(path), "-o", str(tmp_path / "gene.gguf")]
    for more, said in (
        (["--task", str(prompts)], "holds no prompts"),
        (["--task", str(tmp_path / "none.txt")], "none.txt"),
        (["--aligned", str(tmp_path / "none.gguf")], "none.gguf"),
        (["--prompts", "16"], "hardly moves it"),
    ):
        ran = in_cli(*given, *more)
        assert ran.returncode == 2, ran.stderr
        assert said in ran.stderr.splitlines()[-1] and "Traceback" not in ran.stderr
        assert ran.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "gene.gguf").exists()


def in_cli(*arguments: str) -> Any:
    command = [sys.executable, "-c", "from safegene_edge.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_prompts_are_read_as_lines_or_rows(tmp_path: Path) -> None:
    file = tmp_path / "p"
    file.write_text('Say hello\n\n{"prompt": "Say bye", "form": "imperative"}\n')
    assert [p.text for p in load_prompts(file)] == ["Say hello", "Say bye"]
    for text, said in (
        ('{"prompt": 3}', "line 1 is no prompt"),
        ("{", "line 1"),
        ("\n", "no prompts"),
    ):
        file.write_text(text)
        with pytest.raises(FileFormatError, match=said):
            load_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="UTF-8"):
        load_prompts(file)


def test_the_base_that_a_fine_tune_names_is_found(tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = tiny("llama", num_hidden_layers=5).gguf_path
    folder, key = tmp_path / "models", "general.base_model.0.repo_url"
    folder.mkdir()
    (folder / "broken.gguf").write_bytes(b"no GGUF")
    named = {key: "https://huggingface.co/Somebody/Tiny-Chat_1B"}
    target = GGUFFile(changed(path, tmp_path, **named))
    with pytest.raises(MismatchError, match=r"none of its 0 models is tiny chat 1b"):
        find_base(target, folder)
    for name, kind, file in (("Tiny Chat 1B", 7, "a"), ("Tiny Chat 1B", 0, "b"), ("Else", 0, "c")):
        facts = {"general.name": name, "general.file_type": kind}
        changed(path, folder, **facts).rename(folder / f"{file}.gguf")
    assert find_base(target, folder).name in ("a.gguf", "b.gguf")
    own = changed(path, tmp_path, **named, **{"general.file_type": 0})
    assert find_base(GGUFFile(own), folder) == folder / "b.gguf"
    (folder / "link.gguf").symlink_to(own)  # the target itself, under another name
    itself = GGUFFile(changed(path, tmp_path, **named, **{"general.name": "Tiny Chat 1B"}))
    assert find_base(itself, folder) != folder / "link.gguf"
    (folder / "link.gguf").unlink()
    with pytest.raises(MismatchError, match="does not say what it was made from"):
        find_base(GGUFFile(path), folder)
    with pytest.raises(NoEffectError, match=r"b\.gguf: refuses only 0 of 16"):
        learn([own], folder, settings=FEW)
