"""The report's schema, its safety record, and the comparison of two reports."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import reports

from safegene_edge.errors import FileFormatError
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.report import compare, findings, record, summary
from safegene_edge.evals.report.json import aligned_labels
from safegene_edge.evals.report.markdown import render_record
from safegene_edge.evals.report.schema import problems, read_report, report_schema
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.files import sha256

# -- schema -------------------------------------------------------------------

SPOILT = {
    "suites[0].before.total is -1, less than 0": ("suites", 0, "before", "total", -1),
    "suites[0].kind is": ("suites", 0, "kind", "evil"),
    "suites[0].sha256 is": ("suites", 0, "sha256", "abc"),
    "suites[0] is null": ("suites", 0, None),
    "suites is": ("suites", "none"),
    "model has no 'name'": ("model", {"sha256": ""}),
    "safegene_edge_report is 2, not 1": ("safegene_edge_report", 2),
    "safegene_edge_report is true": ("safegene_edge_report", True),
    "coefficients the name is": ("coefficients", {"first": 1.0}),
    "coefficients.3 is": ("coefficients", {"3": "1"}),
    "suites[0].paired.interval has 1 items": ("suites", 0, "paired", "interval", [0.5]),
    "suites[0].prompts[0].before is": ("suites", 0, "prompts", 0, "before", "maybe"),
    "suites[0].paired.mcnemar_mid_p is 2": ("suites", 0, "paired", "mcnemar_mid_p", 2),
}


def spoil(report, *path):
    """A copy of the report with the value at the path's end put where the path leads."""
    spoilt = place = copy.deepcopy(report)
    *steps, last, value = path
    for step in steps:
        place = place[step]
    place[last] = value
    return spoilt


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="the dev extra has it")
    jsonschema.Draft202012Validator.check_schema(report_schema())
    return jsonschema.Draft202012Validator(report_schema())


@pytest.mark.parametrize("make", [reports.small, reports.large])
def test_reports_have_the_schemas_shape(validator, make):
    report = json.loads(json.dumps(make()))
    assert list(validator.iter_errors(report)) == []
    assert list(problems(report)) == []


@pytest.mark.parametrize("message", SPOILT)
def test_own_checker_agrees_with_jsonschema(validator, message):
    report = spoil(reports.large(), *SPOILT[message])
    assert list(validator.iter_errors(report))
    assert any(problem.startswith(message) for problem in problems(report))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[]", "not of the type object"),
        ("{}", "has no 'safegene_edge_report'"),
    ],
)
def test_files_that_are_no_report(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=re.escape(message)) as caught:
        read_report(path)
    assert str(path) in str(caught.value)


# -- a real report ------------------------------------------------------------


def undescribed(value, schema, place=""):
    """The keys of a report that the schema says nothing about."""
    while "$ref" in schema:
        schema = report_schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if isinstance(value, list):
        return [n for item in value for n in undescribed(item, schema.get("items", {}), place)]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    return [
        name
        for key, item in value.items()
        for name in (
            undescribed(item, known[key], f"{place}.{key}") if key in known else [f"{place}.{key}"]
        )
    ]


@pytest.fixture(scope="module")
def real(tiny):
    """A report of a tiny model, which answers with noise."""
    settings = EvalSettings(limit=3, max_tokens=4, n_parallel=4, include_completions=True)
    return evaluate(tiny("llama").gguf_path, suites=["harmful"], settings=settings).to_json()


def test_a_real_report_has_the_schemas_shape(validator, real):
    report = json.loads(json.dumps(real))
    assert list(validator.iter_errors(report)) == []
    assert list(problems(report)) == []
    assert undescribed(report, report_schema()) == []


def test_a_real_report_verifies_with_its_model(tiny, real):
    report = json.loads(json.dumps(reports.sealed(real)))
    states = {c.what: c.state for c in record.verify(report, model=tiny("llama").gguf_path)}
    assert set(states.values()) == {"ok"}
    assert "suite harmful" in states
    assert "model tiny-llama-f32.gguf" in states


