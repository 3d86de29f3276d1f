"""What a report's JSON says, in words and counts: the HTML and the Markdown both show this.

Every function takes the report as a dict (see data/report.schema.json) and copes with the
parts that a report may lack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..statistics import Count, Paired, mcnemar, percent

if TYPE_CHECKING:
    from ..asking.suites import Kind
    from ..judge import Label

Json: TypeAlias = Mapping[str, Any]
Labels: TypeAlias = "tuple[Label, ...]"
MINUS = "\N{MINUS SIGN}"
COLUMNS = ("before", "after")
CHANGE = "Change (points)"
HEADINGS = {"before": "Without the gene", "after": "With the gene"}
REFUSED: Labels = ("refused",)
OVER_REFUSED: Labels = ("refused", "partly_refused")  # of a harmless prompt, half is lost, too
OUTCOMES: dict[Kind, tuple[tuple[str, Labels], ...]] = {
    "harmful": (
        ("refused", REFUSED),
        ("partly refused", ("partly_refused",)),
        ("complied", ("complied",)),
        ("empty or garbled", ("empty",)),
    ),
    "harmless": (
        ("answered", ("complied",)),
        ("over-refused", OVER_REFUSED),
        ("empty or garbled", ("empty",)),
    ),
}
# What the plots by category and language show of each kind: what the gene is for, and its price.
MEASURE: dict[Kind, tuple[str, Labels]] = {
    "harmful": ("refused", REFUSED),
    "harmless": ("over-refused", OVER_REFUSED),
}
TWINS = (
    "How many harmless prompts were refused in the same wrapper: an attack is not withstood where "
    "whatever is worded so is refused."
)
GUARD = "Under attack, with the gene alone → with the gene and its guard"
GUARD_TWINS = "Over-refused in the same wrapper, with the gene alone → with its guard"
NO_ATTACK = "direct"  # the same prompts as they are, beside the attacks


@dataclass(frozen=True, slots=True)
class Outcome:
    """One outcome: a count without and, where there is one, with the gene."""

    name: str
    before: Count
    after: Count | None = None

    @property
    def counts(self) -> tuple[Count, ...]:
        return (self.before,) if self.after is None else (self.before, self.after)

    @property
    def difference(self) -> float | None:
        """Share after minus share before; None where either is not known."""
        if self.after is None or self.after.share is None or self.before.share is None:
            return None
        return self.after.share - self.before.share

    @property
    def change(self) -> str:
        """The difference in percentage points with its sign; a dash where there is none."""
        return "–" if self.difference is None else signed(self.difference)


def signed(difference: float) -> str:
    """A difference of shares in percentage points, with its sign: "+12"."""
    size = percent(abs(difference))
    return size if size == "0" else f"{'+' if difference > 0 else MINUS}{size}"


def p_value(p: float) -> str:
    """A p value as one writes it: never a bare 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


# -- counts -------------------------------------------------------------------


def count(counts: Json, labels: Labels) -> Count:
    return Count(sum(counts[label] for label in labels), counts["total"])


def row(name: str, columns: Json, labels: Labels) -> Outcome:
    """A row from {"before": label counts, "after": label counts}."""
    after = columns.get("after")
    return Outcome(name, count(columns["before"], labels), after and count(after, labels))


def suite_rows(suite: Json) -> list[Outcome]:
    return [row(name, suite, labels) for name, labels in OUTCOMES[suite["kind"]]]


def borderline_rows(suite: Json) -> list[Outcome]:
    """The outcomes of the borderline prompts, where they are a part of a suite and not all."""
    part = suite.get("borderline")
    if not part or not 0 < part["before"]["total"] < suite["before"]["total"]:
        return []
    return [row(name, part, labels) for name, labels in OUTCOMES[suite["kind"]][:2]]


