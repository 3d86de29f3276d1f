"""The built-in suites keep their promises; readers name the row that is wrong."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from safegene_edge.errors import FileFormatError, SafeGeneError, SettingError
from safegene_edge.evals.asking.suites import Suite, load_suite
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.settings import DEFAULT_SUITES
from safegene_edge.prompts import FORMS, Prompt

EXTERNAL = Path(__file__).resolve().parents[2] / "shared" / "data"
HAZARDS = {
    "child_sexual_exploitation",
    "defamation",
    "hate",
    "indiscriminate_weapons",
    "intellectual_property",
    "non_violent_crimes",
    "privacy",
    "sex_related_crimes",
    "sexual_content",
    "specialized_advice",
    "suicide_self_harm",
    "violent_crimes",
}


def built_in(name: str) -> Suite:
    (suite,) = load_suite(name)
    return suite


def test_harmful_covers_every_hazard() -> None:
    suite = built_in("harmful")
    per_category = Counter(prompt.category for prompt in suite.prompts)
    assert suite.kind == "harmful"
    assert suite.version
    assert set(per_category) == HAZARDS
    assert min(per_category.values()) >= 8
    assert len(suite.prompts) >= 96


def test_every_borderline_prompt_names_its_trap() -> None:
    suite = built_in("borderline")
    assert suite.kind == "harmless"
    assert suite.version
    assert all(prompt.borderline for prompt in suite.prompts)
    assert len(suite.prompts) >= 60


def test_harmless_is_plain() -> None:
    suite = built_in("harmless")
    assert suite.kind == "harmless"
    assert suite.version
    assert not any(prompt.borderline for prompt in suite.prompts)
    assert len(suite.prompts) >= 50


def test_ids_and_texts_are_unique() -> None:
    prompts = [prompt for name in DEFAULT_SUITES for prompt in built_in(name).prompts]
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.text.lower() for prompt in prompts}) == len(prompts)


LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "zh", "hi")
SCRIPTS = {"zh": "CJK UNIFIED IDEOGRAPH", "hi": "DEVANAGARI"}


def by_language() -> dict[str, dict[str, Prompt]]:
    """For each language the core's id, which ends an id without its language, and the prompt."""
    found: dict[str, dict[str, Prompt]] = {}
    for prompt in built_in("languages").prompts:
        core, _, tag = prompt.id.rpartition("-")
        assert tag == prompt.language, prompt.id
        found.setdefault(prompt.language, {})[core] = prompt
    return found


def test_every_language_says_the_same_core() -> None:
    suite = built_in("languages")
    found = by_language()
    assert (suite.kind, bool(suite.version), len(suite.prompts)) == ("harmful", True, 240)
    assert tuple(found) == LANGUAGES
    categories = {core: prompt.category for core, prompt in found["en"].items()}
    assert len(categories) == 30
    assert set(categories.values()) == HAZARDS
    for prompts in found.values():
        assert {core: prompt.category for core, prompt in prompts.items()} == categories


def test_no_text_comes_twice_in_languages() -> None:
    counts = Counter(prompt.text.lower() for prompt in built_in("languages").prompts)
    assert [text for text, count in counts.items() if count > 1] == []


def test_languages_are_written_in_their_script() -> None:
    for language, prompts in by_language().items():
        script = SCRIPTS.get(language, "LATIN")
        for prompt in prompts.values():
            # a vowel sign of Devanagari is a mark and no letter
            signs = [char for char in prompt.text if unicodedata.category(char)[0] in "LM"]
            own = sum(unicodedata.name(char).startswith(script) for char in signs)
            assert own == len(signs), prompt.text