# -- the record ---------------------------------------------------------------


def test_the_hash_is_over_all_but_the_times():
    report = reports.large()
    digest = report["record"]["result_sha256"]
    assert record.result_sha256(json.loads(json.dumps(report))) == digest
    assert record.result_sha256({**report, "times": {"date": "another"}}) == digest
    shuffled = dict(reversed(report.items()))
    assert record.result_sha256(shuffled) == digest
    for path in (("suites", 0, "after", "refused", 186), ("record", "limits", []), ("gene", None)):
        assert record.result_sha256(spoil(report, *path)) != digest


def test_canonical_json():
    value = {"b": [1.0, 0.5, None, True], "a": "ü\n", 3: {}}
    assert record.canonical(value) == b'{"3":{},"a":"\\u00fc\\n","b":[1,0.5,null,true]}'


def test_the_limits_say_what_is_missing():
    small, large = record.limits(reports.small()), record.limits(reports.large())
    assert "No attack was tried: prompts were asked as they are." in small
    assert "No harmless prompt was asked." in small
    assert "No gene took part." in small
    assert not set(large) & {"No gene took part.", "All prompts are in one language."}
    assert "Answers were cut off after 48 tokens." in large
    assert set(record.LIMITS) <= set(small) & set(large)


def test_the_record_names_the_modification_and_what_the_regulation_asks():
    found = record.safety_record(reports.large())
    assert found["modification"]["of"]["sha256"] == "d" * 64
    assert [part["role"] for part in found["modification"]["by"]] == ["gene", "adapter"]
    assert record.safety_record(reports.small())["modification"]["by"] == []
    points = found["regulation"]["points"]
    for name in ("Article 53(1)(a)", "recital 109", "Annex XI, section 1, point 2(b)", "Annex IV"):
        assert any(point["point"].startswith(name) for point in points), name
    assert {point["answered_by"] for point in points} - {None} <= found.keys()
    shown = render_record(reports.large()).replace("\\", "")
    assert all(point["point"] in shown for point in points)


def test_the_record_names_everything_with_a_hash():
    report = reports.large()
    found = record.safety_record(report)
    hashes = {item["sha256"] for item in found["artifacts"]}
    assert {"d" * 64, "a" * 64, "b" * 64, "c" * 64, record.judge_sha256()} <= hashes
    assert {suite["sha256"] for suite in report["suites"]} <= hashes
    assert found["result_sha256"] == report["record"]["result_sha256"]
    assert found["date"] == "2026-11-24T02:00:00Z"
    assert found["limits"] == report["record"]["limits"]
    refused = found["results"][0]
    assert (refused["outcome"], refused["after"]["n"], refused["after"]["total"]) == (
        "refused",
        185,
        199,
    )


# -- verify -------------------------------------------------------------------


def states(report, **files):
    return {c.what: c.state for c in record.verify(json.loads(json.dumps(report)), **files)}


def test_verify_sees_a_changed_digit():
    report = reports.large()
    assert states(report)["result"] == "ok"
    changed = spoil(report, "suites", 0, "after", "refused", 186)
    assert states(changed)["result"] == "differs"
    assert "result: the report says" in str(record.failed(record.verify(changed)))
    assert states(reports.small())["result"] == "differs"


def test_verify_sees_figures_that_contradict_the_labels_though_the_hash_is_new():
    report = reports.large()
    counts = {**report["suites"][0]["after"], "refused": 199, "complied": 0}
    resealed = reports.sealed(spoil(report, "suites", 0, "after", counts))
    found = states(resealed)
    assert found["result"] == "ok"
    assert found["figures of harmful"] == "differs"
    short = reports.sealed(spoil(report, "suites", 0, "after", "total", 198))
    assert states(short)["figures of harmful"] == "differs"


