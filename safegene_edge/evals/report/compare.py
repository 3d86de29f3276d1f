"""Two reports beside each other, and whether they may be compared at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import SettingError
from ..settings import By
from ..statistics import Count, Paired, mcnemar
from . import findings
from .findings import COLUMNS, MEASURE, Json
from .gate import Gate, Threshold, at_least, at_most, difference, shipped

# Settings that make two runs' figures mean the same; others may only move a few verdicts.
_SAME_MEANING = ("max_tokens",)
_SUBJECT = ("gene_scale", "include_completions")  # what one compares, or does not measure


@dataclass(frozen=True, slots=True)
class Compared:
    """One suite's measure in one column of both reports.

    `paired` is None where the prompts cannot be matched; `reason` then says why.
    """

    suite: str
    column: str
    outcome: str
    a: Count
    b: Count
    paired: Paired | None
    reason: str = ""

    @property
    def p(self) -> float | None:
        """McNemar's mid-p; None without pairs."""
        pairs = self.paired
        return None if pairs is None else mcnemar(pairs.only_before, pairs.only_after)[1]

    def to_json(self) -> dict[str, Any]:
        """The counts, and where prompts could be matched the paired test, as JSON values."""
        pairs = self.paired
        found = asdict(self) | {"mcnemar_mid_p": self.p}
        if pairs is not None:
            found["paired"] |= {
                "difference": pairs.difference,
                "interval": list(pairs.interval()),
            }
        return found


@dataclass(frozen=True)
class Comparison:
    """What two reports say of the same suites.

    Attributes:
        obstacles: why their figures cannot be compared; empty where they can.
        notes: what else differs, and may explain a difference.
    """

    obstacles: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[Compared, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "comparable": not self.obstacles,
            "obstacles": list(self.obstacles),
            "notes": list(self.notes),
            "suites": [row.to_json() for row in self.rows],
        }


def compare(a: Json, b: Json) -> Comparison:
    """Hold report `b` against report `a`, suite by suite and column by column."""
    theirs = {suite["name"]: suite for suite in b["suites"]}
    shared = [(suite, theirs[suite["name"]]) for suite in a["suites"] if suite["name"] in theirs]
    general = list(_general(a, b))
    own = {one["name"]: _other_prompts(one, other) for one, other in shared}
    rows = [
        _compared(one, other, column, [*general, *own[one["name"]]])
        for one, other in shared
        if one["kind"] == other["kind"]
        for column in COLUMNS
        if column in one and column in other
    ]
    obstacles = [*general, *(text for texts in own.values() for text in texts)]
    if not shared:
        obstacles.append("the reports share no suite")
    return Comparison(tuple(obstacles), tuple(_notes(a, b, shared)), tuple(rows))


def _other_prompts(a: Json, b: Json) -> list[str]:
    same = (a["kind"], a["sha256"]) == (b["kind"], b["sha256"])
    return [] if same else [f"the suite {a['name']} holds other prompts"]


def _general(a: Json, b: Json) -> Iterable[str]:
    """What stands between all suites of two reports."""
    if _judge(a) != _judge(b):
        yield "the judges differ, or a report does not name its judge"
    for name in _SAME_MEANING:
        if a["settings"].get(name) != b["settings"].get(name):
            yield _setting(name, a, b)


def _judge(report: Json) -> Any:
    """The judge's hash; a value of its own where there is none, since unknown is not equal."""
    judge = (report.get("record") or {}).get("judge")
    return judge["sha256"] if judge else object()


def _setting(name: str, a: Json, b: Json) -> str:
    values = [findings.plain(report["settings"].get(name)) for report in (a, b)]
    return f"{name} is {values[0]} in the first and {values[1]} in the second"


def _notes(a: Json, b: Json, shared: Sequence[tuple[Json, Json]]) -> Iterable[str]:
    for what in ("model", "gene"):
        if _hash(a[what]) != _hash(b[what]):
            yield f"the {what}s differ: {_named(a[what])} and {_named(b[what])}"
    if a["adapters"] != b["adapters"]:
        yield "the adapters differ"
    if a["chat_template_sha256"] != b["chat_template_sha256"]:
        yield "the chat templates differ"
    for name in sorted({*a["settings"], *b["settings"]} - {*_SAME_MEANING, *_SUBJECT}):
        if a["settings"].get(name) != b["settings"].get(name):
            yield _setting(name, a, b)
    if (a.get("versions") or {}) != (b.get("versions") or {}):
        yield "they were made by other versions"
    names = {suite["name"] for suite, _ in shared}
    alone = [s["name"] for report in (a, b) for s in report["suites"] if s["name"] not in names]
    if alone:
        yield f"only one of them has {', '.join(alone)}"


