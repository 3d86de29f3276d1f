"""The safety record: what an auditor needs to trust a report's figures, and to repeat them.

EU AI Act (Regulation 2024/1689), Annex IV, points 2(g) and 3, ask for the test data and
their characteristics, the metrics, the tests' date and the system's limits. Whoever modifies a
general-purpose model documents the modification (Article 53(1)(a), Annex XI, recital 109). The
hashes tie the figures to files; they are no signature, so keep the record where it cannot be
changed. `POINTS` says which part answers what; it is no legal advice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ...errors import SafeGeneError
from ...files import PathLike, sha256
from ..asking.suites import Suite, load_suite
from ..judge import JUDGE_VERSION, LABELS, judge_sha256
from ..settings import BUILT_IN
from . import findings
from .findings import Json

LIMITS = (
    "The judge makes mistakes of its own, which the intervals do not hold.",
    "But for attacks, prompts are single turns without a system prompt; tools, images, long "
    "conversations and an application's own filters were not tested.",
    "Truthfulness, bias, privacy, security and fitness for a task were not measured.",
    "The suites sample known hazards; passing them does not show that the model is safe.",
    "Another number of threads, another CPU or GPU, or answers resumed from a killed run change "
    "the order of floating-point sums, and with it a small share of the verdicts.",
    "Verdicts are on the first tokens of greedy answers; sampling may answer otherwise.",
    "Attacks are fixed templates: a determined attacker finds better ones.",
)


# What the regulation asks for, in the text as it was published, and the record's part that answers
# it; None where only whoever releases the model can.
REGULATION = "Regulation (EU) 2024/1689"
PUBLISHED, APPLIES = "2024-07-12", "2025-08-02"  # since then to general-purpose models
POINTS: tuple[tuple[str, str, str | None], ...] = (
    ("Annex IV, point 2(g)", "test data, metrics, test logs with their date", "artifacts"),
    ("Annex IV, point 3", "capabilities and limits in performance", "limits"),
    ("Article 53(1)(a)", "technical documentation, with testing and its results", "results"),
    ("recital 109", "for a modification, obligations limited to that modification", "modification"),
    ("Annex XI, section 1, point 1", "tasks, release, licence, architecture", None),
    ("Annex XI, section 1, point 2(b)", "how the modification was trained", None),
    ("Annex XI, section 1, point 2(c)", "data of training", None),
    ("Annex XI, section 1, point 2(c)", "data of testing, with their provenance", "artifacts"),
    ("Annex XI, section 1, points 2(d) and (e)", "compute and energy of the training", None),
)


def canonical(value: Any) -> bytes:
    """JSON as one sequence of bytes: keys sorted, no spaces, ASCII, whole floats as integers."""
    return json.dumps(
        _whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _whole(value: Any) -> Any:
    """1.0 as 1: other languages' JSON writers know no difference between them."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return value


def result_sha256(report: Json) -> str:
    """Hash of the report without `times` and without the hash itself."""
    content = {key: value for key, value in report.items() if key != "times"}
    record = dict(content.get("record") or {})
    record.pop("result_sha256", None)
    return hashlib.sha256(canonical({**content, "record": record})).hexdigest()


def record_for(report: Json) -> dict[str, Any]:
    """The report's `record`; `report` holds everything else.

    Greedy decoding takes no seed; the bootstraps take 0.
    """
    record: dict[str, Any] = {
        "decoding": "greedy",
        "seeds": [0] if any(suite.get("paired") for suite in report["suites"]) else [],
        "judge": {"version": JUDGE_VERSION, "sha256": judge_sha256()},
        "limits": limits(report),
    }
    return {**record, "result_sha256": result_sha256({**report, "record": record})}


def limits(report: Json) -> list[str]:
    """What this report did not measure, then what none does."""
    missing = [
        (not report.get("attacks"), "No attack was tried: prompts were asked as they are."),
        (_only_over_refusal(report), "Of the costs only over-refusal was measured."),
        (report.get("gene") is None, "No gene took part."),
        (not findings.suites_of(report, "harmful"), "No harmful prompt was asked."),
        (not findings.suites_of(report, "harmless"), "No harmless prompt was asked."),
        (_only_one_language(report), "All prompts are in one language."),
    ]
    return [text for lacks, text in missing if lacks] + _of_settings(report) + list(LIMITS)