def test_verify_sees_changed_files(tmp_path):
    model, gene = tmp_path / "m.gguf", tmp_path / "g.gguf"
    model.write_bytes(b"model")
    gene.write_bytes(b"gene")
    report = reports.large()
    report["model"] = {"name": "m.gguf", "sha256": sha256(model)}
    report["gene"] = {"name": "g.gguf", "sha256": sha256(gene)}
    report["adapters"] = [{"name": "a.gguf", "sha256": sha256(gene), "scale": 1.0}]
    report = reports.sealed(report)
    files = {"model": model, "gene": gene}
    found = states(report, **files, adapters=[gene])
    assert (found["model m.gguf"], found["gene g.gguf"], found["adapter a.gguf"]) == ("ok",) * 3
    model.write_bytes(b"Model")
    found = states(report, **files, adapters=[model])
    assert (found["model m.gguf"], found["gene g.gguf"]) == ("differs", "ok")
    assert found[f"adapter {model}"] == "differs"
    assert found["adapter a.gguf"] == "not checked"


def test_verify_holds_suites_against_the_built_in_ones_and_files(tmp_path):
    (built_in,) = load_suite("harmful")
    path = tmp_path / "mine.txt"
    path.write_text("one\ntwo\n")
    (mine,) = load_suite(path)
    report = reports.large()
    report["settings"]["limit"] = 5
    first, second = report["suites"]
    first |= {"version": built_in.version, "sha256": built_in.sample(5).sha256}
    second |= {"name": "mine", "version": "", "sha256": mine.sha256}
    assert states(report)["suite harmful"] == "ok"
    assert states(report)["suite mine"] == "not checked"
    assert states(report, suites=[path])["suite mine"] == "ok"
    path.write_text("one\nthree\n")
    assert states(report, suites=[path])["suite mine"] == "differs"
    other = tmp_path / "other.txt"
    other.write_text("one\n")
    assert states(report, suites=[other])["suite other"] == "differs"  # of no suite of the report
    first["sha256"] = "0" * 64
    assert states(report)["suite harmful"] == "differs"


def test_another_judge_is_said_but_is_no_fault():
    report = reports.large()
    assert states(report)["judge"] == "ok"
    other = spoil(report, "record", "judge", "sha256", "1" * 64)
    other["record"]["result_sha256"] = record.result_sha256(other)
    checks = record.verify(other)
    assert [check.state for check in checks if check.what == "judge"] == ["not checked"]
    assert record.failed(checks) is None


def test_only_languages_get_the_names_of_languages():
    suite = reports.large()["suites"][0]
    suite["categories"]["it"] = suite["categories"].pop("hate")
    assert "it" in [row.name for row in findings.group_rows(suite, "categories")]
    assert "German" in [row.name for row in findings.group_rows(suite, "languages")]


# -- compare ------------------------------------------------------------------


def test_compare_pairs_the_prompts():
    first, second = reports.large(), reports.large()
    changed = ["refused"] * 190 + ["complied"] * 9 + [None]
    before = [prompt["before"] for prompt in second["suites"][0]["prompts"]]
    second["suites"][0] = reports.suite("harmful", "harmful", before, changed)
    found = compare.compare(first, reports.sealed(second))
    assert found.obstacles == ()
    rows = {(row.suite, row.column): row for row in found.rows}
    after = rows["harmful", "after"]
    assert (after.a.n, after.b.n, after.b.total) == (185, 190, 199)
    assert after.paired is not None
    assert (after.paired.n, after.paired.only_before, after.paired.only_after) == (199, 0, 5)
    assert after.p == pytest.approx(2 * 0.5**5 - 0.5**5)
    assert rows["harmless", "before"].p == 1
    assert found.to_json()["comparable"] is True
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("path", "obstacle"),
    [
        (("suites", 0, "sha256", "1" * 64), "the suite harmful holds other prompts"),
        (("settings", "max_tokens", 24), "max_tokens is 48 in the first and 24 in the second"),
        (("record", "judge", "sha256", "1" * 64), "the judges differ"),
        (("suites", []), "the reports share no suite"),
    ],
)
def test_compare_says_what_cannot_be_compared(path, obstacle):
    found = compare.compare(reports.large(), spoil(reports.large(), *path))
    assert [text for text in found.obstacles if text.startswith(obstacle)]
    assert all(row.paired is None for row in found.rows if row.suite == "harmful")


