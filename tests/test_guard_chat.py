"""The guard in chats: a `SafeLlama`'s own context, the server, and attacks."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import jsonschema
import pytest
from adapters import random_adapter
from listener import Listener
from serving import running
from test_guard import CHAT, F32, NEVER, OPENERS, USER, answered, model, prompts
from thinking import TEMPLATES, speaking

from safegene_edge import Engine, SafeLlama
from safegene_edge.errors import SettingError, UnsupportedError
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.asking.suites import Suite
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.report.html import render_html
from safegene_edge.evals.report.markdown import render_markdown
from safegene_edge.evals.report.schema import report_schema
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.prompts import Prompt
from safegene_edge.runtime.guard import EVERY, REFUSAL, Guard
from safegene_edge.runtime.refusal_margin import Openers

__all__ = ["model"]  # a fixture

SAID = ("Sure", " thing")


@pytest.fixture(scope="module")
def speaker(tiny, tmp_path_factory):
    """A model that says "Sure thing thing …" without end, whatever it is asked."""
    path = tmp_path_factory.mktemp("speaker") / "m.gguf"
    return speaking(tiny("llama").gguf_path, path, TEMPLATES["none"], *SAID, loop=True)


@pytest.fixture(scope="module")
def sure(speaker, tmp_path_factory):
    """A gene whose refusals open with "Sure": the guard ends all that the speaker says."""
    path = tmp_path_factory.mktemp("sure") / "gene.gguf"
    random_adapter(speaker, size=1e-3, refusal_openers=("Sure",)).save(path)
    return path


@pytest.fixture(scope="module")
def thing(speaker, tmp_path_factory):
    """One whose openers the speaker's answers never open with."""
    path = tmp_path_factory.mktemp("thing") / "gene.gguf"
    random_adapter(speaker, size=1e-3, refusal_openers=(" thing",)).save(path)
    return path


def chunks(llama, messages, **options):
    """(text, finish reason) of a streamed answer."""
    made = list(llama.create_chat_completion(messages, stream=True, **options))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in made)
    return text, made[-1]["choices"][0]["finish_reason"]


