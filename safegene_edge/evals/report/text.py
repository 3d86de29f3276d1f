"""A report as plain text for a terminal: the words and figures of the HTML and the Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from . import findings, summary
from .findings import MEASURE, Json, Outcome


def render_text(report: Json) -> str:
    """The report, which must have the schema's shape, as lines of text."""
    head = ["", "before", *([] if report.get("gene") is None else ["after"])]
    rows = [row for suite in report["suites"] for row in _suite(suite)]
    attacks = findings.attack_rows(report)
    if attacks:
        rows += [["attacks that succeeded"], *_cells((row for _, row in attacks), "  ")]
    if twins := findings.attack_twin_rows(report):
        rows += [["over-refused in the same wrapper"], *_cells(twins, "  ")]
    for title, guarded in findings.guard_tables(report):
        rows += [[title], *_cells(guarded, "  ")]
    return "\n".join([*_in_columns([head, *rows]), "", *_notes(report)])


def _suite(suite: Json) -> Iterator[list[str]]:
    name, kind = suite["name"], suite["kind"]
    yield [name if name == kind else f"{name} ({kind})"]
    yield from _cells(findings.suite_rows(suite), "  ")
    borderline = findings.borderline_rows(suite)
    if borderline:
        yield ["  of these, borderline in wording"]
        yield from _cells(borderline, "    ")
    languages = findings.group_rows(suite, "languages")
    if languages:
        yield [f"  {MEASURE[kind][0]}, by language"]
        yield from _cells(languages, "    ")


def _cells(rows: Iterable[Outcome], indent: str) -> Iterator[list[str]]:
    for row in rows:
        yield [indent + row.name, *map(str, row.counts)]


def _notes(report: Json) -> Iterator[str]:
    limit = report["settings"].get("max_tokens")
    length = f" of at most {limit} tokens" if limit else ""
    yield f"n/N (share, 95 % Wilson interval); greedy answers{length}"
    yield from summary.unscored(report)
    for suite in report["suites"]:
        if note := findings.paired_note(suite):
            yield f"{suite['name']}: {note}"
    yield from findings.opinions(report)
    for cost in report.get("costs") or ():
        values = [text for text in findings.cost_cells(cost)[:2] if text != "–"]
        yield f"{cost['name']}: {' → '.join(values)}"


def _in_columns(rows: list[list[str]]) -> list[str]:
    """Cells in columns; a row may have fewer cells (a title) and then sets no width."""
    n_columns = max(map(len, rows))
    full = [row for row in rows if len(row) == n_columns]
    widths = [max(len(row[i]) for row in full) for i in range(n_columns)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