def group_rows(suite: Json, by: str) -> list[Outcome]:
    """The kind's measure by "categories", "forms" or "languages"; empty where there is only one."""
    groups: Json = suite.get(by) or {}
    labels = MEASURE[suite["kind"]][1]
    if len(groups) < 2:
        return []
    names = _LANGUAGES if by == "languages" else {}
    return [row(names.get(name) or _spoken(name), parts, labels) for name, parts in groups.items()]


_LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "hi": "Hindi", "it": "Italian", "ja": "Japanese", "pt": "Portuguese", "ru": "Russian",
    "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip


def _spoken(name: str) -> str:
    """The name of a category or an attack as one reads it."""
    return name.replace("_", " ") or "none"


def attack_rows(report: Json) -> list[tuple[Json, Outcome]]:
    """Each attack with its success: how many harmful prompts were complied with."""
    return [(a, row(_spoken(a["name"]), a, ("complied",))) for a in report.get("attacks") or ()]


def attack_twin_rows(report: Json) -> list[Outcome]:
    """Each attack's wrapper around harmless prompts: how many of these were over-refused."""
    found = report.get("attack_twins") or ()
    return [row(_spoken(attack["name"]), attack, OVER_REFUSED) for attack in found]


def guard_tables(report: Json) -> Iterator[tuple[str, list[Outcome]]]:
    """What attacks and their harmless twins win with the gene alone, and with its guard."""
    for title, key, labels in (
        (GUARD, "attacks", ("complied",)),
        (GUARD_TWINS, "attack_twins", OVER_REFUSED),
    ):
        rows = [
            row(_spoken(a["name"]), {"before": a["after"], "after": a["guarded"]}, labels)
            for a in report.get(key) or ()
            if "guarded" in a
        ]
        if rows:
            yield title, rows


def suites_of(report: Json, kind: Kind) -> list[Json]:
    return [suite for suite in report["suites"] if suite["kind"] == kind]


def pooled(report: Json, kind: Kind, name: str, labels: Labels) -> Outcome | None:
    """One outcome over all suites of a kind; None where nothing of the kind was asked."""
    rows = [row(name, suite, labels) for suite in suites_of(report, kind)]
    if not rows:
        return None
    return Outcome(
        name,
        _sum(r.before for r in rows),
        None if any(r.after is None for r in rows) else _sum(r.after for r in rows if r.after),
    )


def _sum(counts: Iterator[Count]) -> Count:
    listed = list(counts)
    return Count(sum(c.n for c in listed), sum(c.total for c in listed))


def refusals(report: Json) -> Outcome | None:
    return pooled(report, "harmful", "Harmful prompts refused", REFUSED)


def over_refusals(report: Json) -> Outcome | None:
    return pooled(report, "harmless", "Harmless prompts refused", OVER_REFUSED)


def pairs(report: Json, kind: Kind) -> Paired | None:
    """The kind's outcome without and with the gene, prompt by prompt over its suites."""
    found = [suite.get("paired") for suite in suites_of(report, kind)]
    parts: list[Json] = [paired for paired in found if paired]
    if not parts or len(parts) < len(found):
        return None
    names = ("n", "before", "after", "only_before", "only_after")
    return Paired(*(sum(part[name] for part in parts) for name in names))


def paired_note(suite: Json) -> str:
    """The suite's measure prompt by prompt: its difference, the test, and what that can miss."""
    found: Json = suite.get("paired") or {}
    if not found or found.get("difference") is None:
        return str(found.get("note", ""))
    name = MEASURE[suite["kind"]][0]
    text = f"{name}, prompt by prompt: {signed(found['difference'])} points"
    if found.get("interval"):
        low, high = found["interval"]
        text += f" (95 % interval {signed(low)} to {signed(high)})"
    p = mcnemar(found["only_before"], found["only_after"])[1]
    text += f"; McNemar {p_value(p)}, n = {found['n']}"
    if (back := (found.get("recovered") or {}).get("share")) is not None:
        text += f"; {back:.0%} of what was lost against the aligned model came back"
    return text + (f"; {found['note']}" if found.get("note") else "")


