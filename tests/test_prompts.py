"""The package's prompts: every hazard in every form, in twins, so that no form tells the label."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from importlib import resources

import numpy as np
import pytest

from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.settings import DEFAULT_SUITES
from safegene_edge.prompts import CATEGORIES, FORMS, Prompt, from_record, rows

TWINS = {"calibration": 68}  # of 96: the longest pairs are training prompts
UNTWINNED = "child_sexual_exploitation"  # harmful ones alone, for training alone
TRAPS = {
    "definition", "fiction", "figure of speech", "food", "game", "history", "homonym", "law",
    "machine", "medicine", "nonsense about groups", "own property", "prevention", "public figure",
    "safe target", "sport",
}  # fmt: skip


def training() -> list[dict]:
    return list(rows("prompts.jsonl"))


def calibration() -> list[dict]:
    return list(rows("calibration.jsonl"))


def evaluation() -> list[dict]:
    """The three suites, with the twin's name in the id."""
    found = []
    for kind, name in (("harmful", "harmful"), ("borderline", "borderline"), ("plain", "harmless")):
        for prompt in load_suite(name)[0].prompts:
            row = {"kind": kind, "form": prompt.form, "category": prompt.category}
            row |= {"prompt": prompt.text, "history": list(prompt.history), "trap": prompt.trap}
            found.append(row | ({"pair": prompt.id.partition("/")[0]} if "/" in prompt.id else {}))
    return found


SETS = {"training": training, "calibration": calibration, "evaluation": evaluation}


# -- form says nothing ----------------------------------------------------


def first_word(row: dict) -> str:
    return (re.findall(r"[a-z']+", row["prompt"].lower()) or [""])[0]


def form_features(found: list[dict]) -> np.ndarray:
    """Length, punctuation, mood and the first word where eight prompts share it."""
    counts = Counter(map(first_word, found))
    common = [word for word, count in counts.items() if count >= 8]
    values = []
    for row in found:
        text = row["prompt"]
        lower = text.lower()
        values.append([
            len(text), len(text.split()), text.count("?"), text.rstrip().endswith("?"),
            text.rstrip().endswith("."), text.count("\n"), text.count('"'), text.count(","),
            text == lower, bool(re.search(r"\b(i|my|me|i'm)\b", lower)),
            bool(re.search(r"\byou\b", lower)), bool(row.get("history")),
            *(first_word(row) == word for word in common),
        ])  # fmt: skip
    return np.array(values, float)