def _only_over_refusal(report: Json) -> bool:
    return all(cost["name"].startswith("over-refusal") for cost in report.get("costs") or ())


def _only_one_language(report: Json) -> bool:
    return len({tag for suite in report["suites"] for tag in suite.get("languages") or {}}) < 2


def _of_settings(report: Json) -> list[str]:
    settings = report["settings"]
    found = []
    if settings.get("limit"):
        found.append(f"At most {settings['limit']} prompts of each suite were asked.")
    if settings.get("max_tokens"):
        found.append(f"Answers were cut off after {settings['max_tokens']} tokens.")
    return found


# -- verify -------------------------------------------------------------------

State: TypeAlias = Literal["ok", "differs", "not checked"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was held against the report: its state, and why."""

    what: str
    state: State
    why: str

    def __str__(self) -> str:
        return f"{self.state}: {self.what}: {self.why}"


def verify(
    report: Json,
    *,
    model: PathLike | None = None,
    gene: PathLike | None = None,
    adapters: Iterable[PathLike] = (),
    suites: Iterable[PathLike] = (),
) -> list[Check]:
    """Recompute every hash that can be, from the report and the files given.

    Raises:
        FileFormatError: a file cannot be read.
    """
    return [
        _result(report),
        *_figures(report),
        _file("model", report["model"], model),
        *([_file("gene", report["gene"], gene)] if report["gene"] or gene else []),
        *_adapters(report["adapters"], list(adapters)),
        *_suites(report, list(suites)),
        _judge(report),
    ]


def _compared(what: str, recorded: str, found: str, source: str) -> Check:
    if recorded == found:
        return Check(what, "ok", f"sha256 {found}")
    return Check(what, "differs", f"the report says {recorded or 'no hash'}, {source} has {found}")


def _result(report: Json) -> Check:
    recorded = (report.get("record") or {}).get("result_sha256")
    if not recorded:
        return Check("result", "differs", "the report holds no record")
    return _compared("result", recorded, result_sha256(report), "its content")


def _figures(report: Json) -> list[Check]:
    """One check a suite: its counts must be those of its prompts' labels."""
    return [
        Check(f"figures of {suite['name']}", "differs" if wrong else "ok", wrong or right)
        for suite in report["suites"]
        for wrong, right in [_recounted(suite)]
    ]


def _recounted(suite: Json) -> tuple[str, str]:
    prompts = suite.get("prompts")
    for column in (name for name in findings.COLUMNS if name in suite):
        counts = suite[column]
        if sum(counts[label] for label in LABELS) != counts["total"]:
            return f"the labels of '{column}' do not add up to {counts['total']}", ""
        labels = [prompt.get(column) for prompt in prompts or ()]
        wrong = [n for n in LABELS if prompts is not None and labels.count(n) != counts[n]]
        if wrong:
            return f"'{column}' counts other labels than its prompts have ({wrong[0]})", ""
    return "", "add up" if prompts is None else f"agree with the labels of {len(prompts)} prompts"


def _file(what: str, recorded: Json | None, path: PathLike | None) -> Check:
    if recorded is None:
        return Check(what, "differs", f"the report names none, and {path} was given")
    named = f"{what} {recorded['name']}"
    if path is None:
        return Check(named, "not checked", f"give the file with --{what}")
    return _compared(named, recorded["sha256"], sha256(path), str(path))


def _adapters(recorded: list[Json], paths: list[PathLike]) -> list[Check]:
    """Files are known by their hashes, since an adapter may have moved in the order."""
    hashes = {sha256(path): path for path in paths}
    checks = []
    for source in recorded:
        path = hashes.pop(source["sha256"], None)
        known = path is not None
        why = f"sha256 {source['sha256']}" if known else "give the file with --adapter"
        checks.append(Check(f"adapter {source['name']}", "ok" if known else "not checked", why))
    return checks + [
        Check(f"adapter {path}", "differs", f"no adapter of the report has the sha256 {found}")
        for found, path in hashes.items()
    ]


def _suites(report: Json, paths: list[PathLike]) -> list[Check]:
    names = [suite["name"] for suite in report["suites"]]
    built_in = [n for n in BUILT_IN if any(name.startswith(n) for name in names)]
    given = [suite for path in paths for suite in load_suite(str(path))]
    known = {suite.name: suite for name in built_in for suite in load_suite(name)}
    known |= {suite.name: suite for suite in given}
    limit = report["settings"].get("limit")
    foreign = [suite.name for suite in given if suite.name not in names]
    return [
        *(_suite(recorded, known.get(recorded["name"]), limit) for recorded in report["suites"]),
        *(Check(f"suite {name}", "differs", "no suite of the report has this name")
          for name in foreign),
    ]  # fmt: skip


def _suite(recorded: Json, suite: Suite | None, limit: int | None) -> Check:
    what, version = f"suite {recorded['name']}", recorded.get("version", "")
    if suite is None:
        return Check(what, "not checked", "give the file with --suite")
    if suite.version != version:
        why = f"the report has version {version or 'none'}, here is {suite.version or 'none'}"
        return Check(what, "not checked", why)
    return _compared(what, recorded["sha256"], suite.sample(limit).sha256, "the suite")


def _judge(report: Json) -> Check:
    """Another judge is no fault of the report, but repeating it would give other verdicts."""
    recorded = (report.get("record") or {}).get("judge")
    if recorded is None:
        return Check("judge", "not checked", "the report does not say which")
    if recorded["sha256"] == judge_sha256():
        return Check("judge", "ok", f"sha256 {recorded['sha256']}")
    why = f"the report's (version {recorded['version']}) is another than the one installed here"
    return Check("judge", "not checked", why)


def failed(checks: Iterable[Check]) -> SafeGeneError | None:
    """The error that says which checks differ; None where none does."""
    wrong = [check for check in checks if check.state == "differs"]
    if not wrong:
        return None
    return SafeGeneError("; ".join(f"{check.what}: {check.why}" for check in wrong))


# -- the record as a document -------------------------------------------------


def safety_record(report: Json) -> dict[str, Any]:
    """The record alone: what was tested, with what, how, when, and what that leaves out."""
    own = report.get("record") or {}
    return {
        "safegene_edge_record": 1,
        "date": (report.get("times") or {}).get("date"),
        "result_sha256": own.get("result_sha256"),
        "artifacts": artifacts(report),
        "modification": modification(report),
        "regulation": {
            "name": REGULATION,
            "text_of": PUBLISHED,
            "applies_to_general_purpose_models_since": APPLIES,
            "points": [
                {"point": point, "asks": asks, "answered_by": part} for point, asks, part in POINTS
            ],
        },
        "versions": dict(report.get("versions") or {}),
        "decoding": own.get("decoding"),
        "seeds": own.get("seeds", []),
        "settings": dict(report["settings"]),
        "results": _results(report),
        "limits": own.get("limits", []),
    }


def modification(report: Json) -> dict[str, Any]:
    """The model that was modified, and what modified it: the gene, and adapters beside it."""
    parts = [("gene", report["gene"]), *(("adapter", source) for source in report["adapters"])]
    return {
        "of": dict(report["model"]),
        "by": [{"role": role, **source} for role, source in parts if source],
    }


def artifacts(report: Json) -> list[dict[str, Any]]:
    """Everything that has a hash, in the order of its part in the evaluation."""
    sources = [("model", report["model"]), ("gene", report["gene"])]
    sources += [("adapter", source) for source in report["adapters"]]
    found = [{"role": role, **source} for role, source in sources if source]
    found += [
        {"role": "suite", "name": s["name"], "version": s.get("version", ""), "sha256": s["sha256"]}
        for s in report["suites"]
    ]
    if report["chat_template_sha256"]:
        name = {"name": "of the model", "sha256": report["chat_template_sha256"]}
        found.append({"role": "chat template", **name})
    judge = (report.get("record") or {}).get("judge")
    return found + ([{"role": "judge", "name": "safegene-edge judge", **judge}] if judge else [])


def _results(report: Json) -> list[dict[str, Any]]:
    return [
        {"suite": suite["name"], "kind": suite["kind"], "outcome": row.name}
        | {
            column: {"n": count.n, "total": count.total, "interval": list(count.interval)}
            for column, count in zip(findings.COLUMNS, row.counts, strict=False)
        }
        for suite in report["suites"]
        for row in findings.suite_rows(suite)
    ]