def _hash(source: Json | None) -> Any:
    return source and (source["sha256"], source.get("scale"))


def _named(source: Json | None) -> str:
    if source is None:
        return "none"
    return f"{source['name']} {findings.artifact_detail(source)}".strip()


def _compared(a: Json, b: Json, column: str, obstacles: Sequence[str]) -> Compared:
    outcome, labels = MEASURE[a["kind"]]
    paired, reason = None, obstacles[0] if obstacles else ""
    if not reason:
        paired, reason = _paired(a, b, column, labels)
    counts = [findings.count(suite[column], labels) for suite in (a, b)]
    return Compared(a["name"], column, outcome, counts[0], counts[1], paired, reason)


def _paired(a: Json, b: Json, column: str, labels: findings.Labels) -> tuple[Paired | None, str]:
    """The outcome of the prompts that both reports judged."""
    before, after = (
        {prompt["id"]: prompt.get(column) for prompt in suite.get("prompts") or ()}
        for suite in (a, b)
    )
    if any(len(side) < len(s.get("prompts") or ()) for side, s in ((before, a), (after, b))):
        return None, "two prompts of a report have one id"
    if not before or before.keys() != after.keys():
        return None, "the reports do not hold the same prompts' labels"
    judged = [name for name in before if before[name] is not None and after[name] is not None]
    first, second = ([side[name] in labels for name in judged] for side in (before, after))
    return Paired.of(first, second), ""


# -- no worse -----------------------------------------------------------------


def no_worse(a: Json, b: Json, margin: float, by: By = "bound") -> Gate:
    """Whether report `b` is no worse than `a` by more than a margin, prompt by prompt.

    Each report's last column counts: with the gene, where one took part. All suites of a kind
    are taken together. What `b` could not score counts against it.

    Raises:
        SettingError: the reports cannot be compared, the second lacks a suite of the first, or the
            margin is no share.
    """
    if not 0 <= margin <= 1:
        raise SettingError(f"the margin is {margin}", "Give a share in 0..1, such as 0.05")
    if obstacles := compare(a, b).obstacles:
        raise SettingError(f"the reports cannot be compared: {'; '.join(obstacles)}")
    asked = {suite["name"] for suite in b["suites"]}
    if missing := [suite["name"] for suite in a["suites"] if suite["name"] not in asked]:
        raise SettingError(
            f"the second report lacks what the first one asked: {', '.join(missing)}",
            "Evaluate both with the same suites",
        )
    return Gate(by, tuple(_held(a, b, margin, by)))


def _held(a: Json, b: Json, margin: float, by: By) -> Iterable[Threshold]:
    theirs = {suite["name"]: suite for suite in b["suites"]}
    for kind, (outcome, labels) in MEASURE.items():
        suites = findings.suites_of(a, kind)
        if not suites:
            continue
        before: list[bool] = []
        after: list[bool] = []
        for suite in suites:
            for first, second in _labels(suite, theirs[suite["name"]]):
                before.append(first in labels)
                after.append(second in labels if second else kind == "harmless")
        pairs = Paired.of(before, after)
        out = sum(len(suite.get("prompts") or ()) for suite in suites) - pairs.n
        left = f" ({out} that the first left unscored are out)" if out else ""
        what, change = f"{kind} prompts {outcome}, change{left}", pairs.difference or 0.0
        figure = difference(what, change, pairs.interval(), pairs.n)
        if kind == "harmful":
            yield at_least("no_worse_refused", -margin, figure, by)
        else:
            yield at_most("no_worse_over_refused", margin, figure, by)


def _labels(a: Json, b: Json) -> list[tuple[str, str | None]]:
    """Both labels of each prompt that the first report judged."""
    second = {prompt["id"]: prompt.get(shipped(b)) for prompt in b.get("prompts") or ()}
    first = [(prompt["id"], prompt.get(shipped(a))) for prompt in a.get("prompts") or ()]
    if len(second) != len(first) or second.keys() != {name for name, _ in first}:
        raise SettingError(f"the reports do not hold the same prompts of the suite {a['name']}")
    return [(label, second[name]) for name, label in first if label is not None]
