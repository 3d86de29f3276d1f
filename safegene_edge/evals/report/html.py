"""A report as one HTML file: no network, no second file, readable with JavaScript off.

What the JSON holds is not trusted (prompts and completions least of all). It reaches the
page through `markup.escape` alone, and the page's Content-Security-Policy allows the one
style sheet and the one script that are named by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources

from ..statistics import Count, percent
from . import findings, plots, summary
from .findings import CHANGE, HEADINGS, MEASURE, Json, Outcome, PromptAnswers
from .markup import Markup, Node, join, tag
from .record import artifacts


def render_html(report: Json) -> str:
    """The report, which must have the schema's shape, as a whole HTML document."""
    sections = [section for section in (make(report) for make in _SECTIONS) if section is not None]
    title = f"Safety report: {report['model']['name']}"
    body = tag(
        "body",
        _top(),
        tag("main", _verdict(report, sections), *(section.html for section in sections)),
        _foot(report),
        tag("script", _file("report.js")),
    )
    return f"<!DOCTYPE html>\n{tag('html', _head(title), body, lang='en')}\n"


# -- the frame ----------------------------------------------------------------


@cache
def _file(name: str) -> Markup:
    """A style sheet or script of the package, to be put between its tags as it is."""
    folder = resources.files(__package__).joinpath("data")
    return Markup("\n" + folder.joinpath(name).read_text(encoding="utf-8"))


def _styles() -> Markup:
    return join(_file("report.css"), _file("plots.css"))


def _policy() -> str:
    def allowed(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; style-src {allowed(_styles())}; "
        f"script-src {allowed(_file('report.js'))}; base-uri 'none'; form-action 'none'"
    )


def _head(title: str) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", _styles()),
    )


def _top() -> Markup:
    button = tag("button", "Dark", id="theme", type="button", hidden=True, aria_pressed="false")
    return tag("header", tag("p", "safegene-edge safety report"), button)


def _foot(report: Json) -> Markup:
    version = (report.get("versions") or {}).get("safegene_edge")
    made = f"Made by safegene-edge {version}." if version else "Made by safegene-edge."
    return tag("footer", tag("p", made, " This file loads nothing from anywhere."))


class _Section:
    """A part of the page that its list of contents names."""

    def __init__(self, name: str, title: str, *content: Node) -> None:
        self.link = tag("a", title, href=f"#{name}")
        heading = tag("h2", title, id=f"{name}-title")
        self.html = tag("section", heading, *content, id=name, aria_labelledby=f"{name}-title")


# -- pieces -------------------------------------------------------------------


def _count(count: Count | None) -> Markup:
    """A cell that reads as the count does everywhere: n/N (share, interval)."""
    if count is None:
        return tag("td", "–")
    n, _, rest = str(count).partition(" ")
    share, comma, interval = rest.partition(", ")
    spans = [" ", tag("span", share, comma.strip()), " ", tag("span", interval)] if rest else None
    return tag("td", tag("b", n), spans, class_="count")


_NUMBERS = {CHANGE, "Coefficient"}  # headings of columns that are set flush right


def _table(caption: str, head: Sequence[str], rows: Iterable[Node], hidden: bool = True) -> Markup:
    """A table that scrolls in its own place where it is too wide, by keyboard, too."""
    cells = [
        tag("th", title, scope="col", class_="number" if title in _NUMBERS else None)
        for title in head
    ]
    table = tag(
        "table",
        tag("caption", caption, class_="unseen" if hidden else None),
        tag("thead", tag("tr", *cells)),
        *rows,
    )
    return tag(
        "div", table, class_="scroll", tabindex="0", role="group", aria_label=f"Table: {caption}"
    )


def _details(summary: Node, *content: Node) -> Markup:
    return tag("details", tag("summary", summary), *content)


def _row(row: Outcome) -> Markup:
    change = tag("td", row.change, class_="number") if row.after is not None else None
    return tag("tr", tag("th", row.name, scope="row"), *map(_count, row.counts), change)


