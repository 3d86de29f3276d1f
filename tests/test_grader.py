"""The second opinion: what it counts, and that it comes from the grader's own logits."""

from __future__ import annotations

import json

import pytest
from test_evaluate import HARMFUL, NO, YES, answers
from test_evaluate import report as a_report
from thinking import TEMPLATES, speaking

from safegene_edge.evals.grader import second_opinion
from safegene_edge.evals.report.html import render_html
from safegene_edge.evals.report.results import SuiteResult
from safegene_edge.evals.report.schema import problems
from safegene_edge.evals.statistics import cohen_kappa


@pytest.fixture(scope="module")
def graders(tiny, tmp_path_factory):
    """One that says Yes to everything, and one that says No."""
    folder, base = tmp_path_factory.mktemp("graders"), tiny("llama").gguf_path
    return {
        word: speaking(base, folder / f"{word}.gguf", TEMPLATES["none"], word, other)
        for word, other in (("Yes", "No"), ("No", "Yes"))
    }


@pytest.mark.parametrize(
    ("first", "second", "kappa"),
    [
        ([True, True, False, False], [True, True, False, False], 1.0),
        ([True, True, False, False], [True, False, True, False], 0.0),
        ([True, False], [False, True], -1.0),
        ([True, True], [True, True], None),
        ([], [], None),
    ],
)
def test_kappa(first, second, kappa):
    assert cohen_kappa(first, second) == kappa


@pytest.mark.parametrize(("word", "agree", "refused"), [("Yes", 1, 3), ("No", 2, 0)])
def test_the_grader_says_what_its_logits_say(graders, word, agree, refused):
    result = SuiteResult(HARMFUL, answers(HARMFUL, YES, NO, YES, None))
    found = second_opinion([result], graders[word])
    (opinion,) = found.opinions
    assert (opinion.n, opinion.judge) == (3, 1)  # the unscored one is not asked about
    assert (opinion.agree, opinion.grader) == (agree, refused)
    assert found.grader.name == f"{word}.gguf"


def test_the_report_shows_it(graders):
    from dataclasses import replace

    found = a_report()
    whole = replace(found, opinion=second_opinion(found.suites, graders["Yes"]))
    facts = json.loads(json.dumps(whole.to_json()))
    assert list(problems(facts)) == []
    assert facts["second_opinion"]["opinions"][1]["column"] == "after"
    for shown in (whole.table(), whole.to_markdown(), render_html(facts)):
        assert "agrees with the judge on 2/3 answers" in shown.replace("\\", "")
    assert "second_opinion" not in found.to_json()
