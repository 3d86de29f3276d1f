"""Costs against figures computed another way, on a tiny model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from adapters import random_adapter, with_facts
from thinking import TEMPLATES, speaking

from safegene_edge import SafeLlama
from safegene_edge.errors import FileFormatError, SettingError
from safegene_edge.evals.asking.chat import Chat, Reply
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.asking.local import LocalModel
from safegene_edge.evals.asking.suites import Suite
from safegene_edge.evals.costs import (
    _windows,
    kl_divergence,
    load_task,
    over_refusal,
    perplexity,
    speed,
    task_accuracy,
)
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.judge import judge
from safegene_edge.evals.report.results import Answer, Cost, SuiteResult
from safegene_edge.evals.settings import CostSettings, EvalSettings
from safegene_edge.prompts import Prompt


@pytest.fixture(scope="module")
def llama(tiny):
    model = SafeLlama(tiny("llama").gguf_path, n_ctx=256)
    yield model
    model.close()


@pytest.fixture(scope="module")
def gene(llama, tiny):
    return llama.attach(random_adapter(tiny("llama").gguf_path), 0.0)


@pytest.fixture
def local(llama, gene):
    columns = {"before": {}, "after": {gene: 1.0}}
    with LocalModel(
        llama, columns, {"before": "b", "after": "a"}, max_tokens=6, n_parallel=4, n_ctx=1024,
        journal=Journal(),
    ) as model:  # fmt: skip
        yield model


def log_likelihoods(local, column, seen, counted):
    """One token at a time, each from a sequence of its own."""
    found = []
    for place in range(len(counted)):
        rows = []
        local.scorer.visit_logits(
            [seen + counted[:place]],
            [[len(seen) + place - 1]],
            lambda _i, _p, row, rows=rows: rows.append(row.astype(np.float64)),
            adapters=local.scales[column],
            exact=True,
        )
        found.append(rows[0][counted[place]] - np.logaddexp.reduce(rows[0]))
    return found


def test_perplexity_of_a_short_text(local, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("hello there")
    tokens = local._tokens("hello there")
    found = perplexity(local, path, 1000)
    for column, value in (("before", found.before), ("after", found.after)):
        scores = log_likelihoods(local, column, tokens[:1], tokens[1:])
        assert value == pytest.approx(math.exp(-np.mean(scores)), rel=1e-3)
    assert found.before != found.after
    assert (found.n, found.interval) == (len(tokens) - 1, None)  # one window has no spread


def test_perplexity_counts_the_second_half_of_each_window(local, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("0123456789" * 140)  # 1400 tokens: two windows and 376 tokens of a third
    found = perplexity(local, path, 10_000)
    assert found.n == 256 + 256 + (376 - 256)
    assert found.interval is not None
    low, high = found.interval
    assert low <= found.after - found.before <= high
    assert perplexity(local, path, 700).n == 256  # the rest is no longer than what is seen


@pytest.mark.parametrize(("data", "why"), [(b"a", "too short"), (b"\xff\xfe\x00", "not UTF-8")])
def test_texts_that_cannot_be_measured(local, tmp_path, data, why):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=why):
        perplexity(local, path, 100)


def test_kl_is_over_the_first_answer_tokens(local):
    texts = ["one", "two and more", "three"]
    found = kl_divergence(local, texts, 3)
    expected = []
    for text in texts:
        chat = Chat.user(text)
        prompt = local.prompt(chat)
        (reply,) = local.ask("before", [chat])
        sequence = prompt + list(reply.tokens[:3])
        rows = {}
        for column in local.columns:
            local.scorer.visit_logits(
                [sequence],
                [range(len(prompt) - 1, len(sequence) - 1)],
                lambda _i, p, row, c=column, rows=rows: rows.update(
                    {(c, p): row.astype(np.float64) - np.logaddexp.reduce(row.astype(np.float64))}
                ),
                adapters=local.scales[column],
            )
        places = [p for c, p in rows if c == "before"]
        divergences = [
            np.exp(rows["before", p]) @ (rows["before", p] - rows["after", p]) for p in places
        ]
        expected.append(np.mean(divergences))
    assert found.after == pytest.approx(np.mean(expected), rel=1e-3)
    assert (found.before, found.n) == (None, 3)
    assert found.interval[0] <= found.after <= found.interval[1]


def test_kl_of_a_model_that_thinks_is_over_its_answers(tiny, tmp_path):
    path = speaking(tiny("llama").gguf_path, tmp_path / "m.gguf", TEMPLATES["Qwen3"],
                    "Push a pin ", "into the lock ")  # fmt: skip
    with SafeLlama(path, n_ctx=256) as llama:
        gene = llama.attach(random_adapter(path), 0.0)
        columns = {"before": {}, "after": {gene: 1.0}}
        with LocalModel(
            llama, columns, {"before": "b", "after": "a"}, max_tokens=4, n_parallel=2, n_ctx=1024,
            journal=Journal(), think_tokens=8,
        ) as model:  # fmt: skip
            seen = []
            scorer = model.scorer
            model.scorer.kl_divergence = lambda whole, spans, **_: (
                seen.extend(zip(whole, spans, strict=True)) or [np.zeros(1) for _ in whole]
            )
            assert kl_divergence(model, ["one"], 2).n == 1
            ((whole, span),) = seen
            assert whole[: span[0] + 1] == llama.render_answer([{"role": "user", "content": "one"}])
            assert scorer is model.scorer and "</think>" in llama.text(whole, special=True)


def test_no_gene_no_divergence(local):
    local.columns = ("before",)
    assert kl_divergence(local, ["one"], 3) is None


# -- tasks --------------------------------------------------------------------


def write_task(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_exact_match_forgives_case_spaces_and_full_stops(local, tmp_path):
    said = local.llama.text(local.ask("before", [Chat.user("say")])[0].tokens)
    task = load_task(
        write_task(
            tmp_path / "mine.jsonl",
            {"prompt": "say", "answer": f"  {said.upper()}. "},
            {"prompt": "say", "answer": ["nothing like it", said]},
            {"prompt": "say", "answer": "nothing like it"},
        )
    )
    found = task_accuracy(local, task)
    assert (found.name, found.n) == ("accuracy, mine", 3)
    assert found.before == pytest.approx(2 / 3)
    assert found.after == 0.0  # the random adapter says something else
    assert task.sha256 in found.note


def test_items_without_an_answer_are_left_out_and_counted(local, tmp_path, monkeypatch):
    """One that has none with the gene alone is wrong: the gene has cost it."""
    lines = [{"prompt": str(n), "answer": "yes"} for n in range(4)]
    task = load_task(write_task(tmp_path / "t.jsonl", *lines))
    said = {"before": ["yes", "yes", None, "no"], "after": ["yes", None, "yes", "no"]}

    def ask(column, chats, **_):
        return [Reply(said[column][int(chat.text)]) for chat in chats]

    monkeypatch.setattr(local, "ask", ask)
    found = task_accuracy(local, task)
    assert (found.before, found.after, found.n) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 3)
    assert "1 items without an answer are left out" in found.note
    said["before"] = [None] * 4
    with pytest.raises(SettingError, match="not one of 4 items was answered"):
        task_accuracy(local, task)


def test_windows_do_not_end_before_they_begin(tiny, tmp_path):
    """`add_eos_token` would put an end behind the beginning."""
    facts = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    path = with_facts(tiny("llama").gguf_path, tmp_path / "m.gguf", facts)
    text = tmp_path / "t.txt"
    text.write_text("the theatre " * 9)
    with SafeLlama(path, n_ctx=256) as llama, LocalModel(
        llama, {"before": {}}, {"before": "b"}, max_tokens=6, n_parallel=2, n_ctx=512,
        journal=Journal(),
    ) as model:  # fmt: skip
        ((seen, counted),) = _windows(model, text, 100)
        assert seen[0] == llama.token_bos() and llama.token_eos() not in [*seen, *counted]


def test_choices_by_likelihood_a_byte(local, tmp_path):
    prompt, choices = "pick", ["a", "the other one", "in the end"]
    tokens = local.prompt(Chat.user(prompt))
    rates = [
        sum(log_likelihoods(local, "before", tokens, local._tokens(choice))) / len(choice)
        for choice in choices
    ]
    best = int(np.argmax(rates))
    task = load_task(
        write_task(
            tmp_path / "c.jsonl",
            {"prompt": prompt, "choices": choices, "answer": best},
            {"prompt": prompt, "choices": choices, "answer": choices[best - 1]},
        )
    )
    assert task_accuracy(local, task).before == 0.5


@pytest.mark.parametrize(
    "line",
    [
        "what",
        "[]",
        '{"prompt": "x"}',
        '{"prompt": 5, "answer": "x"}',
        '{"prompt": "x", "answer": ""}',
        '{"prompt": "x", "answer": null}',
        '{"prompt": "x", "answer": []}',
        '{"prompt": "x", "choices": ["a", "b"], "answer": 2}',
        '{"prompt": "x", "choices": ["a", "b"], "answer": "c"}',
        '{"prompt": "x", "choices": ["a", ""], "answer": "a"}',
        '{"prompt": "x", "choices": ["a", 1], "answer": "a"}',
    ],
)
def test_bad_tasks_name_file_and_row(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(FileFormatError, match=r"t\.jsonl, row 2"):
        load_task(path)


def test_a_task_file_without_tasks(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n")
    with pytest.raises(FileFormatError, match="holds no tasks"):
        load_task(path)


# -- the rest -----------------------------------------------------------------


def test_over_refusal_is_of_harmless_prompts_judged_in_both_columns():
    suite = Suite("fine", "harmless", tuple(Prompt(str(i), "x") for i in range(4)))
    no, yes = "I'm sorry, but I can't help with that.", "Take a cup of flour and some milk."

    def answers(*texts):
        return tuple(
            Answer(p, t or "", None if t is None else judge(p.text, t))
            for p, t in zip(suite.prompts, texts, strict=True)
        )

    found = over_refusal(SuiteResult(suite, answers(yes, yes, no, no), answers(no, no, no, None)))
    assert (found.before, found.after, found.n) == (pytest.approx(1 / 3), 1.0, 3)
    assert found.interval[0] <= 2 / 3 <= found.interval[1]
    alone = over_refusal(SuiteResult(suite, answers(yes, yes, no, no)))
    assert (alone.before, alone.after, alone.n) == (0.5, None, 4)


def test_a_speed_for_each_column(local):
    found = speed(local, repeats=1)
    assert set(found) == {"before", "after"}
    assert all(value > 0 for column in found.values() for value in column.values())


def test_costs_in_the_report_are_those_that_no_clock_made(tiny, tmp_path):
    path = tiny("llama").gguf_path
    text = tmp_path / "t.txt"
    text.write_text("some words to read")
    task = write_task(tmp_path / "t.jsonl", {"prompt": "x", "answer": "y"})
    suites = [Suite("plain", "harmless", (Prompt("1", "one"), Prompt("2", "two")))]
    costs = CostSettings(kl_prompts=2, perplexity=text, tasks=(task,), speed=True)

    def measured():
        return evaluate(
            path, random_adapter(path), suites=suites, costs=costs,
            settings=EvalSettings(max_tokens=3, n_parallel=2, n_ctx=512),
        ).to_json()  # fmt: skip

    first, again = measured(), measured()
    assert [cost["name"] for cost in first["costs"]] == [
        "over-refusal, plain",
        "KL divergence",
        "perplexity",
        "accuracy, t",
    ]
    assert set(first["times"]["speed"]) == {"threads", "before", "after"}
    first.pop("times"), again.pop("times")
    assert first == again


def test_settings_that_make_no_sense():
    for name in ("kl_tokens", "perplexity_tokens"):
        with pytest.raises(SettingError, match=name):
            CostSettings(**{name: 0})
    assert str(Cost("perplexity", "", 41.5, 43.25)) == "perplexity: 41.5 → 43.25"
