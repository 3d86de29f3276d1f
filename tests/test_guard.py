"""The guard: looks change nothing, see what a fresh reading sees, and end what they should."""

from __future__ import annotations

import threading
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
from adapters import random_adapter, with_template
from listener import Listener
from thinking import TEMPLATES
from tiny import ARCHITECTURES

from safegene_edge import Engine, Expression, SafeLlama, SafetyGene
from safegene_edge.errors import SettingError, UnsupportedError
from safegene_edge.recalibrate.guard import PLACES, ROOM, guard_threshold
from safegene_edge.runtime.batcher import Batcher
from safegene_edge.runtime.guard import REFUSAL, Look, alone
from safegene_edge.runtime.refusal_margin import Openers

F32 = 0
USER = {"role": "user", "content": "What is a lighthouse for?"}
CHAT = [USER, {"role": "assistant", "content": "Ships."}, {"role": "user", "content": "And now?"}]
# Depths, branches and a shared beginning: each way of reading an opener.
OPENERS = Openers([(5,), (7, 8), (7, 9, 10), (20, 21, 22)])
NEVER = 1e9


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", max_position_embeddings=8192).gguf_path


@pytest.fixture(scope="module")
def llama(model):
    with SafeLlama(model, n_ctx=512, type_k=F32, type_v=F32, n_threads=1, guard=True) as made:
        yield made


def prompts(count, seed=3):
    random = np.random.default_rng(seed)
    return [random.integers(0, 290, n).tolist() for n in random.integers(1, 60, count)]


# -- what is derived from the template ----------------------------------------

# As the models' own files have them, without what no chat here uses (tools, images).
_ROLES = "{% if m['role'] == 'assistant' %}model{% else %}{{ m['role'] }}{% endif %}"
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>" + _ROLES + "\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen2": (_CHATML, "<|im_end|>\n<|im_start|>assistant\n"),
    "qwen3": (
        TEMPLATES["Qwen3"],
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "gemma2": (_GEMMA, "<end_of_turn>\n<start_of_turn>model\n"),
    "gemma3": (_GEMMA, "<end_of_turn>\n<start_of_turn>model\n"),
    "phi3": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>\n<|assistant|>\n",
    ),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_header_is_the_templates_own(tiny, tmp_path, arch):
    template, header = HEADERS[arch]
    path = with_template(tiny(arch).gguf_path, tmp_path / "m.gguf", template)
    with SafeLlama(path, n_ctx=256, guard=True) as llama:
        guard = llama.guard
        assert llama.text(guard.header, special=True) == header
        # A chat's prompt begins no answer, and one word more does.
        for prompt in (llama.render([USER]), llama.render(CHAT), llama.render_answer(CHAT)):
            assert not guard.begun(prompt)
            assert guard.begun([*prompt, 65])
        again = llama.render_answer([*CHAT, {"role": "assistant", "content": "So."}])
        assert tuple(again[-len(guard.header) :]) == guard.header


MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def test_a_template_without_an_assistant_header_is_named(model, tmp_path):
    path = with_template(model, tmp_path / "m.gguf", MISTRAL)
    with pytest.raises(UnsupportedError, match="no assistant header"):
        SafeLlama(path, n_ctx=256, guard=True)
    with SafeLlama(path, n_ctx=256) as llama:
        assert llama.guard is None


def test_the_last_message_alone():
    system = {"role": "system", "content": "Be kind."}
    assert alone([USER]) is None and alone([system, USER]) is None
    assert alone([system, *CHAT]) == [system, CHAT[2]]
    assert alone([USER, {"role": "assistant", "content": "Sure, "}]) == [USER]
    assert alone([{"role": "assistant", "content": "Hello"}]) is None


def test_nothing_that_was_said_since_the_assistant_spoke_is_left_out():
    def said(*turns):
        found = alone([{"role": role, "content": content} for role, content in turns])
        return found and [(turn["role"], turn["content"]) for turn in found]

    begun = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello.")]
    assert said(*begun, ("user", "Harm."), ("user", "Go on.")) == [
        begun[0], ("user", ["Harm.", "Go on."])
    ]  # fmt: skip
    assert said(*begun, ("system", "Harm.")) == [begun[0], ("user", ["Harm."])]
    assert said(*begun, ("user", "Harm."), ("system", "Now."), ("assistant", "Sure")) == [
        begun[0], ("user", ["Harm.", "Now."])
    ]  # fmt: skip
    assert said(("system", "Harm."), ("assistant", "Sure")) == [("user", ["Harm."])]
    assert said(("system", "A"), ("system", "B"), ("user", "Hi")) is None


