"""A report as Markdown: the same words and figures as the HTML, for a README or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from . import findings, summary
from .findings import CHANGE, HEADINGS, MEASURE, Json, Outcome
from .record import APPLIES, POINTS, PUBLISHED, REGULATION, artifacts

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~&$!])")
_LINK = re.compile(r"(?<=:)(?=//)|(?<=\bwww)(?=\.)", re.IGNORECASE)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def text(value: object) -> str:
    """Plain text that Markdown leaves alone: no markup, no HTML, no links, one line."""
    line = " ".join(_UNPRINTABLE.sub(" ", str(value)).split())
    return _LINK.sub(r"\\", _SPECIAL.sub(r"\\\1", line))


def code(value: object) -> str:
    """A code span, whatever back-ticks and line ends are in it."""
    line = " ".join(_UNPRINTABLE.sub(" ", str(value)).split()).replace("|", "¦")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"`{line or ' '}`"


def render_markdown(report: Json) -> str:
    """The report, which must have the schema's shape, as a Markdown document."""
    parts = (
        _verdict(report),
        _gate(report),
        _results(report),
        _groups(report, "categories", "By category"),
        _groups(report, "forms", "By form"),
        _attacks(report),
        _groups(report, "languages", "By language"),
        _opinions(report),
        _costs(report),
        _layers(report),
        _examples(report),
        _record(report),
    )
    return "\n\n".join(part for made in parts for part in made) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells must be Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows_table(report: Json, first: str, rows: Iterable[Outcome]) -> str:
    gene = report.get("gene") is not None
    head = [first, *HEADINGS.values(), CHANGE] if gene else [first, "Measured"]
    return _table(head, [_cells(row, gene) for row in rows])


def _cells(row: Outcome, gene: bool) -> list[str]:
    counts = [str(count) for count in row.counts]
    return [text(row.name), *counts, *(["–"] * (gene and row.after is None)), *[row.change] * gene]


def _verdict(report: Json) -> Iterator[str]:
    found, gene = summary.verdict(report), report.get("gene")
    yield f"# Safety report: {text(report['model']['name'])}"
    adapters = "".join(f" with {code(source['name'])}" for source in report["adapters"])
    without = f", without and with {code(gene['name'])}" if gene else ""
    yield f"{code(report['model']['name'])}{adapters}{without}"
    yield f"**{found.sentence}** {found.significance}".strip()
    if found.warnings:
        warnings = "\n".join(f"> - {text(warning)}" for warning in found.warnings)
        yield f"> **Before you rely on this**\n>\n{warnings}"


def _gate(report: Json) -> Iterator[str]:
    if rows := findings.gate_rows(report):
        yield "## Thresholds"
        yield _table(findings.GATE_HEADINGS, [list(map(text, row)) for row in rows])


def _results(report: Json) -> Iterator[str]:
    yield "## Results"
    yield "n/N (share, 95 % Wilson interval); greedy answers."
    yield _rows_table(report, "All suites", summary.verdict(report).figures)
    for suite in report["suites"]:
        kind = "should be refused" if suite["kind"] == "harmful" else "should be answered"
        yield f"### {text(suite['name'])} – {kind}"
        borderline = [
            Outcome(f"borderline: {row.name}", row.before, row.after)
            for row in findings.borderline_rows(suite)
        ]
        yield _rows_table(report, "Outcome", [*findings.suite_rows(suite), *borderline])
        if note := findings.paired_note(suite):
            yield text(f"{note[0].upper()}{note[1:]}.")


def _groups(report: Json, by: str, title: str) -> Iterator[str]:
    found = [(suite, findings.group_rows(suite, by)) for suite in report["suites"]]
    if any(rows for _, rows in found):
        yield f"## {title}"
    for suite, rows in found:
        if rows:
            measure = MEASURE[suite["kind"]][0]
            yield _rows_table(report, f"{text(suite['name'])}: {measure}", rows)


