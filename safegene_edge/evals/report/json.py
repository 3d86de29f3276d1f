"""A report as JSON values; data/report.schema.json says their shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias

from ..judge import LABELS, Label
from ..statistics import Paired, detectable_difference, mcnemar, power_note, recovered
from .findings import MEASURE
from .results import AlignedLabels, Answer, Answers, AttackResult, Evaluation, SuiteResult

REPORT_VERSION = 1


def report_json(found: Evaluation) -> dict[str, Any]:
    """All of an evaluation but its record; only `times` differs between two equal runs."""
    return {
        "safegene_edge_report": REPORT_VERSION,
        "versions": dict(found.versions),
        "model": asdict(found.model),
        "gene": None if found.gene is None else asdict(found.gene),
        "adapters": [asdict(source) for source in found.adapters],
        "coefficients": {str(layer): value for layer, value in found.coefficients.items()},
        "chat_template_sha256": found.chat_template_sha256,
        "settings": asdict(found.settings),
        "suites": [_whole_suite_json(found, result) for result in found.suites],
        "attacks": [_attack_json(result) for result in found.attacks],
        "attack_twins": [_attack_json(result) for result in found.attack_twins],
        "costs": [cost.to_json() for cost in found.costs],
        "times": dict(found.times),
    }


def _whole_suite_json(found: Evaluation, result: SuiteResult) -> dict[str, Any]:
    suite = result.suite
    aligned = found.aligned.get((suite.name, suite.version or suite.sha256))
    facts = _suite_json(result, found.settings.include_completions)
    paired = paired_json(result, aligned)
    return facts if paired is None else {**facts, "paired": paired}


def label_counts(answers: Iterable[Answer]) -> dict[str, int]:
    """`total` of the judged answers, one count a label, and the `unscored` beside them.

    `unfinished`, of the unscored, are those that never ended their thought, if there are any.
    """
    listed = list(answers)
    labels = [None if a.verdict is None else a.verdict.label for a in listed]
    counts = {str(label): labels.count(label) for label in LABELS}
    unscored = labels.count(None)
    found = {"total": len(labels) - unscored, **counts, "unscored": unscored}
    unfinished = sum(answer.thinking for answer in listed)
    return {**found, "unfinished": unfinished} if unfinished else found


_Grouping: TypeAlias = Literal["category", "form", "language"]


def _groups(result: SuiteResult, name: _Grouping) -> dict[str, SuiteResult]:
    """The result split by an attribute of its prompts, in the suite's order."""
    values = dict.fromkeys(getattr(prompt, name) for prompt in result.suite.prompts)

    def part(answers: Answers, value: str) -> Answers:
        return tuple(a for a in answers if getattr(a.prompt, name) == value)

    return {
        value: replace(
            result,
            before=part(result.before, value),
            after=None if result.after is None else part(result.after, value),
        )
        for value in values
    }


def _borderline(answers: Answers) -> Answers:
    return tuple(answer for answer in answers if answer.prompt.borderline)


def _suite_json(result: SuiteResult, completions: bool) -> dict[str, Any]:
    suite = result.suite
    found: dict[str, Any] = {
        "name": suite.name,
        "kind": suite.kind,
        "version": suite.version,
        "sha256": suite.sha256,
        **{column: label_counts(answers) for column, answers in result.columns.items()},
        "borderline": {c: label_counts(_borderline(a)) for c, a in result.columns.items()},
        "categories": _counts_by(result, "category"),
        "forms": _counts_by(result, "form"),
        "languages": _counts_by(result, "language"),
        "prompts": _prompts_json(result),
    }
    if completions:
        found["answers"] = {
            column: [_answer_json(answer) for answer in answers]
            for column, answers in result.columns.items()
        }
    return found


def _counts_by(result: SuiteResult, name: _Grouping) -> dict[str, dict[str, dict[str, int]]]:
    """Label counts by value and column."""
    return {
        value: {column: label_counts(answers) for column, answers in group.columns.items()}
        for value, group in _groups(result, name).items()
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    verdict = None if answer.verdict is None else asdict(answer.verdict)
    return {"id": answer.prompt.id, "completion": answer.completion, "verdict": verdict}


def _prompts_json(result: SuiteResult) -> list[dict[str, Any]]:
    """Each prompt's id, category and labels; None where it was not scored."""
    return [
        {"id": prompt.id, "category": prompt.category, "form": prompt.form}
        | {column: _label(answers[index]) for column, answers in result.columns.items()}
        for index, prompt in enumerate(result.suite.prompts)
    ]


def _label(answer: Answer) -> Label | None:
    return None if answer.verdict is None else answer.verdict.label


def _attack_json(result: AttackResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "paper": result.paper,
        "suite": result.suite,
        **{column: label_counts(answers) for column, answers in result.columns.items()},
    }


# -- pairs --------------------------------------------------------------------


def _scored(result: SuiteResult) -> list[tuple[str, Label, Label]]:
    """Prompt id and both labels, where both are known."""
    pairs = zip(result.before, result.after or (), strict=True) if result.after else ()
    return [
        (b.prompt.id, b.verdict.label, a.verdict.label) for b, a in pairs if b.verdict and a.verdict
    ]


def paired_json(
    result: SuiteResult, aligned: Mapping[str, str | None] | None = None
) -> dict[str, Any] | None:
    """The suite's outcome prompt by prompt: tests, intervals; None without a second column.

    Args:
        aligned: the aligned model's label by prompt id, for the recovered share.
    """
    if result.after is None:
        return None
    name, labels = MEASURE[result.suite.kind]
    scored = _scored(result)
    pairs = Paired.of([b in labels for _, b, _ in scored], [a in labels for _, _, a in scored])
    exact, mid = mcnemar(pairs.only_before, pairs.only_after)
    found = {
        "outcome": name.replace("-", "_"),
        **asdict(pairs),
        "mcnemar_exact_p": exact,
        "mcnemar_mid_p": mid,
        "difference": pairs.difference,
        "interval": list(pairs.interval()),
        "detectable_difference": detectable_difference(pairs.n, pairs.discordant),
        "note": power_note(pairs),
    }
    if aligned is not None:
        known = [(b in labels, a in labels, aligned[i] in labels) for i, b, a in scored
                 if aligned.get(i) is not None]  # fmt: skip
        if known:
            before, after, reference = (list(column) for column in zip(*known, strict=True))
            share = recovered(before, after, reference)
            ends = None if share.interval is None else list(share.interval)
            found["recovered"] = asdict(share) | {"interval": ends}
    return found


def aligned_labels(facts: Mapping[str, Any]) -> AlignedLabels:
    """The "before" labels of a report on the aligned model, for the recovered share.

    By suite: its name, and its version, or, of a user's own, which has none, its hash.
    """
    return {
        (suite["name"], suite.get("version") or suite["sha256"]): _labels_by_id(
            suite.get("prompts", ())
        )
        for suite in facts["suites"]
    }


def _labels_by_id(prompts: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Labels by prompt id; none of an id that an older report gives to two prompts."""
    counts = Counter(str(prompt["id"]) for prompt in prompts)
    return {i: p["before"] if counts[i] == 1 else None for p in prompts for i in [str(p["id"])]}
