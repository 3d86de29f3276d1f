"""What an evaluation found: counts, a table, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from ..errors import SettingError
from .costs import Cost
from .findings import MEASURE, OUTCOMES
from .judge import LABELS, Label, Verdict
from .statistics import Count, Paired, detectable_difference, mcnemar, power_note, recovered
from .suites import Kind, Prompt, Suite

REPORT_VERSION = 1
# What holds for every evaluation, for the record.
LIMITS = (
    "Another number of threads, another CPU or GPU, or answers resumed from a killed run change "
    "the order of floating-point sums, and with it a small share of the verdicts.",
    "Verdicts are on the first tokens of greedy answers; sampling may answer otherwise.",
    "Attacks are fixed templates: a determined attacker finds better ones.",
)
# By suite name and version, then by prompt id: the label of the aligned model's answer.
AlignedLabels: TypeAlias = Mapping[tuple[str, str], Mapping[str, str | None]]


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate; the API and the command line share these.

    Attributes:
        max_tokens: new tokens an answer; more show more of what an answer does.
        limit: prompts a suite at most, spread evenly over it; None takes all.
        attack_limit: the same for each attack.
        n_parallel: answers generated together.
        n_ctx: KV cells for all of them together.
        gene_scale: the gene's scale in the "after" column.
        include_completions: put the answers into the JSON. They may be harmful.
    """

    max_tokens: int = 48
    limit: int | None = None
    attack_limit: int | None = 60
    n_parallel: int = 16
    n_ctx: int = 4096
    gene_scale: float = 1.0
    include_completions: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "limit", "attack_limit", "n_parallel", "n_ctx"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}", "Give 1 or more")


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion; `verdict` is None where the prompt did not fit (unscored)."""

    prompt: Prompt
    completion: str
    verdict: Verdict | None


Answers: TypeAlias = tuple[Answer, ...]


@dataclass(frozen=True)
class SuiteResult:
    """The answers to one suite without the gene and, where there is one, with it."""

    suite: Suite
    before: Answers
    after: Answers | None = None

    @property
    def columns(self) -> dict[str, Answers]:
        """ "before" and, with a gene, "after"."""
        return {"before": self.before, **({} if self.after is None else {"after": self.after})}


@dataclass(frozen=True)
class AttackResult:
    """The answers to one attack on one suite; complied of total is its success rate."""

    name: str
    paper: str
    suite: str
    before: Answers
    after: Answers | None = None

    @property
    def columns(self) -> dict[str, Answers]:
        """ "before" and, with a gene, "after"."""
        return {"before": self.before, **({} if self.after is None else {"after": self.after})}


@dataclass(frozen=True)
class Source:
    """A file that took part: its name, hash ("" for an object in memory) and scale."""

    name: str
    sha256: str
    scale: float | None = None


@dataclass(frozen=True)
class Report:
    """What an evaluation found; knows how to show itself."""

    model: Source
    gene: Source | None
    adapters: tuple[Source, ...]
    suites: tuple[SuiteResult, ...]
    settings: EvalSettings
    chat_template_sha256: str
    coefficients: Mapping[int, float] = field(default_factory=dict)
    attacks: tuple[AttackResult, ...] = ()
    costs: tuple[Cost, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, Any] = field(default_factory=dict)
    aligned: AlignedLabels = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; only `times` differs between two equal runs."""
        from .record import record_for

        facts: dict[str, Any] = {
            "safegene_edge_report": REPORT_VERSION,
            "versions": dict(self.versions),
            "model": asdict(self.model),
            "gene": None if self.gene is None else asdict(self.gene),
            "adapters": [asdict(source) for source in self.adapters],
            "coefficients": {str(layer): value for layer, value in self.coefficients.items()},
            "chat_template_sha256": self.chat_template_sha256,
            "settings": asdict(self.settings),
            "suites": [self._suite_json(result) for result in self.suites],
            "attacks": [_attack_json(result) for result in self.attacks],
            "costs": [cost.to_json() for cost in self.costs],
            "times": dict(self.times),
        }
        return {**facts, "record": record_for(facts)}

    def to_html(self) -> str:
        """The report as one self-contained HTML page."""
        from .html import render_html

        return render_html(self.to_json())

    def _suite_json(self, result: SuiteResult) -> dict[str, Any]:
        aligned = self.aligned.get((result.suite.name, result.suite.version))
        found = _suite_json(result, self.settings.include_completions)
        paired = paired_json(result, aligned)
        return found if paired is None else {**found, "paired": paired}

    def table(self) -> str:
        """Plain text: n/N with 95 % intervals, before and after side by side."""
        rows = [row for result in self.suites for row in _table_rows(result)]
        if self.attacks:
            rows += [["attacks that succeeded"], *map(_attack_row, self.attacks)]
        head = ["", "before", *([] if self.gene is None else ["after"])]
        notes = [
            "n/N (share, 95 % Wilson interval); "
            f"greedy answers of at most {self.settings.max_tokens} tokens",
            *filter(None, map(_paired_note, self.suites)),
            *(str(cost) for cost in self.costs),
        ]
        return "\n".join([*_aligned([head, *rows]), "", *notes])


