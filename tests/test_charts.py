"""The two pictures: every layer and every point is in them, and they are well-formed."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from safegene_edge.charts import curve_chart, scores_chart
from safegene_edge.cli import main
from safegene_edge.errors import SettingError
from safegene_edge.gene import SHIPPED, SafetyGene
from safegene_edge.recalibrate.fit import Point

SVG = "{http://www.w3.org/2000/svg}"


def titles(text, tag):
    root = ElementTree.fromstring(text)
    return [node.find(f"{SVG}title").text for node in root.iter(f"{SVG}{tag}") if len(node)]


def test_every_layer_has_its_bar_and_the_kept_ones_say_so():
    gene = SafetyGene.shipped()
    bars = titles(scores_chart(gene.scores, gene.layers), "rect")
    assert len(bars) == len(gene.scores) == 30
    kept = {int(bar.split(":")[0].split()[1]) for bar in bars if bar.endswith("kept")}
    assert kept == set(gene.layers)


def test_every_point_near_the_budget_has_its_dot():
    points = [Point((0.0,), 4.0, 0.0), Point((1.0,), 2.0, 0.05), Point((2.0,), 1.0, 0.5)]
    dots = titles(curve_chart(points, points[1], 0.1), "circle")
    assert dots == ["refusal loss 4.000, KL 0.0000", "refusal loss 2.000, KL 0.0500"]


def test_a_gene_without_scores_has_no_picture():
    with pytest.raises(SettingError, match="no selection scores"):
        scores_chart({}, [])


def test_inspect_draws_the_scores(tmp_path, monkeypatch, capsys):
    from importlib import resources

    gene, output = resources.files("safegene_edge") / "data" / SHIPPED, tmp_path / "scores.svg"
    monkeypatch.setattr(sys, "argv", ["x", "inspect", str(gene), "--plot", str(output)])
    main()
    assert "aligned_loss" in capsys.readouterr().out
    assert len(titles(output.read_text(), "rect")) == 30