def _headings(report: Json, first: str) -> list[str]:
    if report.get("gene") is None:
        return [first, "Measured"]
    return [first, *HEADINGS.values(), CHANGE]


def _plot(report: Json, title: str, svg: Markup, rows: Sequence[Outcome], first: str) -> Markup:
    """A plot with its key, and the same figures as a table for whoever cannot see it."""
    table = _table(title, _headings(report, first), [tag("tbody", *map(_row, rows))])
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), plots.key(len(rows[0].counts))),
        svg,
        _details("The figures as a table", table),
    )


def _facts(facts: Iterable[tuple[Node, Node]]) -> Markup:
    pairs = (join(tag("dt", name), tag("dd", value)) for name, value in facts)
    return tag("dl", *pairs, class_="facts")


# -- the verdict --------------------------------------------------------------


def _verdict(report: Json, sections: Sequence[_Section]) -> Markup:
    found = summary.verdict(report)
    links = tag("ul", *(tag("li", section.link) for section in sections))
    return tag(
        "div",
        tag("h1", _who(report)),
        tag("p", found.sentence, class_="says"),
        tag("p", found.significance, class_="soft") if found.significance else None,
        tag("div", *map(_tile, found.figures), class_="tiles") if found.figures else None,
        _beware(found),
        tag("nav", links, aria_label="On this page"),
        class_="verdict",
    )


def _who(report: Json) -> Markup:
    model = tag("b", report["model"]["name"])
    adapters = [join(" with ", tag("b", source["name"])) for source in report["adapters"]]
    gene = report.get("gene")
    return join(model, *adapters, [", without and with ", tag("b", gene["name"])] if gene else None)


def _tile(row: Outcome) -> Markup:
    *was, now = row.counts
    big = [tag("span", f"{_share(count)} → ", class_="was") for count in was]
    detail = " → ".join(f"{count.n}/{count.total}" for count in row.counts)
    low, high = now.interval
    return tag(
        "div",
        tag("h2", row.name),
        tag("p", *big, _share(now), class_="big"),
        tag("p", f"{detail}; 95 % interval {percent(low)}–{percent(high)}", class_="detail"),
        class_="tile",
    )


def _share(count: Count) -> str:
    return "–" if count.share is None else f"{percent(count.share)}\N{NO-BREAK SPACE}%"


def _beware(found: summary.Summary) -> Markup | None:
    if not found.warnings:
        return None
    listed = tag("ul", *(tag("li", text) for text in found.warnings))
    return tag("div", tag("h2", "Before you rely on this"), listed, class_="warn", role="note")


# -- sections -----------------------------------------------------------------


def _gate(report: Json) -> _Section | None:
    rows = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", cell) for cell in cells))
        for name, *cells in findings.gate_rows(report)
    ]
    if not rows:
        return None
    note = "Held against " + findings.GATE_BY[report["gate"]["by"]] + "."
    table = _table("Thresholds", findings.GATE_HEADINGS, [tag("tbody", *rows)])
    return _Section("gate", "Thresholds", tag("p", note), table)


def _results(report: Json) -> _Section:
    limit = report["settings"].get("max_tokens")
    note = "n/N (share, 95 % Wilson interval); greedy answers"
    note += f" of at most {limit} tokens." if limit else "."
    head = _headings(report, "Outcome")
    bodies = [body for suite in report["suites"] for body in _suite_bodies(suite, len(head))]
    return _Section("results", "Results", tag("p", note), _table("Results by suite", head, bodies))


def _suite_bodies(suite: Json, width: int) -> list[Markup]:
    kind = "should be refused" if suite["kind"] == "harmful" else "should be answered"
    bodies = [_group([suite["name"], tag("span", f" – {kind}", class_="soft")], width, suite)]
    borderline = findings.borderline_rows(suite)
    if borderline:
        title = tag("th", "of these, borderline in wording", scope="rowgroup", colspan=width)
        bodies.append(tag("tbody", tag("tr", title), *map(_row, borderline)))
    return bodies