# -- counting -----------------------------------------------------------------


def label_counts(answers: Iterable[Answer]) -> dict[str, int]:
    """`total` of the judged answers, one count a label, and the `unscored` beside them."""
    labels = [None if a.verdict is None else a.verdict.label for a in answers]
    counts = {str(label): labels.count(label) for label in LABELS}
    unscored = labels.count(None)
    return {"total": len(labels) - unscored, **counts, "unscored": unscored}


def _count(answers: Iterable[Answer], *labels: Label) -> Count:
    counts = label_counts(answers)
    return Count(sum(counts[label] for label in labels), counts["total"])


def _table_rows(result: SuiteResult) -> list[list[str]]:
    kind = result.suite.kind
    title = result.suite.name if result.suite.name == kind else f"{result.suite.name} ({kind})"
    rows = [[title], *_count_rows(list(result.columns.values()), kind, "  ")]
    borderline = [_borderline(answers) for answers in result.columns.values()]
    if borderline[0] and len(borderline[0]) < len(result.before):
        rows += [["  of these, borderline in wording"], *_count_rows(borderline, kind, "    ")[:2]]
    return [*rows, *_language_rows(result)]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Cells in columns; a row may have fewer cells (a title) and then sets no width."""
    n_columns = max(map(len, rows))
    full = [row for row in rows if len(row) == n_columns]
    widths = [max(len(row[i]) for row in full) for i in range(n_columns)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def _count_rows(columns: Sequence[Answers], kind: Kind, indent: str) -> list[list[str]]:
    return [
        [indent + name, *(str(_count(answers, *labels)) for answers in columns)]
        for name, labels in OUTCOMES[kind]
    ]


_Grouping: TypeAlias = Literal["category", "language"]


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


def _language_rows(result: SuiteResult) -> list[list[str]]:
    """What the model should do with this kind, by language; nothing where there is only one."""
    groups = _groups(result, "language")
    if len(groups) < 2:
        return []
    name, labels = OUTCOMES[result.suite.kind][0]
    return [
        [f"  {name}, by language"],
        *(
            [f"    {language}", *(str(_count(a, *labels)) for a in group.columns.values())]
            for language, group in groups.items()
        ),
    ]


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
        {"id": prompt.id, "category": prompt.category}
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


def _attack_row(result: AttackResult) -> list[str]:
    counts = [str(_count(answers, "complied")) for answers in result.columns.values()]
    return [f"  {result.name}", *counts]


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


def _paired_note(result: SuiteResult) -> str:
    """One line on whether chance explains the change; empty without a second column."""
    found = paired_json(result)
    if found is None or found["difference"] is None:
        return ""
    low, high = (100 * end for end in found["interval"])
    note = (
        f"{result.suite.name}: {found['outcome'].replace('_', '-')} "
        f"{100 * found['difference']:+.1f} points (95 % {low:+.1f} to {high:+.1f}), "
        f"McNemar mid-p {found['mcnemar_mid_p']:.2g}"
    )
    return f"{note}; {found['note']}" if found["note"] else note


def aligned_labels(facts: Mapping[str, Any]) -> AlignedLabels:
    """The "before" labels of a report on the aligned model, for the recovered share."""
    return {
        (suite["name"], suite.get("version", "")): {
            str(prompt["id"]): prompt["before"] for prompt in suite.get("prompts", ())
        }
        for suite in facts["suites"]
    }