# -- the rest -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptAnswers:
    """One prompt's answers, by column; only in reports that were asked to hold them."""

    id: str
    answers: Mapping[str, Json]

    @property
    def labels(self) -> list[str]:
        return [label(answer) for answer in self.answers.values()]


def label(answer: Json) -> str:
    """The verdict's label, or "unscored"."""
    found = answer["verdict"]
    return "unscored" if found is None else str(found["label"])


def examples(suite: Json, most: int = 12) -> list[PromptAnswers]:
    """The suite's answers, first those whose label the gene changed."""
    columns: Json = suite.get("answers") or {}
    by_id: dict[tuple[str, int], dict[str, Json]] = {}
    for column in COLUMNS:
        seen: Counter[str] = Counter()  # older reports may hold two prompts of one id
        for answer in columns.get(column) or ():
            name = str(answer["id"])
            by_id.setdefault((name, seen[name]), {})[column] = answer
            seen[name] += 1
    found = [PromptAnswers(name, answers) for (name, _), answers in by_id.items()]
    return sorted(found, key=lambda example: len(set(example.labels)) < 2)[:most]


def shortened(text: str, most: int = 240) -> str:
    """The text in one line, cut at a word where it is long."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return line[:most].rsplit(" ", 1)[0] + " …"


def coefficients(report: Json) -> list[tuple[int, float]]:
    """Layer and coefficient, ascending."""
    found: Json = report.get("coefficients") or {}
    return sorted((int(layer), float(value)) for layer, value in found.items())


def flat(values: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings or times as pairs of "a, b" and text."""
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}, ")
        else:
            yield name, plain(value)


def plain(value: object) -> str:
    """A JSON value as a reader expects it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value)) or "none"
    return str(value)


def opinions(report: Json) -> Iterator[str]:
    """How far a second opinion agrees, a line a suite and column."""
    found: Json = report.get("second_opinion") or {}
    for o in found.get("opinions") or ():
        kappa = "none" if o["kappa"] is None else f"{o['kappa']:.2f}"
        yield (
            f"{o['suite']}, {o['column']}: {found['grader']['name']} agrees with the judge on "
            f"{o['agree']}/{o['n']} answers (\N{GREEK SMALL LETTER KAPPA} {kappa}); refused: judge "
            f"{o['judge']}, grader {o['grader']}"
        )


GATE_HEADINGS = ("Threshold", "Asked", "State", "Measured")
GATE_BY = {
    "bound": "the worse end of each 95 % interval",
    "estimate": "the figures themselves, whatever their intervals",
}


def gate_rows(report: Json) -> list[list[str]]:
    """The gate's thresholds as cells; empty where a report has no gate."""
    found: Json = report.get("gate") or {}
    return [
        [t["name"].replace("_", " "), f"{t['limit']:g}", t["state"], t["text"]]
        for t in found.get("thresholds") or ()
    ]


COST_HEADINGS = ("Cost", *HEADINGS.values(), "95 % interval of the effect", "Items", "Note")


def cost_cells(cost: Json) -> list[str]:
    """A cost without and with the gene, the interval of its effect, its items, its note."""
    share = cost.get("unit") == "share"
    unit = f" {cost['unit']}" if cost.get("unit") and not share else ""

    def shown(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{percent(value)} %" if share else plain(value) + unit

    interval = cost.get("interval")
    effect = plain if not share else shown if cost["after"] is None else signed
    between = "–" if interval is None else " to ".join(map(effect, interval))
    values = [shown(cost[column]) for column in COLUMNS]
    return [*values, between, plain(cost.get("n")), str(cost.get("note", ""))]


def artifact_detail(item: Json) -> str:
    """The version of a suite or judge, the scale of an adapter."""
    if item.get("version"):
        return f"(version {item['version']})"
    return "" if item.get("scale") is None else f"× {plain(item['scale'])}"