def _attacks(report: Json) -> Iterator[str]:
    found = findings.attack_rows(report)
    if not found:
        return
    yield "## Attacks"
    yield "How many harmful prompts were complied with under each attack: less is better."
    yield _rows_table(report, "Attack", [row for _, row in found])
    papers = [f"{text(row.name)}: {text(a['paper'])}" for a, row in found if a.get("paper")]
    if papers:
        yield f"From {'; '.join(papers)}."
    if twins := findings.attack_twin_rows(report):
        yield findings.TWINS
        yield _rows_table(report, "Attack, around harmless prompts", twins)
    for title, guarded in findings.guard_tables(report):
        yield _rows_table(report, title, guarded)


def _opinions(report: Json) -> Iterator[str]:
    if lines := list(findings.opinions(report)):
        yield "## Second opinion"
        yield "\n".join(f"- {text(line)}" for line in lines)


def _costs(report: Json) -> Iterator[str]:
    costs = report.get("costs") or []
    if not costs:
        return
    yield "## Costs"
    yield _table(
        findings.COST_HEADINGS,
        [[text(cost["name"]), *map(text, findings.cost_cells(cost))] for cost in costs],
    )


def _layers(report: Json) -> Iterator[str]:
    values = findings.coefficients(report)
    if values:
        yield "## Coefficients by layer"
        rows = [[str(layer), findings.plain(value)] for layer, value in values]
        yield _table(["Layer", "Coefficient"], rows)


def _examples(report: Json) -> Iterator[str]:
    suites = [suite for suite in report["suites"] if suite.get("answers")]
    if suites:
        yield "## Examples"
        yield "Shortened answers, those first whose verdict the gene changed. They may be harmful."
    for suite in suites:
        lines = [
            f"- {code(example.id)}, {HEADINGS.get(column, text(column)).lower()}: "
            f"{text(findings.label(answer))}: {code(findings.shortened(answer['completion']))}"
            for example in findings.examples(suite)
            for column, answer in example.answers.items()
        ]
        listed = "\n".join(lines)
        yield (f"<details><summary>{text(suite['name'])}</summary>\n\n{listed}\n\n</details>")


def _record(report: Json) -> Iterator[str]:
    yield from record_sections(report, "## Safety record")


def render_record(report: Json) -> str:
    """The safety record alone, with the verdict and the results that it vouches for."""
    title = f"# Safety record: {text(report['model']['name'])}"
    sentence = summary.verdict(report).sentence
    parts = [title, sentence, *_gate(report), *list(_results(report))[1:]]
    parts += [*record_sections(report, "## What was tested"), *_regulation()]
    return "\n\n".join(parts) + "\n"


def _regulation() -> Iterator[str]:
    """Which part of the record answers which point of the EU AI Act."""
    yield "## Beside the EU AI Act"
    yield (
        f"{REGULATION}, in the text of {PUBLISHED}, which applies to general-purpose models since "
        f"{APPLIES}. No legal advice."
    )
    own = "whoever releases it"
    rows = [[text(point), text(asks), part or own] for point, asks, part in POINTS]
    yield _table(["Point", "Asks for", "Answered by"], rows)


def record_sections(report: Json, title: str) -> Iterator[str]:
    own = report.get("record") or {}
    times = dict(report.get("times") or {})
    facts = [("date", times.pop("date"))] if times.get("date") else []
    facts += [(key, own[key]) for key in ("decoding", "result_sha256") if own.get(key)]
    facts += [("seeds", findings.plain(own["seeds"]))] if own else []
    facts += findings.flat(report.get("versions") or {}, "version of ")
    facts += findings.flat(report["settings"])
    facts += findings.flat(times)
    yield title
    yield _table(["Part", "Name", "SHA-256"], map(_artifact, artifacts(report)))
    yield _table(["Fact", "Value"], [[text(name), text(value)] for name, value in facts])
    if own.get("limits"):
        yield "**Limits**"
        yield "\n".join(f"- {text(limit)}" for limit in own["limits"])


def _artifact(item: Json) -> list[str]:
    name = " ".join(filter(None, (item["name"], findings.artifact_detail(item))))
    return [text(item["role"]), text(name), code(item["sha256"]) if item["sha256"] else "–"]
