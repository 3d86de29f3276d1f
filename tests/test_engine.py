"""The batched engine against llama.cpp one sequence at a time."""

from __future__ import annotations

import gc
import threading
import weakref

import llama_cpp
import numpy as np
import pytest
from adapters import random_adapter
from child import in_child

from safegene_edge import Engine, SafeLlama
from safegene_edge.errors import LlamaCppError, SettingError

F32 = 0  # ggml's number: a KV cache in float32 leaves only the order of sums to differ


@pytest.fixture(scope="module")
def llama(tiny):
    model = SafeLlama(tiny("llama").gguf_path, n_ctx=512, type_k=F32, type_v=F32)
    yield model
    model.close()


def prompts_of(llama, count=23, seed=3, opening=()):
    """Random token sequences of very different lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, count)
    return [[*opening, *random.integers(0, 290, n).tolist()] for n in lengths]


def one_by_one(llama, prompt, count):
    """Greedy tokens from llama-cpp-python's own loop."""
    llama.clear()
    found = []
    for token in llama.generate(prompt, temp=0.0):
        if llama_cpp.llama_vocab_is_eog(llama._model.vocab, token) or len(found) == count:
            break
        found.append(token)
    return found[:count]


def one_sequence_logits(llama, tokens, positions):
    """Logits at the positions from a one-sequence decode of the whole."""
    llama.clear()
    batch = llama._batch
    batch.set_batch(batch=tokens, n_past=0, logits_all=False)
    for position in range(len(tokens)):
        batch.batch.logits[position] = position in positions
    llama._ctx.decode(batch)
    rows = {}
    for position in positions:
        pointer = llama_cpp.llama_get_logits_ith(llama.ctx, position)
        rows[position] = np.array(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)))
    llama.clear()
    return rows


@pytest.mark.parametrize("opening", [(), tuple(range(40, 60))], ids=["no prefix", "shared prefix"])
@pytest.mark.parametrize(
    "settings",
    [
        {"n_parallel": 1},
        {"n_parallel": 7},
        {"n_parallel": 16, "n_batch": 32},
        {"n_parallel": 5, "n_ctx": 256},
        {"n_parallel": 100},  # llama.cpp aborts the process where outputs < sequences
        {"n_parallel": 16, "flash_attn": True},
    ],
    ids=str,
)
def test_answers_are_those_of_one_by_one(llama, settings, opening):
    prompts = prompts_of(llama, opening=opening)
    expected = [one_by_one(llama, prompt, 12) for prompt in prompts]
    with Engine(llama, **settings) as engine:
        found = engine.generate(prompts, max_tokens=12)
    assert [generation.tokens for generation in found] == expected
    assert {generation.finish for generation in found} <= {"stop", "length"}


def test_on_done_is_called_once_for_each(llama):
    seen = []
    with Engine(llama, n_parallel=4) as engine:
        answers = engine.generate(
            prompts_of(llama), max_tokens=5, on_done=lambda i, answer: seen.append((i, answer))
        )
    assert sorted(index for index, _ in seen) == list(range(len(answers)))
    assert all(answers[index] is answer for index, answer in seen)


def test_a_prompt_that_does_not_fit_is_named(llama):
    with Engine(llama, n_parallel=2, n_ctx=256) as engine:
        answers = engine.generate([[5] * 10, [6] * 300, [7] * 10], max_tokens=4)
    assert [answer.finish == "context" for answer in answers] == [False, True, False]
    assert answers[1].tokens == []


def test_cancelling_keeps_what_is_there(llama):
    cancel = threading.Event()
    with Engine(llama, n_parallel=2) as engine:
        answers = engine.generate(
            [[i + 1] * 5 for i in range(8)],
            max_tokens=6,
            on_done=lambda *_: cancel.set(),
            cancel=cancel,
            stop_at_end=False,
        )
        assert {answer.finish for answer in answers} == {"length", "cancelled"}
        # The engine is fit for the next run.
        assert engine.generate([[3, 4, 5]], max_tokens=2)[0].finish in ("length", "stop")