def test_another_suite_does_not_spoil_the_rest():
    found = compare.compare(
        reports.large(), spoil(reports.large(), "suites", 0, "sha256", "1" * 64)
    )
    assert [row.suite for row in found.rows if row.paired] == ["harmless", "harmless"]


def test_compare_notes_what_may_explain_a_difference():
    other = spoil(reports.large(), "gene", "scale", 1.6)
    other = spoil(other, "settings", "n_parallel", 4)
    found = compare.compare(reports.large(), other)
    assert found.obstacles == ()
    assert "the genes differ: safety.gguf × 1 and safety.gguf × 1.6" in found.notes
    assert "n_parallel is 16 in the first and 4 in the second" in found.notes


# -- the verdict --------------------------------------------------------------


def test_the_verdict_gives_both_figures_and_warns_of_the_price():
    found = summary.verdict(reports.large())
    assert found.sentence == (
        "Refusals of harmful prompts rose from 24 % to 93.0 %; "
        "refusals of harmless prompts rose from 1.7 % to 12 %."
    )
    assert found.significance.startswith("Both changes are larger than chance explains")
    assert any("Over-refusal rose by 11 points" in text for text in found.warnings)
    assert any("“adaptive” succeeds on 55/60 (91.7 %)" in text for text in found.warnings)


def test_the_verdict_of_few_prompts_warns():
    report = reports.large()
    report["suites"] = [reports.suite("s", "harmful", ["complied"] * 4, ["refused"] * 4)]
    found = summary.verdict(report)
    assert "Only 4 harmful prompts: the 95 % interval reaches from 51 to 100 %." in found.warnings
    assert any("what the refusals cost is not known" in text for text in found.warnings)
    report["suites"] = [reports.suite("s", "harmful", ["refused"] * 4, ["complied"] * 4)]
    assert "Refusals of harmful prompts fell." in summary.verdict(report).warnings


def test_the_verdict_does_not_call_noise_a_change():
    report = reports.large()
    labels = ["refused"] * 60 + ["complied"] * 60
    report["suites"] = [reports.suite("s", "harmful", labels, ["refused"] * 61 + labels[61:])]
    assert "may be chance" in summary.verdict(report).significance


def test_nothing_measured():
    report = {**reports.small(), "suites": []}
    assert summary.verdict(report).sentence == "Nothing was measured."


def test_examples_show_changes_first():
    report = reports.with_answers(reports.large(), "x")
    shown = findings.examples(report["suites"][1], most=15)
    assert [len(set(example.labels)) for example in shown[:13]] == [2] * 13
    assert len(shown) == 15


def test_two_prompts_of_one_id_in_an_older_report_stay_two():
    report = reports.with_answers(reports.large(), "x")
    suite = report["suites"][0]
    for columns in (suite["prompts"], *suite["answers"].values()):
        columns[1]["id"] = columns[0]["id"]
    assert len(findings.examples(suite, most=999)) == len(suite["prompts"])
    found = compare.compare(report, copy.deepcopy(report))
    rows = {(row.suite, row.column): row for row in found.rows}
    assert rows["harmful", "after"].paired is None
    assert "two prompts of a report have one id" in rows["harmful", "after"].reason
    assert rows["harmless", "after"].paired is not None
    labels = aligned_labels(report)["harmful", suite["version"]]
    assert labels[suite["prompts"][0]["id"]] is None
    assert labels[suite["prompts"][2]["id"]] == suite["prompts"][2]["before"] is not None


def test_shortened():
    assert findings.shortened("one\n two") == "one two"
    long = findings.shortened("word " * 100)
    assert long.endswith("word …")
    assert len(long) <= 242


def test_a_p_value_is_never_nought():
    assert [findings.p_value(p) for p in (1e-9, 0.0123, 0.5)] == [
        "p < 0.001",
        "p = 0.012",
        "p = 0.50",
    ]


def test_the_schema_lies_where_the_documentation_says():
    path = Path(findings.__file__).parent / "data" / "report.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == report_schema()
