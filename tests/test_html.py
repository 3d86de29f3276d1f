"""The report as HTML and Markdown: its figures, what it escapes, and how a browser takes it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import reports
from browser import axe_faults

from safegene_edge.evals.report import findings
from safegene_edge.evals.report.html import render_html
from safegene_edge.evals.report.markdown import render_markdown
from safegene_edge.evals.report.markup import Markup, escape, tag
from safegene_edge.evals.statistics import Count

VOID = {"meta", "link", "br", "hr"}


class Page(HTMLParser):
    """A page's elements and table cells; fails where tags are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "script" not in self._open and "style" not in self._open:
            self.text += data
            if "td" in self._open or "th" in self._open:
                self.cells[-1] += data

    def attributes(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


# -- markup -------------------------------------------------------------------


def test_all_but_markup_is_escaped():
    assert tag("p", "<b>", Markup("<i>"), title='"&') == '<p title="&quot;&amp;">&lt;b&gt;<i></p>'
    assert escape("a\x00b\x1f\ud800'") == "a\ufffdb\ufffd\ufffd&#x27;"
    assert escape("\u202e12\u2066") == "\ufffd12\ufffd"  # text that would turn 12 into 21
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert tag("button", hidden=True, disabled=False, class_="x", aria_label=None) == (
        '<button hidden class="x"></button>'
    )


# -- figures ------------------------------------------------------------------


def test_the_figures_are_those_of_the_json():
    report = json.loads(json.dumps(reports.large()))
    cells = Page(render_html(report)).cells
    markdown = render_markdown(report)
    for suite in report["suites"]:
        for name, labels in findings.OUTCOMES[suite["kind"]]:
            counts = [
                str(Count(sum(suite[c][label] for label in labels), suite[c]["total"]))
                for c in ("before", "after")
            ]
            place = cells.index(name)
            while cells[place + 1 : place + 3] != counts:
                place = cells.index(name, place + 1)  # raises where no such row is left
            assert f"| {name} | {' | '.join(counts)} |" in markdown
        for group in suite["categories"].values():
            counts = [
                str(findings.count(group[c], findings.MEASURE[suite["kind"]][1]))
                for c in ("before", "after")
            ]
            assert all(text in cells and text in markdown for text in counts)
    for attack in report["attacks"]:
        counts = [
            str(Count(attack[c]["complied"], attack[c]["total"])) for c in ("before", "after")
        ]
        place = cells.index(attack["name"])
        assert cells[place + 1 : place + 3] == counts
        assert f"| {attack['name']} | {' | '.join(counts)} |" in markdown
    for attack in report["attack_twins"]:
        counts = [
            str(findings.count(attack[c], findings.OVER_REFUSED)) for c in ("before", "after")
        ]
        assert all(text in cells and text in markdown for text in counts)
        assert f"| {attack['name']} | {' | '.join(counts)} |" in markdown


def test_the_plots_show_what_the_json_holds():
    report = reports.large()
    page = Page(render_html(report))
    shown = {attributes.get("cx") for attributes in page.attributes("circle")}
    for attack in report["attacks"]:
        for column in ("before", "after"):
            share = 100 * attack[column]["complied"] / attack[column]["total"]
            assert f"{share:.2f}".rstrip("0").rstrip(".") + "%" in shown
    plots = [a for a in page.attributes("svg") if a.get("role") == "img"]
    ids = {attributes.get("id") for _, attributes in page.tags}
    # Refusal against over-refusal, 2 suites, attacks and their twins, languages, layers.
    assert len(plots) == 7
    for plot in plots:
        assert set(str(plot["aria-labelledby"]).split()) <= ids
    bars = page.attributes("rect")
    assert len(bars) == len(report["coefficients"])
    heights = [float(str(bar["height"])) for bar in bars]
    values = [report["coefficients"][str(layer)] for layer in range(4, 24)]
    ratios = [height / value for height, value in zip(heights, values, strict=True)]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.05)


def test_negative_coefficients_hang_below_nought():
    report = {**reports.large(), "coefficients": {"0": 1.0, "1": -1.0}}
    up, down = Page(render_html(report)).attributes("rect")
    assert float(up["y"]) + float(up["height"]) == float(down["y"])


def test_the_record_is_in_both():
    report = reports.large()
    for text in (render_html(report), render_markdown(report)):
        for digest in ("a" * 64, "b" * 64, "d" * 64, report["record"]["result_sha256"]):
            assert digest in text
        assert "The suites sample known hazards" in text


def test_costs_that_are_shares_read_as_shares():
    cells = ["80 %", "79 %", f"{findings.MINUS}4.0 to +2.0", "100"]
    shown = Page(render_html(reports.large())).cells
    place = shown.index("accuracy, newshigher is better")
    assert shown[place + 1 : place + 5] == cells
    row = ["accuracy, news", *cells, "higher is better"]
    assert f"| {' | '.join(row)} |" in render_markdown(reports.large())


# -- parts that are missing ---------------------------------------------------

OPTIONAL = ("attacks", "attack_twins", "costs", "coefficients", "record", "times", "versions")
OF_SUITE = ("borderline", "categories", "languages", "prompts", "paired", "version")