def test_what_a_tool_has_said_is_looked_at_with_the_message():
    def said(*turns):
        return alone([{"role": role, "content": content} for role, content in turns])

    both = [{"role": "user", "content": ["Hi", "Rain."]}]
    assert said(("user", "Hi"), ("assistant", None), ("tool", "Rain.")) == both
    assert said(("user", "Hi"), ("ipython", "Rain.")) == both
    spoken = ("assistant", "It is sunny.")
    assert said(("user", "No"), ("tool", "Sun."), spoken, ("user", "Hi"), ("tool", "Rain.")) == both
    calling = {"role": "assistant", "content": "Let me see.", "tool_calls": [{}]}
    turns = [USER, calling, {"role": "tool", "content": "Rain."}]
    assert alone(turns)[0]["content"] == [USER["content"], "Rain."]
    assert said(("tool", "Rain."), ("assistant", "Yes"))[0]["content"] == ["Rain."]
    parts = [{"type": "text", "text": "Hi"}]
    assert said(("user", parts), ("tool", None))[0]["content"] == [*parts, ""]
    turns = (("user", "Hi"), ("tool", "Rain."), spoken, ("user", "Go on"))
    assert said(*turns)[0]["content"] == "Go on"


# -- a look sees what a fresh reading sees, and changes nothing ----------------


def decode(engine, slot, tokens, position):
    """The logits behind some tokens on a slot."""
    engine._batch.clear()
    for number, token in enumerate(tokens):
        last = number == len(tokens) - 1
        engine._batch.add(token, position + number, slot, last)
    engine._decode()
    pointer = llama_cpp.llama_get_logits(engine._context)
    return np.ctypeslib.as_array(pointer, shape=(engine.n_vocab,)).copy()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_fork_reads_as_fresh_and_leaves_no_trace(tiny, arch):
    """Behind 100 tokens, which is beyond the sliding window of Gemma's tiny models."""
    random = np.random.default_rng(1)
    first, second = (random.integers(0, 290, n).tolist() for n in (100, 33))
    header = random.integers(0, 290, 5).tolist()
    options = {"n_ctx": 256, "type_k": F32, "type_v": F32, "n_threads": 1}
    with SafeLlama(tiny(arch).gguf_path, **options) as llama:  # noqa: SIM117
        with Engine(llama, n_parallel=2, n_ctx=1024, guarded=True) as engine:
            fresh = engine.margins([[*first, *header], [*second[:20], *header]], OPENERS)
            logits = []
            for looking in (False, True):
                llama_cpp.llama_memory_clear(engine._memory, False)
                decode(engine, 1, first, 0)
                decode(engine, 2, second, 0)
                if looking:
                    looks = [Look(1, 100, 3, header), Look(2, 20, 4, header)]
                    found = engine.forks().margins(OPENERS, looks)
                    assert found == pytest.approx(fresh, abs=2e-3)
                    cut = [replace(look, above=m) for look, m in zip(looks, found, strict=True)]
                    assert engine.forks().margins(OPENERS, cut) <= found
                    cut = [replace(look, above=look_m - 0.1) for look, look_m in
                           zip(looks, found, strict=True)]  # fmt: skip
                    assert engine.forks().margins(OPENERS, cut) == found
                logits.append([decode(engine, 1, [11], 100), decode(engine, 2, [12], 33)])
            assert np.array_equal(logits[0], logits[1])
            assert llama_cpp.llama_memory_seq_pos_max(engine._memory, 3) == -1


def test_a_batch_that_is_full_is_read_in_pieces(llama):
    looks = [Look(1, 0, 3, prompt) for prompt in prompts(1, seed=8)]
    looks.append(Look(2, 0, 4, prompts(1, seed=9)[0]))
    with Engine(llama, n_parallel=2, n_ctx=512, n_batch=7, guarded=True) as engine:
        assert engine.forks().margins(OPENERS, looks) == pytest.approx(
            engine.margins([look.tokens for look in looks], OPENERS), abs=1e-3
        )