@pytest.mark.parametrize("opening", [(), tuple(range(40, 60))], ids=["no prefix", "shared prefix"])
def test_logits_are_those_of_one_sequence(llama, opening):
    sequences = prompts_of(llama, opening=opening)
    positions = [
        sorted({len(opening), len(s) // 2 + len(opening) // 2, len(s) - 1}) for s in sequences
    ]
    expected = [one_sequence_logits(llama, s, p) for s, p in zip(sequences, positions, strict=True)]
    for exact, tolerance in ((False, 1e-3), (True, 0.0)):
        worst = 0.0
        seen = set()

        def visit(index, position, row, seen=seen):
            nonlocal worst
            seen.add((index, position))
            worst = max(worst, float(np.abs(row - expected[index][position]).max()))

        with Engine(llama, n_parallel=6, max_outputs=8) as engine:
            engine.visit_logits(sequences, positions, visit, exact=exact)
        assert seen == {(i, p) for i, wanted in enumerate(positions) for p in wanted}
        assert worst <= tolerance


def test_sequences_that_part_late_are_computed_once_up_to_there(llama, monkeypatch):
    openings = [[10 + i] * 9 + list(range(i, 30)) for i in range(8)]
    sequences = [[*opening, *ending] for ending in ([1], [2, 3], [2, 4, 5]) for opening in openings]
    positions = [[len(sequence) - 1] for sequence in sequences]
    expected = [one_sequence_logits(llama, s, p) for s, p in zip(sequences, positions, strict=True)]
    worst, fed = 0.0, 0

    def visit(index, position, row):
        nonlocal worst
        worst = max(worst, float(np.abs(row - expected[index][position]).max()))

    with Engine(llama, n_parallel=4) as engine:
        add = engine._batch.add

        def count(*arguments):
            nonlocal fed
            fed += 1
            add(*arguments)

        monkeypatch.setattr(engine._batch, "add", count)
        engine.visit_logits(sequences, positions, visit)
        assert fed == sum(map(len, openings)) + 8 * (1 + 2 + 2)
        said = engine.generate(sequences, max_tokens=6)
    assert worst <= 1e-3
    assert [answer.tokens for answer in said] == [one_by_one(llama, s, 6) for s in sequences]


def test_scores_are_log_likelihoods(llama):
    prompts, completions = [[1, 2, 3], [9] * 20], [[4, 5], list(range(30, 50))]
    with Engine(llama) as engine:
        scores = engine.score(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        tokens = prompt + completion
        rows = one_sequence_logits(llama, tokens, list(range(len(tokens))))
        for i, token in enumerate(completion):
            row = rows[len(prompt) + i - 1].astype(np.float64)
            truth = row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()
            assert score[i] == pytest.approx(truth, abs=1e-3)


def test_kl_divergence_and_adapters_for_one_run(llama, tiny):
    sequences = prompts_of(llama, count=9)
    positions = [[0, len(s) - 1, len(s) - 1] for s in sequences]
    handle = llama.attach(random_adapter(tiny("llama").gguf_path), scale=0.0)
    try:
        with Engine(llama, n_parallel=4) as engine:
            same = engine.kl_divergence(sequences, positions, reference={}, adapters={handle: 0.0})
            moved = engine.kl_divergence(sequences, positions, reference={}, adapters={handle: 1.0})
        assert max(values.max() for values in same) == 0.0
        base = one_sequence_logits(llama, sequences[0], [len(sequences[0]) - 1])
        llama.set_scale(handle, 1.0)
        after = one_sequence_logits(llama, sequences[0], [len(sequences[0]) - 1])
        (p,), (q,) = base.values(), after.values()
        p, q = (
            row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum()) for row in (p, q)
        )
        truth = float((np.exp(p) * (p - q)).sum())
        assert truth > 0.05
        assert moved[0][1] == moved[0][2] == pytest.approx(truth, rel=1e-2)
    finally:
        llama.detach(handle)


def test_a_run_follows_the_models_adapters_by_default(llama, tiny):
    prompts = prompts_of(llama, count=6)
    with Engine(llama) as engine:

        def tokens(**settings):
            return [answer.tokens for answer in engine.generate(prompts, max_tokens=8, **settings)]

        bare = tokens()
        handle = llama.attach(random_adapter(tiny("llama").gguf_path))
        try:
            with_gene = tokens()
            assert with_gene != bare
            assert tokens(adapters={}) == bare
            assert tokens(adapters={handle: 1.0}) == with_gene
        finally:
            llama.detach(handle)
        assert tokens() == bare


def test_bad_calls_are_refused(llama):
    with pytest.raises(SettingError, match="n_parallel"):
        Engine(llama, n_parallel=0)
    engine = Engine(llama, n_parallel=2, n_ctx=256)
    with pytest.raises(SettingError, match="max_tokens"):
        engine.generate([[1]], max_tokens=0)
    with pytest.raises(SettingError, match="no tokens"):
        engine.generate([[]], max_tokens=1)
    with pytest.raises(SettingError, match="outside"):
        engine.visit_logits([[1, 2]], [[2]], lambda *_: None)
    with pytest.raises(SettingError, match="300 tokens"):
        engine.visit_logits([[1] * 300], [[299]], lambda *_: None)
    engine.close()
    with pytest.raises(LlamaCppError, match="closed"):
        engine.generate([[1]], max_tokens=1)


# -- contexts and their model -------------------------------------------------


def test_a_closed_engine_is_released(llama):
    """The model does not keep it, nor does it keep one that nobody closed."""
    closed, dropped = Engine(llama, n_parallel=2), Engine(llama, n_parallel=2)
    closed.generate([[1, 2]], max_tokens=2)
    dropped.generate([[1, 2]], max_tokens=2)
    closed.close()
    closed.close()
    seen = [weakref.ref(closed), weakref.ref(dropped)]
    del closed, dropped
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert not list(llama._owners)
    with Engine(llama, n_parallel=2) as engine:
        assert engine.generate([[3, 4, 5]], max_tokens=2)[0].finish in ("length", "stop")


def test_an_adapter_in_a_run_stays_and_may_go_afterwards(llama, tiny):
    prompts = prompts_of(llama, count=6)
    refused = []
    with Engine(llama) as engine:
        bare = engine.generate(prompts, max_tokens=8)
        handle = llama.attach(random_adapter(tiny("llama").gguf_path))

        def on_done(*_):
            with pytest.raises(SettingError, match="Wait for its run") as caught:
                llama.detach(handle)
            refused.append(caught)

        with_gene = engine.generate(prompts, max_tokens=8, on_done=on_done)
        assert len(refused) == len(prompts) and with_gene != bare
        llama.detach(handle)  # the context still held it
        assert not engine._adapters
        assert engine.generate(prompts, max_tokens=8) == bare


def test_a_run_cannot_close_its_engine_or_start_another(llama):
    faults = []
    with Engine(llama) as engine:

        def on_done(*_):
            for wrong in (
                engine.close,
                llama.close,
                lambda: engine.generate([[1]], max_tokens=1),
            ):
                with pytest.raises(LlamaCppError) as caught:
                    wrong()
                faults.append(str(caught.value))

        (answer,) = engine.generate([[1, 2, 3]], max_tokens=4, on_done=on_done)
        assert answer.tokens and len(faults) == 3
        assert engine.generate([[1, 2, 3]], max_tokens=4)[0] == answer


CLOSE = """
import threading
from safegene_edge import Engine, SafeLlama
from safegene_edge.errors import SafeGeneError

llama = SafeLlama(model, [gene], n_ctx=256, type_k=0, type_v=0, n_threads=1)
engine, other = Engine(llama, n_ctx=4096), Engine(llama, n_ctx=512)
begun, said = threading.Event(), []

def run():
    try:
        engine.generate([[n] * 5 for n in range(200)], max_tokens=200, stop_at_end=False,
                        on_done=lambda *_: begun.set())
    except SafeGeneError as error:
        said.append(str(error))

thread = threading.Thread(target=run)
thread.start()
assert begun.wait(60)
llama.close()
thread.join(60)
llama.close()
for use in (lambda: engine.generate([[1]], max_tokens=1), lambda: other.score([[1]], [[2]]),
            lambda: Engine(llama), lambda: llama.tokenize(b"x"), lambda: llama.attach(gene)):
    try:
        use()
    except SafeGeneError as error:
        said.append(str(error))
with SafeLlama(model, [gene], n_ctx=256, type_k=0, type_v=0, n_threads=1) as llama:
    with Engine(llama) as engine:
        answer = engine.generate([[1, 2, 3]], max_tokens=20)[0].tokens
print(json.dumps({"said": said, "answer": answer}))
"""


def test_closing_the_model_under_a_run_ends_the_run_first(tiny, tmp_path):
    model, gene = tiny("llama").gguf_path, tmp_path / "gene.gguf"
    random_adapter(model).save(gene)
    found = in_child(CLOSE, model=model, gene=gene)
    during, *after = found["said"]
    assert "closed while it ran" in during
    assert ["engine is closed" in text for text in after] == [True] * 2 + [False] * 3
    assert all("closed" in text for text in after)
    settings = {"n_ctx": 256, "type_k": F32, "type_v": F32, "n_threads": 1}
    with SafeLlama(model, [gene], **settings) as llama, Engine(llama) as engine:
        assert found["answer"] == engine.generate([[1, 2, 3]], max_tokens=20)[0].tokens
    assert not found["stderr"]


FREE = """
import threading, time
import llama_cpp
free, freed, used = llama_cpp.llama_free, threading.Event(), []
set_adapters = llama_cpp.llama_set_adapters_lora

def slow(context):
    llama_cpp.llama_set_adapters_lora = lambda on, *more: (
        used.append(on) if on == context else set_adapters(on, *more))
    time.sleep(0.2)
    free(context)
    freed.set()
    time.sleep(0.2)

llama_cpp.llama_free = slow
from safegene_edge import Engine, SafeLlama

llama = SafeLlama(model, [gene], n_ctx=256, n_threads=1)
(handle,) = llama.adapters
found = []
for wait in (0.1, 0.3):  # before and after the memory has gone
    freed.clear()
    engine = Engine(llama, n_parallel=2, n_ctx=256)
    engine.generate([[1, 5, 6]], max_tokens=1)
    assert handle in engine._adapters
    thread = threading.Thread(target=engine.close)
    thread.start()
    time.sleep(wait)
    if HOW == "detach":
        llama.detach(handle)
        found.append(not used)
        handle = llama.attach(gene, prove=False)
    else:
        llama.close()
        found.append(freed.is_set())  # the context went before its model
        llama_cpp.llama_set_adapters_lora = set_adapters
        llama = SafeLlama(model, [gene], n_ctx=256, n_threads=1)
        (handle,) = llama.adapters
    thread.join()
    llama_cpp.llama_set_adapters_lora = set_adapters
print(json.dumps({"found": found}))
"""


@pytest.mark.parametrize("how", ["detach", "close"])
def test_a_context_that_is_being_freed_is_used_no_more(tiny, tmp_path, how):
    model, gene = tiny("llama").gguf_path, tmp_path / "gene.gguf"
    random_adapter(model).save(gene)
    found = in_child(FREE, model=model, gene=gene, HOW=how)
    assert found["found"] == [True] * 2
    assert not found["stderr"]