@pytest.mark.parametrize("part", [*OPTIONAL, *OF_SUITE, "gene", "suites", "everything"])
def test_what_is_missing_is_left_out(part):
    report = reports.large()
    if part in OPTIONAL:
        del report[part]
    elif part in OF_SUITE:
        for suite in report["suites"]:
            del suite[part]
    elif part == "everything":
        report = reports.small()
    else:
        report[part] = None if part == "gene" else []
    Page(render_html(report))
    assert render_markdown(report).startswith("# Safety report")


def test_without_a_gene_there_is_one_column():
    page = Page(render_html(reports.small()))
    assert "Measured" in page.cells
    assert "With the gene" not in page.cells
    assert "1/3 (33 %, 6.1–79)" in page.cells
    assert "| refused | 1/3 (33 %, 6.1–79) |" in render_markdown(reports.small())


def test_a_suite_without_answers_has_no_share():
    report = reports.small()
    report["suites"][0]["before"] = reports.counts(0, 0, 0, 0, unscored=3)
    assert "0/0" in Page(render_html(report)).cells
    assert "3 prompts were not scored" in render_markdown(report)


# -- hostile content ----------------------------------------------------------


def hostile():
    """A report that is hostile wherever it can hold text."""
    report = reports.large()
    for source in (report["model"], report["gene"], *report["adapters"], *report["suites"]):
        source["name"] = reports.HOSTILE
    for suite in report["suites"]:
        suite["categories"][reports.HOSTILE] = suite["categories"].popitem()[1]
        suite["languages"][reports.HOSTILE] = {"before": reports.counts(1, 0, 0, 0)}
        suite["version"] = suite["paired"]["note"] = reports.HOSTILE
        for prompt in suite["prompts"]:
            prompt["id"] += reports.HOSTILE
    for attack in report["attacks"]:
        attack["name"] = attack["paper"] = reports.HOSTILE
    for cost in report["costs"]:
        cost["name"] = cost["note"] = cost["unit"] = reports.HOSTILE
    report["settings"][reports.HOSTILE] = {reports.HOSTILE: reports.HOSTILE}
    report["versions"][reports.HOSTILE] = reports.HOSTILE
    report["times"] = {"date": reports.HOSTILE, "speed": {reports.HOSTILE: 1}}
    return reports.with_answers(report, reports.HOSTILE)


def test_hostile_text_stays_text():
    clean = Page(render_html(reports.with_answers(reports.large(), "fine")))
    page = Page(render_html(hostile()))
    assert len(page.attributes("script")) == 1
    assert not page.attributes("img")
    assert {name for name, _ in page.tags} == {name for name, _ in clean.tags}
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "<script>alert(1)</script>" in page.text


def test_hostile_text_stays_text_in_markdown():
    text = render_markdown(hostile())
    for line in text.split("\n"):
        outside = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        assert "<script" not in outside.replace(r"\<", ""), line
        assert "](" not in outside.replace(r"\]", ""), line
        assert "://" not in outside, line
    assert "\u202e" not in text
    tables = [line for line in text.split("\n") if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    heads = [i for i, line in enumerate(tables) if line.startswith("| ---")]
    for start, end in zip(heads, [*heads[1:], len(tables) + 1], strict=True):
        assert len(set(widths[start - 1 : end - 1])) == 1, tables[start - 1 : end - 1]


def test_the_policy_allows_only_our_own_style_and_script():
    text = render_html(reports.large())
    policy = next(
        str(a["content"])
        for a in Page(text).attributes("meta")
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for name in ("style", "script"):
        (content,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert " style=" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text)


# -- in a browser -------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("html") / "report.html"
    path.write_text(render_html(hostile()), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_has_nothing_to_complain_of(visit, address, width, dark):
    tab = visit(address, width=width, dark=dark)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.reported == []
    assert tab.requested == [address]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_fault(visit, tmp_path, width, dark):
    path = tmp_path / "report.html"
    path.write_text(
        render_html(reports.with_answers(reports.large(), "Well, it depends.")), encoding="utf-8"
    )
    page = visit(path.as_uri(), width=width, dark=dark).page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert axe_faults(page) == []


def test_without_javascript_all_is_there_but_the_toggle(visit, address):
    page = visit(address).page
    without = visit(address, java_script_enabled=False).page
    assert page.is_visible("#theme")
    assert without.locator("#theme[hidden]").count() == 1
    assert without.is_hidden("#theme")
    assert without.inner_text("main") == page.inner_text("main")
    whole = "main => main.outerHTML"
    assert without.locator("main").evaluate(whole) == page.locator("main").evaluate(whole)


def test_the_toggle_changes_the_theme(visit, address):
    tab = visit(address)
    page, paper = tab.page, "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    assert page.get_attribute("#theme", "aria-pressed") == "false"
    page.click("#theme")
    dark = page.evaluate(paper)
    assert dark != light
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert page.evaluate(paper) == dark
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.click("#theme")
    assert page.evaluate(paper) == light
    assert tab.reported == []
