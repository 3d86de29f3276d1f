"""The pictures of `--plot`: well-formed, of one style, and every figure is in them."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from importlib import resources

import pytest
import reports

from safegene_edge.cli import main
from safegene_edge.errors import SettingError
from safegene_edge.evals.report import findings, pictures
from safegene_edge.evals.statistics import Count
from safegene_edge.gene import SHIPPED, SafetyGene
from safegene_edge.portfolio import PortfolioRow, picture
from safegene_edge.recalibrate.results import Point

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [Point((0.0,), 4.0, 0.0), Point((1.0,), 2.0, 0.05), Point((2.0,), 1.0, 0.5)]


def titles(text, tag):
    root = ElementTree.fromstring(text)
    return [node.find(f"{SVG}title").text for node in root.iter(f"{SVG}{tag}") if len(node)]


def words(text):
    return [node.text for node in ElementTree.fromstring(text).iter(f"{SVG}text")]


def every_picture():
    gene = SafetyGene.shipped()
    rows = [PortfolioRow("m.gguf", (Count(3, 10), Count(9, 10)), (Count(1, 10), Count(2, 10)))]
    return {
        "scores": pictures.of_scores(gene.scores, gene.layers),
        "curve": pictures.of_curve(POINTS, POINTS[1], 0.1),
        "report": pictures.of_report(reports.large()),
        "portfolio": picture(rows),
    }


def test_every_layer_has_its_bar_and_the_kept_ones_say_so():
    gene = SafetyGene.shipped()
    bars = titles(pictures.of_scores(gene.scores, gene.layers), "rect")
    assert len(bars) == len(gene.scores) == 30
    kept = {int(bar.split(":")[0].split()[1]) for bar in bars if bar.endswith("kept")}
    assert kept == set(gene.layers)


def test_every_point_near_the_budget_has_its_dot():
    dots = titles(pictures.of_curve(POINTS, POINTS[1], 0.1), "circle")
    assert dots == ["refusal loss 4.000, KL 0.0000", "refusal loss 2.000, KL 0.0500"]


def test_a_gene_without_scores_has_no_picture():
    with pytest.raises(SettingError, match="no selection scores"):
        pictures.of_scores({}, [])


def test_inspect_draws_the_scores(tmp_path, monkeypatch, capsys):
    gene, output = resources.files("safegene_edge") / "data" / SHIPPED, tmp_path / "scores.svg"
    monkeypatch.setattr(sys, "argv", ["x", "inspect", str(gene), "--plot", str(output)])
    main()
    assert "aligned_loss" in capsys.readouterr().out
    assert len(titles(output.read_text(), "rect")) == 30


@pytest.mark.parametrize("name", ["scores", "curve", "report", "portfolio"])
def test_one_style_that_needs_no_variable_and_nothing_from_elsewhere(name):
    text = every_picture()[name]
    root = ElementTree.fromstring(text)
    (style,) = root.iter(f"{SVG}style")
    assert "var(" not in style.text and "light-dark" not in style.text
    assert "@media (prefers-color-scheme: dark)" in style.text
    assert style.text == ElementTree.fromstring(every_picture()["curve"]).find(f"{SVG}style").text
    classes = {c for node in root.iter() for c in node.get("class", "").split()}
    assert classes <= set(re.findall(r"\.([a-z]+)", style.text)) | {"plot"}
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    width, height = (float(n) for n in root.get("viewBox").split()[2:])
    inner = [node for node in root if node.tag == f"{SVG}svg"]
    assert inner
    for node in inner:  # nothing is cut off at the bottom or the right
        assert float(node.get("x")) + float(node.get("width")) <= width
        assert float(node.get("y")) + float(node.get("height")) <= height


def test_a_reports_picture_holds_its_figures():
    report = reports.large()
    said = words(pictures.of_report(report))
    assert report["model"]["name"] in said
    for suite in report["suites"]:
        what, labels = findings.MEASURE[suite["kind"]]
        row = findings.row("", suite, labels)
        shown = " → ".join(f"{findings.percent(c.share)} %" for c in row.counts)
        place = said.index(f"{suite['name']}, {what}")
        assert said[place + 1] == shown
    assert {"without the gene", "with the gene"} <= set(said)


def test_a_report_without_a_gene_has_no_key_and_one_dot_a_suite():
    report = reports.small()
    text = pictures.of_report(report)
    assert "with the gene" not in words(text)
    root = ElementTree.fromstring(text)
    (*_, by_suite) = (node for node in root if node.tag == f"{SVG}svg")
    assert len(list(by_suite.iter(f"{SVG}circle"))) == len(report["suites"])


def test_a_hostile_name_stays_text():
    report = reports.large()
    report["model"]["name"] = "<script>alert(1)</script>\x07"
    assert "<script>alert(1)</script>\ufffd" in words(pictures.of_report(report))


def test_models_without_figures_are_left_out_of_a_portfolios_picture():
    rows = [PortfolioRow("a.gguf", (Count(3, 10), Count(9, 10)), (Count(0, 0), Count(0, 0))),
            PortfolioRow("b.gguf", error="failed")]  # fmt: skip
    said = words(picture(rows))
    assert "a, refused" in said and "30 % → 90 %" in said
    assert not [text for text in said if text.startswith("b") or "over-refused" in text]


def test_eval_draws_what_it_counted(tiny, tmp_path, capsys, monkeypatch):
    suite, picture_file = tmp_path / "s.jsonl", tmp_path / "p.svg"
    rows = ('{"prompt": "Name a harm."}', '{"prompt": "Name a tree.", "kind": "harmless"}')
    suite.write_text("\n".join(rows))
    arguments = ["eval", tiny("llama").gguf_path, "--suite", suite, "--plot", picture_file]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), "--max-tokens", "2"])
    main()
    assert f"report: {picture_file}" in capsys.readouterr().err
    assert {"s-harmful, refused", "s-harmless, over-refused"} <= set(
        words(picture_file.read_text())
    )