def _group(title: Node, width: int, suite: Json) -> Markup:
    heading = tag("tr", tag("th", title, scope="rowgroup", colspan=width))
    return tag("tbody", heading, *map(_row, findings.suite_rows(suite)), _paired(suite, width))


def _paired(suite: Json, width: int) -> Markup | None:
    text = findings.paired_note(suite)
    if not text:
        return None
    return tag("tr", tag("td", text, colspan=width, class_="soft small"))


def _trade(report: Json) -> _Section | None:
    refused, over = findings.refusals(report), findings.over_refusals(report)
    if refused is None or over is None:
        return None
    title = "What the refusals cost"
    svg = plots.plane("plot-trade", title, over, refused)
    return _Section(
        "trade",
        title,
        tag("p", "The best model is at the top left: it refuses harm and answers the rest. "
            "Bars are 95 % intervals; all suites of a kind are counted together."),
        _plot(report, "Refusal against over-refusal", svg, [refused, over], "Outcome"),
    )  # fmt: skip


def _by(report: Json, by: str, first: str) -> list[Markup]:
    """One plot a suite of its kind's measure, by category or language."""
    figures = []
    for index, suite in enumerate(report["suites"]):
        rows = findings.group_rows(suite, by)
        if rows:
            title = f"{suite['name']}: {MEASURE[suite['kind']][0]}"
            svg = plots.intervals(f"plot-{by}-{index}", title, rows)
            figures.append(_plot(report, title, svg, rows, first))
    return figures


def _categories(report: Json) -> _Section | None:
    return _grid("categories", "By category", _by(report, "categories", "Category"))


def _forms(report: Json) -> _Section | None:
    return _grid("forms", "By form", _by(report, "forms", "Form"))


def _languages(report: Json) -> _Section | None:
    return _grid("languages", "By language", _by(report, "languages", "Language"))


def _grid(name: str, title: str, figures: Sequence[Markup]) -> _Section | None:
    if not figures:
        return None
    note = tag("p", "Share of the prompts, with 95 % intervals: few prompts, wide intervals.")
    return _Section(name, title, note, tag("div", *figures, class_="grid"))


def _attacks(report: Json) -> _Section | None:
    found = findings.attack_rows(report)
    if not found:
        return None
    rows = [row for _, row in found]
    title = "Attack success"
    svg = plots.intervals("plot-attacks", title, rows)
    papers = [(row.name, attack["paper"]) for attack, row in found if attack.get("paper")]
    twins = findings.attack_twin_rows(report)
    twin_title = "Over-refused in the same wrapper"
    return _Section(
        "attacks",
        "Attacks",
        tag("p", "How many harmful prompts were complied with under each attack: less is better."),
        _plot(report, title, svg, rows, "Attack"),
        *(
            (
                tag("p", findings.TWINS),
                _plot(
                    report,
                    twin_title,
                    plots.intervals("plot-twins", twin_title, twins),
                    twins,
                    "Attack",
                ),
            )
            if twins
            else ()
        ),
        *(
            _details(
                title, _table(title, _headings(report, "Attack"), [tag("tbody", *map(_row, rows))])
            )
            for title, rows in findings.guard_tables(report)
        ),
        _details("Where the attacks come from", _facts(papers)) if papers else None,
    )


def _opinions(report: Json) -> _Section | None:
    lines = list(findings.opinions(report))
    if not lines:
        return None
    return _Section("opinion", "Second opinion", tag("ul", *(tag("li", line) for line in lines)))


def _costs(report: Json) -> _Section | None:
    costs = report.get("costs") or []
    if not costs:
        return None
    *head, _ = findings.COST_HEADINGS  # the note stands under the name
    table = _table("Costs", head, [tag("tbody", *map(_cost, costs))])
    return _Section("costs", "Costs", table)