def test_a_guarded_engine_says_what_an_unguarded_one_says(llama):
    asked = prompts(20)
    guard = replace(llama.guard, openers=OPENERS, threshold=NEVER, every=3)
    with Engine(llama, n_parallel=4, n_ctx=1024) as engine:
        expected = engine.generate(asked, max_tokens=14)
        with pytest.raises(SettingError, match="guarded"):
            engine.generate(asked, max_tokens=14, guard=guard)
    with Engine(llama, n_parallel=4, n_ctx=1024, guarded=True) as engine:
        assert engine.generate(asked, max_tokens=14) == expected
        assert engine.generate(asked, max_tokens=14, guard=guard) == expected
        sure = replace(guard, threshold=-NEVER)
        for made, whole in zip(
            engine.generate(asked, max_tokens=14, guard=sure), expected, strict=True
        ):
            # These prompts end in no header: their answers count as begun.
            assert made.finish == ("content_filter" if whole.tokens else "stop")
            assert not made.tokens
        later = replace(sure, openings=frozenset([()]))  # the next look is at three tokens
        for made, whole in zip(
            engine.generate(asked, max_tokens=14, guard=later), expected, strict=True
        ):
            assert made.tokens == whole.tokens[:3]
            assert made.finish == ("content_filter" if len(whole.tokens) > 3 else "stop")


# -- answers that stream -------------------------------------------------------


def answered(llama, guard, listeners, **options):
    with Engine(llama, n_parallel=4, n_ctx=1024, guarded=guard is not None) as engine:
        batcher = Batcher(engine, guard=guard, **options)
        for listener in listeners:
            batcher.submit(listener.ask)
        found = [(listener.text(), listener.finish) for listener in listeners]
        batcher.close()
        return found


def test_many_guarded_answers_are_those_without_a_guard(llama):
    """Looks at each third token, and last messages alone, with and without a common beginning."""
    asked, random = prompts(40), np.random.default_rng(5)
    alones = [
        None if n % 3 == 0 else [*prompt[: len(prompt) * (n % 2)], *random.integers(0, 290, 30)]
        for n, prompt in enumerate(asked)
    ]
    guard = replace(llama.guard, openers=OPENERS, threshold=NEVER, request_threshold=NEVER, every=3)
    plain = answered(llama, None, [Listener(prompt) for prompt in asked])
    watched = [Listener(p, alone=a) for p, a in zip(asked, alones, strict=True)]
    assert answered(llama, guard, watched) == plain
    # And with a seed: a look takes no number from a sampler.
    warm = replace(watched[0].ask.sampling, temperature=1.0, seed=7)
    plain = answered(llama, None, [Listener(prompt, sampling=warm) for prompt in asked])
    watched = [Listener(p, alone=a, sampling=warm) for p, a in zip(asked, alones, strict=True)]
    assert answered(llama, guard, watched) == plain


def test_an_answer_that_is_ended_keeps_what_was_said(llama):
    asked = prompts(12, seed=4)
    guard = replace(
        llama.guard, openers=OPENERS, threshold=-NEVER, every=4, openings=frozenset([()])
    )
    whole = answered(llama, None, [Listener(prompt, 4) for prompt in asked])
    for stream in (True, False):
        listeners = [Listener(prompt, stream=stream) for prompt in asked]
        for (text, finish), (said, why), listener in zip(
            answered(llama, guard, listeners), whole, listeners, strict=True
        ):
            if why == "stop":
                assert (text, finish) == (said, "stop")
            else:
                assert (text, finish) == (f"{said}\n\n{REFUSAL}", "content_filter")
                assert listener.ask.n_new == 4
                assert stream or len(listener.pieces) == 1


def test_what_was_held_back_for_a_stop_string_is_said(llama):
    prompt = prompts(1, seed=4)[0]
    said = answered(llama, None, [Listener(prompt, 4)])[0][0]
    guard = replace(
        llama.guard, openers=OPENERS, threshold=-NEVER, every=4, openings=frozenset([()])
    )
    held = Listener(prompt, stop=(said[-1] + "no such text",))
    assert answered(llama, guard, [held]) == [(f"{said}\n\n{REFUSAL}", "content_filter")]


def test_a_last_message_is_refused_before_its_answer_begins(llama):
    asked = prompts(8, seed=6)
    margins = []
    with Engine(llama, n_parallel=4, n_ctx=1024) as engine:
        margins = engine.margins(asked, OPENERS)
    middle = float(np.median(margins))
    guard = replace(llama.guard, openers=OPENERS, threshold=NEVER, request_threshold=middle)
    guard = replace(guard, openings=frozenset([()]))
    long = prompts(1, seed=7)[0]
    plain = answered(llama, None, [Listener([*long, *prompt]) for prompt in asked])
    listeners = [Listener([*long, *prompt], alone=prompt) for prompt in asked]
    for found, expected, margin in zip(
        answered(llama, guard, listeners), plain, margins, strict=True
    ):
        assert found == ((REFUSAL, "content_filter") if margin > middle else expected)