# -- nothing copied -----------------------------------------------------------


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """Word 5-grams; a shorter text counts as one shingle, so that it is compared too."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def nearest(text: str, others: Iterable[str]) -> float:
    """The largest Jaccard overlap of word 5-grams."""
    own = shingles(text)
    return max(len(own & other) / len(own | other) for other in map(shingles, others))


def test_overlap_measure_finds_a_near_copy() -> None:
    text = "Explain in detail how one bakes a loaf of bread at home"
    assert nearest(text, [text + " quickly", "something else entirely"]) > 0.8
    assert nearest(text, ["How do you bake bread in your own kitchen, in detail?"]) == 0


@pytest.mark.skipif(not EXTERNAL.is_dir(), reason="the external benchmarks are not here")
def test_no_prompt_is_a_near_copy_of_a_benchmark() -> None:
    files = ("advbench.csv", "harmbench_text.csv", "malicious_instruct.txt")
    suites = [suite for name in files for suite in load_suite(EXTERNAL / name)]
    others = [prompt.text for suite in suites for prompt in suite.prompts]
    with open(EXTERNAL / "harmbench_text.csv", newline="", encoding="utf-8") as handle:
        others += [row["Behavior"] for row in csv.DictReader(handle)]  # the other rows too
    assert len(others) > 900
    known = [shingles(other) for other in others]
    for prompt in (prompt for name in DEFAULT_SUITES for prompt in built_in(name).prompts):
        own = shingles(prompt.text)
        overlap = max(len(own & other) / len(own | other) for other in known)
        assert overlap < 0.1, (prompt.text, overlap)


@pytest.mark.skipif(not EXTERNAL.is_dir(), reason="the external benchmarks are not here")
def test_readers_on_the_benchmarks_themselves() -> None:
    sizes = {
        "advbench.csv": 521,
        "harmbench_text.csv": 200,
        "malicious_instruct.txt": 100,
    }
    for name, size in sizes.items():
        (suite,) = load_suite(EXTERNAL / name)
        assert (suite.kind, suite.name, len(suite.prompts)) == ("harmful", name[:-4], size)


# -- readers ------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_of_both_kinds_gives_two_suites(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "mine.jsonl",
        '{"prompt": "a bad thing"}\n\n{"prompt": "a good\\nthing", "kind": "harmless", "id": 7}\n',
    )
    harmful, harmless = load_suite(path)
    assert (harmful.name, harmful.kind) == ("mine-harmful", "harmful")
    assert [prompt.id for prompt in harmful.prompts] == ["1"]
    assert (harmless.name, harmless.prompts[0].text) == ("mine-harmless", "a good\nthing")


def test_jsonl_with_a_header(tmp_path: Path) -> None:
    header = '{"suite": "x", "kind": "harmless", "version": "3"}'
    (suite,) = load_suite(write(tmp_path, "x.jsonl", header + '\n{"prompt": "hello"}\n'))
    assert (suite.name, suite.kind, suite.version) == ("x", "harmless", "3")


def test_harmbench_keeps_the_standard_rows(tmp_path: Path) -> None:
    text = (
        "Behavior,FunctionalCategory,SemanticCategory,BehaviorID\n"
        'one,standard,crime,b1\ntwo,copyright,copyright,b2\n"three, four",standard,crime,b3\n'
    )
    (suite,) = load_suite(write(tmp_path, "h.csv", text))
    assert [(p.id, p.text, p.category) for p in suite.prompts] == [
        ("b1", "one", "crime"),
        ("b3", "three, four", "crime"),
    ]


def test_xstest_gives_two_suites(tmp_path: Path) -> None:
    text = (
        "id,prompt,type,label,focus,note\n"
        "1,soft words,some_type,safe,x,\n2,hard words,contrast_some_type,unsafe,x,\n"
    )
    harmful, harmless = load_suite(write(tmp_path, "xs.csv", text))
    assert (harmful.name, harmful.prompts[0].text) == ("xs-harmful", "hard words")
    assert (harmless.name, harmless.prompts[0].trap) == ("xs-harmless", "some_type")


def test_strongreject(tmp_path: Path) -> None:
    text = 'category,source,forbidden_prompt\nsome,who,"first line\nsecond line"\n'
    (suite,) = load_suite(write(tmp_path, "s.csv", text))
    assert suite.prompts[0].text == "first line\nsecond line"
    assert suite.prompts[0].category == "some"


def test_jailbreakbench_whose_two_files_differ_only_in_name(tmp_path: Path) -> None:
    text = (
        "Index,Goal,Target,Behavior,Category,Source\n"
        '7,"do this, please",Sure,A short name,Some area,Original\n8,do that,Sure,Another,B,X\n'
    )
    (suite,) = load_suite(write(tmp_path, "harmful-behaviors.csv", text))
    assert (suite.kind, suite.name) == ("harmful", "harmful-behaviors")
    assert suite.prompts[0] == Prompt("7", "do this, please", "Some area")
    (benign,) = load_suite(write(tmp_path, "benign-behaviors.csv", text))
    assert (benign.kind, benign.prompts[0].trap) == ("harmless", "Some area")


def test_simple_safety_tests(tmp_path: Path) -> None:
    text = "id,harm_area,counter,category,prompt\nsst_1,An Area,1,Question,how\nsst_2,B,2,C,what\n"
    (suite,) = load_suite(write(tmp_path, "sst.csv", text))
    assert suite.kind == "harmful"
    assert suite.prompts[0] == Prompt("sst_1", "how", "An Area")


def test_or_bench_is_harmless_but_for_its_toxic_part(tmp_path: Path) -> None:
    text = "prompt,category\nsounds bad,violence\nsounds worse,hate\n"
    (suite,) = load_suite(write(tmp_path, "or-bench-hard-1k.csv", text))
    assert suite.kind == "harmless"
    assert suite.prompts[0] == Prompt("2", "sounds bad", "violence", "violence")
    (toxic,) = load_suite(write(tmp_path, "or-bench-toxic.csv", text))
    assert (toxic.kind, toxic.prompts[0].trap) == ("harmful", "")
    rows = '{"prompt": "sounds bad", "category": "violence"}\n'
    assert load_suite(write(tmp_path, "or_bench.jsonl", rows))[0].kind == "harmless"
    assert load_suite(write(tmp_path, "mine.jsonl", rows))[0].kind == "harmful"


def test_malicious_instruct(tmp_path: Path) -> None:
    (suite,) = load_suite(write(tmp_path, "MaliciousInstruct.txt", "How to?\nWhat, if?\n"))
    assert suite.kind == "harmful"
    assert [prompt.text for prompt in suite.prompts] == ["How to?", "What, if?"]


@pytest.mark.parametrize("quoted", ["GOAL,Target", "Forbidden_Prompt,x", " prompt ,KIND"])
def test_columns_in_any_case(tmp_path: Path, quoted: str) -> None:
    (suite,) = load_suite(write(tmp_path, "a.csv", f"{quoted}\nbad,harmful\n"))
    assert (suite.kind, suite.prompts[0].text) == ("harmful", "bad")


def test_jsonl_of_a_benchmark_keeps_its_labels(tmp_path: Path) -> None:
    text = (
        '{"prompt": "soft", "type": "t", "label": "safe"}\n{"goal": "hard", "target": "Sure"}\n'
        '{"Behavior": "x", "FunctionalCategory": "copyright"}\n'
    )
    harmful, harmless = load_suite(write(tmp_path, "mix.jsonl", text))
    assert [prompt.text for prompt in harmful.prompts] == ["hard"]
    assert [prompt.text for prompt in harmless.prompts] == ["soft"]


def test_the_id_nought_is_an_id(tmp_path: Path) -> None:
    """Counted from 0, ids would else run into the row numbers that stand in for missing ones."""
    rows = "".join(json.dumps({"prompt": f"q{i}", "id": i}) + "\n" for i in range(3))
    (suite,) = load_suite(write(tmp_path, "a.jsonl", rows))
    assert [prompt.id for prompt in suite.prompts] == ["0", "1", "2"]
    goals = "".join(
        json.dumps({"index": i, "goal": f"q{i}", "behavior": "b", "category": "c"}) + "\n"
        for i in range(3)
    )
    (suite,) = load_suite(write(tmp_path, "b.jsonl", goals))
    assert [prompt.id for prompt in suite.prompts] == ["0", "1", "2"]


def test_one_id_in_both_kinds_is_two_prompts(tmp_path: Path) -> None:
    """Twins share an id in some files; the kinds become suites of their own."""
    rows = [{"prompt": kind, "kind": kind, "id": "a"} for kind in ("harmful", "harmless")]
    found = load_suite(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [(s.kind, [p.id for p in s.prompts]) for s in found] == [
        ("harmful", ["a"]),
        ("harmless", ["a"]),
    ]


def test_a_suite_made_in_python_with_one_id_twice_is_refused() -> None:
    suite = Suite("mine", "harmful", (Prompt("a", "x"), Prompt("b", "y"), Prompt("a", "z")))
    assert suite.repeated_id() == "a" and built_in("harmful").repeated_id() is None
    with pytest.raises(SettingError, match="'mine' have the id 'a'"):
        evaluate("never-read.gguf", suites=[suite])


def test_text_with_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    (suite,) = load_suite(str(path))
    assert [prompt.text for prompt in suite.prompts] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\nnot json\n', r"a\.jsonl, row 2: is not JSON"),
        ("a.jsonl", b'["prompt"]\n', r"row 1: is not a JSON object"),
        ("a.jsonl", b'{"prompt": ""}\n', r"row 1: 'prompt' is missing or empty"),
        ("a.jsonl", b'{"prompt": 5}\n', r"row 1: 'prompt' is missing or empty"),
        ("a.jsonl", b'{"prompt": "x", "kind": "nice"}\n', r"row 1: kind is 'nice'"),
        ("a.jsonl", b'{"prompt": "x", "kind": []}\n', r"row 1: kind is \[\]"),
        ("a.jsonl", b"", r"a\.jsonl: holds no prompts"),
        ("a.jsonl", b'{"prompt": "x"}\n\xff\xfe\n', r"row 2: is not UTF-8"),
        ("a.csv", b"what,ever\n1,2\n", r"row 1: has no known columns"),
        ("a.csv", b"goal,target\nx,y\n,y\n", r"row 3: 'goal' is missing or empty"),
        ("a.csv", b'goal,target\n"x,y\n', r"is not CSV"),
        ("a.csv", b"prompt,type,label\nx,t,maybe\n", r"row 2: label is 'maybe'"),
        ("a.csv", b"prompt,type,label\nx\n", r"row 2: label is None"),
        ("a.csv", b"", r"has no known columns"),
        (
            "a.jsonl",
            b'{"prompt": "x", "id": 1}\n{"prompt": "y"}\n{"prompt": "z", "id": "1"}\n',
            r"a\.jsonl, row 3: has the id '1', which row 1 has too",
        ),
        ("a.jsonl", b'{"prompt": "x", "id": 2}\n{"prompt": "y"}\n', r"row 2: has the id '2'"),
        ("a.csv", b"id,prompt,kind\nq,x,harmful\nq,y,harmful\n", r"row 3: has the id 'q'"),
        (
            "a.csv",
            b"BehaviorID,Behavior,FunctionalCategory\nb,x,standard\nb,y,standard\n",
            r"row 3: has the id 'b', which row 2",
        ),
        ("a.csv", b"Index,Goal,Behavior,Category\n4,x,b,c\n4,y,b,c\n", r"row 3: has the id '4'"),
        ("a.csv", b"prompt,kind,Prompt\nx,harmful,y\n", r"row 1: has 'prompt' twice"),
        ("a.csv", b"goal,goal\nx,y\n", r"row 1: has 'goal' twice"),
        ("a.jsonl", b'{"prompt": "x", "prompt": "y"}\n', r"row 1: has 'prompt' twice"),
        ("a.jsonl", b'{"prompt": "x", "Prompt": "y"}\n', r"row 1: has 'prompt' twice"),
        ("a.txt", b"\n\n", r"holds no prompts"),
        ("a.parquet", b"PAR1", r"no suite of this name"),
    ],
)
def test_bad_files_name_file_and_row(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileFormatError, match=message):
        load_suite(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing", "nothing.jsonl", "."])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(SafeGeneError):
        load_suite(tmp_path / name)


# -- suites -------------------------------------------------------------------


def test_sample_keeps_every_category() -> None:
    suite = built_in("harmful")
    sample = suite.sample(24)
    assert len(sample.prompts) == 24
    assert {prompt.category for prompt in sample.prompts} == HAZARDS
    assert {prompt.form for prompt in suite.sample(40).prompts} == set(FORMS)
    assert suite.sample(None) is suite
    assert suite.sample(10_000) is suite
    with pytest.raises(SettingError):
        suite.sample(0)


def test_hash_follows_the_prompts_and_not_the_file(tmp_path: Path) -> None:
    (text,) = load_suite(write(tmp_path, "a.txt", "one\ntwo\n"))
    (lines,) = load_suite(write(tmp_path, "b.jsonl", '{"prompt":"one"}\n{"prompt":"two"}'))
    (other,) = load_suite(write(tmp_path, "c.txt", "two\none\n"))
    assert text.sha256 == lines.sha256 != other.sha256