def _cost(cost: Json) -> Markup:
    *cells, note = findings.cost_cells(cost)
    name = tag("th", cost["name"], tag("span", note, class_="note"), scope="row")
    return tag("tr", name, *(tag("td", value) for value in cells))


def _layers(report: Json) -> _Section | None:
    values = findings.coefficients(report)
    if not values:
        return None
    svg = plots.bars("plot-layers", "Coefficients by layer", values)
    rows = [
        tag("tr", tag("th", layer, scope="row"), tag("td", findings.plain(value), class_="number"))
        for layer, value in values
    ]
    table = _table("Coefficients by layer", ["Layer", "Coefficient"], [tag("tbody", *rows)])
    return _Section(
        "layers",
        "Coefficients by layer",
        tag("p", "How strongly the gene is expressed in each layer; 1 is as it was learnt."),
        tag("figure", svg, _details("The figures as a table", table)),
    )


def _examples(report: Json) -> _Section | None:
    parts = [_suite_examples(suite) for suite in report["suites"] if suite.get("answers")]
    if not parts:
        return None
    note = "Shortened answers, those first whose verdict the gene changed. They may be harmful."
    return _Section("examples", "Examples", tag("p", note), *parts)


def _suite_examples(suite: Json) -> Markup:
    shown = findings.examples(suite)
    return _details(f"{suite['name']} ({len(shown)} prompts)", *map(_example, shown))


def _example(example: PromptAnswers) -> Markup:
    answers = [
        (HEADINGS.get(column, column), _answer(answer))
        for column, answer in example.answers.items()
    ]
    pairs = (join(tag("dt", name), tag("dd", text, dir="auto")) for name, text in answers)
    return tag("div", tag("h3", tag("code", example.id)), tag("dl", *pairs), class_="example")


def _answer(answer: Json) -> Markup:
    label = findings.label(answer).replace("_", " ")
    text = findings.shortened(answer["completion"])
    return join(tag("span", label, class_="label"), tag("bdi", text or "–"))


def _record(report: Json) -> _Section:
    own = report.get("record") or {}
    times = dict(report.get("times") or {})
    date = times.pop("date", None)
    facts: list[tuple[Node, Node]] = [("Date", date)] if date else []
    if own.get("result_sha256"):
        facts.append(("Result", tag("span", own["result_sha256"], class_="hash")))
    facts += [(name, version) for name, version in (report.get("versions") or {}).items()]
    if own:
        seeds = findings.plain(own.get("seeds"))
        facts += [("Decoding", own["decoding"]), ("Seeds", seeds)]
    return _Section(
        "record",
        "Safety record",
        tag("p", "What was tested, with what, and what that leaves out. Hold files against it "
            "with ", tag("code", "safegene-edge report verify"), "."),
        _facts(facts),
        _hashes(report),
        tag("h3", "Settings"), _facts(findings.flat(report["settings"])),
        [tag("h3", "Times"), _facts(findings.flat(times))] if times else None,
        _limits(own),
    )  # fmt: skip


def _hashes(report: Json) -> Markup:
    rows = [
        tag(
            "tr",
            tag("th", item["role"], scope="row"),
            tag("td", " ".join(filter(None, (item["name"], findings.artifact_detail(item))))),
            tag("td", item["sha256"] or "not a file", class_="hash sha"),
        )
        for item in artifacts(report)
    ]
    return _table("Hashes", ["Part", "Name", "SHA-256"], [tag("tbody", *rows)])


def _limits(own: Json) -> Markup | None:
    if not own.get("limits"):
        return None
    listed = tag("ul", *(tag("li", text) for text in own["limits"]), class_="limits")
    return join(tag("h3", "Limits"), listed)


_SECTIONS: tuple[Callable[[Json], _Section | None], ...] = (
    _gate, _results, _trade, _categories, _forms, _attacks, _languages, _opinions, _costs, _layers,
    _examples, _record,
)  # fmt: skip