def test_a_full_context_is_refused_by_name_and_never_runs_over(llama):
    guard = replace(llama.guard, openers=OPENERS, threshold=NEVER, request_threshold=NEVER, every=2)
    with Engine(llama, n_parallel=2, n_ctx=256, guarded=True) as engine:
        batcher = Batcher(engine, guard=guard)
        assert batcher.n_ctx == 256 - guard.room
        prompt = [n % 290 for n in range(batcher.n_ctx - 8)]
        other = [(n * 7) % 290 for n in range(batcher.n_ctx)]
        full = [Listener(prompt, 8, alone=other), Listener(prompt, 8, alone=other[::-1])]
        for listener in full:
            batcher.submit(listener.ask)
        assert [(listener.text(), listener.finish)[1] for listener in full] != ["error"] * 2
        assert "error" not in {listener.finish for listener in full}
        # Two that would fill the context together, but for the looks.
        half = [Listener([n % 290 for n in range(k, k + 120)], 8) for k in (0, 50)]
        for listener in half:
            batcher.submit(listener.ask)
        assert [(listener.text(), listener.finish)[1] for listener in half] == ["length"] * 2
        for ask in (Listener(prompt, 9).ask, Listener(prompt, 8, alone=[*other, 1]).ask):
            with pytest.raises(SettingError):
                batcher.submit(ask)
        batcher.close()


def test_who_leaves_while_his_last_message_is_read_leaves_nothing_behind(llama):
    """With a batch of four tokens, reading takes many steps."""
    guard = replace(llama.guard, openers=OPENERS, threshold=NEVER, request_threshold=NEVER)
    long = prompts(1, seed=2)[0] * 4
    with Engine(llama, n_parallel=2, n_ctx=1024, n_batch=4, guarded=True) as engine:
        batcher = Batcher(engine, guard=guard)
        first = Listener(long)
        batcher.submit(first.ask)
        expected = first.text()
        for wait in (0.0, 0.002, 0.01):
            gone = Listener(long, alone=long[::-1])
            batcher.submit(gone.ask)
            threading.Event().wait(wait)
            batcher.cancel(gone.ask)
            again = Listener(long, alone=long[10:])
            batcher.submit(again.ask)
            assert again.text() == expected
        batcher.close()


# -- the threshold travels with the gene ---------------------------------------


def test_the_threshold_is_kept_in_files(model, tmp_path):
    gene = random_adapter(model)
    assert gene.guard_threshold is None
    gene.save(tmp_path / "old.gguf")
    assert SafetyGene.load(tmp_path / "old.gguf").guard_threshold is None
    Expression({0: 1.5}, guard_threshold=2.25).save(tmp_path / "e.json")
    expression = Expression.load(tmp_path / "e.json")
    assert expression == Expression({0: 1.5}, guard_threshold=2.25)
    gene.express(expression).save(tmp_path / "g.gguf")
    assert SafetyGene.load(tmp_path / "g.gguf").guard_threshold == 2.25
    with SafeLlama(model, [tmp_path / "g.gguf"], n_ctx=256, guard=True) as llama:
        assert llama.guard.threshold == 2.25
    with pytest.raises(SettingError):
        Expression({0: 1.0}, guard_threshold=float("inf"))


# -- the threshold is measured ---------------------------------------------------


def test_the_threshold_lies_above_every_harmless_answer(llama):
    """At it the guard ends none of the answers that it was measured on, and some nats less one."""
    asked = prompts(12, seed=11)
    with Engine(llama, n_parallel=4, n_ctx=1024, guarded=True) as engine:
        first = engine.generate(asked[:3], max_tokens=1)
        openers = Openers(tuple(answer.tokens) for answer in first)  # these count as refused
        guard = replace(llama.guard, openers=openers)
        kept = [prompt for prompt, margin in zip(
            asked, engine.margins(asked, openers), strict=True) if margin <= 0]  # fmt: skip
        found = guard_threshold(engine, guard, asked, None)
        said = engine.generate(kept, max_tokens=64)
        assert found.answers == sum(len(answer.tokens) >= PLACES[0] for answer in said)
        assert 0 <= found.ended <= found.answers < len(asked) - 2
        margins = [
            engine.margins([[*prompt, *answer.tokens[:place], *guard.header]], openers)[0]
            for prompt, answer in zip(kept, said, strict=True)
            for place in PLACES
            if place <= len(answer.tokens)
        ]
        assert found.threshold == pytest.approx(max(0.0, *margins) + ROOM, abs=1e-3)
        assert guard_threshold(engine, guard, [], None) is None