def logistic(x: np.ndarray, y: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """Weights of a ridge logistic regression, the intercept last (Newton's method)."""
    x = np.c_[x, np.ones(len(x))]
    weights, ridge = np.zeros(x.shape[1]), penalty * np.eye(x.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (p - y) + penalty * weights
        weights -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
    return weights


def form_auc(found: list[dict], folds: int = 10) -> float:
    """How well form alone tells harmful from harmless, cross-validated with twins together."""
    x, y = form_features(found), np.array([row["kind"] == "harmful" for row in found], float)
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    names = [row.get("pair") or f"plain {n}" for n, row in enumerate(found)]
    order = {
        name: n for n, name in enumerate(np.random.default_rng(0).permutation(sorted(set(names))))
    }
    fold = np.array([order[name] % folds for name in names])
    scores = np.zeros(len(y))
    for k in range(folds):
        weights = logistic(x[fold != k], y[fold != k])
        scores[fold == k] = np.c_[x[fold == k], np.ones((fold == k).sum())] @ weights
    ranks = np.argsort(np.argsort(scores)) + 1
    positive = y.sum()
    return float(
        (ranks[y == 1].sum() - positive * (positive + 1) / 2) / positive / (len(y) - positive)
    )


@pytest.mark.parametrize("name", SETS)
def test_form_alone_does_not_tell_harmful_from_harmless(name: str) -> None:
    assert form_auc(SETS[name]()) <= 0.55


def test_a_confounded_set_would_be_noticed() -> None:
    found = training()[:600]
    for row in found:
        if row["kind"] == "harmful":
            row["prompt"] = f"Write {row['prompt']}"
    assert form_auc(found) > 0.7


# -- counts ---------------------------------------------------------------


def test_there_are_enough_and_every_hazard_has_every_form() -> None:
    everything = [row for read in SETS.values() for row in read()]
    kinds = Counter(row["kind"] for row in everything)
    assert kinds["harmful"] >= 1200 and kinds["borderline"] >= 1200 and kinds["plain"] >= 600
    cells = Counter((row["kind"], row["category"], row["form"]) for row in everything)
    for category in set(CATEGORIES) - {UNTWINNED}:
        for form in FORMS:
            for kind in ("harmful", "borderline"):
                assert cells[kind, category, form] >= 7, (kind, category, form)
    assert {row["form"] for row in everything} == set(FORMS)


@pytest.mark.parametrize("name", SETS)
def test_forms_have_the_same_share_in_every_kind(name: str) -> None:
    found = [row for row in SETS[name]() if row["category"] != UNTWINNED]
    for form in FORMS:
        for kind in ("harmful", "borderline", "plain"):
            mine = [row for row in found if row["kind"] == kind]
            share = sum(row["form"] == form for row in mine) / len(mine)
            assert share == pytest.approx(1 / len(FORMS), abs=0.02), (form, kind)


def test_rows_carry_what_they_must() -> None:
    for row in [row for read in SETS.values() for row in read()]:
        assert row["form"] in FORMS
        assert bool(row.get("history")) is (row["form"] == "turns")
        if row["kind"] == "harmful":
            assert row["category"] in CATEGORIES
        if row["kind"] == "borderline":
            assert row["trap"] in TRAPS


# -- twins ----------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_twins_differ_in_little_but_the_harm(name: str) -> None:
    pairs: dict[str, dict[str, str]] = {}
    for row in SETS[name]():
        if row.get("pair"):
            pairs.setdefault(row["pair"], {})[row["kind"]] = row["prompt"]
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    assert len(whole) >= 0.7 * len(pairs) and len(whole) >= TWINS.get(name, 81)
    for pair in whole:
        one, other = pair["harmful"].split(), pair["borderline"].split()
        same = difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
        assert same >= 0.6, pair
        assert abs(len(one) - len(other)) <= max(2, 0.2 * len(one)), pair


def test_no_prompt_comes_twice() -> None:
    texts = Counter(
        " ".join(re.findall(r"[a-z0-9']+", row["prompt"].lower()))
        for read in SETS.values() for row in read()
    )  # fmt: skip
    assert [text for text, count in texts.items() if count > 1] == []


# -- reading --------------------------------------------------------------


def test_a_prompt_has_its_history_before_it() -> None:
    row = {
        "prompt": "And now?",
        "history": [["user", "Hello"], ["assistant", "Hi"]],
        "form": "turns",
    }
    prompt = from_record(row, "7")
    assert prompt == Prompt(
        "7", "And now?", form="turns", history=(("user", "Hello"), ("assistant", "Hi"))
    )
    assert [m["role"] for m in prompt.as_dicts()] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    "row", [{}, {"prompt": " "}, {"prompt": 3}, {"prompt": "a", "history": [["tool", "b"]]},
            {"prompt": "a", "history": [["user"]]}]
)  # fmt: skip
def test_rows_that_are_no_prompts(row: dict) -> None:
    with pytest.raises(ValueError):
        from_record(row, "1")


def test_data_files_are_one_object_a_line() -> None:
    for name in ("prompts.jsonl", "calibration.jsonl"):
        text = (resources.files("safegene_edge") / "data" / name).read_text(encoding="utf-8")
        assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
    assert all(load_suite(name)[0].version == "4" for name in DEFAULT_SUITES)