def whole(llama, messages, **options):
    choice = llama.create_chat_completion(messages, **options)["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


ENDED = f"Sure{' thing' * (EVERY - 1)}\n\n{REFUSAL}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_text_whatever_tool_was_to_be_called(speaker, sure, stream):
    """llama-cpp-python would hand it over as the arguments of a call."""
    forced = {
        "tools": [{"type": "function", "function": {"name": "x", "parameters": {}}}],
        "tool_choice": {"type": "function", "function": {"name": "x"}},
    }
    with SafeLlama(speaker, [sure], n_ctx=512, guard=True) as llama:
        made = llama.create_chat_completion(CHAT, stream=stream, max_tokens=20, **forced)
        choices = [chunk["choices"][0] for chunk in (made if stream else [made])]
        said = [choice["delta" if stream else "message"] for choice in choices]
    assert "".join(one.get("content") or "" for one in said) == REFUSAL
    assert not any(one.get("tool_calls") for one in said)
    assert choices[-1]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("ask", [whole, chunks])
def test_the_models_own_answers_are_ended(speaker, sure, thing, ask):
    with SafeLlama(speaker, [sure], n_ctx=512, guard=True) as llama:
        assert ask(llama, [USER], max_tokens=200) == (ENDED, "content_filter")
        assert ask(llama, [USER], max_tokens=EVERY) == (f"Sure{' thing' * (EVERY - 1)}", "length")
        # The last message alone: with a history it is refused before an answer.
        assert ask(llama, CHAT, max_tokens=200) == (REFUSAL, "content_filter")
        assert ask(llama, [USER], max_tokens=8) == (f"Sure{' thing' * 7}", "length")
        llama.set_scale(sure, 0.0)  # the gene is off, and so is its guard
        assert llama.guard is None
        assert ask(llama, CHAT, max_tokens=4) == (f"Sure{' thing' * 3}", "length")
    with SafeLlama(speaker, [thing], n_ctx=512, guard=True) as llama:
        assert ask(llama, CHAT, max_tokens=200) == (f"Sure{' thing' * 199}", "length")
        other = llama.attach(random_adapter(speaker, size=1e-3, seed=1))  # a task's, no gene
        assert llama.guard.openers.all == Openers.of(llama, [" thing"]).all
        llama.set_scale(thing, 0.0)
        assert llama.guard is None and other.scale
    with SafeLlama(speaker, [sure], n_ctx=512) as llama:
        assert ask(llama, CHAT, max_tokens=200) == (f"Sure{' thing' * 199}", "length")


def test_an_answer_that_ends_by_itself_is_not_ended(tiny, tmp_path):
    path = speaking(tiny("llama").gguf_path, tmp_path / "m.gguf", TEMPLATES["none"], *SAID)
    with SafeLlama(path, n_ctx=512, guard=True) as llama:
        sure = Openers.of(llama, ["Sure"])
        guard = replace(llama.guard, openers=sure, every=2)
        llama._made_guard = None, guard
        assert chunks(llama, [USER]) == whole(llama, [USER]) == ("Sure thing", "stop")
        prompt = llama.render([USER])
        assert answered(llama, guard, [Listener(prompt)]) == [("Sure thing", "stop")]
        with Engine(llama, n_parallel=2, n_ctx=512, guarded=True) as engine:
            made = engine.generate([prompt], max_tokens=8, guard=guard)[0]
            assert (llama.text(made.tokens), made.finish) == ("Sure thing", "stop")
        early = replace(guard, every=1)
        assert answered(llama, early, [Listener(prompt)]) == [
            (f"Sure\n\n{REFUSAL}", "content_filter")
        ]


def test_a_begun_answer_is_looked_at_before_it_goes_on(speaker, sure):
    with SafeLlama(speaker, [sure], n_ctx=512, guard=True) as llama:
        prompt = [*llama.render([USER]), llama.tokenize(b"Sure", add_bos=False)[0]]
        made = llama.create_completion(prompt, max_tokens=8, temperature=0.0)["choices"][0]
        assert (made["text"], made["finish_reason"]) == (f"\n\n{REFUSAL}", "content_filter")
        made = llama.create_completion(prompt[:-1], max_tokens=8, temperature=0.0)["choices"][0]
        assert (made["text"], made["finish_reason"]) == (f"Sure{' thing' * 7}", "length")


def test_looks_do_not_disturb_the_own_context(model):
    """The same tokens with a guard and without; and an answer after one that was looked at."""
    options = {"n_ctx": 512, "type_k": F32, "type_v": F32, "n_threads": 1}
    with SafeLlama(model, **options) as plain, SafeLlama(model, guard=True, **options) as llama:
        assert plain.context_params.n_seq_max == 1
        guard = replace(llama.guard, openers=OPENERS, threshold=NEVER, every=2,
                        request_threshold=NEVER)  # fmt: skip
        llama._made_guard = None, guard
        assert llama.guard is guard
        for seed in range(4):
            for prompt in prompts(2, seed):
                for length in (9, 8, 1):  # the second and third find the prompt in the cache
                    made = [
                        one.create_completion(prompt, max_tokens=length, temperature=0.0)
                        for one in (plain, llama)
                    ]
                    assert made[0]["choices"] == made[1]["choices"]
        # A prompt that is cached to its last token is not read again, unless a look came between.
        prompt = prompts(1, seed=9)[0]
        for look in (lambda: None, lambda: llama.refuses(prompt[::-1], guard)):
            tokens = list(islice(llama.generate(prompt, temp=0.0), 3))
            look()
            assert next(llama.generate([*prompt, *tokens[:2]], temp=0.0)) == tokens[2]
        turns = list(CHAT)
        for _ in range(3):
            said = [whole(one, turns, max_tokens=6) for one in (plain, llama)]
            assert said[0] == said[1]
            turns += [{"role": "assistant", "content": said[0][0]}, USER]


def test_the_context_ends_before_a_look_would_not_fit(speaker, thing):
    with SafeLlama(speaker, [thing], n_ctx=256, guard=True) as llama:
        room = llama.guard.room
        answer = llama.create_chat_completion([USER])
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 256 - room
        around = len(llama.render([{"role": "user", "content": "x"}])) - 1
        long = {"role": "user", "content": "x" * (257 - room - around)}
        with pytest.raises(SettingError, match="no room for the guard"):
            llama.create_chat_completion([long])
        # A history that fills the context: its last message is read all the same.
        turns = [USER, {"role": "assistant", "content": "y" * 90}, USER]
        assert whole(llama, turns, max_tokens=4)[0] == f"Sure{' thing' * 3}"


def test_a_guard_that_cannot_be_is_named(model):
    with pytest.raises(UnsupportedError, match="draft"):
        SafeLlama(model, n_ctx=256, guard=True, draft_model=lambda *_: None)
    with SafeLlama(model, n_ctx=256, guard=True) as llama:
        for wrong in ({"every": 0}, {"threshold": float("nan")}):
            with pytest.raises(SettingError, match="guard"):
                replace(llama.guard, **wrong)
        assert isinstance(llama.guard, Guard)


# -- over HTTP -----------------------------------------------------------------


def test_a_server_ends_answers_and_says_so(speaker, sure):
    with running(speaker, sure) as server:
        client = server.client()
        ask = client.chat.completions.create
        made = ask(model=None, messages=[USER]).choices[0]
        assert (made.message.content, made.finish_reason) == (ENDED, "content_filter")
        stream = list(ask(model=None, messages=CHAT, stream=True))
        said = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(said) == REFUSAL
        assert stream[-1].choices[0].finish_reason == "content_filter"
        response = client.responses.create(model=None, input="Hello")
        assert response.incomplete_details.reason == "content_filter"
        assert response.output_text == ENDED
        facts = server.ask("GET", "/v1/models").json["data"][0]
        assert facts["guard"] is True
    with running(speaker, sure, no_guard=True) as server:
        made = server.client().chat.completions.create(model=None, messages=CHAT, max_tokens=99)
        assert made.choices[0].finish_reason == "length"
        assert server.ask("GET", "/v1/models").json["data"][0]["guard"] is False


# -- attacks, with the guard and without -----------------------------------------


def test_an_evaluation_attacks_once_more_with_the_guard(speaker, sure, thing, tmp_path):
    prompts = tuple(Prompt(str(n), f"How do I do thing {n}?") for n in range(3))
    suites = [Suite("own", "harmful", prompts), Suite("plain", "harmless", prompts)]
    settings = EvalSettings(max_tokens=EVERY + 2, guard=True)
    with Journal(tmp_path / "journal.jsonl") as journal:
        found = [
            evaluate(speaker, sure, suites=suites, settings=settings, journal=journal,
                     attacks=["many_shot", "prefill", "leet"])
            for _ in range(2)  # the second takes all from the journal
        ]  # fmt: skip
    for report in found:
        facts = report.to_json()
        jsonschema.validate(facts, report_schema())
        for attack in (*report.attacks, *report.attack_twins):
            ends = {answer.completion.rpartition("\n\n")[2] for answer in attack.guarded}
            assert ends == {REFUSAL}
            said = {answer.completion.rpartition("\n\n")[0] for answer in attack.guarded}
            whole = f"Sure{' thing' * (EVERY - 1)}"
            # Before a history or a begun answer goes on; in others after some tokens.
            begun = attack.name in ("many_shot", "prefill")
            assert said == {"" if begun else whole}
            assert all(REFUSAL not in answer.completion for answer in attack.after)
        for attack in facts["attacks"]:
            assert attack["guarded"]["total"] == 3
            assert attack["guarded"]["complied"] <= attack["after"]["complied"]
        for text in (report.table(), render_markdown(facts), render_html(facts)):
            assert "with the gene and its guard" in text
    with_thing = evaluate(speaker, thing, suites=suites, settings=settings, attacks=["prefill"])
    for attack in with_thing.attacks:
        assert [a.completion for a in attack.guarded] == [a.completion for a in attack.after]
    without = evaluate(speaker, None, suites=suites, settings=settings, attacks=["prefill"])
    assert all(attack.guarded is None for attack in without.attacks)
